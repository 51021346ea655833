"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the rules that stretch it to longer contexts."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from axrepro.errors import UserError, is_number, require, require_positive, require_sizes


class RopeScaling(ABC):
    """How the rotation frequencies change for contexts longer than the model was first trained on."""

    @abstractmethod
    def frequencies(self, frequencies: np.ndarray, base: float, dim: int) -> np.ndarray:
        """New rotation frequencies, in radians per position, from those of plain RoPE; both [dim / 2]."""

    def amplitude(self) -> float:
        """Factor on the rotated queries and keys."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Position interpolation: positions are divided by `factor` (arXiv:2306.15595, Eq. 4)."""

    factor: float

    def __post_init__(self):
        require_positive(self, "factor")

    def frequencies(self, frequencies, base, dim):
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend in between (arXiv:2407.21783).

    Attributes:
      low_frequency_factor, high_frequency_factor: the blend lies at `original_length` / wavelength between these.
      original_length: context of the first training, in tokens.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        require_positive(self, "factor", "low_frequency_factor", "high_frequency_factor")
        require_sizes(self, "original_length")
        low, high = self.low_frequency_factor, self.high_frequency_factor
        require(self, "high_frequency_factor", high > low, f"a number above low_frequency_factor={low}")

    def frequencies(self, frequencies, base, dim):
        turns = self.original_length * frequencies / (2 * math.pi)  # rotations within the original context
        low, high = self.low_frequency_factor, self.high_frequency_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling):
    """YaRN (arXiv:2309.00071, Sec. 3): interpolation by parts, with softer attention.

    Attributes:
      beta_fast, beta_slow: a dimension with more rotations than the first within `original_length` is kept, with fewer
        than the second interpolated.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        require_positive(self, "factor", "beta_fast", "beta_slow")
        require_sizes(self, "original_length")
        require(self, "beta_fast", self.beta_fast > self.beta_slow, f"a number above beta_slow={self.beta_slow}")

    def frequencies(self, frequencies, base, dim):
        def dimension(turns):  # where plain RoPE makes this many rotations in the original context
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return frequencies * ((1 - ramp) + ramp / self.factor)

    def amplitude(self):
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class RoPE:
    """Rotates pairs of query and key dimensions by position. Dimension i is paired with i + K/2.

    Attributes:
      base: wavelength of the slowest pair is 2 pi base, in tokens.
      fraction: share of the head dim that is rotated, from the front.
      scaling: None for plain RoPE.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: RopeScaling | None = None

    def __post_init__(self):
        require(self, "base", is_number(self.base) and self.base > 1, "a number above 1")
        require(self, "fraction", is_number(self.fraction) and 0 < self.fraction <= 1, "a number in (0, 1]")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each pair, float64[rotated / 2]."""
        dim = int(head_dim * self.fraction)
        if dim % 2 or dim < 2:
            raise UserError(f"RoPE rotates pairs: head_dim {head_dim} × fraction {self.fraction} must be even")
        plain = self.base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        return plain if self.scaling is None else self.scaling.frequencies(plain, self.base, dim)

    def rotate(self, x: Float[Array, "B T H K"], positions: Int[Array, "B T"]) -> Float[Array, "B T H K"]:
        """`x` rotated by its positions; angles in float32, result in the dtype of `x`."""
        frequencies = jnp.asarray(self.frequencies(x.shape[-1]), jnp.float32)
        angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude()
        cos, sin = jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude
        half = frequencies.shape[0]
        first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin, rest)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
