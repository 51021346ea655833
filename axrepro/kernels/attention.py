"""Scaled dot-product attention: plain XLA, TPU splash attention, cuDNN, or tokamax, behind one function.

Axes: B batch, T queries, S keys, H query heads, G key-value heads (H a multiple of G), K head dim.
"""

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from axrepro.errors import UserError, nearest, require, require_sizes

Implementation = Literal["auto", "xla", "splash", "cudnn", "tokamax"]
_MASKED = -2.0e38  # a finite float32: a row with every key masked then averages the values instead of giving nan


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
) -> Bool[Array, "#B T S"]:
    """True where a query may see a key.

    Args:
      segment_ids, key_segment_ids: a query sees keys of its own segment only.
      prefix: keys that every query of their segment sees, also earlier ones.
    """
    allowed = jnp.ones((1, queries, keys), bool)
    if mask.causal:
        distance = jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]
        allowed = (distance >= 0)[None]
        if mask.window is not None:
            allowed &= (distance < mask.window)[None]
        if prefix is not None:
            allowed |= prefix[:, None, :]
    if segment_ids is not None:
        key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
        allowed &= segment_ids[:, :, None] == key_segment_ids[:, None, :]
    return allowed


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
) -> Float[Array, "B T H K"]:
    """softmax(cap(q k' / sqrt(K)) + mask) v; softmax in float32, result in the dtype of `q`.

    Args:
      segment_ids, key_segment_ids, prefix: see `visible`; without `key_segment_ids`, keys have the queries' segments.
      logit_cap: c * tanh(logits / c) before the mask (Gemma 2, arXiv:2408.00118, Sec. 2).
      implementation: "auto" takes the fastest one that has every feature asked for on `platform`.
      platform: what the program is compiled for, which is not always `jax.default_backend()`.
      sharding: how `q` is laid out; kernels that XLA cannot partition run per shard of batch and heads.
    Raises:
      UserError: if an implementation is named that lacks a feature asked for; the message says which.
    """
    if q.shape[2] % k.shape[2]:
        raise UserError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key-value heads")
    wanted = {
        "a prefix": prefix is not None,
        "a logit cap": logit_cap is not None,
        "segments": segment_ids is not None,
        "cross-attention": q.shape[1] != k.shape[1],
    }
    chosen = _choose(implementation, platform, q, k, {name for name, used in wanted.items() if used})
    call = functools.partial(
        _IMPLEMENTATIONS[chosen],
        mask=mask,
        segment_ids=segment_ids,
        key_segment_ids=key_segment_ids,
        prefix=prefix,
        logit_cap=logit_cap,
    )
    if chosen == "splash":
        return call(q, k, v, interpret=platform != "tpu", sharding=sharding)
    return call(q, k, v)


_LACKS = {
    "xla": set(),
    "splash": {"a prefix"},
    "cudnn": {"a prefix", "a logit cap"},
    "tokamax": set(),
}


def _obstacle(name: str, q: jax.Array, k: jax.Array, wanted: set[str]) -> str | None:
    """Why an implementation cannot serve this call, or None."""
    if lacking := sorted(_LACKS[name] & wanted):
        return f"it does not support {' and '.join(lacking)}"
    if name == "splash" and (q.shape[1] % 128 or k.shape[1] % 128 or q.shape[3] % 64):
        sizes = f"T={q.shape[1]}, S={k.shape[1]}, head_dim={q.shape[3]}"
        return f"it needs lengths in multiples of 128 and head dims of 64, not {sizes}"
    if name == "cudnn" and (q.dtype.itemsize != 2 or q.shape[3] % 8 or q.shape[3] > 128):
        return f"it needs 16-bit inputs and a head dim of 8 to 128, not {q.dtype}, head_dim={q.shape[3]}"
    return None


