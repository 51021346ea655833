"""Span corruption, prefixes and fill-in-the-middle: against T5's rules as plain loops, and taken back exactly."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from axrepro.core import UserError
from axrepro.data import Bytes, JsonLines, Text
from axrepro.data.transforms.denoising import FillInTheMiddle, PrefixLM, SpanCorruption, _cut, _share

VOCABULARY = Bytes(extra_ids=100)
TOP, END, PAD = VOCABULARY.size - 1, VOCABULARY.eos_id, VOCABULARY.pad_id
FIRST_SENTINEL = TOP - 99


def pack(texts, length: int, cut: bool = False) -> dict:
    """A packed row as `PackedText` makes it; with `cut`, the last document goes on in another row."""
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    place = 0
    for number, text in enumerate(texts, 1):
        ids = [*text] if cut and number == len(texts) else [*text, END]
        here = slice(place, place + len(ids))
        row["tokens"][here] = [END, *ids[:-1]]
        row["targets"][here] = ids
        row["segment_ids"][here] = number
        row["positions"][here] = range(len(ids))
        place += len(ids)
    assert place <= length
    return row


def documents(sizes, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 259, size).astype(np.int32) for size in sizes]


def t5_lengths(size: int, density: float, span: float) -> tuple[int, int]:
    noise = round(size * density)
    spans = round(noise / span)
    return size - noise + spans + 1, noise + spans + 1


def t5_pair(text, mask) -> tuple[list[int], list[int]]:
    """Inputs and targets by the paper's Fig. 2, a token at a time."""
    inputs, targets, sentinel = [], [], TOP + 1
    for place, token in enumerate(text):
        begins = mask[place] and not (place and mask[place - 1])
        if begins:
            sentinel -= 1
            inputs.append(sentinel)
            targets.append(sentinel)
        (targets if mask[place] else inputs).append(token)
    return [*inputs, END], [*targets, END]


def restore(inputs, targets) -> tuple[list[int], list[bool]]:
    """The text, and which of its tokens were noise."""
    assert inputs[-1] == targets[-1] == END
    spans, text, mask = {}, [], []
    for token in targets[:-1]:
        if token >= FIRST_SENTINEL:
            span = spans.setdefault(token, [])
        else:
            span.append(token)
    for token in inputs[:-1]:
        piece = spans.pop(token) if token >= FIRST_SENTINEL else [token]
        text += piece
        mask += [token >= FIRST_SENTINEL] * len(piece)
    assert not spans
    return text, mask


def segments(ids, segment_ids) -> list[list[int]]:
    return [ids[segment_ids == number].tolist() for number in range(1, segment_ids.max(initial=0) + 1)]


def pairs(out) -> list[tuple[list[int], list[int]]]:
    read = segments(out["inputs"], out["inputs_segment_ids"])
    return list(zip(read, segments(out["targets"], out["segment_ids"]), strict=True))


def corrupt(row, seed: int = 0, **fields) -> dict:
    return SpanCorruption(vocabulary=VOCABULARY, **fields)(row, np.random.default_rng(seed))


