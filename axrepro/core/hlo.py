"""The text of a compiled program (XLA's HLO, as `compiled.as_text()` prints it), parsed.

Nothing here knows what an instruction does or costs: names, shapes with their layouts, operands and attributes, and the
tables that lead from an instruction to its line of source. Attributes stay text until they are asked for, since most
never are.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from axrepro.errors import UserError

_OPEN = re.compile(r'[\[({",\n]')  # what the scan at the top level of an instruction stops at
_NESTED = re.compile(r'"(?:[^"\\]|\\.)*"|[\[({]|[\])}]')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_START = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"(\w+)(?:\[([^\]]*)\])?(?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_ROW = re.compile(r"(\d+) (?:\"(.*)\"|\{(.*)\})")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclass(frozen=True)
class Shape:
    """An array, or a tuple of shapes.

    Attributes:
      dtype: as XLA calls it ("bf16"), "tuple" for a tuple.
      dims: sizes, the outermost first.   minor_to_major: dimensions in the order of memory, the fastest first.
      tile: the first tile of the layout, over the minor dimensions (TPU); smaller arrays are padded to it. Further
        tiles rearrange what is within the first, and pad nothing that it did not.
      space: memory space; 0 is the device's main memory.   bits: of an element.   parts: of a tuple.
    """

    dtype: str
    dims: tuple[int, ...] = ()
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0
    bits: int = 0
    parts: tuple["Shape", ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @cached_property
    def leaves(self) -> tuple["Shape", ...]:
        """The arrays in it."""
        return tuple(leaf for part in self.parts for leaf in part.leaves) if self.dtype == "tuple" else (self,)

    @cached_property
    def bytes(self) -> int:
        """Of the elements, without padding."""
        return sum(-(-leaf.size * leaf.bits // 8) for leaf in self.leaves)

    @cached_property
    def stored(self) -> int:
        """Bytes in memory, padded to whole tiles."""
        return sum(leaf._stored() for leaf in self.leaves)

    def _stored(self) -> int:
        # a tile of more dimensions than the array has ones in front
        minor = [self.dims[dim] for dim in self.minor_to_major] + [1] * (len(self.tile) - len(self.dims))
        for place, side in enumerate(reversed(self.tile)):
            minor[place] = -(-minor[place] // side) * side
        return -(-math.prod(minor) * self.bits // 8)


@dataclass(frozen=True)
class Source:
    """A line of source."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      operands: names of the instructions it takes.   literal: what stands in its parentheses.
      attributes: name -> text, as printed.   root: whether it is its computation's result.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    literal: str
    attributes: Mapping[str, str] = field(repr=False)
    root: bool = False

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The backend's own notes."""
        try:
            found = json.loads(self.attributes.get("backend_config", "{}"))
        except json.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """Where it comes from: op_name, stack_frame_id or source_file and source_line."""
        found = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s}]+)', self.attributes.get("metadata", ""))
        return {key: value.strip('"') for key, value in found}

    @property
    def op_name(self) -> str:
        """Scopes and primitive that it comes from, "" if the compiler made it."""
        return self.metadata.get("op_name", "")

    def names(self, attribute: str) -> tuple[str, ...]:
        """The computations that an attribute names."""
        return tuple(_OPERAND.findall(self.attributes.get(attribute, "")))

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The whole numbers in an attribute: "{0,2}" is (0, 2)."""
        return tuple(map(int, re.findall(r"-?\d+", self.attributes.get(attribute, ""))))


@dataclass(frozen=True)
class Computation:
    """A function of the program; its instructions stand in the order in which they run, if the program is scheduled."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Name -> instruction."""
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    @cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """In the order of the arguments."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.literal)))

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Name -> the instructions that take it."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return {name: tuple(users) for name, users in found.items()}


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      header: attributes of the first line.   entry: name of the computation that runs first.
      tables: FileNames and the like: number -> row.
    """

    header: Mapping[str, str] = field(repr=False)
    computations: Mapping[str, Computation] = field(repr=False)
    entry: str
    tables: Mapping[str, Mapping[int, Any]] = field(repr=False)

    @property
    def num_devices(self) -> int:
        """Devices that run it together."""
        return int(self.header.get("num_partitions", 1)) * int(self.header.get("replica_count", 1))

    def source(self, instruction: Instruction) -> Source | None:
        """The line that it comes from, the innermost; None if the compiler made it."""
        return next(self.frames(instruction), None)

    def frames(self, instruction: Instruction) -> Iterator[Source]:
        """The lines that it comes from, the innermost first, each called from the next."""
        meta = instruction.metadata
        if "source_file" in meta:
            yield Source(meta["source_file"], int(meta.get("source_line", 0)), "")
        frames = self.tables["StackFrames"]
        # parents are written one too high: the first frame, which has none, names itself
        above = frames.get(1, {}).get("parent_frame_id", 0)
        number = int(meta.get("stack_frame_id", 0))
        while frame := frames.get(number):
            if (place := self.tables["FileLocations"].get(frame["file_location_id"])) is not None:
                file, function = (self.tables[t].get(place[k], "") for t, k in _PLACES)
                yield Source(file, place["line"], function)
            number = frame.get("parent_frame_id", 0) - above


