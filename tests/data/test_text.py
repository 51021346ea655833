"""Packing, against a loop over documents and pairs."""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrepro.core import UserError
from axrepro.core.config import override
from axrepro.data import (
    BadRecord,
    BestFit,
    Bytes,
    Concatenate,
    FirstFit,
    MemoryStore,
    PackedText,
    PythonStdlib,
    Records,
    SentencePiece,
    Source,
    Text,
    TextFiles,
    permutation,
)
from axrepro.data.transforms.denoising import SpanCorruption

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


@pytest.mark.parametrize("packing", [Concatenate(), BestFit(), FirstFit()], ids=str)
@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), length=st.integers(1, 20), data=st.data())
def test_every_place_knows_its_document(packing, sizes, length, data):
    """Document d is made of byte d alone."""
    examples = packed([bytes([d]) * size for d, size in enumerate(sizes)], length, packing=packing)
    indices = np.array(data.draw(st.lists(st.integers(-1, 3 * len(examples)), max_size=9)), np.int64)
    documents, rows = examples.documents(indices), examples.rows(indices)
    np.testing.assert_array_equal(documents >= 0, rows["segment_ids"] > 0)
    inside = (documents >= 0) & (rows["targets"] != Bytes.eos_id)
    np.testing.assert_array_equal(documents[inside], rows["targets"][inside] - Bytes.first_id)
    epoch = examples.documents(np.arange(len(examples)) + len(examples))
    np.testing.assert_array_equal(np.bincount(epoch[epoch >= 0], minlength=len(sizes)), np.array(sizes) + 1)


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


def test_bytes_are_not_counted_where_not_all_of_them_are_learnt():
    learnt = lambda *parts: text_of(_Given([{"parts": parts}]), loss_mask=True).open("train", 0).stats()
    assert learnt((b"abc", True), (b"d", True))["bytes"] == 4
    assert "bytes" not in learnt((b"abc", False), (b"d", True))
    assert "bytes" not in text_of(_Tokens([[5, 6]])).open("train", 0).stats()


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
        vocab_size=14,
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
    assert data.vocab_size == 14


# ---- records, weights of targets, and what may go wrong


class _Tokens(Records):
    """Records of tokens whose sizes are known."""

    def __init__(self, tokens, bad=(), weights=None, claimed=None):
        self._tokens, self._bad, self._weights, self._claimed = tokens, bad, weights, claimed
        self.read = Counter()

    def __len__(self):
        return len(self._tokens)

    def __getitem__(self, index):
        self.read[index] += 1
        if index in self._bad:
            raise BadRecord(f"{self.name(index)} is corrupt")
        record = {"tokens": np.array(self._tokens[index])}
        return record if self._weights is None else record | {"loss_mask": np.array(self._weights[index], np.float32)}

    def name(self, index):
        return f"file, record {index}"

    @property
    def sizes(self):
        return np.array([len(tokens) for tokens in self._tokens]) if self._claimed is None else np.array(self._claimed)


@dataclass(frozen=True)
class Given(Source):
    records: Records

    def open(self, split):
        return self.records


def text_of(records: Records, **settings) -> Text:
    return Text(batch_size=2, sequence_length=settings.pop("length", 7), source=Given(records), **settings)


