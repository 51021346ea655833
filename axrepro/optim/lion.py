"""Lion."""

from dataclasses import dataclass

import optax

from axrepro.optim.optimizer import Decay, Single, decay_per_rate, in_float32, require_decay, require_fraction


@dataclass(frozen=True, kw_only=True)
class Lion(Single):
    """The sign of a momentum (arXiv:2302.06675, Algorithm 2): one moment, and updates of one size.

      u = sign(b1 m + (1 - b1) g),   m = b2 m + (1 - b2) g,   p ← p - r(t) (c u + w p)

    with g, r(t), c, w and the decoupled form as in `AdamW`. The paper takes rates 3 to 10 times smaller than AdamW's,
    and coupled decays as much larger (Section 5).

    Attributes:
      learning_rate: schedule of r(t).   b1, b2: weights of the momentum in the update, and in itself.
      weight_decay, decay, clip, update_scale, moment_dtype: as in `AdamW`.
    """

    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 1.0
    decay: Decay = "coupled"
    clip: float | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        require_fraction(self, "b1", "b2")
        require_decay(self)

    def build(self, specs, steps):
        return in_float32(
            optax.named_chain(
                ("clip", self._clip()),
                ("scale_by_lion", optax.scale_by_lion(self.b1, self.b2, self.moment_dtype)),
                ("update_scale", self._update_scale(specs)),
                ("decay", self._decay(specs, decay_per_rate(self))),
                ("learning_rate", optax.scale_by_learning_rate(self._rate(steps))),
            )
        )
