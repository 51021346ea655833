"""The tables of a report: CSV files with all digits, each from nothing but the results."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axrepro.study.bootstrap import Estimate
from axrepro.study.results import SCORES, Facts, Finding, Predicted, Results, Row
from axrepro.study.wording import RULE_WORDS


def write(results: Results) -> dict[str, bytes]:
    """By name of the file; those that would be empty are left out."""
    return {name: _csv(rows) for name, rows in _lines(results).items() if rows}


def _lines(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The rows of every CSV file."""
    return {
        "ladder.csv": [_ladder_line(row) for row in results.rows],
        "curves.csv": [
            {**_cell(row), "seed": seed, "hours": hours, "loss": loss}
            for row in results.rows
            for seed, curve in zip(row.seeds, row.curves, strict=False)
            for hours, loss in curve
        ],
        "loads.csv": [
            {**_cell(row), "layer": layer, "place": place, "share": share}
            for row in results.rows
            for layer, shares in enumerate(row.loads)
            for place, share in enumerate(shares)
        ],
        "step_times.csv": [line for where, facts in results.measured() for line in _step_time_lines(where, facts)],
        "ablations.csv": [line for finding in results.findings for line in _finding_lines(finding)],
        "forecasts.csv": [line for one in results.predicted for line in _forecast_lines(one)],
    }


def _cell(row: Row) -> dict[str, Any]:
    return {"rung": row.rung, "arm": row.facts.arm.label, "rule": row.rule}


def _ladder_line(row: Row) -> dict[str, Any]:
    facts = row.facts
    line = {**_cell(row), "dense": row.dense, "total": facts.total, "active": facts.active, "outside": facts.outside}
    line |= {"steps": row.steps, "tokens": row.tokens, "flops": row.flops, "hours": row.hours, "dropped": row.dropped}
    line |= {**_spread("seconds", facts.seconds), **_spread("increase", row.increase)}
    for score in SCORES:
        line[f"{score}_by_seed"] = " ".join(map(str, row.by_seed.get(score, ())))
    for score in SCORES:
        line |= {**_spread(score, row.scores.get(score)), **_spread(f"gain_{score}", row.gain.get(score))}
    return line | {"seeds": " ".join(map(str, row.seeds)), "missing": " ".join(map(str, row.missing))}


def _step_time_lines(where: str, facts: Facts) -> Iterator[dict[str, Any]]:
    """The step, its rounds, and the parts of one profiled step."""
    changes = " ".join(f"{path}={value}" for path, value in facts.arm.changes)
    start = {"where": where, "arm": facts.arm.label, "experiment": facts.arm.experiment, "changes": changes}
    yield {**start, "kind": "step", "name": "median", **_spread("seconds", facts.seconds)}
    for number, seconds in enumerate(facts.rounds):
        yield {**start, "kind": "round", "name": str(number), "seconds": seconds}
    for part, seconds in facts.parts.items():
        yield {**start, "kind": "part", "name": part, "seconds": seconds}


def _finding_lines(finding: Finding) -> Iterator[dict[str, Any]]:
    """The value of each arm, then the change."""
    expectation = finding.expectation
    start = {"series": finding.series.name, "measure": expectation.measure, "expected": expectation.direction}
    start["verdict"] = finding.verdict
    for arm, value in zip(finding.series.arms, finding.values, strict=True):
        yield {**start, "kind": "value", "arm": arm.label, "x": arm.x, **_spread("value", value)}
    yield {**start, "kind": "change", **_spread("value", finding.change)}


def _forecast_lines(one: Predicted) -> Iterator[dict[str, Any]]:
    """The step with all that is known of it, then its parts."""
    start = {"slice": one.slice, "where": one.where, "arm": one.arm.label, "x": one.arm.x, "dense": one.dense}
    names = (
        "seconds",
        "increase",
        "mfu",
        "flops",
        "tokens",
        "total",
        "active",
        "outside",
        "memory",
        "capacity",
        "fits",
    )
    line = {**start, "kind": "step", **{name: None if one.error else getattr(one, name) for name in names}}
    line |= {f"training_tokens_{rule}": one.training_tokens.get(rule) for rule in RULE_WORDS}
    mesh = " ".join(f"{axis}={size}" for axis, size in one.mesh.items())
    yield {**line, "mesh": mesh, "part": None, "error": one.error}
    for part, seconds in one.parts.items():
        yield {**start, "kind": "part", "part": part, "seconds": seconds}


def _spread(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """A value and its interval as three columns."""
    names = (name, f"{name}_low", f"{name}_high")
    values = (estimate.value, estimate.low, estimate.high) if estimate else (None,) * 3
    return dict(zip(names, values, strict=True))


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A header and the rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
