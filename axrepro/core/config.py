"""The config is the tree of frozen dataclasses itself: override fields of it, swap parts of it, print it, exchange it
with a locked `ml_collections.ConfigDict`.

Paths are dotted: `method.model.layers.layer.ffn.hidden`, and elements of tuples are numbered: `mesh_rules.0.match`.
"""

import ast
import contextlib
import json
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from axrepro.errors import UserError, located, nearest

T = TypeVar("T")
CLASS = "class_"  # the key of a ConfigDict that holds the class name of the dataclass it came from
_REPLACE = "put another value in its place in the experiment's file"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_node(value) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _is_branch(value) -> bool:
    """A dataclass, or a tuple that holds one: what becomes a ConfigDict of its own."""
    return _is_node(value) or (isinstance(value, tuple) and any(_is_branch(v) for v in value))


def _children(value) -> dict[str, Any]:
    if _is_node(value):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return {str(i): v for i, v in enumerate(value)}


def to_config_dict(tree) -> ConfigDict:
    """The tree as a locked ConfigDict, with the class names beside the fields.

    A field that is None takes any type there (ConfigDict has no other choice); `from_config_dict` checks it again.
    """
    cfg = ConfigDict({CLASS: type(tree).__name__})
    for name, value in _children(tree).items():
        cfg[name] = to_config_dict(value) if _is_branch(value) else value
    return cfg.lock()


def from_config_dict(template: T, cfg: ConfigDict, path: str = "") -> T:
    """The template with the values of `cfg`. Classes come from the template alone: nothing is imported or evaluated.

    Raises:
      UserError: for a missing or unknown field, another class, or a value of the wrong type.
    """
    if cfg[CLASS] != type(template).__name__:
        raise UserError(
            f"{path or 'config'} is a {cfg[CLASS]}, but this experiment has {type(template).__name__} there"
        )
    children = _children(template)
    if unknown := sorted(set(cfg) - set(children) - {CLASS}):
        raise _unknown_field(template, unknown[0], path)
    if missing := sorted(set(children) - set(cfg)):
        raise UserError(f"{path or 'config'} lacks the field {missing[0]!r} of {type(template).__name__}")
    values = {}
    for name, old in children.items():
        here = f"{path}.{name}" if path else name
        if _is_branch(old):
            values[name] = from_config_dict(old, cfg[name], here)
        else:
            hint = _hints(type(template))[name] if _is_node(template) else type(old)
            values[name] = _checked(cfg[name], hint, here)
    return _rebuild(template, values, path)


def _rebuild(template, values: dict[str, Any], path: str) -> Any:
    if not _is_node(template):
        return tuple(values[str(i)] for i in range(len(template)))
    try:
        with located(template, path or type(template).__name__):
            return replace(template, **values)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{path or type(template).__name__}: {error}") from None


def _unknown_field(node, name: str, path: str) -> UserError:
    kind = type(node).__name__ + (f" (at {path})" if path else "")
    if not _children(node):
        return UserError(f"{kind} has no field {name!r}, nor any other; {_REPLACE}")
    return UserError(f"{kind} has no field {name!r}; {nearest(name, _children(node))}")


def _type_name(hint) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in get_args(hint))
    if hint is type(None):
        return "none"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _fits(value, hint) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _checked(value, hint, path: str):
    if isinstance(value, list):
        return _checked(tuple(value), hint, path)
    if not _fits(value, hint):
        raise UserError(f"{path}={value!r} has the wrong type; it takes {_type_name(hint)}")
    return float(value) if hint is float else value


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _parse(text: str, hint, path: str):
    """The value that `text` stands for under a type annotation."""
    wrong = UserError(f"{path}={text!r} has the wrong type; it takes {_type_name(hint)}")
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null"):
            return None
        if str in args:  # it would take any text; a tuple beside it is given as it is printed
            with contextlib.suppress(ValueError, SyntaxError):
                value = _as_tuples(ast.literal_eval(text))
                if isinstance(value, tuple) and _fits(value, hint):
                    return value
        for arg in args:
            try:
                return _parse(text, arg, path)
            except UserError:
                continue
        raise wrong
    if origin is Literal:
        for arg in args:
            if str(arg) == text:
                return arg
        raise wrong
    if origin is tuple:
        with contextlib.suppress(ValueError, SyntaxError):  # quoted and nested, as --mode=describe prints it
            value = _as_tuples(ast.literal_eval(text))
            if _fits(value, hint):
                return value
        items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(items):
            raise wrong
        try:
            return tuple(_parse(item, kind, path) for item, kind in zip(items, kinds, strict=True))
        except UserError:
            raise wrong from None
    if hint is bool and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    if hint is str:
        return text
    if hint in (int, float):
        try:
            return hint(text)  # underscores between digits are read as in Python
        except ValueError:
            pass
    raise wrong


