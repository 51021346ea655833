"""What all optimizers share. Each is plain data and builds an `optax.named_chain`, so checkpoints name its steps:
`scale_by_adam/mu/…`. A family of them has a file of its own.

Common to all:
  - `specs` are those of the trained parameters; weight decay applies where `Param.decay` is True.
  - Globs address parameters by path (`**/ffn/*`, see `core.tree.matches`) and the first match wins. `build` ignores
    globs without a match, because a phase of a method may train a part of the parameters; `check` does not.
  - The arithmetic and the state are float32 whatever the dtype of parameters and gradients; updates get the
    parameters' dtype at the end. `moment_dtype` stores the first moment more narrowly; second moments stay float32.
  - A step that is switched off remains in the chain under its name, without state.
  - A method that looks at whole tensors (a norm, a matrix) looks at each layer of a stack by itself.

There is neither Shampoo nor SOAP, for want of a kept implementation to build on: optax has none (main, 2026-08); the
last releases of precondition-opt and optax-shampoo are of 2023 and 2022; SOAP for JAX lives in single files of other
projects. `Muon` is Shampoo without accumulation (arXiv:2409.20325).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from axrepro.core.param import Param
from axrepro.core.tree import flatten, map_tree, matches
from axrepro.errors import UserError, is_number, located, require
from axrepro.optim.schedule import Schedule

Decay = Literal["coupled", "decoupled"]
MomentDtype = Literal["float32", "bfloat16"]
UpdateScale = tuple[tuple[str, float], ...]


class Optimizer(ABC):
    """How gradients become updates. The hyperparameters are here; what depends on the run arrives in `build`."""

    @abstractmethod
    def build(self, specs: Mapping, steps: int) -> optax.GradientTransformation:
        """The transformation for parameters like `specs` over a run of `steps` updates.

        `update(grads, state, params)` needs the params; its result is added to them. Within a `PerPath` the trees that
        arrive hold `optax.MaskedNode` at the parameters of other rules.
        """

    @abstractmethod
    def check(self, specs: Mapping) -> None:
        """Raises UserError for a glob that takes effect on none of all trained parameters."""

    def parts(self, specs: Mapping) -> Iterator[tuple[str, "Optimizer", Mapping]]:
        """Each optimizer in this one with its path below here and the specs that it trains."""
        yield "", self, specs

    @abstractmethod
    def learning_rates(self, state, steps: int) -> dict[str, jax.Array]:
        """The rates that the next update from this state of the built transformation uses, by metric name."""


def are_pairs(value, fits: Callable[[Any], bool]) -> bool:
    """Whether `value` is a tuple of (glob, x) with `fits(x)`."""
    pairs = isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
    return pairs and all(isinstance(glob, str) and fits(x) for glob, x in value)


def first_match(path: str, globs: Iterable[str]) -> int | None:
    """The index of the first glob that matches."""
    return next((index for index, glob in enumerate(globs) if matches(path, glob)), None)


def check_globs(field: str, globs: tuple[str, ...], paths: list[str]) -> None:
    """Raises UserError for the first glob that is the first match of no path."""
    effective = {first_match(path, globs) for path in paths}
    for index, glob in enumerate(globs):
        if index in effective:
            continue
        if taken := [path for path in paths if matches(path, glob)]:
            earlier = next(earlier for earlier in globs if matches(taken[0], earlier))
            raise UserError(f"{field}: {glob!r} comes too late, {earlier!r} takes {taken[0]!r} first; put it before")
        near = get_close_matches(glob.replace("**", "").strip("*/"), paths, n=1, cutoff=0.0)
        hint = f"the nearest is {near[0]!r}" if near else "there are none"
        raise UserError(f"{field}: {glob!r} matches no trained parameter; {hint}")


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on float32 copies of gradients and parameters; the updates get the parameters' dtype."""

    def init(params):
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params):
        wide = optax.tree.cast(params, jnp.float32)
        updates, state = inner.update(optax.tree.cast(updates, jnp.float32), state, wide)
        return jax.tree.map(lambda update, param: update.astype(param.dtype), updates, params), state

    # pyrefly: ignore[bad-argument-type]  # optax lets callers leave out params, which the result's dtypes are read from
    return optax.GradientTransformation(init, update)


