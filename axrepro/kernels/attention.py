"""Scaled dot-product attention: plain XLA, row by row, TPU splash attention, cuDNN, or tokamax, behind one function.

Axes: B batch, T queries, S keys, H query heads, G key-value heads (H a multiple of G), K head dim.

Where the mesh splits the sequence, each device keeps its queries, and the keys and values come to it ("gather": all at
once, before the kernel; "ring": one device's share at a time, see `axrepro.kernels.ring_attention`). Both compute what
one device would. Kernels that leave out what a causal mask hides get their queries by `exchange`.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from axrepro.errors import UserError, nearest, require, require_sizes
from axrepro.kernels.tokamax_package import load_tokamax

Implementation = Literal["auto", "xla", "rows", "splash", "cudnn", "tokamax"]
ContextParallel = Literal["gather", "ring"]
MASKED = -2.0e38  # a finite float32: a row with every key masked then averages the values instead of giving nan


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query may see.

    Attributes:
      causal: keys at or before the query only.
      window: of those, the last `window` keys, the query's own included.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self):
        require_sizes(self, "window")
        require(self, "window", self.window is None or self.causal, "none where causal=False")


def visible(
    mask: Mask,
    queries: int,
    keys: int,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    prefix: Bool[Array, "B S"] | None = None,
    offset: int | Int[Array, ""] = 0,
) -> Bool[Array, "#B T S"]:
    """True where a query may see a key.

    Args:
      offset: place of the first query less that of the first key.
      segment_ids, key_segment_ids: a query sees keys of its own segment only.
      prefix: keys that every query of their segment sees, also earlier ones.
    """
    allowed = jnp.ones((1, queries, keys), bool)
    if mask.causal:
        distance = offset + jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]
        allowed = (distance >= 0)[None]
        if mask.window is not None:
            allowed &= (distance < mask.window)[None]
        if prefix is not None:
            allowed |= prefix[:, None, :]
    if segment_ids is not None:
        key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
        allowed &= segment_ids[:, :, None] == key_segment_ids[:, None, :]
    return allowed


@jax.named_scope("dot_product_attention")
def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    *,
    mask: Mask,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    prefix: Bool[Array, "B S"] | None = None,
    logit_cap: float | None = None,
    implementation: Implementation = "auto",
    platform: str = "cpu",
    sharding: NamedSharding | None = None,
    context_parallel: ContextParallel = "gather",
) -> Float[Array, "B T H K"]:
    """softmax(cap(q k' / sqrt(K)) + mask) v; softmax in float32, result in the dtype of `q`.

    Args:
      segment_ids, key_segment_ids, prefix: see `visible`; without `key_segment_ids`, keys have the queries' segments.
      logit_cap: c * tanh(logits / c) before the mask (Gemma 2, arXiv:2408.00118, Sec. 2).
      implementation: "auto" takes the fastest one that has every feature asked for on `platform`.
      platform: what the program is compiled for, which is not always `jax.default_backend()`.
      sharding: how `q` is laid out, and `k` and `v` but for heads that do not divide; kernels that XLA cannot partition
        run per shard.
      context_parallel: how keys reach the queries of other devices, where the sequence is split.
    Raises:
      UserError: if an implementation is named that lacks a feature asked for; the message says which.
    """
    if q.shape[2] % k.shape[2]:
        raise UserError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key-value heads")
    if context_parallel not in get_args(ContextParallel):
        near = nearest(context_parallel, get_args(ContextParallel))
        raise UserError(f"unknown context_parallel={context_parallel!r}; {near}")
    spec = () if sharding is None else sharding.spec
    batch_axes, length_axes, head_axes = (*spec, None, None, None)[:3]
    # a device with query heads needs their key-value heads: a copy, where there are fewer than devices
    copies = math.lcm(k.shape[2], _devices(sharding, head_axes)) // k.shape[2]
    if copies > 1:
        k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    if segment_ids is not None and key_segment_ids is None:
        key_segment_ids = segment_ids
    split = length_axes is not None
    wanted = {
        "a prefix": prefix is not None,
        "a logit cap": logit_cap is not None,
        "segments": segment_ids is not None,
        "cross-attention": q.shape[1] != k.shape[1],
        "a split sequence": split and context_parallel == "gather",
        "context_parallel='ring'": split and context_parallel == "ring",
        "several devices": sharding is not None,
    }
    shards = _devices(sharding, length_axes)
    used = {name for name, want in wanted.items() if want}
    chosen = _choose(implementation, platform, q, (q.shape[1] // shards, k.shape[1]), used)
    options = {"mask": mask, "logit_cap": logit_cap}
    arrays = (q, k, v, segment_ids, key_segment_ids, prefix)
    kernel, kernel_spec, swap = None, None, False
    if chosen == "splash":
        heads = q.shape[2] // _devices(sharding, head_axes)
        shape = (q.shape[1], k.shape[1])
        swap = mask.causal and mask.window is None and shards % 2 == 0
        kernel = _splash_kernel(heads, shape, shards, swap, interpret=platform != "tpu", **options)
        if sharding is None:
            return _splash(*arrays, kernel=kernel)
        rows_axes = length_axes if mask.causal else None
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(sharding.mesh, PartitionSpec(None, rows_axes)))
    elif not split:
        return _IMPLEMENTATIONS[chosen](*arrays, **options)

    def local(kernel, *arrays):
        if split and context_parallel == "ring":
            from axrepro.kernels.ring_attention import ring_attention

            return ring_attention(*arrays, axes=length_axes, **options)
        q, k, v, segment_ids, *rest = arrays
        if split:
            gather = functools.partial(jax.lax.all_gather, axis_name=length_axes, axis=1, tiled=True)
            k, v, rest = jax.tree.map(gather, (k, v, rest))
        if chosen == "xla":
            offset = jax.lax.axis_index(length_axes) * q.shape[1]
            return _xla(q, k, v, segment_ids, *rest, offset=offset, **options)
        if not swap:
            return _splash(q, k, v, segment_ids, *rest, kernel=kernel)
        assert length_axes is not None  # only a split sequence is exchanged
        q, segment_ids = jax.tree.map(functools.partial(exchange, axes=length_axes), (q, segment_ids))
        return exchange(_splash(q, k, v, segment_ids, *rest, kernel=kernel), length_axes, back=True)

    heads_spec, rows = PartitionSpec(batch_axes, length_axes, head_axes), PartitionSpec(batch_axes, length_axes)
    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(kernel_spec, heads_spec, heads_spec, heads_spec, rows, rows, rows),
        out_specs=heads_spec,
        check_vma=False,
    )(kernel, *arrays)


def exchange(x: jax.Array, axes: str | tuple[str, ...], back: bool = False) -> jax.Array:
    """Gives each of N devices one of the first and one of the last of 2 N parts of a split sequence, or them `back`.

    Device i has parts 2i and 2i + 1, and gets i and 2N - 1 - i (Llama 3, arXiv:2407.21783, Sec. 3.3.2). Under a causal
    mask all devices then have as much to do; without it, the last one has 2 - 1/N times the average. Only attention
    sees this order: a mixture of experts, for one, depends on it.

    Args:
      x: the part of one device, its sequence in dimension 1, inside a `shard_map`.
      axes: the mesh axes that the sequence is split over.
    """
    devices = jax.lax.axis_size(axes)
    home = lambda part: min(part, 2 * devices - 1 - part)
    even, odd = ([(i, home(2 * i + j)) for i in range(devices)] for j in (0, 1))
    # even parts come first on even devices, and last on odd ones
    swapped = jax.lax.axis_index(axes) % 2 == 1
    flip = lambda a, b: (jnp.where(swapped, b, a), jnp.where(swapped, a, b))
    first, second = jnp.split(x, 2, axis=1)
    if back:
        first, second = flip(first, second)
        even, odd = ([(there, here) for here, there in pairs] for pairs in (even, odd))
    first, second = jax.lax.ppermute(first, axes, even), jax.lax.ppermute(second, axes, odd)
    return jnp.concatenate((first, second) if back else flip(first, second), axis=1)


def _devices(sharding: NamedSharding | None, axes: str | tuple[str, ...] | None) -> int:
    """How many devices a dimension is split over."""
    if sharding is None or axes is None:
        return 1
    return math.prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


_LACKS = {
    "xla": set(),
    "rows": {"a logit cap", "several devices"},
    "splash": {"a prefix", "context_parallel='ring'"},
    "cudnn": {"a prefix", "a logit cap", "a split sequence", "context_parallel='ring'"},
    "tokamax": {"a split sequence", "context_parallel='ring'"},
}


def _obstacle(name: str, q: jax.Array, lengths: tuple[int, int], wanted: set[str]) -> str | None:
    """Why an implementation cannot serve this call, with so many queries and keys on a device, or None."""
    if lacking := sorted(_LACKS[name] & wanted):
        return f"it does not support {' and '.join(lacking)}"
    if name == "splash" and (lengths[0] % 128 or lengths[1] % 128 or q.shape[3] % 64):
        sizes = f"T={lengths[0]}, S={lengths[1]}, head_dim={q.shape[3]}"
        return f"it needs lengths in multiples of 128 and head dims of 64, not {sizes}"
    if name == "cudnn" and (q.dtype.itemsize != 2 or q.shape[3] % 8 or q.shape[3] > 128):
        return f"it needs 16-bit inputs and a head dim of 8 to 128, not {q.dtype}, head_dim={q.shape[3]}"
    return None


def _choose(implementation: str, platform: str, q: jax.Array, lengths: tuple[int, int], wanted: set[str]) -> str:
    if implementation not in get_args(Implementation):
        raise UserError(f"unknown attention {implementation!r}; {nearest(implementation, get_args(Implementation))}")
    if implementation == "auto":
        best = {"tpu": "splash", "gpu": "cudnn", "cpu": "rows"}.get(platform, "xla")
        return best if _obstacle(best, q, lengths, wanted) is None else "xla"
    if obstacle := _obstacle(implementation, q, lengths, wanted):
        raise UserError(f"attention implementation={implementation!r} cannot serve this layer: {obstacle}; use 'auto'")
    return implementation


def _xla(q, k, v, segment_ids, key_segment_ids, prefix, *, mask, logit_cap, offset=0):
    batch, queries, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, queries, groups, heads // groups, head_dim)
    logits = jnp.einsum("btghk,bsgk->bghts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    allowed = visible(mask, queries, k.shape[1], segment_ids, key_segment_ids, prefix, offset)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], logits, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("bghts,bsgk->btghk", weights, v).reshape(batch, queries, heads, head_dim)


def _rows(q, k, v, segment_ids, key_segment_ids, prefix, *, mask, logit_cap):
    """One row of the batch after another, so that its [heads, T, S] arrays stay in a core's cache.

    The backward pass computes the weights again, and takes the softmax's inner product over K instead of S
    (FlashAttention, arXiv:2205.14135, Sec. 3.1 and Appendix B). A step of `dense_tiny` takes 0.75 of the CPU time that
    it takes with "xla" (one thread, jaxlib 0.10.2). It has no forward-mode derivative; "xla" has.
    """
    del logit_cap
    batch, queries, heads, head_dim = q.shape
    groups = k.shape[2]
    allowed = visible(mask, queries, k.shape[1], segment_ids, key_segment_ids, prefix)
    q = q.reshape(batch, queries, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if allowed.shape[0] == 1:
        y = jax.lax.map(lambda row: _row(*row, allowed[0]), (q, k, v))
    else:
        y = jax.lax.map(lambda row: _row(*row), (q, k, v, allowed))
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head_dim)


@jax.custom_vjp
def _row(q, k, v, allowed):
    """[G, H/G, T, K] attention of one row of the batch."""
    return _row_forward(q, k, v, allowed)[0]


def _row_logits(q, k, allowed):
    logits = jnp.einsum("ghtk,gsk->ghts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(allowed, logits, MASKED)


def _row_forward(q, k, v, allowed):
    logits = _row_logits(q, k, allowed)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    y = jnp.einsum("ghts,gsk->ghtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    y = y.astype(q.dtype)
    return y, (q, k, v, allowed, top, total, y)


def _row_backward(residuals, g):
    q, k, v, allowed, top, total, y = residuals
    weights = jnp.exp(_row_logits(q, k, allowed) - top) / total
    inner = (y.astype(jnp.float32) * g).sum(-1, keepdims=True)
    change = jnp.einsum("ghtk,gsk->ghts", g, v, preferred_element_type=jnp.float32) - inner
    change = jnp.where(allowed, weights * change * q.shape[-1] ** -0.5, 0).astype(q.dtype)
    dq = jnp.einsum("ghts,gsk->ghtk", change, k)
    return dq, _over_queries(q, change), _over_queries(g, weights.astype(g.dtype)), None


def _over_queries(x, weights):
    """sum over h and t of weights[g, h, t, s] x[g, h, t, k]; x is transposed, which is the smaller of the two."""
    groups, _, _, keys = weights.shape
    x = x.reshape(groups, -1, x.shape[-1]).swapaxes(1, 2)
    return (x @ weights.reshape(groups, -1, keys)).swapaxes(1, 2)


_row.defvjp(_row_forward, _row_backward)


_BLOCKS = (512, 256, 128)  # rows and keys that a TPU's core works on at once; the kernel's own choice is always 128


def _splash_kernel(heads, shape, shards, swap, interpret, mask, logit_cap):
    """Pallas TPU kernel (blockwise) for a shard of the queries, exchanged or not, and all keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if not mask.causal:  # every shard alike
        pattern, shards = masks.FullMask((shape[0] // shards, shape[1])), 1
    elif mask.window is None:
        pattern = masks.CausalMask(shape)
        if swap:
            parts = np.arange(shape[0], dtype=np.int32).reshape(2 * shards, -1)
            pattern.q_sequence = np.stack([parts[:shards], parts[: shards - 1 : -1]], 1).ravel()
    else:
        pattern = masks.LocalMask(shape, (mask.window - 1, 0), 0)
    rows, keys = (next(n for n in _BLOCKS if length % n == 0) for length in (pattern.shape[0] // shards, shape[1]))
    blocks = kernel.BlockSizes(
        block_q=rows, block_q_dkv=rows, block_q_dq=rows, block_kv=keys, block_kv_dkv=keys, block_kv_dq=keys
    )
    return kernel.make_splash_mha(
        masks.MultiHeadMask([pattern] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=logit_cap,
        interpret=interpret,
    )


def _splash(q, k, v, segment_ids, key_segment_ids, prefix, *, kernel):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    del prefix

    def one(q, k, v, segment_ids, key_segment_ids):
        return kernel(q, k, v, None if segment_ids is None else SegmentIds(segment_ids, key_segment_ids))

    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * q.shape[-1] ** -0.5, k, v))  # [B, heads, length, K]
    in_axes = (0, 0, 0, *(None if ids is None else 0 for ids in (segment_ids, key_segment_ids)))
    # pyrefly: ignore[bad-argument-type]  # the kernel returns a tuple only where it is asked for residuals
    return jnp.moveaxis(jax.vmap(one, in_axes)(q, k, v, segment_ids, key_segment_ids), 1, 2)


def _dense_mask(mask, q, k, segment_ids, key_segment_ids, prefix):
    """The part of the mask that only an array can say, or None; [B, 1, T, S]."""
    if segment_ids is None and prefix is None:
        return None
    return visible(mask, q.shape[1], k.shape[1], segment_ids, key_segment_ids, prefix)[:, None]


def _cudnn(q, k, v, segment_ids, key_segment_ids, prefix, *, mask, logit_cap):
    del logit_cap
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=_dense_mask(mask, q, k, segment_ids, key_segment_ids, prefix),
        is_causal=mask.causal,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )


def _tokamax(q, k, v, segment_ids, key_segment_ids, prefix, *, mask, logit_cap):
    return load_tokamax().dot_product_attention(
        q,
        k,
        v,
        mask=_dense_mask(mask, q, k, segment_ids, key_segment_ids, prefix),
        is_causal=mask.causal and prefix is None,
        local_window_size=None if mask.window is None or prefix is not None else (mask.window - 1, 0),
        logits_soft_cap=logit_cap,
    )


_IMPLEMENTATIONS = {"xla": _xla, "rows": _rows, "cudnn": _cudnn, "tokamax": _tokamax}
