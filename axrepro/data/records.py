"""What sources of every kind have in common: records, looked up by number.

A `Source` is config: which files, and which of their records are held out. It opens `Records`. What is made of them,
tokens or pictures, is the affair of transforms.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
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
    """


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
    def blocks(self) -> np.ndarray | None:
        """int64[G + 1], the records from `blocks[g]` to `blocks[g + 1]` are read at once; None: each by itself."""
        return None

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class Source(ABC):
    """A frozen dataclass that opens records."""

    @abstractmethod
    def open(self, split: Split) -> Records:
        """The records of a split, at least one.

        Raises:
          UserError: naming the pattern or file, if it is missing, unreadable or malformed, or a split is empty.
        """
