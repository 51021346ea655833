"""How documents share rows: the sizes of all documents make a plan of every row of every epoch.

A plan is looked up by row, so that a run resumes anywhere at once; nothing is read to make it.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from axrepro.data.shuffle import permutation
from axrepro.errors import require_sizes

# streams of permutations within a seed and an epoch
_DOCUMENTS, _ROWS = 0, 1


class Segments(NamedTuple):
    """Parts of documents, in the order of their rows and of their places there.

    Attributes:
      row: int64[S], which of the rows asked for, from 0.   document: int64[S], its number.
      begin, size: int64[S], places of the document that the segment holds: `begin` up to `begin + size`.
    """

    row: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    size: np.ndarray


class Plan(ABC):
    """The rows of every epoch, each with the same number of them.

    Attributes:
      rows: rows per epoch.
    """

    rows: int

    @abstractmethod
    def segments(self, epoch: int, rows: Int64[np.ndarray, " N"]) -> Segments:
        """What lies in these rows (0 ... rows - 1) of an epoch."""


class Packing(ABC):
    """A frozen dataclass that makes plans."""

    @abstractmethod
    def plan(self, sizes: Int64[np.ndarray, " D"], length: int, seed: int, shuffle: bool) -> Plan:
        """
        Args:
          sizes: places that each document takes, from 1.   length: places of a row.
          shuffle: whether documents and rows are shuffled, by seed and epoch.
        """


class _TwoEpochs:
    """What was made for the last two epochs: rows of a batch are of one, or of the end of one and the next's start."""

    def __init__(self, make: Callable[[int], tuple]):
        self._make, self._made = make, {}

    def __getitem__(self, epoch: int) -> tuple:
        if epoch not in self._made:
            while len(self._made) > 1:
                self._made.pop(next(iter(self._made)))
            self._made[epoch] = self._make(epoch)
        return self._made[epoch]


def _row_order(number: int, seed: int, epoch: int, shuffle: bool) -> Callable[[np.ndarray], np.ndarray]:
    return permutation(number, seed, epoch, _ROWS) if shuffle else lambda rows: rows


@dataclass(frozen=True)
class Concatenate(Packing):
    """Documents end to end, cut into full rows; only the last row of an epoch has padding.

    Where a row ends within a document, the rest of it is a segment of its own in another row. In every epoch the
    documents are shuffled before they are cut, and the rows after. The order takes 16 bytes per document and epoch.
    """

    def plan(self, sizes, length, seed, shuffle):
        return _Stream(sizes, length, seed, shuffle)


