"""The error that a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Wrong input: a name, field, type, mesh, data file or checkpoint.

    The message is one line that says what was given, what is allowed and what to do. The command line prints it without
    a traceback and exits with code 2.
    """


def nearest(name: str, allowed) -> str:
    """A hint for a misspelt `name`: the closest allowed name, or the list where nothing is close."""
    import difflib

    allowed = sorted(map(str, allowed))
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "allowed: " + ", ".join(allowed) if allowed else "nothing is allowed here"


@contextmanager
def located(node, path: str) -> Iterator[None]:
    """Errors within that begin with the class of `node` (`Cosine.peak=…`) begin with its path in the config instead."""
    try:
        yield
    except UserError as error:
        kind, dot, rest = str(error).partition(".")
        if not dot or kind != type(node).__name__:
            raise
        raise UserError(f"{path}.{rest}") from None
