"""Rotary positions against their equation and the frequencies that transformers computes."""

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from axrepro.nn import LinearScaling, Llama3Scaling, RoPE, YarnScaling


def reference_frequencies(head_dim: int, base: float, fraction: float, **rope):
    parameters = {"rope_theta": base, "partial_rotary_factor": fraction, **rope}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=rope.get("original_max_position_embeddings", 2048),
        rope_parameters=parameters,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return frequencies.double().numpy(), factor


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("head_dim", "fraction"), [(64, 1.0), (128, 0.5), (96, 1.0)])
@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        (LinearScaling(factor=3.0), {"rope_type": "linear", "factor": 3.0}),
        (
            Llama3Scaling(),
            {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            Llama3Scaling(factor=32.0, low_frequency_factor=2.0, high_frequency_factor=16.0, original_length=1024),
            {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 16.0,
                "original_max_position_embeddings": 1024,
            },
        ),
        (
            YarnScaling(factor=4.0, original_length=4096),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        ),
        (
            YarnScaling(factor=16.0, original_length=2048, beta_fast=16.0, beta_slow=2.0),
            {
                "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048, "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
        (
            YarnScaling(factor=1.0, original_length=2048),
            {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 2048},
        ),
    ],
    ids=["linear", "llama3", "llama3_other", "yarn", "yarn_other", "yarn_factor_1"],
)  # fmt: skip
def test_scaled_frequencies_equal_transformers(scaling, rope, head_dim, fraction, base):
    expected, factor = reference_frequencies(head_dim, base, fraction, **rope)
    actual = RoPE(base=base, fraction=fraction, scaling=scaling).frequencies(head_dim)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)  # transformers computes them in float32
    assert scaling.amplitude() == pytest.approx(factor, rel=1e-12)


def test_pairs_turn_as_complex_numbers():
    # pair i of x as the complex number x[i] + j x[i + K/2], times exp(j position frequency)
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 100, (2, 5))
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * frequencies)
    actual = RoPE().rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions))
    # an angle of up to 100 rad has a float32 error of 4e-6
    np.testing.assert_allclose(actual, np.concatenate([turned.real, turned.imag], -1), atol=3e-5)


@pytest.mark.parametrize(
    "scaling", [None, Llama3Scaling(original_length=16), YarnScaling(factor=4.0, original_length=64)]
)
def test_products_depend_on_the_distance_alone(scaling):
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 2, 16)), jnp.float32) for _ in range(2))
    rope = RoPE(scaling=scaling)

    def product(query, key):
        turned = rope.rotate(q, jnp.array([[query]])), rope.rotate(k, jnp.array([[key]]))
        return jnp.einsum("bthk,bthk->h", *turned)

    for distance in (0, 3, 17):
        expected = product(distance, 0)
        for key in (5, 40):
            np.testing.assert_allclose(product(key + distance, key), expected, atol=1e-4)
    assert np.abs(product(3, 0) - product(0, 0)).max() > 0.1


def test_yarn_multiplies_each_of_query_and_key_by_its_amplitude():
    scaling = YarnScaling(factor=4.0, original_length=64)
    x = jnp.ones((1, 1, 1, 16))
    length = jnp.linalg.norm(RoPE(scaling=scaling).rotate(x, jnp.array([[9]])))
    np.testing.assert_allclose(length, 4.0 * (0.1 * np.log(4.0) + 1.0), rtol=1e-6)


def test_a_fraction_leaves_the_other_dimensions_untouched():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 6, 2, 16)), jnp.float32)
    positions = jnp.arange(6)[None]
    partly = RoPE(fraction=0.25).rotate(x, positions)
    np.testing.assert_array_equal(partly[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(partly[..., :4], RoPE().rotate(x[..., :4], positions))


def test_position_zero_changes_nothing_and_the_dtype_stays():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 1, 2, 8)), jnp.bfloat16)
    rotated = RoPE().rotate(x, jnp.zeros((1, 1), jnp.int32))
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotated, x)


def test_an_odd_rotated_width_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        RoPE(fraction=0.5).frequencies(6)
