"""Adafactor."""

from dataclasses import dataclass

import optax

from axrepro.errors import is_number, require
from axrepro.optim.optimizer import (
    Decay,
    Single,
    decay_per_rate,
    in_float32,
    per_layer,
    require_decay,
    require_fraction,
)


@dataclass(frozen=True, kw_only=True)
class Adafactor(Single):
    """Adafactor (arXiv:1804.04235) in optax's order of steps, where momentum averages updates times learning rate.

    Second moments of a tensor with two dimensions of `min_dim_size_to_factor` or more are kept as two means, over the
    largest and over the second (of a stack with more layers than its matrices are wide, that would be the layers).

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

    def __post_init__(self):
        super().__post_init__()
        require(self, "min_dim_size_to_factor", self.min_dim_size_to_factor >= 1, "a size of 1 or above")
        require_fraction(self, "decay_rate", *["momentum"] * (self.momentum is not None))
        require(self, "eps", is_number(self.eps) and self.eps > 0, "a number above 0")
        threshold = self.clipping_threshold
        allowed = threshold is None or (is_number(threshold) and threshold >= 1)
        require(self, "clipping_threshold", allowed, "a number of 1 or above, or None")
        require_decay(self)

    def build(self, specs, steps):
        rate, decay = self._rate(steps), decay_per_rate(self)
        moments = optax.scale_by_factored_rms(
            decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_size_to_factor, epsilon=self.eps
        )
        block_clip = param_scale = momentum = optax.identity()
        if self.clipping_threshold is not None:
            block_clip = per_layer(specs, lambda spec: optax.clip_by_block_rms(self.clipping_threshold))
        if self.multiply_by_parameter_scale:
            param_scale = per_layer(specs, lambda spec: optax.scale_by_param_block_rms())
        if self.momentum is not None:
            momentum = optax.ema(self.momentum, debias=False, accumulator_dtype=self.moment_dtype)
        return in_float32(
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
