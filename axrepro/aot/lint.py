"""Looks in a compiled train step for what makes it slow without being wrong, and names tensor, line, cost and remedy.

`axrepro.train.lint` looks at the settings, before anything is compiled. Here it is seen what the compiler made of them:
which state it was given whole, what it gathers and reduces, and what that is hidden behind. All figures are of one step
and one device.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from axrepro.aot.collectives import Collective, Transfer, axes_of, decode_groups
from axrepro.aot.program import Program
from axrepro.aot.work import Executed, called, within
from axrepro.core.hlo import Computation, Instruction, Module, Source
from axrepro.core.sharding import Rules
from axrepro.train.hardware import Chip

_ROOT = Path(__file__).parents[2]
_MEBIBYTE = 2**20
_LARGE = 16 * _MEBIBYTE  # what is worth a finding in a program of any size
_SHARE = 0.01  # of all state, or of all that is sent: what is worth a finding in a small one
_SPLITTING = ("fsdp", "expert", "model")  # mesh axes that may split a weight
_FORMS = frozenset(
    {"bitcast", "convert", "copy", "copy-start", "copy-done", "reshape", "transpose", "slice", "dynamic-slice"}
    | {"opt-barrier", "all-gather", "all-gather-start", "all-gather-done", "get-tuple-element"}
)
_SLICES = ("slice", "dynamic-slice")
_COMPUTES = frozenset(
    {"dot", "convolution", "reduce", "reduce-window", "scatter", "gather", "sort", "all-to-all", "all-reduce"}
)

KINDS = {
    "replicated": "a weight, or state of the optimizer, kept whole where a mesh axis could split it",
    "stack-gathered": "the weights of all layers gathered at once, before the layers' loop",
    "tokens-gathered": "activations gathered along `expert`, where an exchange would send a part of them",
    "exposed": "collectives that take longer than the arithmetic of the loop that they stand in",
    "host-blocks": "a transfer between host and device that nothing, or too little, runs beside",
    "reduced-whole": "a sum over devices of which each keeps a slice, sent whole",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault.

    Attributes:
      kind: see `KINDS`.   tensor: path of a parameter, or the scope that the compiler gives.   source: FILE:LINE.
      bytes: what it costs: bytes held for "replicated", sent or transferred for the others.   text: fault; remedy.
    """

    kind: str
    tensor: str
    source: str
    bytes: float
    text: str

    def __str__(self) -> str:
        return f"{self.tensor} ({self.source}): {self.text} [{self.kind}]"


def check(program: Program, mesh: Mapping[str, int], chip: Chip | None, rules: Rules = Rules()) -> list[Finding]:
    """All findings, the most costly of each kind first.

    Args:
      mesh: devices per mesh axis, in its order.   rules: by which the step was made.
      chip: None leaves out what depends on its figures.
    """
    step = _Step(program, mesh)
    found = [*_replicated(step), *_stack_gathered(step), *_tokens_gathered(step, rules), *_reduced_whole(step)]
    if chip is not None:
        found += [*_exposed(step, chip), *_host_blocks(step, chip)]
    return sorted(found, key=lambda finding: (list(KINDS).index(finding.kind), -finding.bytes))


