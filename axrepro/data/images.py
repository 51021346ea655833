"""Pictures: folders of them, and transforms from their bytes to arrays.

A picture is uint8[H, W, C] from `DecodeImage` to `NormaliseImage`, with C = 3 (red, green, blue) or 1 (grey).
"""

import io
import json
import math
import os
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from axrepro.data.base import Split
from axrepro.data.fields import FieldTransform
from axrepro.data.records import BadRecord, Example, Records, Source
from axrepro.data.sources import HOLDOUT, Pieces, check_split, held_out, is_packed, read_file
from axrepro.errors import UserError, is_number, nearest, require, require_choice, require_not_negative

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
        return record[self.name_field], record[self.text_field]


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


def as_picture(image: Any):
    """The PIL image of uint8[H, W, C]; one that is a PIL image already stays."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        held = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"a picture is uint8[H, W, 3] or uint8[H, W, 1], not {held}; DecodeImage makes one of bytes")
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def as_pixels(picture) -> np.ndarray:
    """uint8[H, W, C] of a PIL image."""
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _array(image: Any) -> np.ndarray:
    """The array of a picture, of any type: what crops and flips need."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3:
            raise ValueError(f"a picture is an array [H, W, C], not {image.dtype}{list(image.shape)}")
        return image
    return as_pixels(as_picture(image))


Size = int | tuple[int, int]


def _require_size(node) -> None:
    sizes = (node.size,) if isinstance(node.size, int) else node.size
    allowed = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    require(node, "size", allowed, "a number of pixels from 1 on, or (height, width)")


def require_probability(node) -> None:
    """Raises UserError unless `node.probability` is one."""
    allowed = is_number(node.probability) and 0 <= node.probability <= 1
    require(node, "probability", allowed, "a number in [0, 1]")


def _both(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class Plan(NamedTuple):
    """What is kept of a picture, (left, top, right, bottom) in pixels, and the (height, width) it is resampled to."""

    box: tuple[float, float, float, float]
    size: tuple[int, int]


Resampling = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True, kw_only=True)
class _Resampled(FieldTransform):
    """Cuts a box out of a picture and resamples it, in one go; the filter sees the pixels beside the box too.

    Attributes:
      resampling: Pillow's filter of that name, which widens where it shrinks a picture, against aliasing.
    """

    size: Size
    resampling: Resampling = "bilinear"
    field: str = "image"

    def __post_init__(self):
        _require_size(self)
        require_choice(self, "resampling", Resampling)

    @abstractmethod
    def plan(self, height: int, width: int, rng: np.random.Generator) -> Plan:
        """What to cut out of a picture of this size."""

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        picture = as_picture(value)
        return as_pixels(self.resample(picture, self.plan(picture.height, picture.width, rng)))

    def resample(self, picture, plan: Plan):
        from PIL import Image

        (left, top, right, bottom), (height, width) = plan
        if (left, top, right, bottom) == (0, 0, *picture.size) and (width, height) == picture.size:
            return picture
        return picture.resize((width, height), Image.Resampling[self.resampling.upper()], (left, top, right, bottom))


