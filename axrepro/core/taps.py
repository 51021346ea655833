"""Reading what layers have tagged (`axrepro.core.remat.tag`) out of a function, without the layers knowing of it.

The function is traced, and its trace is run again with an ear at every tag. Whoever does not listen pays nothing: the
function itself is as it was.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_CALLS = ("jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_STRUCTURE = re.compile(
    r"(while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|branch_\d+_fun|custom_[jv]+p_call\w*)(\[.*)?"
)

Position = tuple[int | None, ...]
"""Place in the order of a program: the number of the operation at each level, None for the index of a loop."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tap:
    """What was read at one tag.

    Attributes:
      name: scopes and tag, "layers[]/attention/q"; "[]" stands where a loop's index belongs.
      position: of the tag in the program.   value: what was read, with a leading axis per loop.
    """

    name: str = field(metadata={"static": True})
    position: Position = field(metadata={"static": True})
    value: Any


def scopes(text: str) -> str:
    """The named scopes in an operation's name: "jit(f)/transpose(jvp(layers))/while/body/q/dot" is "layers/q/dot"."""
    text = re.sub(r"\bp?jit\([^()]*\)", "", text)
    parts = re.sub(r"\w+\(|\)", "", text).split("/")
    return "/".join(part for part in parts if part and not _STRUCTURE.fullmatch(part))


def tapped(fn: Callable, read: Callable[[jax.Array], Any]) -> Callable:
    """`fn`, returning (its result, a `Tap` per tagged floating-point value, in the order of the program).

    `read` is applied where the value is made, so that only what it returns is kept from within loops. Tags inside
    `while`, `cond` and `shard_map` are not heard. The result is not for differentiation: custom rules are gone.
    """

    def run(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        taps: list[Tap] = []
        out = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), "", (), read, taps)
        return jax.tree.unflatten(jax.tree.structure(result), out), taps

    return run


def first_uses(fn: Callable, *args) -> list[Position]:
    """Where `fn` first uses each leaf of its first argument; backward, gradients are complete in the reverse order."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return _first_uses(jaxpr)[: len(jax.tree.leaves(args[0]))]


def _inner(eqn) -> tuple[Jaxpr, list] | None:
    """The body and the constants of an operation that does nothing but call it, and of a scan."""
    if eqn.primitive.name not in (*_CALLS, "scan"):
        return None
    body = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
    return (body.jaxpr, body.consts) if isinstance(body, ClosedJaxpr) else (body, []) if body is not None else None


def _has_tags(jaxpr: Jaxpr) -> bool:
    inner = [_inner(eqn) for eqn in jaxpr.eqns]
    return any(eqn.primitive.name == "name" for eqn in jaxpr.eqns) or any(_has_tags(i[0]) for i in inner if i)


def _evaluate(jaxpr: Jaxpr, consts, args, scope: str, position: Position, read, taps: list[Tap]) -> list:
    """The outputs; what is read on the way is appended to `taps`."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    value = lambda atom: atom.val if isinstance(atom, Literal) else env[atom]
    for number, eqn in enumerate(jaxpr.eqns):
        inputs, here = [value(atom) for atom in eqn.invars], (*position, number)
        path = "/".join(filter(None, (scope, scopes(str(eqn.source_info.name_stack)))))
        inner = _inner(eqn)
        if eqn.primitive.name == "name":
            outputs = inputs
            if jnp.issubdtype(inputs[0].dtype, jnp.floating):
                name = "/".join(filter(None, (path, eqn.params["name"])))
                taps.append(Tap(name, here, read(inputs[0])))
        elif inner is not None and _has_tags(inner[0]):
            run = _scan if eqn.primitive.name == "scan" else _call
            outputs = run(eqn, *inner, inputs, path, here, read, taps)
        else:
            variables = list({atom for atom in eqn.invars if not isinstance(atom, Literal)})
            alone = jaxpr.replace(constvars=[], invars=variables, outvars=eqn.outvars, eqns=[eqn])
            outputs = jax.core.eval_jaxpr(alone, [], *map(value, variables))
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _call(eqn, body, consts, inputs, scope, position, read, taps):
    return _evaluate(body, consts, inputs, scope, position, read, taps)


def _scan(eqn, body, consts, inputs, scope, position, read, taps):
    params = eqn.params
    shared, carried = params["num_consts"], params["num_carry"]
    fixed, start, xs = inputs[:shared], inputs[shared : shared + carried], inputs[shared + carried :]

    def step(carry, xs):
        heard: list[Tap] = []
        out = _evaluate(body, consts, (*fixed, *carry, *xs), f"{scope}[]", (*position, None), read, heard)
        return out[:carried], (out[carried:], heard)

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, heard) = jax.lax.scan(step, start, xs, **options)
    taps.extend(heard)
    return [*carry, *ys]


def _first_uses(jaxpr: Jaxpr) -> list[Position]:
    """The position of the first operation that takes each input; one past the last for an input that none takes."""
    first: dict[Any, Position] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        inner = _inner(eqn)
        below = _first_uses(inner[0]) if inner is not None else [()] * len(eqn.invars)
        stacked = eqn.params["num_consts"] + eqn.params["num_carry"] if eqn.primitive.name == "scan" else len(below)
        for index, (atom, rest) in enumerate(zip(eqn.invars, below, strict=True)):
            if not isinstance(atom, Literal):
                first.setdefault(atom, (number, *([None] if index >= stacked else []), *rest))
    return [first.get(var, (len(jaxpr.eqns),)) for var in jaxpr.invars]