@dataclass(frozen=True)
class _Step:
    """A program, and where its values come from."""

    program: Program
    mesh: Mapping[str, int]
    collectives: list[Collective] = field(init=False)
    callers: Mapping[str, tuple[str, str]] = field(init=False)
    """Body of a loop -> (the computation that it is run from, the loop's name)."""

    def __post_init__(self):
        object.__setattr__(self, "collectives", self.program.collectives(self.mesh))
        callers = {loop.body: (loop.path[-1], loop.name) for loop in self.program.loops}
        object.__setattr__(self, "callers", callers)

    @property
    def module(self) -> Module:
        return self.program.module

    @property
    def worthwhile(self) -> float:
        """Bytes from which a collective is worth a finding."""
        return min(_LARGE, _SHARE * sum(one.sent * one.trips for one in self.collectives))

    def origin(self, computation: str, name: str) -> Instruction | None:
        """The argument of the program that a value is a form of, such as a part; None if it is computed."""
        *_, (where, last) = self.forms(computation, name)
        return last if last.opcode == "parameter" and where == self.module.entry else None

    def forms(self, where: str, name: str, element: int | None = None) -> Iterator[tuple[str, Instruction]]:
        """A value, what it is a form of, and so on back to where it is computed: (computation, instruction)."""
        while True:
            computation = self.module.computations[where]
            one = computation.by_name[name]
            yield where, one
            match one.opcode:
                case "get-tuple-element":
                    name, element = one.operands[0], int(one.attributes["index"])
                case "parameter" if where in self.callers and element is not None:
                    if not _is_kept(computation, element):
                        return
                    where, name = self.callers[where]
                case "while" if element is not None:
                    if not _is_kept(self.module.computations[one.names("body")[0]], element):
                        return
                    name = one.operands[0]
                case "tuple" if element is not None:
                    name, element = one.operands[element], None
                case "fusion":
                    if (source := self._form(computation, one)) is None:
                        return
                    name = source
                case opcode if opcode in _FORMS:
                    name = one.operands[0]
                case _:
                    return

    def _form(self, computation: Computation, fusion: Instruction) -> str | None:
        """The operand that a fusion's result is a form of: the largest, if nothing is computed from it."""
        inner = [i for callee in called(self.module, fusion) for i, _ in within(self.module, callee)]
        arrays = [name for name in fusion.operands if computation.by_name[name].shape.size > 1]
        if not arrays or any(i.opcode in _COMPUTES for i in inner):
            return None
        return max(arrays, key=lambda name: computation.by_name[name].shape.bytes)

    def operand(self, one: Collective) -> Instruction | None:
        """The argument of the program that a collective sends; None if what it sends is computed."""
        return self.origin(one.span.start.path[-1], one.span.start.instruction.operands[0])


def _is_kept(body: Computation, element: int) -> bool:
    """Whether a loop's body hands this element of its argument on as it was."""
    if body.root.opcode != "tuple":
        return False
    source = body.by_name[body.root.operands[element]]
    while source.opcode in ("copy", "bitcast", "opt-barrier", "copy-start", "copy-done"):
        source = body.by_name[source.operands[0]]
    kept = source.opcode == "get-tuple-element" and body.by_name[source.operands[0]].opcode == "parameter"
    return kept and int(source.attributes["index"]) == element


def _replicated(step: _Step) -> Iterator[Finding]:
    """By the partitions of the program's arguments."""
    entry = step.module.computations[step.module.entry]
    state = [one for one in entry.parameters if _is_state(one)]
    worthwhile = max(_MEBIBYTE, _SHARE * sum(one.shape.bytes for one in state))
    wasted: dict[str, list[tuple[Instruction, str, float]]] = {}
    for one in sorted(state, key=lambda one: len(one.op_name)):
        able = [a for a in _copied_along(one, step) if a in _SPLITTING and _divides(step.mesh[a], one)]
        waste = max((one.shape.bytes * (1 - 1 / step.mesh[axis]) for axis in able), default=0.0)
        if waste > worthwhile:
            path = _path(one)
            home = next((known for known in wasted if path.endswith(f"/{known}")), path)  # moments follow their weight
            wasted.setdefault(home, []).append((one, max(able, key=step.mesh.__getitem__), waste))
    for path, copies in wasted.items():
        one, axis, _ = copies[0]
        waste = sum(waste for _, _, waste in copies)
        moments = f", and {len(copies) - 1} arrays of optimizer state like it," if len(copies) > 1 else ""
        text = (
            f"{_size(one.shape.bytes)} of shape {one.shape.dims}{moments} lie whole on each of the {step.mesh[axis]} "
            f"devices along {axis}; a rule that splits one of its logical axes over {axis} saves {_size(waste)}"
        )
        yield Finding(kind="replicated", tensor=path, source=_first_use(step, one), bytes=waste, text=text)


