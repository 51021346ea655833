"""A profile of some steps: the trace for TensorBoard and Perfetto, and in words what the time went to.

Operations are named by the scopes of the layers they come from, which the compiled program keeps for each instruction.
Times are self times: a loop does not count its body again.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.profiler import ProfileData

from axrepro.core import hlo
from axrepro.core.taps import scopes
from axrepro.errors import UserError

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective", "ragged-all-to-all", "nccl")
_COPIES = {"copy", "copy-start", "copy-done", "transpose", "reshape", "bitcast", "slice", "dynamic-slice", "pad"}
_COPIES |= {"dynamic-update-slice", "concatenate", "broadcast", "gather", "select", "compare"}
_SILENT = {"parameter", "constant", "tuple", "get-tuple-element", "fusion", "iota"}
_PRODUCTS = re.compile(r"\b(dot|convolution|ragged-dot)\b|gemm|matmul|cutlass", re.IGNORECASE)
_CONTROL = {"while", "conditional", "call"}


@dataclass(frozen=True)
class Operation:
    """One instruction of a program and the time that it took.

    Attributes:
      label: scopes and primitive, with the pass it belongs to.   kind: what sort of work.
      seconds: self time in all.   count: how often it ran.
    """

    name: str
    label: str
    kind: str
    seconds: float
    count: int


@dataclass(frozen=True)
class Summary:
    """What a trace says. `busy` is the part of `seconds` in which some operation ran, averaged over the devices."""

    operations: list[Operation]
    seconds: float
    busy: float

    def kinds(self) -> dict[str, float]:
        """Share of all operations' time by kind, largest first."""
        total = sum(op.seconds for op in self.operations) or 1.0
        shares: dict[str, float] = defaultdict(float)
        for op in self.operations:
            shares[op.kind] += op.seconds / total
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def text(self, title: str, top: int = 30) -> str:
        """The tables of kinds and of the operations that take longest."""
        total = sum(op.seconds for op in self.operations) or 1.0
        idle = 1 - self.busy / self.seconds if self.seconds else 0.0
        lines = [f"{title}: {self.seconds * 1e3:,.1f} ms, of which {idle:.1%} idle", ""]
        lines += [f"{share:7.1%}  {kind}" for kind, share in self.kinds().items()]
        lines += ["", f"{'share':>7}  {'total ms':>10}  {'count':>7}  {'mean us':>10}  operation"]
        for op in self.operations[:top]:
            mean = op.seconds / op.count * 1e6
            figures = f"{op.seconds / total:7.1%}  {op.seconds * 1e3:10.2f}  {op.count:7d}  {mean:10.1f}"
            lines.append(f"{figures}  {op.label}  [{op.name}]")
        return "\n".join(lines) + "\n"


def instructions(text: str) -> dict[str, tuple[str, set[str]]]:
    """Name -> (op_name, opcodes with those of the computations that it calls), of a compiled program's text.

    What the compiler added has the scopes of what takes it, or else of what it takes.
    """
    try:
        computations = hlo.parse(text).computations.values() if text else ()
    except UserError:  # a form that is not known yet: the profile is worth more than the names in it
        return {}
    target = lambda one: one.attributes.get("custom_call_target", "").strip('"')
    codes = {one.name: {one.opcode, target(one)} - {""} for body in computations for one in body.instructions}
    bodies = {body.name: set().union(*(codes[one.name] for one in body.instructions)) for body in computations}
    return {
        one.name: (meaning, codes[one.name].union(*(bodies[name] for name in one.names("calls"))))
        for body in computations
        for one, meaning in zip(body.instructions, _meanings(body), strict=True)
    }


def _meanings(body: hlo.Computation) -> list[str]:
    """The op_name of every instruction, lent by a neighbour to those without."""
    found = {one.name: one.op_name for one in body.instructions}
    opcodes = {one.name: one.opcode for one in body.instructions}

    def lend(name: str, lender: str) -> None:
        within = found.get(lender, "").rpartition("/")[0]
        if not found.get(name, "?") and scopes(within):
            found[name] = f"{within}/{opcodes[name]}"

    moves = (_SILENT | _CONTROL) - {"fusion"}  # values of different origin
    for one in reversed(body.instructions):
        for operand in one.operands:
            if opcodes.get(operand) not in moves - {"tuple"}:  # one is made for what takes it, such as a loop
                lend(operand, one.name)
    for one in body.instructions:
        for operand in one.operands:
            if one.opcode not in moves and opcodes.get(operand) not in moves:
                lend(one.name, operand)
    return list(found.values())


