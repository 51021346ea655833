"""Four residual layers in a scan, one of which may be faulty, for tests of what tells where a fault is."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from axrepro.core import Layer, Loss, Method
from axrepro.core.param import linear
from axrepro.core.remat import rematerialised, tag
from axrepro.data import Data, Examples
from axrepro.nn import Repeat
from axrepro.optim import SGD, Constant
from axrepro.train.experiment import Experiment, Train
from axrepro.train.loop import build_program

DEPTH, DIM = 4, 8


@dataclass(frozen=True, kw_only=True)
class Residual(Layer):
    """x + relu(x up) down; `rooted` takes sqrt(square(.)) for relu, whose value at 0 is 0 and whose gradient nan."""

    rooted: bool = False

    def specs(self, dim):
        return {
            "up": linear((dim, dim), ("embed", "mlp"), fan_in=dim),
            "down": linear((dim, dim), ("mlp", "embed"), fan_in=dim),
        }

    def apply(self, params, x, ctx):
        def one(params, x):
            with jax.named_scope("inner"):
                h = tag(x @ params["up"], "up")
            h = jnp.sqrt(jnp.square(h)) if self.rooted else jax.nn.relu(h)
            return x + tag(h @ params["down"], "down")

        return rematerialised(one, ctx.remat, ctx.in_scan)(params, x), {}


@dataclass(frozen=True, kw_only=True)
class Stack(Method):
    """Least squares through the layers, on random rows."""

    layers: Repeat = Repeat(layer=Residual(), times=DEPTH)

    def specs(self):
        return {"layers": self.layers.specs(DIM), "out": linear((DIM, 4), ("embed", "mlp"), fan_in=DIM)}

    def loss(self, params, batch, ctx):
        with jax.named_scope("layers"):
            x, aux = self.layers.apply(params["layers"], batch["x"], ctx)
        return {"square": Loss.mean((x @ params["out"] - batch["y"]) ** 2), "layers": aux}


class _Rows(Examples):
    """64 random examples an epoch."""

    def __len__(self):
        return 64

    def rows(self, indices):
        values = np.random.default_rng(0).normal(size=(64, DIM + 4)).astype(np.float32)[indices % 64]
        return {"x": values[:, :DIM], "y": values[:, DIM:]}


@dataclass(frozen=True, kw_only=True)
class Rows(Data):
    """Inputs and targets of a regression."""

    def open(self, split, seed):
        return _Rows()

    def abstract(self):
        widths = {"x": DIM, "y": 4}
        return {name: jax.ShapeDtypeStruct((self.batch_size, width), jnp.float32) for name, width in widths.items()}

    @property
    def vocab_size(self):
        return None


def experiment(method: Method = Stack(), rate: float = 0.01, **train) -> Experiment:
    """A short run of it."""
    settings = Train(**{"steps": 8, "log_every": 1, "dtype": "float32"} | train)
    optimizer = SGD(learning_rate=Constant(value=rate), momentum=None)
    return Experiment(method=method, data=Rows(batch_size=32), optimizer=optimizer, train=settings)


def set_up(config: Experiment):
    """(program, first state, first batch)."""
    program = build_program(config)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    return program, state, next(config.data.batches("train", 0, program.mesh, config.rules))
