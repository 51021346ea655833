"""How long each model trains, so that what is compared costs the same."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from axrepro.errors import UserError

Beside = Literal["wall_clock", "tokens", "flops"]
BESIDE: tuple[Beside, ...] = get_args(Beside)
"""The rules that give a mixture the budget of the dense model beside it."""


@dataclass(frozen=True)
class Cost:
    """What a step costs: tokens, model FLOPs, and seconds on the hardware in question."""

    tokens: int
    flops: float
    seconds: float


def dense_steps(cost: Cost, parameters: int, tokens_per_parameter: float, hours: float | None = None) -> int:
    """Steps of the dense model, from which the budgets of all others follow.

    Args:
      parameters: outside the embedding and the head.
      tokens_per_parameter: D = 20 N is compute-optimal (Hoffmann et al., arXiv:2203.15556, Table 3).
      hours: wall clock in its place.
    Raises:
      UserError: if that is less than one step.
    """
    if hours is not None:
        return _whole(hours * 3600 / cost.seconds, f"{hours:g} hours at {cost.seconds:.3g} s a step")
    tokens = tokens_per_parameter * parameters
    return _whole(tokens / cost.tokens, f"{tokens:,.0f} tokens in batches of {cost.tokens:,}")


def arm_steps(rule: Beside, cost: Cost, dense: Cost, steps_of_dense: int) -> int:
    """Steps that cost as much as those of the dense model under a rule.

    Raises:
      UserError: if that is less than one step.
    """
    return _whole(steps_of_dense * share(rule, cost, dense), f"the {rule} of {steps_of_dense} dense steps")


@dataclass(frozen=True)
class Between:
    """A step time on the curve of dense models.

    Attributes:
      lower, upper: places of its neighbours on the curve as it was given.   share: of the upper one.
      steps: of a dense model there.   growth: of the logarithm of steps over that of seconds.
      width: of the logarithm of seconds from one to the other.
    """

    lower: int
    upper: int
    share: float
    steps: int
    growth: float
    width: float


def between(seconds: float, curve: Iterable[tuple[float, int]]) -> Between | None:
    """Where a step time lies between two dense models; None if no two enclose it.

    Steps are read on the straight line between the logarithms of both.

    Args:
      curve: (seconds per step, steps) of the dense models, in any order.
    """
    points = sorted((math.log(t), math.log(steps), place) for place, (t, steps) in enumerate(curve))
    at = math.log(seconds)
    for (left, fewer, lower), (right, more, upper) in pairwise(points):
        if left <= at <= right and left < right:
            share, growth = (at - left) / (right - left), (more - fewer) / (right - left)
            steps = round(math.exp(fewer + growth * (at - left)))
            return Between(lower, upper, share, steps, growth, right - left)
    return None


def share(rule: Beside, cost: Cost, dense: Cost) -> float:
    """Steps that a rule gives for one step of the dense model."""
    spent = {"wall_clock": dense.seconds / cost.seconds, "tokens": dense.tokens / cost.tokens}
    return {**spent, "flops": dense.flops / cost.flops}[rule]


def _whole(steps: float, what: str) -> int:
    if round(steps) < 1:
        raise UserError(f"{what} are {steps:.2g} steps: raise tokens_per_parameter or hours, or lower data.batch_size")
    return round(steps)
