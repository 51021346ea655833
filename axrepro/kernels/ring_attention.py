"""Ring attention (arXiv:2310.01889): keys and values pass from device to device, so that none ever holds them all.

Every device keeps its queries and adds up their outputs with the running softmax of FlashAttention (arXiv:2205.14135,
Algorithm 1), tile by tile and in float32; the backward pass computes the logits again (arXiv:2307.08691, Algorithm 2)
while the gradients of keys and values travel along with them. The next share is on its way while one is worked on.

Under a causal mask the devices `exchange` tokens, so that all rounds cost the same everywhere. With a window, the
rounds whose keys are all out of reach are left out instead.

Axes: B batch, T queries and S keys of one device, G key-value heads, R query heads each, K head dim, C of a tile.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from axrepro.kernels.attention import MASKED, Mask, exchange, visible

TILE = 512  # the most queries, and keys, whose logits exist at once


def ring_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B S"] | None,
    prefix: Bool[Array, "B S"] | None,
    *,
    mask: Mask,
    logit_cap: float | None,
    axes: str | tuple[str, ...],
) -> Float[Array, "B T H K"]:
    """`axrepro.kernels.attention.attention` inside a `shard_map`, on one device's part of every argument.

    Args:
      axes: the mesh axes that the sequence is split over.
    """
    devices, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    length, keys = q.shape[1], k.shape[1]
    # a query that may see any key, also a later one, leaves nothing to balance or to leave out
    bounded = mask.causal and prefix is None
    swap = bounded and mask.window is None and devices % 2 == 0 and length % 2 == 0
    rounds = devices
    if bounded and mask.window is not None:
        rounds = min(devices, 1 + math.ceil((mask.window - 1) / keys))
    ring = _Ring(
        mask=mask,
        logit_cap=logit_cap,
        axes=axes,
        devices=devices,
        rounds=rounds,
        bounded=bounded,
        tile=(_tile(length // (1 + swap)), _tile(keys // (1 + swap))),
    )
    starts = _starts(me, devices, length, ring.tile[0], swap), _starts(me, devices, keys, ring.tile[1], swap)
    arrays = (q, k, v, segment_ids, key_segment_ids, prefix)
    if swap:
        arrays = jax.tree.map(functools.partial(exchange, axes=axes), arrays)
    y = _attend(ring, starts, *arrays)
    return exchange(y, axes, back=True) if swap else y


def _tile(length: int) -> int:
    return next(size for size in range(min(TILE, length), 0, -1) if length % size == 0)


def _starts(device, devices: int, length: int, tile: int, swap: bool) -> Int[Array, " tiles"]:
    """Place of each tile of a device in the whole sequence."""
    if not swap:
        return device * length + tile * jnp.arange(length // tile)
    within = tile * jnp.arange(length // 2 // tile)
    return jnp.concatenate([part * (length // 2) + within for part in (device, 2 * devices - 1 - device)])


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """What the passes around the ring need and arrays do not hold.

    Attributes:
      rounds: shares of keys that any query may see.   bounded: whether a tile can lie wholly out of sight.
      tile: queries and keys per tile.
    """

    mask: Mask
    logit_cap: float | None
    axes: str | tuple[str, ...]
    devices: int
    rounds: int
    bounded: bool
    tile: tuple[int, int]

    def send(self, tree, by: int = 1):
        """Each device's arrays to the one `by` places on."""
        pairs = [(i, (i + by) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, pairs), tree)

    def logits(self, queries, keys):
        """float32[B, G, R, C, C] logits of a tile, `MASKED` where hidden; their slope under the cap; where not."""
        start, q, segment_ids = queries
        key_start, k, _, key_segment_ids, prefix = keys
        logits = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        slope = 1.0
        if self.logit_cap is not None:
            bent = jnp.tanh(logits / self.logit_cap)
            logits, slope = self.logit_cap * bent, 1 - bent**2
        seen = visible(self.mask, *self.tile, segment_ids, key_segment_ids, prefix, start - key_start)[:, None, None]
        return jnp.where(seen, logits, MASKED), slope, seen

    def in_sight(self, start, key_start):
        """Whether any query of a tile may see any of its keys, by their places alone."""
        if not self.bounded:
            return True
        nearest_key = key_start <= start + self.tile[0] - 1
        if self.mask.window is None:
            return nearest_key
        return nearest_key & (start - (key_start + self.tile[1] - 1) < self.mask.window)


