"""Sources: which documents there are, which are held out, and that an error names the file."""

import gzip
import json
import os
import pickle
import subprocess
import sys

import pytest
import zstandard

from axrepro.core import UserError
from axrepro.core.config import override
from axrepro.data import BadRecord, FromFunction, JsonLines, PythonStdlib, TextFiles
from axrepro.data.sources import files
from axrepro.data.sources.files import find_files


def contents(source, split):
    return [record["text"] for record in source.open(split)]


def write(folder, name, content: bytes):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.fixture
def corpus(tmp_path):
    for i in range(60):
        write(tmp_path, f"{'ab'[i % 2]}/{i}.txt{'.gz' if i % 3 == 0 else ''}", f"text {i}".encode())
    return tmp_path


def test_splits_share_nothing_and_lose_nothing(corpus):
    source = TextFiles(f"{corpus}/**/*.txt*", holdout=5)
    train, held_out = contents(source, "train"), contents(source, "eval")
    assert sorted(train + held_out) == sorted(f"text {i}".encode() for i in range(60))
    assert 0 < len(held_out) < len(train)


def test_splits_do_not_depend_on_where_the_files_lie(corpus, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("other") / "deep"
    for path in corpus.rglob("*.txt*"):
        target = elsewhere / path.relative_to(corpus)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    here, there = (contents(TextFiles(f"{root}/*/*", holdout=5), "eval") for root in (corpus, elsewhere))
    assert here == there


def test_eval_pattern_takes_its_files_out_of_train(corpus):
    source = TextFiles((f"{corpus}/a/*", f"{corpus}/b/*"), eval_pattern=f"{corpus}/b/*")
    assert sorted(contents(source, "eval")) == sorted(f"text {i}".encode() for i in range(1, 60, 2))
    assert sorted(contents(source, "train")) == sorted(f"text {i}".encode() for i in range(0, 60, 2))


def test_a_separator_cuts_one_file_into_documents(tmp_path):
    path = write(tmp_path, "all.txt", b"\n\n".join(b"paragraph %d" % i for i in range(100)) + b"\n\n\n\nend")
    source = TextFiles(str(path), separator="\n\n", holdout=4)
    train, held_out = contents(source, "train"), contents(source, "eval")
    assert sorted(train + held_out) == sorted([b"paragraph %d" % i for i in range(100)] + [b"end"])
    assert held_out


def test_one_file_is_never_silently_all_of_both_splits(tmp_path):
    path = write(tmp_path, "only.txt", b"text")
    for split in ("train", "eval"):
        with pytest.raises(UserError, match=r"only\.txt.*1 document.*eval_pattern.*separator"):
            contents(TextFiles(str(path)), split)
    assert contents(TextFiles(str(path), holdout=0), "train") == [b"text"]
    with pytest.raises(UserError, match=r"only\.txt.*none is in the eval split"):
        contents(TextFiles(str(path), holdout=0), "eval")


def test_no_match_names_the_pattern(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*nothing/\*\.txt"):
        contents(TextFiles(f"{tmp_path}/nothing/*.txt"), "train")
    with pytest.raises(UserError, match="names no files"):
        contents(TextFiles(()), "train")
    path = write(tmp_path, "a.txt", b"text")
    with pytest.raises(UserError, match=r"has no documents"):
        contents(TextFiles(str(path), eval_pattern=str(path)), "train")


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"text" * 99)[:-9], gzip.compress(b"a")[:12] * 2],
    ids=["not gzip", "cut short", "broken"],  # gzip writes the time, so the bytes themselves are no steady names
)
def test_a_broken_gz_file_is_named(tmp_path, content):
    (tmp_path / "broken.txt.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*broken\.txt\.gz"):
        contents(TextFiles(f"{tmp_path}/*.gz", holdout=0), "train")


