"""The training loop."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from axrepro.core.flops import speeds
from axrepro.core.interfaces import Method
from axrepro.core.param import abstract_params
from axrepro.core.sharding import make_mesh, named, param_partitions
from axrepro.data import Batches, batch_shardings, prefetch
from axrepro.errors import UserError
from axrepro.train.checkpoint import Checkpoints
from axrepro.train.diagnostics import Diagnosis
from axrepro.train.evaluate import Evaluator
from axrepro.train.experiment import Experiment
from axrepro.train.hardware import peak_flops
from axrepro.train.histograms import LINES, Alarm, shares
from axrepro.train.not_finite import Monitor
from axrepro.train.processes import on_first
from axrepro.train.provenance import check_workdir, record_config
from axrepro.train.saved import SavedStep, origin
from axrepro.train.signals import Preemption
from axrepro.train.state import Program, TrainState
from axrepro.train.step import train_step
from axrepro.train.workdir import Workdir
from axrepro.train.writers import Silent, Stopwatch, Writers


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
      state: the last state.   step: its step.   complete: whether all steps are done.
      resumed_from: the step of the checkpoint it started from; None for a new run.   scalars: the last logged ones.
      interrupted: whether SIGTERM came, be it after the last step: the caller goes on to nothing else.
    """

    state: TrainState[jax.Array]
    step: int
    complete: bool
    resumed_from: int | None
    scalars: dict[str, float]
    interrupted: bool = False


def build_program(experiment: Experiment) -> Program:
    """The experiment on all devices. Raises UserError where method, data and mesh do not fit."""
    devices = jax.devices()
    program = Program(experiment, make_mesh(experiment.mesh, devices), devices[0].platform.replace("cuda", "gpu"))
    shapes = {name: array.shape for name, array in experiment.data.abstract().items()}
    experiment.method.check(shapes, experiment.data.vocab_size)
    _ = program.shardings  # rules and mesh fit the parameters
    if options := compiler_options(experiment):
        try:
            jax.jit(lambda: 0).lower().compile(options)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"train.compiler_options={experiment.train.compiler_options!r}: {error}") from None
    return program


def compiler_options(experiment: Experiment) -> dict[str, str | bool]:
    """What the compiler of the step is told."""
    return dict(experiment.train.compiler_options)


def train(experiment: Experiment, workdir: Workdir, name: str, saved: SavedStep | None = None) -> Outcome:
    """Trains, evaluates and checkpoints; in a workdir with checkpoints it resumes from the last.

    Args:
      name: of the experiment; a workdir belongs to one.   saved: the compiled step, used if it is of this very run.
    Raises:
      UserError: for wrong input or a damaged checkpoint.
      NotFiniteError: for a loss or gradient that is inf or nan, see `Train.not_finite`.
      OutOfMemoryError: if a device has too little memory.
    """
    settings = experiment.train
    program = build_program(experiment)
    on_first(lambda: check_workdir(workdir, name))
    if settings.compilation_cache:
        if "://" not in settings.compilation_cache:
            try:
                Path(settings.compilation_cache).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"train.compilation_cache={settings.compilation_cache!r}: {error}") from None
        jax.config.update("jax_compilation_cache_dir", settings.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    checkpoints = Checkpoints(workdir, experiment.checkpoint.keep, experiment.checkpoint.keep_every)
    batches = prefetch(experiment.data.batches("train", settings.seed, program.run_mesh, experiment.rules))
    diagnosis = Diagnosis(program, workdir)
    try:
        evaluate = Evaluator(program)  # before the first step: held-out data that is missing ends no finished run
        resumed_from = checkpoints.latest_step()
        if resumed_from is None:
            state = first_state(program)
        else:
            if resumed_from > settings.steps:
                raise UserError(f"{workdir.address} is at step {resumed_from}, beyond train.steps={settings.steps}")
            checkpoint = checkpoints.restore(program.abstract_state)
            state = checkpoint.state
            try:
                batches.seek(checkpoint.data_position)
            except UserError as error:
                raise UserError(
                    f"checkpoint {checkpoints.folder / str(resumed_from)}: {error}; use the data it was made with, "
                    "or a new --workdir"
                ) from None
        # only now, when the checkpoint has turned out to fit
        writers = on_first(lambda: Writers(workdir, resumed_from or 0, settings.steps)) or Silent()
        try:
            on_first(lambda: record_config(workdir, name, experiment))
            with Preemption() as preemption:
                state, scalars = _run(
                    program, state, batches, evaluate, checkpoints, writers, preemption, diagnosis, saved
                )
        finally:
            diagnosis.close()
            writers.close()
    except jax.errors.JaxRuntimeError as error:
        diagnosis.explain(error)
        raise
    finally:
        batches.close()
        checkpoints.close()
    step = int(state.step)
    return Outcome(state, step, step >= settings.steps, resumed_from, scalars, preemption.received)


def first_state(program: Program) -> TrainState:
    """The state of a new run. Raises UserError if `train.init_from` holds no checkpoint, or one that does not fit."""
    settings = program.experiment.train
    read = {} if settings.init_from is None else _read_sources(program, settings.init_from)

    def first(seed, read):
        key = jax.random.fold_in(jax.random.key(seed), 2)  # apart from those of `Program.init`
        return program.init(seed, settings.conversion.apply(program.specs, read, key))

    # not as a constant, so that runs which differ in their seed alone share one compiled function
    return jax.jit(first, out_shardings=program.shardings)(np.uint32(settings.seed), read)


def _read_sources(program: Program, workdir: str) -> dict:
    """What `train.conversion` needs of a run's last checkpoint, split over the mesh by the run's rules."""
    checkpoints = Checkpoints(Workdir(workdir), read_only=True)
    try:
        saved = checkpoints.params_shapes()
        try:
            sources = program.experiment.train.conversion.sources(program.specs, saved)
        except UserError as error:
            raise UserError(f"train.init_from={workdir!r}: {error}") from None
        layout = named(
            program.run_mesh, param_partitions(sources, program.experiment.rules, dict(program.run_mesh.shape))
        )
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return checkpoints.restore_params(jax.tree.map(place, abstract_params(sources), layout))[0]
    finally:
        checkpoints.close()


def abstract_batch(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the program's data as it lies on its mesh, without the data."""
    experiment = program.experiment
    arrays = experiment.data.abstract()
    shardings = batch_shardings(arrays, program.run_mesh, experiment.rules)
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[name]) for name, a in arrays.items()}


