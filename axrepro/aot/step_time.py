"""How long a compiled step takes, and what it waits for.

The program's instructions run one after the other on a device's core; each takes as long as its products take at the
matrix rate, or its bytes at the bandwidth of the memory, whichever is longer. Collectives, and copies between memories,
that the compiler starts ahead of their use run beside the core, and take time only where nothing is left to hide them.
No part of a device reaches its published rate: `Efficiency` says how near each comes, fitted on published runs by
`python -m benchmarks.step_time_model`.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from axrepro.aot import network
from axrepro.aot.collectives import Collective, Span, spans
from axrepro.aot.compile import Compiled
from axrepro.aot.program import Program
from axrepro.aot.slices import Slice
from axrepro.aot.work import HOST, Executed
from axrepro.core.hlo import Shape
from axrepro.train.hardware import CHIPS

CORE = "core"
UNKNOWN_PCIE = 16.0  # GB/s between chip and host, assumed where nothing is published (v7x)
_KERNEL = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
"""Of a splash attention kernel: how many products go along the heads of queries and keys, and how many of values."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Which share of its published rate a part of the device reaches.

    Attributes:
      product: matrix products.   attention: those inside of attention kernels, whose softmax shares the time.
      memory: main memory.   link: links between chips.   host: between chip and host.
    """

    product: float
    attention: float
    memory: float
    link: float
    host: float
    overlap: float


@dataclass(frozen=True)
class Event:
    """Something that happens once in a pass of a loop's body, or of the program.

    Attributes:
      lane: "core", or what works beside it.   start, seconds: within the pass.   part: of the breakdown.
      name, op_name: of the instruction; of a loop, that of its body.   trips: of a loop, which is one event.
    """

    lane: str
    start: float
    seconds: float
    part: str
    name: str
    op_name: str
    trips: int = 1


@dataclass(frozen=True)
class Pass:
    """One run of a computation: how long it takes, what the time goes to, and what happens when."""

    seconds: float
    parts: Mapping[str, float]
    events: tuple[Event, ...] = field(repr=False)


@dataclass(frozen=True)
class StepTime:
    """A forecast of a step.

    Attributes:
      seconds: of the step.   parts: what they go to: "matrix products", "attention", "other compute", "waiting: ..."
        for what nothing hides, "slowed by: ..." for what hidden communication costs.
      passes: by computation; that of the whole program under `entry`.
    """

    seconds: float
    parts: Mapping[str, float]
    passes: Mapping[str, Pass] = field(repr=False)
    entry: str


def step_time(program: Program, compiled: Compiled, hardware: Slice, efficiency: Efficiency) -> StepTime:
    """The forecast for one step of a program that was compiled for a slice."""
    clock = _Clock(program, compiled, hardware, efficiency)
    entry = clock.run(clock.tree())
    return StepTime(entry.seconds, dict(entry.parts), clock.passes, program.module.entry)


@dataclass
class _Body:
    """A computation's instructions and loops, in their order."""

    name: str
    trips: int  # in all
    items: list


