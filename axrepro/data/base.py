"""The interfaces of the input: a `Data` config opens `Examples`, and `Batches` hands them out as sharded arrays.

Most sources can look an example up by its number, so they implement `Examples` alone: resuming is then a jump, and any
layout of hosts sees the same batches. A source that can only stream overrides `Data.batches` with `Batches` of its own.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from axrepro.core.sharding import Rules
from axrepro.errors import UserError, require, require_sizes

if TYPE_CHECKING:
    from axrepro.data.workers import Workers

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

    @property
    def bad_records(self) -> Mapping[int, str]:
        """What was wrong with each record that this process has left out so far, by number."""
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


def place(
    load: Callable[[int, int], Mapping[str, np.ndarray]],
    arrays: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
    """A global batch, of which each process makes only the rows that its devices hold.

    Args:
      load: gives the rows from `start` up to `stop` of every array.   arrays: those of the global batch.
    """
    made: dict[tuple[int, int], Mapping[str, np.ndarray]] = {}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(arrays[name].shape[0])
        if (start, stop) not in made:  # all arrays, and all devices that differ only along other axes, share it
            made[start, stop] = load(start, stop)
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

    def counts(self) -> dict[str, int]:
        """What was handed out so far, for reports: examples by source, and records that this process left out."""
        return {}

    def reading(self) -> str:
        """The source that is being read, for a report on one that is slow; another thread may ask."""
        return type(self).__name__

    def close(self) -> None:
        """Releases threads, processes and files. There are no batches afterwards."""


class Cursor(ABC):
    """Goes from batch to batch and knows the rows of each, without a mesh: worker processes have copies of it.

    Attributes:
      arrays: shape and type of each array of a global batch.
    """

    arrays: Mapping[str, jax.ShapeDtypeStruct]

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether there is no batch any more."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Mapping[str, np.ndarray]:
        """The rows from `start` up to `stop` of the current batch."""

    @abstractmethod
    def advance(self) -> None:
        """Goes to the next batch."""

    @abstractmethod
    def position(self) -> dict:
        """As `Batches.position`."""

    @abstractmethod
    def seek(self, position: Mapping) -> None:
        """As `Batches.seek`."""

    @property
    def bad_records(self) -> Mapping[str, str]:
        """What was wrong with each record that was left out so far; the keys tell them apart."""
        return {}

    def stats(self) -> dict[str, int]:
        """As `Batches.stats`."""
        return {}

    def counts(self) -> dict[str, int]:
        """As `Batches.counts`, without the records left out."""
        return {}

    def reading(self) -> str:
        """As `Batches.reading`."""
        return type(self).__name__


class CursorBatches(Batches):
    """The batches of a cursor. Each process makes only the rows that its devices hold."""

    def __init__(self, cursor: Cursor, mesh: Mesh, rules: Rules = Rules(), workers: int = 0):
        """
        Args:
          workers: processes that make rows ahead of time; 0: this one makes them when they are asked for.
        Raises:
          UserError: if the batch does not divide over the mesh.
        """
        self.cursor = cursor
        self._closed = False
        self._shardings = batch_shardings(cursor.arrays, mesh, rules)
        self._workers = _start_workers(cursor, self._shardings, workers) if workers else None

    def __next__(self) -> dict[str, jax.Array]:
        if self._closed:
            raise RuntimeError("these batches were closed")
        if self.cursor.ended:
            raise StopIteration
        load = self.cursor.rows if self._workers is None else self._workers.load()
        batch = place(load, self.cursor.arrays, self._shardings)
        self.cursor.advance()
        return batch

    def position(self) -> dict:
        return self.cursor.position()

    def seek(self, position: Mapping) -> None:
        self.cursor.seek(position)
        if self._workers is not None:
            self._workers.restart(self.cursor)

    def stats(self) -> dict[str, int]:
        return self.cursor.stats()

    def counts(self) -> dict[str, int]:
        bad = self.cursor.bad_records if self._workers is None else self._workers.bad_records
        return self.cursor.counts() | ({"bad_records": len(bad)} if bad else {})

    def reading(self) -> str:
        return self.cursor.reading()

    def close(self) -> None:
        self._closed = True
        if self._workers is not None:
            self._workers.close()


class ExamplesCursor(Cursor):
    """Batches of `Examples`: each takes the next `batch_size` indices.

    The position is the next index, so a run may go on with another batch size, number of hosts or mesh.
    """

    def __init__(self, examples: Examples, batch_size: int, epochs: int | None = None, source: str = ""):
        """
        Args:
          batch_size: examples in a global batch.
          epochs: stop after so many; padding examples fill the last batch. None: go on for ever.
          source: what reports call the examples.
        Raises:
          UserError: if there are no examples.
        """
        if not len(examples):
            raise UserError("the data has no examples, so there are no batches")
        self.examples, self._size, self._source = examples, batch_size, source
        self._end = _FOREVER if epochs is None else epochs * len(examples)
        self._next = 0
        self.arrays = {
            name: jax.ShapeDtypeStruct((batch_size, *empty.shape[1:]), empty.dtype)
            for name, empty in examples.rows(np.zeros(0, np.int64)).items()
        }

    @property
    def ended(self) -> bool:
        return self._next >= self._end

    def rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        indices = np.arange(self._next + start, self._next + stop, dtype=np.int64)
        indices[indices >= self._end] = -1
        return self.examples.rows(indices)

    def advance(self) -> None:
        self._next = min(self._next + self._size, self._end)

    @property
    def bad_records(self) -> Mapping[str, str]:
        return {str(index): reason for index, reason in self.examples.bad_records.items()}

    def stats(self) -> dict[str, int]:
        return self.examples.stats()

    def reading(self) -> str:
        return self._source or type(self.examples).__name__

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


def _start_workers(cursor: Cursor, shardings: Mapping[str, NamedSharding], number: int) -> "Workers":
    from axrepro.data.workers import Workers  # which imports this module

    return Workers(cursor, local_rows(cursor.arrays, shardings), number)


def local_rows(
    arrays: Mapping[str, jax.ShapeDtypeStruct], shardings: Mapping[str, NamedSharding]
) -> list[tuple[int, int]]:
    """The ranges (start, stop) of rows that `place` asks for in this process."""
    return sorted(
        {
            index[0].indices(array.shape[0])[:2]
            for name, array in arrays.items()
            for index in shardings[name].addressable_devices_indices_map(array.shape).values()
            if index is not None
        }
    )


@dataclass(frozen=True, kw_only=True)
class Data(ABC):
    """The config of the input, at `experiment.data`.

    Attributes:
      batch_size: sequences or examples in a global batch, over all hosts.
      workers: processes on each host that make training batches ahead of time; 0: a thread of the run does.
    """

    batch_size: int
    workers: int = 0

    def __post_init__(self):
        require_sizes(self, "batch_size")
        require(self, "workers", self.workers >= 0, "a whole number, 0 or above")

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
        cursor = self.cursor(split, seed)
        return CursorBatches(cursor, mesh, rules, self.workers if split == "train" else 0)

    def cursor(self, split: Split, seed: int) -> Cursor:
        """What `batches` goes through. Raises UserError as `open` does."""
        epochs = 1 if split == "eval" else None
        return ExamplesCursor(self.open(split, seed), self.batch_size, epochs, self.describe())

    def describe(self) -> str:
        """What reports call this data."""
        source = getattr(self, "source", None)
        return f"{type(self).__name__}" + ("" if source is None else f" of {source!r:.200}")