def test_json_lines_give_a_document_per_line(tmp_path):
    lines = [json.dumps({"body": f"línea {i}", "id": i}) for i in range(50)]
    write(tmp_path, "x.jsonl", "\n".join(lines[:25]).encode() + b"\n\n")
    write(tmp_path, "y.jsonl.gz", "\r\n".join(lines[25:]).encode())
    source = JsonLines(f"{tmp_path}/*.jsonl*", holdout=4)
    train, held_out = source.open("train"), source.open("eval")
    assert sorted(record["id"] for record in (*train, *held_out)) == list(range(50))
    assert all(record["body"] == f"línea {record['id']}" for record in (*train, *held_out))
    assert len(held_out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "is not JSON"),
        (b"[1]", "holds a JSON list"),
        (b'{"text": "\xff"}', "is not JSON"),
    ],
)
def test_a_bad_json_line_is_named_with_its_number(tmp_path, line, message):
    write(tmp_path, "bad.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
    records = JsonLines(f"{tmp_path}/bad.jsonl", holdout=0).open("train")
    assert records[0] == {"text": "fine"}
    with pytest.raises(BadRecord, match=r"bad\.jsonl:3.*" + message):
        records[1]


def test_the_standard_library_is_utf8_in_a_fixed_order_and_split():
    source = PythonStdlib(holdout=40)
    held_out = source.open("eval")
    assert list(held_out) == list(source.open("eval"))
    names = [held_out.name(i) for i in range(len(held_out))]
    assert names == sorted(names)
    assert len(names) > 10
    assert not any("site-packages" in name for name in names)
    for record in held_out:
        record["text"].decode()


@pytest.mark.parametrize("holdout", [1, -3])
def test_a_holdout_that_leaves_nothing_to_train_on_is_refused(holdout):
    with pytest.raises(UserError, match=f"holdout={holdout}"):
        PythonStdlib(holdout=holdout)


def test_fields_can_be_set_from_the_command_line():
    source = override(TextFiles("a/*"), {"pattern": "b/*", "holdout": "7", "eval_pattern": "c/*"})
    assert source == TextFiles("b/*", holdout=7, eval_pattern="c/*")


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_records_are_looked_up_in_any_order_also_after_pickling(tmp_path, packed):
    lines = b"\n".join(json.dumps({"id": i, "text": "x" * i}).encode() for i in range(40)) + b"\n"
    compress = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packed]
    (tmp_path / f"a.jsonl{packed}").write_bytes(compress(lines[: lines.index(b"\n", 500) + 1]))
    (tmp_path / f"b.jsonl{packed}").write_bytes(compress(lines[lines.index(b"\n", 500) + 1 :]))
    records = JsonLines(f"{tmp_path}/*.jsonl*", holdout=0).open("train")
    copy = pickle.loads(pickle.dumps(records))
    assert [copy[i]["id"] for i in range(39, -1, -1)] == [records[i]["id"] for i in range(39, -1, -1)]
    assert [record["id"] for record in records] == list(range(40))


def test_two_zstd_frames_are_one_file_and_half_a_frame_is_an_error(tmp_path):
    frame = lambda text: zstandard.ZstdCompressor().compress(text)
    path = tmp_path / "two.txt.zst"
    path.write_bytes(frame(b"one ") + frame(b"two"))
    assert contents(TextFiles(str(path), holdout=0), "train") == [b"one two"]
    path.write_bytes(frame(b"one ") + frame(b"two")[:-4])
    with pytest.raises(UserError, match=r"two\.txt\.zst"):
        contents(TextFiles(str(path), holdout=0), "train")


def test_a_file_that_shrinks_under_its_records_is_named(tmp_path):
    path = write(tmp_path, "log.jsonl", b'{"text": "a"}\n' * 9)
    records = JsonLines(str(path), holdout=0).open("train")
    path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(BadRecord, match=r"log\.jsonl:5.*shorter"):
        records[4]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, "log.jsonl", b'{"text": "a"}\n' * 9)

    def refuse(name, mode):
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(files, "open", refuse, raising=False)  # root may read everything
    with pytest.raises(UserError, match=r"cannot read .*log\.jsonl: .*Permission denied"):
        JsonLines(str(path), holdout=0).open("train")


def test_records_that_live_until_python_ends_say_nothing_then(tmp_path):
    path = write(tmp_path, "log.jsonl", b'{"text": "a"}\n')
    code = (
        f"from axrepro.data import JsonLines\nrecords = JsonLines({str(path)!r}, holdout=0).open('train')\nrecords[0]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_beyond_the_limit_of_open_ones_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_OPEN_FILES", 2)
    for i in range(5):
        write(tmp_path, f"{i}.jsonl", b'{"id": %d}\n' % i)
    records = JsonLines(f"{tmp_path}/*.jsonl", holdout=0).open("train")
    assert [records[i]["id"] for i in (4, 0, 3, 1, 2, 4, 0)] == [4, 0, 3, 1, 2, 4, 0]


def test_file_names_that_are_not_utf8_are_files_like_others(tmp_path):
    for i in range(20):
        (tmp_path / os.fsdecode(b"caf\xe9 %d.txt" % i)).write_bytes(b"text")
    source = TextFiles(f"{tmp_path}/*.txt", holdout=3)
    assert len(source.open("train")) + len(source.open("eval")) == 20


def test_a_file_found_in_several_ways_is_read_once(tmp_path):
    for i in range(5):
        write(tmp_path, f"tree/{i}.txt", b"text")
    (tmp_path / "tree" / "self").symlink_to(tmp_path / "tree")
    (tmp_path / "tree" / "link.txt").symlink_to(tmp_path / "tree" / "0.txt")
    found = find_files((f"{tmp_path}/tree/**/*.txt", f"{tmp_path}/tree/../tree/*.txt"))
    assert list(found.values()) == [f"{i}.txt" for i in range(5)]


def test_records_of_a_function_have_fields():
    with pytest.raises(BadRecord, match=r"_words\('train'\), record 0 is a str, not fields by name"):
        FromFunction(_words).open("train")[0]


def _words(split):
    return ["word"]
