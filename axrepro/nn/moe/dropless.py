"""Experts without capacity: rows sorted by expert, one grouped product for all, nothing dropped (arXiv:2211.15841).

Axes: M units (tokens, or examples of T tokens) on one device, R = k M rows, E experts, of which e devices share the
mesh axis `expert`; J = E / e experts on each. Every device sorts its rows by expert and sends each to the device of its
expert (all-to-all), which sorts what it received, multiplies, and sends the results back the same way. There is no
[tokens, experts, capacity] tensor, and no group: a token's result depends on that token alone.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from axrepro.core.context import Context
from axrepro.core.interfaces import Layer
from axrepro.core.remat import tag
from axrepro.core.tree import flatten, map_tree
from axrepro.errors import UserError
from axrepro.kernels.grouped_matmul import Implementation
from axrepro.nn.linear import Grouped
from axrepro.nn.moe.dispatch import bring_back, in_order, queues, send
from axrepro.nn.moe.routing import ByToken

_AXIS = "expert"


def inside_experts(ctx: Context) -> Context:
    """What one expert may know: its tokens are no rows of the batch, and their layout is the mixture's affair."""
    rows = ctx.replace(segment_ids=None, positions=None, prefix=None, memory=None, memory_segment_ids=None)
    rows = rows.replace(tokens=None, routing=None, routing_target=None, mesh=None)
    return rows.replace(products=ctx.products.in_experts())


@dataclass(frozen=True, kw_only=True)
class Dropless:
    """The experts of a layer, applied to the rows that chose them.

    Attributes:
      specs: of the experts' parameters, stacked.
      implementation: of the grouped product.
      buffer_factor: rows that a device has room for, in units of the mean, k M; None: for all that could come, e k M.
        What finds no room is dropped, of each sender the same share.
    """

    expert: Layer
    specs: dict
    num_experts: int
    implementation: Implementation
    buffer_factor: float | None

    def apply(
        self, params: dict, x: Float[Array, "B U ..."], routing: ByToken, unit_axes: tuple, ctx: Context
    ) -> tuple[jax.Array, jax.Array]:
        """(the sum of the chosen experts' outputs, weighted by the gates; how many choices found no room).

        Args:
          x: B rows of the batch, U units in each.   unit_axes: logical axes of a unit's dimensions and of U.
        """
        # matrices in the type in which they are used, before they are gathered
        params = jax.tree.map(lambda w: ctx.cast(w) if w.ndim > 2 else w, params)
        inner = inside_experts(ctx)
        if ctx.mesh is None or ctx.mesh.size == 1:
            return self._on_device(params, x, routing, inner, 1)
        sizes = dict(ctx.mesh.shape)
        # `model` is left to XLA, which splits the experts' products over it as the weights are split
        manual = frozenset(name for name, size in sizes.items() if name != "model" or size == 1)

        def partition(axes, shape):
            keep = lambda entry: tuple(n for n in (entry if isinstance(entry, tuple) else (entry,)) if n in manual)
            return PartitionSpec(*(keep(entry) or None for entry in ctx.rules.spec(axes, shape, sizes)))

        flat = flatten(self.specs)
        # an adapter's thin weights are whole but for their experts
        thin = partition(("expert",), (self.num_experts,))
        weight_specs = map_tree(
            lambda path, w: jax.tree.map(
                lambda a: partition(flat[path].axes, a.shape) if a.shape == flat[path].shape else thin, w
            ),
            params,
        )
        rows = partition(("batch", *unit_axes), x.shape)
        choices = PartitionSpec(*rows[:2])
        # over the devices that hold different choices
        axes = tuple(name for entry in choices if entry for name in ((entry,) if isinstance(entry, str) else entry))

        def run(params, x, routing, inner):
            params = jax.tree.map(_gathered, params, weight_specs)
            shard = jax.lax.axis_index(tuple(sorted(manual)))
            if inner.key is not None:
                inner = inner.fold(shard)
            y, lost = self._on_device(params, x, routing, inner, sizes[_AXIS])
            return y, jax.lax.psum(lost, axes)

        return jax.shard_map(
            run,
            mesh=ctx.mesh,
            in_specs=(weight_specs, rows, choices, PartitionSpec()),
            out_specs=(rows, PartitionSpec()),
            axis_names=set(manual),
            check_vma=False,
        )(params, x, routing, inner)

    def _on_device(self, params, x, routing: ByToken, ctx: Context, devices: int):
        unit = x.shape[2:]
        units = math.prod(x.shape[:2])
        flat = jax.tree.map(lambda a: a.reshape(1, units, -1), routing)
        queue = queues(flat, self.num_experts)
        moves = in_order(queue, units)
        rows = send(x.reshape(1, units, -1), moves)[0]
        if devices == 1:
            out, lost = self._experts(params, rows, queue.size[0], unit, ctx), jnp.zeros((), jnp.int32)
        else:
            out, lost = self._exchanged(params, rows, queue.size[0], unit, ctx, devices)
        y = bring_back(tag(out, "moe_out")[None], flat.gate.swapaxes(1, 2), moves)
        return y.reshape(x.shape), lost

    def _experts(self, params, rows: Float[Array, "R F"], sizes: Int[Array, " J"], unit: tuple, ctx: Context):
        """The experts on rows that are sorted by expert."""
        tokens = math.prod(unit[:-1])
        x = tag(rows, "moe_in").reshape(-1, unit[-1])
        wrap = lambda weight: Grouped(weight, sizes * tokens, x.shape[0], self.implementation)
        with jax.named_scope("experts"):
            y, aux = self.expert.apply(jax.tree.map(wrap, params), x, ctx)
        if flatten(aux):
            raise UserError(f"experts that return {next(iter(flatten(aux)))!r} need dispatch einsum or gather")
        return y.reshape(rows.shape)

    def _exchanged(self, params, rows, sizes, unit, ctx, devices):
        wanted = jax.lax.all_gather(sizes, _AXIS).reshape(devices, devices, -1)  # [from, to, J]
        sent, room = wanted, rows.shape[0] * devices
        if self.buffer_factor is not None:
            room = min(room, max(1, int(rows.shape[0] * self.buffer_factor)))
            sent = _that_fit(wanted, room)
        me = jax.lax.axis_index(_AXIS)
        trade = _ragged if ctx.platform in ("tpu", "gpu") else _padded
        received, expert, give_back = trade(rows, wanted, sent, me, room)
        experts = sent.shape[-1]
        choice = ByToken(expert[None, :, None], jnp.ones((1, len(expert), 1)), (expert < experts)[None, :, None])
        queue = queues(choice, experts)
        moves = in_order(queue, len(expert))
        ordered = send(received[None], moves)[0]
        out = self._experts(params, ordered, queue.size[0], unit, ctx)
        back = bring_back(out[None], jnp.ones((1, 1, len(expert)), out.dtype), moves)[0]
        return give_back(back), (wanted - sent)[me].sum()


