"""The report of a study: study.md with its figures and tables, written from the results alone."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from axrepro.study import figures, tables
from axrepro.study.bootstrap import Estimate
from axrepro.study.results import SCORES, Finding, Predicted, Results, Row
from axrepro.study.study import Rule
from axrepro.study.wording import (
    GAIN_FORMS,
    MEASURE_WORDS,
    MISSING,
    PERCENT,
    RULE_WORDS,
    SCORE_FORMS,
    SCORE_WORDS,
    Form,
    count,
    duration,
    measured,
    named,
    placed,
)
from axrepro.train.describe import readable

FOLDER = "study"  # of figures and tables
_BLAMED = 3  # parts that are named for a difference of step time
_ALONG = "What a step of each arm takes over that of the dense model that its series is compared with."


def write(results: Results, folder: Path) -> None:
    """Writes study.md, and its figures and tables into study/ beside it; those of an earlier report that have become
    empty are removed. If something fails before all are on disk, the earlier report stays as it is.
    """
    files = {**figures.draw(results), **tables.write(results)}
    text = page(results, files).encode()
    beside = folder / FOLDER
    beside.mkdir(parents=True, exist_ok=True)
    contents = {**{beside / name: content for name, content in files.items()}, folder / "study.md": text}
    scratch = {path: path.with_name(f"{path.name}.new") for path in contents}
    try:
        for path, content in contents.items():
            scratch[path].write_bytes(content)
        for path, new in scratch.items():
            os.replace(new, path)
    finally:
        for path in scratch.values():
            path.unlink(missing_ok=True)
    for name in (figures.FIGURES.keys() | _TABLE_OF.keys()) - files.keys():
        (beside / name).unlink(missing_ok=True)


def page(results: Results, files: Iterable[str]) -> str:
    """The text of study.md.

    Args:
      files: names of the figures and tables that are written beside it.
    """
    sections: dict[str, list[str]] = {
        "Answer": _answer(results),
        "Conditions": [_table(("what", "value"), results.conditions.items())] if results.conditions else [],
        "Ladder": _ladder(results),
        "Step times": _step_times(results),
        "Ablations": _ablations(results),
        "Step time along series": [_ALONG] if "increase_over_dense.png" in files else [],
        "Forecasts": _forecasts(results),
        "How to repeat a cell": _commands(results),
        "What was not run": [_bullets(_not_run(results))],
    }
    lines = [f"# Study {results.study}: dense models and mixtures of experts"]
    for title, blocks in sections.items():
        if not blocks:
            continue
        lines.append(f"## {title}")
        for name, (section, caption) in _CAPTIONS.items():
            if section == title and name in files:
                lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({FOLDER}/{name})", caption]
        lines += blocks
        named_here = [
            f"[{name}]({FOLDER}/{name})" for name, section in _TABLE_OF.items() if section == title and name in files
        ]
        if named_here:
            lines.append(f"The numbers: {', '.join(named_here)}.")
    return "\n\n".join(lines) + "\n"


_CAPTIONS = {
    "speed_accuracy.png": (
        "Ladder",
        "How to read: a mark of a mixture that lies on the better side of the line of dense models is better than a "
        "dense model of its step time would be. The rows of panels differ in how long the mixtures were trained; at "
        "equal step time that is as long as a dense model on the line below or above the mark.",
    ),
    "loss_wall_clock.png": (
        "Ladder",
        "How to read: compare lines where they end. Before that their learning rates have still to fall, so that a "
        "shorter training would have been better at that time. Lines are means over seeds, bands reach from the least "
        "to the largest. The start of training, where losses are high, is cut.",
    ),
    "step_time_breakdown.png": (
        "Step times",
        "How to read: a bar is one profiled step, taken apart; the black mark is the median of the step times without "
        "a profiler, so that a gap between the two is time that the profile does not explain, or that it costs. The "
        'smallest parts may be drawn together as "other".',
    ),
    "expert_load.png": (
        "Ladder",
        "How to read: experts of a layer in the order of how often they were chosen at the end of training; a flat "
        "line at 1 is perfect balance.",
    ),
    "ablations.png": (
        "Ablations",
        "How to read: each panel is one expectation about the measure from the first arm of a series to its last, and "
        "what was found, with intervals.",
    ),
    "increase_over_dense.png": (
        "Step time along series",
        "How to read: filled marks were measured here (bars: intervals over rounds of measurement), hollow ones "
        "are forecasts for other hardware and other sizes, which do not tell what the measured ones would be there.",
    ),
    "forecast_breakdown.png": (
        "Forecasts",
        "How to read: as the measured bars, but every length is a forecast: what the core works at, waits for, or is "
        "slowed by; collectives of one kind are drawn together.",
    ),
}
"""Of figures: the section that shows it, and how it is read."""
_TABLE_OF = {
    "ladder.csv": "Ladder",
    "curves.csv": "Ladder",
    "loads.csv": "Ladder",
    "step_times.csv": "Step times",
    "ablations.csv": "Ablations",
    "forecasts.csv": "Forecasts",
}
"""The section that names a table."""


def _verdict(score: str, gain: Estimate) -> str:
    """Of a gain over a dense model: "better", "worse", or "not decided" if its interval holds 0."""
    if gain.low > 0 or gain.high < 0:
        return "better" if (gain.low > 0) != (score == "bits_per_byte") else "worse"
    return "not decided"


def _judged(rows: Iterable[Row], rule: Rule, score: str) -> dict[str, list[Row]]:
    """Sparse rows of a rule by verdict."""
    found: dict[str, list[Row]] = {"better": [], "worse": [], "not decided": []}
    for row in rows:
        if row.rule == rule and not row.dense and score in row.gain:
            found[_verdict(score, row.gain[score])].append(row)
    return found


def _told(judged: Mapping[str, Sequence[Row]], score: str) -> str:
    """ "better are A at small +1.0 (...), B at small +1.1 (...); not decided are ..." """
    lists = []
    for verdict, rows in judged.items():
        gains = (f"{_name(row)} {GAIN_FORMS[score].interval(row.gain[score], signed=True)}" for row in rows)
        if rows:
            lists.append(f"{verdict} {'are' if len(rows) > 1 else 'is'} {', '.join(gains)}")
    return "; ".join(lists)


def _name(row: Row) -> str:
    return placed(row.rung, row.facts.arm.label)


def _lead(judged: Mapping[str, Sequence[Row]], at: str) -> str:
    """What the verdicts of a rule come to."""
    compared = sum(map(len, judged.values()))
    better, worse, open_ = (len(judged[verdict]) for verdict in ("better", "worse", "not decided"))
    if not compared:
        return f"Nothing can be said yet about {at}: no mixture was scored beside a dense model."
    if better == compared:
        return f"At {at}, mixtures of experts were better than dense models."
    if worse == compared:
        return f"At {at}, mixtures of experts were worse than dense models."
    if open_ == compared:
        return f"It is not decided whether mixtures of experts beat dense models at {at}."
    if not better:
        return f"At {at}, no mixture of experts was better than the dense one, and not all are decided."
    if not worse:
        return f"At {at}, no mixture of experts was worse than the dense one, and not all are decided."
    return f"It depends on the model whether mixtures of experts beat dense models at {at}."


def _answer(results: Results) -> list[str]:
    rows = results.rows
    main, same = (_judged(rows, rule, "bits_per_byte") for rule in ("wall_clock", "step_time"))
    compared = sum(map(len, main.values()))
    leads = [_lead(main, RULE_WORDS["wall_clock"])]
    if any(same.values()):
        leads.append(_lead(same, RULE_WORDS["step_time"]))
    told = []
    if compared:
        told.append(
            "At equal wall clock, in held-out bits per byte less those of the dense model of the rung (below 0 is "
            f"better, and it is not decided where the 95 % interval includes 0) {_told(main, 'bits_per_byte')}."
        )
        told[-1] = " ".join([told[-1], *_by_other_scores(rows, "wall_clock")])
    if found := _told(same, "bits_per_byte"):
        told.append(
            "At equal step time, so with as many steps, tokens and seconds as a dense model whose step takes as long "
            f"(read between two rungs), {found}."
        )
        told[-1] = " ".join([told[-1], *_by_other_scores(rows, "step_time")])
    told += _only_at_equal_tokens(rows)
    return [f"**{' '.join(leads)}**", *([_bullets(told)] if told else []), *_blame(rows), _intervals(results)]


def _by_other_scores(rows: Sequence[Row], rule: Rule) -> Iterator[str]:
    for score in SCORES[1:]:
        numbers = {verdict: len(found) for verdict, found in _judged(rows, rule, score).items()}
        if counted := ", ".join(f"{number} {verdict}" for verdict, number in numbers.items() if number):
            yield f"By {SCORE_WORDS[score]}: {counted}."


def _only_at_equal_tokens(rows: Sequence[Row]) -> list[str]:
    tokens, clock = (_judged(rows, rule, "bits_per_byte") for rule in ("tokens", "wall_clock"))
    if not any(tokens.values()) or not any(clock.values()):
        return []
    won = {_name(row) for row in clock["better"]}
    only = {"better": [row for row in tokens["better"] if _name(row) not in won]}
    if not only["better"]:
        return ["None was better at equal tokens only."]
    return [f"At equal tokens, but not at equal wall clock, {_told(only, 'bits_per_byte')}."]


def _blame(rows: Iterable[Row]) -> list[str]:
    """Which parts of a step made it longer or shorter than the dense model's, by the profiles."""
    rows = list(rows)
    dense = {row.rung: row.facts.parts for row in rows if row.dense}
    told = {}
    for row in rows:
        if row.increase is None or _name(row) in told:
            continue
        text = f"{_name(row)}: {PERCENT.interval(row.increase, signed=True)}"
        before, after = dense.get(row.rung, {}), row.facts.parts
        if before and after:
            sign = 1 if row.increase.value > 0 else -1
            growth = {part: after.get(part, 0.0) - before.get(part, 0.0) for part in {**before, **after}}
            blamed = [part for part in sorted(growth, key=lambda part: -sign * growth[part]) if sign * growth[part] > 0]
            text += "".join(f", {part} {_change(growth[part])}" for part in blamed[:_BLAMED])
        told[_name(row)] = text
    if not told:
        return []
    said = "Step times over that of the dense model of the rung, and the parts of a profiled step that changed most:"
    return [f"{said}\n\n{_bullets(told.values())}"]


