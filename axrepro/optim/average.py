"""Model averaging: a second copy of the trained parameters that follows the first, and that evaluation looks at."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from axrepro.errors import require
from axrepro.optim.optimizer import require_choice, require_fraction
from axrepro.optim.schedule import Span, require_fits, require_span, span_steps


@dataclass(frozen=True, kw_only=True)
class Average(ABC):
    """How the averaged parameters follow the trained ones.

    Its state is {"count": int32, NAME: tree like the trained parameters}; the name of the kind of average keeps a
    checkpoint of one from being taken for another.

    Attributes:
      dtype: how the average is stored, "param": as the parameters are. An average of bfloat16 stands still where a
        step changes it by less than 1/256.
    """

    dtype: Literal["float32", "param"] = "float32"

    def __post_init__(self):
        require_choice(self, "dtype", ("float32", "param"))

    def check(self, steps: int) -> None:
        """Raises UserError for an average that would begin after a run of this many steps."""

    @property
    def _name(self) -> str:
        return type(self).__name__.lower()

    def init(self, params: Mapping) -> dict:
        """The first state: the parameters themselves."""
        return {"count": jnp.zeros((), jnp.int32), self._name: self._stored(params, params)}

    def partitions(self, params: Mapping) -> dict:
        """A PartitionSpec per leaf of the state, from those of the parameters."""
        return {"count": PartitionSpec(), self._name: dict(params)}

    def update(self, state: Mapping, params: Mapping, step: jax.Array, steps: int) -> dict:
        """The state after parameters have become `params`.

        Args:
          step: int32, steps taken, this one included.   steps: of the whole run.
        """
        weight, count = self._weight(state["count"], step, steps)
        old, new = (optax.tree.cast(tree, jnp.float32) for tree in (state[self._name], params))
        return {"count": count, self._name: self._stored(optax.incremental_update(new, old, weight), params)}

    def params(self, state: Mapping, params: Mapping) -> dict:
        """The averaged parameters, in the dtypes of `params`."""
        return jax.tree.map(lambda average, param: average.astype(param.dtype), state[self._name], params)

    def _stored(self, tree, params):
        dtype = (lambda param: jnp.float32) if self.dtype == "float32" else (lambda param: param.dtype)
        return jax.tree.map(lambda leaf, param: leaf.astype(dtype(param)), tree, params)

    @abstractmethod
    def _weight(self, count: jax.Array, step: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
        """The weight of the newest parameters, in [0, 1], and the next count."""


@dataclass(frozen=True, kw_only=True)
class Ema(Average):
    """Exponential moving average: a ← d a + (1 - d) p after every step, from the initial parameters on.

    Attributes:
      decay: d, the average's memory is about 1 / (1 - d) steps.
      warmup: d is min(decay, (1 + t) / (10 + t)) at the t-th update, counted from 0, so that the initial parameters are
        soon forgotten (`num_updates` of tf.train.ExponentialMovingAverage).
    """

    decay: float
    warmup: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_fraction(self, "decay")

    def _weight(self, count, step, steps):
        decay = jnp.minimum(self.decay, (1.0 + count) / (10.0 + count)) if self.warmup else self.decay
        return jnp.asarray(1.0 - decay, jnp.float32), count + 1


@dataclass(frozen=True, kw_only=True)
class Uniform(Average):
    """Mean of the parameters after steps `start`, `start + every`, …; before the first of them, those of each step.

    Over the last part of a run at a constant rate it is Polyak averaging (Polyak and Juditsky 1992); with `every` an
    epoch, stochastic weight averaging (arXiv:1803.05407, Algorithm 1); a late start makes it a mean of the latest
    weights (arXiv:2209.14981), but for a window that slides.

    Attributes:
      start: a number of steps, or a share of the run below 1.   every: steps between two that count.
    """

    start: Span
    every: int = 1

    def __post_init__(self):
        super().__post_init__()
        require_span(self, "start")
        require(self, "every", self.every >= 1, "1 step or more")

    def check(self, steps):
        require_fits(self, span_steps(self.start, steps), steps, "start")

    def _weight(self, count, step, steps):
        start = span_steps(self.start, steps)
        due = (step >= start) & ((step - start) % self.every == 0)
        weight = jnp.where(due, 1.0 / (count + 1.0), jnp.where(count == 0, 1.0, 0.0))
        return weight, count + due.astype(jnp.int32)
