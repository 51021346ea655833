"""A sweep: every cell once, whatever interrupts it; what it leaves can be repeated by its command."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from etils import epath

from axrepro import launch, registry
from axrepro.errors import UserError
from axrepro.study import sweep
from axrepro.study.__main__ import main
from axrepro.study.compare import assemble
from axrepro.study.files import locked, read_json
from axrepro.study.measured import measure_all
from axrepro.study.plan import Plan
from axrepro.study.study import Arm
from axrepro.study.sweep import Cell, read

ROOT = Path(__file__).resolve().parents[2]
HARDWARE = ("cpu-8", 8, 1)
CHANGES = {
    "data.sequence_length": "64",
    "data.batch_size": "64",
    "data.source.source.holdout": "300",
    "method.model.dim": "16",
    "method.model.layers.times": "1",
    "eval.batches": "1",
    "checkpoint.every": "10",
    "train.log_every": "5",
}
WHOLE = registry.load(registry.find("moe_vs_dense", registry.index(kind="Study")))
STUDY = replace(
    WHOLE, ladder=WHOLE.ladder[:1], ablations=(), seeds=(0, 1), rules=("wall_clock", "tokens"), rounds=3,
    round_steps=1, questions=8, tokens_per_parameter=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[epath.Path, Plan, list[str]]:
    """A small study, run whole."""
    folder, told = epath.Path(tmp_path_factory.mktemp("study")), []
    known = measure_all(STUDY, CHANGES, folder, HARDWARE, told.append)
    assert (known.study, known.missing) == (STUDY, ())
    plan = Plan(STUDY, known.facts, CHANGES)
    assert sweep.run(plan.cells(), folder, HARDWARE, STUDY.questions, told.append) == {}
    return folder, plan, told


def test_every_cell_is_trained_once_though_rules_share_some(finished):
    folder, plan, told = finished
    cells = list(plan.cells())
    runs = {cell.key for cell in cells}
    assert len(cells) == 2 * (2 + 2)
    assert len(runs) < len(cells)
    assert sum(text.startswith("cell ") for text in told) == len(runs) == len(list(folder.glob("cells/*/*/cell.json")))
    before = {path: path.stat().mtime for path in folder.glob("cells/*/*/*")}
    sweep.run(plan.cells(), folder, HARDWARE, STUDY.questions, told.append)
    assert {path: path.stat().mtime for path in folder.glob("cells/*/*/*")} == before


def test_a_cell_that_was_trained_with_other_settings_is_no_result_of_this_study(finished):
    folder, plan, told = finished
    cell = next(plan.cells())
    path = folder / cell.folder / "config.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"peak": 0.005', '"peak": 0.007'))
        with pytest.raises(UserError, match=r"was trained with other settings \(optimizer.learning_rate.peak"):
            sweep.run([cell], folder, HARDWARE, STUDY.questions, told.append)
    finally:
        path.write_text(text)


def test_step_times_are_measured_once_so_that_budgets_stay(finished):
    folder, plan, _ = finished
    told = []
    assert measure_all(STUDY, CHANGES, folder, HARDWARE, told.append).facts == plan.facts
    assert told == []
    path = folder / "step_times.json"
    text = path.read_text()
    try:
        path.write_text(text.replace("8 x cpu", "4 x TPU v5"))
        with pytest.raises(UserError, match=r"those of 4 x TPU v5.*and this is 8 x cpu"):
            measure_all(STUDY, CHANGES, folder, HARDWARE, told.append)
    finally:
        path.write_text(text)


def test_a_plan_is_printed_and_one_of_less_than_a_step_is_refused(finished, capsys):
    folder, plan, _ = finished
    there = lambda: sorted(path for path in Path(folder).rglob("*") if path.name != "lock")
    before = there()
    argv = [
        "moe_vs_dense", f"--workdir={folder}", "--plan", "--rungs=28k", "--no_ablations", "--study.questions=8",
        "--study.seeds=0,1", "--study.rules=wall_clock,tokens", "--study.tokens_per_parameter=8",
        *(f"--experiment.{path}={value}" for path, value in CHANGES.items()),
    ]  # fmt: skip
    assert main(argv) == 0
    *table, total = capsys.readouterr().out.splitlines()
    assert total.startswith(f"{len({cell.key for cell in plan.cells()})} runs, of which 0 are open: 0 minutes")
    assert {line.split()[0] for line in table[1:]} == {"dense_28k", "moe_28k"}
    assert main([*argv, "--study.tokens_per_parameter=1e-9"]) == 2
    assert "raise tokens_per_parameter or hours" in capsys.readouterr().err
    assert there() == before


def test_scores_agree_with_those_of_the_trainer(finished):
    folder, plan, _ = finished
    for cell in plan.cells():
        found = read(cell, folder)
        sums = {name: sum(found["documents"][name]) for name in ("bits", "bytes", "correct", "tokens")}
        assert sums["bits"] / sums["bytes"] == pytest.approx(found["scalars"]["eval/bits_per_byte"], rel=1e-5)
        assert sums["correct"] / sums["tokens"] == pytest.approx(found["scalars"]["eval/accuracy"], rel=1e-5)
        assert sum(found["choice"]["asked"]) == STUDY.questions
        assert all(c <= a for c, a in zip(found["choice"]["correct"], found["choice"]["asked"], strict=True))


def test_the_printed_command_gives_the_same_number(finished, tmp_path):
    folder, plan, _ = finished
    cell = next(cell for cell in plan.cells() if cell.arm == STUDY.ladder[0].sparse[0])
    row = assemble("moe_vs_dense", STUDY, CHANGES, folder).rows[2]
    assert row.facts.arm == cell.arm
    command, number = row.commands[row.seeds.index(cell.seed)].split("  # eval/bits_per_byte ")
    argv = shlex.split(command)[3:]
    argv = [f"--workdir={tmp_path}/again" if flag.startswith("--workdir") else flag for flag in argv]
    assert launch.main(argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/bits_per_byte"] == read(cell, folder)["scalars"]["eval/bits_per_byte"]
    assert f"{lines[-1]['eval/bits_per_byte']:.4f}" == number
    assert row.by_seed["bits_per_byte"][row.seeds.index(cell.seed)] == pytest.approx(float(number), abs=1e-4)


def test_the_comparison_has_every_arm_and_rule_and_pairs_its_seeds(finished):
    folder, plan, _ = finished
    results = assemble("moe_vs_dense", STUDY, CHANGES, folder)
    assert [(row.dense, row.rule) for row in results.rows] == [
        (dense, rule) for dense in (True, False) for rule in STUDY.rules
    ]
    dense, sparse = results.rows[0], results.rows[2]
    assert sparse.hours == pytest.approx(dense.hours, rel=0.5 / sparse.steps + 1e-6)
    assert sparse.seeds == (0, 1)
    cells = {
        row.dense: [read(plan.cell(row.facts.arm, row.steps, s), folder) for s in (0, 1)] for row in (dense, sparse)
    }
    mean = lambda cells: sum(c["scalars"]["eval/bits_per_byte"] for c in cells) / len(cells)
    assert sparse.scores["bits_per_byte"].value == pytest.approx(mean(cells[False]), rel=1e-5)
    assert sparse.gain["bits_per_byte"].value == pytest.approx(mean(cells[False]) - mean(cells[True]), abs=1e-5)
    assert len(sparse.curves) == 2
    assert sparse.curves[0][-1][0] == pytest.approx(sparse.hours)
    assert [sum(layer) for layer in sparse.loads] == pytest.approx([1], abs=1e-3)


def test_cells_that_are_missing_are_named(finished):
    folder, _, _ = finished
    more = replace(STUDY, seeds=(0, 1, 7))
    results = assemble("moe_vs_dense", more, CHANGES, folder, ["one that failed"])
    assert results.not_run[0] == "one that failed"
    assert all(row.missing == (7,) for row in results.rows)


def test_a_cell_whose_loss_is_not_finite_is_told_and_the_others_go_on(tmp_path):
    folder, told = epath.Path(tmp_path), []
    broken = Arm(label="broken", experiment="dense_28k", changes=(("optimizer.learning_rate.peak", "1e30"),))
    cells = [Cell(arm, 12, 0, CHANGES) for arm in (broken, STUDY.ladder[0].dense)]
    failed = sweep.run(cells, folder, HARDWARE, 4, told.append)
    assert list(failed) == [cells[0].key]
    assert read(cells[0], folder) is None
    assert read(cells[1], folder)["steps"] == 12


def test_cells_of_other_arms_steps_seeds_and_changes_have_folders_of_their_own():
    arms = [*STUDY.trained()]
    cells = [
        Cell(a, steps, seed, changes) for a in arms for steps in (1, 2) for seed in (0, 1) for changes in ({}, CHANGES)
    ]
    assert len({cell.folder for cell in cells}) == len(cells)
    assert all(
        set(cell.folder) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_=.,-/")
        for cell in cells
    )


def test_a_folder_is_worked_in_by_one_process_at_a_time(tmp_path):
    again = lambda: locked(epath.Path(tmp_path))
    with again(), pytest.raises(UserError, match="another process works in"), again():
        pass
    with again():
        pass


def command(workdir) -> list[str]:
    """A study of one rung whose runs take some seconds."""
    fields = {**CHANGES, "data.batch_size": "8"}
    return [
        sys.executable, "-m", "axrepro.study", "moe_vs_dense", f"--workdir={workdir}", "--rungs=28k", "--no_ablations",
        "--study.seeds=0,1", "--study.tokens_per_parameter=4", "--study.rounds=2", "--study.round_steps=1",
        "--study.questions=4", "--study.rules=tokens",
        *(f"--experiment.{path}={value}" for path, value in fields.items()),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_ends_with_the_numbers_of_one_that_was_not(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    start = lambda name: subprocess.Popen(
        command(tmp_path / name), cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    whole = start("whole")
    killed = {signal.SIGKILL: None, signal.SIGTERM: None}
    for sort in killed:
        process = start("killed")
        seen = 0
        for line in process.stdout:
            seen += line.startswith("saved checkpoint")
            if seen == 2:
                process.send_signal(sort)
                break
        killed[sort] = process.wait(timeout=120), process.stdout.read(), process.stderr.read()
        assert not list((tmp_path / "killed").glob("study.md"))
    assert killed[signal.SIGKILL][0] == -signal.SIGKILL
    assert killed[signal.SIGTERM][0] == 0, killed[signal.SIGTERM][2]
    assert "stopped; the same command goes on" in killed[signal.SIGTERM][1]
    last = start("killed")
    assert whole.communicate(timeout=240)[1] == ""
    _, err = last.communicate(timeout=240)
    assert (whole.returncode, last.returncode, err) == (0, 0, "")
    cells = {
        name: {
            p.relative_to(tmp_path / name).as_posix(): read_json(epath.Path(p))
            for p in (tmp_path / name).glob("cells/*/*/cell.json")
        }
        for name in ("whole", "killed")
    }
    assert len(cells["whole"]) == 4
    assert cells["whole"].keys() == cells["killed"].keys()
    for path, cell in cells["whole"].items():
        for name in ("documents", "choice", "train"):
            assert cell[name] == cells["killed"][path][name]
    assert any(cell["resumed_from"] for cell in cells["killed"].values())
    assert time.time() - (tmp_path / "killed/study.md").stat().st_mtime < 240
