"""A step that one process compiled is run by another, which does not compile it; of any other step it says so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from launched import environment, lines_of

from axrepro import registry
from axrepro.core.config import override
from axrepro.errors import UserError
from axrepro.launch import main
from axrepro.train.loop import abstract_batch, build_program, compile_step, first_state
from axrepro.train.saved import read

CHANGES = {
    "method.model.layers.times": "1",
    "data.sequence_length": "32",
    "data.source.holdout": "1000",
    "eval.batches": "1",
    "train.steps": "2",
    "train.log_every": "1",
}
SMALL = ("--experiment=llama:tiny", *(f"--{path}={value}" for path, value in CHANGES.items()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A program for eight devices, by the launcher, whose compiler runs in a process of its own."""
    path = str(tmp_path_factory.mktemp("saved") / "step")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        assert main([*SMALL, "--mode=compile", "--topology=cpu-8", f"--save={path}"]) == 0
    return path


def test_a_saved_step_is_run_in_place_of_a_compiled_one_and_is_the_same(saved, tmp_path, capsys):
    assert main([*SMALL, f"--workdir={tmp_path}", f"--program={saved}"]) == 0
    assert "the step was read from the saved program, not compiled" in capsys.readouterr().out

    experiment = override(registry.load(registry.find("llama:tiny", registry.index())), CHANGES)
    program, told, losses = build_program(experiment), [], []
    # only what the file holds is loaded: where the device refuses it, the step is compiled
    spoilt = replace(read(saved), executable=b"no program")
    step = compile_step(program, abstract_batch(program), spoilt, told.append)
    assert [text.startswith("the saved program is not used: the device refuses it: ") for text in told] == [True]
    state, batches = first_state(program), experiment.data.batches("train", 0, program.mesh, experiment.rules)
    for _ in range(2):
        state, report = step(state, next(batches))
        losses.append(float(report["scalars"]["loss"]))
    assert [json.loads(line)["loss"] for line in lines_of(tmp_path)] == losses


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("jaxlib", "0.4.1", "it is for jaxlib 0.4.1, and this is "),
        ("hardware", "v5p-8", "it is for hardware v5p-8, and this is cpu-8"),
        ("places", [[0, 1, 0], [0, 0, 0]], "its devices stand in another order"),
        ("step", "0", "it is of another step: the same settings in other code"),
    ],
)
def test_what_keeps_a_program_from_being_that_of_a_run_is_told(saved, name, value, told):
    step = read(saved)
    assert step.difference(step.origin) is None
    other = replace(step, origin={**step.origin, name: value})
    assert other.difference(step.origin).startswith(told)


def test_the_settings_of_another_step_are_told(saved):
    step = read(saved)
    config = json.loads(json.dumps(step.origin["config"]))
    config["train"]["remat"] = "full"
    other = {**step.origin, "step": "0", "config": config}
    assert step.difference(other) == "it is of another step: train.remat: 'none' -> 'full'"


def test_a_file_that_is_no_program_or_damaged_ends_in_one_line(saved, tmp_path):
    content = Path(saved).read_bytes()
    damaged = content[:-1] + bytes([content[-1] ^ 1])
    files = {"cut": content[:-1], "changed": damaged, "text": b"{}\n", "empty": b"", "pickle": b"\x80\x04N."}
    for name, bad in files.items():
        (tmp_path / name).write_bytes(bad)
    for name in files:
        told = "is damaged: " if name in ("cut", "changed") else "is no program that --mode=compile --save=FILE wrote"
        with pytest.raises(UserError, match=told):
            read(str(tmp_path / name))
    with pytest.raises(UserError, match=r"cannot read the program .*No such file"):
        read(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--save=x"], "--save goes with --mode=compile"),
        (["--program=x", "--mode=describe"], "--program goes with --mode=train"),
        (["--program="], "--program= is empty"),
        (["--mode=compile", "--topology=v5p-8", "--search", "--save=x"], "--save is about one forecast"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(args, told, capsys):
    assert main(["--experiment=moe_dense:tiny", *args]) == 2
    assert told in capsys.readouterr().err
