"""Transforms of one field, whatever it holds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from axrepro.data.records import Example
from axrepro.errors import nearest, require, require_sizes


def take(example: Example, field: str) -> Any:
    """What a field holds. Raises ValueError if there is none."""
    if field not in example:
        raise ValueError(f"the example has no field {field!r}; {nearest(field, example)}")
    return example[field]


@dataclass(frozen=True, kw_only=True)
class FieldTransform(ABC):
    """A transform that puts a new value in place of a field's.

    Attributes:
      field: which one.
    """

    field: str

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return {**example, self.field: self.apply(take(example, self.field), rng)}

    @abstractmethod
    def apply(self, value: Any, rng: np.random.Generator) -> Any:
        """The new value; `value` stays as it is.

        Raises:
          ValueError: if it cannot be used.
        """


@dataclass(frozen=True, kw_only=True)
class OneHot(FieldTransform):
    """A class number to float32[num_classes], 1 at its place; what `Mixup` needs of labels.

    Attributes:
      smoothing: this much of the 1 is spread evenly over all classes (arXiv:1512.00567, Sec. 7).
    """

    num_classes: int
    smoothing: float = 0.0
    field: str = "label"

    def __post_init__(self):
        require_sizes(self, "num_classes")
        require(self, "smoothing", 0 <= self.smoothing < 1, "a share of 0 or more and less than 1")

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        if not isinstance(value, (int, np.integer)) or not 0 <= value < self.num_classes:
            raise ValueError(f"the field {self.field!r} is {value!r:.40}, not a class from 0 to {self.num_classes - 1}")
        out = np.full(self.num_classes, self.smoothing / self.num_classes, np.float32)
        out[value] += 1 - self.smoothing
        return out
