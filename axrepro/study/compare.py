"""From what a study's folder holds to what its report says."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from etils import epath

from axrepro.errors import UserError
from axrepro.study import bootstrap, forecasts
from axrepro.study.bootstrap import Estimate
from axrepro.study.files import read_json
from axrepro.study.measured import cost, read_measured, step_ratio
from axrepro.study.plan import Plan
from axrepro.study.results import SCORES, Finding, Results, Row
from axrepro.study.step_time import WARM_UP
from axrepro.study.study import Arm, Expectation, Rule, Rung, Series, Study
from axrepro.study.sweep import read

Pair = tuple[np.ndarray, np.ndarray]  # numerators and denominators, [seeds, documents]
_FLAT = 0.1  # what "stays" allows


def scores(cells: Sequence[Mapping[str, Any]]) -> dict[str, Pair]:
    """What each score is the ratio of, of runs that differ in their seed.

    Raises:
      UserError: if they were scored on different documents.
    """
    names = {tuple(cell["documents"]["names"]) for cell in cells}
    if len(names) > 1:
        raise UserError(
            f"runs were scored on different held-out documents ({' and '.join(str(len(n)) for n in names)}): their "
            "data changed in between; choose another --workdir"
        )
    documents = lambda name, of="documents": np.array([cell[of][name] for cell in cells], np.float64)
    return {
        "bits_per_byte": (documents("bits"), documents("bytes")),
        "accuracy": (documents("correct"), documents("tokens")),
        "choice": (documents("correct", "choice"), documents("asked", "choice")),
    }


def rows(study: Study, plan: Plan, folder: epath.Path) -> tuple[Row, ...]:
    """The ladder's table."""
    finished = _Finished(plan, folder, study.seeds)
    sparse = [(rung, arm) for rung in study.ladder for arm in rung.sparse]
    applied = [rule for rule in study.rules if any(plan.steps(*where, rule) for where in sparse)]
    return tuple(
        _row(study, plan, finished, rung, arm, rule, steps)
        for rung in study.ladder
        for arm in rung.arms
        for rule in applied or study.rules
        if (steps := plan.steps(rung, arm, rule)) is not None
    )


class _Finished:
    """Finished cells, each read once."""

    def __init__(self, plan: Plan, folder: epath.Path, seeds: Sequence[int]):
        self._plan, self._folder, self._seeds, self._read = plan, folder, seeds, {}

    def __call__(self, arm: Arm, steps: int | None) -> dict[int, dict[str, Any]]:
        """By seed; those that are not finished are left out."""
        found: dict[int, dict[str, Any]] = {}
        if steps is None:
            return found
        for seed in self._seeds:
            cell = self._plan.cell(arm, steps, seed)
            if cell.folder not in self._read:
                self._read[cell.folder] = read(cell, self._folder)
            if self._read[cell.folder] is not None:
                found[seed] = self._read[cell.folder]
        return found


def _row(study: Study, plan: Plan, finished: _Finished, rung: Rung, arm: Arm, rule: Rule, steps: int) -> Row:
    facts, dense_facts = plan.of(arm), plan.of(rung.dense)
    cells, is_dense = finished(arm, steps), arm == rung.dense
    pairs = scores(list(cells.values())) if cells else {}
    gain, increase = {}, None
    if not is_dense:
        ratio = step_ratio(facts, dense_facts)
        increase = Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1)
        slopes = _slopes(steps, {n: finished(arm, n) for one in study.rules if (n := plan.steps(rung, arm, one))})
        if rule == "step_time":
            gain = _gain_at_step_time(study, plan, finished, rung, arm, cells, slopes, ratio)
        else:
            gain = _gain(cells, finished(rung.dense, plan.steps(rung, rung.dense, rule)))
            if rule == "wall_clock":
                gain = _widened(gain, {name: -slope for name, slope in slopes.items()}, ratio)
    hours = lambda step: step * cost(facts, dense_facts).seconds / 3600
    return Row(
        rung=rung.name,
        facts=replace(facts, arm=arm),
        dense=is_dense,
        rule=rule,
        steps=steps,
        tokens=steps * facts.tokens,
        flops=steps * facts.flops,
        hours=hours(steps),
        increase=increase,
        scores={name: bootstrap.ratio(*pairs[name]) for name in pairs},
        by_seed={name: tuple((above.sum(1) / below.sum(1)).tolist()) for name, (above, below) in pairs.items()},
        gain=gain,
        seeds=tuple(cells),
        missing=tuple(seed for seed in study.seeds if seed not in cells),
        commands=_commands(plan, [(arm, steps, cells)]),
        curves=tuple(tuple((hours(step), loss) for step, loss in cell["train"]) for cell in cells.values()),
        in_training=statistics.median(cell["step_time_s"] for cell in cells.values()) if cells else None,
        loads=_loads(cells.values()),
        dropped=None if is_dense else _routing(cells.values(), "dropped"),
    )