def _choose(implementation: str, platform: str, q: jax.Array, k: jax.Array, wanted: set[str]) -> str:
    if implementation not in get_args(Implementation):
        raise UserError(f"unknown attention {implementation!r}; {nearest(implementation, get_args(Implementation))}")
    if implementation == "auto":
        best = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
        return best if _obstacle(best, q, k, wanted) is None else "xla"
    if obstacle := _obstacle(implementation, q, k, wanted):
        raise UserError(f"attention implementation={implementation!r} cannot serve this layer: {obstacle}; use 'auto'")
    return implementation


def _xla(q, k, v, *, mask, segment_ids, key_segment_ids, prefix, logit_cap):
    batch, queries, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, queries, groups, heads // groups, head_dim)
    logits = jnp.einsum("btghk,bsgk->bghts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    allowed = visible(mask, queries, k.shape[1], segment_ids, key_segment_ids, prefix)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], logits, _MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("bghts,bsgk->btghk", weights, v).reshape(batch, queries, heads, head_dim)


def _splash(q, k, v, *, mask, segment_ids, key_segment_ids, prefix, logit_cap, interpret, sharding):
    """jax's Pallas TPU kernel (blockwise, fused backward), mapped over the shards of batch and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    del prefix
    spec = PartitionSpec(None, None, None) if sharding is None else sharding.spec
    batch_axes, _, head_axes = (*spec, None, None, None)[:3]
    shards = 1 if sharding is None or head_axes is None else sharding.mesh.shape[head_axes]
    heads = q.shape[2] // shards
    shape = (q.shape[1], k.shape[1])
    if not mask.causal:
        pattern = masks.FullMask(shape)
    elif mask.window is None:
        pattern = masks.CausalMask(shape)
    else:
        pattern = masks.LocalMask(shape, (mask.window - 1, 0), 0)
    run = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([pattern] * heads), attn_logits_soft_cap=logit_cap, interpret=interpret
    )

    def local(q, k, v, query_segments, key_segments):
        def one(q, k, v, query_segments, key_segments):
            segments = None if query_segments is None else kernel.SegmentIds(query_segments, key_segments)
            return run(q, k, v, segments)

        q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * q.shape[-1] ** -0.5, k, v))  # [B, heads, length, K]
        in_axes = (0, 0, 0, None if query_segments is None else 0, None if query_segments is None else 0)
        # pyrefly: ignore[bad-argument-type]  # the kernel returns a tuple only where it is asked for residuals
        return jnp.moveaxis(jax.vmap(one, in_axes)(q, k, v, query_segments, key_segments), 1, 2)

    if segment_ids is not None and key_segment_ids is None:
        key_segment_ids = segment_ids
    if sharding is None:
        return local(q, k, v, segment_ids, key_segment_ids)
    heads_spec, rows = PartitionSpec(batch_axes, None, head_axes), PartitionSpec(batch_axes)
    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(heads_spec, heads_spec, heads_spec, rows, rows),
        out_specs=heads_spec,
        check_vma=False,
    )(q, k, v, segment_ids, key_segment_ids)


def _dense_mask(mask, q, k, segment_ids, key_segment_ids, prefix):
    """The part of the mask that only an array can say, or None; [B, 1, T, S]."""
    if segment_ids is None and prefix is None:
        return None
    return visible(mask, q.shape[1], k.shape[1], segment_ids, key_segment_ids, prefix)[:, None]


def _cudnn(q, k, v, *, mask, segment_ids, key_segment_ids, prefix, logit_cap):
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


def _tokamax(q, k, v, *, mask, segment_ids, key_segment_ids, prefix, logit_cap):
    try:
        import tokamax
        from absl import flags
    except ImportError:
        raise UserError("attention implementation='tokamax' needs the package: pip install tokamax") from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # it reads absl flags, and would else parse the launcher's command line
    return tokamax.dot_product_attention(
        q,
        k,
        v,
        mask=_dense_mask(mask, q, k, segment_ids, key_segment_ids, prefix),
        is_causal=mask.causal and prefix is None,
        local_window_size=None if mask.window is None or prefix is not None else (mask.window - 1, 0),
        logits_soft_cap=logit_cap,
    )


_IMPLEMENTATIONS = {"xla": _xla, "splash": _splash, "cudnn": _cudnn, "tokamax": _tokamax}
