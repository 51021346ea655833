"""Times of programs that take turns, and the tables that show their ratios."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Time(NamedTuple):
    """Seconds elapsed, and seconds of all threads on a core."""

    elapsed: float
    cpu: float


def row(label: str, numerator: list[Time], denominator: list[Time]) -> str:
    """A line of a table: of the ratios in each round."""
    cells = [label]
    for above, below in zip(zip(*numerator, strict=True), zip(*denominator, strict=True), strict=True):
        low, median, high = np.quantile(np.divide(above, below), (0.25, 0.5, 0.75))
        cells.append(f"{median:.2f} ({low:.2f}–{high:.2f})")
    return f"| {' | '.join(cells)} | {len(denominator)} |"


def header(what: str) -> str:
    return f"| {what} | elapsed: median (quartiles) | CPU time | rounds |\n|---|---|---|---|"


def timed_steps(step: Callable[[], object], steps: int, settle: bool = True) -> Time:
    """Of `steps` steps; if they `settle`, after one that is left out: it finds the caches as others left them."""
    if settle:
        step()
    started = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return Time(time.perf_counter() - started[0], time.process_time() - started[1])