Cells = Mapping[int, Mapping[str, Any]]  # of one arm and number of steps, by seed


def _gain(cells: Cells, dense: Cells) -> dict[str, Estimate]:
    """Scores less those of the dense model beside it, of the seeds that both have."""
    both = [seed for seed in cells if seed in dense]
    if not both:
        return {}
    ours, theirs = scores([cells[s] for s in both]), scores([dense[s] for s in both])
    return {name: bootstrap.difference(ours[name], theirs[name]) for name in SCORES}


def _gain_at_step_time(
    study: Study,
    plan: Plan,
    finished: _Finished,
    rung: Rung,
    arm: Arm,
    cells: Cells,
    slopes: Mapping[str, float],
    ratio: Estimate,
) -> dict[str, Estimate]:
    """Scores less those of a dense model of the same step time, read between two rungs."""
    place = plan.between(rung, arm)
    assert place is not None
    around = [study.ladder[one] for one in (place.lower, place.upper)]
    lower, upper = (finished(one.dense, plan.steps(one, one.dense, "step_time")) for one in around)
    seeds = [seed for seed in cells if seed in lower and seed in upper]
    if not seeds:
        return {}
    ours, below, above = (scores([one[s] for s in seeds]) for one in (cells, lower, upper))
    gain = {name: bootstrap.difference_between(ours[name], below[name], above[name], place.share) for name in SCORES}
    # a longer step means more steps of ours, and a better dense model
    dense = {name: (_mean(above[name]) - _mean(below[name])) / place.width for name in SCORES}
    return _widened(gain, {name: place.growth * slope - dense[name] for name, slope in slopes.items()}, ratio)


def _mean(pair: Pair) -> float:
    return float((pair[0].sum(1) / pair[1].sum(1)).mean())


def _slopes(steps: int, runs: Mapping[int, Cells]) -> dict[str, float]:
    """Of an arm's scores over the logarithm of its steps: of the line through these runs and those whose number of
    steps is nearest to them; {} if there are no others.

    Args:
      runs: the arm's cells by steps.
    """
    others = [n for n in runs if n != steps and set(runs[n]) & set(runs[steps])]
    if not others:
        return {}
    other = min(others, key=lambda n: abs(math.log(n / steps)))
    seeds = sorted(set(runs[other]) & set(runs[steps]))
    here, there = (scores([runs[n][seed] for seed in seeds]) for n in (steps, other))
    return {name: (_mean(there[name]) - _mean(here[name])) / math.log(other / steps) for name in SCORES}


def _widened(gain: Mapping[str, Estimate], slopes: Mapping[str, float], ratio: Estimate) -> dict[str, Estimate]:
    """Gains with what the interval of the ratio of step times adds to their intervals.

    Args:
      slopes: of the gains over the logarithm of the ratio, by which budgets go.
    """
    found = dict(gain)
    for name in gain.keys() & slopes.keys():
        shifts = [slopes[name] * math.log(end / ratio.value) for end in (ratio.low, ratio.high)]
        one, low, high = gain[name], min(0.0, *shifts), max(0.0, *shifts)
        found[name] = Estimate(one.value, one.low + low, one.high + high)
    return found


