"""Plain files: which records they hold, and which of those are held out."""

import glob
import gzip
import itertools
import json
import mmap
import os
import sysconfig
import threading
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from axrepro.data.base import Split
from axrepro.data.records import BadRecord, Example, Records, Source
from axrepro.errors import UserError, require

HOLDOUT = "N of 2 or more, which holds out about one record in N, or 0: none"
_OPEN_FILES = 256  # at once; a process may have about a thousand
_SCAN = 1 << 24  # bytes looked through at once


def held_out(key: str, holdout: int) -> bool:
    """Whether the record with this key, which names no folder of one machine, is in the eval split."""
    return bool(holdout) and zlib.crc32(key.encode(errors="surrogateescape")) % holdout == 0


def check_split(counts: dict[Split, int], split: Split, holdout: int, what: str, remedy: str) -> None:
    """Raises UserError if the split is empty, or the other one is though records were to be held out."""
    total = sum(counts.values())
    if not total:
        raise UserError(f"{what} has no documents")
    if not counts[split] or (holdout and not all(counts.values())):
        empty = "eval" if not counts["eval"] else "train"
        count = f"{total} document{'s' if total > 1 else ''}"
        raise UserError(f"{what} has {count}, and with holdout={holdout} none is in the {empty} split; {remedy}")


def read_file(path: str) -> bytes:
    """What is in a file, unpacked if its name ends in .gz or .zst.

    Raises:
      UserError: naming it, if it cannot be read or unpacked.
    """
    try:
        if path.endswith(".gz"):
            with gzip.open(path, "rb") as file:
                return file.read()
        data = Path(path).read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return _zstd(path, data) if path.endswith(".zst") else data


def _zstd(path: str, data: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} needs the package zstandard, which is missing: pip install axrepro[data]") from None
    out, rest = [], data
    try:
        while rest:
            unpacker = zstandard.ZstdDecompressor().decompressobj()
            out.append(unpacker.decompress(rest))
            if not unpacker.eof:
                raise UserError(f"cannot read {path}: it ends within a zstd frame")
            rest = unpacker.unused_data
    except zstandard.ZstdError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return b"".join(out)


def is_packed(path: str) -> bool:
    return path.endswith((".gz", ".zst"))


def find_files(pattern: str | tuple[str, ...]) -> dict[str, str]:
    """The files that match, each with its path below the pattern's first wildcard, and sorted by that."""
    found = {}
    for one in (pattern,) if isinstance(pattern, str) else pattern:
        one = os.path.expanduser(one)
        base = Path(*itertools.takewhile(lambda part: not set(part) & set("*?["), Path(one).parts[:-1]))
        matched = glob.glob(one, recursive=True)
        matched = [path for path in matched if os.path.isfile(path) or not os.path.exists(path)]  # broken links too
        if not matched:
            raise UserError(f"no file matches {one!r}" + ("" if os.path.isabs(one) else f" in {os.getcwd()}"))
        for path in matched:
            found.setdefault(path, Path(path).relative_to(base).as_posix())
    if not found:
        raise UserError(f"the pattern {pattern!r} names no files")
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


class WholeFiles(Records):
    """Every file is a record {"text": bytes}."""

    def __init__(self, paths: Sequence[str], names: Sequence[str] | None = None):
        self._paths, self._names = paths, paths if names is None else names

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        try:
            return {"text": read_file(self._paths[index])}
        except UserError as error:
            raise BadRecord(str(error)) from None

    def name(self, index: int) -> str:
        return self._names[index]


class _Reader:
    """Parts of files by position. What is open is closed oldest first."""

    def __init__(self):
        self._lock, self._open = threading.Lock(), {}

    def __getstate__(self):
        return {}  # a worker process opens its own

    def __setstate__(self, state):
        self.__init__()

    def read(self, path: str, start: int, size: int) -> bytes:
        with self._lock:
            if path not in self._open:
                if len(self._open) == _OPEN_FILES:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[path] = os.open(path, os.O_RDONLY)
            return os.pread(self._open[path], size, start)

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)


