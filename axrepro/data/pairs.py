"""Transforms that make one example of two."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from axrepro.data.fields import take
from axrepro.data.records import Example
from axrepro.errors import is_number, require, require_positive


@dataclass(frozen=True, kw_only=True)
class PairTransform(ABC):
    """Takes its place in a chain of transforms; what comes before it makes the second example too.

    Attributes:
      probability: how often two examples are mixed. Otherwise the first passes unchanged.
    """

    probability: float = 1.0

    def __post_init__(self):
        require(self, "probability", is_number(self.probability) and 0 <= self.probability <= 1, "a number in [0, 1]")

    @abstractmethod
    def mix(self, example: Example, other: Example, rng: np.random.Generator) -> Example:
        """The example made of both, with the fields that are not mixed from the first. Neither is changed.

        Raises:
          ValueError: if their fields do not go together.
        """


@dataclass(frozen=True, kw_only=True)
class Mixup(PairTransform):
    """weight * first + (1 - weight) * second, of inputs and labels alike, weight ~ Beta(alpha, alpha).

    Mixup (arXiv:1710.09412), Eq. 2. Departure: the authors' code draws one weight for a batch, and this one for each
    example, as the paper's text has it.

    Attributes:
      alpha: 0.1 to 0.4 in the paper for ImageNet, 1 for CIFAR.
      fields: those that are mixed, all float arrays; `OneHot` makes one of a label.
    """

    alpha: float = 0.2
    fields: tuple[str, ...] = ("image", "label")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "alpha")
        require(self, "fields", bool(self.fields), "the name of at least one field")

    def mix(self, example: Example, other: Example, rng: np.random.Generator) -> Example:
        weight = np.float32(rng.beta(self.alpha, self.alpha))
        return {**example, **{name: self._mixed(name, example, other, weight) for name in self.fields}}

    def _mixed(self, name: str, example: Example, other: Example, weight: np.float32) -> np.ndarray:
        first, second = _floats(example, name), _floats(other, name)
        if first.shape != second.shape:
            raise ValueError(f"Mixup needs equal shapes, and the field {name!r} has {first.shape} and {second.shape}")
        mixed = first - second
        mixed *= weight
        mixed += second
        return mixed


def _floats(example: Example, name: str) -> np.ndarray:
    value = take(example, name)
    if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.floating):
        held = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(
            f"Mixup needs float arrays, and the field {name!r} is {held}; "
            "put NormaliseImage (of images) and OneHot (of labels) before it"
        )
    return value
