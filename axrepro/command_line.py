"""What all commands share: wrong input is told in one line."""

import argparse
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