@pytest.mark.parametrize("packing", [Concatenate(), BestFit(), FirstFit()], ids=str)
@settings(max_examples=20, deadline=None)
@given(raw=texts, length=st.integers(1, 20), seed=st.integers(0, 2**31), data=st.data())
def test_ids_read_with_their_rows_give_the_rows_of_ids_in_memory(packing, raw, length, seed, data):
    tokens = [Bytes().encode(text) for text in raw]
    weights = [data.draw(st.lists(st.sampled_from([0, 1]), min_size=len(t), max_size=len(t))) for t in tokens]
    read = text_of(_Tokens(tokens, weights=weights), length=length, packing=packing, loss_mask=True).open("train", seed)
    encoded = [(ids, np.array(mask, np.float32)) for ids, mask in zip(tokens, weights, strict=True)]
    store = MemoryStore(encoded, Bytes(), 0)
    held = PackedText(store, Bytes(), length, seed, packing=packing, loss_mask=True)
    every = np.arange(2 * len(held))
    for name, values in held.rows(every).items():
        np.testing.assert_array_equal(read.rows(every)[name], values, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.tuples(st.binary(max_size=6), st.booleans()), min_size=1, max_size=4), min_size=1),
    length=st.integers(1, 12),
)
def test_only_targets_of_parts_that_count_have_weight(documents, length):
    """Weight by weight: the end id counts like the last token before it."""
    pairs = []
    for parts in documents:
        ids = [(byte + 3, float(counts)) for text, counts in parts for byte in text]
        pairs += [(i, weight) for i, weight in ids] + [(1, ids[-1][1] if ids else 1.0)]
    records = [{"parts": tuple(parts)} for parts in documents]
    examples = text_of(_Given(records), length=length, shuffle=False, loss_mask=True)
    if not any(text for parts in documents for text, _ in parts):
        with pytest.raises(UserError, match="are empty"):
            examples.open("train", 0)
        return
    opened = examples.open("train", 0)
    rows = opened.rows(np.arange(len(opened)))
    real = rows["segment_ids"] > 0
    assert list(zip(rows["targets"][real].tolist(), rows["loss_mask"][real].tolist(), strict=True)) == pairs
    assert not rows["loss_mask"][~real].any()


class _Given(Records):
    def __init__(self, records):
        self._records = records

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]

    def name(self, index):
        return f"given, record {index}"


def test_parts_that_do_not_count_need_a_loss_mask():
    with pytest.raises(UserError, match=r"record 0 has parts that do not count in the loss: set loss_mask=True"):
        text_of(_Given([{"parts": ((b"a", False), (b"b", True))}])).open("train", 0)
    rows = text_of(_Tokens([[5, 6]], weights=[[0, 1]])).open("train", 0)
    with pytest.raises(UserError, match="set loss_mask=True"):
        rows.rows(np.arange(1))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"txt": "a"}, "record 1 has no field 'text'; did you mean 'txt'"),
        ({"text": 5}, "record 1: its text is 5, not a string"),
        ({"text": "\ud800"}, "record 1 is not Unicode"),
        ({"tokens": [[1]]}, r"record 1: its tokens are int64\[1, 1\]"),
        ({"tokens": [0.5]}, r"record 1: its tokens are float64\[1\]"),
        ({"tokens": [[7], [7, 8]]}, "record 1: 'tokens' is no array"),
        ({"tokens": [7, 8], "loss_mask": [[1], [1, 1]]}, "record 1: 'loss_mask' is no array"),
        ({"tokens": [7, 8], "loss_mask": ["a", "b"]}, "record 1: its loss_mask holds other things than finite numbers"),
        ({"tokens": [7, 8], "loss_mask": [1, None]}, "record 1: its loss_mask holds other things than finite numbers"),
        ({"tokens": [7, 8], "loss_mask": [1, float("nan")]}, "record 1: its loss_mask holds other things"),
        ({"parts": 3, "text": "a"}, "record 1: its parts are 3, not pairs"),
        ({"parts": ["ab"], "text": "a"}, r"record 1: its parts are \['ab'\], not pairs"),
        ({"parts": [["a", "b"]]}, r"record 1: its parts are \[\['a', 'b'\]\], not pairs"),
        ({"tokens": [7, 259]}, "record 1 has tokens 7 ... 259; those of the vocabulary bytes are 3 ... 258"),
        ({"tokens": [7, 8], "loss_mask": [1]}, r"2 tokens, but a loss_mask of shape \[1\]"),
    ],
)
def test_a_record_that_is_no_text_is_named_or_left_out_and_counted(record, message, caplog):
    records = _Given([{"text": "fine"}, record, {"text": "too"}])
    with pytest.raises(BadRecord, match=message):
        text_of(records).open("train", 0)
    opened = text_of(records, max_bad_records=1).open("train", 0)
    assert opened.stats()["documents"] == 2
    assert list(opened.bad_records) == [1]
    assert re.search(message, caplog.text)


