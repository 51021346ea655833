"""What one process finds out, all processes act on: otherwise the others wait for it in a collective for ever."""

import json
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np

from axrepro.errors import UserError

T = TypeVar("T")
_LENGTH = 2000  # bytes of an error's text that travel


def on_first(action: Callable[[], T]) -> T | None:
    """The result of `action` on process 0, and None on the others.

    Raises:
      UserError: on every process, if it was raised on process 0.
    """
    result, error = None, b""
    if jax.process_index() == 0:
        try:
            result = action()
        except UserError as raised:
            if jax.process_count() == 1:
                raise
            error = str(raised).encode()[:_LENGTH] or b"unknown"
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        text = np.zeros(_LENGTH, np.uint8)
        text[: len(error)] = np.frombuffer(error, np.uint8)
        error = np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes().rstrip(b"\0")
        if error:
            raise UserError(error.decode(errors="replace"))
    return result


def from_first(action: Callable[[], T]) -> T:
    """What `action` returns on process 0, on all of them; something that JSON can hold.

    Raises:
      UserError: on every process, if it was raised on process 0.
    """
    result = on_first(action)
    if jax.process_count() == 1:
        return cast(T, result)
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(result).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, length) if jax.process_index() else text
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())