def per_layer(specs: Mapping, make: Callable[[Param], optax.GradientTransformation]) -> optax.GradientTransformation:
    """A stateless transformation for each parameter, made from its spec, on each layer of its stacks by itself."""

    def of_one(path, spec):
        transform = make(spec)
        apply = lambda update, param: transform.update(update, transform.init(param), param)[0]
        for _ in range(spec.num_stacks):
            apply = jax.vmap(apply)
        # below lies an array, or the MaskedNode of a parameter that is not trained here
        return lambda *below: jax.tree.map(apply, *below)

    tree = map_tree(of_one, specs)
    each = lambda apply, updates, params: apply(updates, params)
    return optax.stateless(lambda updates, params: jax.tree.map(each, tree, updates, params))


@dataclass(frozen=True, kw_only=True)
class Single(Optimizer):
    """What the optimizers with one learning rate share: its schedule and the steps that act on any of them."""

    learning_rate: Schedule
    weight_decay: float = 0.0
    clip: float | None = None
    update_scale: UpdateScale = ()
    moment_dtype: MomentDtype = "float32"

    def __post_init__(self):
        rate = self.learning_rate
        require(self, "learning_rate", isinstance(rate, Schedule), f"a schedule, such as Constant(value={rate!r})")
        require(self, "weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "a number, 0 or above")
        require(self, "clip", self.clip is None or (is_number(self.clip) and self.clip > 0), "a norm above 0, or None")
        pairs = are_pairs(self.update_scale, lambda factor: is_number(factor) and factor > 0)
        require(self, "update_scale", pairs, "pairs of a glob and a factor above 0: (('**/ffn/*', 0.5),)")
        require_choice(self, "moment_dtype", ("float32", "bfloat16"))

    def check(self, specs):
        globs = tuple(glob for glob, _ in self.update_scale)
        check_globs(f"{type(self).__name__}.update_scale", globs, list(flatten(specs)))

    def learning_rates(self, state, steps):
        return {"learning_rate": self.learning_rate.build(steps)(state["learning_rate"].count)}

    def _rate(self, steps: int) -> optax.Schedule:
        with located(self.learning_rate, f"{type(self).__name__}.learning_rate"):
            return self.learning_rate.build(steps)

    def _clip(self) -> optax.GradientTransformation:
        return optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip)

    def _update_scale(self, specs: Mapping) -> optax.GradientTransformation:
        globs, factors = [glob for glob, _ in self.update_scale], [factor for _, factor in self.update_scale]

        def factor_of(path, spec):
            index = first_match(path, globs)
            return 1.0 if index is None else factors[index]

        tree = map_tree(factor_of, specs)
        # The factors' tree is a prefix of the updates': below a factor lies an array, or a MaskedNode.
        scaled = lambda factor, below: jax.tree.map(lambda update: factor * update, below)
        return optax.stateless(lambda updates, params: jax.tree.map(scaled, tree, updates))

    def _decay(self, specs: Mapping, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return optax.add_decayed_weights(rate, mask=map_tree(lambda path, spec: spec.decay, specs))


def require_fraction(node, *names: str) -> None:
    """Raises UserError for the first of these fields that is no number in [0, 1)."""
    for name in names:
        value = getattr(node, name)
        require(node, name, is_number(value) and 0 <= value < 1, "a number in [0, 1)")


def require_choice(node, name: str, choices: tuple[str, ...]) -> None:
    """Raises UserError unless the field is one of `choices`."""
    require(node, name, getattr(node, name) in choices, " or ".join(map(repr, choices)))


def decay_per_rate(node) -> float:
    """Weight decay in units of the learning rate, so that `rate * (u + this * p)` is the step in either form."""
    return node.weight_decay if node.decay == "coupled" else node.weight_decay / node.learning_rate.peak


def require_decay(node) -> None:
    """Raises UserError where the form of the weight decay is unknown, or has no peak to follow."""
    require_choice(node, "decay", ("coupled", "decoupled"))
    if node.decay == "decoupled" and node.weight_decay and not node.learning_rate.peak:
        raise UserError(
            f"{type(node).__name__}.decay='decoupled' follows the schedule divided by its peak, which is 0; set "
            "learning_rate above 0, or weight_decay=0"
        )


def mup_simple(dim: int, globs: tuple[str, ...], base: int = 768) -> UpdateScale:
    """Update scales that keep a learning rate tuned at width `base` good for wider models: min(base / dim, 1) each.

    Args:
      dim: width of the model.
      globs: the hidden linear weights (attention projections, feed-forward, experts); neither embeddings, norms nor
        the router's gate.
    """
    return tuple((glob, min(base / dim, 1.0)) for glob in globs)
