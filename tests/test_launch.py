"""The command line: what it sets up before jax starts, and what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from axrepro import launch
from axrepro.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def fresh(*args: str, **env: str) -> subprocess.CompletedProcess:
    """The launcher in a process of its own, without what the tests' set-up left in the environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL")}
    command = [sys.executable, "-m", "axrepro.launch", *args]
    return subprocess.run(command, cwd=ROOT, env=kept | env, capture_output=True, text=True, timeout=120)


def test_overrides_are_paths_with_or_without_their_root():
    args, overrides = launch.parse(["--experiment=a", "--experiment.train.steps=3", "--mesh.fsdp=2", "--data.x=1=2"])
    assert args.experiment == "a"
    assert overrides == {"train.steps": "3", "mesh.fsdp": "2", "data.x": "1=2"}


@pytest.mark.parametrize("argument", ["--exp=moe_tiny", "--work=x", "--device=8"])
def test_flags_are_not_abbreviated(argument):
    with pytest.raises(UserError, match="unknown argument"):
        launch.parse([argument])


def test_help_names_every_mode_and_how_to_override():
    done = fresh("--help")
    assert done.returncode == 0
    for mode in launch.MODES:
        assert mode in done.stdout
    for option in ("--experiment", "--workdir", "--devices", "--coordinator", "--num_processes", "--process_id"):
        assert option in done.stdout
    assert "--experiment.train.steps=100" in done.stdout


PLUGIN = """
import sys
from jax._src import xla_bridge

def factory(*args, **kwargs):
    print("a plugin looked for its hardware", file=sys.stderr)
    raise RuntimeError("no hardware")

def initialize():
    xla_bridge.register_backend_factory("absent", factory, priority=400)
"""


def test_installed_accelerator_software_without_its_hardware_makes_no_noise(tmp_path):
    plugin = tmp_path / "jax_plugins" / "absent" / "__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(PLUGIN)
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"PYTHONPATH": str(tmp_path)}
    plain = [sys.executable, "-c", "import jax; jax.devices()"]
    loud = subprocess.run(plain, env=environment, capture_output=True, text=True, timeout=120)
    assert "looked for its hardware" in loud.stderr  # the fault is real without the launcher
    done = fresh("--experiment=moe_dense:tiny", "--mode=describe", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("tasks", ["8", "", "many"])
def test_an_allocation_without_a_step_of_slurm_is_one_process(tasks):
    done = fresh("--experiment=moe_dense:tiny", "--mode=describe", SLURM_JOB_ID="1", SLURM_NTASKS=tasks)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_platform_that_is_not_there_is_one_line():
    done = fresh("--experiment=moe_dense:tiny", "--mode=describe", JAX_PLATFORMS="tpu")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("axrepro: error: no devices (JAX_PLATFORMS='tpu')")
    assert "Traceback" not in done.stderr


def test_nested_tuples_are_given_as_they_are_printed(capsys):
    options = "(('xla_cpu_enable_fast_math', 'false'), ('xla_backend_optimization_level', '1'))"
    arguments = ["--experiment=moe_dense:tiny", "--mode=describe", f"--train.compiler_options={options}"]
    assert launch.main(arguments) == 0
    assert f"compiler_options: {options}" in capsys.readouterr().out


def test_slices_have_the_mesh_rule_of_their_kind(capsys):
    arguments = ["--experiment=moe_29b", "--mode=describe", "--topology=2xv5p-512", "--mesh.data=2"]
    assert launch.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "v5p-1024: 512 devices, mesh rule 'v5p-.*'" in shown
    assert "data 2, fsdp 4, expert 64" in shown


def test_emulated_devices_are_as_many_as_asked_for():
    done = fresh("--experiment=moe_dense:tiny", "--mode=describe", "--devices=8", "--mesh.fsdp=4")
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu-8: 8 devices" in done.stdout
    assert "data 2, fsdp 4" in done.stdout


def test_the_mesh_rule_of_a_slice_applies_and_the_command_line_wins(capsys):
    assert launch.main(["--experiment=moe_29b", "--mode=describe", "--topology=v5p-1024"]) == 0
    ruled = capsys.readouterr().out
    assert "mesh rule 'v5p-.*'" in ruled
    assert "fsdp 8, expert 64" in ruled
    over = ["--mesh.expert=4", "--train.remat=full"]
    assert launch.main(["--experiment=moe_29b", "--mode=describe", "--topology=v5p-1024", *over]) == 0
    changed = capsys.readouterr().out
    assert "fsdp 128, expert 4" in changed
    assert "remat: 'full'" in changed


def test_a_reader_that_stops_reading_is_no_error():
    command = [sys.executable, "-m", "axrepro.launch", "--experiment=moe_29b", "--mode=describe", "--topology=v5p-1024"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