def lower_step(program: Program, batch: dict) -> jax.stages.Lowered:
    """The train step, ready for the compiler. The state is donated."""
    out_shardings = (program.shardings, program.replicated)
    jitted = jax.jit(functools.partial(train_step, program), donate_argnums=0, out_shardings=out_shardings)
    return jitted.lower(program.abstract_state, batch)


def compile_step(
    program: Program, batch: dict, saved: SavedStep | None = None, tell: Callable[[str], None] = print
) -> jax.stages.Compiled:
    """The train step, compiled ahead of its first use: it cannot be compiled twice.

    Args:
      saved: one that was compiled before, taken in its place if it is the same.   tell: is told whether it was.
    """
    lowered, options = lower_step(program, batch), compiler_options(program.experiment)
    if saved is not None:
        if (difference := saved.difference(origin(program, lowered))) is None:
            try:
                compiled = saved.load(lowered, options)
            except jax.errors.JaxRuntimeError as error:
                difference = f"the device refuses it: {' '.join(str(error).split())[:200]}"
            else:
                tell("the step was read from the saved program, not compiled")
                return compiled
        tell(f"the saved program is not used: {difference}; compiling")
    return lowered.compile(options or None)


def _run(
    program, state, batches: Batches, evaluate: Evaluator, checkpoints, writers, preemption, diagnosis: Diagnosis, saved
) -> tuple[TrainState[jax.Array], dict[str, float]]:
    experiment, settings = program.experiment, program.experiment.train
    step = int(state.step)
    if step == settings.steps:
        writers.say(f"already complete at step {step}")
    rollout = _rollout(program)
    skipped = lambda step, text: writers.note(step, "skipped", f"skipped: {text}")
    alarm = Alarm(lambda step, text: writers.note(step, "alarm", text))
    monitor, meter = Monitor(settings, diagnosis.search, skipped), Meter(program, step, alarm)
    step_fn, scalars, details = None, {}, {}

    def report_saved(wait: bool) -> None:
        if (saved := checkpoints.finished(wait)) is not None:
            writers.say(f"saved checkpoint {checkpoints.folder / str(saved)}")

    while step < settings.steps:
        with meter.watch.waiting():
            batch = next(batches)
        batch = rollout(state, batch)
        if step_fn is None:
            step_fn = diagnosis.compiled = compile_step(program, batch, saved, writers.say)
            meter.watch.restart(step)
        meter.watch.leave_out(diagnosis.before(step + 1, state, batch))
        state, report = step_fn(state, batch)
        step += 1
        meter.watch.leave_out(diagnosis.after(step, state))
        monitor.push(step, state, batch, report)
        last, stop = step == settings.steps, preemption.asked(step)
        log = last or step % settings.log_every == 0
        hold_out = last or (experiment.eval.every is not None and step % experiment.eval.every == 0)
        save = last or stop or step % experiment.checkpoint.every == 0
        if log or hold_out or save:
            monitor.flush(state)
        if log:
            counts = {f"data/{name}": float(count) for name, count in batches.counts().items()}
            scalars = meter.scalars(step, report) | counts | monitor.scalars()
            details = meter.details(step, report)
        if stop and hold_out:  # before the evaluation, which may outlast the grace period
            checkpoints.save(state, batches.position())
            report_saved(wait=True)
        if hold_out:
            batches_held_out = None if last else experiment.eval.batches
            scalars = (scalars if log else {}) | evaluate(state.params, state.average, batches_held_out)
        if log or hold_out:
            writers.write(step, scalars, details if log else {})
        if save:
            report_saved(wait=True)  # the save before
            writers.publish()  # before the checkpoint, so that a resumed run misses no line
            checkpoints.save(state, batches.position())
        report_saved(wait=last or stop)
        if hold_out or save:
            meter.watch.restart(step)
        if stop and not last:
            writers.say(f"stopped by SIGTERM at step {step}; run the same command to go on")
            break
    return state, scalars


