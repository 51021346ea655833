"""What all commands share: wrong input is told in one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable

from axrepro.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong argument, in place of leaving Python; flags are not abbreviated."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


def find_function(flag: str, name: str) -> Callable:
    """What MODULE:FUNCTION names; modules of the working directory are found.

    Raises:
      UserError: if it is named otherwise, or cannot be imported.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise UserError(f"--{flag}={name} must be MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module may raise anything
        raise UserError(f"--{flag}={name} is not found: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"--{flag}={name} is a {type(found).__name__}, not a function")
    return found


def told(run: Callable[[list[str]], int], argv: list[str], interrupted: str = "interrupted") -> int:
    """The exit code of a command: its own, 2 for wrong input, 130 if interrupted, 141 if nobody reads on.

    Args:
      interrupted: what is said of it.
    """
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"axrepro: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"axrepro: {interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of the standard output: | head, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python itself still writes
        return 141