class Pieces(Records):
    """Records that are parts of files, read when they are asked for; packed files lie in memory.

    A record takes 28 bytes of memory.
    """

    def __init__(self, paths: Sequence[str], pieces: Sequence[np.ndarray], unpacked: dict[str, bytes]):
        """
        Args:
          pieces: int64[N, 3] for each path: the number of the record in its file, where it starts, and its size.
        """
        self._paths, self._unpacked, self._reader = paths, unpacked, _Reader()
        self._file = np.repeat(np.arange(len(paths), dtype=np.int32), [len(piece) for piece in pieces])
        self._pieces = np.concatenate(pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def name(self, index: int) -> str:
        return f"{self._paths[self._file[index]]} (document {self._pieces[index, 0]})"

    def __getitem__(self, index: int) -> Example:
        return {"text": self.read(index)}

    def read(self, index: int) -> bytes:
        """The bytes of a record."""
        path, (_, start, size) = self._paths[self._file[index]], self._pieces[index].tolist()
        if path in self._unpacked:
            return self._unpacked[path][start : start + size]
        try:
            data = self._reader.read(path, start, size)
        except OSError as error:
            raise BadRecord(f"cannot read {self.name(index)}: {error}") from None
        if len(data) < size:
            raise BadRecord(f"{self.name(index)}: the file has become shorter since it was opened")
        return data


class _JsonObjects(Pieces):
    def name(self, index: int) -> str:
        return f"{self._paths[self._file[index]]}:{self._pieces[index, 0]}"

    def __getitem__(self, index: int) -> Example:
        try:
            record = json.loads(self.read(index))
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{self.name(index)} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise BadRecord(f"{self.name(index)} holds a JSON {type(record).__name__}, not an object")
        return record


@contextmanager
def _contents(path: str) -> Iterator[bytes | mmap.mmap]:
    """The unpacked bytes of a file; those of a plain one are mapped, since it may be larger than memory."""
    if is_packed(path) or not (os.path.isfile(path) and os.path.getsize(path)):
        yield read_file(path)
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped


def _cut(data: bytes | mmap.mmap, separator: bytes) -> np.ndarray:
    """int64[N, 2], where each piece between separators starts, and its size; empty ones included."""
    if len(separator) == 1:
        parts = range(0, len(data), _SCAN)
        found = [at + np.flatnonzero(np.frombuffer(data[at : at + _SCAN], np.uint8) == separator[0]) for at in parts]
        found = np.concatenate([np.zeros(0, np.int64), *found])
    else:
        found, at = [], data.find(separator)
        while at >= 0:
            found.append(at)
            at = data.find(separator, at + len(separator))
        found = np.array(found, np.int64)
    starts = np.concatenate([[0], found + len(separator)])
    return np.stack([starts, np.append(found, len(data)) - starts], 1)


@dataclass(frozen=True)
class PythonStdlib(Source):
    """The source files of the running Python's standard library: real text that every machine has.

    About 30 MB in 1,800 files, which differ between versions of Python. Files that are not UTF-8 (four of its own tests
    of encodings) are left out, so that every vocabulary can read the rest.

    Attributes:
      holdout: a file is in the eval split if the crc32 of its path in the library is a multiple of this; 0: none is.
    """

    holdout: int = 20

    def __post_init__(self):
        require(self, "holdout", self.holdout == 0 or self.holdout > 1, HOLDOUT)

    def open(self, split: Split) -> WholeFiles:
        root = Path(sysconfig.get_paths()["stdlib"])
        keys: dict[Split, list[str]] = {"train": [], "eval": []}
        for folder, folders, names in os.walk(root):
            folders[:] = set(folders) - {"site-packages", "dist-packages", "__pycache__"}
            for name in names:
                if name.endswith(".py"):
                    key = Path(folder, name).relative_to(root).as_posix()
                    keys["eval" if held_out(key, self.holdout) else "train"].append(key)
        counts = {name: len(some) for name, some in keys.items()}
        check_split(counts, split, self.holdout, str(root), "change the holdout")
        names = [key for key in sorted(keys[split]) if _is_utf8(str(root / key))]
        return WholeFiles([str(root / name) for name in names], names)


def _is_utf8(path: str) -> bool:
    try:
        read_file(path).decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass(frozen=True)
class Files(Source):
    """Records from the files that match a pattern.

    Attributes:
      pattern: glob, or several; `**` is any number of folders. Files whose name ends in .gz or .zst are unpacked.
      holdout: a record is in the eval split if the crc32 of its file's path below the first wildcard (and its number
        there, if the file has several) is a multiple of this; 0: none is. Not used with `eval_pattern`.
      eval_pattern: the files of the eval split; the train split is then what matches `pattern` alone.
    """

    pattern: str | tuple[str, ...]
    holdout: int = 20
    eval_pattern: str | tuple[str, ...] | None = None

    def __post_init__(self):
        require(self, "holdout", self.holdout == 0 or self.holdout > 1, HOLDOUT)

    @property
    @abstractmethod
    def _remedy(self) -> str:
        """What helps against an empty split."""

    def files(self, split: Split) -> tuple[dict[str, str], int]:
        """The files to read for a split, each with its key, and the holdout that still applies to their records.

        Raises:
          UserError: naming the pattern, if it matches nothing.
        """
        if self.eval_pattern is None:
            return find_files(self.pattern), self.holdout
        held_out_files = find_files(self.eval_pattern)
        if split == "eval":
            return held_out_files, 0
        absolute = set(map(os.path.abspath, held_out_files))
        files = {path: key for path, key in find_files(self.pattern).items() if os.path.abspath(path) not in absolute}
        return files, 0

    def check(self, counts: dict[Split, int], split: Split, holdout: int) -> None:
        """Raises UserError if a split is empty.

        Args:
          counts: records by split; with an `eval_pattern`, those that were found stand under `split`.
        """
        pattern = self.eval_pattern if split == "eval" and self.eval_pattern is not None else self.pattern
        check_split(counts, split, holdout, f"{type(self).__name__} {pattern!r}", self._remedy)


def _split_of(key: str, holdout: int, split: Split, by_pattern: bool) -> Split:
    if by_pattern:
        return split
    return "eval" if held_out(key, holdout) else "train"


@dataclass(frozen=True)
class TextFiles(Files):
    """Text files, a document {"text": bytes} each, or cut into documents; see `Files` for the other fields.

    Attributes:
      separator: cuts every file into documents, which do not hold it; empty ones between two separators are left out.
    """

    separator: str | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self, "separator", self.separator != "", "at least one character, or None for one document per file")

    _remedy = (
        "give eval_pattern (files to evaluate on), or a separator that cuts files into more documents, or change the "
        "holdout (0: no eval split)"
    )

    def open(self, split: Split) -> Records:
        if self.separator is not None:
            return open_pieces(self, split, self.separator.encode(), Pieces, _not_empty)
        files, holdout = self.files(split)
        by_split: dict[Split, list[str]] = {"train": [], "eval": []}
        for path, key in files.items():
            by_split[_split_of(key, holdout, split, self.eval_pattern is not None)].append(path)
        self.check({name: len(paths) for name, paths in by_split.items()}, split, holdout)
        return WholeFiles(by_split[split])