class _Stream(Plan):
    def __init__(self, sizes, length, seed, shuffle):
        self._sizes, self._length, self._seed, self._shuffle = sizes, length, seed, shuffle
        self._total = int(sizes.sum())
        self.rows = -(-self._total // length)
        self._epochs = _TwoEpochs(self._order)

    def _order(self, epoch: int):
        order = np.arange(len(self._sizes))
        if self._shuffle:
            order = permutation(len(order), self._seed, epoch, _DOCUMENTS)(order)
        starts = np.concatenate([[0], np.cumsum(self._sizes[order])])
        return order, starts, _row_order(self.rows, self._seed, epoch, self._shuffle)

    def segments(self, epoch, rows):
        order, starts, shuffled = self._epochs[epoch]
        first = shuffled(rows) * self._length
        last = np.minimum(first + self._length, self._total)
        low = np.searchsorted(starts, first, side="right") - 1
        counts = np.searchsorted(starts, last, side="left") - low
        row = np.repeat(np.arange(len(rows)), counts)
        place = low[row] + np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        begin = np.maximum(starts[place], first[row])
        end = np.minimum(starts[place + 1], last[row])
        return Segments(row, order[place], begin - starts[place], end - begin)


def _pieces(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most `length`: (document, begin, size) of each, in the order of documents."""
    counts = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    begin = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    return document, begin, np.minimum(sizes[document] - begin, length)


@dataclass(frozen=True)
class BestFit(Packing):
    """Whole documents, largest first, each into the fullest row that has room (arXiv:2404.10830, Sec. 2).

    Only documents longer than a row are cut, into full rows and a rest. Which sizes share a row follows from the sizes
    alone, so every epoch has the same number of rows and the same padding; which documents of these sizes, is drawn
    anew in each. A plan takes time by the number of sizes, not of documents.
    """

    def plan(self, sizes, length, seed, shuffle):
        return _BestFit(sizes, length, seed, shuffle)


class _BestFit(Plan):
    def __init__(self, sizes, length, seed, shuffle):
        document, begin, size = _pieces(sizes, length)
        by_size = np.argsort(-size, kind="stable")
        self._document, self._begin, self._size = document[by_size], begin[by_size], size[by_size]
        self._seed, self._shuffle = seed, shuffle
        counts = np.bincount(size, minlength=length + 1)
        groups = _best_fit_groups(counts, length)
        self._ends = np.cumsum([count for count, _ in groups])  # of each group's rows
        self.rows = int(self._ends[-1])
        # the pieces of a size are dealt out to the places for it in the order of the groups
        dealt = np.cumsum(counts[::-1])[::-1] - counts  # where each size starts among the pieces, largest first
        bases, starts = [], [0]
        for count, members in groups:
            for member in members:
                bases.append(dealt[member])
                dealt[member] += count
            starts.append(len(bases))
        self._bases, self._starts = np.array(bases), np.array(starts)
        self._epochs = _TwoEpochs(self._order)

    def _order(self, epoch: int):
        order = np.arange(len(self._size))
        if self._shuffle:
            order = permutation(len(order), self._seed, epoch, _DOCUMENTS)(order)
            order = order[np.argsort(-self._size[order], kind="stable")]
        return order, _row_order(self.rows, self._seed, epoch, self._shuffle)

    def segments(self, epoch, rows):
        order, shuffled = self._epochs[epoch]
        rows = shuffled(rows)
        group = np.searchsorted(self._ends, rows, side="right")
        offset = rows - np.concatenate([[0], self._ends])[group]
        counts = self._starts[group + 1] - self._starts[group]
        row = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        piece = order[self._bases[self._starts[group][row] + number] + offset[row]]
        return Segments(row, self._document[piece], self._begin[piece], self._size[piece])


def _best_fit_groups(counts: np.ndarray, length: int) -> list[tuple[int, tuple[int, ...]]]:
    """Best-fit decreasing on a histogram of sizes: (how many rows, the sizes in each of them).

    Rows with the same contents are handled at once, so that the work does not grow with the number of documents.
    """
    full: list[tuple[int, tuple[int, ...]]] = []
    open_rows: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # by room left
    rooms: list[int] = []  # the keys of open_rows, sorted

    def put(room: int, count: int, members: tuple[int, ...]):
        if not room:
            full.append((count, members))
            return
        if room not in open_rows:
            open_rows[room] = []
            insort(rooms, room)
        open_rows[room].append((count, members))

    for size in range(length, 0, -1):
        left = int(counts[size])
        while left:
            place = bisect_left(rooms, size)
            if new := place == len(rooms):
                room, count, members = length, left, ()
            else:
                room = rooms[place]
                count, members = open_rows[room].pop()
            # a row that has taken one is the fullest with room for the next
            times = room // size
            filled = min(count, left // times)
            used = filled
            if filled:
                put(room - times * size, filled, (*members, *[size] * times))
                left -= filled * times
            if left and filled < count:
                put(room - left * size, 1, (*members, *[size] * left))
                used, left = filled + 1, 0
            if not new:
                if used < count:
                    open_rows[room].append((count - used, members))
                elif not open_rows[room]:
                    del open_rows[room]
                    rooms.remove(room)
    return full + [group for groups in open_rows.values() for group in groups]


@dataclass(frozen=True)
class FirstFit(Packing):
    """Whole documents in shuffled order, each into the first row that has room, as loaders of streams pack.

    Only documents longer than a row are cut. The same documents share a row in every epoch; the order of rows differs.
    A plan takes about ten microseconds per document, and 24 bytes.

    Attributes:
      open_rows: rows that may still take documents; if none has room, the oldest is closed.
    """

    open_rows: int = 64

    def __post_init__(self):
        require_sizes(self, "open_rows")

    def plan(self, sizes, length, seed, shuffle):
        return _FirstFit(sizes, length, seed, shuffle, self.open_rows)


class _FirstFit(Plan):
    def __init__(self, sizes, length, seed, shuffle, open_rows):
        document, begin, size = _pieces(sizes, length)
        if shuffle:
            order = permutation(len(sizes), seed, 0, _DOCUMENTS)(np.arange(len(sizes)))
            rank = np.empty_like(order)
            rank[order] = np.arange(len(order))
            by_document = np.argsort(rank[document], kind="stable")
            document, begin, size = document[by_document], begin[by_document], size[by_document]
        row = _first_fit(size, length, open_rows)
        by_row = np.argsort(row, kind="stable")
        self._document, self._begin, self._size = document[by_row], begin[by_row], size[by_row]
        self.rows = int(row.max()) + 1
        self._starts = np.searchsorted(row[by_row], np.arange(self.rows + 1))
        self._seed, self._shuffle = seed, shuffle

    def segments(self, epoch, rows):
        rows = _row_order(self.rows, self._seed, epoch, self._shuffle)(rows)
        counts = self._starts[rows + 1] - self._starts[rows]
        row = np.repeat(np.arange(len(rows)), counts)
        piece = self._starts[rows][row] + np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return Segments(row, self._document[piece], self._begin[piece], self._size[piece])


def _first_fit(sizes: np.ndarray, length: int, open_rows: int) -> np.ndarray:
    """The row of each piece."""
    room = np.zeros(open_rows, np.int64)  # of the open rows, the oldest first
    number = np.full(open_rows, -1)  # their rows; -1: none yet
    out, rows = np.empty(len(sizes), np.int64), 0
    for i, size in enumerate(sizes.tolist()):
        place = int(np.argmax(room >= size))
        if room[place] < size:
            room[:-1], number[:-1] = room[1:], number[1:]
            place = open_rows - 1
            room[place], number[place] = length, rows
            rows += 1
        room[place] -= size
        out[i] = number[place]
    return out
