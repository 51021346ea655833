"""Learning-rate schedules. They hold a shape; its length is the run's, so `train.steps` alone stretches it.

`value(step)` is the rate of the update that follows `step` earlier ones. A warm-up rises linearly from 0 at step 0 to
the peak at step `warmup`, so the first update of a run with warm-up moves nothing but fills the moments; a decay
reaches its floor at step `steps`, one after the last update. Both are optax's conventions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
import optax

from axrepro.errors import UserError, is_number, require

Span = int | float
"""Part of a run: below 1 a share of all its steps, from 1 on a whole number of steps."""


def _require_rate(node, name: str) -> None:
    value = getattr(node, name)
    require(node, name, is_number(value) and value >= 0, "a learning rate, 0 or above")


def require_span(node, name: str) -> None:
    """Raises UserError unless the field is a `Span`."""
    value = getattr(node, name)
    allowed = is_number(value) and value >= 0 and (value < 1 or value == int(value))
    require(node, name, allowed, "a whole number of steps, or a share of the run below 1 (0.05)")


def _require_floor(node) -> None:
    require(node, "floor", is_number(node.floor) and 0 <= node.floor <= 1, "a fraction of the peak between 0 and 1")


def span_steps(span: Span, steps: int) -> int:
    """A span in steps of a run of `steps`."""
    # Rounded down, so that shares which add up to 1 fit; the small term keeps 0.29 of 100 at 29.
    return int(span) if span >= 1 else int(span * steps + 1e-6)


def require_fits(node, length: int, steps: int, *names: str) -> None:
    """Raises UserError for these fields of `node` where their `length` exceeds the run of `steps`."""
    if length > steps:
        given = " and ".join(f"{name}={getattr(node, name)!r}" for name in names)
        raise UserError(
            f"{type(node).__name__}.{given}: {length} steps, longer than the run of {steps}; lower it, write it as a "
            "share of the run (0.05), or raise train.steps"
        )


def _after_warmup(peak: float, warmup: int, then: optax.Schedule) -> optax.Schedule:
    """`then` counted from the end of the warm-up. Values are float32 arrays, never weakly typed."""
    if warmup:
        then = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), then], [warmup])
    return lambda step: jnp.asarray(then(step), jnp.float32)


class Schedule(ABC):
    """A learning rate over the run.

    Attributes:
      peak: its largest value.
    """

    peak: float

    @abstractmethod
    def build(self, steps: int) -> optax.Schedule:
        """The rate as a float32 scalar for a run of `steps` updates.

        Raises:
          UserError: if a part of it is longer than the run.
        """


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same value at every step. (With a warm-up: `WarmupStableDecay(decay=0)`.)"""

    value: float

    def __post_init__(self):
        _require_rate(self, "value")

    @property
    def peak(self) -> float:
        return self.value

    def build(self, steps):
        return _after_warmup(self.value, 0, optax.constant_schedule(self.value))


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Warm-up, then half a cosine from the peak down to `floor`, a fraction of the peak."""

    peak: float
    warmup: Span = 0
    floor: float = 0.0

    def __post_init__(self):
        _require_rate(self, "peak")
        require_span(self, "warmup")
        _require_floor(self)

    def build(self, steps):
        warmup = span_steps(self.warmup, steps)
        require_fits(self, warmup, steps, "warmup")
        decay = optax.cosine_decay_schedule(self.peak, max(steps - warmup, 1), alpha=self.floor)
        return _after_warmup(self.peak, warmup, decay)


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """Warm-up, then a straight line from the peak down to `floor`, a fraction of the peak."""

    peak: float
    warmup: Span = 0
    floor: float = 0.0

    def __post_init__(self):
        _require_rate(self, "peak")
        require_span(self, "warmup")
        _require_floor(self)

    def build(self, steps):
        warmup = span_steps(self.warmup, steps)
        require_fits(self, warmup, steps, "warmup")
        decay = optax.linear_schedule(self.peak, self.floor * self.peak, max(steps - warmup, 1))
        return _after_warmup(self.peak, warmup, decay)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Warm-up, the peak for most of the run, then a straight line to `floor` over the last `decay` steps."""

    peak: float
    warmup: Span = 0
    decay: Span = 0.1
    floor: float = 0.0

    def __post_init__(self):
        _require_rate(self, "peak")
        require_span(self, "warmup")
        require_span(self, "decay")
        _require_floor(self)

    def build(self, steps):
        warmup, decay = span_steps(self.warmup, steps), span_steps(self.decay, steps)
        require_fits(self, warmup + decay, steps, "warmup", "decay")
        then = optax.constant_schedule(self.peak)
        if decay:
            then = optax.linear_schedule(self.peak, self.floor * self.peak, decay, steps - decay - warmup)
        return _after_warmup(self.peak, warmup, then)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """Warm-up, then `peak * sqrt(warmup / step)`: a rate that depends on `steps` only if `warmup` is a share of it."""

    peak: float
    warmup: Span

    def __post_init__(self):
        _require_rate(self, "peak")
        require_span(self, "warmup")
        require(self, "warmup", self.warmup > 0, "a warm-up above 0, the unit in which its decay is measured")

    def build(self, steps):
        warmup = max(span_steps(self.warmup, steps), 1)
        require_fits(self, warmup, steps, "warmup")

        def decay(step):
            return self.peak * jnp.sqrt(warmup / (warmup + jnp.maximum(step, 0)))

        return _after_warmup(self.peak, warmup, decay)