def _change(seconds: float) -> str:
    return f"{'+' if seconds > 0 else '-'}{duration(abs(seconds))}"


def _intervals(results: Results) -> str:
    seeds = {len(row.seeds) for row in results.rows if row.seeds}
    text = (
        "How intervals were made: they are of 95 %. Those of scores and gains are bootstraps over seeds and documents, "
        "with sparse and dense runs paired; at equal wall clock and equal step time they are widened by what the ends "
        "of the interval of the ratio of step times would change, along the line through the arm's own runs. Those of "
        "step times are of medians over rounds of measurement; those of routers in the ablations are Student's over "
        "seeds."
    )
    if seeds and max(seeds) == 1:
        text += " With one seed they say nothing about how results vary between seeds."
    elif seeds:
        number = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
        text += f" With {number} seeds the part that is due to seeds is rough, and rather too narrow than too wide."
    return text


def _ladder(results: Results) -> list[str]:
    rows = results.rows
    if not rows:
        return []
    models = {(row.rung, row.facts.arm.label): row for row in rows}.values()
    blocks = [
        "The models.",
        _table(
            ("rung", "arm", "parameters", "active", "outside the embedding", "step time", "over dense"),
            (
                (
                    row.rung,
                    row.facts.arm.label,
                    count(row.facts.total),
                    count(row.facts.active),
                    count(row.facts.outside),
                    duration(row.facts.seconds),
                    PERCENT.interval(row.increase, signed=True),
                )
                for row in models
            ),
        ),
        "Their training, and their scores at the end. The dense model of a rung is the same under every rule. Budgets "
        "go by the measured step times, not by those in training, which other work may have slowed. Of four choices, "
        "chance has 25 %.",
        _table(
            (
                "rung",
                "arm",
                "at",
                "steps",
                "tokens",
                "time",
                "step in training",
                "seeds",
                "dropped choices",
                *(SCORE_WORDS[score] for score in SCORES),
            ),
            (
                (
                    row.rung,
                    row.facts.arm.label,
                    ", ".join(rules),
                    f"{row.steps:,}",
                    count(row.tokens),
                    duration(3600 * row.hours),
                    MISSING if row.in_training is None else duration(row.in_training),
                    str(len(row.seeds)),
                    PERCENT.text(row.dropped),
                    *(SCORE_FORMS[score].interval(row.scores.get(score)) for score in SCORES),
                )
                for row, rules in _with_rules(rows)
            ),
        ),
    ]
    if gains := list(_gains(rows)):
        blocks += [
            "Scores less those of the dense model of the same rung; at equal step time, less those of a dense model of "
            "this step time, read between two rungs.",
            _table(("rung", "arm", "at", *(SCORE_WORDS[score] for score in SCORES)), gains),
        ]
    return blocks


