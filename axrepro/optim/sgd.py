"""Stochastic gradient descent, plain and with layer-wise rates."""

from dataclasses import dataclass

import optax

from axrepro.errors import is_number, require
from axrepro.optim.optimizer import Single, in_float32, per_layer, require_fraction


@dataclass(frozen=True, kw_only=True)
class SGD(Single):
    """Stochastic gradient descent with momentum, in torch's form: weight decay is a part of the gradient.

      g ← g + w p,   m = momentum m + g,   u = m (nesterov: g + momentum m),   p ← p - r(t) c u

    Attributes:
      learning_rate: schedule of r(t).   momentum: None keeps no state.   nesterov: look one step of momentum ahead.
      weight_decay: w, for decayed parameters.   clip: largest global norm of g, before the decay is added.
      update_scale: (glob, factor c); it multiplies the whole step.   moment_dtype: how m is stored.
    """

    momentum: float | None = 0.9
    nesterov: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.momentum is not None:
            require_fraction(self, "momentum")
        require(self, "nesterov", not (self.nesterov and self.momentum is None), "False where momentum is None")

    def build(self, specs, steps):
        momentum = optax.identity()
        if self.momentum is not None:
            momentum = optax.trace(self.momentum, self.nesterov, accumulator_dtype=self.moment_dtype)
        return in_float32(
            optax.named_chain(
                ("clip", self._clip()),
                ("decay", self._decay(specs, self.weight_decay)),
                ("momentum", momentum),
                ("update_scale", self._update_scale(specs)),
                ("learning_rate", optax.scale_by_learning_rate(self._rate(steps))),
            )
        )


@dataclass(frozen=True, kw_only=True)
class LARS(Single):
    """Layer-wise adaptive rates for large batches (arXiv:1708.03888, Algorithm 1), as optax has it.

      g ← g + w p,   g ← trust |p| / |g| g,   m = momentum m + r(t) g,   p ← p - c m   (nesterov: r(t) g + momentum m)

    with the norms of one layer, or one expert. Parameters that are not decayed (norms, biases) keep their g, and so
    does a layer where |p| or |g| is 0. Departure from the paper, with optax: |g + w p| stands for |g| + w |p|.

    Attributes:
      learning_rate: schedule of r(t).   trust: the trust coefficient.   momentum, nesterov: of the steps.
      weight_decay: w.   clip: largest global norm of g, before the decay is added.
      update_scale: (glob, factor c); it multiplies the whole step.   moment_dtype: how m is stored.
    """

    trust: float = 0.001
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(self, "trust", is_number(self.trust) and self.trust > 0, "a number above 0")
        require_fraction(self, "momentum")

    def build(self, specs, steps):
        trust_ratio = optax.scale_by_trust_ratio(trust_coefficient=self.trust)
        return in_float32(
            optax.named_chain(
                ("clip", self._clip()),
                ("decay", self._decay(specs, self.weight_decay)),
                ("trust_ratio", per_layer(specs, lambda spec: trust_ratio if spec.decay else optax.identity())),
                ("learning_rate", optax.scale_by_learning_rate(self._rate(steps), flip_sign=False)),
                ("momentum", optax.trace(self.momentum, self.nesterov, accumulator_dtype=self.moment_dtype)),
                ("update_scale", self._update_scale(specs)),
                ("sign", optax.scale(-1.0)),
            )
        )
