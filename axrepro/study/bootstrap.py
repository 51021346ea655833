"""Intervals by resampling: of scores over seeds and held-out items, and of step times over rounds.

Every function draws anew from the same seed, so equal input gives equal intervals. All intervals are of 95 %.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

RESAMPLES = 2000
_AT_ONCE = 1 << 22  # counts of items that exist at once
Values = Sequence[float] | np.ndarray
Scores = tuple[np.ndarray, np.ndarray]
"""Numerators and denominators, [seeds, items] each: bits and bytes by document, or correct answers and ones."""


@dataclass(frozen=True)
class Estimate:
    """A value with a 95 % interval."""

    value: float
    low: float
    high: float


def ratio(numerators: np.ndarray, denominators: np.ndarray, resamples: int = RESAMPLES) -> Estimate:
    """Sum over sum, averaged over seeds.

    Crossed bootstrap: seeds and items are drawn with replacement, independently of each other, and every seed is scored
    on the same drawn items; the interval lies between percentiles. A single seed is never redrawn, so the interval then
    tells of items alone. Few seeds are redrawn too alike: where scores differ by seed much more than by item, the
    interval over three seeds holds the truth in about three cases of four.
    """
    return _combined([(numerators, denominators)], lambda score: score, resamples)


def difference(a: Scores, b: Scores, resamples: int = RESAMPLES) -> Estimate:
    """The `ratio` of a less that of b, paired: both are scored with the same drawn seeds and items."""
    return _combined([a, b], lambda a, b: a - b, resamples)


def difference_between(a: Scores, lower: Scores, upper: Scores, share: float, resamples: int = RESAMPLES) -> Estimate:
    """The `ratio` of a less what lies between two others, at so large a share of the upper one; drawn all together."""
    read = lambda a, lower, upper: a - ((1 - share) * lower + share * upper)
    return _combined([a, lower, upper], read, resamples)


def median(values: Values, resamples: int = RESAMPLES) -> Estimate:
    """The median, with the interval of medians of redrawn values."""
    values = np.asarray(values, np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return _between(float(np.median(values)), np.median(values[drawn], axis=1))


def median_ratio(a: Values, b: Values, resamples: int = RESAMPLES) -> Estimate:
    """The median over rounds of a over b: what slows down a whole round, and so both of them, drops out."""
    _require_pairs(np.shape(a), np.shape(b))
    return median(np.asarray(a, np.float64) / np.asarray(b, np.float64), resamples)


def mean(values: Values) -> Estimate:
    """The mean over seeds, with Student's interval; that of one value reaches from -inf to inf."""
    values = np.asarray(values, np.float64)
    value, freedom = float(values.mean()), len(values) - 1
    if not freedom:
        return Estimate(value, -math.inf, math.inf)
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, 0.975)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(value, value - half, value + half)


def mean_difference(a: Values, b: Values) -> Estimate:
    """The `mean` of a - b, paired by index."""
    _require_pairs(np.shape(a), np.shape(b))
    return mean(np.asarray(a, np.float64) - np.asarray(b, np.float64))


def _combined(scores: Sequence[Scores], combine: Callable[..., np.ndarray], resamples: int) -> Estimate:
    """A function of the ratios of several scores, which are drawn together."""
    arrays = [np.asarray(array, np.float64) for pair in scores for array in pair]
    for one, other in pairwise(arrays):
        _require_pairs(one.shape, other.shape)
    whole = np.stack(arrays)  # [2 P, seeds, items]
    seeds, items = whole.shape[1:]
    ratios = lambda sums, weights: (sums[::2] / sums[1::2] * weights).sum(-1) / seeds
    value = combine(*ratios(whole.sum(-1), np.ones(seeds)))
    rng, drawn = np.random.default_rng(0), []
    for size in _parts(resamples, max(1, _AT_ONCE // items)):
        by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size)
        by_item = rng.multinomial(items, np.full(items, 1 / items), size)
        with np.errstate(invalid="ignore"):  # few items may be drawn without any that counts: such a draw is left out
            drawn.append(combine(*ratios(np.einsum("psi,ri->prs", whole, by_item, optimize=True), by_seed)))
    return _between(float(value), np.concatenate(drawn))


def _parts(total: int, most: int) -> list[int]:
    return [min(most, total - done) for done in range(0, total, most)]


def _between(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def _require_pairs(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    if one != other:
        raise ValueError(f"scores that are compared have the same seeds and items; these are {one} and {other}")