def _kind(name: str, meaning: str, codes: set[str]) -> str:
    """What sort of work an instruction does."""
    words = {*codes, name.lower()}
    if any(word.startswith(_COLLECTIVES) for word in words):
        return "collectives"
    if codes & _CONTROL:
        return "control flow"
    if "dot_product_attention" in meaning:
        return "attention"
    if any(_PRODUCTS.search(word) for word in words):
        return "matrix products"
    if (codes and codes <= _COPIES | _SILENT) or name.lower().startswith(("memcpy", "memset")):
        return "copies"
    return "elementwise and reductions" if codes else "other"


def _label(name: str, meaning: str) -> str:
    if not (path := scopes(meaning)):
        return name
    if "rematted_computation" in meaning:
        return f"{path} (recomputed)"
    return f"{path} (backward)" if "transpose(" in meaning else path


def _lines(plane) -> Iterable[list[tuple[str, float, float, dict]]]:
    """The operations of a plane by line: (instruction, start, end, stats), times in ns."""
    device, lines = plane.name.startswith("/device:"), list(plane.lines)
    if device and (ops := [line for line in lines if line.name == "XLA Ops"]):  # TPU; the others repeat it by scope
        lines = ops
    elif device:
        lines = [line for line in lines if line.name.startswith("Stream")]
    for line in lines:
        events = []
        for event in line.events:
            stats = dict(event.stats)
            if device or "hlo_op" in stats:
                name = stats.get("hlo_op") or event.name.removeprefix("%").split(" ")[0]
                events.append((name, event.start_ns, event.end_ns, stats))
        if events:
            yield sorted(events, key=lambda e: (e[1], -e[2]))


def _self_times(events) -> Iterable[tuple[str, float, dict]]:
    """Each event's time without that of the events inside it."""
    inside = [0.0] * len(events)
    open_: list[int] = []
    for index, (_, start, end, _) in enumerate(events):
        while open_ and events[open_[-1]][2] <= start:
            open_.pop()
        if open_:
            inside[open_[-1]] += end - start
        open_.append(index)
    for (name, start, end, stats), within in zip(events, inside, strict=True):
        yield name, max(0.0, end - start - within), stats


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summarise(trace: ProfileData, text: str = "") -> Summary:
    """What the devices did in a trace.

    Args:
      text: of the compiled step; without it, operations keep the names of instructions.
    """
    known = instructions(text)
    totals: dict[str, list] = {}
    spans, busy = [], []
    devices = [plane for plane in trace.planes if re.match(r"/device:(TPU|GPU)", plane.name)]
    for plane in devices or [plane for plane in trace.planes if plane.name == "/host:CPU"]:
        intervals = []
        for events in _lines(plane):
            intervals += [(start, end) for _, start, end, _ in events]
            for name, nanoseconds, stats in _self_times(events):
                meaning, codes = known.get(name, (str(stats.get("tf_op", "")), set()))
                entry = totals.setdefault(name, [_label(name, meaning), _kind(name, meaning, codes), 0.0, 0])
                entry[2] += nanoseconds / 1e9
                entry[3] += 1
        if intervals:
            spans.append((max(end for _, end in intervals) - min(start for start, _ in intervals)) / 1e9)
            busy.append(_covered(intervals) / 1e9)
    operations = sorted((Operation(name, *entry) for name, entry in totals.items()), key=lambda op: -op.seconds)
    mean = lambda values: sum(values) / len(values) if values else 0.0
    return Summary(operations, mean(spans), mean(busy))


class Profiler:
    """Traces a window of steps of this process, in `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._first: int | None = None

    @property
    def running(self) -> bool:
        """Whether it traces."""
        return self._first is not None

    def start(self, step: int) -> None:
        """Starts to trace; `step` is the first."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # thousands of events a step that say nothing of the devices
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._first = step

    def stop(self, step: int, program: str) -> str:
        """Ends the trace after `step`; returns the summary, which is also in summary.txt.

        Args:
          program: text of the compiled step.
        """
        first, summary = self._first, self.end(program)
        text = summary.text(f"profile of step {first}" if first == step else f"profile of steps {first} to {step}")
        (self._folder / "summary.txt").write_text(text)
        return text

    def end(self, program: str) -> Summary:
        """Ends the trace.

        Args:
          program: text of the compiled step.
        """
        self._first = None
        jax.profiler.stop_trace()
        newest = max(self._folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
        return summarise(ProfileData.from_file(str(newest)), program)
