"""Muon."""

import math
from dataclasses import dataclass

import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from axrepro.core.param import Param
from axrepro.core.tree import flatten, map_tree
from axrepro.errors import UserError, is_number, require
from axrepro.optim.optimizer import (
    Decay,
    Single,
    decay_per_rate,
    in_float32,
    per_layer,
    require_decay,
    require_fraction,
)


def matrix_dims(spec: Param) -> MuonDimensionNumbers | None:
    """Which dimensions of one layer of a parameter are the inputs and which the outputs of a hidden matrix.

    Inputs come first, as layers declare their weights: the last dimension is the output, with the heads before it where
    it is `head_dim`. Of a convolution the whole patch is the input.

    Returns:
      None for what is no hidden matrix: vectors, what is not decayed (norms, biases, gates, routers), what no token is
      multiplied with, and whatever has a `vocab` dimension (embeddings, heads).
    """
    axes = spec.axes[spec.num_stacks :]
    outputs = 2 if len(axes) > 1 and axes[-1] == "head_dim" and axes[-2] in ("heads", "kv_heads") else 1
    inputs = len(axes) - outputs
    if inputs < 1 or not (spec.decay and spec.matmul) or "vocab" in axes:
        return None
    return MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, len(axes))))


@dataclass(frozen=True, kw_only=True)
class Muon(Single):
    """Orthogonalised momentum for hidden matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon),
    AdamW for all other parameters.

    With g, r(t), c, w and the two forms of decay as in `AdamW`, for each matrix of each layer and expert:

      m = momentum m + g,   n = g + momentum m (without nesterov: m),   u = s NewtonSchulz(n)
      coupled:   p ← p - r(t) (c u + w p)

    NewtonSchulz(n), five steps of a quintic iteration, is close to U Vᵀ where n = U S Vᵀ. With `rms`, s = rms
    sqrt(max(inputs, outputs)) gives u the size of an AdamW update, so that its rates and decays fit (Moonlight,
    arXiv:2502.16982, Eq. 4). With rms=None, s = sqrt(max(1, outputs / inputs)) as in Jordan's code; the others then
    want another rate, by `update_scale` or `PerPath`. Departure from that code: the iteration is in float32; on TPUs
    the default matmul precision makes its products bfloat16 all the same. Departure from optax.contrib.muon: no bias
    correction, which the nesterov form would see.

    `matrix_dims` tells the matrices by `Param.axes`. A sharded matrix is gathered or multiplied in parts, as XLA
    chooses; layers and experts stay where they are.

    Attributes:
      learning_rate: schedule of r(t), for all parameters.   momentum, nesterov: of the matrices.
      ns_steps: steps of the iteration.   rms: root mean square of u.
      b1, b2, eps: of Adam, for the other parameters.
      weight_decay, decay, clip, update_scale, moment_dtype: as in `AdamW`; `clip` bounds the norm over all parameters.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    rms: float | None = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Decay = "coupled"
    clip: float | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        require_fraction(self, "momentum", "b1", "b2")
        require(self, "ns_steps", self.ns_steps >= 1, "1 step or more")
        require(self, "rms", self.rms is None or (is_number(self.rms) and self.rms > 0), "a number above 0, or None")
        require(self, "eps", is_number(self.eps) and self.eps > 0, "a number above 0")
        require_decay(self)

    def check(self, specs):
        super().check(specs)
        if all(matrix_dims(spec) is None for spec in flatten(specs).values()):
            raise UserError("Muon.learning_rate: none of its parameters is a hidden matrix; take AdamW for them")

    def _orthogonalize(self, spec: Param) -> optax.GradientTransformation:
        dims = matrix_dims(spec)
        if dims is None:
            return optax.identity()
        shape = spec.shape[spec.num_stacks :]
        # pyrefly: ignore[not-iterable]  # `matrix_dims` gives tuples, where optax takes a number too
        inputs, outputs = (math.prod(shape[dim] for dim in side) for side in dims)
        scale = math.sqrt(max(1, outputs / inputs)) if self.rms is None else self.rms * math.sqrt(max(inputs, outputs))
        # One matrix, without its momentum: optax would flatten the stacks, and experts that are split be gathered.
        newton_schulz = scale_by_muon(ns_steps=self.ns_steps, beta=0.0, nesterov=False, weight_dimension_numbers=dims)
        return optax.chain(newton_schulz, optax.scale(scale))

    def build(self, specs, steps):
        matrix = map_tree(lambda path, spec: matrix_dims(spec) is not None, specs)
        other = map_tree(lambda path, spec: matrix_dims(spec) is None, specs)
        momentum = optax.trace(self.momentum, self.nesterov, accumulator_dtype=self.moment_dtype)
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype)
        return in_float32(
            optax.named_chain(
                ("clip", self._clip()),
                ("momentum", optax.masked(momentum, matrix)),
                ("orthogonalize", per_layer(specs, self._orthogonalize)),
                ("scale_by_adam", optax.masked(adam, other)),
                ("update_scale", self._update_scale(specs)),
                ("decay", self._decay(specs, decay_per_rate(self))),
                ("learning_rate", optax.scale_by_learning_rate(self._rate(steps))),
            )
        )
