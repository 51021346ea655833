"""What the loop tells beside its metrics: profiles, statistics by layer, what broke a step, what filled the memory."""

import time
from dataclasses import replace

import jax
import numpy as np

from axrepro.train import out_of_memory
from axrepro.train.inspection import Inspector, not_finite
from axrepro.train.profile import Profiler
from axrepro.train.state import Program, TrainState
from axrepro.train.statistics import Statistics
from axrepro.train.workdir import Workdir


class Diagnosis:
    """The hooks of the loop. Every process calls all of them; the first one writes and speaks.

    Attributes:
      compiled: the train step, once there is one.
    """

    def __init__(self, program: Program, workdir: Workdir):
        self.compiled = None
        self._program, self._folder, self._settings = program, workdir.local, program.experiment.diagnostics
        self._speaks = jax.process_index() == 0
        self._inspect = Inspector(program)
        self._profiler = Profiler(self._folder / "profile")
        self._statistics: Statistics | None = None
        self._step: int | None = None
        first = self._settings.profile_at
        self._window = range(0) if first is None else range(first, first + self._settings.profile_steps)

    def before(self, step: int, state: TrainState, batch: dict) -> float:
        """Looks at the step that is about to be taken, the `step`-th; returns the seconds that this took."""
        window, every = self._window, self._settings.statistics_every
        if self._step is None and window and step >= window.stop:
            self._say(
                f"warning: the profile of steps {window.start} to {window[-1]} lies before step {step}: none is made"
            )
        self._step = step
        profile = self._speaks and not self._profiler.running and step in window
        look = every is not None and step % every == 0
        if not (profile or look):
            return 0.0
        jax.block_until_ready(state)  # the steps before are not part of it
        start = time.perf_counter()
        if look:
            looks = self._inspect(state, batch)
            if self._speaks:
                self._statistics = self._statistics or Statistics(self._folder, step - 1)
                self._statistics.write(step, looks)
        if profile:
            self._profiler.start(step)
        return time.perf_counter() - start

    def after(self, step: int, state: TrainState) -> float:
        """Ends a profile whose last step this was; returns the seconds that this took."""
        if not self._profiler.running or step < self._window[-1]:
            return 0.0
        jax.block_until_ready(state)
        start = time.perf_counter()
        self._stop_profile(step)
        return time.perf_counter() - start

    def _stop_profile(self, step: int) -> None:
        text = self._profiler.stop(step, "" if self.compiled is None else self.compiled.as_text())
        self._say(f"{text}the trace is in {self._folder / 'profile'}")

    def search(self, step: int, state: TrainState, batch: dict) -> str:
        """Takes a step that was not finite again, tells what came first, and keeps its batch.

        Args:
          state: one with the parameters of that step.
        """
        state = replace(state, step=jax.numpy.full_like(state.step, step - 1))
        try:
            first = next(not_finite(self._inspect(state, batch)), None)
        except jax.errors.JaxRuntimeError as error:
            told = f"the search for the first tensor failed ({' '.join(str(error).split())[:100]})"
        else:
            told = f"first not finite: {first}" if first else "taken again, by itself, it was finite"
        path = self._folder / "not_finite" / f"step{step}.npz"
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            arrays = multihost_utils.process_allgather(batch, tiled=True)
        else:
            arrays = jax.device_get(batch)
        if self._speaks:
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **{k: x.astype(np.float32) if x.dtype.kind == "V" else x for k, x in arrays.items()})
        return f"{told}; batch saved to {path}"

    def explain(self, error: Exception) -> None:
        """Raises OutOfMemoryError for an allocation that failed; does nothing for other errors."""
        if out_of_memory.is_out_of_memory(error):
            raise out_of_memory.explain(error, self._program, self.compiled) from error

    def close(self) -> None:
        """Ends what is still open."""
        if self._profiler.running and self._step is not None:
            self._stop_profile(self._step)
        if self._statistics is not None:
            self._statistics.close()

    def _say(self, text: str) -> None:
        if self._speaks:
            print(text, flush=True)
