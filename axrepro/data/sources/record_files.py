"""What sources over files of numbered records have in common: which files, and which of their records are held out."""

import os
import re
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from axrepro.data.base import Split
from axrepro.data.records import Example, Records
from axrepro.data.shuffle import _mix
from axrepro.data.sources.files import Files
from axrepro.errors import UserError

_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<suffix>\.\w+)?")


def shard_path(prefix: str, number: int, count: int, suffix: str) -> str:
    """The name of shard `number` of `count`: PREFIX-00003-of-00008.array_record."""
    return f"{prefix}-{number:05d}-of-{count:05d}{suffix}"


def shard_of(path: str) -> tuple[str, int, int, str] | None:
    """(prefix, number, count, suffix) of a shard's name; None if the name is not one of a shard."""
    if (found := _SHARD.fullmatch(path)) is None:
        return None
    return found["prefix"], int(found["number"]), int(found["count"]), found["suffix"] or ""


def require_all_shards(paths: Sequence[str]) -> None:
    """Raises UserError if a file is one of several shards of which another is missing beside it."""
    for prefix, count, suffix in sorted({(s[0], s[2], s[3]) for s in map(shard_of, paths) if s is not None}):
        missing = [n for n in range(count) if not os.path.exists(shard_path(prefix, n, count, suffix))]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"of the {count} shards of {prefix} {shard_path(prefix, missing[0], count, suffix)}{more} "
                "is missing; copy or write all of them"
            )


class FileRecords(Records):
    """Records of several files, end to end in the order of the files, less those of the other split.

    A record is held out by a hash of its file's path below the pattern's first wildcard and of its number there. The
    numbers of those held out lie in memory, 8 bytes each, and no other list does.
    """

    def __init__(self, files: dict[str, str], counts: Sequence[int], split: Split, holdout: int):
        """
        Args:
          files: path of each file, and its path below the first wildcard.
          counts: the records in each.
          holdout: about one record in so many is in the eval split; 0: `split` says nothing, and all records are taken.
        """
        self.paths = tuple(files)
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)
        self._held = np.zeros(0, np.int64)  # the numbers of the records held out, sorted
        if holdout:
            held = [
                start + np.flatnonzero(_held_out(key, count, holdout))
                for key, start, count in zip(files.values(), self._starts[:-1].tolist(), counts, strict=True)
            ]
            self._held = np.concatenate(held) if held else self._held
        self.total = int(self._starts[-1])  # records of both splits
        self._takes_held = bool(holdout) and split == "eval"
        self._gaps = self._held - np.arange(len(self._held))  # those not held out before each that is

    def __len__(self) -> int:
        return len(self._held) if self._takes_held else self.total - len(self._held)

    def place(self, index: int) -> tuple[int, int]:
        """The number of the record's file, and the record's number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        if self._takes_held:
            whole = int(self._held[index])
        else:
            whole = int(index) + (int(self._gaps.searchsorted(index, "right")) if len(self._gaps) else 0)
        file = int(self._starts.searchsorted(whole, "right")) - 1
        return file, whole - int(self._starts[file])

    def taken(self, values: np.ndarray) -> np.ndarray:
        """Of a value per record of all files those of this split."""
        return values[self._held] if self._takes_held else np.delete(values, self._held)

    def before(self, bounds: np.ndarray) -> np.ndarray:
        """How many records of this split come before each of these places among the records of all files."""
        held = self._held.searchsorted(bounds)
        return held if self._takes_held else bounds - held

    def __getitem__(self, index: int) -> Example:
        return self._read(*self.place(index))

    def name(self, index: int) -> str:
        return self._name(*self.place(index))

    def _name(self, file: int, number: int) -> str:
        return f"{self.paths[file]} (record {number})"

    @abstractmethod
    def _read(self, file: int, number: int) -> Example:
        """The record of that number, from 0, in the file of that number."""


def _held_out(key: str, count: int, holdout: int) -> np.ndarray:
    """bool[count]: whether each record of a file is held out."""
    salt = np.uint64(zlib.crc32(key.encode()) << 32)
    return _mix(np.arange(count, dtype=np.uint64) + salt) % np.uint64(holdout) == 0


@dataclass(frozen=True)
class RecordFiles(Files):
    """Files of numbered records; see `Files` for the fields. Of files named as shards all must be there.

    Departure from other `Files`: the hash that holds a record out is not crc32 but one of all numbers at once, since
    there may be 10⁹ records.
    """

    _remedy = "give eval_pattern (files to evaluate on), or change the holdout (0: no eval split)"

    def open(self, split: Split) -> FileRecords:
        files, holdout = self.files(split)
        require_all_shards(list(files))
        records = self._open(files, split, holdout)
        counts: dict[Split, int] = {"train": 0, "eval": 0}
        if holdout:
            counts["eval" if split == "train" else "train"] = records.total - len(records)
        counts[split if holdout or self.eval_pattern is not None else "train"] = len(records)
        self.check(counts, split, holdout)
        return records

    @abstractmethod
    def _open(self, files: dict[str, str], split: Split, holdout: int) -> FileRecords:
        """The records of these files, see `FileRecords`."""