_PLACES = (("FileNames", "file_name_id"), ("FunctionNames", "function_name_id"))


def parse(text: str) -> Module:
    """Reads a program.

    Raises:
      UserError: if the text is no HLO module, or a part of it cannot be read; the line is quoted.
    """
    if not text.startswith("HloModule"):
        raise UserError(f"not a compiled program: it starts with {text[:40]!r}; take compiled.as_text()")
    parts = _parts(text, 0)
    header = dict(_attribute(text, start, stop) for start, stop in parts if "=" in text[start:stop])
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, Any]] = {name: {} for name in _TABLES}
    entry, table, position = "", None, parts[-1][1] + 1
    while position < len(text):
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        line = text[position:end]
        if line in tables:
            table = line
        elif (row := _ROW.fullmatch(line)) and table:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row[3] or "")}
            tables[table][int(row[1])] = row[2] if row[3] is None else numbers
        elif head := _HEADER.fullmatch(line):
            instructions, end = _body(text, end + 1)
            computations[head[2]] = Computation(head[2], tuple(instructions))
            entry = head[2] if head[1] else entry
        position = end + 1
    if not entry:
        raise UserError("a compiled program without an ENTRY computation: was its text cut?")
    return Module(header, computations, entry, tables)


def _body(text: str, position: int) -> tuple[list[Instruction], int]:
    """The instructions up to the closing brace, and the end of the brace's line."""
    found = []
    while not text.startswith("}", position):
        start = _START.match(text, position)
        if start is None:
            raise UserError(f"cannot read this line of a compiled program: {text[position : position + 80]!r}")
        instruction, end = _instruction(text, start)
        found.append(instruction)
        position = end + 1
    end = text.find("\n", position)
    return found, len(text) if end < 0 else end


def _instruction(text: str, start: re.Match) -> tuple[Instruction, int]:
    """The instruction that starts here, and the end of its last line: what stands in brackets may go over lines."""
    position = start.end()
    stop = _close(text, position) if text[position] == "(" else text.index(" ", position)
    shape = _shape(_COMMENT.sub("", text[position:stop]))
    opening = text.index("(", stop)
    closing = _close(text, opening)
    literal = text[opening + 1 : closing - 1]
    parts = _parts(text, closing)
    attributes = dict(_attribute(text, *part) for part in parts if part[1] > part[0])
    opcode = text[stop:opening].strip()
    operands = tuple(_OPERAND.findall(literal)) if opcode != "constant" else ()
    return Instruction(start[2], opcode, shape, operands, literal, attributes, start[1] is not None), parts[-1][1]


def _attribute(text: str, start: int, stop: int) -> tuple[str, str]:
    key, _, value = text[start:stop].strip().partition("=")
    return key, value


def _close(text: str, position: int) -> int:
    """Just after the bracket that closes the one at `position`."""
    depth = 0
    for token in _NESTED.finditer(text, position):
        kind = token[0][0]
        if kind in "[({":
            depth += 1
        elif kind in "])}":
            depth -= 1
            if not depth:
                return token.end()
    raise UserError(f"a bracket is not closed in {text[position : position + 80]!r}: was the program's text cut?")


def _stops(text: str, position: int) -> Iterator[int]:
    """Where commas stand outside of all brackets and strings, and last the end of the line."""
    while (token := _OPEN.search(text, position)) is not None:
        kind = token[0]
        if kind in ",\n":
            yield token.start()
            position = token.end()
            if kind == "\n":
                return
        elif kind == '"':
            string = _STRING.match(text, token.start())
            position = string.end() if string else token.end()
        else:
            position = _close(text, token.start())
    yield len(text)


def _parts(text: str, position: int) -> list[tuple[int, int]]:
    """The pieces between commas up to the end of the line."""
    found = []
    for stop in _stops(text, position):
        found.append((position, stop))
        position = stop + 1
    return found


_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@lru_cache(maxsize=1 << 16)
def _shape(text: str) -> Shape:
    text = text.strip()
    if text.startswith("("):
        inside = text[1:-1] + "\n"
        parts = [inside[start:stop] for start, stop in _parts(inside, 0)]
        return Shape("tuple", parts=tuple(_shape(part) for part in parts if part.strip()))
    found = _ARRAY.match(text)
    if found is None:
        raise UserError(f"cannot read the shape {text[:80]!r} of a compiled program")
    dtype, sizes, layout = found[1], found[2] or "", found[3] or ""
    dims = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    order, _, notes = layout.partition(":")
    minor_to_major = tuple(int(dim) for dim in order.split(",") if dim) or tuple(reversed(range(len(dims))))
    tile, space, bits = (re.search(rf"{letter}\(([\d,]+)\)", notes) for letter in "TSE")
    wide = re.match(r"[a-z]+?(\d+)", dtype)
    return Shape(
        dtype=dtype,
        dims=dims,
        minor_to_major=minor_to_major,
        tile=tuple(map(int, tile[1].split(","))) if tile else (),
        space=int(space[1]) if space else 0,
        bits=int(bits[1]) if bits else _BITS.get(dtype, int(wide[1]) if wide else 8),
    )
