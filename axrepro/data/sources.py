"""Where documents come from, and which of them are held out."""

import glob
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from axrepro.data.base import Split
from axrepro.errors import UserError, nearest, require


class Document(NamedTuple):
    """One text. `name` is what an error about it says: its file, and its line or number there."""

    name: str
    data: bytes


class Source(ABC):
    """A frozen dataclass that lists documents in an order of its own, the same on every host."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, at least one.

        Raises:
          UserError: naming the pattern or file, if it is missing, unreadable or malformed, or a split is empty.
        """


class _Entry(NamedTuple):
    """A document not yet read. The crc32 of `key`, which names no folder of one machine, decides on holding it out."""

    key: str
    name: str
    read: Callable[[], bytes]


_HOLDOUT = "N of 2 or more, which holds out about one document in N, or 0: none"


def _split(entries: Iterable[_Entry], split: Split, holdout: int, what: str, remedy: str) -> Iterator[Document]:
    """The entries of a split. Raises UserError if either split is empty though documents were to be held out."""
    taken = {"train": 0, "eval": 0}
    for entry in entries:
        here = "eval" if holdout and zlib.crc32(entry.key.encode()) % holdout == 0 else "train"
        taken[here] += 1
        if here == split:
            yield Document(entry.name, entry.read())
    total = sum(taken.values())
    if not total:
        raise UserError(f"{what} has no documents")
    if not taken[split] or (holdout and not all(taken.values())):
        empty = "eval" if not taken["eval"] else "train"
        count = f"{total} document{'s' if total > 1 else ''}"
        raise UserError(f"{what} has {count}, and with holdout={holdout} none is in the {empty} split; {remedy}")


def _read(path: str) -> bytes:
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _files(pattern: str | tuple[str, ...]) -> dict[str, str]:
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
        require(self, "holdout", self.holdout == 0 or self.holdout > 1, _HOLDOUT)

    def documents(self, split: Split) -> Iterator[Document]:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = []
        for folder, folders, names in os.walk(root):
            folders[:] = set(folders) - {"site-packages", "dist-packages", "__pycache__"}
            paths += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
        entries = (_Entry(path, path, partial(_read, str(root / path))) for path in sorted(paths))
        for document in _split(entries, split, self.holdout, str(root), "change the holdout"):
            try:
                document.data.decode()
            except UnicodeDecodeError:
                continue
            yield document


@dataclass(frozen=True)
class _Files(Source):
    """Documents from the files that match a pattern.

    Attributes:
      pattern: glob, or several; `**` is any number of folders. Files whose name ends in .gz are unpacked.
      holdout: a document is in the eval split if the crc32 of its file's path below the first wildcard (and its number
        there, if the file has several) is a multiple of this; 0: none is. Not used with `eval_pattern`.
      eval_pattern: the files of the eval split; the train split is then what matches `pattern` alone.
    """

    pattern: str | tuple[str, ...]
    holdout: int = 20
    eval_pattern: str | tuple[str, ...] | None = None

    def __post_init__(self):
        require(self, "holdout", self.holdout == 0 or self.holdout > 1, _HOLDOUT)

    @abstractmethod
    def _entries(self, path: str, key: str) -> Iterator[_Entry]:
        """The documents of one file."""

    def documents(self, split: Split) -> Iterator[Document]:
        pattern, holdout = self.pattern, self.holdout
        if self.eval_pattern is None:
            files = _files(pattern)
        else:
            holdout, held_out = 0, _files(self.eval_pattern)
            if split == "eval":
                pattern, files = self.eval_pattern, held_out
            else:
                absolute = set(map(os.path.abspath, held_out))
                files = {path: key for path, key in _files(pattern).items() if os.path.abspath(path) not in absolute}
            split = "train"  # all that is left
        entries = itertools.chain.from_iterable(self._entries(path, key) for path, key in files.items())
        yield from _split(entries, split, holdout, f"{type(self).__name__} {pattern!r}", self._remedy)

    @property
    @abstractmethod
    def _remedy(self) -> str:
        """What helps against an empty split."""


@dataclass(frozen=True)
class TextFiles(_Files):
    """Text files, a document each, or cut into documents; see `_Files` for the other fields.

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

    def _entries(self, path: str, key: str) -> Iterator[_Entry]:
        if self.separator is None:
            yield _Entry(key, path, partial(_read, path))
            return
        pieces = filter(None, _read(path).split(self.separator.encode()))
        for number, piece in enumerate(pieces):
            yield _Entry(f"{key}#{number}", f"{path} (document {number})", lambda piece=piece: piece)


@dataclass(frozen=True)
class JsonLines(_Files):
    """Files with a JSON object in every line, each a document; empty lines are skipped. See `_Files` for other fields.

    Attributes:
      field: the key of the text in each object.
    """

    field: str = "text"

    _remedy = "give eval_pattern (files to evaluate on), or change the holdout (0: no eval split)"

    def _entries(self, path: str, key: str) -> Iterator[_Entry]:
        for number, line in enumerate(_read(path).split(b"\n"), start=1):
            if line.strip():
                text = self._text(line, f"{path}:{number}")
                yield _Entry(f"{key}#{number}", f"{path}:{number}", lambda text=text: text)

    def _text(self, line: bytes, name: str) -> bytes:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{name} holds a JSON {type(record).__name__}, not an object with the field {self.field!r}")
        if self.field not in record:
            raise UserError(f"{name} has no field {self.field!r}; {nearest(self.field, record)}")
        text = record[self.field]
        if not isinstance(text, str):
            raise UserError(f"{name}: the field {self.field!r} is {text!r:.40}, not a string")
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name}: the field {self.field!r} is not Unicode text: {error}") from None