def _first_use(step: _Step, argument: Instruction) -> str:
    """The line of the first product that takes an argument, or of whatever takes it first."""
    uses = []
    for one in step.program.instructions:
        if any(step.origin(one.path[-1], name) is argument for name in one.instruction.operands) and one.source:
            uses.append(one)
    first = next((one for one in uses if one.flops), uses[0] if uses else None)
    return _line(step.module, first.instruction) if first else "unknown"


def _divides(size: int, array: Instruction) -> bool:
    return any(dim % size == 0 for dim in array.shape.dims)


def _is_state(argument: Instruction) -> bool:
    return bool(argument.op_name) and not argument.op_name.startswith("batch") and argument.shape.size > 1


def _copied_along(argument: Instruction, step: _Step) -> tuple[str, ...]:
    """Mesh axes along which devices hold the same part of an argument."""
    sharding = argument.attributes.get("sharding", "")
    if "replicated}" in sharding and "devices" not in sharding:
        return tuple(axis for axis, size in step.mesh.items() if size > 1)
    tiles = re.search(r"devices=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", sharding)
    if not tiles or "last_tile_dim_replicate" not in sharding:
        return ()
    copies = int(tiles[1].split(",")[-1])
    groups = decode_groups(f"[{step.module.num_devices // copies},{copies}]{tiles[2]}", step.module.num_devices)
    return axes_of(groups, tuple(step.mesh.items()))


def _stack_gathered(step: _Step) -> Iterator[Finding]:
    """All-gathers whose result enters a loop, with a dimension of as many parts as the loop has trips."""
    sent = defaultdict(list)
    for one in step.collectives:
        for name in (one.name, one.span.done.name if one.span.done else one.name):
            sent[one.span.start.path[-1], name].append(one)
    seen: set[str] = set()
    for loop in step.program.loops:
        computation = step.module.computations[loop.path[-1]]
        (init,) = computation.by_name[loop.name].operands
        for element in range(len(computation.by_name[loop.name].shape.parts)):
            for where, form in step.forms(loop.path[-1], init, element):
                for one in sent.get((where, form.name), ()):
                    gathered = one.kind == "all-gather" and one.bytes * one.trips > step.worthwhile
                    stack = step.operand(one)
                    of_layers = stack is not None and loop.trips == stack.shape.dims[0]
                    whole = any(loop.trips in leaf.dims for leaf in form.shape.leaves)
                    if gathered and of_layers and whole and (loop.trips or 0) > 1 and one.name not in seen:
                        seen.add(one.name)
                        text = (
                            f"{_size(one.bytes)} of all {loop.trips} layers are gathered over {_along(one)} before "
                            "their loop; constrain the weights inside of the loop's body, so that a layer is gathered "
                            "at a time"
                        )
                        yield _finding(step, "stack-gathered", one, text)


def _tokens_gathered(step: _Step, rules: Rules) -> Iterator[Finding]:
    """All-gathers along `expert` of what is computed, or of the batch."""
    for one in step.collectives:
        if one.kind != "all-gather" or one.axes != ("expert",) or one.sent * one.trips <= step.worthwhile:
            continue
        source = step.operand(one)
        if source is not None and _is_state(source):
            continue
        text = f"{_size(one.bytes)} of activations are gathered over {_along(one)}, {_times(one)}; "
        if dict(rules.table).get("expert_sent"):
            text += "the rules ask for it (`expert_sent`): without that entry an exchange sends a part of them"
        else:
            text += "let the experts' tokens change places by a constraint from `group` to `group_dispatched`"
        yield _finding(step, "tokens-gathered", one, text)


