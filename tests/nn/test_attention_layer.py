"""The attention layer around the kernels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from axrepro.core import Context
from axrepro.core.param import init_params
from axrepro.nn import Attention, Mask, RMSNorm


def random_params(layer, dim, seed=0):
    """All parameters random, biases and norm scales included."""
    params = init_params(layer.specs(dim), jax.random.key(seed))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return structure.unflatten([p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


@partial(jax.jit, static_argnums=0)
def applied(layer, params, x, ctx=Context()):
    return layer.apply(params, x, ctx)


def torch_attention(params, queries, source, mask) -> torch.Tensor:
    """torch.nn.MultiheadAttention with the same weights, in float64."""
    flat = {name: torch.tensor(np.asarray(value, np.float64)) for name, value in params.items()}
    dim, heads, _ = flat["q"].shape
    module = torch.nn.MultiheadAttention(dim, heads, batch_first=True).double()
    module.in_proj_weight.data = torch.cat([flat[name].reshape(dim, -1).T for name in "qkv"])
    module.in_proj_bias.data = torch.cat([flat[f"{name}_bias"].reshape(-1) for name in "qkv"])
    module.out_proj.weight.data = flat["out"].reshape(-1, dim).T
    module.out_proj.bias.data = flat["out_bias"]
    inputs = (torch.tensor(np.asarray(x, np.float64)) for x in (queries, source, source))
    return module(*inputs, attn_mask=mask, need_weights=False)[0].detach().numpy()


def test_self_attention_with_biases_equals_torch(assert_close):
    layer = Attention(num_heads=4, rope=None, qkv_bias=True, out_bias=True)
    params = random_params(layer, 16)
    x = jax.random.normal(jax.random.key(2), (2, 7, 16))
    blocked = torch.ones(7, 7, dtype=bool).triu(1)
    assert_close(applied(layer, params, x)[0], torch_attention(params, x, x, blocked), 2e-6)


def test_cross_attention_reads_the_memory_and_skips_its_padding(assert_close):
    layer = Attention(num_heads=2, rope=None, mask=Mask(causal=False), cross=True, qkv_bias=True, out_bias=True)
    params = random_params(layer, 8)
    x, memory = jax.random.normal(jax.random.key(2), (1, 5, 8)), jax.random.normal(jax.random.key(3), (1, 6, 8))
    whole, _ = applied(layer, params, x, Context(memory=memory))
    assert_close(whole, torch_attention(params, x, memory, None), 2e-6)
    memory_segment_ids = jnp.array([[1, 1, 2, 2, 0, 0]])
    padded = Context(memory=memory, memory_segment_ids=memory_segment_ids, segment_ids=jnp.ones((1, 5), int))
    assert_close(applied(layer, params, x, padded)[0], torch_attention(params, x, memory[:, :4], None), 2e-6)
    with pytest.raises(ValueError, match=r"reads ctx\.memory"):
        applied(layer, params, x)


def test_query_and_key_norms_make_the_scale_of_the_input_irrelevant(assert_close):
    # eps aside, the logits do not see it, and values and output are linear in it
    layer = Attention(num_heads=2, qk_norm=RMSNorm(eps=0.0))
    params = random_params(layer, 8)
    x = jax.random.normal(jax.random.key(2), (1, 5, 8))
    y, aux = applied(layer, params, x)
    assert_close(applied(layer, params, 100 * x)[0], 100 * y, 2e-6)
    assert set(aux) == {"q_norm", "k_norm"}


def test_a_shift_of_all_positions_changes_nothing(assert_close):
    layer = Attention(num_heads=2, num_kv_heads=1)
    params = random_params(layer, 16)
    x = jax.random.normal(jax.random.key(2), (1, 9, 16))
    y, _ = applied(layer, params, x)
    shifted, _ = applied(layer, params, x, Context(positions=jnp.arange(9)[None] + 50))
    assert_close(shifted, y, 1e-5)  # angles of 60 rad carry a float32 error of 4e-6
    stretched, _ = applied(layer, params, x, Context(positions=2 * jnp.arange(9)[None]))
    assert np.abs(stretched - y).max() > 1e-2


def test_attention_flops_count_the_keys_that_are_seen():
    # 2 products of 2 K FLOPs for each head and key
    length, window = 64, 16
    per_key = 2 * 2 * 4 * 8
    causal = sum(t + 1 for t in range(length)) / length
    windowed = sum(min(t + 1, window) for t in range(length)) / length
    layer = Attention(num_heads=4, head_dim=8)
    local = Attention(num_heads=4, head_dim=8, mask=Mask(window=window))
    assert layer.attention_flops(32, length, full=True) == per_key * length
    # the formula leaves out the half key of the diagonal
    assert layer.attention_flops(32, length, full=False) == pytest.approx(per_key * (causal - 0.5))
    assert local.attention_flops(32, length, full=False) == pytest.approx(per_key * windowed, rel=0.04)
