"""Golden files: what each experiment is, comes to, and how its `tiny` learns. `make goldens` writes them.

An experiment has `golden/FILE/FUNCTION.config.txt` and `.effect.txt`, and a `tiny` has `tiny.curve.json` too.
"""

import difflib
import importlib.metadata
import json
import re
from pathlib import Path

import numpy as np

from axrepro import registry
from axrepro.core.config import describe
from axrepro.errors import UserError
from axrepro.train.describe import NAMES, merged, partition, summary, table
from axrepro.train.effect import Effect, effect
from axrepro.train.experiment import Experiment, MeshRule, on_hardware
from axrepro.train.hardware import CHIPS, parse_topology

FOLDER = Path(__file__).resolve().parents[1] / "golden"
STEPS = 20
# 20 steps of moe_dense:tiny differ by 4e-7 between meshes of 1 and 8 devices, which add in other orders; with 1% more
# learning rate by 3e-3, with a 0.1% higher b2 by 7e-4. Between lies room for the rounding of another CPU or compiler.
RTOL = 1e-4
HINT = "if the change is meant, run `make goldens` and review what git diff says"


def files(entry: registry.Entry) -> list[Path]:
    """The golden files of an experiment."""
    kinds = ["config.txt", "effect.txt"] + (["curve.json"] if entry.function == "tiny" else [])
    return [FOLDER / entry.file / f"{entry.function}.{kind}" for kind in kinds]


def config_text(experiment: Experiment) -> str:
    """Every field."""
    return describe(experiment) + "\n"


def effect_text(experiment: Experiment) -> str:
    """The effect on one CPU, then how it is laid out on a slice for each mesh rule."""
    one = _effect(experiment, "cpu-1")
    figures = summary(one)
    lines = table(figures)
    lines += [f"{kind}: {', '.join(merged(dict.fromkeys(getattr(one, kind), ''))) or 'none'}" for kind in NAMES]
    lines += ["", *merged({path: str(parameter) for path, parameter in one.parameters.items()})]
    layouts: dict[str, str] = {}
    for rule in experiment.mesh_rules:
        name = representative(rule, experiment.mesh_rules)
        there = _effect(experiment, name)
        changed = {key: value for key, value in summary(there).items() if value != figures[key]}
        layout = "\n".join(merged({path: partition(x.partition) for path, x in there.parameters.items()}))
        same = layouts.setdefault(layout, name)
        lines += ["", f"{name}, mesh rule {rule.match!r}", *table(changed)]
        lines += [layout if same == name else f"partitions as on {same}"]
    return "\n".join(lines) + "\n"


def _effect(experiment: Experiment, name: str) -> Effect:
    _, count, slices = parse_topology(name)
    return effect(on_hardware(experiment, name)[0], name, count, slices)


def representative(rule: MeshRule, rules: tuple[MeshRule, ...]) -> str:
    """A slice that a mesh rule is for: 256 chips if it takes so many, else the nearest power of two.

    Raises:
      UserError: if there is none, for then it never applies.
    """
    for exponent in sorted(range(15), key=lambda n: abs(n - 8)):
        for kind in CHIPS:
            name = f"{kind}-{2**exponent * CHIPS[kind].cores}"
            if next((r for r in rules if re.fullmatch(r.match, name)), None) is rule:
                return name
    raise UserError(f"mesh rule {rule.match!r} is the first to match no slice of a power of two")


def curve_text(curve: dict[str, list[float]]) -> str:
    """The first steps of a training, with what they were made by."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    rounded = {name: [float(f"{value:.7g}") for value in values[:STEPS]] for name, values in curve.items()}
    return json.dumps({"made by": versions, "rtol": RTOL, **rounded}, indent=1) + "\n"


def curve_fault(path: Path, curve: dict[str, list[float]]) -> str | None:
    """Where a training leaves its golden curve; None where it does not."""
    if not path.exists():
        return "there is no such file"
    golden = json.loads(path.read_text())
    if golden.keys() != json.loads(curve_text(curve)).keys():
        return f"holds {', '.join(golden)}, not {', '.join(curve)}"
    for name, values in curve.items():
        if not (wrong := ~np.isclose(values[:STEPS], golden[name], rtol=RTOL, atol=0)).any():
            continue
        step = int(np.argmax(wrong))
        return (
            f"{name} leaves the golden curve at step {step + 1}: {golden[name][step]:.7g} -> {values[step]:.7g}, "
            f"beyond rtol {RTOL:g} (the golden was made by {golden['made by']})"
        )
    return None


def text_fault(path: Path, new: str) -> str | None:
    """The difference between a golden file and the text it should hold; None if there is none."""
    if not path.exists():
        return "there is no such file"
    old = path.read_text()
    if old == new:
        return None
    return "\n" + "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "golden", "now"))