class Meter:
    """Turns a step's report into what is logged: what the step reported, and speed."""

    def __init__(self, program: Program, step: int, alarm: Alarm):
        settings = program.experiment.train
        self._alarm, self._last = alarm, settings.steps
        self._every = settings.log_every * max(1, settings.steps // (LINES * settings.log_every))
        data = program.experiment.data.abstract()
        shapes = {name: array.shape for name, array in data.items()}
        self.watch = Stopwatch(step)
        self._unit = "tokens" if "tokens" in shapes else "examples"
        self._units = (
            shapes["tokens"][0] * shapes["tokens"][1] if "tokens" in shapes else program.experiment.data.batch_size
        )
        self._flops, self._devices = program.experiment.method.flops(shapes), program.run_mesh.size
        self._peak = peak_flops(jax.devices())

    def details(self, step: int, report: dict) -> dict[str, dict]:
        """What of the report is no scalar, rounded: values by layer, and histograms as shares by layer and bin."""
        values = jax.device_get({name: report[name] for name in ("by_layer", "histograms")})
        self._alarm.look(step, values["histograms"])
        details = {"by_layer": {name: _rounded(value) for name, value in values["by_layer"].items()}}
        if step % self._every == 0 or step == self._last:
            loads = {name: shares(histogram.counts) for name, histogram in values["histograms"].items()}
            details["histograms"] = {name: _rounded(load) for name, load in loads.items()}
        return {name: value for name, value in details.items() if value}

    def scalars(self, step: int, report: dict) -> dict[str, float]:
        """The scalars of `step`, as Python floats; speeds since the last lap."""
        values = jax.device_get(report["scalars"])
        order = sorted(values, key=lambda name: (name.split("/")[-1] != "loss", name))  # what is minimised comes first
        scalars = {name: float(values[name]) for name in order}
        seconds, waited = self.watch.lap(step)
        scalars["step_time_s"], scalars["data_wait_s"] = seconds, waited
        scalars[f"{self._unit}_per_s"] = self._units / seconds
        return scalars | speeds(self._flops, seconds, self._devices, self._peak)


def _rounded(values: np.ndarray) -> list:
    return np.round(np.asarray(values, np.float64), 5).tolist()


def _rollout(program: Program) -> Callable[[TrainState[jax.Array], dict], dict]:
    """The method's `rollout` under jit; nothing at all for methods that have none."""
    method = program.experiment.method
    if type(method).rollout is Method.rollout:
        return lambda state, batch: batch

    @jax.jit
    def sample(state, batch):
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0x5A)  # apart from the keys of the phases
        return method.rollout(state.params, batch, program.context(key, train=False))

    return sample


def evaluate(experiment: Experiment, workdir: Workdir) -> tuple[int, dict[str, float]]:
    """The step of the last checkpoint in `workdir`, and its means over the whole held-out split.

    Raises:
      UserError: if there is no checkpoint, or it does not fit the experiment.
    """
    program = build_program(experiment)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        params, average, step = checkpoints.restore_averaged(program.abstract_state)
        return step, Evaluator(program)(params, average, None)
    finally:
        checkpoints.close()
