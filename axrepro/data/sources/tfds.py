"""Datasets that TensorFlow Datasets prepared, record by record. TensorFlow itself is not needed."""

import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import IO, Any

import numpy as np

from axrepro.data.base import Split
from axrepro.data.records import BadRecord, Example, Records, Source
from axrepro.errors import UserError, nearest, require

_HEADER, _FOOTER = 12, 4  # bytes around a record of a TFRecord file: its length and the checksum of that; its checksum
_THREADS = 16  # files that are indexed at a time: on network storage each waits for its answers


def _library():
    """TensorFlow Datasets."""
    try:
        import google_crc32c  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"a Tfds source needs the package {error.name}, which is missing: pip install axrepro[tf]"
        ) from None
    return tfds


@dataclass(frozen=True, kw_only=True)
class Tfds(Source):
    """A dataset of TensorFlow Datasets, from files that were prepared before: nothing is downloaded or written.

    Files in the formats array_record and tfrecord are read, the latter through an index of where each record starts,
    made in one pass over their headers when the split is opened.

    Text is bytes, a scalar is a Python number, and anything else an array. Pictures, sound and video stay as they are
    stored, for transforms to decode.

    Attributes:
      name: of the dataset, with a config and a version if need be (`glue/cola:2.0.0`), or the directory of one version
        of it, which has a dataset_info.json.
      split, eval_split: as TensorFlow Datasets writes them: `train`, `train[:10%]`, `train[5:20]`, `train+test`. An
        eval_split of None: there is none.
      data_dir: where datasets are; None: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
      fields: those to keep; None: all.
      decoded: fields with pictures, sound or video that TensorFlow Datasets decodes into arrays.
    """

    name: str
    split: str = "train"
    eval_split: str | None = "test"
    data_dir: str | None = None
    fields: tuple[str, ...] | None = None
    decoded: tuple[str, ...] = ()

    def __post_init__(self):
        require(self, "name", bool(self.name), "the name of a dataset, or its directory")
        require(self, "fields", self.fields is None or len(self.fields) > 0, "at least one field, or None: all")

    def open(self, split: Split) -> "TfdsRecords":
        chosen = self.split if split == "train" else self.eval_split
        if chosen is None:
            raise UserError(f"Tfds {self.name} has no eval split; set eval_split, to {self.split!r}[:1%] for instance")
        builder = self._builder()
        splits, features = builder.info.splits, builder.info.features
        for field in (*(self.fields or ()), *self.decoded):
            if field not in features:
                raise UserError(f"{self.name} has no field {field!r}; {nearest(field, features)}")
        try:
            files = splits[chosen].file_instructions
        except Exception as error:  # of many types, AssertionError among them
            sizes = ", ".join(f"{name} ({info.num_examples} records)" for name, info in splits.items())
            raise UserError(
                f"{self.name} has no split {chosen!r} ({_line(error)}); it has {sizes}, and slices like train[:10%], "
                "train[5:20] or train+test"
            ) from None
        if not files:
            raise UserError(f"the split {chosen!r} of {self.name} is empty; choose a larger part of it")
        return TfdsRecords(str(builder.data_path), chosen, self.fields, self.decoded)

    def _builder(self):
        """What describes the files. It is made from what lies beside them, not from the code that prepared them."""
        tfds = _library()
        from etils import epath

        path = epath.Path(self.name).expanduser()
        if path.is_absolute() or (path / "dataset_info.json").exists():
            if not (path / "dataset_info.json").exists():
                raise UserError(
                    f"{path} has no dataset_info.json; Tfds takes the directory of one version of a prepared dataset, "
                    "or its name with data_dir"
                )
            return tfds.builder_from_directory(path)
        where = self.data_dir or tfds.core.constants.DATA_DIR
        try:
            return tfds.core.read_only_builder.builder_from_files(self.name, data_dir=where)
        except tfds.core.registered.DatasetNotFoundError:
            pass
        except Exception as error:
            raise UserError(f"cannot read the dataset {self.name!r} in {where}: {_line(error)}") from None
        base = self.name.partition(":")[0].partition("/")[0]
        infos = [info for depth in ("*", "*/*") for info in epath.Path(where, base).glob(f"{depth}/dataset_info.json")]
        if infos:
            versions = sorted(str(info.parent.relative_to(where)) for info in infos)
            raise UserError(f"there is no dataset {self.name!r} in {where}; it has {', '.join(versions)}")
        known = tfds.list_builders(with_community_datasets=False)
        if base in known:
            raise UserError(
                f"the dataset {self.name!r} is not prepared in {where}; prepare it with: tfds build {self.name} "
                f"--data_dir={where} (--file_format=array_record opens faster), or set data_dir"
            )
        there = [path.name for path in epath.Path(where).iterdir()] if epath.Path(where).is_dir() else []
        hint = nearest(base, [*known, *there])
        if not hint.startswith("did"):  # the names are hundreds
            hint = "see tfds.list_builders(), and set data_dir to where yours are"
        raise UserError(f"there is no dataset {self.name!r} in {where}, and TensorFlow Datasets knows none; {hint}")


