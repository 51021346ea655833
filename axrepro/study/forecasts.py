"""What a study says of slices that are not here: every arm of its outlook, compiled for them and timed by the model of
`axrepro.aot`, in FOLDER/forecasts/TOPOLOGY.json.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from axrepro import registry
from axrepro.aot.forecast import forecast
from axrepro.aot.slices import Slice, find_slice
from axrepro.core.config import to_json
from axrepro.errors import UserError
from axrepro.launch import configured
from axrepro.study.budget import BESIDE, Cost, share
from axrepro.study.files import read_json, write_json
from axrepro.study.results import Predicted
from axrepro.study.study import Arm, Outlook, Rule, Study
from axrepro.train.experiment import Experiment
from axrepro.train.hardware import slice_name

_GIB = 2**30
_Name = tuple[str, tuple[tuple[str, str], ...]]


def forecast_all(
    outlook: Outlook, changes: Mapping[str, str], topology: str, folder: epath.Path, tell: Callable[[str], None] = print
) -> None:
    """Forecasts every arm that `folder` has no forecast of yet, as it is configured now; each takes some seconds.

    An arm that cannot be (its mesh does not fit, the compiler refuses it) is kept with the reason in place of figures,
    and tried again the next time.

    Args:
      changes: of all experiments, beside those of the arms.
    Raises:
      UserError: if there is no such slice.
    """
    hardware, path = find_slice(topology), folder / "forecasts" / f"{topology}.json"
    known = _known(path)
    done = {line["config"]: line for line in known.values() if "error" not in line}
    arms = {
        _name(arm, changes): arm for _, _, dense, arms in _groups(outlook) for arm in (dense, *arms) if arm is not None
    }
    for number, (name, arm) in enumerate(arms.items(), start=1):
        old = known.get(name, {})
        line: dict[str, Any] = {"experiment": name[0], "changes": [list(change) for change in name[1]]}
        try:
            experiment = _configured(name, hardware)
            line["config"] = config = hashlib.sha256(to_json(experiment).encode()).hexdigest()
            if old.get("config") == config and "error" not in old:
                continue
            # arms of two series may be one and the same
            done[config] = line = (done.get(config) or _figures(experiment, hardware)) | line
            told = f"{line['seconds']:.3f} s, {line['memory'] / _GIB:.1f} of {line['capacity'] / _GIB:.1f} GiB"
        except (UserError, RuntimeError) as error:
            line["error"] = told = _reason(error)
        if line != old:
            known[name] = line
            write_json(path, list(known.values()))
        tell(f"forecast {number} of {len(arms)} on {topology}, {arm.label} ({arm.experiment}): {told}")


def read(folder: epath.Path, study: Study, changes: Mapping[str, str]) -> tuple[Predicted, ...]:
    """The forecasts in `folder` of the arms of a study's outlook, by slice, and in its order; those missing are left
    out. Of several arms of one label, which are one model on several meshes, it is the fastest that fits.

    Training budgets follow from `study.tokens_per_parameter` alone: `study.hours` are those of the machine that trains.
    """
    found = []
    for path in sorted((folder / "forecasts").glob("*.json")):
        known = _known(path)
        for where, rung, dense, arms in _groups(study.outlook):
            base = known.get(_name(dense, changes)) if dense is not None else None
            by_label: dict[tuple[str, bool], list[Predicted]] = defaultdict(list)
            both = [] if dense is None else [(dense, True)]
            for arm, is_dense in (*both, *((arm, False) for arm in arms)):
                if (line := known.get(_name(arm, changes))) is not None:
                    one = _predicted(path.stem, where, rung, arm, is_dense, line, base, study.tokens_per_parameter)
                    by_label[arm.label, is_dense].append(one)
            found += [
                min(same, key=lambda one: (not one.fits, bool(one.error), one.seconds)) for same in by_label.values()
            ]
    return tuple(found)


def _groups(outlook: Outlook) -> Iterator[tuple[str, bool, Arm | None, tuple[Arm, ...]]]:
    """(name, whether it is a rung, dense arm, the others) of all rungs and series."""
    for rung in outlook.ladder:
        yield rung.name, True, rung.dense, rung.sparse
    for series in outlook.series:
        yield series.name, False, series.dense, series.arms


def _name(arm: Arm, changes: Mapping[str, str]) -> _Name:
    return arm.experiment, (*arm.changes, *sorted(changes.items()))


def _configured(name: _Name, hardware: Slice) -> Experiment:
    where = slice_name(hardware.kind, hardware.devices), hardware.devices, hardware.slices
    experiment, changes = name
    return configured(registry.find(experiment, registry.index()), where, dict(changes))[0]


def _figures(experiment: Experiment, hardware: Slice) -> dict:
    found = forecast(experiment, hardware)
    assert found.time is not None
    return {
        "seconds": found.time.seconds,
        "parts": dict(found.time.parts),
        "mfu": found.speed["mfu"],
        "flops": found.effect.flops.causal,
        "tokens": found.effect.units,
        "total": found.effect.total,
        "active": found.effect.active,
        "outside": found.effect.outside,
        "memory": found.memory.total,
        "capacity": found.compiled.capacity,
        "mesh": {axis: size for axis, size in found.compiled.mesh.items() if size > 1},
    }


def _reason(error: Exception) -> str:
    """In one line: a fault of the compiler ends with what it is, after its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _predicted(
    topology: str,
    where: str,
    rung: bool,
    arm: Arm,
    dense: bool,
    line: Mapping,
    base: Mapping | None,
    tokens_per_parameter: float,
) -> Predicted:
    names = ("seconds", "parts", "mfu", "flops", "tokens", "total", "active", "outside", "memory", "capacity", "mesh")
    figures = {name: line.get(name, {} if name in ("parts", "mesh") else 0) for name in names}
    increase = None
    tokens: dict[Rule, float] = {}
    if base is not None and "error" not in base and "error" not in line:
        budget = tokens_per_parameter * base["outside"]
        cost, of_base = (Cost(one["tokens"], one["flops"], one["seconds"]) for one in (line, base))
        tokens = {rule: budget * share(rule, cost, of_base) * cost.tokens / of_base.tokens for rule in BESIDE}
        increase = None if dense else line["seconds"] / base["seconds"] - 1
    return Predicted(
        slice=topology,
        where=where,
        rung=rung,
        arm=arm,
        dense=dense,
        fits="error" not in line and line["memory"] <= line["capacity"],
        increase=increase,
        training_tokens=tokens,
        error=line.get("error", ""),
        **figures,
    )


def _known(path: epath.Path) -> dict[_Name, dict]:
    """What was forecast of each arm."""
    return {(line["experiment"], tuple(map(tuple, line["changes"]))): line for line in read_json(path) or []}
