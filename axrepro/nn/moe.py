"""Mixture of experts: a layer that holds the layer it replaces.

Axes: N token groups, S tokens per group, D width, E experts, C slots per expert and group (capacity), k choices.

GShard (arXiv:2006.16668) top-2 dispatch, as used by arXiv:2405.15052. Tokens are routed within groups, so that a group
stays on one device and the result depends on no mesh. Outside the experts the groups are split over data, fsdp and
expert; the experts are split over `expert`, so the dispatched tokens change places by one all-to-all on the way in and
one on the way out. The rules `group`, `group_dispatched` and `expert` say so: another partition is another table.
Where the sequence is split, every device of a row gathers the row's tokens and routes them all, because an expert's
queue runs over the whole group, but works on its share of the slots only (rule `slots`, if it divides them).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from axrepro.core.aux import Loss, Metric
from axrepro.core.context import Context
from axrepro.core.interfaces import Layer
from axrepro.core.param import linear, stack
from axrepro.core.remat import tag
from axrepro.errors import UserError, require_not_negative, require_positive, require_sizes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Where each token goes. A choice that found its expert full is not kept and adds nothing.

    Attributes:
      expert: the chosen experts, in [0, E).   gate: their weights in the output; 0 where not kept.
      slot: place among the expert's C slots.   kept: whether there was one.
    """

    expert: Int[Array, "N S k"]
    gate: Float[Array, "N S k"]
    slot: Int[Array, "N S k"]
    kept: Bool[Array, "N S k"]


class Router(ABC):
    """Decides which tokens each expert sees."""

    @abstractmethod
    def specs(self, dim: int, num_experts: int) -> dict:
        """The router's parameters."""

    @abstractmethod
    def active_fraction(self, num_experts: int) -> float:
        """Share of the experts that one token uses."""

    @abstractmethod
    def apply(
        self, params: dict, x: Float[Array, "N S D"], valid: Bool[Array, "N S"], capacity: int, ctx: Context
    ) -> tuple[Routing, dict]:
        """The routing of each group, and its losses and metrics. `valid` is False for padding, which goes nowhere."""


@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """Each token chooses its k most probable experts.

    First choices of all tokens take slots before any second choice; within a rank, earlier tokens come first (GShard,
    Algorithm 1, without its random second-expert policy). The gates are divided by their sum *before* tokens are
    dropped, so the surviving choice of a token is not scaled up.

    Attributes:
      k: experts per token.
      renormalise: divide the chosen probabilities by their sum.
      balance_weight: of the load-balance loss; 1 when tokens spread evenly, E when one expert takes all.
      balance_over: "first" counts first choices (GShard Eq. 4, Switch arXiv:2101.03961 Eq. 4), "all" any of the k.
      z_weight: of the router z-loss, the mean squared log-partition (ST-MoE, arXiv:2202.08906, Eq. 5).
    """

    k: int = 2
    renormalise: bool = True
    balance_weight: float = 0.01
    balance_over: Literal["first", "all"] = "first"
    z_weight: float = 0.001

    def __post_init__(self):
        require_sizes(self, "k")
        require_not_negative(self, "balance_weight", "z_weight")

    def specs(self, dim: int, num_experts: int) -> dict:
        if self.k > num_experts:
            raise UserError(
                f"top-k routing with k={self.k} needs at least as many experts, not num_experts={num_experts}"
            )
        # whole on every device: it is small, and its product must be exact in float32
        return {"weight": linear((dim, num_experts), (None, None), fan_in=dim, decay=False)}

    def active_fraction(self, num_experts: int) -> float:
        return self.k / num_experts

    def apply(self, params, x, valid, capacity, ctx):
        logits = jnp.einsum("nsd,de->nse", x.astype(jnp.float32), params["weight"].astype(jnp.float32))
        probs = jax.nn.softmax(logits, axis=-1)
        num_experts = probs.shape[-1]
        gate, expert = _top_k(probs, self.k)
        if self.renormalise:
            gate = gate / (gate.sum(-1, keepdims=True) + 1e-9)
        chosen = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32) * valid[:, :, None, None]
        slot = _slots(chosen)
        kept = (slot < capacity) & valid[:, :, None]
        gate = jnp.where(kept, gate, 0.0)
        return Routing(expert, gate, slot, kept), self._aux(logits, probs, chosen, kept, valid)

    def _aux(self, logits, probs, chosen, kept, valid) -> dict:
        num_experts = probs.shape[-1]
        tokens = jnp.maximum(valid.sum(1), 1)[:, None]  # [N, 1]
        counted = chosen[:, :, 0] if self.balance_over == "first" else chosen.sum(2)  # [N, S, E]
        choices = 1 if self.balance_over == "first" else self.k
        load = counted.sum(1) / tokens / choices  # [N, E], sums to 1
        importance = jnp.where(valid[:, :, None], probs, 0).sum(1) / tokens
        balance = num_experts * (jax.lax.stop_gradient(load) * importance).sum(-1)  # [N]
        z = jax.nn.logsumexp(logits, axis=-1) ** 2
        all_load = chosen.sum((0, 1, 2)) / jnp.maximum(chosen.sum(), 1)
        entropy = -(probs * jnp.log(probs + 1e-9)).sum(-1)
        return {
            "balance": Loss.mean(balance, valid.any(1), self.balance_weight),
            "router_z": Loss.mean(z, valid, self.z_weight),
            "dropped": Metric.mean(1.0 - kept, valid[:, :, None]),
            "load_max": Metric.mean(num_experts * all_load.max()),
            "load_min": Metric.mean(num_experts * all_load.min()),
            "router_entropy": Metric.mean(entropy, valid),
        }


