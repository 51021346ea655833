"""Routers. Logits, probabilities and losses are float32 whatever the compute type, and padding counts for nothing."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axrepro.core.aux import Metric, Update
from axrepro.core.param import linear, vector
from axrepro.errors import UserError, require, require_choice, require_not_negative, require_positive, require_sizes
from axrepro.nn.moe.losses import RouterLosses
from axrepro.nn.moe.noise import Noise
from axrepro.nn.moe.routing import ByExpert, ByToken, Router, choices

Scores = Literal["softmax", "sigmoid"]
Pool = Literal["mean", "first"]


@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """Each token chooses its k best experts.

    With softmax scores and k=2 these are the choices of GShard (arXiv:2006.16668, Algorithm 1, without its random
    second-expert policy). The gates are divided by their sum *before* any token is dropped, so the surviving choice of
    a token is not scaled up. The order of `ByToken.expert` is that of the scores, which decides who is dropped.

    Attributes:
      k: experts per token.
      scores: "softmax" over experts, or one "sigmoid" each (DeepSeek-V3, arXiv:2412.19437, Eq. 13-15).
      renormalise: divide the chosen scores by their sum.
      scale: factor on the gates.
      bias_rate: of balancing without a loss (arXiv:2408.15664, Algorithm 1): a bias on the scores, for the choice
        alone, moves by this much a step towards experts with fewer tokens than the mean; 0: no bias.
      logit_cap: soft limit c tanh(logits / c).
      noise: on the logits, during training.
    """

    k: int = 2
    scores: Scores = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    bias_rate: float = 0.0
    logit_cap: float | None = None
    noise: Noise | None = None
    losses: RouterLosses = RouterLosses()

    def __post_init__(self):
        require_sizes(self, "k")
        require_choice(self, "scores", Scores)
        require_not_negative(self, "bias_rate")
        require_positive(self, "scale", "logit_cap")

    def specs(self, dim: int, num_experts: int) -> dict:
        if self.k > num_experts:
            raise UserError(
                f"top-k routing with k={self.k} needs at least as many experts, not num_experts={num_experts}"
            )
        specs = _weight(dim, num_experts) | self.losses.specs()
        if self.bias_rate:
            specs["bias"] = vector((num_experts,), (None,), 0.0, role="updated")
        if self.noise is not None:
            specs["noise"] = self.noise.specs(dim, num_experts)
        return specs

    def active_fraction(self, num_experts: int, capacity_factor: float) -> float:
        return self.k / num_experts

    def apply(self, params, x, valid, room, ctx):
        if self.noise is not None and ctx.train and ctx.key is not None:
            product = partial(_logits, params)
            logits = self.noise.logits(params["noise"], x.astype(jnp.float32), product, ctx.fold("noise"))
        else:
            logits = _logits(params, x)
        if self.logit_cap is not None:
            logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        if self.scores == "softmax":
            scores = probs = jax.nn.softmax(logits)
        else:
            scores = jax.nn.sigmoid(logits)
            probs = scores / (scores.sum(-1, keepdims=True) + 1e-20)
        bias = params["bias"] if self.bias_rate else None
        gate, expert = _top_k(scores, self.k, bias)
        if self.renormalise:
            gate = gate / (gate.sum(-1, keepdims=True) + 1e-9)
        routing = ByToken(expert, self.scale * gate, jnp.broadcast_to(valid[:, :, None], expert.shape))
        aux = self.losses.apply(params, logits, probs, routing, valid, room.capacity, ctx)
        if bias is not None:
            load = choices(routing, room.num_experts).sum(0)
            aux["bias"] = Update(bias + self.bias_rate * jnp.sign(load.mean() - load))
        return routing, aux


def _weight(dim: int, num_experts: int) -> dict:
    # whole on every device: it is small, and its product must be exact in float32
    return {"weight": linear((dim, num_experts), (None, None), fan_in=dim, decay=False)}


def _logits(params: dict, x: Float[Array, "N S D"]) -> Float[Array, "N S E"]:
    return jnp.einsum("nsd,de->nse", x.astype(jnp.float32), params["weight"].astype(jnp.float32))


def _top_k(
    scores: Float[Array, "N S E"], k: int, bias: Float[Array, " E"] | None
) -> tuple[Float[Array, "N S k"], Int[Array, "N S k"]]:
    """The k best of scores + bias: (their scores, their indices), best first, the lower index where two are equal."""
    # not jax.lax.top_k: XLA gathers its operand from all devices, also when only other dimensions are split
    left, found, experts = jax.lax.stop_gradient(scores if bias is None else scores + bias), [], []
    for _ in range(k):
        expert = jnp.argmax(left, axis=-1)
        chosen = jax.nn.one_hot(expert, scores.shape[-1], dtype=bool)
        found.append(jnp.where(chosen, scores, 0).sum(-1))
        experts.append(expert)
        left = jnp.where(chosen, -jnp.inf, left)
    return jnp.stack(found, -1), jnp.stack(experts, -1)


@dataclass(frozen=True)
class ExpertChoice(Router):
    """Each expert takes its C best tokens of each group (arXiv:2202.09368; as in EC-DIT, arXiv:2410.02098, Sec. 3).

    The scores are a softmax over experts, not renormalised over those that take a token; a token may be taken by all
    experts or by none. Loads are equal by construction, so there is no loss. Since a token's fate depends on later
    ones, this is for models that are not causal. The tokens of a group compete, so a group should be an example.
    """

    def specs(self, dim: int, num_experts: int) -> dict:
        return _weight(dim, num_experts)

    def active_fraction(self, num_experts: int, capacity_factor: float) -> float:
        return min(1.0, capacity_factor / num_experts)

    def apply(self, params, x, valid, room, ctx):
        logits = _logits(params, x)
        scores = jnp.where(valid[:, :, None], jax.nn.softmax(logits), -1.0).swapaxes(1, 2)  # [N, E, S]
        token = jnp.argsort(-jax.lax.stop_gradient(scores), axis=-1, stable=True)[:, :, : room.capacity]
        best = jnp.take_along_axis(scores, token, axis=-1)
        chosen = best >= 0
        routing = ByExpert(token, jnp.where(chosen, best, 0.0), chosen)
        experts = _experts_per_token(routing, x.shape[1])
        aux = {"unchosen": Metric.mean(experts == 0, valid), "experts_max": Metric.mean(experts.max(1), valid.any(1))}
        return routing, aux


def _experts_per_token(routing: ByExpert, tokens: int) -> Int[Array, "N S"]:
    count = lambda token, chosen: jnp.zeros(tokens, jnp.int32).at[token].add(chosen.astype(jnp.int32))
    return jax.vmap(count)(
        routing.token.reshape(len(routing.token), -1), routing.chosen.reshape(len(routing.chosen), -1)
    )


@dataclass(frozen=True, kw_only=True)
class Hash(Router):
    """Experts by a fixed random function of the token's id, without parameters (Hash Layers, arXiv:2106.04426).

    For ablations: what a router learns is the difference to this one. Needs `Context.tokens`, which language models
    set. The gates are 1 / k.
    """

    k: int = 1
    seed: int = 0

    def __post_init__(self):
        require_sizes(self, "k")
        require_not_negative(self, "seed")

    def specs(self, dim: int, num_experts: int) -> dict:
        if self.k > num_experts:
            raise UserError(f"hash routing with k={self.k} needs at least as many experts, not {num_experts}")
        return {}

    def active_fraction(self, num_experts: int, capacity_factor: float) -> float:
        return self.k / num_experts

    def apply(self, params, x, valid, room, ctx):
        if ctx.tokens is None:
            raise UserError("hash routing needs token ids (Context.tokens), which this model does not set")
        if ctx.tokens.size != valid.size:
            raise UserError(f"hash routing is by token, not of {valid.size} whole examples; take it out of PerExample")
        tokens = ctx.tokens.reshape(valid.shape).astype(jnp.uint32)
        # multiplication by an odd number and folding the high bits down (Knuth, The Art of Computer Programming, 6.4)
        mixed = tokens * jnp.uint32(2654435769) + jnp.uint32((self.seed + 1) * 3266489917 % 2**32)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
        first = ((mixed ^ (mixed >> 13)) % room.num_experts).astype(jnp.int32)
        # the others at equal distances round the ring of experts, so that no two are the same
        expert = (first[:, :, None] + jnp.arange(self.k) * (room.num_experts // self.k)) % room.num_experts
        chosen = jnp.broadcast_to(valid[:, :, None], expert.shape)
        return ByToken(expert, jnp.full(expert.shape, 1 / self.k, jnp.float32), chosen), {}


@dataclass(frozen=True, kw_only=True)
class Prefix(Router):
    """Experts 0 to e for a token whose difficulty is e, each with gate 1 (DynaMoE, arXiv:2502.12325).

    With experts that are equal slices of the hidden units of one feed-forward layer, their sum is that layer cut to its
    first (e + 1) / E units: nested experts of growing width. Difficulty is the most probable class of a linear router,
    which learns from `losses.target` alone, because a hard choice has no gradient.

    Attributes:
      mean_width: share of the experts that a token is taken to use, for counting FLOPs.
    """

    mean_width: float = 1.0
    losses: RouterLosses = RouterLosses(balance=0.0, z=0.0, target=1.0)

    def __post_init__(self):
        require(self, "mean_width", 0 < self.mean_width <= 1, "a number in (0, 1]")

    def specs(self, dim: int, num_experts: int) -> dict:
        return _weight(dim, num_experts) | self.losses.specs()

    def active_fraction(self, num_experts: int, capacity_factor: float) -> float:
        return self.mean_width

    def apply(self, params, x, valid, room, ctx):
        logits = _logits(params, x)
        widest = jnp.argmax(logits, -1)[:, :, None]
        expert = jnp.broadcast_to(jnp.arange(room.num_experts), logits.shape)
        used = (expert <= widest) & valid[:, :, None]
        aux = {"width": Metric.mean((widest + 1) / room.num_experts, valid[:, :, None])}
        width = ByToken(widest, jnp.ones(widest.shape), valid[:, :, None])
        aux |= self.losses.apply(params, logits, jax.nn.softmax(logits), width, valid, room.capacity, ctx)
        return ByToken(expert, used.astype(jnp.float32), used), aux


@dataclass(frozen=True, kw_only=True)
class PerExample(Router):
    """All tokens of an example go to the same experts, which the pooled example chooses (arXiv:2309.04354, Sec. 3).

    A device that holds the experts of its example holds the whole model. Experts see whole examples, so they may mix
    tokens; a row of the batch is one example, not several documents. With `dispatch="dropless"` none is ever dropped;
    otherwise a group is `group_size` examples.

    Attributes:
      router: of the pooled examples, which it sees as one group.
      pool: the "mean" of an example's tokens, or the "first" one (a class token); the paper's choice is not confirmed.
    """

    router: Router = TopK(k=1, renormalise=False, losses=RouterLosses(z=0.0))
    pool: Pool = "mean"

    def __post_init__(self):
        require_choice(self, "pool", Pool)

    @property
    def unit(self) -> Literal["token", "example"]:
        return "example"

    def specs(self, dim: int, num_experts: int) -> dict:
        return self.router.specs(dim, num_experts)

    def active_fraction(self, num_experts: int, capacity_factor: float) -> float:
        return self.router.active_fraction(num_experts, capacity_factor)

    def apply(self, params, x, valid, room, ctx):
        groups, size, dim = *valid.shape[:2], x.shape[-1]
        if self.pool == "first":
            pooled = x[:, :, 0]
        else:
            tokens = jnp.maximum(valid.sum(-1), 1)[:, :, None]
            pooled = jnp.where(valid[..., None], x.astype(jnp.float32), 0).sum(2) / tokens
        some = valid.any(-1)
        whole = replace(room, capacity=groups * room.capacity)
        routing, aux = self.router.apply(params, pooled.reshape(1, -1, dim), some.reshape(1, -1), whole, ctx)
        if not isinstance(routing, ByToken):
            raise UserError(f"PerExample needs a router by which examples choose, not {type(self.router).__name__}")
        return jax.tree.map(lambda a: a.reshape(groups, size, -1), routing), aux
