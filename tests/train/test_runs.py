"""Whole runs: kill, resume, signals, several processes, other meshes."""

import json
import random
import signal
import socket
import subprocess

import numpy as np
import pytest
from launched import ROOT, command, environment, launch, losses, params_of, start, stop_at


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by the runs of this module."""
    return f"--train.compilation_cache={tmp_path_factory.mktemp('compiled')}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """An uninterrupted run of 20 steps."""
    workdir = tmp_path_factory.mktemp("whole")
    done = launch(workdir, cache, "--train.steps=20", "--checkpoint.every=4", "--eval.every=7")
    assert done.returncode == 0, done.stderr
    return workdir


def assert_same_run(one, other, steps):
    """Every logged loss and every final parameter, to the last bit."""
    assert losses(one) == losses(other)
    a, b = params_of(one, steps), params_of(other, steps)
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(value, b[path], err_msg=path)


def test_a_run_leaves_what_is_promised(whole):
    assert {"config.json", "metrics.jsonl", "events", "checkpoints", "curve.png", "load.png"} <= {
        p.name for p in whole.iterdir()
    }
    assert sorted(losses(whole)) == list(range(1, 21))
    config = json.loads((whole / "config.json").read_text())
    assert config["config"]["train"]["steps"] == 20
    assert {"jax", "optax", "orbax-checkpoint"} <= set(config["versions"])
    line = json.loads((whole / "metrics.jsonl").read_text().split("\n")[19])
    speeds = {"step_time_s", "data_wait_s", "tokens_per_s", "tflops_per_device", "tflops_per_device_full"}
    assert {"loss", *speeds, "learning_rate", "eval/loss"} <= set(line)
    assert any(name.endswith("ffn/dropped") for name in line)
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(int(p.name) for p in (whole / "checkpoints").iterdir()) == [16, 20]  # checkpoint.keep=2
    assert any(p.name.startswith("events.out.tfevents") for p in (whole / "events").iterdir())


def test_a_killed_run_goes_on_to_the_same_losses_and_parameters(whole, cache, tmp_path):
    arguments = (cache, "--train.steps=20", "--checkpoint.every=4", "--eval.every=7")
    for lines in sorted(random.Random(0).sample(range(1, 20), 2)):
        assert stop_at(tmp_path, start(tmp_path, *arguments), lines) == -signal.SIGKILL
    assert launch(tmp_path, *arguments).returncode == 0
    assert_same_run(whole, tmp_path, 20)


@pytest.mark.slow
def test_five_kills_at_random_moments_change_nothing(tmp_path):
    arguments = ("--train.steps=60", "--checkpoint.every=7", "--eval.every=20")
    assert launch(tmp_path / "whole", *arguments).returncode == 0
    for lines in sorted(random.Random().sample(range(1, 60), 5)):
        assert stop_at(tmp_path / "killed", start(tmp_path / "killed", *arguments), lines) == -signal.SIGKILL
    assert launch(tmp_path / "killed", *arguments).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 60)


def test_sigterm_saves_and_exits_with_0(whole, cache, tmp_path):
    arguments = (cache, "--train.steps=20", "--checkpoint.every=100", "--eval.every=7")
    assert stop_at(tmp_path, start(tmp_path, *arguments), 3, signal.SIGTERM) == 0
    (saved,) = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert 3 <= saved < 20
    done = launch(tmp_path, *arguments)
    assert done.returncode == 0
    assert_same_run(whole, tmp_path, 20)


def test_a_complete_run_says_so_and_changes_nothing(whole, cache):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.parent.name != "events"}
    done = launch(whole, cache, "--train.steps=20", "--checkpoint.every=4", "--eval.every=7")
    assert done.returncode == 0
    assert "already complete at step 20" in done.stdout
    after = {p: p.stat().st_mtime_ns for p in before}
    changed = {p.name for p in before if before[p] != after[p]}
    assert changed <= {"metrics.jsonl", "curve.png", "load.png"}  # rewritten with the same content
    assert sorted(losses(whole)) == list(range(1, 21))


def test_a_checkpoint_continues_on_another_mesh(whole, cache, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    arguments = ("--train.steps=24", "--devices=8", "--mesh.data=2", "--mesh.fsdp=2", "--mesh.expert=2")
    done = launch(tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stderr
    straight = tmp_path / "straight"
    shutil.copytree(whole, straight)
    assert launch(straight, cache, "--train.steps=24").returncode == 0
    one, other = losses(straight), losses(tmp_path / "run")
    assert sorted(one) == sorted(other) == list(range(1, 25))
    for step in range(21, 25):
        np.testing.assert_allclose(one[step][:2], other[step][:2], rtol=1e-5)  # float32 sums in another order


def two_processes(workdir, *args) -> list[tuple[int, str]]:
    """Exit code and standard error of two launchers that train together."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            command(workdir, *args, "--devices=4", f"--coordinator=localhost:{port}", "--num_processes=2", i),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in ("--process_id=0", "--process_id=1")
    ]
    errors = [p.communicate(timeout=300)[1] for p in processes]
    return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]


def test_two_processes_train_like_one_with_the_same_devices(tmp_path):
    mesh = ("--train.steps=4", "--mesh.data=2", "--mesh.fsdp=2", "--mesh.expert=2")
    assert launch(tmp_path / "one", *mesh, "--devices=8").returncode == 0
    ended = two_processes(tmp_path / "two", *mesh)
    assert [code for code, _ in ended] == [0, 0], ended
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(one) == sorted(two) == [1, 2, 3, 4]
    for step in one:
        np.testing.assert_allclose(one[step][:2], two[step][:2], rtol=1e-5)  # gloo adds in another order


def test_what_the_first_process_finds_wrong_ends_all_of_them_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"experiment": "another"}')
    for code, error in two_processes(tmp_path):
        assert code == 2, error
        assert "holds a run of 'another'" in error.splitlines()[-1]
        assert "Traceback" not in error
