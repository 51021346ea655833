"""Intervals, against scipy and by how often they hold what is known."""

import math

import numpy as np
import pytest
from scipy import stats

from axrepro.study.bootstrap import (
    Estimate,
    difference,
    difference_between,
    mean,
    mean_difference,
    median,
    median_ratio,
    ratio,
)


def scores(rng, seeds=3, items=20, mean=2.0, by_seed=0.1, by_item=0.5, noise=0.1):
    """Bits and bytes of a crossed model: a part of each seed, one of each item, and noise."""
    sizes = np.tile(rng.integers(50, 150, items), (seeds, 1)).astype(float)
    per_byte = mean + by_seed * rng.normal(size=(seeds, 1)) + by_item * rng.normal(size=(1, items))
    return sizes * (per_byte + noise * rng.normal(size=(seeds, items))), sizes


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def test_the_value_is_sum_over_sum_averaged_over_seeds():
    numerators, denominators = [[1, 3], [2, 6]], [[1, 1], [3, 1]]
    assert ratio(np.array(numerators), np.array(denominators)).value == (4 / 2 + 8 / 4) / 2
    a, b = scores(np.random.default_rng(0)), scores(np.random.default_rng(1))
    assert difference(a, b).value == pytest.approx(ratio(*a).value - ratio(*b).value, abs=1e-14)


def test_of_one_seed_and_equal_sizes_the_interval_is_that_of_scipy():
    x = np.random.default_rng(0).exponential(size=30)
    ours = ratio(x[None], np.ones((1, 30)), resamples=20_000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.03 * width(ours))  # Monte Carlo error: 0.01
    theirs = stats.bootstrap((x,), np.median, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    ours = median(x, resamples=20_000)
    np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.03 * width(ours))
    assert ours.value == np.median(x)


def test_of_one_item_only_seeds_are_redrawn():
    x = np.random.default_rng(0).normal(5, 1, 12)
    ours = ratio(x[:, None], np.ones((12, 1)), resamples=20_000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.03 * width(ours))


def test_redrawn_scores_are_those_of_a_loop_over_seeds_and_items():
    """Every resample scores all drawn seeds on the same drawn items."""
    numerators, denominators = scores(np.random.default_rng(0), seeds=4, items=9)
    rng, drawn = np.random.default_rng(5), []
    for _ in range(4000):
        seeds, items = rng.integers(4, size=4), rng.integers(9, size=9)
        drawn.append(np.mean([numerators[s, items].sum() / denominators[s, items].sum() for s in seeds]))
    ours = ratio(numerators, denominators, resamples=8000)
    low, high = np.percentile(drawn, (2.5, 97.5))
    np.testing.assert_allclose([ours.low, ours.high], [low, high], atol=0.06 * (high - low))


@pytest.mark.parametrize(("seeds", "by_seed", "by_item"), [(1, 0.0, 0.5), (12, 0.3, 0.1), (12, 0.2, 0.5)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(seeds, by_seed, by_item):
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        estimate = ratio(*scores(rng, seeds, 30, by_seed=by_seed, by_item=by_item), resamples=400)
        held += estimate.low <= 2.0 <= estimate.high
    assert 0.85 <= held / 200 <= 0.99


def test_intervals_of_a_difference_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        numerators, sizes = scores(rng, 12, 30)
        other = numerators + sizes * (0.1 + 0.1 * rng.normal(size=(12, 1)) + 0.05 * rng.normal(size=(1, 30)))
        estimate = difference((other, sizes), (numerators, sizes), resamples=400)
        held += estimate.low <= 0.1 <= estimate.high
    assert 0.85 <= held / 200 <= 0.99


def test_pairing_narrows_the_interval_of_correlated_scores():
    rng = np.random.default_rng(0)
    numerators, sizes = scores(rng, items=40)
    a, b = (numerators, sizes), (numerators + 0.02 * sizes * rng.normal(size=sizes.shape) - 0.03 * sizes, sizes)
    paired = difference(a, b)
    unpaired = difference(a, tuple(array[:, ::-1] for array in b))
    assert paired.value == pytest.approx(unpaired.value)
    assert width(paired) < width(unpaired) / 5
    assert paired.low > 0 > unpaired.low


def test_a_difference_the_other_way_round_is_its_negative():
    a, b = scores(np.random.default_rng(0)), scores(np.random.default_rng(1))
    one, other = difference(a, b), difference(b, a)
    np.testing.assert_allclose([one.value, one.low, one.high], [-other.value, -other.high, -other.low], rtol=1e-12)
    same = difference(a, a)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_equal_input_gives_equal_intervals():
    a = scores(np.random.default_rng(0))
    assert ratio(*a) == ratio(*a)


def test_a_score_is_compared_with_what_lies_between_two_others():
    rng = np.random.default_rng(0)
    point, lower, upper = (scores(rng) for _ in range(3))
    assert difference_between(point, lower, upper, 0.0) == difference(point, lower)
    assert difference_between(point, lower, upper, 1.0) == difference(point, upper)
    values = [ratio(*node).value for node in (lower, upper)]
    between = difference_between(point, lower, upper, 0.25)
    assert between.value == pytest.approx(ratio(*point).value - 0.75 * values[0] - 0.25 * values[1], abs=1e-12)
    itself = difference_between(lower, lower, lower, 0.6)
    assert (itself.value, itself.low, itself.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_a_slow_round_of_both_does_not_touch_their_ratio():
    rng = np.random.default_rng(0)
    rounds = np.exp(rng.normal(0, 0.3, 12))
    estimate = median_ratio(1.2 * rounds, rounds)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1.2, 1.2, 1.2))
    assert width(median(rounds)) > 0.1


def test_medians_of_few_rounds_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    estimates = [median(rng.normal(1, 0.1, 12), resamples=400) for _ in range(200)]
    assert 0.85 <= np.mean([e.low <= 1 <= e.high for e in estimates]) <= 0.99


def test_means_over_few_seeds_have_the_interval_of_students_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=3), rng.normal(size=3)
    for ours, theirs in ((mean(a), stats.ttest_1samp(a, 0)), (mean_difference(a, b), stats.ttest_rel(a, b))):
        np.testing.assert_allclose([ours.low, ours.high], theirs.confidence_interval(0.95), rtol=1e-9)
    assert mean_difference(a, b).value == pytest.approx(a.mean() - b.mean())


def test_one_seed_leaves_its_mean_open():
    assert mean([3.0]) == Estimate(3.0, -math.inf, math.inf)
    assert mean_difference([3.0], [1.0]) == Estimate(2.0, -math.inf, math.inf)


def test_scores_that_cannot_be_paired_are_refused():
    a, b = scores(np.random.default_rng(0), seeds=2), scores(np.random.default_rng(0), seeds=3)
    for compare in (lambda: difference(a, b), lambda: mean_difference([1, 2], [1]), lambda: median_ratio([1, 2], [1])):
        with pytest.raises(ValueError, match="the same seeds and items"):
            compare()