@dataclass(frozen=True, kw_only=True)
class Resize(_Resampled):
    """The whole picture at another size.

    Attributes:
      size: of the shorter side, at the same ratio of sides (the longer one is rounded down, as torchvision does), or
        (height, width).
    """

    def plan(self, height: int, width: int, rng: np.random.Generator) -> Plan:
        size = self.size
        if isinstance(size, int):
            shorter = min(height, width)
            size = (size * height // shorter, size * width // shorter)
        return Plan((0, 0, width, height), size)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(_Resampled):
    """A box of random area and ratio of sides at a random place, resampled to `size`.

    Inception's (arXiv:1409.4842, Sec. 6) as torchvision has it: the ratio is uniform in its logarithm; if none of ten
    boxes lies within the picture, it is the largest one in the middle whose ratio is allowed.

    Attributes:
      size: of both sides, or (height, width).
      scale: smallest and largest share of the picture's area.
      ratio: smallest and largest width / height.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self):
        super().__post_init__()
        require(self, "scale", 0 < self.scale[0] <= self.scale[1] <= 1, "two shares, 0 < smallest <= largest <= 1")
        require(self, "ratio", 0 < self.ratio[0] <= self.ratio[1], "two ratios, 0 < smallest <= largest")

    def plan(self, height: int, width: int, rng: np.random.Generator) -> Plan:
        low, high = self.ratio
        drawn = rng.random((10, 2))
        areas = height * width * (self.scale[0] + drawn[:, 0] * (self.scale[1] - self.scale[0]))
        ratios = low * (high / low) ** drawn[:, 1]
        widths, heights = np.rint(np.sqrt(areas * ratios)).astype(int), np.rint(np.sqrt(areas / ratios)).astype(int)
        inside = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        if inside.any():
            first = int(inside.argmax())
            w, h = int(widths[first]), int(heights[first])
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        else:
            w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
            left, top = (width - w) // 2, (height - h) // 2
        return Plan((left, top, left + w, top + h), _both(self.size))


@dataclass(frozen=True, kw_only=True)
class DecodeImage(FieldTransform):
    """The bytes of a file to uint8[H, W, C], turned upright as its EXIF orientation says.

    Transparency is dropped, and of a moving picture the first frame is taken.

    Attributes:
      mode: "rgb", 3 channels, or "grey", 1 (ITU-R 601-2 luma).
      crop: what would come next. In one go it saves time: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where what
        `crop` keeps has `crop.size` pixels even so. The draws are the same as of the two, the pixels nearly.
    """

    mode: Literal["rgb", "grey"] = "rgb"
    crop: Resize | RandomResizedCrop | None = None
    field: str = "image"

    def __post_init__(self):
        require_choice(self, "mode", Literal["rgb", "grey"])

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        if not isinstance(value, bytes):
            raise ValueError(f"the field {self.field!r} is {type(value).__name__}, not the bytes of a picture")
        mode: Literal["RGB", "L"] = "RGB" if self.mode == "rgb" else "L"
        picture, turn = _opened(value)
        if self.crop is None:
            return as_pixels(_loaded(picture, mode, turn))
        width, height = picture.size[::-1] if turn in _SIDEWAYS else picture.size
        box, (h, w) = plan = self.crop.plan(height, width, rng)
        if picture.format == "JPEG":
            needed = (math.ceil(width * w / (box[2] - box[0])), math.ceil(height * h / (box[3] - box[1])))
            drafted = picture.draft(mode, needed[::-1] if turn in _SIDEWAYS else needed)
            if drafted is not None:  # its box is the whole picture in the new pixels, of which the last may be cut
                shrunk = drafted[1][2] / (height if turn in _SIDEWAYS else width)
                plan = Plan((shrunk * box[0], shrunk * box[1], shrunk * box[2], shrunk * box[3]), (h, w))
        return as_pixels(self.crop.resample(_loaded(picture, mode, turn), plan))


_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_SIDEWAYS = ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


def _opened(data: bytes):
    """A PIL image not yet decoded, and the turn that sets it upright, if any."""
    from PIL import Image

    if not data:
        raise ValueError("the picture is empty (0 bytes)")
    try:
        picture = Image.open(io.BytesIO(data))
        return picture, _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Image.UnidentifiedImageError:
        raise ValueError(f"these bytes are no picture that Pillow knows; they begin {data[:16]!r}") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files
        raise ValueError(f"cannot decode the picture: {error}") from None


def _loaded(picture, mode: Literal["RGB", "L"], turn: str | None):
    """The picture decoded, in a mode, and upright."""
    from PIL import Image

    try:
        picture.load()
    except Exception as error:  # as above
        raise ValueError(f"cannot decode the picture: {error}") from None
    if picture.mode.startswith("I;16"):  # Pillow would clip the values at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError(f"the picture has 32 bits per pixel (Pillow's mode {picture.mode!r}), of unknown range")
    if picture.mode != mode:
        picture = picture.convert(mode)
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


@dataclass(frozen=True, kw_only=True)
class CentreCrop(FieldTransform):
    """The middle of a picture.

    Attributes:
      size: of both sides, or (height, width).
    """

    size: Size
    field: str = "image"

    def __post_init__(self):
        _require_size(self)

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        image, (height, width) = _array(value), _both(self.size)
        _require_room(image, height, width)
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        return image[top : top + height, left : left + width]


@dataclass(frozen=True, kw_only=True)
class RandomCrop(FieldTransform):
    """A window at a random place, every one as likely.

    Attributes:
      size: of both sides, or (height, width).
      padding: pixels set around the picture before.
      edge: what they hold: 0, or the picture mirrored at its outermost pixels.
    """

    size: Size
    padding: int = 0
    edge: Literal["zeros", "mirror"] = "zeros"
    field: str = "image"

    def __post_init__(self):
        _require_size(self)
        require_not_negative(self, "padding")
        require_choice(self, "edge", Literal["zeros", "mirror"])

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        image, (height, width) = _array(value), _both(self.size)
        if self.padding:
            around = ((self.padding, self.padding), (self.padding, self.padding), (0, 0))
            image = np.pad(image, around, mode="constant" if self.edge == "zeros" else "reflect")
        _require_room(image, height, width)
        top = int(rng.integers(image.shape[0] - height + 1))
        left = int(rng.integers(image.shape[1] - width + 1))
        return image[top : top + height, left : left + width]


def _require_room(image: np.ndarray, height: int, width: int) -> None:
    if image.shape[0] < height or image.shape[1] < width:
        raise ValueError(
            f"the picture has {image.shape[0]} x {image.shape[1]} pixels (height x width), and {height} x {width} are "
            "to be cut out; put Resize before, or give RandomCrop padding"
        )


@dataclass(frozen=True, kw_only=True)
class FlipHorizontal(FieldTransform):
    """Left and right swapped, now and then.

    Attributes:
      probability: how often.
    """

    probability: float = 0.5
    field: str = "image"

    def __post_init__(self):
        require_probability(self)

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        image = _array(value)
        return image[:, ::-1] if rng.random() < self.probability else image


@dataclass(frozen=True, kw_only=True)
class NormaliseImage(FieldTransform):
    """(image / 255 - mean) / std as float32[H, W, C].

    Attributes:
      mean, std: for each channel, or one for all. The defaults are ImageNet's.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    field: str = "image"

    def __post_init__(self):
        require(self, "mean", len(self.mean) in (1, 3) and all(map(is_number, self.mean)), "1 or 3 numbers")
        allowed = len(self.std) == len(self.mean) and all(is_number(value) and value > 0 for value in self.std)
        require(self, "std", allowed, "as many numbers above 0 as mean has")

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        image = _array(value)
        if image.dtype != np.uint8:
            raise ValueError(f"NormaliseImage takes uint8 pictures, not {image.dtype}")
        height, width, channels = image.shape
        scale, shift = self._row(width, channels)
        out = np.multiply(image.reshape(height, width * channels), scale, dtype=np.float32)
        out += shift
        return out.reshape(height, width, channels)

    def invert(self, image: np.ndarray) -> np.ndarray:
        """The picture in [0, 1] that became `image`: to look at."""
        return np.clip(image * np.array(self.std, np.float32) + np.array(self.mean, np.float32), 0, 1)

    def _row(self, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Factor and summand along a whole row of pixels: arithmetic along 3 channels would be many times slower."""
        if len(self.mean) not in (1, channels):
            raise ValueError(f"NormaliseImage has {len(self.mean)} means, and the picture {channels} channel(s)")
        std = np.resize(np.array(self.std, np.float64), channels)
        mean = np.resize(np.array(self.mean, np.float64), channels)
        scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        return np.tile(scale, width), np.tile(shift, width)
