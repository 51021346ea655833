"""Norms against torch, value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from axrepro.core import Context
from axrepro.core.param import init_params
from axrepro.nn import LayerNorm, RMSNorm

TOLERANCE = 3e-6  # float32 against float64: some tens of roundings of 6e-8 in each mean


def cases():
    return {
        "rms": (RMSNorm(eps=1e-3), torch.nn.RMSNorm(24, eps=1e-3)),
        "layer": (LayerNorm(eps=1e-3), torch.nn.LayerNorm(24, eps=1e-3)),
        "layer_without_bias": (LayerNorm(eps=1e-3, bias=False), torch.nn.LayerNorm(24, eps=1e-3, bias=False)),
    }


@pytest.mark.parametrize("name", cases())
def test_values_and_gradients_equal_torch(name, assert_close):
    ours, reference = cases()[name]
    reference = reference.double()
    rng = np.random.default_rng(0)
    x, probe = 0.1 * rng.normal(size=(2, 3, 5, 24)) + 0.05, rng.normal(size=(2, 3, 5, 24))
    params = {"scale": rng.normal(size=24)}
    if name == "layer":
        params["bias"] = rng.normal(size=24)
    for key, value in params.items():
        getattr(reference, {"scale": "weight"}.get(key, key)).data[:] = torch.tensor(value)
    inputs = torch.tensor(x, requires_grad=True)
    output = reference(inputs)
    (output * torch.tensor(probe)).sum().backward()

    params, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (params, x))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init_params(ours.specs(24), jax.random.key(0)))
    y, back = jax.vjp(lambda params, x: ours.apply(params, x, Context())[0], params, x)
    gradients, x_gradient = back(jnp.asarray(probe, jnp.float32))
    assert_close(y, output.detach().numpy(), TOLERANCE)
    assert_close(x_gradient, inputs.grad.numpy(), TOLERANCE)
    assert_close(gradients["scale"], reference.weight.grad.numpy(), TOLERANCE)
    if name == "layer":
        assert_close(gradients["bias"], reference.bias.grad.numpy(), TOLERANCE)


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm()], ids=["rms", "layer"])
def test_bfloat16_inputs_are_normalised_in_float32(norm):
    # 257 has no bfloat16 of its own and squares lose more: a norm computed in bfloat16 would differ from this one
    params = init_params(norm.specs(512), jax.random.key(0))
    x = (3.0 + jax.random.normal(jax.random.key(1), (4, 512))).astype(jnp.bfloat16)
    y, _ = norm.apply(params, x, Context(dtype="bfloat16"))
    assert y.dtype == jnp.bfloat16
    exact, _ = norm.apply(params, x.astype(jnp.float32), Context())
    assert exact.dtype == jnp.float32
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
