"""How long the steps of several models take on the hardware that is attached.

All are compiled first. Then they take turns: in each round every model takes some steps, and each round begins with
another one, so that a machine that becomes slower or faster does so for all. A turn begins with steps that do not
count. Between turns a model leaves the devices, so that models which fit one by one are compared even if they do not
fit together. One that does not fit by itself is left out.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import numpy as np

from axrepro.study.breakdown import profiled_parts
from axrepro.train.experiment import Experiment
from axrepro.train.loop import build_program, compile_step
from axrepro.train.out_of_memory import OutOfMemoryError, explain, is_out_of_memory

T = TypeVar("T")
WARM_UP = 2  # steps of each turn that do not count


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one model.

    Attributes:
      rounds: seconds per step in each round.   parts: seconds per step by part of the model, of one profile.
      memory: bytes on a device, as compiled; None where the compiler does not tell.
    """

    rounds: tuple[float, ...]
    parts: Mapping[str, float]
    memory: int | None


class _Turns:
    """One model, ready to take steps on a batch of its own data; raises OutOfMemoryError if it does not fit."""

    def __init__(self, experiment: Experiment):
        self._program = build_program(experiment)
        batches = experiment.data.batches("train", experiment.train.seed, self._program.run_mesh, experiment.rules)
        self._batch = next(batches)
        batches.close()
        self._init = jax.jit(self._program.init, out_shardings=self._program.shardings)
        compiled = None
        try:
            self._step = compiled = compile_step(self._program, self._batch)
            self.take(1)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise explain(error, self._program, compiled) from error

    def take(self, steps: int) -> float:
        """Seconds per step of so many, after some that do not count."""
        state = self._init(np.uint32(0))
        for _ in range(WARM_UP):
            state, _ = self._step(state, self._batch)
        jax.block_until_ready(state)
        started = time.perf_counter()
        for _ in range(steps):
            state, _ = self._step(state, self._batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - started) / steps

    def parts(self, seconds: float) -> Mapping[str, float]:
        """What a step of so many seconds goes to."""
        text = self._step.as_text() or ""
        return profiled_parts(self._step, self._init(np.uint32(0)), self._batch, text, seconds)[1]

    def memory(self) -> int | None:
        """Arguments and temporaries; outputs take the place of arguments."""
        analysis = self._step.memory_analysis()
        return None if analysis is None else analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def in_turns(timed: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each function returned in each round; every round begins with another one."""
    names = list(timed)
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds if names else 0):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(timed[name]())
    return found


def measure(
    experiments: Mapping[str, Experiment], rounds: int, steps: int, tell: Callable[[str], None] = print
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Step times of experiments by name, and of those that the devices have no memory for, what they said.

    Args:
      steps: of each experiment in each round.
    Raises:
      UserError: for an experiment that does not fit the mesh or its data.
      OutOfMemoryError: with several processes, which may not all have seen it.
    """
    turns, failed = {}, {}
    for number, (name, experiment) in enumerate(experiments.items(), start=1):
        tell(f"compiling {name} ({number} of {len(experiments)})")
        try:
            turns[name] = _Turns(experiment)
        except OutOfMemoryError as error:
            if jax.process_count() > 1:
                raise
            failed[name] = str(error).split("\n")[0]
            tell(f"{name} is left out: {failed[name]}")
    tell(f"measuring step times: {rounds} rounds of {steps} steps")
    times = in_turns({name: partial(turn.take, steps) for name, turn in turns.items()}, rounds)
    middle = lambda values: sorted(values)[len(values) // 2]
    found = {
        name: Measured(rounds=tuple(times[name]), parts=turn.parts(middle(times[name])), memory=turn.memory())
        for name, turn in turns.items()
    }
    return found, failed
