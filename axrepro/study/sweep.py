"""The runs of a study: each is one that the launcher would make, and is made once.

A cell is an arm, a number of steps and a seed, whatever rule led to them. Its folder is the run's workdir and holds
`cell.json` once it is trained and scored. A sweep that was stopped, at whatever instant, goes on with the cell where it
was, from that run's last checkpoint. Several processes may share a folder: each cell is locked by the one that trains
it, and the others take the next (in a bucket there are no locks).
"""

import contextlib
import json
import math
import re
import shlex
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath

from axrepro import registry
from axrepro.core.config import differences, to_json
from axrepro.errors import UserError
from axrepro.launch import configured
from axrepro.study.files import BusyError, locked, read_json, write_json
from axrepro.study.held_out import Questions, leaks, make_questions, score_documents, score_questions
from axrepro.study.study import Arm
from axrepro.train.experiment import Experiment
from axrepro.train.loop import build_program, train
from axrepro.train.not_finite import NotFiniteError
from axrepro.train.out_of_memory import OutOfMemoryError
from axrepro.train.processes import from_first, on_first
from axrepro.train.workdir import Workdir
from axrepro.train.writers import read_metrics

_WAIT = 5.0  # seconds until cells that others hold are looked at again
_POINTS = 10  # of a loss curve
_END = 0.25  # of the logged steps whose routing counts as that of the end

Hardware = tuple[str, int, int]


def slug(arm: Arm, changes: Mapping[str, str]) -> str:
    """A name for files that tells arms and changes apart: the experiment's, and what was changed if anything was."""
    everything = repr((sorted(arm.changes), sorted(changes.items())))
    mark = f",{zlib.crc32(everything.encode()):08x}" if arm.changes or changes else ""
    return re.sub(r"[^\w=.,-]+", "_", arm.name)[:100] + mark


@dataclass(frozen=True)
class Cell:
    """A run of a study.

    Attributes:
      changes: what the user changed in all experiments, beside those of the arm.
    """

    arm: Arm
    steps: int
    seed: int
    changes: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> tuple:
        """Cells of one key are one run, whatever the arm is called."""
        return *self.arm.key, self.steps, self.seed

    @property
    def folder(self) -> str:
        """Below the study's."""
        return f"cells/{slug(self.arm, self.changes)}/steps{self.steps}_seed{self.seed}"

    @property
    def overrides(self) -> dict[str, str]:
        """What the run changes in its experiment. Its own number of steps: schedules stretch to it."""
        return {
            **dict(self.arm.changes),
            **self.changes,
            "train.steps": str(self.steps),
            "train.seed": str(self.seed),
        }

    def command(self, workdir: str) -> str:
        """The command that repeats it."""
        changes = [f"--experiment.{path}={value}" for path, value in self.overrides.items()]
        argv = [f"--experiment={self.arm.experiment}", f"--workdir={workdir}", *changes]
        return shlex.join(["python", "-m", "axrepro.launch", *argv])


def experiment_of(arm: Arm, hardware: Hardware, overrides: Mapping[str, str]) -> Experiment:
    """The experiment of an arm on some hardware, as the launcher would run it.

    Raises:
      UserError: naming the arm, if there is no such experiment, or a change does not fit it.
    """
    try:
        return configured(registry.find(arm.experiment, registry.index()), hardware, overrides)[0]
    except UserError as error:
        raise UserError(f"arm {arm.label!r}: {error}") from None


class StoppedError(Exception):
    """The sweep was asked to stop; the same command goes on."""


def run(
    cells: Iterable[Cell],
    folder: epath.Path,
    hardware: Hardware,
    questions: int,
    tell: Callable[[str], None],
) -> dict[tuple, str]:
    """Trains and scores what is not finished yet. Returns why cells failed, by their keys; the others went on.

    When it returns, no cell is left, whoever trained it.

    Args:
      questions: how many each model is asked.
    Raises:
      UserError: if nothing can be written, or a cell's folder holds another run.
      StoppedError: after SIGTERM, when the run has saved its state.
    """
    numbered = list(enumerate({cell.key: cell for cell in cells}.values(), start=1))
    open_, failed, asked = numbered, {}, {}
    if jax.config.values["jax_compilation_cache_dir"] is None and "://" not in str(folder):
        # cells that differ in their seed are one program; to start a cell again takes no compiling either
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    def attempt(number: int, cell: Cell) -> bool:
        """False if another process has the cell."""
        path, experiment = folder / cell.folder, experiment_of(cell.arm, hardware, cell.overrides)
        with contextlib.ExitStack() as held:
            if not from_first(lambda: _mine(path, held)):
                return False
            if from_first(lambda: _finished(path, experiment, questions)):
                return True
            tell(f"cell {number} of {len(numbered)}: {cell.arm.name}, {cell.steps} steps, seed {cell.seed}")
            if experiment.data not in asked:
                asked[experiment.data] = make_questions(experiment.data, questions), leaks(experiment.data)
            given_away = asked[experiment.data][1]
            if given_away:
                names = f"{', '.join(given_away):.300}"
                tell(f"training documents give away the held-out {names}; Decontaminated leaves them out")
            try:
                _run_cell(cell, experiment, path, *asked[experiment.data])
            except (NotFiniteError, OutOfMemoryError) as error:
                if jax.process_count() > 1 and isinstance(error, OutOfMemoryError):
                    raise  # the other processes may not have seen it
                failed[cell.key] = " ".join(str(error).split("\n")[0].split())
                tell(f"failed: {failed[cell.key]}")
        return True

    while open_:
        taken = [(number, cell) for number, cell in open_ if not attempt(number, cell)]
        if len(taken) == len(open_):
            time.sleep(_WAIT)
        open_ = taken
    return failed


