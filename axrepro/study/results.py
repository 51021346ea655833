"""What a study's folder holds, read back and compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from axrepro.study.bootstrap import Estimate
from axrepro.study.study import Arm, Expectation, Rule, Series

SCORES = ("bits_per_byte", "accuracy", "choice")
"""Held-out: bits per byte (less is better), share of next tokens that were most probable, and share of questions in
which the context made the true continuation of four more probable than it made the others."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model is and how long its step takes here.

    Attributes:
      total, active, outside: parameters: all, those that a token uses, all but the embedding (and head).
      tokens: of a step.   flops: model FLOPs of a step, attention as masked.
      seconds: of a step: median over the rounds, with the interval of the median.
      rounds: seconds per step in each round.   session: when; rounds of one session are the same ones.
      parts: seconds per step by part of the model, of one profile ("attention", "experts", ...); {} if not measured.
      memory: bytes on a device, as compiled; None where the compiler does not tell.
    """

    arm: Arm
    total: int
    active: int
    outside: int
    tokens: int
    flops: float
    seconds: Estimate
    rounds: tuple[float, ...]
    session: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """An arm under a rule, beside the dense model of its rung.

    Attributes:
      increase: of the step time over the dense model's: 0.2 is 20 % more; None for the dense one.
      steps, tokens, flops, hours: of the whole training; hours at the dense model's step time times the increase.
      scores: means, by name in `SCORES`, with intervals over seeds and documents.
      gain: score less that of the dense model of the same rung, paired; at equal step time, less that of a dense model
        of this step time, read between two rungs on a logarithmic axis; {} for dense ones. Where budgets follow from
        the ratio of step times, its interval is in this one.
      seeds: those that are finished.   missing: those that are not.
      by_seed: scores of each of `seeds`.
      commands: that repeat the run, by seed, each with what it prints at its end.
      curves: of each seed, (hours at the measured step time, training loss of the text in nats) along the run.
      in_training: seconds per step while it trained, evaluations left out; longer where other work ran beside it.
      loads: of each routed layer, mean share of choices by expert at the end (mean over seeds, sorted); () if dense.
      dropped: share of choices that were dropped at the end of training; None if dense.
    """

    rung: str
    facts: Facts
    dense: bool
    rule: Rule
    steps: int
    tokens: float
    flops: float
    hours: float
    increase: Estimate | None
    scores: Mapping[str, Estimate]
    gain: Mapping[str, Estimate]
    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    commands: tuple[str, ...]
    by_seed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    curves: tuple[tuple[tuple[float, float], ...], ...] = ()
    in_training: float | None = None
    loads: tuple[tuple[float, ...], ...] = ()
    dropped: float | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Whether an expectation held.

    Attributes:
      values: of the measure for each arm of the series, with intervals.
      change: last arm less first, paired by seed; of "step_time" and "stays" relative to the first.
      commands: that repeat the runs, as in `Row`.
      verdict: "held", if the whole interval of the change lies on the expected side; "did not hold", if it lies on the
        other; else "open".
    """

    series: Series
    expectation: Expectation
    values: tuple[Estimate, ...]
    change: Estimate
    verdict: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A forecast of an arm on a slice.

    Attributes:
      where: name of the rung or of the series.   rung: which of the two.
      dense: whether it is what others are compared with.
      seconds: of a step.   parts: of it, seconds by what the time goes to.   mfu: with attention as masked.
      flops: model FLOPs of a step.   tokens: of a step.   total, active, outside: parameters, as in `Facts`.
      memory, capacity: bytes on a device.   fits: whether the first is no more than the second.
      increase: of the step time over the dense model's; None for dense ones, and where that one is missing.
      training_tokens: by rule, what the budget of the dense model buys; of a dense model, its own.
      mesh: devices per axis, those above 1.   error: why there is no forecast, if there is none; then all else is 0.
    """

    slice: str
    where: str
    rung: bool
    arm: Arm
    dense: bool
    seconds: float
    parts: Mapping[str, float]
    mfu: float
    flops: float
    tokens: int
    total: int
    active: int
    outside: int
    memory: int
    capacity: int
    fits: bool
    increase: float | None
    training_tokens: Mapping[Rule, float]
    mesh: Mapping[str, int]
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a report says.

    Attributes:
      conditions: what was run on what: hardware, versions, data, commands; by name, in order.
      rows: of the ladder, by rung, arm and rule; the dense arm of a rung once per rule.
      facts: of all arms whose step time was measured.
      not_run: what was left out or has failed, a line each.
    """

    study: str
    conditions: Mapping[str, str]
    rows: tuple[Row, ...] = ()
    facts: tuple[Facts, ...] = ()
    findings: tuple[Finding, ...] = ()
    predicted: tuple[Predicted, ...] = ()
    not_run: tuple[str, ...] = ()

    def measured(self) -> list[tuple[str, Facts]]:
        """Every model that was measured, once, with the names of the rungs and series that have it."""
        where: dict[tuple, dict[str, None]] = {}
        found = {facts.arm.key: facts for facts in (*(row.facts for row in self.rows), *self.facts)}
        places = [(row.facts.arm, row.rung) for row in self.rows]
        places += [(arm, finding.series.name) for finding in self.findings for arm in finding.series.arms]
        for arm, place in places:
            where.setdefault(arm.key, {})[place] = None
        return [(", ".join(where.get(key, ())), facts) for key, facts in found.items()]