@pytest.mark.parametrize(("density", "span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.5, 32.0), (0.25, 1.0)])
def test_the_lengths_are_those_of_t5(density, span):
    corruption = SpanCorruption(vocabulary=VOCABULARY, noise_density=density, mean_span_length=span)
    for size in (*range(64, 300, 7), 568, 1024, 2048):
        assert corruption.lengths(size) == t5_lengths(size, density, span)


def test_t5s_512_inputs_are_made_of_568_tokens():
    corruption = SpanCorruption(vocabulary=VOCABULARY)
    assert corruption.lengths(568) == (512, 114)
    assert corruption.lengths(569)[0] > 512


def test_a_row_of_one_text_becomes_exactly_what_t5_makes_of_it():
    (text,) = documents([568])
    out = corrupt(pack([text], 568, cut=True))
    assert (out["inputs"].shape, out["targets"].shape) == ((512,), (114,))
    ((inputs, targets),) = pairs(out)
    restored, mask = restore(inputs, targets)
    assert restored == text.tolist()
    assert (inputs, targets) == t5_pair(text.tolist(), mask)
    assert sum(mask) == round(0.15 * 568)
    assert sum(1 for _ in itertools.groupby(mask)) == 2 * round(
        85 / 3
    )  # text and noise in turn, text first, noise last
    assert mask[-1]
    assert not mask[0]
    assert out["tokens"].tolist() == [END, *targets[:-1]]
    assert out["positions"].tolist() == list(range(114))
    assert out["inputs_positions"].tolist() == list(range(512))


def test_every_division_into_spans_is_equally_likely():
    rng = np.random.default_rng(0)
    drawn = [tuple(_cut(7, 3, rng).tolist()) for _ in range(6000)]
    possible = [sizes for sizes in itertools.product(range(1, 6), repeat=3) if sum(sizes) == 7]
    assert stats.chisquare([drawn.count(sizes) for sizes in possible]).pvalue > 1e-3
    assert sum(drawn.count(sizes) for sizes in possible) == 6000


def test_shares_are_in_proportion_and_within_their_bounds():
    least, most = np.zeros(7, np.int64), np.full(7, 100)
    assert sorted(_share(17, np.full(7, 9), least, most).tolist()) == [2, 2, 2, 2, 3, 3, 3]
    # seats by the Sainte-Lague divisors 1, 3, 5 ..., the highest quotient first
    weights = np.array([53, 24, 23, 11, 7, 2, 90])
    seats = [0] * 7
    for _ in range(21):
        seats[max(range(7), key=lambda i: weights[i] / (2 * seats[i] + 1))] += 1
    assert _share(21, weights, least, most).tolist() == seats
    bounded = _share(21, weights, least + 1, np.array([4, 4, 4, 4, 4, 1, 6]))
    assert bounded.sum() == 21
    assert bounded.tolist()[-2:] == [1, 6]
    assert (bounded <= [4, 4, 4, 4, 4, 1, 6]).all()


def test_density_and_span_length_hold_over_many_rows():
    masks = []
    for seed in range(50):
        ((inputs, targets),) = pairs(corrupt(pack(documents([255], seed), 256), seed))
        masks.append(restore(inputs, targets)[1])
    noise, spans = t5_lengths(255, 0.15, 3.0)[1] - round(38 / 3) - 1, round(38 / 3)
    assert {sum(mask) for mask in masks} == {noise} == {38}
    lengths = [len(list(group)) for mask in masks for taken, group in itertools.groupby(mask) if taken]
    assert np.mean(lengths) == pytest.approx(noise / spans)
    # noise is spread evenly but for the two ends, of which T5 takes the first never and the last always
    middle = np.mean(masks, 0)[30:-30]
    assert abs(middle.mean() - 0.15) < 0.02


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(0, 90), max_size=12),
    length=st.integers(1, 200),
    cut=st.booleans(),
    density=st.sampled_from([0.05, 0.15, 0.5, 0.7]),
    span=st.sampled_from([1.0, 3.0, 20.0]),
    seed=st.integers(0, 9),
)
def test_no_segment_leaks_into_another_and_each_is_taken_back_exactly(sizes, length, cut, density, span, seed):
    span = max(span, 3.0) if density > 0.5 else span  # else no text is left between spans
    while sum(sizes) + len(sizes) > length:
        sizes = sizes[:-1]
    texts = documents(sizes, seed)
    corruption = SpanCorruption(vocabulary=Bytes(extra_ids=300), noise_density=density, mean_span_length=span)
    row = pack(texts, length, cut and bool(sizes) and sizes[-1] > 0)
    out = corruption(row, np.random.default_rng(seed))
    assert tuple(map(len, (out["inputs"], out["targets"]))) == corruption.lengths(length)
    assert not out["inputs"][out["inputs_segment_ids"] == 0].any()
    assert not out["targets"][out["segment_ids"] == 0].any()
    top = corruption.vocabulary.size - 1
    rest = iter(texts)
    for inputs, targets in pairs(out):
        # ids as with VOCABULARY, whose helpers read them
        shift = lambda ids: [id_ - (top - TOP) if id_ > 258 else id_ for id_ in ids]
        assert max(inputs) == targets[0] == top
        restored, mask = restore(shift(inputs), shift(targets))
        assert any(text.tolist() == restored for text in rest)  # one of those not yet seen, in the row's order
        assert 0 < sum(mask) < len(mask)


