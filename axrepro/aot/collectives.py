"""The collectives of a program: what is sent, among whom, along which axes of the mesh, and what hides it."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from axrepro.aot.work import HOST, Executed, called, collective_kind, custom_call, within
from axrepro.core.hlo import Computation, Instruction, Module, Source
from axrepro.errors import UserError

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Span:
    """Work that one instruction starts and a later one waits for; without a later one, it blocks.

    Attributes:
      start: the instruction that starts it, or is all of it.   done: the one that waits.
      between: what runs in the meantime and costs anything.
    """

    start: Executed
    done: Executed | None
    between: tuple[Executed, ...] = field(repr=False)

    @property
    def asynchronous(self) -> bool:
        """Whether other work may hide it."""
        return self.done is not None

    @property
    def hidden_flops(self) -> float:
        """FLOPs that run in the meantime, each time."""
        return sum(other.flops * other.trips for other in self.between) / self.start.trips

    @property
    def hidden_bytes(self) -> float:
        """Bytes to and from main memory that move in the meantime, each time."""
        return sum(other.bytes * other.trips for other in self.between) / self.start.trips


@dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: "all-gather", ...   name: of the instruction that starts it.   op_name, source: where it comes from.
      bytes: of the whole array of one device: what a gather yields, what a reduction or an exchange takes. An exchange
        of ragged parts takes at most this; how much is in the data.
      groups: devices that take part together, by their number in the order of the mesh. Of a permutation, its
        (source, target) pairs.
      axes: mesh axes along which a group's devices differ.   trips: how often it runs.
      span: what it overlaps with. A start with FLOPs of its own is a fusion that computes products as well, with which
        it overlaps in ways that the program does not show.
    """

    kind: str
    name: str
    op_name: str
    source: Source | None
    bytes: int
    groups: Groups = field(repr=False)
    axes: tuple[str, ...]
    trips: int
    span: Span = field(repr=False)

    @property
    def size(self) -> int:
        """Devices of a group."""
        return max(map(len, self.groups))

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, at the least: of n equal parts, n - 1 leave, twice in an all-reduce."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        return self.bytes * (self.size - 1) / self.size * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Transfer:
    """A move between the host's memory and the device's: bytes each way, how often, and what it overlaps with."""

    name: str
    to_host: int
    from_host: int
    trips: int
    span: Span = field(repr=False)