def test_beside_tokens_a_record_may_hold_anything():
    opened = text_of(_Given([{"tokens": [7, 8], "text": None, "parts": 3}, {"text": "ab"}])).open("train", 0)
    assert opened.stats()["tokens"] == 6
    assert "bytes" not in opened.stats()


def test_a_transform_that_refuses_a_record_is_named_with_it():
    def refuse(example, rng):
        raise ValueError("no such thing")

    with pytest.raises(BadRecord, match="given, record 0: no such thing"):
        text_of(_Given([{"text": "a"}]), transforms=(refuse,)).open("train", 0)


def test_records_that_turn_out_bad_when_their_row_is_made_are_padding_and_counted_once():
    tokens = [[5] * 4, [6] * 4, [7] * 4]
    with pytest.raises(BadRecord, match="file, record 1 is corrupt"):
        text_of(_Tokens(tokens, bad=(1,)), length=5).open("train", 0).rows(np.arange(3))
    opened = text_of(_Tokens(tokens, bad=(1,)), length=5, max_bad_records=1).open("train", 0)
    for _ in range(2):
        rows = opened.rows(np.arange(3))
        assert sorted(rows["tokens"].tolist()) == [[0] * 5, [1, 5, 5, 5, 5], [1, 7, 7, 7, 7]]
        assert sorted(rows["segment_ids"].sum(1).tolist()) == [0, 5, 5]
    assert dict(opened.bad_records) == {1: "file, record 1 is corrupt"}
    claimed = text_of(_Tokens(tokens, claimed=[4, 3, 4])).open("train", 0)
    with pytest.raises(BadRecord, match="record 1 has 4 tokens, but its index says 3"):
        claimed.rows(np.arange(2))


def test_transforms_of_records_draw_once_and_of_rows_in_every_epoch():
    def name(example, rng):
        return {"text": f"{example['text']}{rng.integers(10**9)}"}

    def shift(row, rng):
        return {"tokens": row["tokens"], "drawn": rng.integers(2**31, size=3)}

    data = text_of(_Given([{"text": "a"}, {"text": "b"}]), length=6, transforms=(name,), row_transforms=(shift,))
    assert {k: (v.shape, v.dtype.name) for k, v in data.abstract().items()} == {
        "tokens": ((2, 6), "int32"),
        "drawn": ((2, 3), "int64"),
    }
    opened = data.open("train", 0)
    epochs = [opened.rows(np.arange(len(opened)) + e * len(opened)) for e in range(2)]
    assert sorted(epochs[0]["tokens"].ravel().tolist()) == sorted(epochs[1]["tokens"].ravel().tolist())
    assert len(np.unique(np.stack([epoch["drawn"] for epoch in epochs]))) == 6 * len(opened)
    np.testing.assert_array_equal(opened.rows(np.array([1, 0]))["drawn"], epochs[0]["drawn"][[1, 0]])


@pytest.mark.parametrize("extra", [lambda n: {"more": np.zeros(n)}, lambda n: {"more": 1} if n > 4 else {}])
def test_rows_that_transforms_leave_unlike_are_refused(extra):
    def widen(row, rng):
        return {**row, **extra(int(rng.integers(9)))}

    rows = text_of(_Given([{"text": "a"}]), row_transforms=(widen,)).open("train", 0)
    with pytest.raises(UserError, match=r"gave row \d+ the shapes .* those of all rows have to be the same"):
        rows.rows(np.arange(20))


def test_a_transform_with_another_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"Text\.vocabulary=.*its SpanCorruption, Bytes\(extra_ids=9\)"):
        text_of(_Given([{"text": "a"}]), row_transforms=(SpanCorruption(vocabulary=Bytes(extra_ids=9)),))
