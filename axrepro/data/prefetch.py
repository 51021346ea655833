"""Batches made ahead of time by a background thread."""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import jax

from axrepro.data.base import Batches
from axrepro.errors import UserError


class _Made(NamedTuple):
    batch: dict[str, jax.Array]
    position: dict
    counts: dict[str, int]


class _Producer:
    """The thread, and what it has made and nobody has taken yet.

    It knows nothing of the `_Prefetch` that consumes: otherwise one forgotten unclosed could not be collected.
    """

    def __init__(self, batches: Batches, depth: int):
        self._batches = batches
        self._depth = depth
        self._made: deque[_Made] = deque()
        self._end: BaseException | None = None  # why there are no further batches; StopIteration in the good case
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._made) < self._depth)
                if self._stopped:
                    return
            try:
                item = _Made(next(self._batches), self._batches.position(), self._batches.counts())
            except BaseException as error:  # it belongs to the consumer, whatever it is
                with self._changed:
                    self._end = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._made.append(item)
                self._changed.notify_all()

    def take(self, patience: float) -> _Made:
        """The next batch. Raises what the batches raised, once those before it are taken.

        Every `patience` seconds without one it is said which source is being read.
        """
        with self._changed:
            waited = 0.0
            while not self._changed.wait_for(lambda: self._made or self._end is not None or self._stopped, patience):
                waited += patience
                logging.warning("no batch for %.0f s; being read: %s", waited, self._batches.reading())
            if self._made:
                item = self._made.popleft()
                self._changed.notify_all()
                return item
            raise self._end if self._end is not None else RuntimeError("these batches were closed")

    def stop(self):
        with self._changed:
            self._stopped = True
            self._made.clear()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # it may be this thread that collects garbage
            self._thread.join()


class _Prefetch(Batches):
    def __init__(self, batches: Batches, depth: int, patience: float):
        self._batches = batches
        self._depth = depth
        self._patience = patience
        self._position, self._counts = batches.position(), batches.counts()
        self._producer: _Producer | None = None
        self._release = lambda: None
        self._closed = False

    def __next__(self) -> dict[str, jax.Array]:
        if self._closed:
            raise RuntimeError("these batches were closed")
        if self._producer is None:
            self._producer = _Producer(self._batches, self._depth)
            self._release = weakref.finalize(self, self._producer.stop)  # also when the interpreter exits
        batch, self._position, self._counts = self._producer.take(self._patience)
        return batch

    def position(self) -> dict:
        return self._position

    def stats(self) -> dict[str, int]:
        return self._batches.stats()

    def counts(self) -> dict[str, int]:
        return self._counts

    def reading(self) -> str:
        return self._batches.reading()

    def _stop(self):
        self._release()
        self._producer = None

    def seek(self, position: Mapping) -> None:
        if self._closed:
            raise RuntimeError("these batches were closed")
        self._stop()
        try:
            self._batches.seek(position)
        except UserError:
            self._batches.seek(self._position)  # the thread had run ahead; nothing is lost by a bad position
            raise
        self._position, self._counts = self._batches.position(), self._batches.counts()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stop()
            self._batches.close()


def prefetch(batches: Batches, depth: int = 2, patience: float = 30.0) -> Batches:
    """The same batches in the same order, made by a thread that stays up to `depth` of them ahead.

    `position` counts what was handed out, not what was made ahead. An exception of `batches` is raised where the batch
    that failed would have been handed out. From here on `batches` belongs to the result; close that alone.

    Args:
      patience: seconds without a batch after which a warning names the source that is being read.
    Raises:
      UserError: if `depth` is less than 1.
    """
    if depth < 1:
        raise UserError(f"prefetch depth {depth}: it is at least 1")
    return _Prefetch(batches, depth, patience)
