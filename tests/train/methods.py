"""Three short methods that stretch the `Method` interface: EMA teacher, two players, robust mean.

A fourth makes its own batches by sampling. Each is as small as the idea allows; `regression_data` feeds them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from axrepro.core import Context, Loss, Method, Metric, Phase, Update
from axrepro.core.aux import objective
from axrepro.core.gradients import split_batch
from axrepro.core.param import copies_of, linear
from axrepro.core.tree import flatten, map_tree
from axrepro.data import Data, Examples


class _Points(Examples):
    """x ~ N(0, 1) of width 8 and y = x w + noise; `outliers` of 8 consecutive rows carry a target of 1e4."""

    def __init__(self, outliers: int):
        self._outliers = outliers
        self._w = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)

    def __len__(self):
        return 1 << 20

    def rows(self, indices):
        x = np.stack([np.random.default_rng(int(i) + 1).normal(size=8) for i in indices] or [np.zeros((0, 8))])
        x = x.reshape(-1, 8).astype(np.float32)
        y = x @ self._w
        y[indices % 8 < self._outliers] = 1e4
        return {"x": x, "y": y.astype(np.float32)}


@dataclass(frozen=True, kw_only=True)
class Points(Data):
    """A linear regression problem."""

    outliers: int = 0

    def open(self, split, seed):
        return _Points(self.outliers)

    def abstract(self):
        return {
            "x": jax.ShapeDtypeStruct((self.batch_size, 8), jnp.float32),
            "y": jax.ShapeDtypeStruct((self.batch_size, 4), jnp.float32),
        }

    @property
    def vocab_size(self):
        return None


def _net_specs() -> dict:
    return {
        "hidden": linear((8, 16), ("embed", "mlp"), fan_in=8),
        "out": linear((16, 4), ("mlp", "embed"), fan_in=16),
    }


def _net(params: Mapping, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


@dataclass(frozen=True, kw_only=True)
class Regression(Method):
    """Least squares, the base of the others."""

    def specs(self):
        return _net_specs()

    def loss(self, params, batch, ctx):
        return {"square": Loss.mean((_net(params, batch["x"]) - batch["y"]) ** 2)}


@dataclass(frozen=True, kw_only=True)
class TeacherDistillation(Method):
    """A student follows its own exponential moving average (mean teacher, arXiv:1703.01780) beside the targets."""

    momentum: float = 0.9

    def specs(self):
        return {"student": _net_specs(), "teacher": copies_of(_net_specs(), "student", "updated")}

    def loss(self, params, batch, ctx):
        student, teacher = _net(params["student"], batch["x"]), _net(params["teacher"], batch["x"])
        m = self.momentum
        moved = map_tree(
            lambda path, s: Update(m * flatten(params["teacher"])[path] + (1 - m) * jax.lax.stop_gradient(s)),
            params["student"],
        )
        return {
            "square": Loss.mean((student - batch["y"]) ** 2),
            "consistency": Loss.mean((student - jax.lax.stop_gradient(teacher)) ** 2, weight=0.1),
            "teacher": moved,
        }


@dataclass(frozen=True, kw_only=True)
class TwoPlayers(Method):
    """min over x, max over y of x y + (x^2 - y^2) / 2, whose saddle is 0; y moves twice a step, after x."""

    def specs(self):
        one = lambda: linear((4,), (None,), fan_in=1)
        return {"low": {"x": one()}, "high": {"y": one()}}

    def phases(self):
        return (Phase("low", "low/**"), Phase("high", "high/**"), Phase("high", "high/**"))

    def loss(self, params, batch, ctx: Context):
        x, y = params["low"]["x"], params["high"]["y"]
        value = x * y + (x**2 - y**2) / 2
        sign = 1.0 if ctx.phase == "low" else -1.0
        return {"game": Loss.mean(sign * value), "distance": Metric.mean(x**2 + y**2)}


@dataclass(frozen=True, kw_only=True)
class RobustMean(Method):
    """Each worker's gradient apart, then their coordinate-wise median: a minority of bad workers changes little."""

    base: Method
    workers: int = 8
    median: bool = True

    def specs(self):
        return self.base.specs()

    def loss(self, params, batch, ctx):
        return self.base.loss(params, batch, ctx)

    def gradients(self, loss, params, batch, ctx, microbatches):
        def of_worker(rows):
            def value(params):
                aux = loss(params, rows, ctx.replace(mesh=None))
                return objective(aux), aux

            return jax.grad(value, has_aux=True)(params)

        grads, aux = jax.vmap(of_worker)(split_batch(batch, self.workers, ctx))
        middle = (lambda g: jnp.median(g, axis=0)) if self.median else (lambda g: g.mean(0))
        return jax.tree.map(middle, grads), aux


@dataclass(frozen=True, kw_only=True)
class OwnData(Method):
    """Trains on what it sampled itself: inputs drawn between steps, and targets from a frozen reference."""

    def specs(self):
        return {"net": _net_specs(), "reference": copies_of(_net_specs(), "net", "frozen")}

    def rollout(self, params, batch, ctx):
        x = jax.random.normal(ctx.key, batch["x"].shape)
        return {"x": x, "y": 2 * _net(params["reference"], x)}

    def loss(self, params, batch, ctx):
        return {"square": Loss.mean((_net(params["net"], batch["x"]) - batch["y"]) ** 2)}