def test_a_row_of_several_documents_uses_all_of_them_and_fills_its_arrays():
    texts = documents([150, 90, 200, 124])  # with an end each: 568
    out = corrupt(pack(texts, 568))
    restored = [restore(*pair) for pair in pairs(out)]
    assert [text for text, _ in restored] == [text.tolist() for text in texts]
    shares = [sum(mask) / len(mask) for _, mask in restored]
    assert np.allclose(shares, 0.15, atol=0.01)
    assert (out["segment_ids"] == 0).sum() <= 2
    spans = sum(id_ >= FIRST_SENTINEL for id_ in out["inputs"])
    assert 26 <= spans <= 28


@pytest.mark.parametrize(("density", "span"), [(0.15, 3.0), (0.5, 3.0), (0.7, 5.0), (0.9, 20.0)])
def test_full_rows_of_many_documents_fit_at_any_density(density, span):
    for count in (2, 5, 9):
        texts = documents([63] * count)
        out = corrupt(pack(texts, 64 * count), noise_density=density, mean_span_length=span)
        assert [restore(*pair)[0] for pair in pairs(out)] == [text.tolist() for text in texts]


def test_documents_too_short_for_an_end_each_lose_the_shortest_or_go_together():
    texts = documents([13] * 40)
    row = pack(texts, 568)
    apart = pairs(corrupt(row))
    assert len(apart) == 36
    assert all(any(restore(*pair)[0] == text.tolist() for text in texts) for pair in apart)
    long = documents([13] * 20 + [100, 80] + [5] * 16)
    assert [len(restore(*pair)[0]) for pair in pairs(corrupt(pack(long, 568)))] == [13] * 20 + [100, 80] + [5] * 10
    ((inputs, targets),) = pairs(corrupt(row, documents="together"))
    assert restore(inputs, targets)[0] == row["targets"][row["segment_ids"] > 0].tolist()[:-1]


def test_a_padding_row_gives_padding_of_the_same_shapes_and_types():
    for form in ("encoder_decoder", "prefix_lm", "causal_lm"):
        empty, full = (corrupt(pack(texts, 64), form=form) for texts in ([], documents([63])))
        signature = lambda out: {name: (array.shape, array.dtype) for name, array in out.items()}
        assert signature(empty) == signature(full)
        assert not any(array.any() for array in empty.values())


def test_one_decoder_reads_the_inputs_and_learns_the_targets():
    row = pack(documents([40, 60]), 128)
    both, two = corrupt(row, form="prefix_lm"), corrupt(row)
    whole = [inputs + targets for inputs, targets in pairs(two)]
    assert segments(both["targets"], both["segment_ids"]) == whole
    assert segments(both["tokens"], both["segment_ids"]) == [[END, *ids[:-1]] for ids in whole]
    learnt = [targets for _, targets in pairs(two)]
    read = [[END, *inputs] for inputs, _ in pairs(two)]
    assert segments(both["targets"][both["loss_mask"]], both["segment_ids"][both["loss_mask"]]) == learnt
    assert segments(both["tokens"][both["prefix"]], both["segment_ids"][both["prefix"]]) == read
    causal = corrupt(row, form="causal_lm")
    assert both.keys() - causal.keys() == {"prefix"}
    assert all((causal[name] == both[name]).all() for name in causal)


def test_a_row_is_the_same_for_the_same_generator():
    row = pack(documents([100]), 128)
    assert all((corrupt(row, 3)[name] == corrupt(row, 3)[name]).all() for name in corrupt(row))
    assert (corrupt(row, 3)["inputs"] != corrupt(row, 4)["inputs"]).any()


@pytest.mark.parametrize("extra_ids", [0, 5])
def test_too_few_sentinels_are_refused_with_their_number(extra_ids):
    row = pack(documents([500]), 568)
    with pytest.raises(UserError, match=f"28 sentinels are needed, .* bytes only {extra_ids} stand for nothing yet"):
        SpanCorruption(vocabulary=Bytes(extra_ids=extra_ids))(row, np.random.default_rng(0))


def test_the_end_id_is_no_sentinel_though_it_stands_for_no_text():
    class EndsHighest(Bytes):
        eos_id = TOP

    with pytest.raises(UserError, match="only 0 stand for nothing yet"):
        SpanCorruption(vocabulary=EndsHighest(extra_ids=100))(pack([], 568), np.random.default_rng(0))


def test_text_that_is_only_read_is_not_corrupted():
    with pytest.raises(UserError, match="parts that are only read"):
        corrupt({**pack([], 8), "loss_mask": np.ones(8, bool)})


