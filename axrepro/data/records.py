"""What sources of every kind have in common: records, looked up by number.

A `Source` is config: which files, and which of their records are held out. It opens `Records`. What is made of them,
tokens or pictures, is the affair of transforms.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from axrepro.data.base import Split
from axrepro.errors import UserError

Example = dict[str, Any]
# A frozen dataclass or a function that turns one example into the next, and may draw from the generator: it is seeded
# by the run, the epoch and the example alone, so an example is the same on every host and after every restart. It does
# not change its argument. What it cannot use it refuses with a ValueError (UserError is one).
Transform = Callable[[Example, np.random.Generator], Example]


class BadRecord(UserError):
    """One record that cannot be used. The message names its file and its place there.

    It ends the run, or is counted and left out where the experiment allows it (`max_bad_records`).

    Attributes:
      index: its number, where the example that needed it is made of another one too.
    """

    index: int | None = None


class Records(ABC):
    """One split of a source, in an order of its own that is the same on every host.

    Lookups may come from several threads, and `Records` travel to worker processes by pickle (a file is opened anew
    there).
    """

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """The record, by field: text is bytes or str, pictures and sound are undecoded bytes or arrays.

        Raises:
          BadRecord: if it is corrupt, truncated or has another schema.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What an error says of it: its file, and its line or number there."""

    @property
    def sizes(self) -> np.ndarray | None:
        """int64[N], the length of each record's "tokens", where it is known without reading them."""
        return None

    @property
    def vocabulary(self) -> tuple[str, str] | None:
        """Name and fingerprint of the vocabulary that made the "tokens", where it is known."""
        return None

    @property
    def blocks(self) -> np.ndarray | None:
        """int64[G + 1], the records from `blocks[g]` to `blocks[g + 1]` are read at once; None: each by itself."""
        return None

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def apply_transforms(transforms: Sequence[Transform], example: Example, rng: np.random.Generator, name: str) -> Example:
    """The transforms one after the other.

    Raises:
      BadRecord: naming the example, if one refuses it.
    """
    try:
        for transform in transforms:
            example = transform(example, rng)
    except BadRecord:
        raise
    except ValueError as error:
        raise BadRecord(f"{name}: {error}") from None
    return example


class Faults:
    """The bad records of a split: told by name, counted, and an error once there are too many."""

    def __init__(self, limit: int):
        """
        Args:
          limit: how many a process may leave out; 0: the first one is an error.
        """
        self._limit = limit
        self._lock = threading.Lock()
        self.seen: dict[int, str] = {}

    def __getstate__(self):
        return {"_limit": self._limit, "seen": self.seen}

    def __setstate__(self, state):
        self.__init__(state["_limit"])
        self.seen = dict(state["seen"])

    def add(self, index: int, error: BadRecord) -> None:
        """Counts a record that is left out, each only once.

        Raises:
          BadRecord: if none may be left out.
          UserError: if there are more than may be.
        """
        with self._lock:
            if index in self.seen:
                return
            if not self._limit:
                raise error
            number = len(self.seen) + 1
            if number > self._limit:
                raise UserError(f"{number} bad records, and max_bad_records={self._limit}; the last: {error}")
            self.seen[index] = str(error)
        logging.warning("left out (%d of at most %d): %s", len(self.seen), self._limit, error)


class Source(ABC):
    """A frozen dataclass that opens records."""

    @abstractmethod
    def open(self, split: Split) -> Records:
        """The records of a split, at least one.

        Raises:
          UserError: naming the pattern or file, if it is missing, unreadable or malformed, or a split is empty.
        """
