"""ArrayRecord files: shards of records that are looked up by number, written whole or not at all.

A record is a msgpack map of field to value: None, bool, int, float, str, bytes, an array, or a list or map of these. An
array is the extension type 1 around [dtype, shape, bytes in C order], little-endian. Nothing in it is ever run.

Beside the shards PREFIX-00000-of-00008.array_record ... lie PREFIX.json, the `Index` of all shards, and for records
with `tokens` PREFIX.lengths.npy, the length of each; both are written last.
"""

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

import axrepro
from axrepro.data.base import Split
from axrepro.data.records import BadRecord, Example, Records
from axrepro.data.sources.record_files import FileRecords, RecordFiles, shard_of, shard_path
from axrepro.data.vocabulary import Vocabulary
from axrepro.errors import UserError, require, require_choice

SUFFIX = ".array_record"
Encoding = Literal["msgpack", "example", "bytes"]
_FORMAT = "axrepro records 1"
_ARRAY = 1  # the extension type of arrays
_KINDS = {"b": 1, "i": 8, "u": 8, "f": 8}  # numpy's kinds that are written, and the largest item of each
# one chunk a record, and no reading ahead, which a lookup by number would throw away
_WRITE, _READ, _BUFFER = "group_size:1", "readahead_buffer_size:0,max_parallelism:0", 4096
_Schema = dict[str, set[str]]


def _array_record():
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise UserError("ArrayRecord files need the package array_record: pip install axrepro[data]") from None
    return array_record_module


def _msgpack():
    try:
        import msgpack
    except ImportError:
        raise UserError("records need the package msgpack: pip install axrepro[data]") from None
    return msgpack


def encode(record: Example) -> bytes:
    """A record as the bytes that `decode` takes; numpy scalars become Python ones, tuples lists.

    Raises:
      ValueError: for values that have no encoding.
    """
    msgpack = _msgpack()

    def pack(value):
        if isinstance(value, tuple):
            return list(value)
        if isinstance(value, np.generic) and value.dtype.kind in _KINDS:
            return value.item()
        if not isinstance(value, np.ndarray):
            raise ValueError(f"a {type(value).__name__} cannot be written, only None, bool, int, float, str, bytes, "
                             "arrays, and lists and dicts of these")  # fmt: skip
        if value.dtype.kind not in _KINDS or value.dtype.itemsize > _KINDS[value.dtype.kind]:
            raise ValueError(f"an array of {value.dtype} cannot be written, only of bool, int, uint and float")
        value = value.astype(value.dtype.newbyteorder("<"), copy=False)
        return msgpack.ExtType(_ARRAY, msgpack.packb((value.dtype.str, value.shape, value.tobytes())))

    if any(not isinstance(name, str) for name in record):
        raise ValueError(f"the fields {list(record)!r:.100} are not all strings")
    try:
        packed = msgpack.packb(record, default=pack, strict_types=True)
    except (OverflowError, UnicodeEncodeError, TypeError) as error:
        raise ValueError(str(error)) from None
    assert packed is not None  # as it is with a buffer that is reset
    return packed


def _unpack_array(code: int, data: memoryview | bytes) -> np.ndarray:
    msgpack = _msgpack()
    if code != _ARRAY:
        raise ValueError(f"it holds the unknown extension type {code}")
    dtype, shape, raw = msgpack.unpackb(data)
    dtype = np.dtype(dtype)
    if dtype.kind not in _KINDS:
        raise ValueError(f"it holds an array of {dtype}")
    return np.frombuffer(raw, dtype).reshape(shape)