def _top_k(probs, k: int):
    # not jax.lax.top_k: XLA gathers its operand from all devices, also when only other dimensions are split
    left, gates, experts = probs, [], []
    for _ in range(k):
        expert = jnp.argmax(left, axis=-1)
        chosen = jax.nn.one_hot(expert, probs.shape[-1], dtype=bool)
        gates.append(jnp.where(chosen, probs, 0).sum(-1))
        experts.append(expert)
        left = jnp.where(chosen, -1.0, left)
    return jnp.stack(gates, -1), jnp.stack(experts, -1)


def _slots(chosen: Int[Array, "N S k E"]) -> Int[Array, "N S k"]:
    """Each choice's place in its expert's queue: rank by rank, within a rank by token."""
    groups, tokens, k, experts = chosen.shape
    queue = chosen.swapaxes(1, 2).reshape(groups, k * tokens, experts)
    before = jnp.cumsum(queue, axis=1) - queue  # int32: a bfloat16 cumsum miscounts beyond 256
    slot = (before * queue).sum(-1)
    return slot.reshape(groups, k, tokens).swapaxes(1, 2)


Dispatch = Literal["auto", "einsum", "gather"]


@dataclass(frozen=True, kw_only=True)
class MoE(Layer):
    """`num_experts` copies of a layer, of which each token uses a few.

    Attributes:
      expert: the layer that the mixture replaces; any layer of [.., D] to [.., D].
      router: who goes where.
      capacity_factor: slots per expert and group, C = max(1, floor(S capacity_factor / E)); top-2 without any imbalance
        needs 2. Tokens beyond it pass through the residual alone.
      eval_capacity_factor: the same outside training; None: as in training.
      group_size: tokens per group, S; None: one row of the batch. A divisor of the row length, or a multiple of it.
      dispatch: "einsum" multiplies by one-hot tensors (fast on matrix units), "gather" moves rows by index; "auto"
        takes einsum on TPU and GPU and gather on CPU.
    """

    expert: Layer
    num_experts: int
    router: Router = TopK()
    capacity_factor: float = 2.0
    eval_capacity_factor: float | None = None
    group_size: int | None = None
    dispatch: Dispatch = "auto"

    def __post_init__(self):
        require_sizes(self, "num_experts", "group_size")
        require_positive(self, "capacity_factor", "eval_capacity_factor")

    def specs(self, dim: int) -> dict:
        active = self.router.active_fraction(self.num_experts)
        return {
            "router": self.router.specs(dim, self.num_experts),
            "experts": stack(self.expert.specs(dim), self.num_experts, "expert", active),
        }

    def capacity(self, group_size: int, train: bool) -> int:
        """Slots per expert and group."""
        factor = self.capacity_factor
        if not train and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        return min(group_size, max(1, int(group_size * factor / self.num_experts)))

    def apply(self, params: dict, x: Float[Array, "B T D"], ctx: Context) -> tuple[Float[Array, "B T D"], dict]:
        batch, length, dim = x.shape
        size = length if self.group_size is None else self.group_size
        if (batch * length) % size or (length % size and size % length):
            raise UserError(f"MoE group_size={size} must divide the row length {length} or be a multiple of it")
        groups = x.reshape(-1, size, dim)
        valid = jnp.ones((batch, length), bool) if ctx.segment_ids is None else ctx.segment_ids > 0
        capacity = self.capacity(size, ctx.train)
        groups = ctx.shard(groups, "group", None, "embed_act")
        with jax.named_scope("router"):
            routing, aux = self.router.apply(params["router"], groups, valid.reshape(-1, size), capacity, ctx)
        routing = jax.tree.map(lambda a: tag(a, "moe_routing"), routing)
        dispatcher = self._dispatcher(ctx)(routing, self.num_experts, capacity)

        xe = ctx.shard(dispatcher.dispatch(groups), "group", None, "slots", "embed_act")  # [N, E, C, D]
        xe = ctx.shard(xe, "group_dispatched", "expert", "slots", "embed_act").swapaxes(0, 1)  # all-to-all: N to E
        xe = ctx.shard(xe, "expert", "group_dispatched", "slots", "embed_act")
        with jax.named_scope("experts"):
            ye, expert_aux = self._experts(params["experts"], xe, ctx)
        ye = ctx.shard(ye, "expert", "group_dispatched", "slots", "embed_act").swapaxes(0, 1)
        ye = ctx.shard(ye, "group_dispatched", "expert", "slots", "embed_act")
        ye = ctx.shard(ye, "group", None, "slots", "embed_act")  # all-to-all: E back to N
        ye = ctx.shard(ye, "group", None, None, "embed_act")
        y = ctx.shard(dispatcher.combine(ye), "group", None, "embed_act")
        y = ctx.shard(y.reshape(batch, length, dim), "batch", "seq", "embed_act")
        return y, {"router": aux, "experts": expert_aux}

    def _experts(self, params, xe: Float[Array, "E N C D"], ctx: Context):
        keys = ctx.keys(self.num_experts)
        # the constraints above lay out the expert axis; inside, one expert sees only its own tokens
        inner = replace(ctx, mesh=None, segment_ids=None, positions=None, products=ctx.products.in_experts())

        def one(params, x, key):
            return self.expert.apply(params, x, replace(inner, key=key))

        return jax.vmap(one, in_axes=(0, 0, None if keys is None else 0))(params, xe, keys)

    def _dispatcher(self, ctx: Context):
        kinds = {"einsum": EinsumDispatcher, "gather": GatherDispatcher}
        return kinds[("gather" if ctx.platform == "cpu" else "einsum") if self.dispatch == "auto" else self.dispatch]

    def attention_flops(self, dim: int, length: int, full: bool) -> float:
        return (
            self.router.active_fraction(self.num_experts)
            * self.num_experts
            * self.expert.attention_flops(dim, length, full)
        )


