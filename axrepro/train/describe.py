"""What an experiment is and comes to, and how two of them differ, as text."""

import re
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from axrepro.core.config import describe as describe_tree
from axrepro.core.config import differences, to_config_dict
from axrepro.train.effect import Effect, effect
from axrepro.train.experiment import Experiment, MeshRule

NAMES = ("losses", "metrics", "updates")


def describe(
    name: str, experiment: Experiment, slice_name: str, num_devices: int, slices: int, rule: MeshRule | None
) -> str:
    """The config tree, and the figures that follow from it."""
    figures = summary(effect(experiment, slice_name, num_devices, slices))
    figures["hardware"] = f"{slice_name}: {num_devices} devices, " + (
        f"mesh rule {rule.match!r}" if rule else "no mesh rule for it, the experiment's own settings"
    )
    return "\n".join([f"{name}: Experiment", describe_tree(experiment, "  "), "", *table(figures)])


def summary(e: Effect) -> dict[str, str]:
    """The figures of an effect, by what they are."""
    all_kinds = readable(sum(e.bytes_per_device.values()))
    per_device = ", ".join(f"{kind} {readable(size)}" for kind, size in e.bytes_per_device.items())
    return {
        "parameters": f"{e.total:,} total, {e.active:,} active per {e.unit.removesuffix('s')}",
        "per step": f"{e.units:,} {e.unit}, {e.flops.causal / 1e12:,.4g} TFLOP (attention as masked), "
        f"{e.flops.full / 1e12:,.4g} (whole attention matrix)",
        f"per {e.unit.removesuffix('s')}": f"{e.flops.causal / e.units / 1e9:,.4g} GFLOP, "
        f"{e.flops.full / e.units / 1e9:,.4g} (whole attention matrix)",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in e.mesh.items()),
        "bytes per device": f"{per_device}; {all_kinds} in all, activations not included",
    }


def table(rows: Mapping[str, str]) -> list[str]:
    """A line per row, the values below each other."""
    width = max(map(len, rows))
    return [f"{name:{width}} {value}" for name, value in rows.items()]


def readable(size: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def partition(spec: PartitionSpec) -> str:
    """A PartitionSpec as text: mesh axes joined by "+" per dimension, "-" for a whole one, "whole" for all."""
    entries = [entry if isinstance(entry, tuple) else (entry or "-",) for entry in spec]
    return " ".join("+".join(entry) for entry in entries) or "whole"


def compare(old: tuple[str, Experiment, Effect], new: tuple[str, Experiment, Effect]) -> str:
    """How two experiments on one slice differ: a section per kind of effect, or that there is no difference.

    Args:
      old, new: name, experiment with mesh rule and overrides applied, and effect.
    """
    (a_name, a_tree, a), (b_name, b_tree, b) = old, new
    sections = {
        "fields": _fields(a_tree, b_tree),
        "parameters": [
            *_changed(*({"total": f"{e.total:,}", "active": f"{e.active:,}"} for e in (a, b))),
            *_changed(*({p: str(x) for p, x in e.parameters.items()} for e in (a, b))),
        ],
        "per step": _changed(*({e.unit: f"{e.units:,}", **_flops(e)} for e in (a, b))),
        "bytes per device": _changed(
            *({kind: f"{n:,} ({readable(n)})" for kind, n in e.bytes_per_device.items()} for e in (a, b))
        ),
        "shardings": [
            *_changed(*({f"mesh.{axis}": str(size) for axis, size in e.mesh.items()} for e in (a, b))),
            *_changed(*({p: partition(x.partition) for p, x in e.parameters.items()} for e in (a, b))),
        ],
        **{kind: _changed(*(dict.fromkeys(getattr(e, kind), "") for e in (a, b))) for kind in NAMES},
    }
    lines = [f"{a_name} -> {b_name} on {a.slice_name}; topology and overrides apply to both"]
    if not any(sections.values()):
        return f"{lines[0]}\nno difference"
    for name, changes in sections.items():
        lines += [name, *(f"  {change}" for change in changes)] if changes else [f"{name}: no difference"]
    return "\n".join(lines)


def _fields(old: Experiment, new: Experiment) -> list[str]:
    """The fields that differ; of the mesh rules, which have been applied, only their number."""
    lines = differences(to_config_dict(old).to_dict(), to_config_dict(new).to_dict())
    shown = [line for line in lines if not line.startswith("mesh_rules")]
    return shown + ([f"mesh_rules: {len(lines) - len(shown)} fields differ"] if len(shown) < len(lines) else [])


def _flops(e: Effect) -> dict[str, str]:
    return {f"TFLOP, {kind}": f"{getattr(e.flops, kind) / 1e12:,.9g}" for kind in ("causal", "full")}


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """`- path value` for what is gone, `+ path value` for what is new, `~ path value -> value` for what changed."""
    gone = {path: value for path, value in old.items() if path not in new}
    came = {path: value for path, value in new.items() if path not in old}
    other = {path: f"{old[path]} -> {new[path]}" for path in old if old[path] != new.get(path, old[path])}
    return [f"{sign} {line}" for sign, part in (("-", gone), ("+", came), ("~", other)) for line in merged(part)]


def merged(rows: Mapping[str, str]) -> list[str]:
    """A line per path and value; paths that differ in their first number alone, as blocks do, share one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for path, value in rows.items():
        numbered = re.fullmatch(r"(.*?/)??(\d+)(/.*)", path)
        before, number, after = numbered.groups() if numbered else (path, "", "")
        groups.setdefault((before or "", after, value), []).append(number)
    lines = []
    for (before, after, value), numbers in groups.items():
        index = numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}"
        lines.append(f"{before}{index}{after} {value}".rstrip())
    return lines
