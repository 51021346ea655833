"""Losses and metrics of routers that give every token a distribution over experts.

Axes: N groups, S tokens per group, E experts. All are means over the tokens of a layer that are no padding; the trainer
averages a term over layers (`axrepro.core.aux.Loss`), as the released code of arXiv:2405.15052 does.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from axrepro.core.aux import Loss, Metric, Update
from axrepro.core.context import Context
from axrepro.core.param import vector
from axrepro.errors import UserError, require, require_choice, require_not_negative, require_positive
from axrepro.nn.moe.routing import ByToken, choices


@dataclass(frozen=True, kw_only=True)
class AdaptiveBalance:
    """Scales the balance loss until the share of choices beyond capacity lies between two bounds.

    The share is averaged over steps; above `high` the logarithm of the scale grows by `log_step`, below `low` it falls
    by as much (released with arXiv:2405.15052; its decay is not documented, ours is a choice).

    Attributes:
      decay: of the average over steps.
    """

    low: float = 1e-3
    high: float = 0.1
    log_step: float = 0.01
    decay: float = 0.9

    def __post_init__(self):
        require_positive(self, "high", "log_step")
        require(self, "low", 0 <= self.low < self.high, f"a number in [0, high={self.high})")
        require(self, "decay", 0 <= self.decay < 1, "a number in [0, 1)")

    def specs(self) -> dict:
        """What is remembered from step to step."""
        number = lambda: vector((), (), 0.0, role="updated")
        return {"over_capacity": number(), "log_scale": number()}

    def apply(self, params: dict, over_capacity: Float[Array, ""]) -> tuple[Float[Array, ""], dict]:
        """(factor for the balance loss of this step, what is remembered for the next)."""
        average = self.decay * params["over_capacity"] + (1 - self.decay) * over_capacity
        step = jnp.where(average > self.high, self.log_step, jnp.where(average < self.low, -self.log_step, 0.0))
        updates = {"over_capacity": Update(average), "log_scale": Update(params["log_scale"] + step)}
        return jnp.exp(params["log_scale"]), jax.lax.stop_gradient(updates)


BalanceOver = Literal["first", "all"]


@dataclass(frozen=True, kw_only=True)
class RouterLosses:
    """Weights of the losses on a router; 0 leaves one out.

    Attributes:
      balance: E times the sum over experts of (share of tokens) x (mean probability), per group; 1 when tokens spread
        evenly, E when one expert takes all.
      balance_over: "first" counts first choices (GShard, arXiv:2006.16668, Eq. 4; Switch, arXiv:2101.03961, Eq. 4),
        "all" any of the k. Before tokens are dropped.
      adaptive: changes the weight of the balance loss during training.
      z: mean squared log-partition (ST-MoE, arXiv:2202.08906, Eq. 5).
      entropy: mean entropy of the tokens' distributions: minimised, so that tokens decide (LIMoE, arXiv:2206.02770,
        Sec. 2.2, "local").
      spread: minus the entropy of the mean distribution of each group: all experts are used ("global", same section).
      target: cross-entropy with `Context.routing_target`, where the batch says which experts are right (Mobile V-MoE,
        arXiv:2309.04354, weight 0.3).
    """

    balance: float = 0.01
    balance_over: BalanceOver = "first"
    adaptive: AdaptiveBalance | None = None
    z: float = 0.001
    entropy: float = 0.0
    spread: float = 0.0
    target: float = 0.0

    def __post_init__(self):
        require_choice(self, "balance_over", BalanceOver)
        require_not_negative(self, "balance", "z", "entropy", "spread", "target")

    def specs(self) -> dict:
        """The state of the adaptive weight, if there is one."""
        return {} if self.adaptive is None else {"adaptive": self.adaptive.specs()}

    def apply(
        self,
        params: dict,
        logits: Float[Array, "N S E"],
        probs: Float[Array, "N S E"],
        routing: ByToken,
        valid: Bool[Array, "N S"],
        capacity: int,
        ctx: Context,
    ) -> dict:
        """The losses that have a weight, and as metrics the entropy and the mean square of the logits.

        Args:
          probs: of the logits; sums to 1.   routing: before anything is dropped.
        Raises:
          UserError: if a target is asked for, in training, that the context does not have.
        """
        num_experts = probs.shape[-1]
        tokens = jnp.maximum(valid.sum(1), 1)[:, None]  # [N, 1]
        wanted = choices(routing, num_experts)
        counted = wanted
        if self.balance_over == "first":
            counted = choices(jax.tree.map(lambda a: a[:, :, :1], routing), num_experts)
        share = counted / jnp.maximum(counted.sum(-1, keepdims=True), 1)  # [N, E]
        mean_probs = jnp.where(valid[:, :, None], probs, 0).sum(1) / tokens
        entropy = _entropy(probs)
        square = jnp.square(logits).mean(-1)
        aux: dict = {"router_entropy": Metric.mean(entropy, valid), "router_logit_square": Metric.mean(square, valid)}
        if self.balance:
            balance = num_experts * (share * mean_probs).sum(-1)  # counting has no gradient
            if self.adaptive is not None:
                over = jnp.maximum(wanted - capacity, 0).sum() / jnp.maximum(wanted.sum(), 1)
                scale, aux["adaptive"] = self.adaptive.apply(params["adaptive"], over)
                balance *= scale
            aux["balance"] = Loss.mean(balance, valid.any(1), self.balance)
        if self.z:
            aux["router_z"] = Loss.mean(jax.nn.logsumexp(logits, axis=-1) ** 2, valid, self.z)
        if self.entropy:
            aux["entropy"] = Loss.mean(entropy, valid, self.entropy)
        if self.spread:
            aux["spread"] = Loss.mean(-_entropy(mean_probs), valid.any(1), self.spread)
        if self.target and (ctx.train or ctx.routing_target is not None):
            aux["target"] = Loss.mean(self._cross_entropy(logits, ctx), valid, self.target)
        return aux

    def _cross_entropy(self, logits, ctx):
        if ctx.routing_target is None:
            raise UserError(f"RouterLosses.target={self.target} needs a method that sets Context.routing_target")
        if ctx.routing_target.shape[-1] != logits.shape[-1]:
            raise UserError(
                f"Context.routing_target has {ctx.routing_target.shape[-1]} experts, not {logits.shape[-1]}"
            )
        if ctx.routing_target.size != logits.size:
            raise UserError(
                f"Context.routing_target of shape {ctx.routing_target.shape} is not one distribution for each of the "
                f"{logits.size // logits.shape[-1]} tokens or examples that are routed"
            )
        target = ctx.routing_target.reshape(logits.shape)
        return -(target * jax.nn.log_softmax(logits)).sum(-1)


def _entropy(probs):
    return -(probs * jnp.log(probs + 1e-9)).sum(-1)