class EinsumDispatcher:
    """Products with one-hot tensors [N, S, E, C] (GShard, Algorithm 2): 4 N S E C D FLOPs and N S E C numbers."""

    def __init__(self, routing: Routing, num_experts: int, capacity: int):
        experts = jax.nn.one_hot(routing.expert, num_experts, dtype=jnp.float32) * routing.kept[..., None]
        slots = jax.nn.one_hot(routing.slot, capacity, dtype=jnp.float32)
        self._send = jnp.einsum("nske,nskc->nsec", experts, slots)
        self._weights = jnp.einsum("nsk,nske,nskc->nsec", routing.gate, experts, slots)

    def dispatch(self, x: Float[Array, "N S D"]) -> Float[Array, "N E C D"]:
        """Tokens in their slots, zeros in empty ones."""
        return jnp.einsum("nsec,nsd->necd", self._send.astype(x.dtype), x)

    def combine(self, ye: Float[Array, "N E C D"]) -> Float[Array, "N S D"]:
        """Each token's kept outputs, weighted by its gates."""
        return jnp.einsum("nsec,necd->nsd", self._weights.astype(ye.dtype), ye)


class GatherDispatcher:
    """Row indices in both directions; the gradients are gathers too, because a slot holds at most one choice."""

    def __init__(self, routing: Routing, num_experts: int, capacity: int):
        groups, tokens, k = routing.expert.shape
        self._shape = (num_experts, capacity)
        self._gate = routing.gate
        slots = num_experts * capacity
        # where choice (s, j) goes; one past the end if nowhere
        self._slot_of = jnp.where(routing.kept, routing.expert * capacity + routing.slot, slots)
        choices = jnp.broadcast_to(jnp.arange(tokens * k, dtype=jnp.int32), (groups, tokens * k))
        empty = jnp.full((groups, slots), tokens * k, jnp.int32)
        # which choice fills a slot; one past the end if none
        self._choice_in = jax.vmap(lambda e, i, c: e.at[i].set(c, mode="drop"))(
            empty, self._slot_of.reshape(groups, -1), choices
        )

    def dispatch(self, x: Float[Array, "N S D"]) -> Float[Array, "N E C D"]:
        """Tokens in their slots, zeros in empty ones."""
        return _move(x, self._choice_in, self._slot_of).reshape(x.shape[0], *self._shape, x.shape[-1])

    def combine(self, ye: Float[Array, "N E C D"]) -> Float[Array, "N S D"]:
        """Each token's kept outputs, weighted by its gates."""
        rows = ye.reshape(ye.shape[0], -1, ye.shape[-1])
        return jnp.einsum("nsk,nskd->nsd", self._gate.astype(ye.dtype), _return(rows, self._choice_in, self._slot_of))


