"""What one instruction costs: FLOPs, and bytes to and from each memory.

FLOPs are those of matrix products and convolutions, 2 per multiply-add, inside fusions too, and what kernels state of
themselves. Elementwise work is not counted: as in `axrepro.core.flops`, it hardly takes time beside its bytes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from axrepro.core.hlo import Computation, Instruction, Module, Shape, Source

DEVICE, HOST = 0, 5
"""Memory spaces: the device's main memory and the host's. On TPUs 1 is VMEM, 2 and 4 hold flags, 6 scalars."""

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier"}
    | {"partition-id", "replica-id"}
)
_ALIASES = frozenset({"bitcast", "reshape", "copy", "convert"})  # what may stand between a slice and the whole
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_COSTLESS = (
    "AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
)  # fmt: skip
RECOMPUTED = "rematted_computation"


@dataclass(frozen=True)
class Executed:
    """An instruction that runs, with what it costs each time.

    Attributes:
      trips: how often it runs in all.   certain: whether all loops around it have a known number of trips; those that
        do not count as one trip.
      path: the computations around it, the program's entry first.
      flops: of products.   recomputed: the part of them that rematerialisation does again.
      reads, writes: bytes per memory space, padded as they are stored.
      cycles: as the compiler estimates, where it says.   opaque: a kernel that does not state its FLOPs (0 here).
    """

    instruction: Instruction
    trips: int
    certain: bool
    path: tuple[str, ...]
    flops: int
    recomputed: int
    reads: Mapping[int, int]
    writes: Mapping[int, int]
    cycles: int | None
    opaque: bool
    source: Source | None

    @property
    def name(self) -> str:
        """Of the instruction."""
        return self.instruction.name

    @property
    def bytes(self) -> int:
        """To and from the device's main memory."""
        return self.reads.get(DEVICE, 0) + self.writes.get(DEVICE, 0)


def collective_kind(opcode: str) -> str:
    """What a collective does, whether it is one instruction or the start or the end of one; "" for the rest."""
    base = opcode.removesuffix("-start").removesuffix("-done")
    return base if base in COLLECTIVES else ""


def custom_call(instruction: Instruction) -> str:
    """What a custom call calls, "" for all else."""
    return instruction.attributes.get("custom_call_target", "").strip('"')


def called(module: Module, instruction: Instruction) -> tuple[Computation, ...]:
    """The computations that a fusion, or the start of an asynchronous one, runs as a part of itself."""
    if instruction.opcode not in ("fusion", "async-start", "custom-call"):
        return ()
    names = (*instruction.names("calls"), *instruction.names("called_computations"))
    return tuple(module.computations[name] for name in names)


def within(module: Module, computation: Computation) -> tuple[tuple[Instruction, Computation], ...]:
    """All instructions of a computation and of the fusions in it, each with the computation it stands in."""
    found = []
    for instruction in computation.instructions:
        found.append((instruction, computation))
        for callee in called(module, instruction):
            found += within(module, callee)
    return tuple(found)