def _gathered(weight, spec: PartitionSpec):
    """All of a weight but for its experts; the gradient is summed and split again."""
    for dim, names in enumerate(spec):
        if names is not None and dim > 0:
            weight = jax.lax.all_gather(weight, names, axis=dim, tiled=True)
    return weight


def _that_fit(wanted: Int[Array, "e e J"], room: int) -> Int[Array, "e e J"]:
    """The rows that are sent where a device has room for `room`: an equal share of each sender's, the first of them."""
    by_pair = wanted.sum(-1)
    arriving = jnp.maximum(by_pair.sum(0), 1)
    allowed = jnp.where(arriving > room, (by_pair * (room / arriving)).astype(jnp.int32), by_pair)
    before = jnp.cumsum(wanted, -1) - wanted
    return jnp.clip(allowed[..., None] - before, 0, wanted)


def _exclusive(sizes, axis=0):
    return jnp.cumsum(sizes, axis) - sizes


def _ragged(rows, wanted, sent, me, room):
    """Only the rows that are there travel. (received rows, their experts, the way back)."""
    pair, offered = sent.sum(-1), _exclusive(wanted.sum(-1), axis=1)  # [from, to]: rows sent, and where they start
    landing = _exclusive(pair, axis=0)  # where they land at the receiver
    there = (offered[me], pair[me], landing[me], pair[:, me])
    back = (landing[:, me], pair[:, me], offered[:, me], pair[me])
    received = _travel(rows, there, back, room)
    expert = _segments(sent[:, me].reshape(-1), jnp.arange(room), sent.shape[-1])
    return received, expert, lambda results: _travel(results, back, there, rows.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _travel(rows, there, back, room: int):
    """The ragged exchange `there`, into zeros[room, F]. The gradient goes `back`; jax would ask for the way."""
    blank = jnp.zeros((room, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, blank, *there, axis_name=_AXIS)


def _travel_forward(rows, there, back, room):
    return _travel(rows, there, back, room), (there, back, rows.shape[0])


def _travel_backward(room, residuals, g):
    there, back, number = residuals
    return _travel(g, back, there, number), None, None


_travel.defvjp(_travel_forward, _travel_backward)


def _padded(rows, wanted, sent, me, room):
    """For platforms whose compiler has no ragged exchange: every pair of devices has room for all rows of one."""
    number, devices = rows.shape[0], sent.shape[0]
    pair, offered = sent.sum(-1), _exclusive(wanted.sum(-1), axis=1)
    place = jnp.arange(number)
    index = jnp.where(place < pair[me][:, None], offered[me][:, None] + place, number)  # [to, R]
    exchange = lambda a: jax.lax.all_to_all(a, _AXIS, 0, 0)
    received = exchange(jnp.take(rows, index, axis=0, mode="fill", fill_value=0)).reshape(-1, rows.shape[1])
    expert = jax.vmap(lambda sizes: _segments(sizes, place, sent.shape[-1]))(sent[:, me]).reshape(-1)

    def give_back(results):
        mine = exchange(results.reshape(devices, number, -1))
        # row r went to the device in whose share it lies, if it was sent at all
        to = jnp.searchsorted(jnp.cumsum(wanted[me].sum(-1)), place, side="right")
        inside = place - jnp.take(offered[me], to, mode="clip")
        known = (to < devices) & (inside < jnp.take(pair[me], to, mode="clip"))
        at = jnp.where(known, to * number + inside, devices * number)
        return jnp.take(mine.reshape(devices * number, -1), at, axis=0, mode="fill", fill_value=0)

    return received, expert, give_back


def _segments(sizes, place, experts: int):
    """The expert, in [0, J), of each place in a run of segments that repeat the J experts; J beyond the last."""
    segment = jnp.searchsorted(jnp.cumsum(sizes), place, side="right")
    return jnp.where(segment < sizes.shape[0], segment % experts, experts).astype(jnp.int32)
