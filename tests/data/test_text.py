"""Packing, against a loop over documents and pairs."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrepro.core import UserError
from axrepro.core.config import override
from axrepro.data import Bytes, MemoryStore, PackedText, PythonStdlib, SentencePiece, Text, TextFiles, permutation

texts = st.lists(st.one_of(st.binary(max_size=4), st.binary(max_size=60)), min_size=1, max_size=12)


def packed(raw: list[bytes], length: int, seed: int = 0, **settings) -> PackedText:
    store = MemoryStore([(Bytes().encode(data), None) for data in raw], Bytes(), sum(map(len, raw)))
    return PackedText(store, Bytes(), length, seed, **settings)


def packed_by_loops(raw: list[bytes], length: int) -> list[dict[str, list[int]]]:
    """Rows of documents in the given order, pair by pair."""
    rows = []
    for data in raw:
        ids = [byte + 3 for byte in data]
        started = False
        for token, target in zip([1, *ids], [*ids, 1], strict=True):
            if not rows or len(rows[-1]["tokens"]) == length:
                rows.append({"tokens": [], "targets": [], "segment_ids": [], "positions": []})
                started = False
            row = rows[-1]
            if not started:
                segment, position, started = max(row["segment_ids"], default=0) + 1, 0, True
            row["tokens"].append(token)
            row["targets"].append(target)
            row["segment_ids"].append(segment)
            row["positions"].append(position)
            position += 1
    for values in rows[-1].values():
        values += [0] * (length - len(values))
    return rows


def assert_rows_equal(arrays, rows):
    for name, values in arrays.items():
        assert values.dtype == np.int32
        np.testing.assert_array_equal(values, [row[name] for row in rows], err_msg=name)


@settings(deadline=None)
@given(texts, st.integers(1, 20))
def test_rows_in_order_equal_the_loop(raw, length):
    examples = packed(raw, length, shuffle=False)
    expected = packed_by_loops(raw, length)
    assert len(examples) == len(expected)
    for epoch in range(2):
        assert_rows_equal(examples.rows(np.arange(len(expected)) + epoch * len(expected)), expected)


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(1, 20), st.integers(0, 2**31))
def test_shuffled_rows_equal_the_loop_over_shuffled_documents(raw, length, seed):
    examples = packed(raw, length, seed)
    number = len(examples)
    expected = []
    for epoch in range(3):
        rows = packed_by_loops([raw[i] for i in permutation(len(raw), seed, epoch)(np.arange(len(raw)))], length)
        expected += [rows[i] for i in permutation(number, seed, epoch, stream=1)(np.arange(number))]
    assert_rows_equal(examples.rows(np.arange(3 * number)), expected)
    backwards = np.arange(3 * number)[::-1]
    assert_rows_equal(examples.rows(backwards), [expected[i] for i in backwards])


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(1, 20), st.integers(0, 2**31))
def test_every_pair_occurs_once_in_every_epoch(raw, length, seed):
    examples = packed(raw, length, seed)
    expected = Counter()
    for data in raw:
        ids = [byte + 3 for byte in data]
        expected.update(zip([1, *ids], [*ids, 1], strict=True))
    for epoch in range(3):
        rows = examples.rows(np.arange(len(examples)) + epoch * len(examples))
        real = rows["segment_ids"] > 0
        assert Counter(zip(rows["tokens"][real].tolist(), rows["targets"][real].tolist(), strict=True)) == expected
        assert examples.stats()["tokens"] == real.sum() == sum(expected.values())


def test_epochs_and_seeds_differ_in_order():
    raw = [bytes([65 + i]) * (3 * i) for i in range(20)]
    first, other = packed(raw, 8, 0), packed(raw, 8, 1)
    epoch = np.arange(len(first))
    assert (first.rows(epoch)["tokens"] != first.rows(epoch + len(first))["tokens"]).any()
    assert (first.rows(epoch)["tokens"] != other.rows(epoch)["tokens"]).any()


def test_index_minus_one_is_a_row_of_padding():
    examples = packed([b"abc", b"", b"defgh"], 5)
    rows = examples.rows(np.array([-1, 3, -1, 0]))
    for name, values in rows.items():
        assert not values[[0, 2]].any(), name
        np.testing.assert_array_equal(values[[1, 3]], examples.rows(np.array([3, 0]))[name])
    assert not any(values.any() for values in examples.rows(np.array([-1, -1])).values())


def test_no_index_gives_no_rows():
    rows = packed([b"abc"], 5).rows(np.zeros(0, np.int64))
    assert {name: (values.shape, values.dtype.name) for name, values in rows.items()} == dict.fromkeys(
        ("tokens", "targets", "segment_ids", "positions"), ((0, 5), "int32")
    )


def test_stats_count_documents_targets_and_raw_bytes():
    stats = packed(["né".encode(), b"", b"ab"], 4).stats()
    assert stats == {"documents": 3, "tokens": 3 + 0 + 2 + 3, "bytes": 5, "rows": 2}


def test_bytes_are_kept_as_bytes():
    assert MemoryStore([(Bytes().encode(bytes(range(256))), None)], Bytes(), 256)._ids.dtype == np.uint8


def test_the_eval_split_has_one_order_whose_start_is_a_sample(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"text number {i} " * 3)
    source = TextFiles(f"{tmp_path}/*.txt", holdout=3)
    data = Text(batch_size=2, sequence_length=16, source=source)
    one, two = data.open("eval", seed=0), data.open("eval", seed=1)
    every = np.arange(len(one))
    np.testing.assert_array_equal(one.rows(every)["tokens"], two.rows(every)["tokens"])
    raw = [record["text"] for record in source.open("eval")]
    numbers = [re.search(rb"number (\d+)", Bytes().decode(row).encode()) for row in one.rows(every)["tokens"]]
    numbers = [int(found[1]) for found in numbers if found]
    assert numbers != sorted(numbers)
    in_order = Text(batch_size=2, sequence_length=16, source=source, shuffle=False).open("eval", seed=0)
    assert_rows_equal(in_order.rows(every), packed_by_loops(raw, 16))


def test_abstract_describes_the_arrays_without_reading_data():
    data = Text(batch_size=6, sequence_length=16, source=TextFiles("/nowhere/*.txt"))
    assert {name: (array.shape, str(array.dtype)) for name, array in data.abstract().items()} == dict.fromkeys(
        ("tokens", "targets", "segment_ids", "positions"), ((6, 16), "int32")
    )
    assert data.vocab_size == 259


@pytest.mark.parametrize("field", ["batch_size", "sequence_length"])
def test_sizes_below_one_are_refused_by_name(field):
    data = Text(batch_size=6, sequence_length=16, source=PythonStdlib())
    with pytest.raises(UserError, match=rf"Text\.{field}=0"):
        override(data, {field: "0"})


def test_text_that_is_not_utf8_is_named_for_sentencepiece(tmp_path):
    trainer = pytest.importorskip("sentencepiece", reason="needs the extra `text`").SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20),
        model_prefix=str(tmp_path / "m"),
        vocab_size=15,
        minloglevel=2,
    )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    data = Text(
        batch_size=1,
        sequence_length=8,
        source=TextFiles(f"{tmp_path}/*.txt", holdout=0),
        vocabulary=SentencePiece(str(tmp_path / "m.model")),
    )
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 \(byte 3\)"):
        data.open("train", 0)
    (tmp_path / "latin.txt").write_bytes(b"the mat")
    rows = data.open("train", 0).rows(np.arange(1))
    ids = data.vocabulary.encode("the mat").tolist()
    assert rows["tokens"][0, : len(ids) + 1].tolist() == [2, *ids]
    assert rows["targets"][0, : len(ids) + 1].tolist() == [*ids, 2]
    assert data.vocab_size == 15