@dataclass(frozen=True)
class JsonLines(Files):
    """Files with a JSON object in every line, each a record with its fields; empty lines are skipped."""

    _remedy = "give eval_pattern (files to evaluate on), or change the holdout (0: no eval split)"

    def open(self, split: Split) -> Records:
        return open_pieces(self, split, b"\n", _JsonObjects, _numbered_lines)


def _not_empty(data: bytes | mmap.mmap, cut: np.ndarray) -> np.ndarray:
    cut = cut[cut[:, 1] > 0]
    return np.column_stack([np.arange(len(cut)), cut])


def _numbered_lines(data: bytes | mmap.mmap, cut: np.ndarray) -> np.ndarray:
    """Lines from 1, without those of white space alone."""
    numbered = np.column_stack([np.arange(1, len(cut) + 1), cut])
    short = cut[:, 1] < 8  # a longer line of nothing but white space is told as an error of its own
    blank = [not data[start : start + size].strip() for start, size in cut[short].tolist()]
    keep = np.ones(len(cut), bool)
    keep[np.flatnonzero(short)[blank]] = False
    return numbered[keep]


def open_pieces(
    source: Files,
    split: Split,
    separator: bytes,
    kind: type[Pieces],
    number: Callable[[bytes | mmap.mmap, np.ndarray], np.ndarray],
) -> Pieces:
    """The parts of a source's files between separators that are in a split; every file is read once to find them.

    Args:
      number: from the bytes of a file and int64[M, 2] (start, size) to int64[N, 3] (number, start, size).
    """
    files, holdout = source.files(split)
    counts: dict[Split, int] = {"train": 0, "eval": 0}
    paths, pieces, unpacked = [], [], {}
    for path, key in files.items():
        with _contents(path) as data:
            found = number(data, _cut(data, separator))
            if isinstance(data, bytes):
                unpacked[path] = data
        if source.eval_pattern is None and holdout:
            names = (f"{key}#{n}" for n in found[:, 0].tolist())
            eval_part = np.fromiter((held_out(name, holdout) for name in names), bool, len(found))
            counts["eval"] += int(eval_part.sum())
            counts["train"] += int((~eval_part).sum())
            found = found[eval_part == (split == "eval")]
        else:
            counts[split if source.eval_pattern is not None else "train"] += len(found)
            found = found if source.eval_pattern is not None or split == "train" else found[:0]
        paths.append(path)
        pieces.append(found)
    source.check(counts, split, holdout)
    return kind(paths, pieces, unpacked)


class _FromPython(Records):
    def __init__(self, records: Sequence[Example], what: str):
        self._records, self._what = records, what

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return self._records[index]

    def name(self, index: int) -> str:
        return f"{self._what}, record {index}"


@dataclass(frozen=True)
class FromFunction(Source):
    """Records of any object that has a length and looks records up: a list, a Grain data source or `MapDataset`, a
    Hugging Face dataset.

    Attributes:
      function: gives it for a split. Worker processes need it to be picklable.
    """

    function: Callable[[Split], Sequence[Example]]

    def __repr__(self) -> str:
        named = getattr(self.function, "__qualname__", None)  # which a functools.partial lacks
        return f"{self.function.__module__}.{named}" if named else repr(self.function)

    def open(self, split: Split) -> Records:
        records = self.function(split)
        what = f"{self!r}({split!r})"
        if not len(records):
            raise UserError(f"{what} has no records")
        return _FromPython(records, what)
