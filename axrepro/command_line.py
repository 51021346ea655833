"""What all commands share: wrong input is told in one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable

from axrepro.errors import UserError

_MOST_DEVICES = 4096  # emulated; each takes threads and memory


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong argument, in place of leaving Python; flags are not abbreviated."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which devices and processes there are."""
    parser.add_argument("--devices", type=int, metavar="N", help="emulate N CPU devices (per process)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where it is not detected")
    parser.add_argument("--num_processes", type=int, metavar="N", help="with --coordinator")
    parser.add_argument("--process_id", type=int, metavar="I", help="with --coordinator: 0 to N-1")


def check_machine_flags(args: argparse.Namespace) -> None:
    """Raises UserError for numbers that none of them can be."""
    for name, least in (("devices", 1), ("num_processes", 1), ("process_id", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    if args.devices is not None and args.devices > _MOST_DEVICES:
        raise UserError(f"--devices={args.devices} must be at most {_MOST_DEVICES}; --topology describes larger slices")


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