def _line(error: BaseException) -> str:
    """An error in one line, of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


@cache
def _stored():
    """A decoder that does not decode, neither one value nor a sequence of them."""

    base: Any = _library().decode.SkipDecoding

    class Stored(base):
        def decode_batch_example_np(self, values):
            return values

        decode_ragged_example_np = decode_batch_example_np

    return Stored


def _encoded(features, decoded: tuple[str, ...]) -> dict:
    """Decoders that leave pictures, sound and video as they are stored, except in `decoded`."""
    tfds = _library()
    kinds = (tfds.features.Image, tfds.features.Audio, tfds.features.Video)
    decoders = {}
    for name, feature in features.items():
        while isinstance(feature, tfds.features.Sequence) and not isinstance(feature, kinds):
            feature = feature.feature
        if name in decoded:
            continue
        if isinstance(feature, kinds):
            decoders[name] = _stored()()
        elif isinstance(feature, tfds.features.FeaturesDict) and (nested := _encoded(feature, ())):
            decoders[name] = nested
    return decoders


class TfdsRecords(Records):
    """The records of one split expression of a prepared dataset, in the order of its files."""

    def __init__(self, directory: str, split: str, fields: tuple[str, ...] | None, decoded: tuple[str, ...]):
        """
        Args:
          directory: of one version of a dataset.   split: the expression.   fields, decoded: as in `Tfds`.
        Raises:
          UserError: if the files are in another format than array_record and tfrecord, or one is missing.
          BadRecord: if a file ends early, or the header of a record is corrupt.
        """
        self._directory, self._split, self._fields, self._decoded = directory, split, fields, decoded
        info = self._builder.info
        files = info.splits[split].file_instructions
        self._files = [str(file.filename) for file in files]
        self._skipped = np.array([file.skip for file in files], np.int64)
        self._starts = np.cumsum([0, *(file.take for file in files)])
        file_format = info.file_format.value
        if file_format not in ("array_record", "tfrecord"):
            raise UserError(
                f"{directory} holds files in the format {file_format}; Tfds reads array_record and tfrecord, so "
                f"convert them: tfds convert_format --dataset_dir={directory} --out_file_format=array_record"
            )
        from etils import epath

        for path in self._files:
            if not epath.Path(path).exists():
                raise UserError(f"{path} is missing; prepare the dataset again, or copy the whole of {directory}")
        self._places: np.ndarray | None = None  # int64[N], where each record starts in its file
        if file_format == "tfrecord":
            with ThreadPoolExecutor(_THREADS) as pool:
                self._places = np.concatenate(list(pool.map(_index, files)))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("_builder", "_decode", "_source")}

    @cached_property
    def _builder(self) -> Any:
        return _library().builder_from_directory(self._directory)

    @cached_property
    def _decode(self):
        """From the bytes of a record to its fields."""
        features = self._builder.info.features
        return partial(features.deserialize_example_np, decoders=_encoded(features, self._decoded) or None)

    @cached_property
    def _source(self) -> Any:
        """ArrayRecord files, decoded."""
        features = self._builder.info.features
        return self._builder.as_data_source(self._split, decoders=_encoded(features, self._decoded) or None)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            if self._places is None:
                example = self._source[index]
            else:
                example = self._decode(_read(self._place(index)[0], int(self._places[index])))
        except Exception as error:  # what the libraries raise for bytes that make no sense is of many types
            raise BadRecord(f"{self.name(index)} cannot be read: {_line(error)}") from error
        names = example if self._fields is None else self._fields
        return {name: _plain(example[name]) for name in names}

    def _place(self, index: int) -> tuple[str, int]:
        """The file of a record, and its number there."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[file], int(index - self._starts[file] + self._skipped[file])

    def name(self, index: int) -> str:
        path, number = self._place(index)
        return f"{path} (record {number})"


def _plain(value: Any) -> Any:
    """A scalar as a Python value."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return (
        value.item() if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim) else value
    )


def _index(file) -> np.ndarray:
    """int64[take], where the records of a TfDS file instruction start in a TFRecord file."""
    starts, place = [], 0
    path = str(file.filename)
    with _open(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        for number in range(file.skip + file.take):
            stream.seek(place)
            header = stream.read(_HEADER)
            try:
                end = place + _HEADER + _length(header) + _FOOTER
            except ValueError as error:
                raise BadRecord(f"{path} (record {number} of {file.examples_in_shard}): {error}") from None
            if end > size:
                raise BadRecord(f"{path} (record {number} of {file.examples_in_shard}): the file ends within it")
            starts.append(place)
            place = end
    if file.skip + file.take == file.examples_in_shard and place < size:
        raise UserError(
            f"{path} holds more than the {file.examples_in_shard} records that its dataset_info.json counts"
        )
    return np.array(starts[file.skip :], np.int64)


def _open(path: str) -> IO[bytes]:
    """A file for reading, on a disk or in a bucket."""
    if "://" not in path:
        return open(path, "rb")
    from etils import epath

    return epath.Path(path).open("rb")


def _length(header: bytes) -> int:
    """Bytes of a record. Raises ValueError if its header is cut off or its checksum is wrong."""
    if len(header) < _HEADER:
        raise ValueError("the file ends before it")
    length, checksum = struct.unpack("<QI", header)
    if _masked(header[:8]) != checksum:
        raise ValueError("the checksum of its length does not match")
    return length


def _read(path: str, place: int) -> bytes:
    """A record of a TFRecord file. Raises ValueError or OSError if it is corrupt."""
    with _open(path) as stream:
        stream.seek(place)
        length = _length(stream.read(_HEADER))
        data = stream.read(length + _FOOTER)
    if len(data) < length + _FOOTER:
        raise ValueError("the file ends within it")
    if _masked(data[:length]) != int.from_bytes(data[length:], "little"):
        raise ValueError("the checksum of its data does not match")
    return data[:length]


def _masked(data: bytes) -> int:
    """The checksum of TFRecord files: crc32c, rotated right by 15 bits, plus a constant."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