class _Clock:
    def __init__(self, program: Program, compiled: Compiled, hardware: Slice, efficiency: Efficiency):
        self._program, self._hardware, self._efficiency = program, hardware, efficiency
        self._chip = CHIPS[hardware.kind]
        self._places = compiled.places
        # devices share their chip's memory
        self._memory_rate = self._chip.hbm_gbs * 1e9 / self._chip.devices * efficiency.memory
        self._collectives: dict[int, list[Collective]] = defaultdict(list)
        for one in program.collectives(compiled.mesh):
            self._collectives[id(one.span.start)].append(one)
        self._spans: dict[int, Span] = {}
        for span in spans(program.module, program.instructions):
            self._spans[id(span.start)] = span
        self.passes: dict[str, Pass] = {}

    def tree(self) -> _Body:
        """The program by loops."""
        trips: dict[tuple[str, ...], int] = {
            (*loop.path, loop.body): loop.entered * (loop.trips or 1) for loop in self._program.loops
        }
        root = _Body(self._program.module.entry, 1, [])
        open_ = [root]
        for one in self._program.instructions:
            while [body.name for body in open_] != list(one.path[: len(open_)]):
                open_.pop()
            while len(open_) < len(one.path):
                path = one.path[: len(open_) + 1]
                body = _Body(path[-1], trips.get(path, open_[-1].trips), [])
                open_[-1].items.append(body)
                open_.append(body)
            open_[-1].items.append(one)
        return root

    def run(self, body: _Body) -> Pass:
        """Times one pass."""
        now, parts = 0.0, defaultdict(float)
        events: list[Event] = []
        free: dict[str, float] = {}
        ends: dict[int, tuple[float, str, float]] = {}  # of what runs beside the core, by the instruction that waits

        def wait(until: float, part: str, took: float = 0.0) -> None:
            nonlocal now
            waited = max(0.0, until - now)
            slowed = (1 - self._efficiency.overlap) * max(0.0, took - waited)
            parts[f"waiting: {part}"] += waited
            parts[f"slowed by: {part}"] += slowed
            for why, lasts in ((f"waiting: {part}", waited), (f"slowed by: {part}", slowed)):
                if lasts:
                    events.append(Event(CORE, now, lasts, why, "", ""))
                now += lasts

        for item in body.items:
            if isinstance(item, _Body):
                inner = self.run(item)
                trips = item.trips // body.trips
                events.append(Event(CORE, now, inner.seconds * trips, "loop", item.name, "", trips))
                for part, seconds in inner.parts.items():
                    parts[part] += seconds * trips
                now += inner.seconds * trips
                continue
            if id(item) in ends:
                wait(*ends.pop(id(item)))
            part, seconds = self._compute(item)
            for lanes, beside, took in self._beside(item):
                start = max([now, *(free.get(lane, 0.0) for lane in lanes)])
                for lane in lanes:
                    free[lane] = start + took
                events.append(Event(" + ".join(lanes), start, took, beside, item.name, item.instruction.op_name))
                span = self._spans.get(id(item))
                if span is not None and span.done is not None:
                    copied = lanes in (("memory",), ("host",)) or beside.startswith("collective-permute")
                    hidden = 0.0 if copied else took  # what only moves needs nothing of the core
                    ends[id(span.done)] = max(ends.get(id(span.done), (0.0, "", 0.0)), (start + took, beside, hidden))
                else:
                    wait(start + took, beside)
            if seconds:
                events.append(Event(CORE, now, seconds, part, item.name, item.instruction.op_name))
                parts[part] += seconds
                now += seconds
        for end in ends.values():
            wait(*end)
        self.passes[body.name] = Pass(now, dict(parts), tuple(events))
        return self.passes[body.name]

    def _compute(self, one: Executed) -> tuple[str, float]:
        """What the core does for an instruction."""
        if one.instruction.opcode.endswith(("-start", "send", "recv")) or (
            self._collectives.get(id(one)) and not one.flops
        ):
            return "", 0.0  # others do it
        chip, efficiency = self._chip, self._efficiency
        rate = chip.tflops * 1e12 / chip.devices
        memory = one.bytes / self._memory_rate
        if kernel := _attention_flops(self._program, one):
            return "attention", max(kernel / (rate * efficiency.attention), memory)
        if one.flops:
            inside = "dot_product_attention" in one.instruction.op_name
            share = efficiency.attention if inside else efficiency.product
            return "attention" if inside else "matrix products", max(one.flops / (rate * share), memory)
        return "other compute", memory

    def _beside(self, one: Executed) -> Iterator[tuple[tuple[str, ...], str, float]]:
        """What others than the core do for it: (lanes that are taken, part of the breakdown, seconds)."""
        for each in self._collectives.get(id(one), ()):
            way = network.shift if each.kind == "collective-permute" else network.route
            over = way(each.groups, self._places, self._hardware)
            took = network.seconds(each.kind, each.bytes, over, self._hardware) / self._efficiency.link
            yield network.resources(over), f"{each.kind} over {'+'.join(each.axes) or 'itself'}", took
        moved = one.reads.get(HOST, 0) + one.writes.get(HOST, 0)
        if moved:
            rate = (self._chip.pcie_gbs or UNKNOWN_PCIE) * 1e9 * self._efficiency.host
            yield ("host",), "host memory", moved / rate
        elif one.instruction.opcode.endswith("-start") and not self._collectives.get(id(one)):
            yield ("memory",), "copies", one.bytes / self._memory_rate


def _attention_flops(program: Program, one: Executed) -> float:
    """FLOPs of a splash attention kernel, 0 for anything else: those of the blocks that its mask leaves.

    The sizes of blocks stand in its notes. The first operand of three dimensions has an entry for each step of the
    grid; with a window the grid is as narrow as that. A kernel that computes its mask takes positions of queries, as a
    matrix of whole numbers; those of segments come in pairs. Where the mesh splits queries, this is a device's mean.
    """
    found = _KERNEL.search(one.instruction.op_name)
    if found is None or not one.opaque:
        return 0.0
    shapes = _operands(program, one)
    queries, keys, values = [shape for shape in shapes if len(shape.dims) >= 3 and shape.dtype not in ("s8", "s32")][:3]
    along_keys, along_values = _PRODUCTS[found[1]]
    length, kind = keys.dims[-2], "" if found[1] == "fwd" else f"_{found[1]}"
    flops = 2.0 * (queries.size // queries.dims[-1]) * length
    flops *= along_keys * keys.dims[-1] + along_values * values.dims[-1]
    grid = next((shape.dims for shape in shapes if shape.dtype == "s8" and len(shape.dims) == 3), None)
    notes = one.instruction.attributes.get("frontend_attributes", "")
    high, wide = (re.search(rf'"block_{side}{kind}\W+(\d+)', notes) for side in ("q", "kv"))
    masked = sum(shape.dtype == "s32" and len(shape.dims) == 2 for shape in shapes) % 2
    if grid is None or high is None or wide is None or not masked:
        return flops
    height, width = int(high[1]), int(wide[1])
    rows, columns = length // height, length // width
    if found[1] == "dkv":
        most = grid[-2] if grid[-2] < queries.dims[-2] // height else rows
        blocks = sum(min(most, rows - column * width // height) for column in range(columns))
    else:
        blocks = sum(min(grid[-1], -(-(row + 1) * height // width)) for row in range(rows))
    return flops * blocks / (rows * columns)


def _operands(program: Program, one: Executed) -> Sequence[Shape]:
    computation = program.module.computations[one.path[-1]]
    return [computation.by_name[name].shape for name in one.instruction.operands]
