"""The mixture of experts as a layer: it holds the layer that it replaces."""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from axrepro.core.aux import Histogram, Metric
from axrepro.core.context import Context
from axrepro.core.interfaces import Layer
from axrepro.core.param import linear, stack
from axrepro.core.remat import tag
from axrepro.errors import UserError, require, require_choice, require_positive, require_sizes
from axrepro.kernels.grouped_matmul import Implementation
from axrepro.nn.moe.dispatch import EinsumDispatcher, GatherDispatcher
from axrepro.nn.moe.dropless import Dropless, inside_experts
from axrepro.nn.moe.routers import TopK
from axrepro.nn.moe.routing import ByToken, Room, Router, Routing, choices

Dispatch = Literal["auto", "einsum", "gather", "dropless"]


@dataclass(frozen=True, kw_only=True)
class MoE(Layer):
    """`num_experts` copies of a layer, of which each token uses a few.

    Attributes:
      expert: the layer that the mixture replaces; any layer of [.., D] to [.., D].
      router: who goes where.
      capacity_factor: slots per expert and group, C = max(1, floor(S capacity_factor / E)); top-2 without any imbalance
        needs 2. Tokens beyond it pass through the residual alone. With "dropless" it is what an adaptive balance loss
        aims at, and what `ExpertChoice` takes.
      eval_capacity_factor: the same outside training; None: as in training.
      group_size: tokens per group, S; None: one row of the batch. A divisor of the row length, or a multiple of it.
        Where whole examples are routed: examples per group; None: all of the batch.
      dispatch: "einsum" multiplies by one-hot tensors (fast on matrix units), "gather" moves rows by index, "dropless"
        sorts them and needs no capacity; "auto" takes einsum on TPU, gather on CPU and GPU.
      implementation: of the grouped product in "dropless", see `axrepro.kernels.grouped_matmul`.
      buffer_factor: in "dropless" over several devices, rows that each has room for in units of the mean; None: for all
        that could come. A bound saves memory; rows beyond it are dropped and counted.
      shared: a layer that every token uses besides (DeepSeekMoE, arXiv:2401.06066, Sec. 3.2).
      shared_gate: whether its output is multiplied by a sigmoid of a product with the token (Qwen1.5-MoE).
    """

    expert: Layer
    num_experts: int
    router: Router = TopK()
    capacity_factor: float = 2.0
    eval_capacity_factor: float | None = None
    group_size: int | None = None
    dispatch: Dispatch = "auto"
    implementation: Implementation = "auto"
    buffer_factor: float | None = None
    shared: Layer | None = None
    shared_gate: bool = False

    def __post_init__(self):
        require_sizes(self, "num_experts", "group_size")
        require_choice(self, "dispatch", Dispatch)
        require_positive(self, "capacity_factor", "eval_capacity_factor", "buffer_factor")
        fits = self.dispatch != "dropless" or self.expert.token_wise()
        require(
            self, "dispatch", fits, f"einsum or gather where the expert mixes tokens ({type(self.expert).__name__})"
        )
        require(self, "shared_gate", not self.shared_gate or self.shared is not None, "False without a shared layer")

    def specs(self, dim: int) -> dict:
        active = self.router.active_fraction(self.num_experts, self.capacity_factor)
        specs: dict = {
            "router": self.router.specs(dim, self.num_experts),
            "experts": stack(self.expert.specs(dim), self.num_experts, "expert", active),
        }
        if self.shared is not None:
            specs["shared"] = self.shared.specs(dim)
        if self.shared_gate:
            specs["shared_gate"] = linear((dim, 1), (None, None), fan_in=dim, decay=False)
        return specs

    def capacity(self, group_size: int, train: bool) -> int:
        """Slots per expert and group."""
        factor = self.capacity_factor
        if not train and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        return min(group_size, max(1, int(group_size * factor / self.num_experts)))

    def apply(self, params: dict, x: Float[Array, "B T D"], ctx: Context) -> tuple[Float[Array, "B T D"], dict]:
        groups, valid = self._groups(x, ctx)  # [N, S, D], or [N, S, T, D] where examples are routed
        room = Room(self.num_experts, self.capacity(groups.shape[1], ctx.train))
        with jax.named_scope("router"):
            routing, router_aux = self.router.apply(params["router"], groups, valid, room, ctx.fold("router"))
        routing = jax.tree.map(lambda a: tag(a, "moe_routing"), routing)
        wanted = choices(routing, self.num_experts)  # [N, E]
        y, lost, expert_aux = self._routed(params["experts"], x, groups, routing, wanted, room, ctx)
        y = ctx.shard(y, "batch", "seq", "embed_act")
        load = wanted.sum(0)
        aux = {
            "router": router_aux,
            "experts": expert_aux,
            "dropped": Metric(lost.astype(jnp.float32), jnp.maximum(load.sum(), 1).astype(jnp.float32)),
            "max_violation": Metric.mean(load.max() * self.num_experts / jnp.maximum(load.sum(), 1) - 1),
            "load": Histogram.of(load, floor=self._floor(), advice="raise router.losses.balance or bias_rate"),
        }
        if self.shared is not None:
            with jax.named_scope("shared"):
                always, aux["shared"] = self.shared.apply(params["shared"], x, ctx.fold("shared"))
                if self.shared_gate:
                    gate = x.astype(jnp.float32) @ params["shared_gate"].astype(jnp.float32)
                    always = jax.nn.sigmoid(gate).astype(always.dtype) * always
            y += always
        return y, aux

    def _floor(self) -> float:
        """The effective number of experts under which a router has collapsed: an eighth of the way from fewest to E.

        One that uses all experts for every token cannot.
        """
        least = self.router.active_fraction(self.num_experts, self.capacity_factor) * self.num_experts
        return 0.0 if least >= self.num_experts else least + (self.num_experts - least) / 8

    def _groups(self, x, ctx: Context):
        batch, length, dim = x.shape
        valid = jnp.ones((batch, length), bool) if ctx.segment_ids is None else ctx.segment_ids > 0
        if self.router.unit == "example":
            devices = ctx.shards("batch")
            size = batch if self.group_size is None or self._kind(ctx) == "dropless" else self.group_size
            if batch % size:
                raise UserError(f"MoE group_size={size} must divide the {batch} examples that are routed")
            if self._kind(ctx) != "dropless" and (batch // size) % devices:
                raise UserError(
                    f"{batch // size} groups of whole examples cannot be split over {devices} devices; set group_size "
                    f"to a divisor of {max(1, batch // devices)}, or dispatch to dropless"
                )
            return x.reshape(-1, size, length, dim), valid.reshape(-1, size, length)
        size = length if self.group_size is None else self.group_size
        if (batch * length) % size or (length % size and size % length):
            raise UserError(f"MoE group_size={size} must divide the row length {length} or be a multiple of it")
        return x.reshape(-1, size, dim), valid.reshape(-1, size)

    def _kind(self, ctx: Context) -> Dispatch:
        if self.dispatch != "auto":
            return self.dispatch
        return "einsum" if ctx.platform == "tpu" else "gather"

    def _routed(self, params, x, groups, routing: Routing, wanted, room: Room, ctx: Context):
        """(the experts' outputs [B, T, D], how many choices were lost, aux of the experts)."""
        # experts that choose have no queue that could overflow: their slots are all there is
        if self._kind(ctx) == "dropless" and isinstance(routing, ByToken):
            y, lost = self._through_rows(params, x, routing, ctx)
            return y, lost, {}
        y, aux = self._through_slots(params, groups, routing, room, ctx)
        lost = jnp.maximum(wanted - room.capacity, 0).sum()
        return y.reshape(x.shape), lost, aux

    def _through_rows(self, params, x, routing: ByToken, ctx: Context):
        dim = x.shape[-1]
        per_example = self.router.unit == "example"
        units = x[:, None] if per_example else x
        dropless = Dropless(
            expert=self.expert,
            specs=stack(self.expert.specs(dim), self.num_experts, "expert"),
            num_experts=self.num_experts,
            implementation=self.implementation,
            buffer_factor=self.buffer_factor,
        )
        routing = jax.tree.map(lambda a: a.reshape(*units.shape[:2], -1), routing)
        axes = (None, "seq", "embed_act") if per_example else ("seq", "embed_act")
        y, lost = dropless.apply(params, units, routing, axes, ctx)
        return y.reshape(x.shape), lost

    def _through_slots(self, params, groups, routing: Routing, room: Room, ctx: Context):
        unit = groups.shape[2:]
        flat = ctx.shard(groups.reshape(*groups.shape[:2], -1), "group", None, "embed_act")
        routing = jax.tree.map(lambda a: ctx.shard(a, "group", None, None), routing)
        kind = EinsumDispatcher if self._kind(ctx) == "einsum" else GatherDispatcher
        dispatcher = kind(routing, room, groups.shape[1], ctx)
        xe = ctx.shard(dispatcher.dispatch(flat), "group", "expert_sent", "slots", "embed_act")  # [N, E, C, D]
        xe = ctx.shard(xe, "group_dispatched", "expert", "slots", "embed_act").swapaxes(0, 1)  # all-to-all: N to E
        xe = tag(ctx.shard(xe, "expert", "group_dispatched", "slots", "embed_act"), "moe_in")
        with jax.named_scope("experts"):
            ye, aux = self._experts(params, xe, unit, ctx)
        ye = ctx.shard(ye, "expert", "group_dispatched", "slots", "embed_act").swapaxes(0, 1)
        ye = ctx.shard(ye, "group_dispatched", "expert", "slots", "embed_act")
        ye = ctx.shard(ye, "group", "expert_sent", "slots", "embed_act")  # all-to-all: E back to N
        ye = tag(ctx.shard(ye, "group", "expert_sent", None, "embed_act"), "moe_out")
        return ctx.shard(dispatcher.combine(ye), "group", None, "embed_act"), aux

    def _experts(self, params, xe: Float[Array, "E N C F"], unit: tuple[int, ...], ctx: Context):
        keys = ctx.keys(self.num_experts)
        # the constraints around lay out the expert axis; inside, one expert sees only its own tokens
        inner = inside_experts(ctx)
        shape = xe.shape[:3] if len(unit) == 1 else (xe.shape[0], xe.shape[1] * xe.shape[2])

        def one(params, x, key):
            return self.expert.apply(params, x, replace(inner, key=key))

        in_axes = (0, 0, None if keys is None else 0)
        ye, aux = jax.vmap(one, in_axes=in_axes)(params, xe.reshape(*shape, *unit), keys)
        return ye.reshape(xe.shape), aux

    def attention_flops(self, dim: int, length: int, full: bool) -> float:
        active = self.router.active_fraction(self.num_experts, self.capacity_factor) * self.num_experts
        flops = active * self.expert.attention_flops(dim, length, full)
        return flops + (0.0 if self.shared is None else self.shared.attention_flops(dim, length, full))
