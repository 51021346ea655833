"""Four residual layers in a scan, one of which may be faulty, for tests of what tells where a fault is."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from methods import Points

from axrepro.core import Layer, Loss, Method
from axrepro.core.param import linear
from axrepro.nn import Repeat
from axrepro.nn.remat import rematerialised, tag
from axrepro.optim import SGD, Constant
from axrepro.train.experiment import Experiment, Train
from axrepro.train.loop import build_program

DEPTH, DIM = 4, 8


@dataclass(frozen=True, kw_only=True)
class Residual(Layer):
    """x + root(relu(x up)) down; `rooted` takes sqrt(relu(.)), whose gradient at 0 is nan and whose value is 0."""

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
            h = jax.nn.relu(h)
            return x + tag((jnp.sqrt(h) if self.rooted else h) @ params["down"], "down")

        return rematerialised(one, ctx.remat, ctx.in_scan)(params, x), {}


@dataclass(frozen=True, kw_only=True)
class Stack(Method):
    """Least squares through the layers, on the batches of `methods.Points`."""

    layers: Repeat = Repeat(layer=Residual(), times=DEPTH)

    def specs(self):
        return {"layers": self.layers.specs(DIM), "out": linear((DIM, 4), ("embed", "mlp"), fan_in=DIM)}

    def loss(self, params, batch, ctx):
        with jax.named_scope("layers"):
            x, aux = self.layers.apply(params["layers"], batch["x"], ctx)
        return {"square": Loss.mean((x @ params["out"] - batch["y"]) ** 2), "layers": aux}


def experiment(method: Method = Stack(), rate: float = 0.01, **train) -> Experiment:
    """A short run of it."""
    settings = Train(**{"steps": 8, "log_every": 1, "dtype": "float32"} | train)
    optimizer = SGD(learning_rate=Constant(value=rate), momentum=None)
    return Experiment(method=method, data=Points(batch_size=32), optimizer=optimizer, train=settings)


def set_up(config: Experiment):
    """(program, first state, first batch)."""
    program = build_program(config)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    return program, state, next(config.data.batches("train", 0, program.mesh, config.rules))