def lookup(tree, path: str):
    """The value at a path.

    Raises:
      UserError: for an unknown field, with the nearest one.
    """
    node, here = tree, ""
    for name in path.split("."):
        if here and not _is_branch(node):
            raise UserError(f"{here} is a value, not a group of fields; it has no field {name!r}")
        if name not in _children(node):
            raise _unknown_field(node, name, here)
        node, here = _children(node)[name], f"{here}.{name}" if here else name
    return node


def leaves(tree, path: str = "") -> dict[str, Any]:
    """All values that are no groups of fields, by path; `path` is that of `tree` itself."""
    if not _is_branch(tree):
        return {path: tree}
    found = {}
    for name, child in _children(tree).items():
        found |= leaves(child, f"{path}.{name}" if path else name)
    return found


def override(tree: T, assignments: Mapping[str, Any]) -> T:
    """The tree with fields set: `override(experiment, {"train.steps": 100, "mesh.fsdp": "-1"})`.

    A str is read as the field's type; other values must have it. All assignments take effect at once, so that fields
    that must agree can be changed together.

    Raises:
      UserError: for an unknown field (with the nearest one), a wrong type, or values that the class refuses.
    """
    cfg = to_config_dict(tree)
    for path, value in assignments.items():
        old = lookup(tree, path)
        parent, _, last = path.rpartition(".")
        node, here = lookup(tree, parent) if parent else tree, cfg
        for name in parent.split(".") if parent else ():
            here = here[name]
        if _is_branch(old):
            names = ", ".join(f"{path}.{name}" for name in list(_children(old))[:4])
            fix = f"set one of its fields: {names}" if names else _REPLACE
            raise UserError(f"{path} is a {type(old).__name__}, which has no single value; {fix}")
        hint = _hints(type(node))[last] if _is_node(node) else type(old)
        value = _parse(value, hint, path) if isinstance(value, str) else _checked(value, hint, path)
        with here.ignore_type():  # the annotation was checked just now; ConfigDict knows only the old value's type
            here[last] = value
    return from_config_dict(tree, cfg)


def swap(tree: T, kind: type, change: Callable[[Any], Any], where: str = "**") -> T:
    """The tree with `change(part)` for every part of class `kind`; what `change` returns is not searched again.

    Args:
      where: glob of the paths to change, written with slashes (`method/model/**`).
    Raises:
      UserError: if nothing matched or nothing became different: a change that never applies is a mistake.
    """
    from axrepro.core.tree import matches

    done = []

    def visit(node, path):
        if isinstance(node, kind) and matches(path, where):
            done.append(path)
            return change(node)
        if not _is_branch(node):
            return node
        values = {name: visit(child, f"{path}/{name}" if path else name) for name, child in _children(node).items()}
        if all(values[name] is child for name, child in _children(node).items()):
            return node
        return _rebuild(node, values, path)

    result = visit(tree, "")
    if not done:
        raise UserError(f"swap found no {kind.__name__} at {where!r} in {type(tree).__name__}")
    if result == tree:
        raise UserError(f"swap changed nothing: each {kind.__name__} at {where!r} came back as it was ({done[0]})")
    return result


def walk(tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dataclass of the tree with its dotted path, parents first."""
    if _is_node(tree):
        yield path, tree
    if _is_branch(tree):
        for name, child in _children(tree).items():
            yield from walk(child, f"{path}.{name}" if path else name)


def describe(tree, indent: str = "") -> str:
    """The tree as text, a field a line: what golden files hold and `--mode=describe` prints."""
    lines = []
    for name, value in _children(tree).items():
        if _is_branch(value):
            label = type(value).__name__ if _is_node(value) else f"tuple of {len(value)}"
            lines.append(f"{indent}{name}: {label}")
            if body := describe(value, indent + "  "):
                lines.append(body)
        else:
            lines.append(f"{indent}{name}: {_functions_by_name(value)!r}")
    return "\n".join(lines)


def to_json(tree) -> str:
    """The tree as JSON text with sorted keys, class names included, and functions by name."""
    return json.dumps(to_config_dict(tree).to_dict(), indent=2, sort_keys=True, default=_functions_by_name)


def function_name(function: Callable) -> str:
    """Module and name, the same in every process: of what a partial calls, of the class of any other object."""
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _functions_by_name(value):
    if isinstance(value, tuple):
        return tuple(map(_functions_by_name, value))
    return function_name(value) if callable(value) else value


_ABSENT = object()


def _brief(value) -> str:
    if value is _ABSENT:
        return "(absent)"
    return value.get(CLASS, "dict") if isinstance(value, Mapping) else repr(value)


def differences(old: Mapping, new: Mapping, path: str = "") -> list[str]:
    """Where two nested dicts differ, a line each: `train.steps: 100 -> 200`."""
    lines = []
    for name in sorted(set(old) | set(new)):
        here = f"{path}.{name}" if path else name
        a, b = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, here)
        elif a != b:
            lines.append(f"{here}: {_brief(a)} -> {_brief(b)}")
    return lines
