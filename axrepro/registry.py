"""Finds experiments: public functions without required arguments that return an `Experiment`, under `experiments/`.

The index is made by parsing the files; only the file of the experiment that is asked for is imported.
"""

import ast
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from axrepro.errors import UserError, nearest


@dataclass(frozen=True)
class Entry:
    """An experiment that was found but not imported.

    Attributes:
      file: path below `experiments/` without `.py`, such as `moe_dense` or `vision/aimv2`.
      function: its name there.   description: the first line of its docstring.
    """

    file: str
    function: str
    description: str

    @property
    def name(self) -> str:
        """How it is addressed: by function, or `file:tiny`, since every file has a `tiny`."""
        return f"{self.file}:{self.function}" if self.function == "tiny" else self.function


def folder() -> Path:
    """The `experiments` package: that of the working directory, else the installed one.

    Raises:
      UserError: if there is none.
    """
    spec = importlib.util.find_spec("experiments")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("no experiments/ folder: run from a checkout, or install the package with pip install -e .")
    return Path(next(iter(spec.submodule_search_locations)))


def index(root: Path | None = None) -> list[Entry]:
    """All experiments, by file and in the order of their definition."""
    root = folder() if root is None else root
    entries = []
    for path in sorted(root.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise UserError(f"experiment file {path} cannot be parsed: {error}") from None
        file = path.relative_to(root).with_suffix("").as_posix()
        entries += [Entry(file, f.name, _first_line(f)) for f in tree.body if _is_experiment(f)]
    return entries


def _is_experiment(node: ast.stmt) -> TypeGuard[ast.FunctionDef]:
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.returns is None:
        return False
    required = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
    required += sum(default is None for default in node.args.kw_defaults)
    return ast.unparse(node.returns).split(".")[-1] == "Experiment" and required == 0


def _first_line(node: ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").split("\n")[0]


def find(name: str, entries: list[Entry]) -> Entry:
    """The experiment called `name`, or `file:function`.

    Raises:
      UserError: if there is none (with the nearest name), or several files have it.
    """
    file, colon, function = name.rpartition(":")
    if colon:
        found = [e for e in entries if e.function == function and (e.file == file or e.file.split("/")[-1] == file)]
        names = [f"{e.file}:{e.function}" for e in entries]
    else:
        found = [e for e in entries if e.function == name]
        names = [e.name for e in entries]
    if not found:
        raise UserError(f"no experiment {name!r}; {nearest(name, names)} (--list shows all)")
    if len(found) > 1:
        raise UserError(
            f"experiment {name!r} is in several files: {', '.join(f'{e.file}:{e.function}' for e in found)}"
        )
    return found[0]


def load(entry: Entry):
    """The `Experiment` that the entry's function returns."""
    module = importlib.import_module("experiments." + entry.file.replace("/", "."))
    return getattr(module, entry.function)()
