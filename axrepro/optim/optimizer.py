"""Optimizers as plain data. Each builds an `optax.named_chain`, so checkpoints name the steps: `scale_by_adam/mu/…`.

Common to all:
  - `specs` are those of the trained parameters; weight decay applies where `Param.decay` is True.
  - Globs address parameters by path (`**/ffn/*`, see `core.tree.matches`) and the first match wins. `build` ignores
    globs without a match, because a phase of a method may train a part of the parameters; `check` does not.
  - The arithmetic and the state are float32 whatever the dtype of parameters and gradients; updates get the
    parameters' dtype at the end. `moment_dtype` stores the first moment more narrowly; second moments stay float32.
  - A step that is switched off remains in the chain under its name, without state.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from axrepro.core.tree import flatten, map_tree, matches, select
from axrepro.errors import UserError, is_number, require
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

    @abstractmethod
    def learning_rates(self, steps: int) -> dict[str, optax.Schedule]:
        """The rates to log, by metric name."""


def _are_pairs(value, fits: Callable[[Any], bool]) -> bool:
    """Whether `value` is a tuple of (glob, x) with `fits(x)`."""
    pairs = isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
    return pairs and all(isinstance(glob, str) and fits(x) for glob, x in value)


def _first_match(path: str, globs: Iterable[str]) -> int | None:
    return next((index for index, glob in enumerate(globs) if matches(path, glob)), None)


def _check_globs(field: str, globs: tuple[str, ...], paths: list[str]) -> None:
    """Raises UserError for the first glob that is the first match of no path."""
    effective = {_first_match(path, globs) for path in paths}
    for index, glob in enumerate(globs):
        if index in effective:
            continue
        if taken := [path for path in paths if matches(path, glob)]:
            earlier = next(earlier for earlier in globs if matches(taken[0], earlier))
            raise UserError(f"{field}: {glob!r} comes too late, {earlier!r} takes {taken[0]!r} first; put it before")
        near = get_close_matches(glob.replace("**", "").strip("*/"), paths, n=1, cutoff=0.0)
        hint = f"the nearest is {near[0]!r}" if near else "there are none"
        raise UserError(f"{field}: {glob!r} matches no trained parameter; {hint}")


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def init(params):
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params):
        wide = optax.tree.cast(params, jnp.float32)
        updates, state = inner.update(optax.tree.cast(updates, jnp.float32), state, wide)
        return jax.tree.map(lambda update, param: update.astype(param.dtype), updates, params), state

    # pyrefly: ignore[bad-argument-type]  # optax lets callers leave out params, which the result's dtypes are read from
    return optax.GradientTransformation(init, update)


@dataclass(frozen=True, kw_only=True)
class _Single(Optimizer):
    """What the optimizers with one learning rate share: its schedule and the steps that act on any of them."""

    learning_rate: Schedule
    weight_decay: float = 0.0
    clip: float | None = None
    update_scale: UpdateScale = ()

    def __post_init__(self):
        rate = self.learning_rate
        require(self, "learning_rate", isinstance(rate, Schedule), f"a schedule, such as Constant(value={rate!r})")
        require(self, "weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "a number, 0 or above")
        require(self, "clip", self.clip is None or (is_number(self.clip) and self.clip > 0), "a norm above 0, or None")
        pairs = _are_pairs(self.update_scale, lambda factor: is_number(factor) and factor > 0)
        require(self, "update_scale", pairs, "pairs of a glob and a factor above 0: (('**/ffn/*', 0.5),)")

    def check(self, specs):
        globs = tuple(glob for glob, _ in self.update_scale)
        _check_globs(f"{type(self).__name__}.update_scale", globs, list(flatten(specs)))

    def learning_rates(self, steps):
        return {"learning_rate": self.learning_rate.build(steps)}

    def _clip(self) -> optax.GradientTransformation:
        return optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip)

    def _update_scale(self, specs: Mapping) -> optax.GradientTransformation:
        globs, factors = [glob for glob, _ in self.update_scale], [factor for _, factor in self.update_scale]

        def factor_of(path, spec):
            index = _first_match(path, globs)
            return 1.0 if index is None else factors[index]

        tree = map_tree(factor_of, specs)
        # The factors' tree is a prefix of the updates': below a factor lies an array, or a MaskedNode.
        scaled = lambda factor, below: jax.tree.map(lambda update: factor * update, below)
        return optax.stateless(lambda updates, params: jax.tree.map(scaled, tree, updates))

    def _decay(self, specs: Mapping, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return optax.add_decayed_weights(rate, mask=map_tree(lambda path, spec: spec.decay, specs))


def _require_fraction(node, *names: str) -> None:
    for name in names:
        value = getattr(node, name)
        require(node, name, is_number(value) and 0 <= value < 1, "a number in [0, 1)")


def _require_choice(node, name: str, choices: tuple[str, ...]) -> None:
    require(node, name, getattr(node, name) in choices, " or ".join(map(repr, choices)))


def _decay_per_rate(node) -> float:
    """Weight decay in units of the learning rate, so that `rate * (u + this * p)` is the step in either form."""
    return node.weight_decay if node.decay == "coupled" else node.weight_decay / node.learning_rate.peak


def _require_decay(node) -> None:
    _require_choice(node, "decay", ("coupled", "decoupled"))
    if node.decay == "decoupled" and node.weight_decay and not node.learning_rate.peak:
        raise UserError(
            f"{type(node).__name__}.decay='decoupled' follows the schedule divided by its peak, which is 0; set "
            "learning_rate above 0, or weight_decay=0"
        )


@dataclass(frozen=True, kw_only=True)
class AdamW(_Single):
    """Adam (arXiv:1412.6980) with weight decay (arXiv:1711.05101).

    With g the clipped gradient, r(t) the learning rate, c the parameter's `update_scale`, and w = `weight_decay` for
    decayed parameters, else 0:

      m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g²,   u = m / (1 - b1ᵗ) / (sqrt(v / (1 - b2ᵗ)) + eps)
      coupled:     p ← p - r(t) (c u + w p)              as optax.adamw and torch have it
      decoupled:   p ← p - s(t) (r c u + w p)            r the peak of the schedule, s(t) = r(t) / r

    Decoupled, a change of the peak leaves the decay as it is; it equals the coupled form with w / r.

    Attributes:
      learning_rate: schedule of r(t).   b1, b2: decay of the moments.   eps: added to the root.
      weight_decay: w.   decay: which of the two forms.
      clip: largest global norm of the gradient; larger ones are scaled down to it. None: no clipping.
      update_scale: (glob, factor c). The factor multiplies the Adam update and leaves the decay alone.
      moment_dtype: how m is stored.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Decay = "coupled"
    clip: float | None = 1.0
    moment_dtype: MomentDtype = "float32"

    def __post_init__(self):
        super().__post_init__()
        _require_fraction(self, "b1", "b2")
        require(self, "eps", is_number(self.eps) and self.eps > 0, "a number above 0")
        _require_decay(self)
        _require_choice(self, "moment_dtype", ("float32", "bfloat16"))

    def build(self, specs, steps):
        return _in_float32(
            optax.named_chain(
                ("clip", self._clip()),
                ("scale_by_adam", optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype)),
                ("update_scale", self._update_scale(specs)),
                ("decay", self._decay(specs, _decay_per_rate(self))),
                ("learning_rate", optax.scale_by_learning_rate(self.learning_rate.build(steps))),
            )
        )


