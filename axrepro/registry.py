"""Finds experiments: public functions without required arguments that return an `Experiment`, under `experiments/`.

The index is made by parsing the files; only the file of the experiment that is asked for is imported. Studies, which
return a `Study`, are found in the same way.
"""

import ast
import importlib
import importlib.util
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from axrepro.errors import UserError, nearest


@dataclass(frozen=True)
class Entry:
    """An experiment, or a study, that was found but not imported.

    Attributes:
      file: path below `experiments/` without `.py`, such as `moe_dense` or `vision/aimv2`.
      function: its name there.   description: the first line of its docstring.
      kind: class of what it returns.
    """

    file: str
    function: str
    description: str
    kind: str = "Experiment"

    @property
    def name(self) -> str:
        """How it is addressed: by function, or `file:tiny`, since every file has a `tiny`."""
        return f"{self.file}:{self.function}" if self.function == "tiny" else self.function


def folder() -> Path:
    """The `experiments` package: that of the working directory, else the installed one.

    Raises:
      UserError: if there is none, or that of the working directory is no package and would be passed over.
    """
    spec = importlib.util.find_spec("experiments")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("no experiments/ folder: run from a checkout, or install the package with pip install -e .")
    found, here = Path(next(iter(spec.submodule_search_locations))), Path("experiments").resolve()
    if found.resolve() != here and any(here.glob("*.py")) and not (here / "__init__.py").exists():
        raise UserError(f"{here} has no __init__.py, without which Python takes {found}; add an empty one")
    return found


def index(root: Path | None = None, kind: str = "Experiment") -> list[Entry]:
    """All experiments, by file and in the order of their definition; `_file.py` holds what other files share.

    Args:
      kind: "Study" for studies in their place.
    """
    root = folder() if root is None else root
    entries = []
    for path in sorted(root.rglob("[!_]*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise UserError(f"experiment file {path} cannot be parsed: {error}") from None
        file = path.relative_to(root).with_suffix("").as_posix()
        entries += [Entry(file, f.name, _first_line(f), kind) for f in tree.body if _returns(f, kind)]
    return entries


def _returns(node: ast.stmt, kind: str) -> TypeGuard[ast.FunctionDef]:
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.returns is None:
        return False
    required = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
    required += sum(default is None for default in node.args.kw_defaults)
    return ast.unparse(node.returns).split(".")[-1] == kind and required == 0


def _first_line(node: ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").split("\n")[0]


def find(name: str, entries: list[Entry]) -> Entry:
    """The experiment called `name`, or `file:function`.

    Raises:
      UserError: if there is none (with the nearest name), or several files have it.
    """
    what = entries[0].kind.lower() if entries else "experiment"
    file, colon, function = name.rpartition(":")
    if colon:
        named = [e for e in entries if e.function == function]
        found = [e for e in named if e.file == file] or [e for e in named if e.file.split("/")[-1] == file]
        names = [f"{e.file}:{e.function}" for e in entries]
    else:
        found = [e for e in entries if e.function == name]
        names = [e.name for e in entries]
    if not found:
        raise UserError(f"no {what} {name!r}; {nearest(name, names)} (--list shows all)")
    if len(found) > 1 and len({e.file for e in found}) == 1:
        raise UserError(f"{what} {name!r} is defined {len(found)} times in experiments/{found[0].file}.py")
    if len(found) > 1:
        raise UserError(f"{what} {name!r} is in several files: {', '.join(f'{e.file}:{e.function}' for e in found)}")
    return found[0]


def load(entry: Entry):
    """What the entry's function returns: an `Experiment` or a `Study`.

    Raises:
      UserError: with the line of the file, if it cannot be imported or the function raises; or returns something else.
    """
    path = f"experiments/{entry.file}.py"
    try:
        module = importlib.import_module("experiments." + entry.file.replace("/", "."))
        found = getattr(module, entry.function)()
    except (Exception, SystemExit) as error:
        calls = traceback.extract_tb(error.__traceback__)
        line = next((f":{call.lineno}" for call in reversed(calls) if call.filename.endswith(path)), "")
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{path}{line} fails for the {entry.kind.lower()} {entry.name!r}: {kind}{error}") from error
    if entry.kind not in [cls.__name__ for cls in type(found).__mro__]:
        article = "an" if entry.kind[0] in "AEIOU" else "a"
        raise UserError(f"{path}: {entry.function}() returns a {type(found).__name__}, not {article} {entry.kind}")
    return found
