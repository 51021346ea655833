"""Sources: which documents there are, which are held out, and that an error names the file."""

import gzip
import json

import pytest

from axrepro.core import UserError
from axrepro.core.config import override
from axrepro.data import JsonLines, PythonStdlib, TextFiles


def contents(source, split):
    return [document.data for document in source.documents(split)]


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
    source = JsonLines(f"{tmp_path}/*.jsonl*", field="body", holdout=4)
    train, held_out = contents(source, "train"), contents(source, "eval")
    assert sorted(train + held_out) == sorted(f"línea {i}".encode() for i in range(50))
    assert held_out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "is not JSON"),
        (b"[1]", "holds a JSON list"),
        (b'{"txt": "a"}', "no field 'text'; did you mean 'txt'"),
        (b'{"text": 5}', "is 5, not a string"),
        (b'{"text": "\\ud800"}', "not Unicode"),
        (b'{"text": "\xff"}', "is not JSON"),
    ],
)
def test_a_bad_json_line_is_named_with_its_number(tmp_path, line, message):
    write(tmp_path, "bad.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:3.*" + message):
        contents(JsonLines(f"{tmp_path}/bad.jsonl", holdout=0), "train")


def test_the_standard_library_is_utf8_in_a_fixed_order_and_split():
    source = PythonStdlib(holdout=40)
    held_out = list(source.documents("eval"))
    assert held_out == list(source.documents("eval"))
    names = [document.name for document in held_out]
    assert names == sorted(names)
    assert len(names) > 10
    assert not any("site-packages" in name for name in names)
    for document in held_out:
        document.data.decode()


@pytest.mark.parametrize("holdout", [1, -3])
def test_a_holdout_that_leaves_nothing_to_train_on_is_refused(holdout):
    with pytest.raises(UserError, match=f"holdout={holdout}"):
        PythonStdlib(holdout=holdout)


def test_fields_can_be_set_from_the_command_line():
    source = override(TextFiles("a/*"), {"pattern": "b/*", "holdout": "7", "eval_pattern": "c/*"})
    assert source == TextFiles("b/*", holdout=7, eval_pattern="c/*")
