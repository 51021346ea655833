"""The index-based permutation."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from axrepro.data import permutation


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 1023, 1024, 1025, 4099, 65537])
def test_every_index_comes_once(size):
    assert sorted(permutation(size, seed=3, epoch=1)(np.arange(size)).tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64 - 1), epoch=st.integers(0, 10**6))
def test_every_index_comes_once_for_any_seed(size, seed, epoch):
    assert np.unique(permutation(size, seed, epoch)(np.arange(size))).size == size


def test_a_part_is_the_part_of_the_whole():
    order = permutation(10_007, seed=0, epoch=0)
    some = np.array([17, 0, 9_999, 17])
    np.testing.assert_array_equal(order(some), order(np.arange(10_007))[some])


def test_no_index_gives_no_index():
    assert permutation(5, 0, 0)(np.zeros(0, np.int64)).shape == (0,)


def test_a_size_beyond_memory_is_no_problem():
    out = permutation(10**15, seed=0, epoch=0)(np.arange(1000) + 10**14)
    assert len(set(out.tolist())) == 1000
    assert out.min() >= 0
    assert out.max() < 10**15


def test_seed_epoch_and_stream_each_change_the_order():
    orders = [permutation(50, *key)(np.arange(50)).tolist() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_order_never_changes_between_versions():
    """A resumed run depends on these very numbers."""
    assert permutation(10, seed=1, epoch=2)(np.arange(10)).tolist() == [1, 0, 3, 8, 2, 5, 6, 9, 4, 7]
    assert permutation(2000, seed=1, epoch=2, stream=1)(np.arange(6)).tolist() == [140, 818, 750, 11, 1675, 1379]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_order_of_few_values_is_equally_likely(size):
    orders = math.factorial(size)
    count = Counter(tuple(permutation(size, seed, 0)(np.arange(size)).tolist()) for seed in range(20 * orders))
    deviation = sum((count[order] - 20) ** 2 / 20 for order in count) + 20 * (orders - len(count))
    assert deviation < stats.chi2.ppf(0.999, orders - 1)


@pytest.mark.parametrize("size", [7, 30, 1100])
def test_an_element_and_its_neighbour_go_everywhere_equally_often(size):
    trials = 1500
    out = np.array([permutation(size, 5, epoch)(np.array([size // 3, size // 3 + 1])) for epoch in range(trials)])
    place, distance = out[:, 0], (out[:, 1] - out[:, 0]) % size - 1  # the distance is never 0
    for values, ways in ((place, size), (distance, size - 1)):
        cells = min(ways, 40)
        expected = np.bincount(np.arange(ways) * cells // ways) * trials / ways
        deviation = ((np.bincount(values * cells // ways, minlength=cells) - expected) ** 2 / expected).sum()
        assert deviation < stats.chi2.ppf(0.999, cells - 1)


def test_an_index_outside_is_refused():
    with pytest.raises(ValueError, match="outside a permutation of 5"):
        permutation(5, 0, 0)(np.array([5]))
    with pytest.raises(ValueError, match="at least 1"):
        permutation(0, 0, 0)
