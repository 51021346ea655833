"""Step times of a study's arms on this hardware, kept in `step_times.json` so that budgets do not change later."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from etils import epath

from axrepro.core.config import to_json
from axrepro.errors import UserError
from axrepro.study.bootstrap import Estimate, median, median_ratio
from axrepro.study.budget import Cost
from axrepro.study.files import read_json, write_json
from axrepro.study.results import Facts
from axrepro.study.step_time import measure
from axrepro.study.study import Arm, Rung, Study
from axrepro.study.sweep import Hardware, experiment_of, slug
from axrepro.study.wording import placed
from axrepro.train.effect import Effect, effect
from axrepro.train.experiment import Experiment
from axrepro.train.processes import from_first, on_first


def device() -> str:
    """What this is, in words; of CPUs, how many cores, which one device shares."""
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {kind}" + (f", {os.cpu_count()} cores" if kind == "cpu" else "")


def fingerprint(experiment: Experiment) -> str:
    """Of all settings."""
    return hashlib.sha256(to_json(experiment).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Known:
    """What was measured.

    Attributes:
      study: without what was not.   facts: by `slug`.   missing: what was not and why, a line each.
    """

    study: Study
    facts: Mapping[str, Facts]
    missing: tuple[str, ...]


def measure_all(
    study: Study,
    changes: Mapping[str, str],
    folder: epath.Path,
    hardware: Hardware,
    tell: Callable[[str], None],
) -> Known:
    """Measures every arm that is trained, except for those that `step_times.json` has already.

    An arm that the devices have no memory for is left out, and tried again the next time.

    Args:
      changes: of all experiments.
    Raises:
      UserError: if they were measured on other hardware, or an arm does not fit its mesh.
    """
    path = folder / "step_times.json"
    known: dict[str, Any] = from_first(lambda: read_json(path)) or {"device": device(), "arms": {}}
    if known["device"] != device():
        raise UserError(
            f"the step times in {folder} are those of {known['device']}, and this is {device()}: budgets would not "
            "compare; choose another --workdir"
        )
    arms = {slug(arm, changes): arm for arm in study.trained()}
    experiments = {name: experiment_of(arm, hardware, {**dict(arm.changes), **changes}) for name, arm in arms.items()}
    for rung in study.ladder:
        for arm in rung.sparse:
            _same_conditions(rung, arm, *(experiments[slug(one, changes)] for one in (rung.dense, arm)))
    new = {
        name: experiment
        for name, experiment in experiments.items()
        if known["arms"].get(name, {}).get("config") != fingerprint(experiment)
    }
    if new:
        session = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        measured, errors = measure(new, study.rounds, study.round_steps, tell)
        for name, one in measured.items():
            found = {"session": session, **_counted(arms[name], effect(new[name], *hardware))}
            known["arms"][name] = {"config": fingerprint(new[name]), **found, **asdict(one)}
        known["errors"] = {**known.get("errors", {}), **dict.fromkeys(measured, ""), **errors}
        known = from_first(lambda: known)  # clocks differ: all processes go by that of the first
        on_first(lambda: write_json(path, known))
    return _known(study, changes, known)


def _same_conditions(rung: Rung, arm: Arm, dense: Experiment, sparse: Experiment) -> None:
    """Raises UserError if two models of a rung would not be comparable."""
    for path, ours, theirs in (
        ("data", sparse.data, dense.data),
        ("train.dtype", sparse.train.dtype, dense.train.dtype),
    ):
        if ours != theirs:
            raise UserError(
                f"rung {rung.name!r}: {arm.label!r} has another {path} than {rung.dense.label!r} ({ours!r:.80}, not "
                f"{theirs!r:.80}); give all arms of a rung the same, or their scores would not compare"
            )


def read_measured(study: Study, changes: Mapping[str, str], folder: epath.Path) -> Known:
    """What `step_times.json` has."""
    return _known(study, changes, read_json(folder / "step_times.json") or {"arms": {}})


def _known(study: Study, changes: Mapping[str, str], found: Mapping[str, Any]) -> Known:
    arms, errors = {slug(arm, changes): arm for arm in study.trained()}, found.get("errors", {})
    facts = {name: _facts(arm, found["arms"][name]) for name, arm in arms.items() if name in found["arms"]}
    has = lambda arm: slug(arm, changes) in facts
    why = lambda arm: errors.get(slug(arm, changes)) or "not measured"
    ladder, ablations, missing = [], [], []
    for rung in study.ladder:
        missing += [f"{placed(rung.name, arm.label)}: {why(arm)}" for arm in rung.arms if not has(arm)]
        if has(rung.dense):
            ladder.append(replace(rung, sparse=tuple(filter(has, rung.sparse))))
        elif any(map(has, rung.sparse)):
            missing.append(f"rung {rung.name}: there is no dense model to compare with")
    for series in study.ablations:
        if absent := [arm for arm in series.arms if not has(arm)]:
            missing += [f"ablation of the {series.name}, {arm.label}: {why(arm)}" for arm in absent]
        else:
            ablations.append(series)
    return Known(replace(study, ladder=tuple(ladder), ablations=tuple(ablations)), facts, tuple(missing))


def _counted(arm: Arm, found: Effect) -> dict[str, Any]:
    if found.unit != "tokens":
        raise UserError(f"arm {arm.label!r} learns from {found.unit}; a study is about language models")
    counts = {"total": found.total, "active": found.active, "outside": found.outside}
    return {**counts, "tokens": found.units, "flops": found.flops.causal}


def _facts(arm: Arm, known: Mapping[str, Any]) -> Facts:
    names = ("total", "active", "outside", "tokens", "flops", "parts", "memory")
    counted = {name: known[name] for name in names}
    session = known.get("session", "")
    return Facts(arm=arm, seconds=median(known["rounds"]), rounds=tuple(known["rounds"]), session=session, **counted)


def step_ratio(facts: Facts, dense: Facts) -> Estimate:
    """Step time over that of a dense model.

    The median over rounds of the ratio in each, so that what slows down the machine for both drops out; of step times
    that were not measured in the same rounds, the ratio of the medians, with the widest interval that they allow.
    """
    if facts.session == dense.session and len(facts.rounds) == len(dense.rounds):
        return median_ratio(facts.rounds, dense.rounds)
    ours, theirs = facts.seconds, dense.seconds
    return Estimate(ours.value / theirs.value, ours.low / theirs.high, ours.high / theirs.low)


def cost(facts: Facts, dense: Facts) -> Cost:
    """What budgets go by: the seconds of the dense model, times the ratio."""
    return Cost(facts.tokens, facts.flops, dense.seconds.value * step_ratio(facts, dense).value)
