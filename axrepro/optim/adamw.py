"""AdamW."""

from dataclasses import dataclass

import optax

from axrepro.errors import is_number, require
from axrepro.optim.optimizer import Decay, Single, decay_per_rate, in_float32, require_decay, require_fraction


@dataclass(frozen=True, kw_only=True)
class AdamW(Single):
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

    def __post_init__(self):
        super().__post_init__()
        require_fraction(self, "b1", "b2")
        require(self, "eps", is_number(self.eps) and self.eps > 0, "a number above 0")
        require_decay(self)

    def build(self, specs, steps):
        return in_float32(
            optax.named_chain(
                ("clip", self._clip()),
                ("scale_by_adam", optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype)),
                ("update_scale", self._update_scale(specs)),
                ("decay", self._decay(specs, decay_per_rate(self))),
                ("learning_rate", optax.scale_by_learning_rate(self._rate(steps))),
            )
        )
