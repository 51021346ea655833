"""Where a run lives: a folder, or a bucket (gs://, s3://) whose small files are written through a local copy."""

import re
import sys
import tempfile
import time
from pathlib import Path

from etils import epath

from axrepro.errors import UserError

_KEPT = (
    "config*.json",
    "metrics.jsonl",
    "history.jsonl",
    "statistics.jsonl",
)  # what an earlier start left and this one goes on with
_BUCKETS = ("gs://", "s3://", "az://")
_SECONDS = 60.0  # between two uploads while training


class Workdir:
    """The files of a run. Buckets cannot append to a file, so those of this process go to `local` and are copied.

    Checkpoints are not copied: Orbax writes them to `checkpoints` itself, from every host.

    Attributes:
      address: as it was given.   checkpoints: the folder for Orbax, absolute.
      local: where config.json, metrics.jsonl, events/, curve.png and the like are written.
    """

    def __init__(self, address: str):
        """Brings what an earlier start left in a bucket; writes nothing to it.

        Raises:
          UserError: for a bucket that cannot be reached, or the home folder of nobody.
        """
        self.address = address
        self._bucket: epath.Path | None = None
        try:
            self.local = Path(address).expanduser().absolute()
            self.local.exists()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"cannot use the workdir {address}: {error}") from None
        if re.match(r"\w+:/", address):
            if not address.startswith(_BUCKETS):
                raise UserError(f"cannot use the workdir {address}: give a folder, or one of {', '.join(_BUCKETS)}")
            self.local = Path(tempfile.mkdtemp(prefix="axrepro-"))
            try:
                self._bucket = epath.Path(address)
                for kept in (path for pattern in _KEPT for path in self._bucket.glob(pattern)):
                    (self.local / kept.name).write_bytes(kept.read_bytes())
            except Exception as error:  # each file system has errors of its own
                text = " ".join(str(error).split())[:200]
                raise UserError(f"cannot use the workdir {address}: {type(error).__name__}: {text}") from None
        self.checkpoints = epath.Path(self.local if self._bucket is None else self._bucket) / "checkpoints"
        self._published: dict[Path, int] = {}
        self._last = time.monotonic()

    def publish(self, now: bool = True) -> None:
        """Copies what changed into the bucket; with `now` False, once a minute. A failure is told and tried again."""
        if self._bucket is None or not (now or time.monotonic() - self._last > _SECONDS):
            return
        self._last = time.monotonic()
        for path in sorted(p for p in self.local.rglob("*") if p.is_file()):
            changed = path.stat().st_mtime_ns
            if self._published.get(path) == changed:
                continue
            target = self._bucket / path.relative_to(self.local).as_posix()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            except Exception as error:
                text = " ".join(str(error).split())[:200]
                print(f"cannot write {target} ({type(error).__name__}: {text}); kept in {path}", file=sys.stderr)
                return
            self._published[path] = changed
