"""What lies in a device's memory while a program runs, by the notes that the compiler leaves of its own plan.

A device holds the arguments, the results that are not written over arguments, constants, and one block in which the
compiler gave every temporary its place; what it compares with the device's capacity is their sum and the machine code.
`compiled.memory_analysis()` agrees on arguments and results, on temporaries of CPU programs, and of TPU programs its
`peak_memory_in_bytes` is `Memory.peak.bytes`. But it calls more than the block temporaries of TPU programs (65.5 GiB
where the block of a 29B model on v5p has 47.0): it adds what the compiler takes for fragmentation, which the compiler
does not do when it refuses a program (libtpu 0.0.42).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from axrepro.aot.work import plain, updated_in_place
from axrepro.core.hlo import Instruction, Module, Source
from axrepro.errors import UserError

Kind = Literal["argument", "output", "constant", "temporary"]

_DEVICE, _HOST = 0, 5  # numbers of memory spaces; the others are on the chip itself
_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(?:, (.*))?:")
_VALUE = re.compile(r" value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_POSITION = re.compile(r"^    (\d+):(\S+)$", re.MULTILINE)
_RANGE = re.compile(r"^    (\S+?)(\{[\d, ]*\}):(\d+)-(\d+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """An array in memory.

    Attributes:
      bytes: with padding.   shape: "bf16[32,4096]", "(...)" for a table of addresses.
      name: the instruction that writes it, of a loop's carry that in its body.
      op_name, source: where that is from; of copies and of what a loop stacks, where the copied or stacked is from.
    """

    bytes: int
    shape: str
    kind: Kind
    name: str
    op_name: str
    source: Source | None


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which most is in memory.

    Attributes:
      bytes: in all.   at: the instruction that runs.   buffers: all that is there, the largest first.
    """

    bytes: int
    at: str
    buffers: tuple[Buffer, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes in the main memory of one device.

    Attributes:
      outputs: those that are not written over arguments.   temporaries: the block that they share.
      host: in the host's memory, beside all others.
    """

    arguments: int
    outputs: int
    constants: int
    temporaries: int
    host: int
    peak: Peak

    @property
    def total(self) -> int:
        """What a device must hold, besides machine code."""
        return self.arguments + self.outputs + self.constants + self.temporaries

    @property
    def fragmentation(self) -> int:
        """Of the temporaries' block, what is unused even at the peak."""
        return self.total - self.peak.bytes


class _Value(NamedTuple):
    """A value within an allocation: `index` is its place in what instruction `name` yields, if that is a tuple."""

    name: str
    index: tuple[int, ...]
    offset: int
    bytes: int
    shape: str


@dataclass(frozen=True)
class _Allocation:
    bytes: int
    notes: str
    values: list[_Value]

    @property
    def space(self) -> int:
        found = re.search(r"color (\d+)", self.notes)
        return int(found[1]) if found else _DEVICE

    @property
    def parameter(self) -> int | None:
        found = re.match(r"(?:color \d+, )?parameter (\d+)", self.notes)
        return int(found[1]) if found else None

    @property
    def kind(self) -> Kind:
        if self.parameter is not None:
            return "argument"
        if "maybe-live-out" in self.notes:
            return "output"
        return "constant" if "constant" in self.notes else "temporary"


class _Live(NamedTuple):
    """A value that lies at an absolute place, from one position in the schedule to another, both included."""

    first: int
    last: int
    start: int
    value: _Value


def read_memory(buffers: str, live_ranges: str, module: Module) -> Memory:
    """Reads the compiler's notes on a program.

    Args:
      buffers, live_ranges: the fields of `axrepro.aot.compile.Compiled`.   module: its text, parsed.
    Raises:
      UserError: if there are no notes.
    """
    if not (buffers and live_ranges):
        raise UserError("the compiler left no notes on memory: they are written by those of TPUs and of CPUs")
    # what is local to a thread is scratch inside of fused instructions
    allocations = [one for one in _allocations(buffers) if "thread-local" not in one.notes]
    device = [one for one in allocations if one.space == _DEVICE]
    sizes = {kind: sum(one.bytes for one in device if one.kind == kind) for kind in get_args(Kind)}
    return Memory(
        arguments=sizes["argument"],
        outputs=sizes["output"],
        constants=sizes["constant"],
        temporaries=sizes["temporary"],
        host=sum(one.bytes for one in allocations if one.space == _HOST),
        peak=_peak(device, live_ranges, module),
    )


def _allocations(text: str) -> list[_Allocation]:
    found: list[_Allocation] = []
    for line in text.splitlines():
        if head := _ALLOCATION.fullmatch(line):
            found.append(_Allocation(int(head[1]), head[2] or "", []))
        elif value := _VALUE.fullmatch(line):
            found[-1].values.append(_Value(value[1], _index(value[2]), int(value[4]), int(value[3]), value[5]))
    return found


def _index(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text or "")))