def decode(data: bytes) -> Example:
    """The record that `encode` wrote. Arrays are read-only views of `data`'s copy.

    Raises:
      ValueError: if it is no such record.
    """
    try:
        record = _msgpack().unpackb(data, ext_hook=_unpack_array)
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError) as error:  # msgpack's own errors are ValueErrors
        raise ValueError(f"it is no msgpack record: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"it is no msgpack record: it holds a {type(record).__name__}, not a map of fields")
    return record


@cache
def _example_type() -> Any:
    """The message tf.train.Example, from its description in place of TensorFlow."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise UserError("tf.train.Example records need the package protobuf: pip install axrepro[data]") from None
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="axrepro/example.proto", package="axrepro", syntax="proto3")

    def message(among, name: str, label: int, **fields: int | str):
        """A message whose fields, all of this label, are numbered from 1; a str is the name of another message."""
        made = among.add(name=name)
        for number, (title, kind) in enumerate(fields.items(), start=1):
            one = made.field.add(name=title, number=number, label=label)
            if isinstance(kind, str):
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".axrepro.{kind}"
            else:
                one.type = kind
        return made

    top, single, repeated = file.message_type, kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    message(top, "BytesList", repeated, value=kinds.TYPE_BYTES)
    message(top, "FloatList", repeated, value=kinds.TYPE_FLOAT)
    message(top, "Int64List", repeated, value=kinds.TYPE_INT64)
    feature = message(top, "Feature", single, bytes_list="BytesList", float_list="FloatList", int64_list="Int64List")
    feature.oneof_decl.add(name="kind")
    for one in feature.field:
        one.oneof_index = 0
    features = message(top, "Features", repeated, feature="Features.FeatureEntry")
    entry = message(features.nested_type, "FeatureEntry", single, key=kinds.TYPE_STRING, value="Feature")
    entry.options.map_entry = True
    message(top, "Example", single, features="Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("axrepro.Example"))


def decode_example(data: bytes) -> Example:
    """A serialised tf.train.Example: float32[N] and int64[N] of any N, and bytes, or a list of them if not just one.

    Raises:
      ValueError: if it is no such message.
    """
    from google.protobuf.message import DecodeError

    try:
        features = _example_type().FromString(data).features.feature
    except DecodeError as error:
        raise ValueError(f"it is no tf.train.Example: {error}") from None
    record: Example = {}
    for name, feature in sorted(features.items()):
        kind = feature.WhichOneof("kind")
        if kind == "int64_list":
            record[name] = np.array(feature.int64_list.value, np.int64)
        elif kind == "float_list":
            record[name] = np.array(feature.float_list.value, np.float32)
        else:
            values = list(feature.bytes_list.value)
            record[name] = values[0] if len(values) == 1 else values
    return record


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return _array_kind(value.dtype, value.ndim)
    return "null" if value is None else type(value).__name__


@cache
def _array_kind(dtype: np.dtype, rank: int) -> str:
    return f"{dtype.name}[{', '.join('*' * rank)}]"


def _add_schema(schema: _Schema, kinds: dict[str, str] | _Schema, first: bool) -> None:
    """Adds the kinds of a record's fields, or of other records' fields, to a schema."""
    for name in schema.keys() | kinds.keys():
        new = kinds.get(name, "absent")
        known = schema.setdefault(name, set() if first else {"absent"})
        known |= {new} if isinstance(new, str) else new


@dataclass
class Shard:
    """What is known of a written shard.

    Attributes:
      records: how many.   payload: their encoded size.   size: bytes of the file.
      fields: the kinds of value of each field: int, str, int32[*] ..., absent.
      lengths: of each record's `tokens`; empty if the records have none.
    """

    records: int = 0
    payload: int = 0
    size: int = 0
    fields: _Schema = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, written: dict[str, Any]) -> "Shard":
        """From what `as_json` gave."""
        told: dict[str, Any] = {**written, "fields": {name: set(kinds) for name, kinds in written["fields"].items()}}
        return cls(**told)

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "fields": {name: sorted(kinds) for name, kinds in self.fields.items()}}

    def add(self, record: Example, encoded: bytes) -> None:
        """Counts one more record."""
        _add_schema(self.fields, {name: _kind(value) for name, value in record.items()}, first=not self.records)
        self.records += 1
        self.payload += len(encoded)
        tokens = record.get("tokens")
        if isinstance(tokens, list) or (isinstance(tokens, np.ndarray) and tokens.ndim == 1):
            self.lengths.append(len(tokens))


@dataclass(frozen=True, kw_only=True)
class Index:
    """What PREFIX.json says of the shards beside it.

    Attributes:
      records, sizes: records and bytes of the file, of each shard.
      payload: bytes of all records before compression.   tokens: in all records; None if they have no `tokens`.
      fields: the kinds of value that each field has, sorted.
      vocabulary: name and `fingerprint` of the one that made the tokens, or None.
      made_from: what the writer was given, as far as another output would follow from a change.
      counts: what became of the input: read, bad ...
    """

    records: tuple[int, ...]
    sizes: tuple[int, ...]
    payload: int
    tokens: int | None
    fields: dict[str, list[str]]
    vocabulary: dict[str, str] | None
    made_from: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    tool: str = f"axrepro {axrepro.__version__}"
    format: str = _FORMAT


def read_index(prefix: str) -> Index | None:
    """The index PREFIX.json; None if there is no such file, or it is something else.

    Raises:
      UserError: if it is malformed.
    """
    path = f"{prefix}.json"
    try:
        values = json.loads(Path(path).read_text())
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            return None
        told: dict[str, Any] = {**values, "records": tuple(values["records"]), "sizes": tuple(values["sizes"])}
        index = Index(**told)
        if len(index.records) != len(index.sizes) or not all(isinstance(n, int) for n in index.records + index.sizes):
            raise ValueError("it has another number of records than of sizes")
        if min(index.records + index.sizes, default=0) < 0 or not isinstance(index.fields, dict):
            raise ValueError("its numbers are below 0, or its fields no object")
        if index.vocabulary is not None and set(index.vocabulary) != {"name", "fingerprint"}:
            raise ValueError("its vocabulary is no name and fingerprint")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is no index of the shards beside it: {error}; write them anew") from None
    return index


@contextmanager
def whole(path: str) -> Iterator[str]:
    """Another name to write to, which becomes `path` when the block ends without an error, once it is on the disk.

    A killed process leaves the other name behind, which ends in `.incomplete`.

    Raises:
      UserError: if the folder cannot be written to.
    """
    folder, name = os.path.split(os.path.abspath(path))
    scratch = os.path.join(folder, f"{name}.{secrets.token_hex(4)}.incomplete")
    with _writing(path):
        os.makedirs(folder, exist_ok=True)
        Path(scratch).touch()
    try:
        yield scratch
        with _writing(path):
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())
            os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: str, values: dict) -> None:
    """Writes a JSON file whole or not at all."""
    with whole(path) as scratch, _writing(path):
        Path(scratch).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def require_absent(path: str) -> None:
    """Raises UserError if the file exists."""
    if os.path.exists(path):
        raise UserError(f"{path} exists, and is not overwritten; remove it or name another output")


class ArrayRecordWriter:
    """What `array_record_writer` gives. `shard` says what was written."""

    def __init__(self, path: str, scratch: str):
        self.shard = Shard()
        self._path = path
        self._writer = _array_record().ArrayRecordWriter(scratch, _WRITE)

    def write(self, record: Example, name: str | None = None) -> None:
        """Appends a record.

        Args:
          name: what an error calls it; None: its number in this file.
        Raises:
          BadRecord: if it has no encoding.
          UserError: if the disk is full.
        """
        try:
            encoded = encode(record)
        except ValueError as error:
            raise BadRecord(f"{name or f'record {self.shard.records} of {self._path}'}: {error}") from None
        with self._told():
            self._writer.write(encoded)
        self.shard.add(record, encoded)

    def close(self) -> None:
        """Writes the index of the file, without which it is none."""
        with self._told():
            self._writer.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UserError(f"cannot write {self._path}: {' '.join(str(error).split())[:200]}") from None


@contextmanager
def array_record_writer(path: str) -> Iterator[ArrayRecordWriter]:
    """A writer of one file of records, which exists once the block has ended without an error, and is complete then.

    Raises:
      UserError: if it exists already, or cannot be written.
    """
    require_absent(path)
    with whole(path) as scratch:
        writer = ArrayRecordWriter(path, scratch)
        yield writer
        writer.close()
        reader = _array_record().ArrayRecordReader(scratch, _READ)
        if not reader.ok() or reader.num_records() != writer.shard.records:
            raise UserError(f"cannot write {path}: its end did not reach the disk; is that full?")
        writer.shard.size = os.path.getsize(scratch)
        require_absent(path)


def write_shard(path: str, records: Iterable[Example]) -> Shard:
    """Writes one file of records, see `array_record_writer`."""
    with array_record_writer(path) as writer:
        for record in records:
            writer.write(record)
    return writer.shard


def read_shard(path: str) -> Shard:
    """What a complete file of records holds, by reading it all.

    Raises:
      UserError: if it is not one.
    """
    shard = Shard(size=os.path.getsize(path))
    reader = _open_reader(path)
    for number in range(reader.num_records()):
        encoded = _read(reader, path, number)
        shard.add(_decoded(decode, encoded, path, number), encoded)
    return shard


def write_index(
    prefix: str,
    shards: Sequence[Shard],
    vocabulary: tuple[str, str] | None = None,
    made_from: str = "",
    counts: dict[str, int] | None = None,
) -> Index:
    """Writes what lies beside complete shards: the lengths, where there are tokens, then PREFIX.json.

    Args:
      vocabulary: name and fingerprint of the one that made the tokens.
    Raises:
      UserError: if some records have `tokens` and others have none.
    """
    fields: _Schema = {}
    filled = [shard for shard in shards if shard.records]
    for number, shard in enumerate(filled):
        _add_schema(fields, shard.fields, first=number == 0)
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.array(shard.lengths, np.int64) for shard in shards)])
    records = sum(shard.records for shard in shards)
    if len(lengths) not in (0, records):
        raise UserError(f"only {len(lengths)} of the {records} records of {prefix} have a list of tokens")
    index = Index(
        records=tuple(shard.records for shard in shards),
        sizes=tuple(shard.size for shard in shards),
        payload=sum(shard.payload for shard in shards),
        tokens=int(lengths.sum()) if len(lengths) else None,
        fields={name: sorted(kinds) for name, kinds in fields.items()},
        vocabulary=None if vocabulary is None else dict(zip(("name", "fingerprint"), vocabulary, strict=True)),
        made_from=made_from,
        counts=counts or {},
    )
    if len(lengths):
        small = lengths.astype(np.min_scalar_type(int(lengths.max())))
        path = f"{prefix}.lengths.npy"
        with whole(path) as scratch, _writing(path), open(scratch, "wb") as file:
            np.save(file, small, allow_pickle=False)
    write_json(f"{prefix}.json", asdict(index))
    return index


def write_array_records(
    records: Sequence[Example] | Records, prefix: str, shards: int = 1, vocabulary: Vocabulary | None = None
) -> Index:
    """Writes records in their order to PREFIX-00000-of-... files of about equal counts, and the index beside them.

    `convert` does the same with transforms, and goes on where it was interrupted.

    Args:
      vocabulary: what made the `tokens` of the records, if they have any.
    Raises:
      UserError: if the index or a shard exists, or cannot be written.
    """
    require_absent(f"{prefix}.json")
    written = []
    for number in range(shards):
        bounds = range(len(records) * number // shards, len(records) * (number + 1) // shards)
        path = shard_path(prefix, number, shards, SUFFIX)
        written.append(write_shard(path, (records[index] for index in bounds)))
    return write_index(prefix, written, None if vocabulary is None else (vocabulary.name, vocabulary.fingerprint))


def _open_reader(path: str):
    if not os.path.exists(path):
        raise UserError(f"there is no file {path}")
    if not (size := os.path.getsize(path)):
        raise UserError(f"{path} is empty, which an ArrayRecord file never is; write or copy it anew")
    reader = _array_record().ArrayRecordReader(path, _READ, file_reader_buffer_size=_BUFFER)
    if not reader.ok():
        raise UserError(f"{path} ({size} bytes) is truncated or no ArrayRecord file; write or copy it anew")
    return reader


def _read(reader, path: str, number: int) -> bytes:
    try:
        return reader.read(number, number + 1)[0]
    except (RuntimeError, IndexError) as error:
        raise BadRecord(f"{path} (record {number}) is corrupt: {' '.join(str(error).split())[:160]}") from None


def _decoded(decode: Callable[[bytes], Example], data: bytes, path: str, number: int) -> Example:
    try:
        return decode(data)
    except UserError:
        raise
    except ValueError as error:
        raise BadRecord(f"{path} (record {number}): {error}") from None


class _Files(FileRecords):
    """See `ArrayRecords`. Readers are opened when they are first asked for, and are shared by threads."""

    def __init__(self, files, counts, split, holdout, decoder, schemas, lengths, vocabulary: tuple[str, str] | None):
        """
        Args:
          schemas: by file, the kinds that its fields may have, where an index tells them.
          lengths: int[N] of the tokens of all records of the files, if known.
          vocabulary: name and fingerprint of the one that made the tokens, if known.
        """
        super().__init__(files, counts, split, holdout)
        self._counts = counts
        self._vocabulary = vocabulary
        self._decode = decoder
        self._schemas = schemas
        self._sizes = None if lengths is None else self.taken(lengths).astype(np.int64)
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._readers, self._lock = {}, threading.Lock()

    @property
    def vocabulary(self) -> tuple[str, str] | None:
        return self._vocabulary

    @property
    def sizes(self) -> np.ndarray | None:
        return self._sizes

    def _reader(self, file: int):
        with self._lock:
            if file not in self._readers:
                while len(self._readers) >= _most_open():
                    self._readers.pop(next(iter(self._readers)))  # closes once no other thread reads from it
                reader = _open_reader(path := self.paths[file])
                if (found := reader.num_records()) != self._counts[file]:
                    raise UserError(f"{path} has {found} records, and its index says {self._counts[file]}")
                self._readers[file] = reader
            return self._readers[file]

    def _read(self, file: int, number: int) -> Example:
        reader = self._readers.get(file) or self._reader(file)
        path = self.paths[file]
        record = _decoded(self._decode, _read(reader, path, number), path, number)
        if schema := self._schemas.get(file):
            for name in schema.keys() | record.keys():
                kind = _kind(record[name]) if name in record else "absent"
                if kind not in (allowed := schema.get(name, ["absent"])):
                    raise BadRecord(
                        f"{path} (record {number}): the field {name!r} is {kind}, and the index of its shards says "
                        f"{' or '.join(allowed)}"
                    )
        return record


@cache
def _most_open() -> int:
    """Files that stay open: a quarter of what the process may have."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, most // 4) if most != resource.RLIM_INFINITY else 1 << 16


@dataclass(frozen=True)
class _BytesField:
    name: str

    def __call__(self, data: bytes) -> Example:
        return {self.name: data}


@dataclass(frozen=True)
class ArrayRecords(RecordFiles):
    """Records of ArrayRecord files, each looked up by itself; see `RecordFiles` for the other fields.

    Attributes:
      encoding: of a record: "msgpack", that of `write_array_records`; "example", a tf.train.Example; "bytes", anything.
      field: with "bytes", the name of the one field.
    """

    encoding: Encoding = "msgpack"
    field: str = "text"

    def __post_init__(self):
        super().__post_init__()
        require_choice(self, "encoding", Encoding)
        require(self, "field", self.field != "", "the name of a field")

    def _open(self, files: dict[str, str], split: Split, holdout: int) -> FileRecords:
        places = {path: shard_of(path) for path in files}
        indices: dict[str, Index | None] = {}
        if self.encoding == "msgpack":
            indices = {prefix: read_index(prefix) for prefix in sorted({s[0] for s in places.values() if s})}
        by = {
            (index.vocabulary["name"], index.vocabulary["fingerprint"]): prefix
            for prefix, index in indices.items()
            if index and index.vocabulary
        }
        if len(by) > 1:
            raise UserError(f"the tokens of {' and '.join(by.values())} were made with different vocabularies")
        known: dict[str, int] = {}
        schemas: dict[int, dict[str, list[str]]] = {}
        lengths: list[np.ndarray] | None = []
        every = {prefix: _lengths(prefix, index) for prefix, index in indices.items() if index is not None}
        for file, (path, place) in enumerate(places.items()):
            index = indices.get(place[0]) if place else None
            if place is None or index is None:
                lengths = None
                continue
            prefix, number, count, _ = place
            self._check(prefix, index, path, number, count)
            known[path], schemas[file] = index.records[number], index.fields
            start = sum(index.records[:number])
            if lengths is not None and (all_lengths := every[prefix]) is not None:
                lengths.append(all_lengths[start : start + known[path]])
            else:
                lengths = None
        with ThreadPoolExecutor(16) as pool:
            unknown = [path for path in files if path not in known]
            known |= dict(zip(unknown, pool.map(_count, unknown), strict=True))
        decoder = {"msgpack": decode, "example": decode_example, "bytes": _BytesField(self.field)}[self.encoding]
        sizes = np.concatenate(lengths) if lengths else None
        return _Files(
            files, [known[path] for path in files], split, holdout, decoder, schemas, sizes, next(iter(by), None)
        )

    def _check(self, prefix: str, index: Index, path: str, number: int, count: int) -> None:
        """Raises UserError if a shard is not the one that its index tells of."""
        if len(index.records) != count:
            raise UserError(f"{prefix}.json is the index of {len(index.records)} shards, and {path} is one of {count}")
        if (size := os.path.getsize(path)) != (told := index.sizes[number]):
            how = "truncated" if size < told else "another file than the one that was written"
            raise UserError(f"{path} has {size} bytes, and {prefix}.json says {told}: it is {how}; copy it anew")


def _count(path: str) -> int:
    return _open_reader(path).num_records()


def _lengths(prefix: str, index: Index) -> np.ndarray | None:
    """The lengths of the tokens of all records of an index."""
    if index.tokens is None:
        return None
    path = f"{prefix}.lengths.npy"
    try:
        lengths = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the lengths {path}: {error}; copy it anew") from None
    expected = sum(index.records)
    if lengths.shape != (expected,) or lengths.dtype.kind != "u" or int(lengths.sum(dtype=np.int64)) != index.tokens:
        raise UserError(
            f"{path} holds {lengths.dtype}{list(lengths.shape)}, which does not fit the {expected} records with "
            f"{index.tokens} tokens of {prefix}.json; copy it anew"
        )
    return lengths
