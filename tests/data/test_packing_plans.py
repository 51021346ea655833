"""Plans of packing, against packers that place document after document."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrepro.core import UserError
from axrepro.data import BestFit, Concatenate, FirstFit, permutation
from axrepro.data.packing import Packing

sizes_of = st.lists(st.integers(1, 30), min_size=1, max_size=40)
ALL = [Concatenate(), BestFit(), FirstFit(), FirstFit(open_rows=2)]


def contents(packing: Packing, sizes, length, seed=0, shuffle=True, epoch=0) -> list[list[tuple[int, int, int]]]:
    """(document, begin, size) of each row of an epoch."""
    plan = packing.plan(np.array(sizes), length, seed, shuffle)
    segments = plan.segments(epoch, np.arange(plan.rows))
    rows = [[] for _ in range(plan.rows)]
    for row, *segment in np.stack(segments, 1).tolist():
        rows[row].append(tuple(segment))
    return rows


def pieces(size: int, length: int) -> list[int]:
    return [length] * (size // length) + ([size % length] if size % length else [])


def best_fit_decreasing(sizes, length) -> list[list[int]]:
    """Sizes in each row, placed one by one in the fullest row with room."""
    rows: list[list[int]] = []
    for size in sorted((piece for whole in sizes for piece in pieces(whole, length)), reverse=True):
        fitting = [row for row in rows if sum(row) + size <= length]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return rows


def first_fit(order, sizes, length, open_rows) -> list[list[tuple[int, int, int]]]:
    rows, still_open = [], []
    for document in order:
        begin = 0
        for size in pieces(sizes[document], length):
            fitting = [row for row in still_open if sum(s for _, _, s in row) + size <= length]
            if not fitting:
                rows.append([])
                still_open = [*still_open, rows[-1]][-open_rows:]
                fitting = [rows[-1]]
            fitting[0].append((document, begin, size))
            begin += size
    return rows


@pytest.mark.parametrize("packing", ALL, ids=str)
@settings(max_examples=25, deadline=None)
@given(sizes=sizes_of, length=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_every_place_of_every_document_is_in_one_row_of_every_epoch(packing, sizes, length, seed):
    for epoch in range(3):
        seen = Counter()
        for row in contents(packing, sizes, length, seed, epoch=epoch):
            assert 0 < sum(size for _, _, size in row) <= length
            for document, begin, size in row:
                seen.update((document, begin + i) for i in range(size))
        assert seen == Counter((d, i) for d, size in enumerate(sizes) for i in range(size))


@pytest.mark.parametrize("packing", ALL, ids=str)
@settings(max_examples=30, deadline=None)
@given(sizes=sizes_of, length=st.integers(1, 20), seed=st.integers(0, 2**40), data=st.data())
def test_rows_looked_up_one_by_one_are_those_of_the_epoch(packing, sizes, length, seed, data):
    plan = packing.plan(np.array(sizes), length, seed, True)
    chosen = np.array(data.draw(st.lists(st.integers(0, plan.rows - 1), min_size=1, max_size=9)))
    segments = plan.segments(2, chosen)
    found = defaultdict(list)
    for row, *segment in np.stack(segments, 1).tolist():
        found[row].append(tuple(segment))
    whole = contents(packing, sizes, length, seed, epoch=2)
    assert [found[i] for i in range(len(chosen))] == [whole[i] for i in chosen]
    assert (np.diff(segments.row) >= 0).all()


@settings(max_examples=50, deadline=None)
@given(sizes=sizes_of, length=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_best_fit_puts_sizes_together_like_the_packer_of_single_documents(sizes, length, seed):
    expected = Counter(tuple(sorted(row)) for row in best_fit_decreasing(sizes, length))
    for epoch in range(2):
        rows = contents(BestFit(), sizes, length, seed, epoch=epoch)
        assert len(rows) == sum(expected.values())
        # among rows that are equally full, either is a best fit, and only the room left decides later choices
        assert Counter(sum(size for _, _, size in row) for row in rows) == Counter(map(sum, expected.elements()))


@settings(max_examples=50, deadline=None)
@given(sizes=sizes_of, length=st.integers(1, 20), seed=st.integers(0, 2**40), open_rows=st.integers(1, 5))
def test_first_fit_is_that_of_the_loop_over_shuffled_documents(sizes, length, seed, open_rows):
    order = permutation(len(sizes), seed, 0)(np.arange(len(sizes))).tolist()
    rows = first_fit(order, sizes, length, open_rows)
    for epoch in range(2):
        shuffled = permutation(len(rows), seed, epoch, stream=1)(np.arange(len(rows)))
        assert contents(FirstFit(open_rows), sizes, length, seed, epoch=epoch) == [rows[i] for i in shuffled]


def test_a_document_is_cut_only_where_it_is_longer_than_a_row():
    sizes = np.random.default_rng(0).integers(1, 60, 500)
    for packing in (BestFit(), FirstFit()):
        for row in contents(packing, sizes, 40):
            assert all(size == min(sizes[document] - begin, 40) and begin in (0, 40) for document, begin, size in row)


def test_documents_of_one_size_change_places_from_epoch_to_epoch():
    sizes = [3] * 20 + [4] * 20
    one, two = (contents(BestFit(), sizes, 7, epoch=epoch) for epoch in range(2))
    partners = lambda rows: {frozenset(document for document, _, _ in row) for row in rows}
    assert partners(one) != partners(two)


def test_best_fit_wastes_least():
    sizes = np.random.default_rng(0).lognormal(4, 1, 3000).astype(int) + 1
    rows = {type(packing).__name__: len(contents(packing, sizes, 256)) for packing in ALL[:3]}
    least = -(-sizes.sum() // 256)
    assert rows["Concatenate"] == least <= rows["BestFit"] <= rows["FirstFit"]
    assert rows["BestFit"] <= 1.001 * least


def test_a_plan_of_best_fit_does_not_take_longer_for_more_documents_of_the_same_sizes():
    groups = lambda number: len(BestFit().plan(np.arange(1, 33).repeat(number), 32, 0, True)._ends)
    assert groups(100_000) < 200


def test_rows_that_no_document_may_enter_are_refused():
    with pytest.raises(UserError, match=r"FirstFit\.open_rows=0"):
        FirstFit(open_rows=0)
