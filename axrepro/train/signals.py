"""SIGTERM ends a run after a save, on all processes at the same step."""

import signal
import threading

import jax


class Preemption:
    """Whether the run was asked to end. A context manager: the old handler comes back at its end."""

    def __init__(self):
        self._asked = False
        self._old = None

    def __enter__(self) -> "Preemption":
        # with several processes, jax.distributed owns SIGTERM and agrees on the step
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _handle(self, *_) -> None:
        self._asked = True

    @property
    def received(self) -> bool:
        """Whether this process was sent the signal, be it too late to end before the last step."""
        return self._asked

    def asked(self, step: int) -> bool:
        """Whether to end after this step; the same answer on every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
