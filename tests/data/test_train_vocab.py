"""Training vocabularies: special ids, round trips, the sample, and the command line."""

import argparse
import inspect
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from axrepro.core import UserError
from axrepro.data import Vocabulary
from axrepro.data.__main__ import main as command
from axrepro.data.tools.train_vocab import _samples, train_vocab
from axrepro.data.transforms.denoising import SpanCorruption

DATA = os.environ.get("AXREPRO_DATA", Path(__file__).resolve().parents[2].parent / "shared/data")
GSM8K = Path(DATA, "gsm8k/train.jsonl")
KINDS = ("sentencepiece-unigram", "sentencepiece-bpe", "bpe")
CODE = inspect.getsource(argparse)  # real text that every machine has
RECORDS = [{"text": CODE.encode()}, {"text": "crème brûlée\n"}]


def main(argv: list[str]) -> int:
    return command(["train-vocab", *argv])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("vocabularies")
    return {kind: train_vocab(RECORDS, str(folder / kind), size=600, extra_ids=9, kind=kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def vocabulary(request, trained) -> Vocabulary:
    return trained[request.param].vocabulary


def test_special_ids_are_first_and_sentinels_last_and_no_text_gives_them(vocabulary):
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id) == (600, 0, 1)
    special = {0, 1, *range(591, 600)}
    assert vocabulary.decode(sorted(special)) == ""
    assert vocabulary.decode([590]) != ""
    marks = "<extra_id_0></s><pad><unk><extra_id_8>"
    assert not special & set(vocabulary.encode(marks).tolist())
    assert vocabulary.decode(vocabulary.encode(marks)) == marks


def test_sentinels_serve_span_corruption(vocabulary):
    ids = vocabulary.encode(CODE)[:100]
    row = {"targets": ids, "segment_ids": np.ones(100, np.int32)}
    out = SpanCorruption(vocabulary=vocabulary)(row, np.random.default_rng(0))
    assert [599 - i for i in range(5)] == [id_ for id_ in out["inputs"].tolist() if id_ > 590]


@settings(deadline=None, max_examples=60)
@given(text=st.text(), more=st.text())
def test_any_text_comes_back_also_where_it_is_encoded_in_parts(trained, text, more):
    for kind in KINDS:
        vocabulary = trained[kind].vocabulary
        expected = text + more if kind == "bpe" else (text + more).replace("▁", " ")
        parts = [*vocabulary.encode(text), *vocabulary.encode(more)]
        assert vocabulary.decode(parts) == expected


def test_compression_is_that_of_lines_that_were_not_trained_on(trained):
    held_out = [line for line in CODE.split("\n") if line and zlib.crc32(f"{line}\n".encode()) % 50 == 0]
    assert len(held_out) > 10
    for kind in KINDS:
        result = trained[kind]
        assert result.held_out_bytes == sum(len(line.encode()) + 1 for line in held_out)
        assert result.held_out_tokens == sum(len(result.vocabulary.encode(f"{line}\n")) for line in held_out)
        assert result.bytes_per_token == result.held_out_bytes / result.held_out_tokens > 2.5
        assert result.vocabulary.encode(CODE).size < 0.5 * len(CODE.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_and_seed_give_the_same_file(trained, kind, tmp_path):
    again = tmp_path / "again"
    train_vocab(iter(RECORDS), str(again), size=600, extra_ids=9, kind=kind)
    assert again.read_bytes() == Path(trained[kind].vocabulary.path).read_bytes()


def test_sentencepiece_itself_reads_the_sentinels_as_control_pieces(trained):
    import sentencepiece

    for kind in KINDS[:2]:
        model = sentencepiece.SentencePieceProcessor(model_file=trained[kind].vocabulary.path)
        assert model.vocab_size() == 600
        assert [model.id_to_piece(599 - i) for i in range(9)] == [f"<extra_id_{i}>" for i in range(9)]
        assert all(model.is_control(id_) for id_ in range(591, 600))
        assert not model.is_control(590)


def test_the_sample_is_uniform_bounded_and_without_what_is_held_out():
    lines = [line for line in map(str, range(1000)) if zlib.crc32(line.encode()) % 50][:20]
    counts = np.zeros(20)
    for seed in range(2000):
        train, held_out = _samples(iter(lines), 5, seed)
        assert len(train) == len(set(train)) == 5
        assert not held_out
        counts[[lines.index(line) for line in train]] += 1
    assert stats.chisquare(counts).pvalue > 1e-3
    train, held_out = _samples((str(i % 500) for i in range(5000)), 10**6, 0)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 5000
    assert _samples(map(str, range(5000)), 7, 1) == _samples(map(str, range(5000)), 7, 1)


def test_a_line_without_end_is_trained_on_in_pieces(tmp_path):
    text = "".join(f"{i * 7919 % 1000} " for i in range(20000))
    result = train_vocab([{"text": text}], str(tmp_path / "v"), size=300, extra_ids=0, kind="sentencepiece-bpe")
    assert result.sentences + -(-result.held_out_bytes // 1000) == -(-len(text) // 1000)
    assert result.vocabulary.decode(result.vocabulary.encode(text)) == text


def test_a_vocabulary_never_takes_the_place_of_another_file(tmp_path):
    taken = tmp_path / "taken.model"
    taken.write_text("precious")
    with pytest.raises(UserError, match=r"taken\.model exists"):
        train_vocab(RECORDS, str(taken), size=600)
    assert taken.read_text() == "precious"
    untouched = (pytest.fail("text was read") for _ in range(1))
    with pytest.raises(UserError, match=r"cannot write .*gone"):
        train_vocab(untouched, str(tmp_path / "gone/a.json"), size=400, kind="bpe")


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_text_is_refused_and_leaves_no_file(kind, tmp_path):
    with pytest.raises(UserError, match="no vocabulary of 5000 ids and 100 sentinels comes from 1 sentences"):
        train_vocab([{"text": "a b c\n"}], str(tmp_path / "v"), size=5100, kind=kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("records", "fields", "message"),
    [
        ([], {}, "there is no text"),
        ([{"txt": "a"}], {}, "record 0 has no field 'text'; did you mean 'txt'"),
        ([{"text": b"\xff"}], {}, "record 0 is not UTF-8"),
        (RECORDS, {"extra_ids": -1}, "extra_ids=-1"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(records, fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_vocab(records, str(tmp_path / "v"), size=300, **fields)


def test_the_command_trains_on_files_and_tells_the_compression(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"code": CODE[i : i + 5000]}) + "\n" for i in range(0, 40000, 5000))
    )
    (tmp_path / "b.txt").write_text(CODE)
    output = tmp_path / "v.json"
    inputs = ["--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"), "--field=code"]
    assert main([*inputs, f"--output={output}", "--size=500", "--kind=bpe", "--extra_ids=3"]) == 0
    out = capsys.readouterr().out
    assert f"HuggingFace(path={str(output)!r}, eos='</s>', pad='<pad>', parse_special=False): 500 ids" in out
    assert "bytes per token in" in out
    assert main([f"--input={tmp_path}/*.txt", f"--output={tmp_path}/w", "--size=500", "--kind=bpe"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output={}/v", "--size=500"], "--input"),
        (["--input={}/none.txt", "--output={}/v", "--size=500"], "no file matches"),
        (["--input={}/a.jsonl", "--output={}/v", "--size=500", "--field=code"], "a.jsonl:2 has no field 'code'"),
        (["--input={}/none.txt", "--output={}/v", "--size=many"], "invalid int value: 'many'"),
        (["--input={}/none.txt", "--output={}/v", "--size=9", "--kind=wordpiece"], "invalid choice: 'wordpiece'"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"code": "x"}\n{"text": "y"}\n')
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("axrepro: error: ")
    assert message in line


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K, at AXREPRO_DATA or beside the repository")
def test_real_text_is_compressed_and_comes_back(tmp_path, capsys):
    output = str(tmp_path / "gsm8k.model")
    arguments = [f"--input={GSM8K}", "--field=question", "--size=2000", f"--output={output}", "--max_sentences=3000"]
    assert main([*arguments, "--kind=sentencepiece-bpe"]) == 0
    found = capsys.readouterr().out.splitlines()[1].split()
    assert float(found[0]) > 3
    from axrepro.data import SentencePiece

    for line in GSM8K.read_text().splitlines()[:50]:
        question = json.loads(line)["question"]
        assert SentencePiece(output).decode(SentencePiece(output).encode(question)) == question
