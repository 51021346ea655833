"""A compiled program, read for what it will do: which instructions run, how often, and what each costs.

XLA's own cost analysis counts the body of a loop once, and knows of no overlap. Here a loop's body counts as often as
it runs, and of an asynchronous operation it is known what runs beside it. The text is that of an optimised and
scheduled program: `jax.jit(...).lower(...).compile().as_text()`, for CPUs or ahead of time for TPUs. All figures are of
one device.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from axrepro.aot import collectives
from axrepro.aot.collectives import Collective, Transfer
from axrepro.aot.loops import Scalars, carried, trip_count
from axrepro.aot.work import FREE, Costs, Executed
from axrepro.core import hlo
from axrepro.core.hlo import Computation, Instruction, Module


@dataclass(frozen=True)
class Loop:
    """A loop.

    Attributes:
      trips: how often its body runs each time that it is reached, None if the text does not say.
      entered: how often it is reached.   path: the computations around it, the program's entry first.
    """

    name: str
    body: str
    op_name: str
    trips: int | None
    entered: int
    path: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      instructions: those that run, in their order, a loop's body where the loop stands. Left out is what costs nothing
        (tuples, parameters), and the conditions of loops. Of a conditional's branches the one with the most FLOPs
        stands here, by bytes where these are equal: what the data choose is not known.
      loops: in the same order.
    """

    module: Module = field(repr=False)
    instructions: tuple[Executed, ...] = field(repr=False)
    loops: tuple[Loop, ...] = field(repr=False)

    def flops(self) -> int:
        """Of all products; kernels that do not state theirs (`Executed.opaque`) count none."""
        return sum(one.flops * one.trips for one in self.instructions)

    def recomputed(self) -> int:
        """The part of `flops` that rematerialisation does again."""
        return sum(one.recomputed * one.trips for one in self.instructions)

    def bytes(self) -> int:
        """To and from the device's main memory."""
        return sum(one.bytes * one.trips for one in self.instructions)

    def collectives(self, mesh_axes: Mapping[str, int]) -> list[Collective]:
        """The collectives in their order; see `axrepro.aot.collectives.collectives`."""
        return collectives.collectives(self.module, self.instructions, mesh_axes)

    def transfers(self) -> list[Transfer]:
        """What moves between the host's memory and the device's."""
        return collectives.transfers(self.module, self.instructions)


def read(text: str) -> Program:
    """Reads the text of a compiled program.

    Raises:
      UserError: if it is none, or a part of it cannot be read.
    """
    module = hlo.parse(text)
    loops: list[Loop] = []
    walk = _Walk(module, Costs(module), loops)
    instructions = tuple(walk.run(module.computations[module.entry], 1, True, {}, ()))
    return Program(module, instructions, tuple(loops))


@dataclass(frozen=True)
class _Walk:
    module: Module
    costs: Costs
    loops: list[Loop]

    def run(
        self, computation: Computation, trips: int, certain: bool, scalars: Scalars, above: tuple[str, ...]
    ) -> Iterator[Executed]:
        """What a computation runs; `scalars` are what is known of its arguments."""
        path = (*above, computation.name)
        for instruction in computation.instructions:
            match instruction.opcode:
                case "while":
                    count = trip_count(self.module, computation, instruction, scalars)
                    body = self.module.computations[instruction.names("body")[0]]
                    self.loops.append(Loop(instruction.name, body.name, instruction.op_name, count, trips, path))
                    if count != 0:
                        known = carried(self.module, computation, instruction, scalars)
                        yield from self.run(body, trips * (count or 1), certain and count is not None, known, path)
                case "conditional":
                    yield from self._largest(instruction, trips, certain, path)
                case "call":
                    yield from self.run(
                        self.module.computations[instruction.names("to_apply")[0]], trips, certain, {}, path
                    )
                case opcode if opcode not in FREE:
                    yield self.costs.executed(computation, instruction, trips, certain, path)

    def _largest(self, instruction: Instruction, trips: int, certain: bool, path: tuple[str, ...]) -> list[Executed]:
        """What the largest branch runs."""
        keys = ("branch_computations", "true_computation", "false_computation")
        best: list[Executed] = []
        loops: list[Loop] = []
        size = (-1, -1)
        for name in (name for key in keys for name in instruction.names(key)):
            walk = _Walk(self.module, self.costs, [])
            ran = list(walk.run(self.module.computations[name], trips, certain, {}, path))
            cost = (sum(one.flops * one.trips for one in ran), sum(one.bytes * one.trips for one in ran))
            if cost > size:
                best, loops, size = ran, walk.loops, cost
        self.loops.extend(loops)
        return best
