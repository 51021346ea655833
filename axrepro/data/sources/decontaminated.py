"""Held-out records that training records do not give away."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from axrepro.data.base import Split
from axrepro.data.records import BadRecord, Example, Records, Source
from axrepro.errors import UserError

_LONG_LINE = 40  # bytes; shorter lines stand in files that have nothing else in common
_SHARED_LINES = 5


def given_away(held_out: Sequence[bytes], train: Iterable[bytes]) -> list[int]:
    """The numbers of held-out texts that training texts give away.

    A whole text, if it is not blank, is a training text too; or at least half of its different lines of 40 bytes or
    more, and at least five, stand in training texts, white space at the ends aside. The training texts are read one
    after the other; only what they share with the held-out ones is kept.
    """
    lines = [_long_lines(text) for text in held_out]
    wanted, whole = set().union(*lines), set(held_out)
    seen_lines: set[bytes] = set()
    seen_whole: set[bytes] = set()
    for text in train:
        seen_whole |= {text} & whole
        seen_lines |= _long_lines(text) & wanted
    shared = [len(own & seen_lines) for own in lines]
    found = []
    for number, (text, own) in enumerate(zip(held_out, lines, strict=True)):
        if (text.strip() and text in seen_whole) or (
            shared[number] >= _SHARED_LINES and 2 * shared[number] >= len(own)
        ):
            found.append(number)
    return found


def _long_lines(text: bytes) -> set[bytes]:
    return {line for line in map(bytes.strip, text.split(b"\n")) if len(line) >= _LONG_LINE}


def raw_text(record: Example, field: str, name: str) -> bytes:
    """The text of a record in bytes. Raises BadRecord, which names it, if it has none."""
    if not isinstance(record.get(field), (bytes, str)):
        raise BadRecord(f"{name} holds {', '.join(record)}, and no text as {field!r}")
    text = record[field]
    return text.encode(errors="replace") if isinstance(text, str) else text


@dataclass(frozen=True, kw_only=True)
class Decontaminated(Source):
    """A source without the held-out records that its training records give away, see `given_away`.

    They are in neither split. To find them, both splits are read whole when the held-out one is opened: 1.1 s for the
    30 MB of the standard library.

    Attributes:
      field: of the text in a record.
    """

    source: Source
    field: str = "text"

    def open(self, split: Split) -> Records:
        records = self.source.open(split)
        if split == "train":
            return records
        bad = _bad(self)
        kept = [index for index in range(len(records)) if index not in bad]
        if not kept:
            raise UserError(f"all {len(records)} held-out records of {self.source} also stand in its training records")
        return _Some(records, kept)


@functools.lru_cache(maxsize=4)  # a run opens its held-out split several times
def _bad(config: Decontaminated) -> frozenset[int]:
    """Numbers of the held-out records to leave out; one that cannot be read is none of them."""

    def texts(records: Records) -> Iterator[bytes]:
        for index in range(len(records)):
            try:
                yield raw_text(records[index], config.field, records.name(index))
            except BadRecord:
                yield b""  # told and counted where the split is read

    return frozenset(given_away(list(texts(config.source.open("eval"))), texts(config.source.open("train"))))


class _Some(Records):
    """Some of other records."""

    def __init__(self, records: Records, kept: list[int]):
        self._records, self._kept = records, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        return self._records[self._kept[index]]

    def name(self, index: int) -> str:
        return self._records.name(self._kept[index])

    @property
    def sizes(self) -> np.ndarray | None:
        sizes = self._records.sizes
        return None if sizes is None else sizes[self._kept]

    @property
    def vocabulary(self) -> tuple[str, str] | None:
        return self._records.vocabulary
