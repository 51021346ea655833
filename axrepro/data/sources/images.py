"""Pictures: class folders of them, and those that a file of captions names."""

import io
import json
import os
from dataclasses import dataclass

import numpy as np

from axrepro.data.base import Split
from axrepro.data.records import BadRecord, Example, Records, Source
from axrepro.data.sources.files import HOLDOUT, Pieces, check_split, held_out, is_packed, read_file
from axrepro.errors import UserError, nearest, require

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageFolders(Source):
    """A folder for each class, of pictures in it or in folders below it.

    Records: "image" (bytes), "label" (int, the place of the class among the sorted names of the folders in `root`),
    "name". Names that begin with a dot, and files that are not named as pictures, are left out.

    Attributes:
      root: the folder of class folders.
      eval_root: the same for the eval split, with no other classes; `root` is then all for training.
      holdout: without `eval_root`, a picture is in the eval split if the crc32 of its path below `root` is a multiple
        of this; 0: none is.
    """

    root: str
    eval_root: str | None = None
    holdout: int = 20

    def __post_init__(self):
        require(self, "holdout", self.holdout == 0 or self.holdout > 1, HOLDOUT)

    def classes(self) -> tuple[str, ...]:
        """The names of the classes, label 0 first.

        Raises:
          UserError: if `root` has no folders.
        """
        return _class_folders(self.root)

    def open(self, split: Split) -> Records:
        classes, root = self.classes(), self.root
        if split == "eval" and self.eval_root is not None:
            root = self.eval_root
            for name in _class_folders(root):
                if name not in classes:
                    raise UserError(f"{os.path.join(root, name)} is a class that {self.root} does not have")
        paths, labels = [], []
        for label, name in enumerate(classes):
            found = _pictures_below(os.path.expanduser(root), name)
            if not found and root != self.eval_root:
                raise UserError(f"{os.path.join(root, name)} has no pictures ({', '.join(_SUFFIXES)})")
            paths += found
            labels += [label] * len(found)
        kept = _kept(paths, split, self.holdout if self.eval_root is None else None, f"ImageFolders {root!r}")
        return _Labelled(os.path.expanduser(root), [paths[i] for i in kept], np.array(labels, np.int32)[kept])


def _kept(keys: list[str], split: Split, holdout: int | None, what: str) -> np.ndarray:
    """Places of the keys that are in a split; holdout None: all are."""
    if holdout is None:
        check_split({"train": len(keys), "eval": len(keys)}, split, 0, what, "")
        return np.arange(len(keys))
    eval_part = np.array([held_out(key, holdout) for key in keys], bool)
    counts: dict[Split, int] = {"train": int((~eval_part).sum()), "eval": int(eval_part.sum())}
    check_split(counts, split, holdout, what, "name what to evaluate on, or change the holdout (0: no eval split)")
    return np.flatnonzero(eval_part == (split == "eval"))


def _read(path: str) -> bytes:
    try:
        return read_file(path)
    except UserError as error:
        raise BadRecord(str(error)) from None


def _class_folders(root: str) -> tuple[str, ...]:
    try:
        with os.scandir(os.path.expanduser(root)) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot list the folder {root}: {error.strerror}") from None
    if not names:
        raise UserError(f"{root} has no folders; it takes one for each class, with its pictures in it")
    return tuple(names)


def _pictures_below(root: str, folder: str) -> list[str]:
    """Paths relative to `root`, with slashes, sorted."""
    found = []
    for place, folders, names in os.walk(os.path.join(root, folder), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(place, root).replace(os.sep, "/")
        found += [f"{below}/{n}" for n in names if n.lower().endswith(_SUFFIXES) and not n.startswith(".")]
    return sorted(found)


class _Labelled(Records):
    def __init__(self, root: str, paths: list[str], labels: np.ndarray):
        self._root, self._paths, self._labels = root, paths, labels

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        name = self.name(index)
        return {"image": _read(name), "label": int(self._labels[index]), "name": name}

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])


