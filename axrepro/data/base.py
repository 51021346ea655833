"""The interfaces of the input: a `Data` config opens `Examples`, and `Batches` hands them out as sharded arrays.

Most sources can look an example up by its number, so they implement `Examples` alone: resuming is then a jump, and any
layout of hosts sees the same batches. A source that can only stream overrides `Data.batches` with `Batches` of its own.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from axrepro.core.sharding import Rules
from axrepro.errors import UserError, require_sizes

Split = Literal["train", "eval"]
_FOREVER = 2**62  # an index that no run reaches, and to which a batch can be added in int64


class Examples(ABC):
    """One split, looked up by number: a pure function of config, split, seed and index.

    Examples are numbered 0, 1, 2 ... over all epochs without end: index `i` lies in epoch `i // len(self)`. The order
    within an epoch is the class's own affair. The eval split is in its natural order, the same every time.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Examples per epoch."""

    @abstractmethod
    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of int64[N] global indices, stacked on axis 0.

        Index -1 is a padding example, which must count for nothing (for text: `segment_ids` 0). No index at all gives
        arrays with 0 rows of the right type.
        """

    def stats(self) -> dict[str, int]:
        """Sizes of the split, for reports: `documents`, `tokens` (targets per epoch), `bytes` (raw), as they apply."""
        return {}


def logical_axes(array: jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
    """The logical axes of an array of a batch: int32 and bool arrays of rank 2 or more hold one value per token."""
    per_token = len(array.shape) > 1 and array.dtype in (np.int32, np.bool_)
    return ("batch", "seq" if per_token else None, *[None] * len(array.shape))[: len(array.shape)]


def batch_shardings(
    arrays: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, rules: Rules = Rules()
) -> dict[str, NamedSharding]:
    """How each array of a global batch lies on the mesh.

    Raises:
      UserError: if the batch does not divide over the mesh.
    """
    sizes = dict(mesh.shape)
    return {
        name: NamedSharding(mesh, rules.spec(logical_axes(array), array.shape, sizes)) for name, array in arrays.items()
    }


def make_batch(
    arrays: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
    rows: Callable[[int, int], Mapping[str, np.ndarray]],
) -> dict[str, jax.Array]:
    """A global batch, of which this process makes the rows that its devices hold.

    Args:
      rows: gives all arrays of the global rows `start` to `stop`. It is called once for each range.
    """
    made: dict[tuple[int, int], Mapping[str, np.ndarray]] = {}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(arrays[name].shape[0])
        if (start, stop) not in made:  # all arrays, and all devices that differ only along other axes, share it
            made[start, stop] = rows(start, stop)
        return made[start, stop][name][(slice(None), *index[1:])]

    return {
        name: jax.make_array_from_callback(array.shape, shardings[name], partial(part, name), array.dtype)
        for name, array in arrays.items()
    }


class Batches(ABC):
    """An iterator of global batches, `dict[str, jax.Array]`, that knows where it stands."""

    def __iter__(self) -> "Batches":
        return self

    @abstractmethod
    def __next__(self) -> dict[str, jax.Array]:
        """The next batch, sharded over the mesh."""

    @abstractmethod
    def position(self) -> dict:
        """Where the next batch starts, as JSON values; a checkpoint holds it."""

    @abstractmethod
    def seek(self, position: Mapping) -> None:
        """Continues from what `position` returned, in this process or an earlier one.

        Raises:
          UserError: if it is not such a position.
        """

    def stats(self) -> dict[str, int]:
        """The `stats` of the examples in it, where it has any."""
        return {}

    def close(self) -> None:
        """Releases threads and files. There are no batches afterwards."""


class IndexedBatches(Batches):
    """Batches of `Examples`: a batch takes the next `batch_size` indices.

    Each process makes only the rows that its devices hold. The position is the next index, so a run may go on with
    another batch size, number of hosts or mesh.
    """

    def __init__(
        self, examples: Examples, batch_size: int, mesh: Mesh, rules: Rules = Rules(), epochs: int | None = None
    ):
        """
        Args:
          batch_size: examples in a global batch.
          epochs: stop after so many; padding examples fill the last batch. None: go on for ever.
        Raises:
          UserError: if there are no examples, or the batch does not divide over the mesh.
        """
        if not len(examples):
            raise UserError("the data has no examples, so there are no batches")
        self.examples = examples
        self._size = batch_size
        self._end = _FOREVER if epochs is None else epochs * len(examples)
        self._next = 0
        self._arrays = {
            name: jax.ShapeDtypeStruct((batch_size, *empty.shape[1:]), empty.dtype)
            for name, empty in examples.rows(np.zeros(0, np.int64)).items()
        }
        self._shardings = batch_shardings(self._arrays, mesh, rules)

    def __next__(self) -> dict[str, jax.Array]:
        if self._next >= self._end:
            raise StopIteration
        indices = np.arange(self._next, self._next + self._size, dtype=np.int64)
        indices[indices >= self._end] = -1
        batch = make_batch(self._arrays, self._shardings, lambda start, stop: self.examples.rows(indices[start:stop]))
        self._next = min(self._next + self._size, self._end)
        return batch

    def stats(self) -> dict[str, int]:
        return self.examples.stats()

    def position(self) -> dict:
        return {"next_example": self._next}

    def seek(self, position: Mapping) -> None:
        try:
            (name, value), *more = position.items()
            index = operator.index(value)
        except (AttributeError, TypeError, ValueError):
            name, value, index, more = None, None, -1, []
        if name != "next_example" or more or not 0 <= index <= self._end or isinstance(value, bool):
            raise UserError(f'{position!r} is no data position; it is {{"next_example": N}} with N of 0 or more')
        self._next = index


@dataclass(frozen=True, kw_only=True)
class Data(ABC):
    """The config of the input, at `experiment.data`.

    Attributes:
      batch_size: sequences or examples in a global batch, over all hosts.
    """

    batch_size: int

    def __post_init__(self):
        require_sizes(self, "batch_size")

    @abstractmethod
    def open(self, split: Split, seed: int) -> Examples:
        """The examples of a split; the seed orders the train split.

        Raises:
          UserError: naming the file, if one is missing, unreadable or malformed.
        """

    @abstractmethod
    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of each array of a global batch, without reading any data."""

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """Number of ids that the data can produce; None where it has no tokens. Reads no data."""

    def batches(self, split: Split, seed: int, mesh: Mesh, rules: Rules = Rules()) -> Batches:
        """Batches of a split: train without end, eval once through.

        Raises:
          UserError: as `open` does, and if the batch does not divide over the mesh.
        """
        epochs = 1 if split == "eval" else None
        return IndexedBatches(self.open(split, seed), self.batch_size, mesh, rules, epochs)