def _reduced_whole(step: _Step) -> Iterator[Finding]:
    """All-reduces of which nothing but slices is read; one finding for those of a loop and a line of source."""
    found: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for one in step.collectives:
        last = one.span.done or one.span.start
        computation = step.module.computations[last.path[-1]]
        if one.kind == "all-reduce" and _is_sliced(step.module, computation, last.instruction):
            found[computation.name, str(one.source)].append(one)
    for ones in found.values():
        sent, largest = sum(one.sent * one.trips for one in ones), max(ones, key=lambda one: one.sent)
        if sent > step.worthwhile:
            remedy = "constrain the value to the partition of what it is added to, where it is computed"
            if largest.size == step.module.num_devices:
                # seen in libtpu of jax 0.10.2: written as an all-reduce, whatever the shapes, and over fewer it is not
                remedy = f"TPUs do it only among a part of all devices: take {_some(largest)} out of the weights' rule"
            text = (
                f"{len(ones)} sum{'s'[: len(ones) - 1]} over {_along(largest)} of up to {_size(largest.bytes)}, "
                f"{_times(largest)}, send {_size(sent)} for each device to keep a slice; a reduce-scatter sends half; "
                f"{remedy}"
            )
            yield _finding(step, "reduced-whole", largest, text, sent)


def _is_sliced(module: Module, computation: Computation, value: Instruction) -> bool:
    """Whether nothing but slices of a value is ever read."""
    users = computation.users.get(value.name, ())
    if value.root or not users:
        return False
    for user in users:
        if user.opcode in _SLICES:
            if user.shape.bytes * 2 > value.shape.bytes:
                return False
        elif user.opcode == "fusion":
            (callee,) = called(module, user)
            given = [callee.parameters[at] for at, name in enumerate(user.operands) if name == value.name]
            if not all(_is_sliced(module, callee, parameter) for parameter in given):
                return False
        elif user.opcode in ("get-tuple-element", "bitcast", "copy", "convert", "reshape", "transpose"):
            if not _is_sliced(module, computation, user):
                return False
        else:
            return False
    return True


def _exposed(step: _Step, chip: Chip) -> Iterator[Finding]:
    """Loops whose collectives take longer than their products, were all links of a chip to carry them at once."""
    speed, peak = chip.ici_gbs * 1e9 / 2 / chip.devices, chip.tflops * 1e12 / chip.devices
    flagged: set[str] = set()
    for loop in step.program.loops:
        ones = [one for one in step.collectives if loop.body in one.span.start.path]  # loops within count as well
        sent = sum(one.sent * one.trips for one in ones)
        flops = sum(one.flops * one.trips for one in step.program.instructions if loop.body in one.path)
        if sent <= step.worthwhile or sent / speed <= flops / peak or flagged & set(loop.path):
            continue
        flagged.add(loop.body)
        largest = sorted(ones, key=lambda one: -one.sent * one.trips)[:3]
        blocking = sum(one.sent * one.trips for one in ones if not _overlaps(one))
        listed = (f"{one.kind} of {_size(one.bytes)} over {_along(one)}" for one in largest)
        text = (
            f"{_size(sent)} are sent, {sent / speed:.3g} s over all links, beside {flops / peak:.3g} s of products; "
            f"{blocking / sent:.0%} of it blocks; largest: {', '.join(listed)}; give a device more tokens, or spread "
            f"the weights over fewer devices along {largest[0].axes[0] if largest[0].axes else 'the mesh'}"
        )
        yield _finding(step, "exposed", largest[0], text, sent)


def _overlaps(one: Collective) -> bool:
    return one.span.asynchronous or one.span.start.flops > 0


