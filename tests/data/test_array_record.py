"""ArrayRecord files: what is written comes back, whole or not at all, and an error names the file and the record."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from axrepro.data import Bytes, Text
from axrepro.data.records import BadRecord
from axrepro.data.sources.array_record import (
    ArrayRecords,
    decode,
    decode_example,
    encode,
    write_array_records,
    write_shard,
)
from axrepro.errors import UserError

pytest.importorskip("array_record", reason="needs the extra data")

RNG = np.random.default_rng(0)
# bytes that do not compress, so that most of a file is data and a flipped byte hits it
RECORDS = [
    {"tokens": RNG.integers(0, 60000, i % 7).astype(np.uint16), "text": f"{i}", "blob": RNG.bytes(400), "score": i / 2}
    for i in range(400)
]


def same(a, b) -> bool:
    """Whether two values of records are the same, types and all."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_array_records(RECORDS, f"{folder}/all", shards=4, vocabulary=Bytes())
    return folder


@pytest.fixture
def copy(written, tmp_path):
    """The written files, to be spoilt."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    "value",
    [
        None, True, -(2**63), 2**64 - 1, 1.5, float("nan"), "é\x00", b"\xff\x00", [1, ["a", None]], {"a": {"b": b""}},
        np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::2], np.zeros((0, 5), np.float16), np.array(3, np.uint8),
        np.array([True, False]), np.arange(3, dtype=">i4").astype("<i4"), [np.arange(2), np.arange(3.0)],
    ],
)  # fmt: skip
def test_every_kind_of_value_comes_back_as_it_was(value):
    assert same(decode(encode({"a": value, "b": 1})), {"a": value, "b": 1})


def test_numpy_scalars_become_numbers_tuples_lists_and_bytes_are_little_endian():
    got = decode(encode({"a": np.float32(0.5), "b": (1, np.int8(2)), "c": np.arange(3, dtype=">i2")}))
    assert same(got, {"a": 0.5, "b": [1, 2], "c": np.arange(3, dtype="<i2")})


@pytest.mark.parametrize("value", [object(), np.array([None]), np.array(["a"]), 2**64, {1, 2}, np.zeros(2, complex)])
def test_what_has_no_encoding_is_refused_by_record(value, tmp_path):
    with pytest.raises(BadRecord, match=r"record 1 of .*a\.array_record"):
        write_shard(f"{tmp_path}/a.array_record", [{"a": 1}, {"a": value}])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x01", b"\x81\xa1a", encode({"a": 1}) + b"x", b"\x81\xa1a\xc7\x01\x07x"]
)
def test_foreign_bytes_are_no_record(data):
    with pytest.raises(ValueError, match="it is no msgpack record"):
        decode(data)


def test_decoding_makes_no_objects_from_types_of_the_file():
    msgpack = pytest.importorskip("msgpack")
    for dtype in ("|O", "<U1", "|V8"):
        array = msgpack.ExtType(1, msgpack.packb((dtype, (1,), b"12345678")))
        with pytest.raises(ValueError, match="no msgpack record"):
            decode(msgpack.packb({"a": array}))


def test_shards_hold_all_records_in_order_and_the_index_tells_of_them(written):
    records = ArrayRecords(f"{written}/all-*", holdout=0).open("train")
    assert all(map(same, records, RECORDS))
    index = json.loads((written / "all.json").read_text())
    assert index["records"] == [100] * 4
    assert index["sizes"] == [os.path.getsize(path) for path in sorted(written.glob("all-*"))]
    assert index["tokens"] == sum(len(record["tokens"]) for record in RECORDS)
    assert index["payload"] == sum(len(encode(record)) for record in RECORDS)
    assert index["fields"] == {"blob": ["bytes"], "score": ["float"], "text": ["str"], "tokens": ["uint16[*]"]}
    assert index["vocabulary"] == {"name": "bytes", "fingerprint": Bytes().fingerprint}
    assert records.name(101).endswith("all-00001-of-00004.array_record (record 1)")


def test_writing_twice_gives_the_same_bytes(written, tmp_path):
    write_array_records(RECORDS, f"{tmp_path}/all", shards=4, vocabulary=Bytes())
    for path in written.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(tmp_path.iterdir())) == len(list(written.iterdir()))


def test_splits_share_nothing_lose_nothing_and_know_their_sizes(written, tmp_path):
    source = ArrayRecords(f"{written}/all-*", holdout=5)
    splits = {split: source.open(split) for split in ("train", "eval")}
    texts = {split: [record["text"] for record in records] for split, records in splits.items()}
    assert sorted(texts["train"] + texts["eval"]) == sorted(record["text"] for record in RECORDS)
    assert 40 < len(texts["eval"]) < 130
    for records in splits.values():
        assert records.sizes.tolist() == [len(record["tokens"]) for record in records]
        assert records.sizes.dtype == np.int64
    elsewhere = shutil.copytree(written, tmp_path / "elsewhere")
    assert [r["text"] for r in ArrayRecords(f"{elsewhere}/*.array_record", holdout=5).open("eval")] == texts["eval"]


def test_eval_pattern_takes_its_files_out_of_train(written):
    source = ArrayRecords(f"{written}/all-*", eval_pattern=f"{written}/all-00002*")
    assert all(map(same, source.open("eval"), RECORDS[200:300]))
    assert all(map(same, source.open("train"), RECORDS[:200] + RECORDS[300:]))
    assert source.open("eval").sizes.tolist() == [len(record["tokens"]) for record in RECORDS[200:300]]


def test_an_empty_split_is_refused(written):
    with pytest.raises(UserError, match=r"ArrayRecords .* has 400 documents.*holdout=0 none is in the eval split"):
        ArrayRecords(f"{written}/all-*", holdout=0).open("eval")


def test_threads_and_pickled_copies_see_the_same_records(written):
    records = ArrayRecords(f"{written}/all-*", holdout=0).open("train")
    copies = [records, pickle.loads(pickle.dumps(records))]
    order = np.random.default_rng(1).permutation(np.tile(np.arange(400), 5)).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda job: same(copies[job[0] % 2][job[1]], RECORDS[job[1]]), enumerate(order)))
    for index in (-1, 400):
        with pytest.raises(IndexError):
            records[index]


def test_more_files_than_may_be_open_are_read(written, monkeypatch):
    monkeypatch.setattr("axrepro.data.sources.array_record._most_open", lambda: 2)
    records = ArrayRecords(f"{written}/all-*", holdout=0).open("train")
    for index in (0, 100, 200, 300, 1, 101, 201, 301):
        assert same(records[index], RECORDS[index])
    assert len(records._readers) == 2


def test_every_flipped_byte_is_told_or_harmless_and_spoils_one_record(copy):
    path, spoilt = copy / "all-00001-of-00004.array_record", 0
    whole = path.read_bytes()
    for place in range(1000, 40000, 6501):
        flip(path, place)
        records = ArrayRecords(f"{copy}/all-*", holdout=0).open("train")
        bad = []
        for index, record in enumerate(RECORDS):
            try:
                assert same(records[index], record)
            except BadRecord as error:
                bad.append((index, str(error)))
        assert len(bad) <= 1
        assert all(f"{path} (record {index - 100}) is corrupt" in error for index, error in bad)
        spoilt += len(bad)
        path.write_bytes(whole)
    assert spoilt >= 5


@pytest.mark.parametrize("keep", [0, 100, 70000, -1])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_shard_is_named(copy, keep, indexed):
    path = copy / "all-00001-of-00004.array_record"
    path.write_bytes(path.read_bytes()[:keep])
    if not indexed:
        (copy / "all.json").unlink()
    told = "is truncated" if indexed or keep else "is empty"
    with pytest.raises(UserError, match=rf"all-00001-of-00004\.array_record.*{told}"):
        ArrayRecords(f"{copy}/all-*").open("train")


def test_a_missing_shard_is_named(copy):
    (copy / "all-00002-of-00004.array_record").unlink()
    with pytest.raises(UserError, match=r"of the 4 shards .*all-00002-of-00004\.array_record is missing"):
        ArrayRecords(f"{copy}/all-*").open("train")


def test_a_file_that_is_something_else_is_named(tmp_path):
    (tmp_path / "a.array_record").write_bytes(b"text\n" * 50000)
    with pytest.raises(UserError, match=r"a\.array_record .* is truncated or no ArrayRecord file"):
        ArrayRecords(f"{tmp_path}/*").open("train")


def test_lengths_that_do_not_fit_are_named(copy):
    lengths = np.load(copy / "all.lengths.npy")
    for wrong in (lengths[:-1], lengths + 1, lengths.astype(float), np.array([{}])):
        np.save(copy / "all.lengths.npy", wrong)
        with pytest.raises(UserError, match=r"all\.lengths\.npy"):
            ArrayRecords(f"{copy}/all-*").open("train")
    (copy / "all.lengths.npy").unlink()
    with pytest.raises(UserError, match=r"cannot read the lengths .*all\.lengths\.npy"):
        ArrayRecords(f"{copy}/all-*").open("train")


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": "bytes"},
        {"vocabulary": {"name": "bytes"}},
        {"fields": ["tokens"]},
        {"records": [-1, 1], "sizes": [1, 1]},
    ],
)
def test_an_index_of_another_schema_is_named(tmp_path, change):
    write_array_records([{"text": "a"}], str(tmp_path / "a"))
    index = tmp_path / "a.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
    with pytest.raises(UserError, match=r"a\.json is no index of the shards"):
        ArrayRecords(str(tmp_path / "a-*"), holdout=0).open("train")


def test_the_index_of_other_shards_is_named(copy):
    index = json.loads((copy / "all.json").read_text())
    for change in ({"records": [1]}, {"sizes": index["sizes"][:3]}, {"records": None}, {"unknown": 1}):
        (copy / "all.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match=r"all\.json is no index"):
            ArrayRecords(f"{copy}/all-*").open("train")
    (copy / "all.json").write_text("{")
    with pytest.raises(UserError, match=r"all\.json is no index"):
        ArrayRecords(f"{copy}/all-*").open("train")
    (copy / "all.json").write_text(json.dumps({**index, "records": [99, 101, 100, 100]}))
    with pytest.raises(UserError, match=r"all-00000-of-00004\.array_record has 100 records, and its index says 99"):
        ArrayRecords(f"{copy}/all-*", holdout=0).open("train")[0]


def test_a_record_of_another_schema_is_named(copy):
    path = copy / "all-00001-of-00004.array_record"
    for other in ({"text": 1}, {"text": "a", "more": 1}, {"tokens": np.zeros(3, np.int64)}, {"tokens": 1}):
        path.unlink()
        write_shard(str(path), [{**RECORDS[0], **other}] * 100)
        index = json.loads((copy / "all.json").read_text())
        index["sizes"][1] = path.stat().st_size
        (copy / "all.json").write_text(json.dumps(index))
        records = ArrayRecords(f"{copy}/all-*", holdout=0).open("train")
        assert same(records[0], RECORDS[0])
        with pytest.raises(BadRecord, match=r"all-00001-of-00004\.array_record \(record 7\): the field '\w+' is "):
            records[107]


class Other(Bytes):
    fingerprint = "other"


def test_a_foreign_vocabulary_is_refused(written, tmp_path, unchecked):
    text = Text(batch_size=1, sequence_length=8, source=ArrayRecords(f"{written}/all-*"))
    assert text.source.open("train").vocabulary == ("bytes", Bytes().fingerprint)
    text.open("train", 0)
    with pytest.raises(UserError, match=r"the tokens of .*all.* were made with the vocabulary bytes .* not with bytes"):
        replace(text, vocabulary=Other()).open("train", 0)
    write_array_records(RECORDS, f"{tmp_path}/other", vocabulary=Other())
    with pytest.raises(UserError, match=r"other and .*all were made with different vocabularies"):
        ArrayRecords((f"{written}/all-*", f"{tmp_path}/other-*")).open("train")


def broken():
    yield {"a": 1}
    raise RuntimeError("planted")


def test_nothing_is_overwritten_and_a_failed_write_leaves_nothing(tmp_path):
    path = f"{tmp_path}/a.array_record"
    write_shard(path, [{"a": 1}])
    before = Path(path).read_bytes()
    with pytest.raises(UserError, match=r"a\.array_record exists, and is not overwritten"):
        write_shard(path, [{"a": 2}])
    assert Path(path).read_bytes() == before
    with pytest.raises(RuntimeError, match="planted"):
        write_shard(f"{tmp_path}/b.array_record", broken())
    with pytest.raises(UserError, match=r"cannot write .*/a\.array_record/b"):
        write_shard(f"{path}/b", [{"a": 1}])
    assert os.listdir(tmp_path) == ["a.array_record"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    code = (
        "import os, resource, signal, sys\n"
        "from axrepro.data.sources.array_record import write_shard\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "write_shard(sys.argv[1], ({'a': os.urandom(1000)} for _ in range(1000)))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, f"{tmp_path}/a"], capture_output=True, text=True, cwd=root)
    assert "UserError: cannot write" in done.stderr
    assert done.returncode == 1
    assert not os.listdir(tmp_path)


def test_records_with_optional_fields_say_so_and_tokens_are_in_all_or_none(tmp_path):
    index = write_array_records([{"a": 1}, {"a": None, "b": "x"}, {"a": 2}], f"{tmp_path}/a", shards=2)
    assert index.fields == {"a": ["int", "null"], "b": ["absent", "str"]}
    assert [set(record) for record in ArrayRecords(f"{tmp_path}/a-*", holdout=0).open("train")] == [
        {"a"},
        {"a", "b"},
        {"a"},
    ]
    with pytest.raises(UserError, match=r"only 1 of the 2 records of .* have a list of tokens"):
        write_array_records([{"tokens": np.arange(2)}, {"a": 1}], f"{tmp_path}/b")


def test_foreign_records_are_bytes_or_tensorflow_examples(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def field(number: int, payload: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(payload)) + payload

    def feature(name: str, kind: int, value: bytes) -> bytes:  # by hand, from the encoding that protobuf documents
        return field(1, field(1, name.encode()) + field(2, field(kind, value)))

    ids = varint(5) + varint(300) + varint(2**64 - 1)
    example = field(
        1,
        feature("ids", 3, field(1, ids))
        + feature("text", 1, field(1, b"\xffhello"))
        + feature("two", 1, field(1, b"a") + field(1, b""))
        + feature("x", 2, field(1, np.array([0.5, -1], "<f4").tobytes())),
    )
    expected = {"ids": np.array([5, 300, -1]), "text": b"\xffhello", "two": [b"a", b""], "x": np.array([0.5, -1], "f4")}
    assert same(decode_example(example), expected)
    writer = ArrayRecordWriter(f"{tmp_path}/a.array_record-00000-of-00001", "group_size:1")
    writer.write(example)
    writer.write(example[:-1])
    writer.close()
    pattern = f"{tmp_path}/a.array_record*"
    raw = ArrayRecords(pattern, holdout=0, encoding="bytes", field="raw").open("train")
    assert [record["raw"] for record in raw] == [example, example[:-1]]
    assert raw.sizes is None
    records = ArrayRecords(pattern, holdout=0, encoding="example").open("train")
    assert same(records[0], expected)
    with pytest.raises(BadRecord, match=r"\(record 1\): it is no tf\.train\.Example"):
        records[1]
    with pytest.raises(BadRecord, match=r"\(record 0\): it is no msgpack record"):
        ArrayRecords(pattern, holdout=0).open("train")[0]


def test_neither_tensorflow_nor_grain_is_imported(written):
    code = (
        "import sys\n"
        "from axrepro.data.sources.array_record import ArrayRecords, _example_type\n"
        "_example_type()\n"
        "next(iter(ArrayRecords(sys.argv[1]).open('train')))\n"
        "print([name for name in ('tensorflow', 'grain') if name in sys.modules])\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, f"{written}/all-*"], capture_output=True, text=True, cwd=root)
    assert done.stdout == "[]\n", done.stderr