def collectives(module: Module, executed: Sequence[Executed], mesh_axes: Mapping[str, int]) -> list[Collective]:
    """The collectives among `executed`, in its order; the steps of one that runs beside other work count once.

    Args:
      mesh_axes: sizes, in the order of the mesh whose devices the program was compiled for. A program for several
        slices is that of one, which exchanges with the others along `data`.
    Raises:
      UserError: if the mesh has another number of devices than the program.
    """
    slices, rest = divmod(math.prod(mesh_axes.values()), module.num_devices)
    if rest or (slices > 1 and mesh_axes.get("data", 1) % slices):
        given = " x ".join(f"{name} {size}" for name, size in mesh_axes.items())
        raise UserError(f"mesh {given}: the program was compiled for {module.num_devices} devices; take its own mesh")
    within = {**mesh_axes, "data": mesh_axes["data"] // slices} if slices > 1 else mesh_axes
    found = []
    for span in spans(module, executed):
        if transfer := _between_slices(span.start.instruction):
            found.append(
                Collective(
                    kind=transfer,
                    name=span.start.name,
                    op_name=span.start.instruction.op_name,
                    source=span.start.source,
                    bytes=span.start.instruction.shape.parts[0].bytes,
                    groups=(tuple(range(0, slices * module.num_devices, module.num_devices)),),
                    axes=("data",),
                    trips=span.start.trips,
                    span=span,
                )
            )
        for inner, home in _operations(module, span.start):
            groups = _groups(inner, module.num_devices)
            kind = collective_kind(inner.opcode)
            if kind == "all-reduce" and "all-reduce-scatter" in home.name:
                kind = "reduce-scatter"  # as TPUs write it: reduced whole on paper, of which each keeps its part
            result = Collective(
                kind=kind,
                name=span.start.name,
                op_name=span.start.instruction.op_name or inner.op_name,
                source=span.start.source or module.source(inner),
                bytes=_payload(inner, home),
                groups=groups,
                axes=axes_of(groups, tuple(within.items())),
                trips=span.start.trips,
                span=span,
            )
            found.append(result)
    return found


def transfers(module: Module, executed: Sequence[Executed]) -> list[Transfer]:
    """The moves to and from the host among `executed`."""
    found = []
    for span in spans(module, executed):
        to_host, from_host = span.start.writes.get(HOST, 0), span.start.reads.get(HOST, 0)
        if to_host or from_host:
            found.append(Transfer(span.start.name, to_host, from_host, span.start.trips, span))
    return found


def spans(module: Module, executed: Sequence[Executed]) -> Iterator[Span]:
    """Every instruction that starts work, with what waits for it; what does both at once is a span of its own."""
    stages = [_stage(module, one.instruction) for one in executed]
    open_: dict[str, int] = {}  # name of a start, or of what hands it on -> index in `executed`
    done: dict[int, int] = {}
    for index, (one, stage) in enumerate(zip(executed, stages, strict=True)):
        if stage == "start":
            open_[one.name] = index
        elif stage:
            origins = _origins(module.computations[one.path[-1]], one.instruction)
            start = next((open_[name] for name in origins if name in open_), None)
            if start is not None and stage == "done":
                done[start] = index
            elif start is not None:
                open_[one.name] = start
    for index, (one, stage) in enumerate(zip(executed, stages, strict=True)):
        if stage == "start" and index in done:
            meantime = range(index + 1, done[index])
            costly = (at for at in meantime if executed[at].flops or executed[at].bytes)
            between = tuple(executed[at] for at in costly if stages[at] in ("", "step"))
            yield Span(one, executed[done[index]], between)
        elif stage in ("start", ""):
            yield Span(one, None, ())


def _stage(module: Module, instruction: Instruction) -> str:
    """ "start", "step" or "done" of work that others overlap with, "" for what is complete in itself."""
    endings = {"-start": "start", "-update": "step", "-done": "done"}
    if instruction.opcode in ("send", "recv"):
        return "start"
    if instruction.opcode != "fusion":
        return next((stage for ending, stage in endings.items() if instruction.opcode.endswith(ending)), "")
    found = ""
    for callee in called(module, instruction):
        for inner, _ in within(module, callee):
            if (target := custom_call(inner)) in ("AsyncCollectiveStart", "AsyncCollectiveDone"):
                return target.removeprefix("AsyncCollective").lower()
            if "async_collective_fusion_config" in inner.config:
                found = "step"
    return found


def _between_slices(instruction: Instruction) -> str:
    """The kind of an exchange with other slices, "" for all else; what is received stands for both directions."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes.get("frontend_attributes", ""))
    return found[1].lower().replace("_", "-") if found and instruction.opcode == "recv" else ""


def _origins(computation: Computation, instruction: Instruction) -> Iterator[str]:
    """The instructions that the operands come from, through tuples."""
    for name in instruction.operands:
        source = computation.by_name[name]
        while source.opcode in ("get-tuple-element", "bitcast"):
            source = computation.by_name[source.operands[0]]
        yield source.name


def _operations(module: Module, one: Executed) -> Iterator[tuple[Instruction, Computation]]:
    """The collectives that an instruction is or holds, each with the computation that it stands in."""
    if collective_kind(one.instruction.opcode):
        yield one.instruction, module.computations[one.path[-1]]
    for callee in called(module, one.instruction):
        yield from (found for found in within(module, callee) if collective_kind(found[0].opcode))


def _payload(instruction: Instruction, home: Computation) -> int:
    """Bytes of the whole array."""
    taken = [home.by_name[name].shape.bytes for name in instruction.operands]
    if instruction.opcode == "ragged-all-to-all":
        return taken[0]  # the others are where to put what
    shape = instruction.shape
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        shape = shape.parts[1]
    return max(sum(taken), shape.bytes)


def _groups(instruction: Instruction, num_devices: int) -> Groups:
    pairs = instruction.attributes.get("source_target_pairs")
    if pairs is not None:
        return _listed(pairs)
    text = ", ".join(
        instruction.attributes[key] for key in ("replica_groups", "device_ids") if key in instruction.attributes
    )
    return decode_groups(text, num_devices)


@lru_cache(maxsize=1 << 12)
def decode_groups(text: str, num_devices: int) -> Groups:
    """The groups of devices, in any of the ways in which XLA writes them.

    "{{0,1},{2,3}}" lists them, and "{}" is one of all. "[4,2]<=[2,4]T(1,0)" numbers the devices in an array of 2 x 4,
    transposes it, and cuts it into 4 groups of 2. "mesh['a'=4,'b'=2] {'a'}" numbers them in an array of 4 x 2; a group
    goes along 'a'. A part of an axis is "'a':(2)2": of its size, 2 before that part, and 2 in it.

    Raises:
      UserError: if it is written in another way.
    """
    if text.replace(" ", "") in ("", "{}", "{{}}"):
        return (tuple(range(num_devices)),)
    if text.startswith("{"):
        return _listed(text)
    if text.startswith("["):
        return tuple(map(tuple, _numbered(text).tolist()))
    if text.startswith(("mesh[", "@mesh[")):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
        order = re.search(r"device_ids=\(?(\[[^)]*?\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
        numbers = _numbered(order[1]) if order else np.arange(math.prod(axes.values()))
        names, array = list(axes), numbers.reshape(tuple(axes.values()))
        sizes: list[int] = []
        along: list[int] = []
        chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :])
        for name in names:
            parts = sorted((int(before or 1), int(size or axes[name])) for n, before, size in chosen if n == name)
            covered = 1
            for before, size in parts:
                sizes += [before // covered, size]
                along.append(len(sizes) - 1)
                covered = before * size
            sizes.append(axes[name] // covered)
        array = array.reshape(sizes)
        rest = [axis for axis in range(len(sizes)) if axis not in along]
        width = math.prod(sizes[axis] for axis in along)
        return tuple(map(tuple, array.transpose(*rest, *along).reshape(-1, width).tolist()))
    raise UserError(f"unknown form of a collective's groups: {text[:80]!r}")


def _listed(text: str) -> Groups:
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text.replace(" ", "")))


def _numbered(text: str) -> np.ndarray:
    """ "[4,2]<=[2,4]T(1,0)" as an array."""
    shape, _, source = text.partition("<=")
    numbers = lambda part: [int(number) for number in re.findall(r"\d+", part)]
    dims, _, order = source.partition("T")
    array = np.arange(math.prod(numbers(dims))).reshape(numbers(dims))
    return (array.transpose(numbers(order)) if order else array).reshape(numbers(shape))


@lru_cache(maxsize=1 << 12)
def axes_of(groups: Groups, mesh_axes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """The axes along which devices of a group differ."""
    shape = tuple(size for _, size in mesh_axes)
    spanned = np.zeros(len(shape), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), shape))
        spanned |= (places != places[:, :1]).any(axis=1)
    return tuple(name for (name, _), along in zip(mesh_axes, spanned, strict=True) if along)