def _commands(plan: Plan, runs: Iterable[tuple[Arm, int, Mapping[int, Mapping[str, Any]]]]) -> tuple[str, ...]:
    """What repeats finished runs (arm, steps, cells by seed), each with what it prints at its end."""
    found = {}
    for arm, steps, cells in runs:
        for seed, cell in cells.items():
            run = plan.cell(arm, steps, seed)
            command = run.command(f"runs/again/{run.folder.removeprefix('cells/')}")
            found[f"{command}  # eval/bits_per_byte {cell['scalars']['eval/bits_per_byte']:.4f}"] = None
    return tuple(found)


def _named(values: Mapping[str, Any], name: str) -> list:
    return [value for path, value in values.items() if path.split("/")[-1] == name]


def _routing(cells, name: str) -> float | None:
    """Mean over layers and seeds."""
    found = [value for cell in cells for value in _named(cell["routing"], name)]
    return statistics.fmean(found) if found else None


def _loads(cells) -> tuple[tuple[float, ...], ...]:
    """[layer][expert] shares, sorted in each run, then averaged over runs."""
    stacked = []
    for cell in cells:
        if loads := _named(cell["loads"], "load"):
            layers = [np.sort(layer)[::-1] for load in loads for layer in np.atleast_2d(load)]
            stacked.append(np.stack(layers))
    return tuple(map(tuple, np.mean(stacked, 0).tolist())) if stacked else ()


def findings(study: Study, plan: Plan, folder: epath.Path) -> tuple[Finding, ...]:
    """Whether what was expected of the ablations held; of those whose cells are finished."""
    finished, found = _Finished(plan, folder, study.seeds), []
    for series in study.ablations:
        cells = [finished(arm, study.ablation_steps) for arm in series.arms]
        seeds = [seed for seed in study.seeds if all(seed in one for one in cells)]
        for expectation in series.expected:
            if seeds or expectation.measure == "step_time":
                runs = [[one[seed] for seed in seeds] for one in cells]
                trained = [(arm, study.ablation_steps, one) for arm, one in zip(series.arms, cells, strict=True)]
                found.append(_finding(plan, series, expectation, runs, _commands(plan, trained)))
    return tuple(found)


def _finding(
    plan: Plan,
    series: Series,
    expectation: Expectation,
    runs: Sequence[Sequence[Mapping[str, Any]]],
    commands: tuple[str, ...],
) -> Finding:
    relative = expectation.direction == "stays" or expectation.measure == "step_time"
    if expectation.measure == "step_time":
        facts = [plan.of(arm) for arm in series.arms]
        values = [f.seconds for f in facts]
        ratio = step_ratio(facts[-1], facts[0])
        change = Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1)
    elif expectation.measure == "bits_per_byte":
        pairs = [scores(cells)["bits_per_byte"] for cells in runs]
        values = [bootstrap.ratio(*pair) for pair in pairs]
        change = bootstrap.difference(pairs[-1], pairs[0])
    else:
        measured = [[_measure(expectation.measure, cell) for cell in cells] for cells in runs]
        values = [bootstrap.mean(seeds) for seeds in measured]
        change = bootstrap.mean_difference(measured[-1], measured[0])
    if relative and expectation.measure != "step_time":
        first = values[0].value
        change = Estimate(change.value / first, change.low / first, change.high / first)
    return Finding(
        series=series,
        expectation=expectation,
        values=tuple(values),
        change=change,
        verdict=verdict(expectation.direction, change),
        commands=commands,
    )


def _measure(name: str, cell: Mapping[str, Any]) -> float:
    """Of a run's routers at the end of training, mean over the layers."""
    found = {"dropped": "dropped", "busiest": "max_violation", "router_logits": "router_logit_square"}[name]
    values = _named(cell["routing"], found)
    if name == "busiest":
        return 1 + statistics.fmean(values)
    return math.sqrt(statistics.fmean(values)) if name == "router_logits" else statistics.fmean(values)


