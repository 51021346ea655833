"""Wrong input is one clear line, exit code 2, and nothing is changed on disk."""

import shutil
from pathlib import Path

import pytest
from runs import SMALL, launch

from axrepro import launch as launcher

FIRST_MOE = "--method.model.layers.layer.layers.1.ffn"
V5P = ("--mode=describe", "--topology=v5p-1024")
FAULTS = {
    "unknown experiment": (("--experiment=moe_tinny",), "moe_tinny", "moe_tiny"),
    "unknown file": (("--experiment=moe_dens:tiny",), "moe_dens:tiny", "moe_dense:tiny"),
    "no experiment": ((), "--experiment=NAME is missing"),
    "unknown flag": (("--experiment=moe_tiny", "--workdri=x"), "workdri", "workdir"),
    "positional": (("--experiment=moe_tiny", "train.steps=1"), "train.steps=1"),
    "override without value": (("--experiment=moe_tiny", "--train.steps"), "needs a value"),
    "unknown mode": (("--experiment=moe_tiny", "--mode=trian"), "trian", "train"),
    "unknown field": (("--experiment=moe_tiny", "--train.stepz=3"), "stepz", "steps"),
    "unknown deep field": (("--experiment=moe_tiny", "--method.model.lyers.times=3"), "lyers", "layers"),
    "wrong type": (("--experiment=moe_tiny", "--train.steps=many"), "train.steps='many'", "int"),
    "not one of": (("--experiment=moe_tiny", "--train.dtype=float8"), "float8", "bfloat16"),
    "a group": (("--experiment=moe_tiny", "--train=3.0", "--train.x=1"), "--train=3.0"),
    "group as value": (("--experiment=moe_tiny", "--method.model=3"), "method.model", "CausalLM"),
    "below range": (("--experiment=moe_tiny", "--train.steps=0"), "train.steps=0", "at least 1"),
    "no devices": (("--experiment=moe_tiny", "--devices=0"), "--devices=0", "at least 1"),
    "mesh too large": (("--experiment=moe_tiny", "--mode=describe", "--mesh.fsdp=3", "--mesh.data=1"), "3 devices"),
    "two rests": (("--experiment=moe_tiny", "--mode=describe", "--mesh.fsdp=-1"), "only one axis can be -1"),
    "zero axis": (("--experiment=moe_tiny", "--mode=describe", "--mesh.fsdp=0"), "mesh.fsdp=0"),
    "unknown topology": (("--experiment=moe_29b", "--mode=describe", "--topology=v9-8"), "v9-8", "v5p"),
    "odd topology": (("--experiment=moe_29b", "--mode=describe", "--topology=v5p-9"), "v5p-9", "multiple of 2"),
    "batch over mesh": (
        ("--experiment=moe_tiny", "--mode=describe", "--topology=cpu-8", "--data.batch_size=12"),
        "12",
        "batch",
    ),
    "experts over mesh": (
        ("--experiment=moe_29b", "--mode=describe", "--topology=v5p-1024", "--mesh.fsdp=4", "--mesh.expert=128"),
        "expert",
        "64",
    ),
    "accumulation": (("--experiment=moe_tiny", "--train.grad_accumulation=3"), "train.grad_accumulation=3"),
    "heads": (("--experiment=moe_tiny", "--method.model.dim=130", "--mode=describe"), "130", "num_heads"),
    "top-k": (("--experiment=moe_tiny", "--mode=describe", f"{FIRST_MOE}.router.k=9"), "k=9"),
    "remat": (("--experiment=moe_tiny", "--train.remat=ful", "--workdir={tmp}/x"), "ful", "full"),
    "vocabulary": (("--experiment=moe_tiny", "--method.model.vocab_size=200", "--workdir={tmp}/x"), "vocab_size"),
    "missing data": (("--experiment=dense_6b", "--workdir={tmp}/x"), "data/vocabulary.model"),
    "no workdir": (("--experiment=moe_tiny", "--workdir=/proc/nothing/x"), "/proc/nothing/x"),
    "evaluate nothing": ((*SMALL, "--mode=eval", "--workdir={tmp}/x"), "no checkpoint"),
    "process flags": (("--experiment=moe_tiny", "--coordinator=localhost:1"), "--num_processes"),
    "process id": (
        ("--experiment=moe_tiny", "--coordinator=localhost:1", "--num_processes=2", "--process_id=2"),
        "--process_id=2",
    ),
    "no slice": (("--experiment=moe_29b", "--mode=describe", "--topology=0xv5p-8"), "0xv5p-8", "at least 1"),
    "slices over mesh": (("--experiment=moe_29b", "--mode=describe", "--topology=2xv5p-512"), "set mesh.data=2"),
    "odd head": (("--experiment=moe_tiny", "--mode=describe", "--method.model.dim=100"), "head_dim 25"),
    "no layers": (("--experiment=moe_tiny", "--mode=describe", "--method.model.layers.times=0"), "times=0"),
    "no such home": (("--experiment=moe_tiny", "--workdir=~nobody-has-this-name/x"), "~nobody-has-this-name"),
    "a rate below 0": (
        ("--experiment=moe_tiny", "--optimizer.learning_rate.peak=-1"),
        "optimizer.learning_rate.peak=-1.0",
    ),
    "long warm-up": (
        ("--experiment=moe_tiny", "--mode=describe", "--topology=cpu-1", "--optimizer.learning_rate.warmup=5000"),
        "optimizer.learning_rate.warmup=5000",
        "train.steps",
    ),
    "no such parameter": (
        ("--experiment=moe_tiny", "--mode=describe", "--topology=cpu-1", "--optimizer.update_scale=(('**/fn/*',0.5),)"),
        "optimizer.update_scale: '**/fn/*' matches no trained parameter",
    ),
    "scales as no pairs": (
        ("--experiment=moe_tiny", "--optimizer.update_scale=**/ffn/*,0.5"),
        "optimizer.update_scale='**/ffn/*,0.5'",
        "tuple[tuple[str, float], ...]",
    ),
    "raw of no average": (("--experiment=moe_tiny", "--eval.raw=true"), "eval.raw=True", "average"),
    "explain while training": (("--experiment=moe_tiny", "--explain=train.steps"), "--explain", "--mode=describe"),
    "diff while evaluating": (("--experiment=moe_6b", "--mode=eval", "--diff=moe_13b"), "--diff", "--mode=describe"),
    "explain and diff": (
        ("--experiment=moe_6b", "--mode=describe", "--diff=moe_13b", "--explain=train"),
        "--explain",
        "--diff",
    ),
    "explain unknown": (("--experiment=moe_6b", *V5P, "--explain=experiment.train.stepz"), "stepz", "steps"),
    "explain below a value": (("--experiment=moe_6b", *V5P, "--explain=train.steps.x"), "train.steps is a value"),
    "explain with a wrong override": (("--experiment=moe_6b", *V5P, "--explain=train", "--trian.steps=1"), "trian"),
    "diff with an unknown experiment": (("--experiment=moe_6b", *V5P, "--diff=moe_7b"), "moe_7b", "moe_6b"),
    "diff with an override for one": (
        ("--experiment=moe_6b", *V5P, "--diff=dense_6b", "--method.model.layers.layer.layers.3.ffn.num_experts=8"),
        "dense_6b, of the two",
        "'layers'",
    ),
    "diff on a topology for one": (("--experiment=moe_6b", *V5P, "--diff=moe_tiny"), "moe_tiny, of the two", "batch"),
    "topology while training": (("--experiment=moe_tiny", "--topology=v5p-8"), "--mode=describe"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_argument_is_one_line_that_names_it(name, tmp_path, capsys, monkeypatch):
    arguments, *words = FAULTS[name]
    monkeypatch.setattr(launcher, "set_up_platform", lambda args: None)  # the test's own devices are set up already
    if name in ("mesh too large", "two rests", "zero axis", "heads", "top-k"):
        arguments = (*arguments, "--topology=cpu-1")
    code = launcher.main([a.format(tmp=tmp_path) for a in arguments])
    message = capsys.readouterr().err
    assert code == 2
    assert message.startswith("axrepro: error: ")
    assert message.count("\n") == 1
    assert all(word in message for word in words), message


def test_update_scales_are_written_as_they_are_described(capsys, monkeypatch):
    monkeypatch.setattr(launcher, "set_up_platform", lambda args: None)
    scale = "--experiment.optimizer.update_scale=(('**/ffn/*', 0.5),)"
    assert launcher.main(["--experiment=moe_tiny", "--mode=describe", "--topology=cpu-1", scale]) == 0
    assert "    update_scale: (('**/ffn/*', 0.5),)\n" in capsys.readouterr().out


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished small run."""
    workdir = tmp_path_factory.mktemp("trained")
    done = launch(workdir, "--train.steps=3", "--checkpoint.every=2")
    assert done.returncode == 0, done.stderr
    return workdir


def _damage_data(run):
    part = max((run / "checkpoints" / "3" / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])


def _lose_item(run):
    shutil.rmtree(run / "checkpoints" / "3" / "opt_state")


def _foreign(run):
    (run / "config.json").write_text('{"experiment": "another"}')


def _no_json(run):
    (run / "config.json").write_text("{")


DAMAGE = {
    "truncated": (_damage_data, (), ("checkpoints/3", "move that folder away", "step 2")),
    "item lost": (_lose_item, (), ("checkpoints/3", "step 2")),
    "another run": (_foreign, (), ("another", "--workdir")),
    "config no json": (_no_json, (), ("config.json",)),
    "another width": (lambda run: None, ("--method.model.dim=64",), ("checkpoints/3", "shape", "--workdir")),
    "another depth": (lambda run: None, ("--method.model.tied=false",), ("checkpoints/3", "head", "--workdir")),
    "fewer steps": (lambda run: None, ("--train.steps=1",), ("step 3", "train.steps=1")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_does_not_fit_stops_the_run_and_stays(name, trained, tmp_path, capsys, monkeypatch):
    damage, overrides, words = DAMAGE[name]
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    damage(run)
    before = _files(run)
    monkeypatch.setattr(launcher, "set_up_platform", lambda args: None)
    code = launcher.main([*SMALL, f"--workdir={run}", "--train.steps=6", *overrides])
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.count("\n") == 1
    assert all(word in message for word in words), message
    assert _files(run) == before
