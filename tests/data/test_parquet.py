"""Parquet files: every row is a record, and an error names the file, the column or the row."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from axrepro.data.records import BadRecord
from axrepro.data.sources.parquet import Parquet
from axrepro.errors import UserError

pa = pytest.importorskip("pyarrow", reason="needs the extra data")
pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")

RNG = np.random.default_rng(0)


def row(i: int) -> dict:
    return {
        "text": f"row {i}",
        "ids": list(range(i % 5)),
        "vectors": [[i + 0.5, -1.0, 2.0]] * (i % 3),
        "words": ["a"] * (i % 2),
        "ragged": [[1], [2, 3]],
        "image": {"bytes": RNG.bytes(300), "path": None},
        "label": None if i % 7 == 0 else i,
    }


SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("vectors", pa.large_list(pa.list_(pa.float32(), 3))),
        ("words", pa.list_(pa.string())),
        ("ragged", pa.list_(pa.list_(pa.int64()))),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
    ]
)
ROWS = [row(i) for i in range(250)]


def write(path: Path, rows: list[dict], schema=SCHEMA, group: int = 30) -> None:
    # checksums, and no dictionaries or compression: a flipped byte is then in one page, and is found
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(
        table, path, row_group_size=group, write_page_checksum=True, compression="none", use_dictionary=False
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for file in range(2):
        write(folder / f"all-0000{file}-of-00002.parquet", ROWS[125 * file : 125 * file + 125])
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_rows_come_back_and_lists_of_numbers_are_arrays(written):
    records = Parquet(f"{written}/*", holdout=0).open("train")
    assert len(records) == 250
    for index in (0, 1, 29, 30, 124, 125, 126, 249, 7):
        record, expected = records[index], ROWS[index]
        assert {n: record[n] for n in ("text", "words", "image", "label")} == {
            n: expected[n] for n in ("text", "words", "image", "label")
        }
        assert record["ids"].dtype == np.int32
        assert record["ids"].tolist() == expected["ids"]
        assert (record["vectors"].dtype, record["vectors"].shape) == (np.float32, (index % 3, 3))
        assert record["vectors"].tolist() == expected["vectors"]
        assert [part.tolist() for part in record["ragged"]] == expected["ragged"]
        assert all(part.dtype == np.int64 for part in record["ragged"])
    assert records.name(126).endswith("all-00001-of-00002.parquet (record 1)")


def test_blocks_are_the_row_groups_less_what_is_held_out(written):
    records = Parquet(f"{written}/*", holdout=0).open("train")
    assert records.blocks.tolist() == [0, 30, 60, 90, 120, 125, 155, 185, 215, 245, 250]
    splits = [Parquet(f"{written}/*", holdout=4, columns=("text",)).open(split) for split in ("train", "eval")]
    texts = []
    for records in splits:
        assert (records.blocks[0], records.blocks[-1]) == (0, len(records))
        for start, stop in zip(records.blocks[:-1], records.blocks[1:], strict=True):
            block = [records[index]["text"] for index in range(start, stop)]
            number = [int(text.split()[1]) for text in block]
            assert len({(n // 125, n % 125 // 30) for n in number}) == 1, "one row group, not empty"
            texts += block
    assert sorted(texts) == sorted(record["text"] for record in ROWS)


def test_a_thread_decodes_a_block_once_and_keeps_two(written, monkeypatch):
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda s, g, **k: read.append(g) or original(s, g, **k))
    records = Parquet(f"{written}/*", holdout=0, columns=("ids", "text")).open("train")
    assert [list(record) for record in records] == [["ids", "text"]] * 250
    assert read == [0, 1, 2, 3, 4] * 2
    read.clear()
    for index in (0, 30, 0, 30, 60, 0):
        records[index]
    assert read == [0, 1, 2, 0]
    assert len(records._local.groups) == 2


def test_threads_and_pickled_copies_see_the_same_rows(written):
    records = Parquet(f"{written}/*", holdout=0, columns=("text",)).open("train")
    copies = [records, pickle.loads(pickle.dumps(records))]
    order = np.random.default_rng(1).permutation(250).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda job: copies[job[0] % 2][job[1]] == {"text": f"row {job[1]}"}, enumerate(order)))


def test_files_that_differ_in_columns_are_named_with_the_columns(copy):
    write(
        copy / "all-00001-of-00002.parquet",
        [{"text": 1, "ids": [1]}],
        pa.schema([("text", pa.int64()), SCHEMA.field(1)]),
    )
    told = r"all-00000-of-00002.parquet and .*all-00001-of-00002.parquet differ in columns \(.*text: string and int64"
    with pytest.raises(UserError, match=told):
        Parquet(f"{copy}/*").open("train")
    with pytest.raises(UserError, match=told):
        Parquet(f"{copy}/*", columns=("text", "ids")).open("train")
    assert Parquet(f"{copy}/*", columns=("ids",), holdout=0).open("train")[125]["ids"].tolist() == [1]


def test_a_missing_column_or_shard_is_named(copy):
    with pytest.raises(UserError, match=r"all-00000-of-00002\.parquet has no column 'txt'; did you mean 'text'"):
        Parquet(f"{copy}/*", columns=("txt",)).open("train")
    (copy / "all-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"all-00000-of-00002\.parquet is missing"):
        Parquet(f"{copy}/*").open("train")


@pytest.mark.parametrize("data", [b"", b"text" * 100, None])
def test_a_file_without_a_footer_is_named(copy, data):
    path = copy / "all-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-9] if data is None else data)
    with pytest.raises(UserError, match=r"cannot read .*all-00001-of-00002\.parquet: "):
        Parquet(f"{copy}/*").open("train")


def test_a_corrupt_page_spoils_its_row_group_and_is_named(copy):
    path = copy / "all-00001-of-00002.parquet"
    data = bytearray(path.read_bytes())
    data[data.find(b"row 160")] ^= 0xFF
    path.write_bytes(data)
    records = Parquet(f"{copy}/*", holdout=0, columns=("text",)).open("train")
    bad = []
    for index in range(250):
        try:
            assert records[index] == {"text": f"row {index}"}
        except BadRecord as error:
            bad.append((index, str(error)))
    assert [index for index, _ in bad] == list(range(155, 185))
    assert all(f"{path} (record {index - 125}) in its row group 1" in error for index, error in bad)


def test_an_empty_row_group_or_file_is_none(tmp_path):
    write(tmp_path / "a.parquet", [])
    with pytest.raises(UserError, match="has no documents"):
        Parquet(f"{tmp_path}/*").open("train")
    write(tmp_path / "b.parquet", ROWS[:40])
    records = Parquet(f"{tmp_path}/*", holdout=0, columns=("text",)).open("train")
    assert records.blocks.tolist() == [0, 30, 40]
    assert records[39] == {"text": "row 39"}
