"""Intervals by resampling."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value with a 95 % interval."""

    value: float
    low: float
    high: float