@dataclass(frozen=True, kw_only=True)
class SGD(_Single):
    """Stochastic gradient descent with momentum, in torch's form: weight decay is a part of the gradient.

      g ← g + w p,   m = momentum m + g,   u = m (nesterov: g + momentum m),   p ← p - r(t) c u

    Attributes:
      learning_rate: schedule of r(t).   momentum: None keeps no state.   nesterov: look one step of momentum ahead.
      weight_decay: w, for decayed parameters.   clip: largest global norm of g, before the decay is added.
      update_scale: (glob, factor c); it multiplies the whole step.   moment_dtype: how m is stored.
    """

    momentum: float | None = 0.9
    nesterov: bool = False
    moment_dtype: MomentDtype = "float32"

    def __post_init__(self):
        super().__post_init__()
        if self.momentum is not None:
            _require_fraction(self, "momentum")
        require(self, "nesterov", not (self.nesterov and self.momentum is None), "False where momentum is None")
        _require_choice(self, "moment_dtype", ("float32", "bfloat16"))

    def build(self, specs, steps):
        momentum = optax.identity()
        if self.momentum is not None:
            momentum = optax.trace(self.momentum, self.nesterov, accumulator_dtype=self.moment_dtype)
        return _in_float32(
            optax.named_chain(
                ("clip", self._clip()),
                ("decay", self._decay(specs, self.weight_decay)),
                ("momentum", momentum),
                ("update_scale", self._update_scale(specs)),
                ("learning_rate", optax.scale_by_learning_rate(self.learning_rate.build(steps))),
            )
        )


