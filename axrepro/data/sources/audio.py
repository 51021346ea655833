"""Sound: files and archives of it."""

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np

from axrepro.data.base import Split
from axrepro.data.records import BadRecord, Example
from axrepro.data.sources.files import Files, Pieces, held_out
from axrepro.errors import (
    UserError,
    nearest,
    require,
)

_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")


@dataclass(frozen=True)
class AudioFiles(Files):
    """Sound files, each a record, and those in .tar, .tar.gz, .tar.xz, .tar.bz2 and .zip archives; see `Files` for the
    other fields.

    Records: "audio" (bytes), "name", and a field for each named group of `name_fields`. Archives are not unpacked to
    disk: members of a .zip and of a plain .tar are read where they lie; a packed .tar is held in memory, so for a large
    one repack it. What is held out goes by the path of the file or archive below the first wildcard, and that of the
    member in it.

    Attributes:
      name_fields: a regular expression that must match the end of every path, from the start of a folder's or file's
        name on, such as `(?P<label>\\d)_(?P<speaker>\\w+)_(?P<index>\\d+)\\.wav` or `(?P<label>\\w+)/[^/]+\\.wav`.
        All groups become text but "label".
      labels: the names that "label" can be, which becomes its place among them; None: it is a whole number itself.
      eval_names: a regular expression; files whose path it finds a match in are the eval split, and the others are all
        for training. It can tell apart the members of one archive, which `eval_pattern` cannot.
    """

    name_fields: str | None = None
    labels: tuple[str, ...] | None = None
    eval_names: str | None = None

    _remedy = "give eval_pattern or eval_names (what to evaluate on), or change the holdout (0: no eval)"

    def __post_init__(self):
        super().__post_init__()
        for name in ("name_fields", "eval_names"):
            if getattr(self, name) is not None:
                try:
                    re.compile(getattr(self, name))
                except re.error as error:
                    require(self, name, False, f"a regular expression: {error}")
        both = self.eval_names is not None and self.eval_pattern is not None
        require(self, "eval_names", not both, "None where eval_pattern is given")
        require(self, "labels", self.labels is None or len(set(self.labels)) == len(self.labels), "different names")

    def open(self, split: Split) -> Pieces:
        files, holdout = self.files(split)
        counts: dict[Split, int] = {"train": 0, "eval": 0}
        paths, pieces, unpacked, names, fields = [], [], {}, [], []
        for path, key in files.items():
            members, whole = _members(path)
            kept = []
            for member, *piece in members:
                where = f"{key}/{member}" if member else key
                if self.eval_names is not None:
                    here: Split = "eval" if re.search(self.eval_names, where) else "train"
                elif self.eval_pattern is not None:
                    here = split
                else:
                    here = "eval" if held_out(where, holdout) else "train"
                counts[here] += 1
                if here == split:
                    kept.append(piece)
                    names.append(f"{path}:{member}" if member else path)
                    fields.append(self._fields(where, names[-1]))
            if kept:
                paths.append(path)
                pieces.append(np.array(kept, np.int64))
                if whole is not None:
                    unpacked[path] = whole
        if self.eval_names is not None and sum(counts.values()) and not counts[split]:
            found = "none" if split == "eval" else "all"
            raise UserError(f"AudioFiles {self.pattern!r}: eval_names={self.eval_names!r} matches {found} of the files")
        self.check(counts, split, 0 if self.eval_names is not None else holdout)
        return _Sounds(paths, pieces, unpacked, names, fields)

    def _fields(self, path: str, name: str) -> dict[str, str | int]:
        """What the path tells of a record."""
        if self.name_fields is None:
            return {}
        match = re.search(rf"(?:^|/)(?:{self.name_fields})\Z", path)
        if match is None:
            raise UserError(f"{name} is not named as name_fields={self.name_fields!r} has it; narrow the pattern")
        fields = match.groupdict()
        label = fields.get("label")
        if label is None:
            return fields
        if self.labels is None:
            if not label.isdecimal():
                raise UserError(f"{name} has the label {label!r}, which is no whole number; list the names in labels")
            return fields | {"label": int(label)}
        if label not in self.labels:
            raise UserError(
                f"{name} has the label {label!r}, which labels does not list; {nearest(label, self.labels)}"
            )
        return fields | {"label": self.labels.index(label)}


_DEFLATED, _STORED = 1, 0  # how a piece is packed, in place of its number


def _members(path: str) -> tuple[list[tuple[str, int, int, int]], bytes | None]:
    """Name ("": the file itself), packing, start and size of each sound in a file; and the bytes of a packed tar."""
    try:
        if path.lower().endswith(_TARS):
            return _tar_members(path)
        if path.lower().endswith(".zip"):
            return _zip_members(path), None
        with open(path, "rb") as file:
            return [("", _STORED, 0, file.seek(0, io.SEEK_END))], None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _is_sound(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.rsplit("/", 1)[-1].startswith(".")


def _tar_members(path: str) -> tuple[list[tuple[str, int, int, int]], bytes | None]:
    unpack = {"gz": gzip.open, "tgz": gzip.open, "xz": lzma.open, "txz": lzma.open, "bz2": bz2.open}
    whole = None
    if (suffix := path.lower().rsplit(".", 1)[-1]) in unpack:
        with unpack[suffix](path, "rb") as file:
            whole = file.read()
    with tarfile.open(path, "r:") if whole is None else tarfile.open(fileobj=io.BytesIO(whole), mode="r:") as archive:
        found = [
            (member.name, _STORED, member.offset_data, member.size)
            for member in archive
            if member.isreg() and not member.issparse() and _is_sound(member.name)
        ]
    return found, whole


def _zip_members(path: str) -> list[tuple[str, int, int, int]]:
    found = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            if not _is_sound(member.filename):
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
                raise UserError(f"{path}:{member.filename} is encrypted, or packed by another way than deflate")
            file.seek(member.header_offset + 26)  # of the local header's 30 bytes the last four are two lengths
            start = member.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
            packing = _STORED if member.compress_type == zipfile.ZIP_STORED else _DEFLATED
            found.append((member.filename, packing, start, member.compress_size))
    return found


class _Sounds(Pieces):
    def __init__(self, paths: list[str], pieces: list[np.ndarray], unpacked: dict[str, bytes], names, fields):
        super().__init__(paths, pieces, unpacked)
        self._names, self._fields = names, fields

    def name(self, index: int) -> str:
        return self._names[index]

    def __getitem__(self, index: int) -> Example:
        data = self.read(index)
        if self._pieces[index, 0] == _DEFLATED:
            try:
                data = zlib.decompress(data, -zlib.MAX_WBITS)
            except zlib.error as error:
                raise BadRecord(f"cannot unpack {self.name(index)}: {error}") from None
        return {"audio": data, **self._fields[index], "name": self.name(index)}
