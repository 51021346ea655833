"""Vocabularies: ids, round trips, and what is said about a bad model file."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrepro.core import UserError
from axrepro.data import Bytes, SentencePiece

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards pack my box with five dozen jugs"


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    trainer = pytest.importorskip("sentencepiece", reason="needs the extra `text`").SentencePieceTrainer
    folder = tmp_path_factory.mktemp("sentencepiece")
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(TEXT.split(), 8)) for _ in range(200)]

    def run(name: str, **ids: int) -> str:
        prefix = folder / name
        if not prefix.with_suffix(".model").exists():
            trainer.train(
                sentence_iterator=iter(sentences), model_prefix=str(prefix), vocab_size=40, minloglevel=2, **ids
            )
        return f"{prefix}.model"

    return run


def test_byte_ids_are_those_of_seqio():
    vocabulary = Bytes()
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id) == (259, 0, 1)
    assert vocabulary.encode(b"\x00A\xff").tolist() == [3, 68, 258]
    assert vocabulary.encode("é").tolist() == [0xC3 + 3, 0xA9 + 3]
    assert vocabulary.encode(b"A").dtype == np.int32


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip_any_text(text):
    assert Bytes().decode(Bytes().encode(text)) == text


@settings(deadline=None)
@given(st.binary())
def test_bytes_decode_what_is_not_utf8_with_replacement(raw):
    assert Bytes().decode(Bytes().encode(raw)) == raw.decode(errors="replace")


def test_bytes_decode_skips_special_ids_and_goes_on():
    assert Bytes().decode([1, 75, 0, 2, 108, 1, 36]) == "Hi!"


def test_sentencepiece_gives_the_ids_and_text_of_the_library(train):
    import sentencepiece

    path = train("t5", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=path), SentencePiece(path)
    text = "seven lazy wizards jump over the fox"
    ids = ours.encode(text)
    assert ids.tolist() == theirs.encode(text)
    assert ours.encode(text.encode()).tolist() == ids.tolist()
    assert ours.decode(ids) == theirs.decode(ids.tolist()) == text
    assert ours.decode([0, 1, *ids.tolist(), 1, 0]) == text
    assert (ours.size, ours.pad_id, ours.eos_id) == (40, 0, 1)


def test_sentencepiece_without_padding_pads_with_the_end_id(train):
    vocabulary = SentencePiece(train("plain"))
    assert vocabulary.eos_id == vocabulary.pad_id == 2


def test_sentencepiece_without_an_end_id_is_refused_by_name(train):
    path = train("endless", eos_id=-1)
    with pytest.raises(UserError, match=r"endless\.model has no end-of-sentence id"):
        SentencePiece(path).encode("fox")


def test_a_missing_model_is_named(tmp_path):
    pytest.importorskip("sentencepiece", reason="needs the extra `text`")
    with pytest.raises(UserError, match=r"no SentencePiece model at .*gone\.model"):
        _ = SentencePiece(str(tmp_path / "gone.model")).size


@pytest.mark.parametrize("content", [b"", b"this is no model " * 50])
def test_a_file_that_is_no_model_is_named(tmp_path, content):
    pytest.importorskip("sentencepiece", reason="needs the extra `text`")
    path = tmp_path / "wrong.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"wrong\.model is no SentencePiece model"):
        _ = SentencePiece(str(path)).size


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # what Python itself does to block an import
    with pytest.raises(UserError, match=r"pip install axrepro\[text\]"):
        _ = SentencePiece("some.model").size