def _rows(x, index):
    """x[n, index[n]] with zeros where the index is past the end; index may have further axes."""
    return jax.vmap(lambda rows, i: jnp.take(rows, i, axis=0, mode="fill", fill_value=0))(x, index)


@jax.custom_vjp
def _move(x, choice_in, slot_of):
    """[N, S, D] to slots [N, E C, D]."""
    return _rows(x, _token_of(choice_in, slot_of))


def _token_of(choice_in, slot_of):
    tokens, k = slot_of.shape[1:]
    return jnp.where(choice_in < tokens * k, choice_in // k, tokens)


def _move_forward(x, choice_in, slot_of):
    return _move(x, choice_in, slot_of), slot_of


def _move_backward(slot_of, g):
    return _rows(g, slot_of).sum(2), None, None


_move.defvjp(_move_forward, _move_backward)


@jax.custom_vjp
def _return(rows, choice_in, slot_of):
    """Slots [N, E C, D] to choices [N, S, k, D]."""
    return _rows(rows, slot_of)


def _return_forward(rows, choice_in, slot_of):
    return _return(rows, choice_in, slot_of), (choice_in, slot_of)


def _return_backward(residuals, g):
    choice_in, _ = residuals
    return _rows(g.reshape(g.shape[0], -1, g.shape[-1]), choice_in), None, None


_return.defvjp(_return_forward, _return_backward)
