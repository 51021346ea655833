"""A step looked at from inside: statistics of every activation, gradient and update, by layer.

It is a program of its own beside the train step, which thus stays the same to the last bit whether anybody looks or
not. An inspection costs one step and one forward pass, and changes nothing.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from axrepro.core.aux import Update, collect, losses_by_name
from axrepro.core.gradients import split_batch
from axrepro.core.taps import Position, first_uses, tapped
from axrepro.core.tree import flatten
from axrepro.train.state import Program, TrainState
from axrepro.train.step import Pass, passes

KINDS = ("parameter", "batch", "activation", "loss", "gradient", "change", "update")
"""In the order in which a step makes them; a "change" is what the optimizer adds to a parameter."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Look:
    """What was seen of one tensor.

    Attributes:
      phase: number of the update phase.   kind: one of `KINDS`.
      name: path of a parameter; scopes and tag of an activation, with "[]" for the index of a loop around it.
      position: place in the forward pass.
      seen: name of a statistic -> float32, with leading axes for stacked layers.
    """

    phase: int = field(metadata={"static": True})
    kind: str = field(metadata={"static": True})
    name: str = field(metadata={"static": True})
    position: Position = field(metadata={"static": True})
    seen: dict[str, Any]  # arrays, or what stands for them


def _look(x: jax.Array, stacked: int = 0) -> dict[str, jax.Array]:
    """Statistics over all axes but the first `stacked`: mean square, largest magnitude, zeros, not finite ones."""
    axes, x = tuple(range(stacked, x.ndim)), x.astype(jnp.float32)
    return {
        "mean_square": jnp.mean(jnp.square(x), axes),
        "max_abs": jnp.max(jnp.abs(x), axes, initial=0.0),
        "zeros": jnp.mean(x == 0, axes, dtype=jnp.float32),
        "not_finite": jnp.sum(~jnp.isfinite(x), axes, dtype=jnp.float32),
    }


def inspect_step(program: Program, state: TrainState, batch: dict) -> list[Look]:
    """What the step from `state` with `batch` goes through, forward first. Pure."""
    specs = flatten(program.specs)
    stacked = lambda spec: len(list(itertools.takewhile(lambda axis: axis == "layers", spec.axes)))
    layers = {path: stacked(spec) for path, spec in specs.items()}
    looks = [Look(0, "parameter", path, (), _look(x, layers[path])) for path, x in flatten(state.params).items()]
    floats = {name: x for name, x in batch.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    looks += [Look(0, "batch", name, (), _look(x)) for name, x in floats.items()]
    for phase, done in enumerate(passes(program, state, batch)):
        taps, uses = _forward_pass(done, batch, program.experiment.train.grad_accumulation)
        seen = [("activation", tap.name, tap.position, tap.value) for tap in taps]
        seen += [("loss", name, (), _look(loss.total)) for name, loss in losses_by_name(done.aux).items()]
        for kind, tree in (("gradient", done.grads), ("change", done.delta)):
            seen += [(kind, path, uses[path], _look(x, layers[path])) for path, x in flatten(tree).items()]
        seen += [("update", path, (), _look(u.value)) for path, u in collect(done.aux, Update).items()]
        looks += [Look(phase, kind, f"{done.prefix}{name}", *rest) for kind, name, *rest in seen]
    return looks


def _forward_pass(done: Pass, batch: dict, parts: int):
    """The taps of a forward pass, merged over the microbatches, and where each parameter is used first."""
    run = tapped(done.loss, _look)
    if parts == 1:
        _, taps = run(done.active, batch, done.ctx)
        rows = batch
    else:
        rows = split_batch(batch, parts, done.ctx)
        one = lambda xs: run(done.active, xs[1], done.ctx.fold(xs[0]))[1]
        taps = jax.lax.map(one, (jnp.arange(parts), rows))
        merge = {"max_abs": jnp.max, "not_finite": jnp.sum, "mean_square": jnp.mean, "zeros": jnp.mean}
        seen = lambda tap: {key: merge[key](value, axis=0) for key, value in tap.value.items()}
        taps = [type(tap)(tap.name, tap.position, seen(tap)) for tap in taps]
        rows = jax.tree.map(lambda x: x[0], rows)
    uses = first_uses(done.loss, done.active, rows, done.ctx)
    return taps, dict(zip(flatten(done.active), uses, strict=True))


class Inspector:
    """Inspects steps; compiles on the first use."""

    def __init__(self, program: Program):
        options = dict(program.experiment.train.compiler_options) or None
        self._inspect = jax.jit(
            functools.partial(inspect_step, program), out_shardings=program.replicated, compiler_options=options
        )

    def __call__(self, state: TrainState, batch: dict) -> list[Look]:
        """The looks with numpy arrays. On several processes all must call it."""
        return jax.device_get(self._inspect(state, batch))


def not_finite(looks: list[Look]) -> Iterator[str]:
    """What is not finite, in the order in which the step makes it: activations layer by layer, gradients backward."""
    found = []
    for number, look in enumerate(looks):
        for index in map(tuple, np.argwhere(look.seen["not_finite"]).tolist()):
            left = iter(index)
            place = [next(left, 0) if part is None else part for part in look.position]
            place = [-part for part in place] if look.kind == "gradient" else place
            found.append(((look.phase, KINDS.index(look.kind), place, number), look, index))
    for _, look, index in sorted(found, key=lambda item: item[0]):
        yield f"{look.kind} {placed(look.name, index)!r}"


def placed(name: str, index: tuple[int, ...]) -> str:
    """The name with a layer's index: in its "[]" where it has them, else behind it."""
    for i in index:
        name = name.replace("[]", f"[{i}]", 1) if "[]" in name else f"{name}[{i}]"
    return name