def _host_blocks(step: _Step, chip: Chip) -> Iterator[Finding]:
    """Transfers that take longer than what runs in the meantime."""
    if chip.pcie_gbs is None:
        return
    peak, memory = chip.tflops * 1e12 / chip.devices, chip.hbm_gbs * 1e9 / chip.devices
    for transfer in step.program.transfers():
        size = max(transfer.to_host, transfer.from_host)
        needs = size / (chip.pcie_gbs * 1e9)
        hidden = max(transfer.span.hidden_flops / peak, transfer.span.hidden_bytes / memory)
        if size * transfer.trips < _MEBIBYTE or hidden >= needs:
            continue
        way = "to" if transfer.to_host >= transfer.from_host else "from"
        beside = f"beside {hidden:.3g} s of work" if transfer.span.asynchronous else "with nothing beside it"
        start, source = transfer.span.start, _line(step.module, transfer.span.start.instruction)
        given = step.origin(start.path[-1], start.instruction.operands[0])
        if source == "unknown" and given is not None:
            source = _first_use(step, given)
        text = (
            f"{_size(size)} go {way} the host in {needs:.3g} s {beside}, {_times(transfer)}; start it earlier, or move "
            "less"
        )
        tensor, cost = _tensor(step, start, transfer.name), float(size * transfer.trips)
        yield Finding(kind="host-blocks", tensor=tensor, source=source, bytes=cost, text=text)


def _finding(step: _Step, kind: str, one: Collective, text: str, cost: float | None = None) -> Finding:
    start = one.span.start
    users = step.module.computations[start.path[-1]].users.get(start.name, ())
    lines = (_line(step.module, instruction) for instruction in (start.instruction, *users))
    return Finding(
        kind=kind,
        tensor=_tensor(step, start, one.op_name),
        source=next((line for line in lines if line != "unknown"), relative(one.source)),
        bytes=one.sent * one.trips if cost is None else cost,
        text=text,
    )


def _tensor(step: _Step, start: Executed, fallback: str) -> str:
    """The parameter that is sent, or the scope in which it is computed."""
    operands = start.instruction.operands
    found = step.origin(start.path[-1], operands[0]) if operands else None
    return _path(found) if found is not None and found.op_name else _scope(start.instruction.op_name or fallback)


def _path(argument: Instruction) -> str:
    """ "state.params['a']['b']" is a/b."""
    text = argument.op_name.replace("\\", "")
    return re.sub(r"\['?([^'\]]*)'?\]", r"/\1", text).removeprefix("state.params/").removeprefix("params/")


def _scope(op_name: str) -> str:
    """The layers in an op_name, without what jax adds."""
    text = re.sub(r"transpose\((.*?)\)(?=/|$)|jvp\((.*?)\)", lambda m: m[1] or m[2] or "", op_name)
    text = re.sub(r"jvp\((.*?)\)", r"\1", text)
    added = r"jit\(.*|while|body|closed_call|checkpoint|rematted_computation|vmap\(\)|"
    parts = [part for part in text.split("/") if not re.fullmatch(added, part)]
    parts = [part for at, part in enumerate(parts) if part not in parts[at - 1 : at]]
    return "/".join(parts[:-1] or parts) or "unnamed"


def _line(module: Module, instruction: Instruction) -> str:
    """The innermost line outside of installed packages."""
    frames = module.frames(instruction)
    own = (frame for frame in frames if "site-packages" not in frame.file)
    return relative(next(own, None))


def relative(source: Source | None) -> str:
    """FILE:LINE, from the root of the repository or the working directory where it lies in one of them."""
    if source is None:
        return "unknown"
    path = Path(source.file)
    inside = next((base for base in (_ROOT, Path.cwd()) if path.is_relative_to(base)), None)
    return f"{path.relative_to(inside) if inside else path}:{source.line}"


def _along(one: Collective) -> str:
    return " × ".join(one.axes) + f" ({one.size} devices)"


def _some(one: Collective) -> str:
    return one.axes[-1] if len(one.axes) > 1 else f"a part of {one.axes[0]}, as data,"


def _times(one: Collective | Transfer) -> str:
    return f"{one.trips} times a step" if one.trips > 1 else "once a step"


def _size(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.1f} MB"