@dataclass(frozen=True, kw_only=True)
class Adafactor(_Single):
    """Adafactor (arXiv:1804.04235) in optax's order of steps, where momentum averages updates times learning rate.

    Second moments of a tensor with two dimensions of `min_dim_size_to_factor` or more are kept as two means.

      u = g / sqrt(second moment),   u ← u / max(1, rms(u) / clipping_threshold),   u ← r(t) max(rms(p), 1e-3) u
      u ← average of u by `momentum`,   coupled: p ← p - c u - r(t) w p,   decoupled: p ← p - c u - s(t) w p

    with r(t), s(t), c and w as in `AdamW`. Departure from optax: there w p follows no schedule; under a constant rate
    that is the decoupled form.

    Attributes:
      learning_rate: schedule of r(t), relative to each tensor's own size if `multiply_by_parameter_scale`.
      decay_rate: the second moments decay by 1 - t**-decay_rate.   eps: added to the squared gradient.
      clipping_threshold: largest rms of one tensor's update. None: no clipping.
      multiply_by_parameter_scale: False leaves out max(rms(p), 1e-3).
      momentum: None keeps no first moment.   moment_dtype: how that is stored.
      weight_decay, decay, clip, update_scale: as in `AdamW`.
    """

    min_dim_size_to_factor: int = 128
    decay_rate: float = 0.8
    eps: float = 1e-30
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    momentum: float | None = None
    decay: Decay = "coupled"
    moment_dtype: MomentDtype = "float32"

    def __post_init__(self):
        super().__post_init__()
        require(self, "min_dim_size_to_factor", self.min_dim_size_to_factor >= 1, "a size of 1 or above")
        _require_fraction(self, "decay_rate", *["momentum"] * (self.momentum is not None))
        require(self, "eps", is_number(self.eps) and self.eps > 0, "a number above 0")
        threshold = self.clipping_threshold
        allowed = threshold is None or (is_number(threshold) and threshold >= 1)
        require(self, "clipping_threshold", allowed, "a number of 1 or above, or None")
        _require_decay(self)
        _require_choice(self, "moment_dtype", ("float32", "bfloat16"))

    def build(self, specs, steps):
        rate, decay = self.learning_rate.build(steps), _decay_per_rate(self)
        moments = optax.scale_by_factored_rms(
            decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_size_to_factor, epsilon=self.eps
        )
        block_clip = param_scale = momentum = optax.identity()
        if self.clipping_threshold is not None:
            block_clip = optax.clip_by_block_rms(self.clipping_threshold)
        if self.multiply_by_parameter_scale:
            param_scale = optax.scale_by_param_block_rms()
        if self.momentum is not None:
            momentum = optax.ema(self.momentum, debias=False, accumulator_dtype=self.moment_dtype)
        return _in_float32(
            optax.named_chain(
                ("clip", self._clip()),
                ("scale_by_factored_rms", moments),
                ("clip_by_block_rms", block_clip),
                ("learning_rate", optax.scale_by_learning_rate(rate, flip_sign=False)),
                ("scale_by_param_rms", param_scale),
                ("momentum", momentum),
                ("update_scale", self._update_scale(specs)),
                ("decay", self._decay(specs, lambda step: rate(step) * decay)),
                ("sign", optax.scale(-1.0)),
            )
        )


@dataclass(frozen=True, kw_only=True)
class PerPath(Optimizer):
    """An optimizer per group of parameters: `rules=(("**/embed/*", SGD(...)), ("**", AdamW(...)))`.

    The first glob that matches a parameter's path decides. Each rule acts on its own parameters alone: its `clip`
    bounds the norm of their gradients. Without its wildcards the glob names the rule in logs and checkpoints (`embed`;
    `rest` for `**`).
    """

    rules: tuple[tuple[str, Optimizer], ...]

    def __post_init__(self):
        pairs = _are_pairs(self.rules, lambda optimizer: isinstance(optimizer, Optimizer))
        require(self, "rules", pairs and bool(self.rules), "pairs of a glob and an optimizer, at least one")
        if any(isinstance(optimizer, PerPath) for _, optimizer in self.rules):
            raise UserError("PerPath.rules holds another PerPath; list its rules among the outer ones")

    def _globs(self) -> tuple[str, ...]:
        return tuple(glob for glob, _ in self.rules)

    def _names(self) -> list[str]:
        names: list[str] = []
        for glob in self._globs():
            name = re.sub(r"[^A-Za-z0-9_-]+", ".", glob).strip(".") or "rest"
            taken = sum(name == re.sub(r"~\d+$", "", other) for other in names)
            names.append(f"{name}~{taken + 1}" if taken else name)
        return names

    def _rule_of(self, path: str) -> int:
        index = _first_match(path, self._globs())
        if index is None:
            raise UserError(f"PerPath.rules: no glob matches the parameter {path!r}; add ('**', …) as the last rule")
        return index

    def build(self, specs, steps):
        names = self._names()
        labels = map_tree(lambda path, spec: names[self._rule_of(path)], specs)
        present = set(flatten(labels).values())
        built = zip(names, self.rules, strict=True)
        return optax.partition({name: rule[1].build(specs, steps) for name, rule in built if name in present}, labels)

    def check(self, specs):
        for path in flatten(specs):
            self._rule_of(path)
        _check_globs("PerPath.rules", self._globs(), list(flatten(specs)))
        for index, (_, optimizer) in enumerate(self.rules):
            optimizer.check(select(specs, lambda path, index=index: self._rule_of(path) == index))

    def learning_rates(self, steps):
        rates = {}
        for name, (_, optimizer) in zip(self._names(), self.rules, strict=True):
            for metric, rate in optimizer.learning_rates(steps).items():
                rates[f"{metric}/{name}"] = rate
        return rates


def mup_simple(dim: int, globs: tuple[str, ...], base: int = 768) -> UpdateScale:
    """Update scales that keep a learning rate tuned at width `base` good for wider models: min(base / dim, 1) each.

    Args:
      dim: width of the model.
      globs: the hidden linear weights (attention projections, feed-forward, experts); neither embeddings, norms nor
        the router's gate.
    """
    return tuple((glob, min(base / dim, 1.0)) for glob in globs)