@dataclass(frozen=True)
class CaptionedImages(Source):
    """A folder of pictures, and a file with a caption in every line.

    The file is JSON lines (.jsonl), an object in each, or a table (.tsv) whose first line names its columns, parted by
    tabs. A picture may stand in several lines, each of which is a record: "image" (bytes), "text", "name". Empty lines
    are skipped.

    Attributes:
      folder: where the pictures lie.
      captions: the file.
      eval_captions: one for the eval split, of pictures in the same folder; `captions` is then all for training.
      holdout: without `eval_captions`, a picture, with all its captions, is in the eval split if the crc32 of its name
        in the file is a multiple of this; 0: none is.
      name_field: key or column of the picture's path below `folder`.
      text_field: key or column of the caption.
    """

    folder: str
    captions: str
    eval_captions: str | None = None
    holdout: int = 20
    name_field: str = "file_name"
    text_field: str = "text"

    def __post_init__(self):
        require(self, "holdout", self.holdout == 0 or self.holdout > 1, HOLDOUT)
        for name in ("captions", "eval_captions"):
            path = getattr(self, name)
            known = path is None or _is_table(path) or path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))
            require(self, name, known, "a file that ends in .jsonl or .tsv, perhaps with .gz or .zst after it")

    def open(self, split: Split) -> Records:
        path, holdout = self.captions, self.holdout
        if self.eval_captions is not None:
            path, holdout = self.eval_captions if split == "eval" else path, None
        folder, path = os.path.expanduser(self.folder), os.path.expanduser(path)
        if not os.path.isdir(folder):
            raise UserError(f"there is no folder {self.folder}")
        data = read_file(path)
        pictures, lines, columns, start = [], [], None, 0
        for number, line in enumerate(io.BytesIO(data), start=1):
            if line.strip():
                if columns is None and _is_table(path):
                    columns = self._columns(line, f"{path}:{number}")
                else:
                    pictures.append(self.parse(line, f"{path}:{number}", columns)[0])
                    lines.append((number, start, len(line)))
            start += len(line)
        kept = _kept(pictures, split, holdout, f"CaptionedImages {path!r}")
        return _Captioned(self, folder, path, columns, np.array(lines)[kept], {path: data} if is_packed(path) else {})

    def _columns(self, line: bytes, place: str) -> tuple[str, ...]:
        columns = tuple(_text(line, place).split("\t"))
        for name in (self.name_field, self.text_field):
            if name not in columns:
                raise UserError(f"{place} names the columns, and none is {name!r}; {nearest(name, columns)}")
        return columns

    def parse(self, line: bytes, place: str, columns: tuple[str, ...] | None) -> tuple[str, str]:
        """Picture and caption of one line. Raises BadRecord, which names `place`."""
        if columns is None:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadRecord(f"{place} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise BadRecord(f"{place} holds a JSON {type(record).__name__}, not an object")
        else:
            values = _text(line, place).split("\t")
            if len(values) != len(columns):
                raise BadRecord(f"{place} has {len(values)} columns, and the first line names {len(columns)}")
            record = dict(zip(columns, values, strict=True))
        for name in (self.name_field, self.text_field):
            if name not in record:
                raise BadRecord(f"{place} has no field {name!r}; {nearest(name, record)}")
            if not isinstance(record[name], str) or not record[name]:
                raise BadRecord(f"{place}: the field {name!r} is {record[name]!r:.40}, not a text")
        picture = record[self.name_field]
        if os.path.isabs(picture) or ".." in picture.split("/") or "\0" in picture:
            raise BadRecord(f"{place} names {picture!r:.100}, which is not below {self.folder}")
        return picture, record[self.text_field]


def _is_table(path: str) -> bool:
    return path.endswith((".tsv", ".tsv.gz", ".tsv.zst"))


def _text(line: bytes, place: str) -> str:
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadRecord(f"{place} is not UTF-8: {error}") from None


class _Captioned(Pieces):
    """Holds where the lines are, and not the lines, of which there may be hundreds of megabytes."""

    def __init__(
        self,
        source: CaptionedImages,
        folder: str,
        path: str,
        columns: tuple[str, ...] | None,
        lines: np.ndarray,
        unpacked: dict[str, bytes],
    ):
        super().__init__([path], [lines], unpacked)
        self._source, self._folder, self._columns = source, folder, columns

    def name(self, index: int) -> str:
        return f"{self._paths[0]}:{self._pieces[index, 0]}"

    def __getitem__(self, index: int) -> Example:
        picture, text = self._source.parse(self.read(index), self.name(index), self._columns)
        name = os.path.join(self._folder, picture)
        try:
            return {"image": _read(name), "text": text, "name": name}
        except BadRecord as error:
            raise BadRecord(f"{self.name(index)} names a picture that cannot be read: {error}") from None