def verdict(direction: str, change: Estimate) -> str:
    """Whether a change with its interval is in the expected direction."""
    inside, outside = {
        "falls": (change.high < 0, change.low > 0),
        "rises": (change.low > 0, change.high < 0),
        "stays": (max(-change.low, change.high) <= _FLAT, change.low > _FLAT or change.high < -_FLAT),
    }[direction]
    return "held" if inside else "did not hold" if outside else "open"


def assemble(
    name: str, study: Study, changes: Mapping[str, str], folder: epath.Path, notes: Sequence[str] = ()
) -> Results:
    """Everything that the folder holds of a study.

    Args:
      notes: of what failed.
    """
    known = read_measured(study, changes, folder)
    study, plan = known.study, Plan(known.study, known.facts, changes)
    conditions = _conditions(read_json(folder / "study.json") or {"starts": []}, study, changes)
    data, given_away = _data(plan, folder)
    return Results(
        study=name,
        conditions=conditions | data,
        rows=rows(study, plan, folder),
        facts=tuple(known.facts.values()),
        findings=findings(study, plan, folder),
        predicted=forecasts.read(folder, study, changes),
        not_run=(*notes, *given_away, *known.missing, *_not_run(study, plan, folder)),
    )


def _data(plan: Plan, folder: epath.Path) -> tuple[dict[str, str], list[str]]:
    """What the models were trained on and how, and what is wrong with that."""
    paths = [folder / cell.folder for cell in {cell.key: cell for cell in plan.cells()}.values()]
    cells = [(path, cell) for path in paths if (cell := read_json(path / "cell.json")) is not None]
    if not cells:
        return {}, []
    described = {
        f"{cell['data']}; held out {len(cell['documents']['bytes'])} documents of {sum(cell['documents']['bytes']):,} "
        f"bytes, which give {sum(cell['choice']['asked'])} questions": None
        for _, cell in cells
    }
    found = {"data": "; ".join(described)}
    if config := (read_json(cells[0][0] / "config.json") or {}).get("config"):
        rate = config["optimizer"].get("learning_rate", {})
        found["training"] = (
            f"batches of {config['data']['batch_size']} rows of {config['data']['sequence_length']} tokens, "
            f"{config['train']['dtype']}, {config['optimizer']['class_']}"
        )
        if "peak" in rate:
            found["training"] += f", {rate['class_']} to {rate['peak']:g}, the same for all models and not tuned here"
    names = sorted({name for _, cell in cells for name in cell["given_away"]})
    text = f"no score leaves out the held-out documents that training documents give away: {', '.join(names)}"
    return found, [text] if names else []


def _conditions(record: Mapping[str, Any], study: Study, changes: Mapping[str, str]) -> dict[str, str]:
    starts = record["starts"]
    distinct = lambda values: "; then ".join(dict.fromkeys(values))
    found = {
        "command": distinct(start["command"] for start in starts),
        "hardware": distinct(start["device"] for start in starts),
        "versions": distinct(", ".join(f"{k} {v}" for k, v in start["versions"].items()) for start in starts),
        "commit": distinct(start["git_commit"] or "none" for start in starts),
    }
    if starts:
        found["started"] = distinct(start["time"] for start in starts[:1])
    if study.hours is None:
        found["budget"] = f"{study.tokens_per_parameter:g} tokens per dense parameter outside the embedding"
    else:
        found["budget"] = f"{study.hours:g} hours of each dense model"
    found["seeds"] = ", ".join(map(str, study.seeds))
    found["step times"] = f"{study.rounds} interleaved rounds of {study.round_steps} steps, {WARM_UP} more left out"
    if changes:
        found["changes of all experiments"] = ", ".join(f"{path}={value}" for path, value in changes.items())
    return found


def _not_run(study: Study, plan: Plan, folder: epath.Path) -> Iterator[str]:
    """Ablations that are not finished; what is missing of the ladder, a row tells itself."""
    finished = _Finished(plan, folder, study.seeds)
    for series in study.ablations:
        for arm in series.arms:
            found = finished(arm, study.ablation_steps)
            if missing := [str(seed) for seed in study.seeds if seed not in found]:
                yield f"ablation of the {series.name}, {arm.label}: seeds {', '.join(missing)}"