def _peak(device: list[_Allocation], live_ranges: str, module: Module) -> Peak:
    makers = _Makers(module)
    ranges = {(name, _index(index)): (int(a), int(b)) for name, index, a, b in _RANGE.findall(live_ranges)}
    held, lives, base = [], [], 0
    for allocation in device:
        if allocation.kind == "temporary":
            lives += [
                _Live(*ranges[value.name, value.index], base + value.offset, value) for value in allocation.values
            ]
            base += allocation.bytes
        elif allocation.parameter is not None:
            made = module.computations[module.entry].parameters[allocation.parameter]
            shape = re.search(r"shape \|(.*?)\|", allocation.notes)
            held.append(makers.argument(allocation.bytes, shape[1] if shape else "", made))
        else:
            # the last of those that lie there; the constants of a comparison, or the like, have no range
            value = max(allocation.values, key=lambda value: ranges.get((value.name, value.index), (0, 0))[1])
            held.append(makers.buffer(allocation.bytes, allocation.kind, value))
    at, live = _fullest(lives)
    found = held + [makers.buffer(size, "temporary", one.value) for size, one in _distinct(live) if size]
    return Peak(
        bytes=sum(one.bytes for one in found),
        at=dict(_POSITION.findall(live_ranges)).get(str(at), ""),
        buffers=tuple(sorted(found, key=lambda one: -one.bytes)),
    )


def _fullest(lives: list[_Live]) -> tuple[int, list[_Live]]:
    """The position at which values take most room, and those values."""
    best, position, found = -1, 0, []
    active: list[_Live] = []
    by_start: dict[int, list[_Live]] = {}
    for one in lives:
        by_start.setdefault(one.first, []).append(one)
    for first, begun in sorted(by_start.items()):  # room grows only where a value begins
        active = [one for one in active if one.last >= first] + begun
        if sum(one.value.bytes for one in active) > best:
            size = sum(size for size, _ in _distinct(active))
            if size > best:
                best, position, found = size, first, active
    return position, found


def _distinct(live: Iterable[_Live]) -> list[tuple[int, _Live]]:
    """Each with those of its bytes that none before it has: values may share a place, or lie within each other's."""
    found, end = [], 0
    for one in sorted(live, key=lambda one: (one.start, -one.value.bytes, one.first)):
        stop = one.start + one.value.bytes
        found.append((max(0, stop - max(one.start, end)), one))
        end = max(end, stop)
    return found


class _Makers:
    """Who writes a value: what a loop carries is written in its body, not by the loop."""

    def __init__(self, module: Module):
        self.module = module

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {i.name: i for computation in self.module.computations.values() for i in computation.instructions}

    @cached_property
    def loops(self) -> Mapping[str, Instruction]:
        """Parameter of a body or condition -> its loop."""
        return {
            self.module.computations[name].parameters[0].name: loop
            for loop in self.by_name.values()
            if loop.opcode == "while"
            for key in ("body", "condition")
            for name in loop.names(key)
        }

    def argument(self, size: int, shape: str, made: Instruction) -> Buffer:
        return self._buffer(size, shape, "argument", made, made)

    def buffer(self, size: int, kind: Kind, value: _Value) -> Buffer:
        if value.name not in self.by_name:
            return self._buffer(size, value.shape, kind, None, None)
        made, index = self._maker(self.by_name[value.name], value.index)
        return self._buffer(size, value.shape, kind, made, self._origin(made, index))

    def _maker(self, instruction: Instruction, index: tuple[int, ...]) -> tuple[Instruction, tuple[int, ...]]:
        """The instruction that writes a part of what one yields, and which part of its own that is."""
        seen = set()
        while True:
            loop = self.loops.get(instruction.name, instruction)
            if loop.opcode == "while":
                entered = (loop.name, index) in seen  # the body hands it on as it is
                seen.add((loop.name, index))
                body = self.module.computations[loop.names("body")[0]]
                instruction = self.by_name[loop.operands[0]] if entered else body.root
            elif instruction.opcode == "get-tuple-element":
                index = (int(instruction.attributes["index"]), *index)
                instruction = self.by_name[instruction.operands[0]]
            elif instruction.opcode == "tuple" and index:
                instruction, index = self.by_name[instruction.operands[index[0]]], index[1:]
            elif instruction.opcode in ("bitcast", "opt-barrier", "add-dependency"):
                instruction = self.by_name[instruction.operands[0]]
            else:
                return instruction, index

    def _origin(self, made: Instruction, index: tuple[int, ...]) -> Instruction:
        """What an instruction only copies, or adds to a stack; else the instruction itself."""
        seen = set()
        while made.name not in seen:
            seen.add(made.name)
            source = self._stacked(made, index)
            if source is None and not made.op_name and len(made.operands) == 1:
                source = self.by_name[made.operands[0]]
            if source is not None:
                made, index = self._maker(source, ())
        return made

    def _stacked(self, made: Instruction, index: tuple[int, ...]) -> Instruction | None:
        """What a fusion writes into a part of an array that it is given."""
        if made.opcode != "fusion":
            return None
        callee = self.module.computations[made.names("calls")[0]]
        output = (
            callee.by_name[callee.root.operands[index[0]]] if callee.root.opcode == "tuple" and index else callee.root
        )
        if (update := updated_in_place(callee, output)) is None:
            return None
        piece = plain(callee, callee.by_name[update.operands[1]])
        return self.by_name[made.operands[int(piece.literal)]] if piece.opcode == "parameter" else piece

    def _buffer(
        self, size: int, shape: str, kind: Kind, made: Instruction | None, origin: Instruction | None
    ) -> Buffer:
        return Buffer(
            bytes=size,
            shape="(...)" if shape.startswith("(") else shape.partition("{")[0],
            kind=kind,
            name=made.name if made else "",
            op_name=origin.op_name if origin else "",
            source=self.module.source(origin) if origin else None,
        )