@pytest.mark.parametrize(
    "fields", [{"noise_density": 0.0}, {"noise_density": 1.0}, {"mean_span_length": 0.5}, {"noise_density": 0.8}]
)
def test_noise_that_leaves_no_text_is_refused(fields):
    with pytest.raises(UserError, match=r"SpanCorruption\.(noise_density|mean_span_length)="):
        SpanCorruption(vocabulary=VOCABULARY, **fields)


def test_a_prefix_is_seen_within_its_segment_and_all_behind_it_is_learnt():
    row = pack(documents([9, 0, 30]), 48)
    out = PrefixLM()(row, np.random.default_rng(1))
    for number, size in ((1, 10), (2, 1), (3, 31)):
        here = row["segment_ids"] == number
        prefix, learnt = out["prefix"][here], out["loss_mask"][here]
        seen = prefix.sum()
        assert 1 <= seen <= size
        assert prefix.tolist() == [i < seen for i in range(size)]
        # target i is token i + 1: learnt unless it is in the prefix
        assert learnt.tolist() == [i + 1 >= seen for i in range(size)]
    assert not (out["prefix"] | out["loss_mask"])[row["segment_ids"] == 0].any()
    assert out["tokens"] is row["tokens"]


def test_every_size_of_a_prefix_is_equally_likely():
    row, rng = pack(documents([7]), 10), np.random.default_rng(0)
    sizes = [int(PrefixLM()(row, rng)["prefix"].sum()) for _ in range(4000)]
    assert stats.chisquare([sizes.count(size) for size in range(1, 9)]).pvalue > 1e-3
    assert set(sizes) == set(range(1, 9))


def test_a_prefix_keeps_what_was_only_read_before():
    mask = np.array([0, 0.5] * 5, np.float32)
    row = {**pack(documents([9]), 10), "loss_mask": mask}
    learnt = PrefixLM()(row, np.random.default_rng(0))["loss_mask"]
    bare = PrefixLM()({**row, "loss_mask": np.ones(10, bool)}, np.random.default_rng(0))["loss_mask"]
    assert learnt.dtype == np.float32
    assert learnt.tolist() == (mask * bare).tolist()


@settings(deadline=None)
@given(text=st.text(), seed=st.integers(0, 99))
def test_a_document_is_put_together_again_from_prefix_middle_and_suffix(text, seed):
    for spm_rate in (0.0, 1.0):
        fill = FillInTheMiddle(vocabulary=VOCABULARY, rate=1.0, spm_rate=spm_rate)
        example = fill({"text": text, "id": 3}, np.random.default_rng(seed))
        assert example.keys() == {"tokens", "id"}
        ids = example["tokens"].tolist()
        pre, suf, mid = (ids.index(TOP - i) for i in range(3))
        decode = lambda ids: bytes(id_ - 3 for id_ in ids).decode()  # fails where a character is cut
        suffix = decode(ids[suf + 1 : mid])
        if spm_rate:
            assert (pre, suf) == (0, 1)
            assert decode(ids[mid + 1 :]) + suffix == text
        else:
            assert pre == 0 < suf < mid
            assert decode(ids[1:suf]) + decode(ids[mid + 1 :]) + suffix == text


def test_the_rates_of_fill_in_the_middle_are_kept():
    fill, rng = FillInTheMiddle(vocabulary=VOCABULARY, rate=0.5, spm_rate=0.25), np.random.default_rng(0)
    found = [fill({"text": b"abc"}, rng) for _ in range(6000)]
    cut = [example["tokens"].tolist() for example in found if "tokens" in example]
    assert all(example == {"text": b"abc"} for example in found if "tokens" not in example)
    assert abs(len(cut) / 6000 - 0.5) < 0.02
    # PSM begins like SPM where the prefix is empty: 7 of the 16 pairs of cuts
    spm = sum(ids[:2] == [TOP, TOP - 1] for ids in cut)
    assert abs(spm / len(cut) - (0.25 + 0.75 * 7 / 16)) < 0.03


