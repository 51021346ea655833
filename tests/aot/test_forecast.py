"""Forecasts agree with themselves, with what follows from the config alone, and with what a search finds."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import jaxtyping
import pytest

from axrepro import launch, registry
from axrepro.aot import report
from axrepro.aot.forecast import forecast
from axrepro.aot.search import search
from axrepro.aot.slices import Slice, find_slice
from axrepro.core.config import override
from axrepro.train.effect import effect
from axrepro.train.experiment import Experiment, on_hardware
from axrepro.train.hardware import CHIPS, slice_name

ROOT = Path(__file__).resolve().parents[2]
TINY = "llama:tiny"
CUBE, SQUARE = Slice(kind="v5p", shape=(2, 2, 2)), Slice(kind="v6e", shape=(2, 2))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The launcher runs in this process, on the devices that the tests have set up; programs are read unchecked."""
    monkeypatch.setattr(launch, "set_up_platform", lambda args: None)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compiler():
    pytest.importorskip("libtpu", reason="programs for TPUs need their compiler: pip install libtpu")


def tiny(hardware: str, **overrides: str) -> Experiment:
    experiment, _ = on_hardware(registry.load(registry.find(TINY, registry.index())), hardware)
    return override(experiment, {path.replace("__", "."): value for path, value in overrides.items()})


def run(capsys, *arguments: str) -> tuple[int, str]:
    code = launch.main([f"--experiment={TINY}", "--mode=compile", *arguments])
    captured = capsys.readouterr()
    assert code != 2, captured.err
    return code, captured.out


FAST = "(('xla_backend_optimization_level','0'),)"  # to compile


def test_a_step_on_emulated_devices_computes_what_the_config_says_and_is_not_timed():
    plain = {"method__model__layers__layer__attention__implementation": "xla"}  # "rows" computes its logits twice
    found = forecast(tiny("cpu-8", train__remat="none", train__compiler_options=FAST, **plain), 8)
    assert (found.devices, found.chip, found.time, dict(found.speed), found.fits) == (8, None, None, {}, True)
    assert found.program.flops() == pytest.approx(found.effect.flops.full / 8, rel=0.001)
    assert found.program.recomputed() == 0
    assert 0 < found.memory.temporaries < found.memory.total


DOCUMENTED = {
    "experiment", "hardware", "devices", "mesh", "compile_seconds", "memory", "flops", "collectives", "findings",
    "host_transfers",
}  # fmt: skip
TIMED = {"step_seconds", "mfu", "mfu_full", "tokens_per_second", "tokens_per_day", "breakdown"}