class Costs:
    """Costs of the instructions of one module; what is asked for twice is computed once."""

    def __init__(self, module: Module):
        self._module = module
        self._products: dict[str, tuple[tuple[int, str], ...]] = {}

    def executed(
        self, computation: Computation, instruction: Instruction, trips: int, certain: bool, path: tuple[str, ...]
    ) -> Executed:
        """An instruction with its costs."""
        products = self.products(computation, instruction)
        reads, writes = self._traffic(computation, instruction)
        cycles = instruction.config.get("window_config", {}).get("estimated_cycles")
        inner = [i for callee in called(self._module, instruction) for i, _ in within(self._module, callee)]
        return Executed(
            instruction=instruction,
            trips=trips,
            certain=certain,
            path=path,
            flops=sum(flops for flops, _ in products),
            recomputed=sum(flops for flops, name in products if RECOMPUTED in (name or instruction.op_name)),
            reads=reads,
            writes=writes,
            cycles=int(cycles) if cycles else None,
            opaque=any(_is_opaque(i) for i in (instruction, *inner)),
            source=self._module.source(instruction),
        )

    def products(self, computation: Computation, instruction: Instruction) -> tuple[tuple[int, str], ...]:
        """(FLOPs, op_name) of each product in it."""
        shapes = [computation.by_name[name].shape for name in instruction.operands]
        match instruction.opcode:
            case "dot":
                contracted = [shapes[0].dims[dim] for dim in instruction.numbers("lhs_contracting_dims")]
                flops = 2 * instruction.shape.size * math.prod(contracted)
            case "convolution":
                flops = _convolution(instruction, *shapes)
            case "custom-call":
                flops = int(instruction.config.get("custom_call_config", {}).get("cost_estimate", {}).get("flops", 0))
            case _:
                callees = called(self._module, instruction)
                return tuple(product for callee in callees for product in self._inside(callee))
        return ((flops, instruction.op_name),) if flops else ()

    def _inside(self, computation: Computation) -> tuple[tuple[int, str], ...]:
        if computation.name not in self._products:
            found = (self.products(computation, instruction) for instruction in computation.instructions)
            self._products[computation.name] = tuple(product for products in found for product in products)
        return self._products[computation.name]

    def _traffic(
        self, computation: Computation, instruction: Instruction
    ) -> tuple[Mapping[int, int], Mapping[int, int]]:
        """Bytes read and written by memory space."""
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        waits = instruction.opcode.endswith(("-done", "-update"))
        if instruction.opcode in FREE or waits or custom_call(instruction) == "AllocateBuffer":
            return reads, writes
        for place, operand in enumerate(instruction.operands):
            shape = computation.by_name[operand].shape
            touched = self._read(computation, instruction, place)
            for leaf in shape.leaves:
                amount = leaf.stored if touched is None else min(touched, leaf.stored)
                reads[leaf.space] = reads.get(leaf.space, 0) + amount
        for leaf, amount in self._written(computation, instruction):
            writes[leaf.space] = writes.get(leaf.space, 0) + amount
        clean = lambda amounts: {space: amount for space, amount in amounts.items() if amount}
        return clean(reads), clean(writes)

    def _read(self, computation: Computation, instruction: Instruction, place: int) -> int | None:
        """Bytes of the operand at `place` that are read; None for all of them."""
        base = instruction.opcode.removesuffix("-start")
        if base in _SLICES and place == 0:
            return _result(instruction).stored
        if base == "dynamic-update-slice" and place == 0:
            return 0  # updated where it stands
        if instruction.opcode in ("fusion", "async-start"):
            (callee,) = called(self._module, instruction)
            return self._read_inside(callee, callee.parameters[place])
        if _is_step(instruction) or custom_call(instruction) == "AsyncCollectiveDone":
            return 0  # the start has counted it
        return None

    def _read_inside(self, computation: Computation, given: Instruction) -> int | None:
        """Bytes of a fusion's parameter, or of another form of it, that are read; None for all of them."""
        amounts: list[int | None] = []
        if given.root:
            return None
        for user in computation.users.get(given.name, ()):
            if user.opcode in _ALIASES or is_view(user):
                later = self._read_inside(computation, user)
                amounts.append(None if later is None else later * given.shape.bits // user.shape.bits)
            elif user.opcode == "dynamic-update-slice" and not _is_in_place(computation, user):
                return None
            elif user.opcode != "tuple":
                places = (place for place, operand in enumerate(user.operands) if operand == given.name)
                amounts += [self._read(computation, user, place) for place in places]
            elif given.opcode != "parameter":  # which would only be handed on
                return None
        known = [amount for amount in amounts if amount is not None]
        return sum(known) if len(known) == len(amounts) else None

    def _written(self, computation: Computation, instruction: Instruction) -> list[tuple[Shape, int]]:
        """The arrays of the result, and how many bytes of each are written."""
        base = instruction.opcode.removesuffix("-start")
        if base == "dynamic-update-slice":
            return [(_result(instruction), computation.by_name[instruction.operands[1]].shape.stored)]
        if instruction.opcode == "async-start":
            (callee,) = called(self._module, instruction)
            return self._written(callee, callee.root)
        if instruction.opcode != "fusion":
            return [(leaf, leaf.stored) for leaf in _result(instruction).leaves]
        (callee,) = called(self._module, instruction)
        root = callee.root
        outputs = [callee.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
        inherited = aliased(instruction)
        if len(outputs) != len(instruction.shape.leaves):  # the root is itself of several results
            leaves = enumerate(instruction.shape.leaves)
            return [(leaf, 0 if place in inherited else leaf.stored) for place, leaf in leaves]
        found = []
        for place, (leaf, output) in enumerate(zip(instruction.shape.leaves, outputs, strict=True)):
            update = updated_in_place(callee, output)
            if update is not None:
                found.append((leaf, callee.by_name[update.operands[1]].shape.stored))
            elif (
                output.opcode == "parameter"
                or _is_step(output)
                or (place in inherited and custom_call(output) == "AsyncCollectiveDone")
            ):
                found.append((leaf, 0))
            elif output.opcode == "fusion":
                found.append((leaf, sum(amount for _, amount in self._written(callee, output))))
            else:
                found.append((leaf, leaf.stored))
        return found


def updated_in_place(computation: Computation, output: Instruction) -> Instruction | None:
    """The update of a slice of a fusion's argument, where it stands, that an output of the fusion is; None if none."""
    update = plain(computation, output)
    if update.opcode != "dynamic-update-slice":
        return None
    base = plain(computation, computation.by_name[update.operands[0]])
    return update if base.opcode == "parameter" else None


def _is_in_place(computation: Computation, update: Instruction) -> bool:
    root = computation.root
    outputs = [computation.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return any(updated_in_place(computation, output) is update for output in outputs)


def plain(computation: Computation, instruction: Instruction) -> Instruction:
    """What an instruction is another view of."""
    while is_view(instruction):
        instruction = computation.by_name[instruction.operands[0]]
    return instruction


def is_view(instruction: Instruction) -> bool:
    """Whether it is another form of its operand where that lies: a bitcast, or (v7x) a fusion said to be in place."""
    whole = instruction.attributes.get("output_to_operand_aliasing", "").replace(" ", "") == "{{}:(0,{})}"
    return instruction.opcode == "bitcast" or (
        instruction.opcode == "fusion" and whole and len(instruction.operands) == 1
    )


def aliased(instruction: Instruction) -> Mapping[int, int]:
    """Array of the result -> the operand whose place it takes, as far as the compiler says."""
    found = {}
    outputs = re.findall(r"\{([\d,]*)\}: \((\d+),", instruction.attributes.get("output_to_operand_aliasing", ""))
    for output, operand in outputs:
        found[int(output or 0)] = int(operand)
    operands = len(instruction.operands)
    for group in instruction.config.get("aliasing_operands", {}).get("lists", ()):
        # TPU: numbers from that of the operands on are results
        places = sorted(int(index) for index in group["indices"])
        found |= {place - operands: places[0] for place in places if place >= operands > places[0]}
    return found


def _result(instruction: Instruction) -> Shape:
    """What an instruction yields; of a start, without the operands and flags that it hands on."""
    if not instruction.opcode.endswith("-start") or instruction.shape.dtype != "tuple":
        return instruction.shape
    if instruction.opcode == "all-reduce-start":
        return instruction.shape
    return instruction.shape.parts[0 if instruction.opcode == "copy-start" else 1]


def _is_step(instruction: Instruction) -> bool:
    """Whether it is a part, other than the start, of a collective that runs beside other work (TPU)."""
    stage = instruction.config.get("async_collective_fusion_config", {}).get("flag_start", "-1")
    return collective_kind(instruction.opcode) != "" and stage != "-1"


def _is_opaque(instruction: Instruction) -> bool:
    stated = "cost_estimate" in instruction.config.get("custom_call_config", {})
    return instruction.opcode == "custom-call" and custom_call(instruction) not in _COSTLESS and not stated


def _convolution(instruction: Instruction, lhs: Shape, rhs: Shape) -> int:
    """FLOPs: 2 x output batch x output features x input features of a group x pairs of a place and a tap that meet.

    Products with batch dimensions become dilated convolutions on TPUs, of which most taps meet holes or padding.
    """
    left, _, labels = instruction.attributes["dim_labels"].partition("_")
    kernel, _, out = labels.partition("->")
    size = lambda shape, names, name: shape.dims[names.index(name)]
    pairs = 1
    for name in filter(str.isdigit, left):
        window = {key: _window(instruction, key, int(name)) for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")}
        pairs *= _meetings(size(lhs, left, name), size(rhs, kernel, name), size(instruction.shape, out, name), **window)
    features = size(instruction.shape, out, "f") * size(rhs, kernel, "i")
    return 2 * size(instruction.shape, out, "b") * features * pairs


def _window(instruction: Instruction, key: str, place: int) -> int:
    """An entry of the window; of the padding, what stands before."""
    found = re.search(rf"\b{key}=([^\s}}]+)", instruction.attributes.get("window", ""))
    if found is None:
        return 0 if key == "pad" else 1
    return int(found[1].split("x")[place].split("_")[0])


def _meetings(input_size: int, taps: int, output: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """How many pairs of an output place and a tap fall on an element of the input."""
    count = 0
    common = math.gcd(stride, lhs_dilate)
    period = lhs_dilate // common  # places between two hits of a tap
    inverse = pow(stride // common, -1, period)
    for tap in range(taps):
        start = tap * rhs_dilate - pad  # of the first place, counted in elements and holes; others follow by the stride
        first, last = max(0, -(start // stride)), min(output - 1, ((input_size - 1) * lhs_dilate - start) // stride)
        if start % common == 0:  # start + place * stride = 0 modulo lhs_dilate
            hit = first + (-(start // common) * inverse - first) % period
            count += max(0, (last - hit) // period + 1)
    return count
