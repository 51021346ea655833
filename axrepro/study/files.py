"""The files of a study's folder, which may be in a bucket; only the first process writes."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from axrepro.errors import UserError


def read_json(path: epath.Path) -> Any:
    """What a file holds; None if there is none.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; move it away, and it is made anew") from None


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a file whole or not at all.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.parent / f"{path.name}.new"
        scratch.write_text(json.dumps(value, indent=1) + "\n")
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; make room or choose another --workdir") from None


class BusyError(UserError):
    """Another process works in the folder."""


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Keeps other processes out of a local folder, which is made if need be; a kill leaves nothing locked.

    Raises:
      BusyError: if another process is there.
      UserError: if the folder cannot be used.
    """
    if "://" in str(folder):
        yield
        return
    import fcntl

    path = Path(folder) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"cannot use the workdir {folder}: {error}; choose another --workdir") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"another process works in {folder}; wait for it, or choose another --workdir") from None
        yield
    finally:
        os.close(handle)
