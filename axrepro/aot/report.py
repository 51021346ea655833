"""A forecast, as text and as JSON."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from axrepro.aot.analytic import EFFICIENCY, Estimate
from axrepro.aot.forecast import Forecast
from axrepro.aot.lint import relative
from axrepro.aot.search import Trial
from axrepro.core.taps import scopes
from axrepro.train.describe import readable, table
from axrepro.train.hardware import Chip

_SHOWN = 12  # collectives
_ESTIMATED = "estimated from the config, not compiled"


def summary(f: Forecast) -> dict[str, Any]:
    """All figures of a forecast: what `--json` prints. Bytes are of one device and step, times in seconds."""
    found: dict[str, Any] = {
        "hardware": f.effect.slice_name,
        "devices": f.devices,
        "mesh": dict(f.compiled.mesh),
        "compile_seconds": round(f.compiled.seconds, 1),
        "memory": memory(f),
        "flops": {
            "executed": f.program.flops(),
            "recomputed": f.program.recomputed(),
            "model": f.effect.flops.causal / f.devices,
            "model_full": f.effect.flops.full / f.devices,
        },
        "collectives": collectives(f),
        "host_transfers": {
            way: sum(getattr(one, way) * one.trips for one in f.program.transfers()) for way in ("to_host", "from_host")
        },
        "findings": [asdict(finding) for finding in f.findings],
        **f.speed,
    }
    if f.time is not None:
        found["breakdown"] = {part: seconds for part, seconds in _largest(f.time.parts) if seconds > 0}
    return found


def text(name: str, f: Forecast) -> str:
    """The report: a table of figures, then the breakdown of the step and its collectives."""
    figures = summary(f)
    rows = {
        "hardware": f"{f.effect.slice_name}: {f.devices} devices, mesh {_mesh(f.compiled.mesh)}",
        "compiled in": f"{f.compiled.seconds:.0f} s, {'with' if f.compiled.executable else 'up to'} machine code",
        "memory per device": _memory(figures["memory"]),
        "arithmetic": _arithmetic(figures["flops"]),
    }
    if any(figures["host_transfers"].values()):
        there, back = figures["host_transfers"].values()
        rows["host traffic"] = f"{readable(there)} there and {readable(back)} back, a step and device"
    if f.time is not None and f.chip is not None:
        rows |= _speeds(figures, f.effect.unit, f.chip)
    lines = [f"{name}: forecast", *table(rows)]
    if f.time is not None:
        lines += _breakdown(f.time.parts, f.time.seconds)
    if figures["collectives"]:
        lines += ["", "collectives, bytes that a device sends in a step"]
        for row in figures["collectives"][:_SHOWN]:
            how = f"{row['overlapped']:.0%} beside other work"
            lines.append(
                f"{readable(int(row['sent'])):>12} in {row['count']:5d}  {row['kind']} over {row['axes']}, {how}"
            )
    lines += ["", *buffers(f), ""]
    return "\n".join([*lines, *(["findings", *map(str, f.findings)] if f.findings else ["no findings"])])


def estimate_summary(e: Estimate) -> dict[str, Any]:
    """All figures of an estimate, under the names of `summary` as far as there are such figures."""
    executed = e.effect.flops.causal * (1 + e.recomputed) / e.devices
    return {
        "estimated": _ESTIMATED,
        "hardware": e.effect.slice_name,
        "devices": e.devices,
        "mesh": dict(e.effect.mesh),
        "memory": {"total": sum(e.memory.values()), "capacity": e.capacity, "fits": e.fits, "kinds": dict(e.memory)},
        "flops": {
            "executed": executed,
            "recomputed": e.effect.flops.causal * e.recomputed / e.devices,
            "model": e.effect.flops.causal / e.devices,
            "model_full": e.effect.flops.full / e.devices,
        },
        **e.speed,
        "breakdown": {part: seconds for part, seconds in _largest(e.parts) if seconds > 0},
        "left_out": list(e.left_out),
    }


def estimate_text(name: str, e: Estimate) -> str:
    """The report of an estimate."""
    figures = estimate_summary(e)
    found = figures["memory"]
    kinds = ", ".join(f"{kind} {readable(size)}" for kind, size in found["kinds"].items() if size)
    fits = "" if e.fits else ": DOES NOT FIT"
    rows = {
        "hardware": f"{e.effect.slice_name}: {e.devices} devices, mesh {_mesh(e.effect.mesh)}",
        "how": f"{_ESTIMATED}; products at {EFFICIENCY:.0%} of the published rate",
        "memory per device": f"{readable(found['total'])} of {readable(e.capacity)} ({kinds}){fits}",
        "arithmetic": _arithmetic(figures["flops"]),
        **_speeds(figures, e.effect.unit, e.chip),
    }
    lines = [f"{name}: estimate", *table(rows), *_breakdown(e.parts, e.seconds)]
    return "\n".join([*lines, *(["", f"not reckoned with: {'; '.join(e.left_out)}"] if e.left_out else [])])


def _mesh(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def _speeds(figures: Mapping[str, Any], unit: str, chip: Chip) -> dict[str, str]:
    """Rows of the table: what the step time amounts to."""
    rows = {
        "step time": f"{figures['step_seconds']:.3f} s",
        "MFU": f"{figures['mfu']:.1%} (attention as masked), {figures['mfu_full']:.1%} (whole attention matrix)",
        "throughput": f"{figures[f'{unit}_per_second']:,.0f} {unit}/s, {figures[f'{unit}_per_day'] / 1e9:,.2f} "
        f"billion a day",
    }
    if chip.price is not None:
        rows["list price"] = (
            f"{figures[f'usd_per_billion_{unit}']:,.0f} USD per billion {unit} "
            f"({chip.price.usd} USD a chip-hour, {chip.price.terms}, {chip.price.read})"
        )
    if "checkpoint_share" in figures:
        rows["checkpoints"] = f"{figures['checkpoint_share']:.2%} of the time, to copy the state to the hosts"
    return rows


def _breakdown(parts: Mapping[str, float], total: float) -> list[str]:
    shown = [(part, seconds) for part, seconds in _largest(parts) if seconds > 0.001 * total]
    return [
        "",
        "where the step's time goes",
        *(f"{seconds / total:7.1%} {seconds:9.4f} s  {part}" for part, seconds in shown),
    ]


def memory(f: Forecast) -> dict[str, Any]:
    """Bytes of one device: what it must hold, of which "peak" is in use at the worst moment, and what is there then."""
    found = f.memory
    largest = [
        {
            "bytes": b.bytes,
            "shape": b.shape,
            "kind": b.kind,
            "scope": scopes(b.op_name),
            "source": relative(b.source) if b.source else "",
        }
        for b in found.peak.buffers[:_SHOWN]
    ]
    sizes = {name: getattr(found, name) for name in ("total", "arguments", "outputs", "constants", "temporaries")}
    more = {"peak": found.peak.bytes, "fragmentation": found.fragmentation, "host": found.host}
    return {**sizes, **more, "capacity": f.compiled.capacity, "fits": f.fits, "largest": largest}


def collectives(f: Forecast) -> list[dict[str, Any]]:
    """By kind and mesh axes, the largest first: bytes sent, how often, and which share of them overlaps with work."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in f.program.collectives(f.compiled.mesh):
        entry = sums[one.kind, "+".join(one.axes) or "itself"]
        entry[0] += one.sent * one.trips
        entry[1] += one.trips
        entry[2] += one.sent * one.trips * one.span.asynchronous
    rows = [
        {"kind": kind, "axes": axes, "sent": sent, "count": int(count), "overlapped": hidden / sent if sent else 0.0}
        for (kind, axes), (sent, count, hidden) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["sent"])


