"""How often a loop runs.

XLA for CPUs and GPUs writes a trip count beside each loop that it could count; XLA for TPUs does not. There, the loop's
counters are run on their own: start values from where the loop is called, the condition, and how the body changes what
the condition depends on. A count that depends on data stays unknown.
"""

import bisect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from axrepro.core.hlo import Computation, Instruction, Module

Scalars = Mapping[tuple[int, int | None], int]
"""Known whole numbers among a computation's arguments: (parameter, element of its tuple) -> value."""

_SINGLY = 256  # trips that are run one by one; from there on, counters are taken to keep their steps
_SAME = ("copy", "convert", "bitcast", "reshape", "copy-start", "copy-done", "opt-barrier")
_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "negate": operator.neg,
    "and": operator.and_,
    "or": operator.or_,
    "not": lambda value: not value,
    "select": lambda which, yes, no: yes if which else no,
}
_COMPARE = {"LT": "lt", "LE": "le", "GT": "gt", "GE": "ge", "EQ": "eq", "NE": "ne"}


def trip_count(module: Module, computation: Computation, loop: Instruction, scalars: Scalars) -> int | None:
    """How often the body of `loop`, an instruction of `computation`, runs; None if the text does not say."""
    if known := loop.config.get("known_trip_count"):
        return int(known["n"])
    (condition,), (body,) = loop.names("condition"), loop.names("body")
    over, inside = module.computations[condition], module.computations[body]
    needed = _touched(module, over, None)
    while new := set().union(*(_touched(module, inside, element) for element in needed)) - needed:
        needed |= new
    read = lambda element: value(module, computation, loop.operands[0], scalars, element)
    state = {(0, element): read(element) for element in needed}
    before = state
    for count in range(_SINGLY):
        if None in state.values():
            return None
        again = value(module, over, over.root.name, state)
        if not again:
            return None if again is None else count
        before, state = state, {k: value(module, inside, inside.root.name, state, k[1]) for k in state}
    return None if None in state.values() else _far(module, over, before, state)


def _far(module: Module, condition: Computation, before: dict, state: dict) -> int | None:
    """The count of a long loop, whose counters keep the steps that they last took."""

    def ends(trip: int) -> bool:
        ahead = {key: number + (number - before[key]) * (trip - _SINGLY) for key, number in state.items()}
        return not value(module, condition, condition.root.name, ahead)

    high = next((_SINGLY << power for power in range(32) if ends(_SINGLY << power)), None)
    return None if high is None else bisect.bisect_left(range(high), True, lo=_SINGLY, key=ends)


def carried(module: Module, computation: Computation, loop: Instruction, scalars: Scalars) -> Scalars:
    """The whole numbers that the body of `loop` finds in its argument on every trip."""
    body = module.computations[loop.names("body")[0]]
    kept = (element for element in range(len(body.root.operands)) if _is_invariant(body, element))
    found = {(0, k): value(module, computation, loop.operands[0], scalars, k) for k in kept}
    return {key: number for key, number in found.items() if number is not None}


def value(
    module: Module,
    computation: Computation,
    name: str,
    scalars: Scalars,
    element: int | None = None,
    touched: set | None = None,
) -> Any:
    """The whole number (or truth) that an instruction yields, None if it is not known.

    Args:
      element: of its tuple.   touched: takes up the elements of the first parameter that the value depends on.
    """
    instruction = computation.by_name[name]
    shape = instruction.shape if element is None else instruction.shape.parts[element]
    if shape.dtype != "tuple" and (shape.size != 1 or shape.dtype[0] not in "sup"):
        return None  # no counter; what it is made of would be followed in vain, again by each that uses it
    inner = lambda operand, at=None: value(module, computation, operand, scalars, at, touched)
    match instruction.opcode:
        case "parameter":
            if touched is not None:
                touched.add(element)
            return scalars.get((int(instruction.literal), element))
        case "constant":
            if instruction.literal in ("true", "false"):
                return instruction.literal == "true"
            return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
        case "tuple":
            return None if element is None else inner(instruction.operands[element])
        case "get-tuple-element":
            return inner(instruction.operands[0], int(instruction.attributes["index"])) if element is None else None
        case "fusion" | "call":
            callee = module.computations[(*instruction.names("calls"), *instruction.names("to_apply"))[0]]
            known = {(place, None): inner(operand) for place, operand in enumerate(instruction.operands)}
            return value(module, callee, callee.root.name, {k: v for k, v in known.items() if v is not None}, element)
        case "while":
            body = module.computations[instruction.names("body")[0]]
            fixed = element is not None and _is_invariant(body, element)
            return inner(instruction.operands[0], element) if fixed else None
        case "compare":
            sides = [inner(operand) for operand in instruction.operands]
            compare = getattr(operator, _COMPARE[instruction.attributes["direction"]])
            return None if None in sides else compare(*sides)
        case code if code in _SAME:
            return inner(instruction.operands[0], element)
        case code if code in _ARITHMETIC:
            values = [inner(operand) for operand in instruction.operands]
            return None if None in values else _ARITHMETIC[code](*values)
    return None


def _touched(module: Module, computation: Computation, element: int | None) -> set:
    """The elements of the argument that the result, or this element of it, depends on."""
    touched: set = set()
    value(module, computation, computation.root.name, {}, element, touched)
    return touched


def _is_invariant(body: Computation, element: int) -> bool:
    """Whether a loop's body hands this element of its argument on as it was."""
    if body.root.opcode != "tuple":
        return False
    source = body.by_name[body.root.operands[element]]
    while source.opcode in _SAME:
        source = body.by_name[source.operands[0]]
    of = body.by_name[source.operands[0]].opcode if source.opcode == "get-tuple-element" else ""
    return of == "parameter" and int(source.attributes["index"]) == element
