"""Feed-forward layers and embeddings against torch, value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from axrepro.core import Context
from axrepro.core.param import count_params, init_params, matmul_flops
from axrepro.models.causal_lm import CausalLM
from axrepro.nn import Attention, Block, Embedding, FeedForward

TOLERANCE = 3e-6  # float32 against float64: products of width 24 and 40
TORCH = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu_squared": lambda x: torch.nn.functional.relu(x) ** 2,
}


@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)], ids=["gated", "ungated_with_biases"])
@pytest.mark.parametrize("act", TORCH)
def test_every_variant_equals_torch(act, gated, bias, assert_close):
    layer = FeedForward(hidden=40, act=act, gated=gated, bias=bias)
    names = init_params(layer.specs(24), jax.random.key(0))
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=value.shape) * 0.2 for name, value in names.items()}
    x, probe = rng.normal(size=(2, 3, 24)), rng.normal(size=(2, 3, 24))

    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}
    inputs = torch.tensor(x, requires_grad=True)
    up = torch.nn.functional.linear(inputs, theirs["up"].T, theirs.get("up_bias"))
    h = TORCH[act](inputs @ theirs["gate"]) * up if gated else TORCH[act](up)
    output = torch.nn.functional.linear(h, theirs["down"].T, theirs.get("down_bias"))
    (output * torch.tensor(probe)).sum().backward()

    params, x32, probe32 = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (weights, x, probe))
    y, back = jax.vjp(lambda params, x: layer.apply(params, x, Context())[0], params, x32)
    gradients, x_gradient = back(probe32)
    assert_close(y, output.detach().numpy(), TOLERANCE)
    assert_close(x_gradient, inputs.grad.numpy(), TOLERANCE)
    assert_close(gradients, {name: value.grad.numpy() for name, value in theirs.items()}, TOLERANCE)


def test_products_run_in_the_compute_type():
    layer = FeedForward(hidden=16, bias=True)
    params = init_params(layer.specs(8), jax.random.key(0))
    y, _ = layer.apply(params, jnp.ones((1, 2, 8), jnp.bfloat16), Context(dtype="bfloat16"))
    assert y.dtype == jnp.bfloat16


def test_an_embedding_looks_rows_up_and_adds_their_gradients(assert_close):
    layer = Embedding(vocab_size=11, scale=3.0)
    params = init_params(layer.specs(6), jax.random.key(0))
    tokens = np.array([[1, 4, 1], [10, 0, 1]])
    probe = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    y, back = jax.vjp(lambda p: layer.apply(p, jnp.asarray(tokens), Context())[0], params)
    np.testing.assert_array_equal(y, 3.0 * np.asarray(params["table"])[tokens])
    expected = np.zeros((11, 6))
    for row, token in zip(probe.reshape(-1, 6), tokens.ravel(), strict=True):
        expected[token] += 3.0 * row
    assert_close(back(jnp.asarray(probe))[0]["table"], expected, 1e-6)


def test_a_tied_head_is_the_table_and_counts_as_one_product(assert_close):
    block = Block(attention=Attention(num_heads=2), ffn=FeedForward(hidden=16))
    tied, untied = (CausalLM(vocab_size=13, dim=8, layers=block, tied=tied) for tied in (True, False))
    assert count_params(untied.specs()) - count_params(tied.specs()) == 8 * 13
    # the head's product costs the same either way; looking rows up costs none
    assert matmul_flops(tied.specs()) == matmul_flops(untied.specs())

    params = init_params(tied.specs(), jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (1, 4, 8))
    table = np.asarray(params["embed"]["table"], np.float64)
    assert_close(tied.logits(params, hidden, Context()), np.asarray(hidden) @ table.T, 1e-6)
    head = jnp.asarray(table.T, jnp.float32)
    np.testing.assert_array_equal(
        untied.logits({"head": head}, hidden, Context()), tied.logits(params, hidden, Context())
    )


def test_a_logit_cap_bounds_the_logits_smoothly(assert_close):
    block = Block(attention=Attention(num_heads=2), ffn=FeedForward(hidden=16))
    model = CausalLM(vocab_size=13, dim=8, layers=block, logit_cap=2.0)
    params = init_params(model.specs(), jax.random.key(0))
    hidden = 10 * jax.random.normal(jax.random.key(1), (1, 4, 8))
    plain = np.asarray(hidden, np.float64) @ np.asarray(params["head"], np.float64)
    assert np.abs(plain).max() > 4
    assert_close(model.logits(params, hidden, Context()), 2.0 * np.tanh(plain / 2.0), 3e-6)
