"""The order of examples, against plain loops: three epochs, one, two and four hosts, kills at random batches."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrepro.core import UserError
from axrepro.data import (
    BadRecord,
    BestFit,
    Bytes,
    Curriculum,
    Data,
    Feature,
    Fixed,
    Mixture,
    Mixup,
    Part,
    Pipeline,
    Records,
    Source,
    Stage,
    Temperature,
    Text,
    TextFiles,
    permutation,
)
from axrepro.data.pipeline import block_permutation

BATCH = 8


class _Numbers(Records):
    def __init__(self, start, size, bad=(), blocks=None):
        self._start, self._size, self._bad, self._blocks = start, size, bad, blocks

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        if index in self._bad:
            raise BadRecord(f"{self.name(index)} is bad")
        return {"number": self._start + index}

    def name(self, index):
        return f"numbers, record {index}"

    @property
    def blocks(self):
        return None if self._blocks is None else np.array(self._blocks)


@dataclass(frozen=True, kw_only=True)
class Numbers(Source):
    """Records that are the numbers from `start` on."""

    size: int
    start: int = 0
    bad: tuple[int, ...] = ()
    blocks: tuple[int, ...] | None = None

    def open(self, split):
        return _Numbers(self.start, self.size, self.bad, self.blocks)


def draw(example, rng):
    """A random part, which has to come back as it was, too."""
    return {**example, "drawn": rng.integers(2**31)}


def numbers(size: int, batch_size=BATCH, **source) -> Pipeline:
    features = (Feature(name="number", dtype="int32"), Feature(name="drawn", dtype="int32"))
    return Pipeline(batch_size=batch_size, source=Numbers(size=size, **source), transforms=(draw,), features=features)


def taken(data: Data, seed: int, plan: list[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
    """Global batches of a run that is killed and started anew.

    Args:
      plan: (hosts, batches) of each start.
    """
    out, position = [], None
    for hosts, batches in plan:
        cursors = [data.cursor("train", seed) for _ in range(hosts)]
        for cursor in cursors:
            if position is not None:
                cursor.seek(json.loads(position))
        size = data.batch_size // hosts
        for _ in range(batches):
            parts = [cursor.rows(h * size, (h + 1) * size) for h, cursor in enumerate(cursors)]
            out.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
            for cursor in cursors:
                cursor.advance()
            assert len({json.dumps(cursor.position()) for cursor in cursors}) == 1
            position = json.dumps(cursors[0].position())
        # what a host made ahead of its last reported batch is lost with it
        for cursor in cursors:
            cursor.advance()
    return out


runs = st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 4)), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 40), seed=st.integers(0, 2**40), plan=runs)
def test_examples_come_in_the_order_of_the_loop_whatever_the_hosts_and_kills(size, seed, plan):
    total = BATCH * sum(batches for _, batches in plan)
    expected = [n for e in range(-(-total // size)) for n in permutation(size, seed, e)(np.arange(size)).tolist()]
    batches = taken(numbers(size), seed, plan)
    assert np.concatenate([batch["number"] for batch in batches]).tolist() == expected[:total]
    assert all(batch["valid"].all() for batch in batches)
    whole = taken(numbers(size), seed, [(1, len(batches))])
    np.testing.assert_array_equal([b["drawn"] for b in batches], [b["drawn"] for b in whole])
    drawn = np.concatenate([batch["drawn"] for batch in batches])
    assert len(set(drawn.tolist())) >= len(drawn) - 1  # anew in every epoch


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_three_epochs_hold_every_example_three_times(size, seed):
    batches = taken(numbers(size, batch_size=4), seed, [(2, -(-3 * size // 4))])
    seen = np.concatenate([batch["number"] for batch in batches])[: 3 * size].reshape(3, size)
    assert np.sort(seen, axis=1).tolist() == [list(range(size))] * 3


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=30), seed=st.integers(0, 2**40))
def test_records_read_in_blocks_come_from_few_blocks_at_a_time(cuts, seed):
    blocks = np.concatenate([[0], np.cumsum(cuts)])
    size = int(blocks[-1])
    for epoch in range(2):
        order = block_permutation(blocks, seed, epoch)
        numbers = order(np.arange(size))
        assert sorted(numbers.tolist()) == list(range(size))
        np.testing.assert_array_equal(order(np.arange(size)[::-1]), numbers[::-1])
        block = np.searchsorted(blocks, numbers, side="right") - 1
        first = {b: int(np.flatnonzero(block == b)[0]) for b in set(block.tolist())}
        last = {b: int(np.flatnonzero(block == b)[-1]) for b in set(block.tolist())}
        for place in range(size):
            assert sum(first[b] <= place <= last[b] for b in first) <= 8


def test_blocks_are_used_where_the_records_have_them():
    data = numbers(24, blocks=(0, 8, 16, 24))
    seen = [batch["number"].tolist() for batch in taken(data, 0, [(1, 3)])]
    expected = block_permutation(np.array([0, 8, 16, 24]), 0, 0)(np.arange(24)).tolist()
    assert np.ravel(seen).tolist() == expected


# ---- mixtures


def mixture_by_loop(rates_at, sizes, seed, batch_size, steps):
    """Counts of each part by step, with plain arithmetic."""
    start = np.random.default_rng((4, seed)).random()
    counts = []
    for step in range(steps):
        rates = rates_at(step)
        offset = (start + step * (5**0.5 - 1) / 2) % 1
        points = [(k + offset) / batch_size for k in range(batch_size)]
        counts.append([])
        low = 0.0
        for number, rate in enumerate(rates):
            high = low + rate / sum(rates)
            last = number == len(rates) - 1
            counts[-1].append(sum(low <= p and (p < high or last) for p in points))
            low = high
    return np.array(counts)


def mixture(sizes, shares, **settings) -> Mixture:
    parts = tuple(
        Part(name=f"p{i}", data=numbers(size, batch_size=1, start=1000 * i), rate=rate)
        for i, (size, rate) in enumerate(zip(sizes, shares, strict=True))
    )
    return Mixture(batch_size=BATCH, parts=parts, **settings)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
    plan=runs,
    data=st.data(),
)
def test_a_mixture_takes_each_part_in_its_own_order_and_the_counts_of_the_loop(sizes, seed, plan, data):
    rates = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    mixed = mixture(sizes, rates)
    batches = taken(mixed, seed, plan)
    counts = mixture_by_loop(lambda step: rates, sizes, seed, BATCH, len(batches))
    seen = [np.bincount(batch["number"] // 1000, minlength=len(sizes)) for batch in batches]
    np.testing.assert_array_equal(seen, counts)
    share = np.array(rates) / sum(rates)
    assert (np.abs(counts - BATCH * share) < 1 + 1e-9).all()
    every = np.concatenate([batch["number"] for batch in batches])
    for part, (name, alone) in enumerate(mixed.leaves().items()):
        mine = every[every // 1000 == part]
        examples = mixed._opened("train", seed)[name]
        np.testing.assert_array_equal(mine, examples.rows(np.arange(len(mine)))["number"])
        assert alone.batch_size == BATCH


def test_counts_stay_near_the_shares():
    mixed = mixture([50, 70, 20], [5, 3, 0.37])
    cursor = mixed.cursor("train", 3)
    for step in range(1, 2001):
        cursor.advance()
        if step % 500 == 0:
            seen = list(cursor.counts().values())
            assert sum(seen) == BATCH * step
            np.testing.assert_allclose(seen, BATCH * step * np.array([5, 3, 0.37]) / 8.37, atol=6)


@pytest.mark.parametrize("linear", [False, True])
def test_a_curriculum_changes_the_shares_at_its_steps(linear):
    stages = (Stage(step=0, rates=(1.0, 0.0)), Stage(step=20, rates=(1.0, 3.0)), Stage(step=60, rates=(0.0, 2.0)))
    mixed = mixture([50, 70], [1, 1], rates=Curriculum(stages=stages, linear=linear))
    seen = [(batch["number"] >= 1000).sum() for batch in taken(mixed, 0, [(2, 35), (4, 45)])]
    if linear:
        expected = [BATCH * np.interp(step, [0, 20, 60], [0, 0.75, 1]) for step in range(80)]
        np.testing.assert_allclose(seen, expected, atol=1)
    else:
        assert seen == [0] * 20 + [6] * 40 + [8] * 20


def test_temperature_makes_shares_of_sizes():
    mixed = mixture([100, 10_000], [1, 1], rates=Temperature(temperature=2.0))
    np.testing.assert_allclose(mixed.shares(0, {"p0": 100, "p1": 10_000}), [1 / 11, 10 / 11])
    limited = mixture([100, 10_000], [1, 2], rates=Temperature(limit=400))
    np.testing.assert_allclose(limited.shares(0, {"p0": 100, "p1": 10_000}), [1 / 9, 8 / 9])
    cold = mixture([100, 10_000, 200], [1, 0, 1], rates=Temperature(temperature=0.001))
    np.testing.assert_allclose(cold.shares(0, {"p0": 1e6, "p1": 1e12, "p2": 2e6}), [0, 0, 1], atol=1e-9)


def test_domains_share_their_rate_among_their_data_sets():
    inner = replace_names(mixture([10, 20], [1, 3]))
    outer = Mixture(
        batch_size=BATCH,
        parts=(Part(name="web", data=inner, rate=1), Part(name="code", data=numbers(30, start=5000), rate=3)),
    )
    assert list(outer.leaves()) == ["web/a", "web/b", "code"]
    np.testing.assert_allclose(outer.shares(0, {"web/a": 10, "web/b": 20, "code": 30}), [1 / 16, 3 / 16, 3 / 4])
    cursor = outer.cursor("train", 0)
    for _ in range(40):
        cursor.advance()
    np.testing.assert_allclose(list(cursor.counts().values()), [20, 60, 240], atol=3)
    sized = Mixture(batch_size=BATCH, parts=outer.parts, rates=Temperature())
    np.testing.assert_allclose(
        sized.shares(0, {"web/a": 10, "web/b": 20, "code": 30}), [30 / 120 / 4, 30 / 120 * 3 / 4, 90 / 120]
    )


def replace_names(mixed: Mixture) -> Mixture:
    parts = tuple(Part(name=name, data=p.data, rate=p.rate) for name, p in zip("ab", mixed.parts, strict=True))
    return Mixture(batch_size=1, parts=parts, rates=Fixed())


def test_the_eval_split_of_a_mixture_is_every_part_once_spread_evenly():
    mixed = mixture([5, 9], [1, 1])
    cursor = mixed.cursor("eval", 0)
    seen = []
    while not cursor.ended:
        rows = cursor.rows(0, BATCH)
        seen += rows["number"][rows["valid"]].tolist()
        cursor.advance()
    expected = [((k + 0.5) / n, start + k) for start, n in ((0, 5), (1000, 9)) for k in range(n)]
    assert seen == [number for _, number in sorted(expected)]


def test_a_mixture_goes_on_with_other_rates_and_batch_size():
    cursor = mixture([50, 70], [1, 1]).cursor("train", 0)
    for _ in range(5):
        cursor.advance()
    other = Mixture(batch_size=4, parts=mixture([50, 70], [1, 3]).parts).cursor("train", 0)
    other.seek(cursor.position())
    before = cursor.counts()
    numbers = other.rows(0, 4)["number"]
    for part, name in enumerate(before):
        mine = numbers[numbers // 1000 == part]
        examples = mixture([50, 70], [1, 1])._opened("train", 0)[name]
        np.testing.assert_array_equal(mine, examples.rows(before[name] + np.arange(len(mine)))["number"])


@pytest.mark.parametrize(
    "position",
    [
        {},
        {"next_example": 5},
        {"next_batch": 1, "next_example": {"p0": 1}},
        {"next_batch": -1, "next_example": {}},
    ],
)
def test_a_position_of_other_data_is_refused(position):
    with pytest.raises(UserError, match="no position of a mixture of p0, p1"):
        mixture([5, 9], [1, 1]).cursor("train", 0).seek(position)


def test_parts_that_do_not_go_together_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    text = Text(batch_size=1, sequence_length=8, source=TextFiles(f"{tmp_path}/a.txt", separator=" ", holdout=0))
    with pytest.raises(UserError, match=r"the same arrays; text gives .*numbers"):
        Mixture(batch_size=8, parts=(Part(name="text", data=text), Part(name="numbers", data=numbers(5)))).abstract()
    missing = Text(batch_size=1, sequence_length=8, source=TextFiles(f"{tmp_path}/b.txt"))
    with pytest.raises(UserError, match=r"the part 'gone': no file matches .*b\.txt"):
        Mixture(batch_size=8, parts=(Part(name="gone", data=missing),)).cursor("train", 0)
    longer = Mixture(batch_size=8, parts=(Part(name="text", data=text),), sequence_length=32)
    assert longer.cursor("train", 0).rows(0, 8)["tokens"].shape == (8, 32)


# ---- bad records


def test_bad_records_end_the_run_or_are_padding_and_counted():
    with pytest.raises(BadRecord, match="record 3 is bad"):
        taken(numbers(10, bad=(3, 7)), 0, [(1, 2)])
    allowed = Pipeline(**{**vars(numbers(10, bad=(3, 7))), "max_bad_records": 2})
    batches = taken(allowed, 0, [(1, 5)])
    for batch in batches:
        assert not batch["number"][~batch["valid"]].any()
    seen = np.concatenate([batch["number"][batch["valid"]] for batch in batches])
    assert sorted(set(seen.tolist())) == [0, 1, 2, 4, 5, 6, 8, 9]
    examples = allowed.open("train", 0)
    examples.rows(np.arange(20))
    assert examples.bad_records == {3: "numbers, record 3 is bad", 7: "numbers, record 7 is bad"}
    too_many = Pipeline(**{**vars(numbers(10, bad=(3, 7))), "max_bad_records": 1})
    with pytest.raises(UserError, match="2 bad records, and max_bad_records=1; the last: numbers, record"):
        taken(too_many, 0, [(1, 2)])


@pytest.mark.parametrize("limit", [0, 1])
def test_a_record_that_ended_the_run_does_so_again(limit):
    data = replace(numbers(10, bad=(3, 7)), max_bad_records=limit)
    cursor = data.cursor("train", 0)
    for _ in range(3):
        with pytest.raises(UserError, match="is bad"):
            cursor.rows(0, 10)
    assert len(cursor.bad_records) == limit


def test_a_bad_record_in_a_pair_is_counted_by_its_own_number():
    def as_float(example, rng):
        return {"number": np.full(1, example["number"], np.float32)}

    features, transforms = (Feature(name="number", shape=(1,)),), (as_float, Mixup(fields=("number",)))
    source = Numbers(size=10, bad=(3,))
    data = Pipeline(batch_size=10, source=source, features=features, transforms=transforms, max_bad_records=1)
    examples = data.open("train", 0)
    valid = examples.rows(np.arange(200))["valid"]
    assert 200 - valid.sum() > 25  # 20 times the first of a pair, and about as often the second
    assert examples.bad_records == {3: "numbers, record 3 is bad"}


def test_features_that_do_not_fit_are_named():
    wrong_shape = Pipeline(**{**vars(numbers(4)), "features": (Feature(name="number", shape=(2,)),)})
    with pytest.raises(BadRecord, match=r"record \d: 'number' has shape \[\], not \[2\]"):
        taken(wrong_shape, 0, [(1, 1)])
    wrong_type = Pipeline(**{**vars(numbers(4)), "features": (Feature(name="number", dtype="bool"),)})
    with pytest.raises(BadRecord, match="'number' is int64, which is no bool"):
        taken(wrong_type, 0, [(1, 1)])
    small = Pipeline(**{**vars(numbers(4, start=127)), "features": (Feature(name="number", dtype="int8"),)})
    with pytest.raises(BadRecord, match=r"record [123]: 'number' has 1\d\d to 1\d\d, too much for int8"):
        taken(small, 0, [(1, 1)])
    ragged = replace(numbers(4), transforms=(lambda example, rng: {**example, "number": [[1], [1, 2]]},))
    with pytest.raises(BadRecord, match=r"record \d: 'number' is no array"):
        taken(ragged, 0, [(1, 1)])
    missing = Pipeline(**{**vars(numbers(4)), "features": (Feature(name="numbr"),)})
    with pytest.raises(UserError, match="has no field 'numbr' in the end; did you mean 'number'"):
        taken(missing, 0, [(1, 1)])
    with pytest.raises(UserError, match=r"Feature\.dtype='text'"):
        Feature(name="x", dtype="text")


def test_text_keeps_its_order_with_every_packing(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i} " + "x" * (i % 17) for i in range(90)))
    source = TextFiles(f"{tmp_path}/a.txt", separator="\n", holdout=0)
    data = Text(batch_size=BATCH, sequence_length=24, source=source, packing=BestFit())
    one = taken(data, 5, [(1, 20)])
    two = taken(data, 5, [(2, 3), (4, 8), (1, 9)])
    for name in one[0]:
        np.testing.assert_array_equal([b[name] for b in one], [b[name] for b in two])


def test_what_a_mixture_would_ignore_is_refused():
    with pytest.raises(UserError, match="the part 'own' has workers of its own"):
        Mixture(batch_size=8, parts=(Part(name="own", data=replace(numbers(5), workers=2)),))
    text = Text(batch_size=8, sequence_length=8, source=TextFiles("unused"))
    other = replace(text, vocabulary=Bytes(extra_ids=5))
    with pytest.raises(UserError, match=r"share a vocabulary; a has Bytes\(extra_ids=0\), b Bytes\(extra_ids=5\)"):
        Mixture(batch_size=8, parts=(Part(name="a", data=text), Part(name="b", data=other))).abstract()