def test_every_pair_of_cuts_is_equally_likely():
    fill, rng = FillInTheMiddle(vocabulary=VOCABULARY, rate=1.0, spm_rate=0.0), np.random.default_rng(0)
    found = []
    for _ in range(5000):
        ids = fill({"text": "äbc"}, rng)["tokens"].tolist()
        prefix, middle = ids[1 : ids.index(TOP - 1)], ids[ids.index(TOP - 2) + 1 :]
        found.append((VOCABULARY.decode(prefix), VOCABULARY.decode(middle)))
    drawn = {}
    for first, second in itertools.product(range(4), repeat=2):
        a, b = sorted((first, second))
        drawn["äbc"[:a], "äbc"[a:b]] = drawn.get(("äbc"[:a], "äbc"[a:b]), 0) + 5000 / 16
    assert set(found) == set(drawn)
    assert stats.chisquare([found.count(pair) for pair in drawn], list(drawn.values())).pvalue > 1e-3


def test_documents_that_are_cut_leave_the_bytes_of_the_text_unknown_and_not_too_few(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20)))
    source = JsonLines(str(tmp_path / "a.jsonl"), holdout=0)
    for rate, known in ((0.0, True), (0.5, False)):
        fim = FillInTheMiddle(vocabulary=VOCABULARY, rate=rate)
        data = Text(batch_size=1, sequence_length=32, source=source, vocabulary=VOCABULARY, transforms=(fim,))
        stats = data.open("train", 0).stats()
        assert stats.get("bytes") == (stats["tokens"] - 20 if known else None)


def test_marks_of_a_published_vocabulary_are_given_by_id():
    fill = FillInTheMiddle(vocabulary=Bytes(), rate=1.0, spm_rate=0.0, marks=(5, 6, 7))
    ids = fill({"text": "abcdef"}, np.random.default_rng(0))["tokens"]
    assert ids.dtype == np.int32
    assert [ids.tolist().count(mark) for mark in (5, 6, 7)] == [1, 1, 1]


def test_fill_in_the_middle_refuses_what_it_cannot_cut_or_mark():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="no field 'text' to cut; did you mean 'texts'"):
        FillInTheMiddle(vocabulary=VOCABULARY)({"texts": "a"}, rng)
    with pytest.raises(UserError, match="the field 'text' is 5, not text"):
        FillInTheMiddle(vocabulary=VOCABULARY, rate=1.0)({"text": 5}, rng)
    with pytest.raises(UserError, match="3 sentinels are needed"):
        FillInTheMiddle(vocabulary=Bytes(), rate=1.0)({"text": "a"}, rng)
    with pytest.raises(UserError, match=r"FillInTheMiddle\.rate=2"):
        FillInTheMiddle(vocabulary=VOCABULARY, rate=2)
    with pytest.raises(UserError, match=r"FillInTheMiddle\.marks="):
        FillInTheMiddle(vocabulary=VOCABULARY, marks=(1, 1, 2))


@pytest.mark.parametrize(
    "transform",
    [
        SpanCorruption(vocabulary=VOCABULARY),
        SpanCorruption(vocabulary=VOCABULARY, form="prefix_lm"),
        SpanCorruption(vocabulary=VOCABULARY, form="causal_lm", documents="together"),
        PrefixLM(),
    ],
    ids=["encoder_decoder", "prefix_lm", "causal_lm", "prefix"],
)
def test_batches_of_text_have_the_shapes_that_the_config_promises(transform, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"code": f"def f{i}(x): return x * {i}"}) + "\n" for i in range(50)))
    fill = FillInTheMiddle(vocabulary=VOCABULARY, field="code")
    config = dict(sequence_length=200, batch_size=4, vocabulary=VOCABULARY, field="code", row_transforms=(transform,))
    data = Text(source=JsonLines(str(path), holdout=0), transforms=(fill,), **config)
    examples = data.open("train", seed=0)
    rows = examples.rows(np.array([0, 3, 5, -1]))
    promised = {name: (array.shape, array.dtype) for name, array in data.abstract().items()}
    assert {name: (array.shape, array.dtype) for name, array in rows.items()} == promised
    assert rows["segment_ids"][:3].any(1).all()
    assert not rows["segment_ids"][3].any()
    assert all((array == rows[name]).all() for name, array in examples.rows(np.array([0, 3, 5, -1])).items())
    later = examples.rows(np.array([0, 3, 5]) + len(examples))
    assert any((array != rows[name][:3]).any() for name, array in later.items())
    assert max(array.max() for name, array in rows.items() if name in ("tokens", "inputs")) < data.vocab_size
