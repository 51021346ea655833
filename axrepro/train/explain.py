"""Where the values of a config come from: class defaults, the experiment's code, the mesh rule, the command line."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from axrepro.core.config import leaves, lookup, override
from axrepro.errors import UserError
from axrepro.train.experiment import Experiment, on_hardware


@dataclass(frozen=True)
class History:
    """How an experiment's function made its tree.

    Attributes:
      stages: experiments, each made from the one before; the last is what the function returned.
      places: by id, each dataclass that was made meanwhile, and where. It keeps them alive, so that an id stays theirs.
      name: of the experiment; stands for the place of what was made before, such as constants of a loaded module.
    """

    stages: list[Experiment]
    places: dict[int, tuple[Any, str]]
    name: str

    def place(self, node) -> str:
        """File, line and function that made `node`."""
        return self.places.get(id(node), (node, self.name))[1]


def construct(load: Callable[[], Experiment], folder: Path, name: str) -> History:
    """Calls `load`, the experiment `name`, and watches which lines of the files in `folder` make which parts."""
    places: dict[int, tuple[Any, str]] = {}
    sources: dict[int, tuple[Experiment, Experiment | None]] = {}

    def watch(frame: FrameType, event: str, result) -> None:
        if event != "return":
            return
        if frame.f_code.co_name == "__init__":
            node = frame.f_locals.get("self")
            if is_dataclass(node) and (place := _place(frame, folder)):
                places.setdefault(id(node), (node, place))
        elif isinstance(result, Experiment):
            # the innermost function that returns it made it: `dataclasses.replace`, or one that calls the constructor
            arguments = (frame.f_locals.get(name) for name in frame.f_code.co_varnames[: frame.f_code.co_argcount])
            source = next((a for a in arguments if isinstance(a, Experiment) and a is not result), None)
            sources.setdefault(id(result), (result, source))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        stages = [load()]
    finally:
        sys.setprofile(before)
    while (source := sources.pop(id(stages[0]), (None, None))[1]) is not None:
        stages.insert(0, source)
    return History(stages, places, name)


def _place(frame: FrameType | None, folder: Path) -> str | None:
    """The innermost line within `folder` that is being run."""
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(folder):
        frame = frame.f_back
    if frame is None:
        return None
    function = frame.f_code.co_qualname.split(".<locals>")[0]  # of a lambda: the function around it
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} {function}"


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def explain(path: str, history: History, slice_name: str, overrides: Mapping[str, str]) -> str:
    """The chain of values at `path`, from the class default to the command line.

    Args:
      path: of a field; of a group: each field below it that something sets is explained. "": the whole experiment.
    Raises:
      UserError: for an unknown path, with the nearest.
    """
    original = history.stages[-1]
    ruled, rule = on_hardware(original, slice_name)
    final = override(ruled, overrides)
    changes = dict(rule.changes) if rule else {}
    found = leaves(lookup(final, path) if path else final, path)
    blocks = []
    for leaf, value in found.items():
        lines, default = _constructed(leaf, history)
        if rule and leaf in changes:
            step = _step(lookup(original, leaf), lookup(ruled, leaf))
            lines.append(f"mesh rule {rule.match!r} ({slice_name}): {step}")
        if leaf in overrides:
            lines.append(f"command line: {_step(lookup(ruled, leaf), value)}")
        if leaf == path or not default or len(lines) > 1:
            blocks.append("\n  ".join([f"{leaf} = {value!r}", *lines]))
    return "\n".join(blocks) or f"{path or 'the experiment'}: every field has the default of its class"


def _step(old, new) -> str:
    return f"{old!r} -> {new!r}" if old != new else f"{new!r}, as it was"


def _constructed(path: str, history: History) -> tuple[list[str], bool]:
    """A line for each value that the experiment's code gave the field, and whether the default is all there is."""
    lines, default, last = [], False, None
    for stage in history.stages:
        try:
            value = lookup(stage, path)
        except UserError:  # not there yet
            continue
        if last is None:
            origin = _default(stage, path)
            parent = path.rpartition(".")[0]
            place = history.place(lookup(stage, parent) if parent else stage)
            default = origin is not None
            lines.append(f"{place} leaves {origin}: {value!r}" if default else f"{place}: {value!r}")
        elif value != last[0]:
            lines.append(f"{history.place(stage)}: {_step(last[0], value)}")
        last = (value,)
    return lines, default


def _default(tree, path: str) -> str | None:
    """The class default that the value at `path` equals, its own or that of a group around it, if any."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        node = lookup(tree, ".".join(parts[: end - 1])) if end > 1 else tree
        for field in fields(node) if is_dataclass(node) else ():
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            if field.name == parts[end - 1] and default == getattr(node, field.name):
                return f"the default of {type(node).__name__}.{field.name} ({_declared(type(node), field.name)})"
    return None


@cache
def _declared(cls: type, field: str) -> str:
    """File and line where a dataclass field is declared."""
    owner = next(c for c in cls.__mro__ if field in inspect.get_annotations(c))
    lines, first = inspect.getsourcelines(owner)
    nodes = ast.walk(ast.parse(textwrap.dedent("".join(lines))))
    line = next(n.lineno for n in nodes if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == field)
    return f"{_short(inspect.getfile(owner))}:{first + line - 1}"
