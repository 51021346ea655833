"""Reads a Markdown page as a script: files it asks for, commands it gives, output it promises.

- ```` ```python file=PATH ```` is a file to write; ```` ```diff ```` a change to apply.
- Each line of ```` ```sh ```` is a command. A comment `<!-- run with: --a=b -->` before the block holds arguments that
  the test adds to those that train or evaluate, so that hours become seconds. A block after `<!-- not run: reason -->`
  is left out.
- ```` ```text ```` must come out of the command before it, line by line; `…` stands for anything.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?:<!-- (run with|not run): (.*?) -->\s*\n)?```(\w+)(?: file=(\S+))?\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
      kind: "sh", "python", "diff" or "text".   text: the command, the content, or the output.
      path: of a file to write.   extra: arguments that a test adds to a command.
    """

    kind: str
    text: str
    path: str | None = None
    extra: str = ""


def steps(page: Path) -> list[Step]:
    """What a page tells its reader to do, in order."""
    found = []
    for note, argument, kind, path, text in _BLOCK.findall(page.read_text()):
        if note == "not run":
            continue
        if kind == "sh":
            lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
            commands = [line.split("  #")[0].strip() for line in lines]
            found += [Step("sh", command, extra=argument if _works(command) else "") for command in commands]
        elif kind == "text" or kind == "diff" or path:
            found.append(Step(kind, text, path or None))
    return found


def _works(command: str) -> bool:
    study = "-m axrepro.study" in command and "--list" not in command
    return study or ("--experiment=" in command and "--mode=describe" not in command)


def environment() -> dict[str, str]:
    """What the commands run in: this environment, with programs that compile fast, since they run for moments."""
    plain = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return plain | {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def left_out(page: Path) -> list[str]:
    """The reasons given for blocks that are not run."""
    return [argument for note, argument, *_ in _BLOCK.findall(page.read_text()) if note == "not run"]