def _largest(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda item: -item[1])


def _memory(figures: Mapping[str, Any]) -> str:
    room = f" of {readable(figures['capacity'])}" if figures["capacity"] else ""
    parts = ", ".join(f"{kind} {readable(figures[kind])}" for kind in ("arguments", "temporaries"))
    host = f"; host {readable(figures['host'])}" if figures["host"] else ""
    return f"{readable(figures['total'])}{room} ({parts}){'' if figures['fits'] else ': DOES NOT FIT'}{host}"


def buffers(f: Forecast) -> list[str]:
    """The largest arrays at the moment when most memory is in use."""
    lines = [f"largest in memory at the peak, {readable(f.memory.peak.bytes)}"]
    for row in memory(f)["largest"]:
        where = f"  {row['source']}" if row["source"] else ""
        lines.append(f"{readable(row['bytes']):>12}  {row['shape']} {row['kind']}  {row['scope']}{where}")
    return lines


def _arithmetic(figures: Mapping[str, float]) -> str:
    done, again = figures["executed"], figures["recomputed"]
    return (
        f"{done / 1e12:,.1f} TFLOP a device, of which {again / done if done else 0:.1%} done again in the backward pass"
    )


def trial(one: Trial) -> str:
    """A trial of a search in a line."""
    settings = " ".join(f"{path.split('.')[-1]}={value}" for path, value in one.changes)
    if one.forecast is None:
        return f"        -  {settings}: {one.reason}"
    held = f"{readable(one.forecast.memory.total)}{'' if one.forecast.fits else ', does not fit'}"
    if one.forecast.time is None:
        return f"{held}  {settings}"
    return f"{one.forecast.time.seconds:8.3f} s, MFU {one.forecast.speed['mfu']:.1%}, {held}  {settings}"


def trial_summary(one: Trial) -> dict[str, Any]:
    """A trial of a search, for machines."""
    figures = {"reason": one.reason} if one.forecast is None else summary(one.forecast)
    return {"changes": dict(one.changes), **figures}


def ranking(name: str, trials: list[Trial]) -> str:
    """The trials of a search, the fastest first, and the overrides of the best."""
    lines = [f"{name}: {len(trials)} settings by forecast step time", *map(trial, trials)]
    fitting = [one for one in trials if one.seconds < math.inf]
    return "\n".join([*lines, "", f"best: {fitting[0].line}" if fitting else "none of them fits"])
