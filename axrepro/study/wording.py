"""Words and numbers as reports and figures write them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from axrepro.study.bootstrap import Estimate
from axrepro.study.study import Arm, Measure, Rule

MISSING = "–"
RULE_WORDS: Mapping[Rule, str] = {
    "wall_clock": "equal wall clock",
    "step_time": "equal step time",
    "tokens": "equal tokens",
    "flops": "equal FLOPs",
}
SCORE_WORDS = {"bits_per_byte": "bits per byte", "accuracy": "next-token accuracy", "choice": "choice among four"}
MEASURE_WORDS: Mapping[Measure, str] = {
    "step_time": "step time",
    "bits_per_byte": "loss in bits per byte",
    "dropped": "share of dropped choices",
    "busiest": "load of the busiest expert / mean",
    "router_logits": "RMS of router logits",
}


@dataclass(frozen=True)
class Form:
    """How numbers of a kind are written: `scale` times the number, with so many decimals, then the unit."""

    decimals: int
    unit: str = ""
    scale: float = 1.0

    def text(self, value: float | None, *, signed: bool = False) -> str:
        """The number with its unit, or a dash for none."""
        if value is None or not math.isfinite(value):
            return MISSING
        return f"{self._number(value, signed)} {self.unit}".rstrip()

    def interval(self, estimate: Estimate | None, *, signed: bool = False) -> str:
        """ "1.20 ms (1.10 to 1.30)"."""
        if estimate is None:
            return MISSING
        value = self.text(estimate.value, signed=signed)
        if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
            return f"{value} (interval unknown)"
        return f"{value} ({self._number(estimate.low, signed)} to {self._number(estimate.high, signed)})"

    def _number(self, value: float, signed: bool) -> str:
        return f"{value * self.scale:{'+' if signed else ''},.{self.decimals}f}"


PERCENT = Form(1, "%", 100)
_PLAIN = Form(4)
SCORE_FORMS = {"bits_per_byte": _PLAIN, "accuracy": Form(2, "%", 100), "choice": Form(2, "%", 100)}
GAIN_FORMS = {"bits_per_byte": _PLAIN, "accuracy": Form(2, "points", 100), "choice": Form(2, "points", 100)}

_TIMES = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"))
_COUNTS = ((1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T"))


def clock(seconds: float) -> Form:
    """How times of about so many seconds are written, with four digits."""
    return _fitting(seconds, _TIMES)


def duration(seconds: float | Estimate) -> str:
    """A time, with its interval if it has one."""
    if isinstance(seconds, Estimate):
        return clock(seconds.value).interval(seconds)
    return clock(seconds).text(seconds)


def count(number: float) -> str:
    """A number of parameters or tokens: "12.35 M"."""
    return str(round(number)) if number < 1000 else _fitting(number, _COUNTS).text(number)


def measured(measure: Measure, about: float) -> Form:
    """How a measure is written; times in a unit that suits `about`."""
    forms = {"step_time": clock(about), "bits_per_byte": _PLAIN, "dropped": PERCENT}
    return forms.get(measure, Form(3))


def named(arm: Arm) -> str:
    """An arm in a table of its series."""
    return arm.label if arm.x is None or f"{arm.x:g}" in arm.label else f"{arm.label} ({arm.x:g})"


def without(rung: str, label: str) -> str:
    """A label that is the same at all rungs: "MoE, 8 experts" for "MoE 50k, 8 experts"."""
    left = re.sub(rf"\s*(?<!\w){re.escape(rung)}(?!\w)", "", label).strip(" ,:")
    return left or label


def placed(rung: str, label: str) -> str:
    """A label that tells the rung."""
    return label if without(rung, label) != label else f"{label} at {rung}"


def _fitting(value: float, units: tuple[tuple[float, str], ...]) -> Form:
    value = abs(value) if math.isfinite(value) and value else units[0][0]
    size, unit = next((pair for pair in reversed(units) if pair[0] <= value), units[0])
    return Form(max(0, 3 - math.floor(math.log10(value / size))), unit, 1 / size)
