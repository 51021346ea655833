"""Any records as ArrayRecord shards: nothing is lost, and a restart ends as one call would have."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from counting import Counting

from axrepro.data import Bytes, Feature, JsonLines, Pipeline, Text
from axrepro.data.__main__ import main as command
from axrepro.data.records import BadRecord, Records
from axrepro.data.sources.array_record import ArrayRecords, write_shard
from axrepro.data.tools.convert import convert, examples_of
from axrepro.errors import UserError

pytest.importorskip("array_record", reason="needs the extra data")

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [{"text": f"text {i} é", "number": i} for i in range(100)]


def main(argv: list[str]) -> int:
    return command(["convert", *argv])


def read(prefix, **fields):
    return list(ArrayRecords(f"{prefix}-*", holdout=0, **fields).open("train"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def add_one(example, rng):
    return {**example, "number": example["number"] + 1, "drawn": int(rng.integers(1000))}


def refuse_odd(example, rng):
    if example["number"] % 2:
        raise ValueError("it is odd")
    return example


def test_records_keep_their_order_and_transforms_apply(tmp_path):
    index = convert(RECORDS, f"{tmp_path}/a", shards=3, transforms=(add_one,), vocabulary=Bytes())
    assert index.counts == {"read": 100, "bad": 0, "written": 100}
    assert index.records == (33, 33, 34)
    records = read(f"{tmp_path}/a")
    assert [record["number"] for record in records] == list(range(1, 101))
    assert [Bytes().decode(record["tokens"]) for record in records] == [record["text"] for record in RECORDS]
    assert set(records[0]) == {"number", "drawn", "tokens"}
    assert index.tokens == sum(len(record["text"].encode()) for record in RECORDS)
    assert len({record["drawn"] for record in records}) > 50


def test_tokens_that_are_written_again_keep_their_vocabulary(tmp_path):
    convert(RECORDS, f"{tmp_path}/a", vocabulary=Bytes())
    index = convert(ArrayRecords(f"{tmp_path}/a-*", holdout=0).open("train"), f"{tmp_path}/b", shards=2)
    assert index.vocabulary == {"name": "bytes", "fingerprint": Bytes.fingerprint}


def test_more_shards_than_records_leave_some_empty(tmp_path):
    index = convert(RECORDS[:2], f"{tmp_path}/a", shards=5, vocabulary=Bytes())
    assert index.records == (0, 0, 1, 0, 1)
    assert len(read(f"{tmp_path}/a")) == 2


def test_a_stream_is_dealt_out_to_the_shards_in_one_pass(tmp_path):
    index = convert(iter(RECORDS), f"{tmp_path}/a", shards=3)
    assert index.records == (34, 33, 33)
    assert read(f"{tmp_path}/a") == RECORDS[0::3] + RECORDS[1::3] + RECORDS[2::3]


def test_bad_records_are_named_counted_and_limited(tmp_path):
    with pytest.raises(BadRecord, match="record 1: it is odd"):
        convert(RECORDS, f"{tmp_path}/a", transforms=(refuse_odd,))
    index = convert(RECORDS, f"{tmp_path}/b", shards=2, transforms=(refuse_odd,), max_bad_records=50)
    assert index.counts == {"read": 100, "bad": 50, "written": 50}
    assert read(f"{tmp_path}/b") == RECORDS[::2]
    with pytest.raises(UserError, match="50 bad records, and max_bad_records=49"):
        convert(RECORDS, f"{tmp_path}/c", transforms=(refuse_odd,), max_bad_records=49)
    with pytest.raises(BadRecord, match="record 0: it has no field 'txt' to tokenise; did you mean 'text'"):
        convert(RECORDS, f"{tmp_path}/d", vocabulary=Bytes(), text_field="txt")
    with pytest.raises(BadRecord, match="record 0: a set cannot be written"):
        convert([{"a": {1}}], f"{tmp_path}/e")


class Watched(Records):
    """`RECORDS`, and which of them were read; from `end` on there is an error."""

    def __init__(self, end: int = 100):
        self.end, self.read = end, []

    def __len__(self):
        return len(RECORDS)

    def name(self, index):
        return f"record {index}"

    def __getitem__(self, index):
        if index >= self.end:
            raise KeyboardInterrupt
        self.read.append(index)
        return RECORDS[index]


def test_a_restart_writes_what_is_missing_and_ends_as_one_call_would_have(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = {"shards": 4, "transforms": (add_one,), "vocabulary": Bytes(), "made_from": "these"}
    index = convert(Watched(), f"{whole}/a", **arguments)
    with pytest.raises(KeyboardInterrupt):
        convert(Watched(end=60), f"{broken}/a", **arguments)
    assert sorted(contents(broken)) == ["a-00000-of-00004.array_record", "a-00001-of-00004.array_record", "a.plan.json"]
    for change in ({"shards": 5}, {"vocabulary": None}, {"transforms": ()}, {"made_from": "those"}):
        with pytest.raises(
            UserError, match=f"was begun with another {'input' if 'made_from' in change else min(change)}"
        ):
            convert(RECORDS, f"{broken}/a", **{**arguments, **change})
    again = Watched()
    assert convert(again, f"{broken}/a", **arguments) == index
    assert again.read == list(range(50, 100))
    assert contents(broken) == contents(whole)
    assert convert(Watched(), f"{broken}/a", **arguments) == index
    with pytest.raises(UserError, match=r"a\.json exists, and is not overwritten"):
        convert(RECORDS, f"{broken}/a", **{**arguments, "shards": 5})


def test_files_of_someone_else_are_not_taken_for_finished_shards(tmp_path):
    write_shard(f"{tmp_path}/a-00001-of-00002.array_record", [{"a": 1}])
    with pytest.raises(UserError, match=r"a-00001-of-00002\.array_record exists, and is not overwritten"):
        convert(RECORDS, f"{tmp_path}/a", shards=2)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path):
    """In children of a process that has loaded everything: kill -9 while the n-th shard is being written."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS * 20))
    code = f"""
import glob, os, time
import array_record.python.array_record_module, axrepro.data.tools.convert, msgpack
from axrepro.data.__main__ import main
flags = ["--input={tmp_path}/in.jsonl", "--shards=8", "--vocabulary=bytes"]
def child(folder):
    if pid := os.fork():
        return pid
    os._exit(main(["convert", *flags, f"--output={tmp_path}/{{folder}}/a"]))
def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
codes = [ended(child("whole"))]
for shards in (0, 1, 3, 3, 6):
    pid = child("killed")
    while len(glob.glob("{tmp_path}/killed/a-*.array_record")) < shards:
        time.sleep(0.001)
    os.kill(pid, 9)
    codes.append(ended(pid))
print(codes[0], codes.count(-9), ended(child("killed")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    whole, kills, end = done.stdout.split()[-3:]
    assert (whole, int(kills) > 2, end) == ("0", True, "0"), done.stdout + done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "parquet", "array_record"])
def test_the_command_reads_files_by_their_ending(tmp_path, capsys, kind):
    path = tmp_path / f"in.{kind}"
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    expected = RECORDS
    if kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "txt":
        path.write_text("text")
        expected = [{"text": b"text"}]
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        write_shard(str(path), RECORDS)
    assert main([f"--input={path}", f"--output={tmp_path}/out"]) == 0
    out = capsys.readouterr().out
    assert f"{len(expected)} read, 0 bad, {len(expected)} written" in out
    assert read(f"{tmp_path}/out") == expected


def test_the_command_tells_wrong_arguments_in_one_line(tmp_path, capsys):
    output = f"--output={tmp_path}/out"
    for flags, told in (
        ([output], "give one of --input=GLOB and --experiment=NAME"),
        (["--input=a.txt"], "--output"),
        (["--input=a.csv", output], "does not tell the kind of its files"),
        ([f"--input={__file__}", "--format=text", output, "--shards=0"], "shards=0 must be at least 1"),
        (["--input=a.txt", output, "--shards=x"], "invalid int value"),
        ([f"--input={tmp_path}/none.txt", output], "no file matches"),
        ([f"--input={__file__}", output, "--format=text", "--vocabulary=none.model"], "none.model"),
        (["--experiment=moe_tin", output], "no experiment 'moe_tin'"),
    ):
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_the_rows_of_a_stream_are_converted_for_a_pipeline_to_look_up(tmp_path):
    stream = Counting(batch_size=4, shards=2)
    index = convert(examples_of(stream, "train"), f"{tmp_path}/rows", shards=2)
    assert index.counts == {"read": 8, "bad": 0, "written": 8}
    features = tuple(Feature(name=name, shape=(4,), dtype="int32") for name in ("tokens", "segment_ids"))
    data = Pipeline(batch_size=4, source=ArrayRecords(f"{tmp_path}/rows-*", holdout=0), features=features)
    rows = data.open("train", 0).rows(np.arange(8))
    expected = [row["tokens"].tolist() for shard in range(2) for row in stream.examples("train", 0, 0, shard)]
    assert sorted(rows["tokens"].tolist()) == sorted(expected)
    assert rows["segment_ids"].all()
    assert len(list(examples_of(stream, "train", 3))) == 3


def test_a_stream_without_end_needs_a_number():
    class Endless(Counting):
        def endless(self, split):
            return True

    with pytest.raises(UserError, match=r"train split of Endless has no end; .*--examples=N"):
        examples_of(Endless(batch_size=4), "train")


def test_the_source_of_an_experiment_is_converted(tmp_path, capsys):
    assert main(["--experiment=moe_tiny", "--split=eval", f"--output={tmp_path}/out", "--vocabulary=bytes"]) == 0
    records = read(f"{tmp_path}/out")
    assert len(records) > 10
    assert all(isinstance(record["tokens"], np.ndarray) for record in records)


def test_converted_tokens_train_as_the_text_they_came_from(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert main([f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out", "--vocabulary=bytes", "--shards=3"]) == 0
    sources = JsonLines(f"{tmp_path}/in.jsonl", holdout=0), ArrayRecords(f"{tmp_path}/out-*", holdout=0)
    text, tokens = (Text(source=s, batch_size=2, sequence_length=16).open("train", seed=3) for s in sources)
    assert len(text) == len(tokens)
    rows = np.arange(2 * len(text) + 3)
    for name, expected in text.rows(rows).items():
        np.testing.assert_array_equal(tokens.rows(rows)[name], expected, err_msg=name)