def _tiles(x: jax.Array | None, size: int) -> jax.Array | None:
    """[B, T, ...] to [tiles, B, size, ...]."""
    return None if x is None else jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _whole(x: jax.Array) -> jax.Array:
    """The reverse of `_tiles`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _grouped(ring: _Ring, x: jax.Array, groups: int) -> Float[Array, "tiles B C G R K"]:
    # pyrefly: ignore[bad-return]  # for an array, an array
    return _tiles(x.reshape(*x.shape[:2], groups, -1, x.shape[-1]), ring.tile[0])


def _rows(x: Float[Array, "B G R C"]) -> Float[Array, "B C G R 1"]:
    return jnp.moveaxis(x, 3, 1)[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, starts, q, k, v, segment_ids, key_segment_ids, prefix):
    return _forward(ring, starts, q, k, v, segment_ids, key_segment_ids, prefix)[0]


def _forward(ring: _Ring, starts, q, k, v, segment_ids, key_segment_ids, prefix):
    queries = (starts[0], _grouped(ring, q, k.shape[2]), _tiles(segment_ids, ring.tile[0]))
    keys = (starts[1], *(_tiles(x, ring.tile[1]) for x in (k, v, key_segment_ids, prefix)))
    tiles, batch, size, groups, heads, head_dim = queries[1].shape

    def add(state, queries, keys):
        y, top, total = state
        logits, _, _ = ring.logits(queries, keys)
        new = jnp.maximum(top, logits.max(-1))
        weights, kept = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
        part = jnp.einsum("bgrts,bsgk->btgrk", weights.astype(v.dtype), keys[2], preferred_element_type=jnp.float32)
        return y * _rows(kept) + part, new, total * kept + weights.sum(-1)

    def work(states, keys):
        def one_tile(state, queries):
            def with_keys(state, keys):
                skip = lambda state, *_: state
                return jax.lax.cond(ring.in_sight(queries[0], keys[0]), add, skip, state, queries, keys), None

            return jax.lax.scan(with_keys, state, keys)[0]

        return jax.lax.map(lambda xs: one_tile(*xs), (states, queries))

    rows = (tiles, batch, groups, heads, size)
    empty = jnp.zeros((tiles, batch, size, groups, heads, head_dim)), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
    one = lambda _, states_and_keys: (work(*states_and_keys), ring.send(states_and_keys[1]))
    y, top, total = work(*jax.lax.fori_loop(0, ring.rounds - 1, one, (empty, keys)))
    y = _whole(y / jax.vmap(_rows)(total)).reshape(q.shape).astype(q.dtype)
    return y, (starts, q, k, v, segment_ids, key_segment_ids, prefix, y, top, total)


def _backward(ring: _Ring, residuals, dy):
    starts, q, k, v, segment_ids, key_segment_ids, prefix, y, top, total = residuals
    grouped = functools.partial(_grouped, ring, groups=k.shape[2])
    # the softmax's share of the gradient, sum of dy y per query (arXiv:2205.14135, Eq. 4)
    inner = jnp.moveaxis((grouped(dy).astype(jnp.float32) * grouped(y)).sum(-1), 2, 4)
    queries = (starts[0], grouped(q), _tiles(segment_ids, ring.tile[0])), (grouped(dy), inner, top, total)
    keys = (starts[1], *(_tiles(x, ring.tile[1]) for x in (k, v, key_segment_ids, prefix)))

    def gradients(queries, keys):
        (_, q, _), (dy, inner, top, total) = queries
        _, k, v, _, _ = keys
        logits, slope, seen = ring.logits(queries[0], keys)
        weights = jnp.exp(logits - top[..., None]) / total[..., None]
        dv = jnp.einsum("bgrts,btgrk->bsgk", weights.astype(dy.dtype), dy, preferred_element_type=jnp.float32)
        dweights = jnp.einsum("btgrk,bsgk->bgrts", dy, v, preferred_element_type=jnp.float32)
        dlogits = jnp.where(seen, weights * (dweights - inner[..., None]) * slope, 0) * q.shape[-1] ** -0.5
        dlogits = dlogits.astype(q.dtype)
        dq = jnp.einsum("bgrts,bsgk->btgrk", dlogits, k, preferred_element_type=jnp.float32)
        dk = jnp.einsum("bgrts,btgrk->bsgk", dlogits, q, preferred_element_type=jnp.float32)
        return dq, dk, dv

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), (queries[0][1], keys[1], keys[2]))

    def work(dq, keys):
        keys, dkv = keys

        def with_keys(dq, xs):
            keys, dkv = xs

            def one_tile(dkv, queries):
                nothing = lambda *_: zeros
                found = jax.lax.cond(ring.in_sight(queries[0][0], keys[0]), gradients, nothing, queries, keys)
                return jax.tree.map(jnp.add, dkv, found[1:]), found[0]

            dkv, more = jax.lax.scan(one_tile, dkv, queries)
            return dq + more, dkv

        return jax.lax.scan(with_keys, dq, (keys, dkv))

    def one(_, carry):
        dq, keys, dkv = carry
        dq, dkv = work(dq, (keys, dkv))
        return dq, ring.send(keys), ring.send(dkv)

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (queries[0][1], keys[1:3]))
    dq, keys, dkv = jax.lax.fori_loop(0, ring.rounds - 1, one, (empty[0], keys, empty[1]))
    dq, dkv = work(dq, (keys, dkv))
    dk, dv = ring.send(dkv, 1 - ring.rounds)  # home
    return (
        None,
        _whole(dq).reshape(q.shape).astype(q.dtype),
        _whole(dk).astype(k.dtype),
        _whole(dv).astype(v.dtype),
        None,
        None,
        None,
    )


_attend.defvjp(_forward, _backward)