def _finished(path: epath.Path, experiment: Experiment, questions: int) -> bool:
    """Whether a cell is. Raises UserError if it was trained or asked otherwise than it would be now."""
    found = read_json(path / "cell.json")
    if found is None:
        return False
    if (asked := sum(found["choice"]["asked"])) != questions:
        raise UserError(
            f"{path} was asked {asked} questions, not {questions}: set --study.questions={asked}, or choose another "
            "--workdir"
        )
    record = read_json(path / "config.json") or {}
    if changed := differences(record.get("config", {}), json.loads(to_json(experiment))):
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(changed[:4])}): undo the change, remove it, or "
            "choose another --workdir"
        )
    return True


def _mine(path: epath.Path, held: contextlib.ExitStack) -> bool:
    """Whether no other process works on the cell; then none will until `held` is closed."""
    try:
        held.enter_context(locked(path))
    except BusyError:
        return False
    return True


def _run_cell(
    cell: Cell, experiment: Experiment, path: epath.Path, questions: Questions, given_away: list[str]
) -> None:
    started, workdir = time.time(), Workdir(str(path))
    outcome = train(experiment, workdir, registry.find(cell.arm.experiment, registry.index()).name)
    if not outcome.complete:
        raise StoppedError
    program = build_program(experiment)
    params = program.averaged(outcome.state.params, outcome.state.average)
    documents = score_documents(program, params)
    answers = score_questions(program, params, questions)
    seconds = time.time() - started

    def write() -> None:
        record = {
            "experiment": cell.arm.experiment,
            "changes": dict(cell.arm.changes),
            "steps": cell.steps,
            "seed": cell.seed,
            "seconds": seconds,
            "resumed_from": outcome.resumed_from,
            "data": experiment.data.describe(),
            "given_away": given_away,
            "documents": {
                "names": list(documents.names),
                **{name: getattr(documents, name).tolist() for name in ("bytes", "bits", "tokens", "correct")},
            },
            "choice": {  # by document: questions about one are not independent of each other
                "asked": np.bincount(questions.document, minlength=len(documents.names)).tolist(),
                "correct": np.bincount(questions.document, answers, len(documents.names)).tolist(),
            },
            **history(read_metrics(workdir.local / "metrics.jsonl")),
        }
        write_json(path / "cell.json", record)

    on_first(write)
    if outcome.interrupted:
        raise StoppedError


def history(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's metrics: the way of its loss, its step time, and what its routers did at the end.

    "train" is the training loss of the text alone (those of routers are terms of "loss" too), means over parts of the
    run at the end of each: no token is seen twice in less than an epoch, and all runs meet the same ones.
    """
    logged = [line for line in lines if "step_time_s" in line]
    end = logged[-max(1, round(_END * len(logged))) :]
    routing = lambda name: name.split("/")[-1] in _ROUTING and not name.startswith(("eval/", "eval_raw/"))
    names = sorted({name for line in end for name in line if routing(name)})
    loads = [line["histograms"] for line in lines if line.get("histograms")][-max(1, len(end)) :]
    size = math.ceil(len(logged) / _POINTS)
    parts = [logged[first : first + size] for first in range(0, len(logged), size)]
    text = lambda line: line.get("loss/lm", line["loss"])
    return {
        "train": [[part[-1]["step"], statistics.fmean(map(text, part))] for part in parts],
        "scalars": {k: v for k, v in lines[-1].items() if k.startswith("eval/")},
        "step_time_s": statistics.median(line["step_time_s"] for line in logged),
        "routing": {name: statistics.fmean(line[name] for line in end if name in line) for name in names},
        "loads": {
            name: np.mean([line[name] for line in loads if name in line], 0).round(5).tolist()
            for name in (loads[-1] if loads else {})
        },
    }


_ROUTING = ("dropped", "max_violation", "router_entropy", "router_logit_square", "balance", "router_z")


def read(cell: Cell, folder: epath.Path) -> dict[str, Any] | None:
    """What a finished cell left; None if it is not finished."""
    return read_json(folder / cell.folder / "cell.json")
