"""Products with weights are einsums, however they are laid out for a platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axrepro.core import Context
from axrepro.nn.linear import matmul

CASES = {"to_width": ("btd,df->btf", 1), "to_heads": ("btd,dhk->bthk", 1), "from_heads": ("bthk,hkd->btd", 2)}
SIZES = dict(b=2, t=3, d=8, f=5, h=2, k=4)


def operands(einsum: str):
    shapes = [tuple(SIZES[axis] for axis in term) for term in einsum.split("->")[0].split(",")]
    return tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_an_einsum(case, platform, assert_close):
    einsum, contracted = CASES[case]
    x, weight = operands(einsum)
    ours = lambda x, w: matmul(x, w, Context(platform=platform), contracted=contracted)
    theirs = lambda x, w: jnp.einsum(einsum, x, w)
    actual, pull = jax.vjp(ours, x, weight)
    desired, expected_pull = jax.vjp(theirs, x, weight)
    assert_close(actual, desired, 1e-6)
    for a, d in zip(pull(jnp.cos(desired)), expected_pull(jnp.cos(desired)), strict=True):
        assert_close(a, d, 1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_operands_are_rounded_to_the_compute_type_and_the_sum_is_not(platform):
    ctx = Context(dtype="bfloat16", platform=platform)
    x, weight = jnp.full((1, 257), 1 + 2**-9), jnp.full((257, 1), 1 + 2**-7)  # bfloat16 rounds the first to 1
    assert matmul(x, weight, ctx).dtype == jnp.bfloat16
    exact = matmul(x, weight, ctx, dtype="float32")
    assert exact.dtype == jnp.float32
    np.testing.assert_array_equal(exact, 257 * (1 + 2**-7))  # 259.0078: bfloat16 has 258 and 260


def test_the_cpu_form_multiplies_matrices_only():
    x, weight = operands("bthk,hkd->btd")
    text = str(jax.make_jaxpr(lambda x, w: matmul(x, w, Context(), contracted=2))(x, weight))
    assert "dot_general[dimension_numbers=(([1], [0])" in text.replace("\n", "").replace("      ", "")