def test_the_figures_of_a_slice_agree_with_each_other(compiler, capsys):
    code, out = run(capsys, "--topology=v5p:2x2x2", "--json", "--flags=default")
    figures = json.loads(out)
    assert code == 0
    assert set(figures) == DOCUMENTED | TIMED | {"usd_per_billion_tokens", "checkpoint_share"}
    experiment, chip = tiny("v5p-16"), CHIPS["v5p"]
    tokens = experiment.data.batch_size * experiment.data.sequence_length
    seconds, flops, memory = figures["step_seconds"], figures["flops"], figures["memory"]
    assert (figures["hardware"], figures["devices"]) == ("v5p-16", 8)
    assert figures["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert figures["tokens_per_day"] == pytest.approx(24 * 3600 * tokens / seconds)
    for name, counted in (("mfu", "model"), ("mfu_full", "model_full")):
        assert figures[name] == pytest.approx(flops[counted] / (chip.tflops * 1e12 * seconds))
    hours = 1e9 / tokens * seconds / 3600
    assert figures["usd_per_billion_tokens"] == pytest.approx(8 * chip.price.usd * hours)
    assert sum(figures["breakdown"].values()) == pytest.approx(seconds)
    assert flops["executed"] - flops["recomputed"] == pytest.approx(flops["model_full"], rel=0.001)
    assert memory["fits"]
    assert memory["peak"] <= memory["total"] < memory["capacity"] < chip.hbm_gib * 1.01 * 2**30
    assert sum(row["bytes"] for row in memory["largest"]) <= memory["peak"]
    # what a data-parallel step sums are the gradients, of four bytes, in one or several collectives
    found = sum(row["sent"] for row in figures["collectives"] if row["kind"] == "all-reduce")
    trained = 4 * effect(experiment, "v5p-16", 8).total
    assert found == pytest.approx(2 * 7 / 8 * trained, rel=0.05)


LARGE = {"train.remat": "none", "data.batch_size": "65536", "data.sequence_length": "256"}


@pytest.mark.slow  # five programs
def test_a_step_that_does_not_fit_ends_with_code_3_and_what_would_help(compiler, capsys):
    code, out = run(capsys, "--topology=v6e:2x2", "--json", *(f"--{path}={value}" for path, value in LARGE.items()))
    figures = json.loads(out)
    assert code == 3
    assert not figures["memory"]["fits"]
    assert figures["memory"]["total"] > figures["memory"]["capacity"]
    assert figures["memory"]["largest"][0]["bytes"] >= 65536 // 4 * 256 * 264 * 2  # logits
    changes = [trial["changes"] for trial in figures["remedies"]]
    assert len(changes) == len({json.dumps(one) for one in changes}) == 4
    assert {"train.remat": "full"} in changes
    least = min(trial["memory"]["total"] for trial in figures["remedies"] if "memory" in trial)
    assert least < figures["memory"]["total"]


@pytest.mark.slow  # some fifteen programs
def test_a_search_ranks_what_it_tried_and_names_settings_that_the_command_takes(compiler, capsys):
    experiment, told = tiny("v6e-4"), []
    trials = search(experiment, SQUARE, told.append)
    assert len(trials) == len({one.changes for one in trials}) == len(told) > 5
    assert [one.seconds for one in trials] == sorted(one.seconds for one in trials)
    meshes = {tuple(value for path, value in one.changes if path.startswith("mesh.")) for one in trials}
    assert len(meshes) > 1
    assert len({dict(one.changes)["train.remat"] for one in trials}) > 1
    best = trials[0]
    code, out = run(capsys, "--topology=v6e:2x2", "--json", *best.line.split())
    assert code == 0
    assert json.loads(out)["step_seconds"] == pytest.approx(best.seconds)
    assert best.forecast is not None
    assert json.loads(out)["memory"]["total"] == best.forecast.memory.total


@pytest.mark.parametrize("more", [(), ("--search",)])
def test_without_the_compiler_the_command_says_what_to_install(more, tmp_path):
    """Packages come from a folder that links to all that are installed but the compiler, also in other processes."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("libtpu"):
            (tmp_path / entry.name).symlink_to(entry)
    arguments = (f"--experiment={TINY}", "--mode=compile", "--topology=v5p:2x2x2", *more)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "axrepro.launch", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=120, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("axrepro: error: ")
    assert done.stderr.count("\n") == 1
    assert "pip install axrepro[tpu]" in done.stderr


def test_recomputed_arithmetic_is_told_apart_and_the_report_says_in_words_what_the_figures_say(compiler):
    assert find_slice("v6e-4") == SQUARE
    found = forecast(tiny("v6e-4", train__remat="full"), SQUARE)
    whole, again = found.effect.flops.full / 4, found.program.recomputed()
    assert found.program.flops() - again == pytest.approx(whole, rel=0.001)
    # one of three passes is done again, but for the head and the last product of a block
    assert whole / 8 < again < whole / 3
    out = report.text(TINY, found)
    assert f"{slice_name('v6e', 4)}: 4 devices, mesh " in out
    assert f"{found.time.seconds:.3f} s" in out
    assert f"{found.speed['mfu']:.1%}" in out
    shares = [float(share) for share in re.findall(r"^ +([\d.]+)% +[\d.]+ s  ", out, re.M)]
    assert 98.5 < sum(shares) <= 100.5
    assert "\\'" not in out  # names of parameters as they are written


def test_what_is_offloaded_goes_to_the_host_and_back_once(compiler):
    more = {"train__remat": "offload_qkv", "method__model__layers__layer__attention__head_dim": "128"}  # whole tiles
    found = forecast(tiny("v6e-4", **more), SQUARE)
    rows, length, heads, layers = 8 // 4, 64, 4 + 2 + 2, 2  # of queries, keys and values
    size = rows * length * heads * 128 * 4 * layers
    assert report.summary(found)["host_transfers"] == {"to_host": size, "from_host": size}
    assert "MiB there and" in report.text(TINY, found)


WRONG = {
    "no such slice": (("--topology=v5p:8x8x9",), "8x8x9", "v5p-1152"),
    "no such slice, and a mesh that does not fit it": (("--topology=v5p-1026", "--mesh.fsdp=3"), "513 chips"),
    "emulated devices": (("--topology=v5p-8", "--devices=8"), "--devices", "--topology=v5p-8"),
    "a workdir": (("--topology=v5p-8", "--workdir=here"), "--workdir", "does nothing"),
    "no topology": ((), "--mode=compile needs --topology=SLICE", "cpu-8"),
    "unknown topology": (("--topology=v9-8",), "v9-8", "v5p"),
    "topology that is not to be had": (("--topology=v5p:3x3x3",), "3x3x3", "v5p"),
    "topology in words": (("--topology=eight",), "'eight'", "v5p-1024"),
    "search on GPUs": (("--topology=h100-8", "--search"), "--search", "h100-8"),
    "mesh of other devices": (("--topology=v5p:2x2x2", "--mesh.data=3"), "8", "3"),
    "batch that devices do not divide": (("--topology=v5p:2x2x2", "--data.batch_size=12"), "12", "batch"),
    "search without times": (("--topology=cpu-8", "--search"), "--search", "cpu-8", "TPU"),
    "flags of no kind": (("--topology=cpu-8", "--flags=fast"), "--flags", "'fast'", "default"),
    "unknown field": (("--topology=cpu-8", "--train.stepz=3"), "stepz", "steps"),
    "json of another mode": (("--mode=describe", "--json"), "--json goes with --mode=compile", "describe"),
    "search in another mode": (("--mode=train", "--search"), "--search goes with --mode=compile", "train"),
    "flags in another mode": (("--mode=eval", "--flags=default"), "--flags goes with --mode=compile", "eval"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_line(name, capsys, tmp_path, monkeypatch):
    arguments, *words = WRONG[name]
    monkeypatch.chdir(tmp_path)
    mode = () if any(argument.startswith("--mode") for argument in arguments) else ("--mode=compile",)
    code = launch.main([f"--experiment={TINY}", *mode, *arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured
    assert captured.err.startswith("axrepro: error: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert not list(tmp_path.iterdir())
