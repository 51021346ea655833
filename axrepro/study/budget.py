"""How long each model trains, so that what is compared costs the same."""

from dataclasses import dataclass

from axrepro.errors import UserError
from axrepro.study.study import Rule


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


def arm_steps(rule: Rule, cost: Cost, dense: Cost, steps_of_dense: int) -> int:
    """Steps that cost as much as those of the dense model under a rule.

    Raises:
      UserError: if that is less than one step.
    """
    spent = {"wall_clock": dense.seconds / cost.seconds, "tokens": dense.tokens / cost.tokens}
    spent["flops"] = dense.flops / cost.flops
    return _whole(steps_of_dense * spent[rule], f"the {rule} of {steps_of_dense} dense steps")


def _whole(steps: float, what: str) -> int:
    if round(steps) < 1:
        raise UserError(f"{what} are {steps:.2g} steps: raise tokens_per_parameter or hours, or lower data.batch_size")
    return round(steps)