def _gains(rows: Iterable[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        told = (GAIN_FORMS[score].interval(row.gain.get(score), signed=True) for score in SCORES)
        if row.gain:
            yield row.rung, row.facts.arm.label, RULE_WORDS[row.rule], *told


def _with_rules(rows: Iterable[Row]) -> Iterator[tuple[Row, list[str]]]:
    """The runs and the rules they stand for: a dense model is trained once for all."""
    runs: dict[tuple, tuple[Row, list[str]]] = {}
    for row in rows:
        key = (row.rung, row.facts.arm.label, row.steps, "" if row.dense else row.rule)
        runs.setdefault(key, (row, []))[1].append(RULE_WORDS[row.rule])
    yield from runs.values()


def _step_times(results: Results) -> list[str]:
    found = results.measured()
    if not found:
        return []
    rows = (
        (
            where or MISSING,
            facts.arm.label,
            duration(facts.seconds),
            f"{duration(min(facts.rounds))} to {duration(max(facts.rounds))}" if facts.rounds else MISSING,
            f"{count(facts.tokens / facts.seconds.value)}",
            f"{facts.flops / facts.seconds.value / 1e12:.4g}",
            readable(facts.memory) if facts.memory is not None else MISSING,
        )
        for where, facts in found
    )
    header = ("where", "arm", "step time", "rounds", "tokens/s", "model TFLOP/s", "memory of a device")
    blocks = [_table(header, rows)]
    profiled = [(where or MISSING, facts.arm.label, facts.parts) for where, facts in found if facts.parts]
    if profiled:
        blocks += ["One profiled step of each, by part.", _parts_table(("where", "arm"), profiled)]
    return blocks


def _parts_table(header: Sequence[str], rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    sums: dict[str, float] = defaultdict(float)
    for *_, parts in rows:
        for part, seconds in parts.items():
            sums[part] += seconds / (sum(parts.values()) or 1.0)
    names = sorted(sums, key=lambda part: -sums[part])
    cells = ((*who, *(duration(parts[name]) if name in parts else MISSING for name in names)) for *who, parts in rows)
    return _table((*header, *names), cells)


def _ablations(results: Results) -> list[str]:
    if not results.findings:
        return []
    told = []
    for verdict in ("held", "did not hold", "open"):
        names = [
            f"{MEASURE_WORDS[f.expectation.measure]} {f.expectation.direction} along {f.series.name}"
            for f in results.findings
            if f.verdict == verdict
        ]
        if names:
            told.append(f"{verdict.capitalize()} ({len(names)}): {'; '.join(names)}.")
    changes = ((*_expected(f), _found_change(f), f.verdict) for f in results.findings)
    values = (
        (f.series.name, MEASURE_WORDS[f.expectation.measure], named(arm), _form(f).interval(value))
        for f in results.findings
        for arm, value in zip(f.series.arms, f.values, strict=True)
    )
    return [
        _bullets(told),
        "Changes are from the first arm of a series to its last; of step times, and of what should stay (within 10 %), "
        "in percent of the first. An expectation held if the whole interval lies where it should, did not hold if all "
        "of it lies elsewhere, and is open otherwise.",
        _table(("series", "from", "to", "measure", "expected", "change", "verdict"), changes),
        "The values.",
        _table(("series", "measure", "arm", "value"), values),
    ]


def _expected(finding: Finding) -> tuple[str, ...]:
    first, last = finding.series.arms[0], finding.series.arms[-1]
    expectation = finding.expectation
    return finding.series.name, named(first), named(last), MEASURE_WORDS[expectation.measure], expectation.direction


def _form(finding: Finding) -> Form:
    return measured(finding.expectation.measure, finding.values[0].value)


def _found_change(finding: Finding) -> str:
    relative = finding.expectation.measure == "step_time" or finding.expectation.direction == "stays"
    points = replace(PERCENT, unit="points") if finding.expectation.measure == "dropped" else _form(finding)
    return (PERCENT if relative else points).interval(finding.change, signed=True)


def _forecasts(results: Results) -> list[str]:
    blocks = []
    for name in dict.fromkeys(one.slice for one in results.predicted):
        blocks.append(f"### {name}")
        here = [one for one in results.predicted if one.slice == name]
        rungs = [one for one in here if one.rung]
        if rungs:
            blocks += ["#### ladder", _forecast_table(rungs, "rung")]
        for series in dict.fromkeys(one.where for one in here if not one.rung):
            blocks += [f"#### {series}", _forecast_table([one for one in here if one.where == series and not one.rung])]
    return blocks


def _forecast_table(found: Sequence[Predicted], of: str = "") -> str:
    """A line per forecast.

    Args:
      of: what the first column is, if lines are of several of them.
    """
    rules = [rule for rule in RULE_WORDS if any(rule in one.training_tokens for one in found)]
    rows = []
    for one in found:
        start = [*([one.where] if of else []), named(one.arm)]
        if one.error:
            rows.append([*start, f"no forecast: {one.error}"])
            continue
        capacity = f" of {readable(one.capacity)}" if one.capacity else ""
        rows.append(
            [
                *start,
                f"{count(one.total)} / {count(one.active)}",
                ", ".join(f"{axis} {size}" for axis, size in one.mesh.items()) or MISSING,
                duration(one.seconds),
                PERCENT.text(one.increase, signed=True),
                PERCENT.text(one.mfu),
                f"{readable(one.memory)}{capacity}{'' if one.fits else ', DOES NOT FIT'}",
                *(count(one.training_tokens[rule]) if rule in one.training_tokens else MISSING for rule in rules),
            ]
        )
    header = ["arm", "parameters / active", "mesh", "step time", "over dense", "MFU", "memory of a device"]
    return _table([*([of] if of else []), *header, *(f"tokens at {RULE_WORDS[rule]}" for rule in rules)], rows)


def _commands(results: Results) -> list[str]:
    lines = []
    for row, rules in _with_rules(results.rows):
        if row.commands:
            lines += [f"# {_name(row)}: {', '.join(rules)}", *row.commands]
    for series, commands in {finding.series.name: finding.commands for finding in results.findings}.items():
        if new := [command for command in commands if command not in lines]:
            lines += [f"# {series}", *new]
    return ["```\n" + "\n".join(lines) + "\n```"] if lines else []


def _not_run(results: Results) -> list[str]:
    """What was left out, has failed, or is missing from the sections above."""
    rows, lines = results.rows, list(results.not_run)
    sparse = [row for row in rows if not row.dense]
    for row, rules in _with_rules(rows):
        if row.missing:
            lines.append(f"{_name(row)}, {', '.join(rules)}: seeds {', '.join(map(str, row.missing))} are missing")
        if not row.dense and row.seeds and not row.gain:
            lines.append(f"{_name(row)}, {', '.join(rules)}: not compared with a dense model")
    enclosed = {_name(row) for row in sparse if row.rule == "step_time"}
    outside = dict.fromkeys(_name(row) for row in sparse if _name(row) not in enclosed)
    if enclosed and outside:
        lines.append(f"training at the step time of dense models, of which no two enclose it: {', '.join(outside)}")
    lines += [
        f"forecast of {one.arm.label} ({one.where}) on {one.slice}: {one.error}"
        for one in results.predicted
        if one.error
    ]
    for condition, line in (
        (not results.conditions, "no conditions are recorded"),
        (not any(row.seeds for row in rows), "the ladder: no run has finished"),
        (rows and not sparse, "mixtures of experts on the ladder: there is nothing to compare the dense models with"),
        (sparse and not enclosed, "training at equal step time: it takes dense models with shorter and longer steps"),
        (not rows and not results.facts, "step times"),
        (
            (rows or results.facts) and not any(facts.parts for _, facts in results.measured()),
            "profiles: the step times are not taken apart",
        ),
        (rows and not any(all(row.curves) and row.curves for row in rows), "losses during training"),
        (sparse and not any(row.loads for row in sparse), "the load of experts"),
        (not results.findings, "ablations"),
        (not results.predicted, "forecasts for slices"),
        (rows and not any(row.commands for row in rows), "no commands are recorded that repeat a cell"),
    ):
        if condition:
            lines.append(line)
    for rule, words in RULE_WORDS.items():
        if rule != "step_time" and sparse and not any(row.rule == rule for row in sparse):
            lines.append(f"training at {words}")
    return lines or ["Nothing was left out."]


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; short rows are filled up with dashes."""
    header = list(header)
    cells = [[*row, *[MISSING] * (len(header) - len(row))] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    clean = lambda cell: " ".join(str(cell).replace("|", "\\|").split())
    return "\n".join(f"| {' | '.join(map(clean, line))} |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
