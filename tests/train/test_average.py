"""Averaged parameters in a run: what is evaluated, saved and restored, and where they lie."""

import json
import shutil
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from methods import Points, Regression, TeacherDistillation, TwoPlayers, _Points

from axrepro.core import MeshShape
from axrepro.core.tree import flatten
from axrepro.errors import UserError
from axrepro.optim import AdamW, Constant, Ema, Uniform
from axrepro.train.effect import effect
from axrepro.train.evaluate import Evaluator
from axrepro.train.experiment import Checkpointing, Evaluation, Experiment, Train
from axrepro.train.loop import build_program, compile_step, evaluate, train
from axrepro.train.workdir import Workdir

MESH = MeshShape(data=1, fsdp=2, expert=2, model=2)
AVERAGES = {"ema": Ema(decay=0.5, warmup=True), "uniform": Uniform(start=3, every=2)}


class _Few(_Points):
    def __len__(self):
        return 32


@dataclass(frozen=True, kw_only=True)
class Few(Points):
    """A held-out split of two batches."""

    def open(self, split, seed):
        return _Few(0)


def experiment(average, method=None, steps=8):
    return Experiment(
        method=method or Regression(),
        data=Few(batch_size=16),
        optimizer=AdamW(learning_rate=Constant(value=0.05)),
        average=average,
        train=Train(steps=steps, dtype="float32", log_every=1),
        checkpoint=Checkpointing(every=4),
        eval=Evaluation(every=4, raw=average is not None),
        mesh=MESH,
    )


def logged(folder):
    return {line["step"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module", params=AVERAGES)
def whole(request, tmp_path_factory):
    """(experiment, folder, outcome) of an uninterrupted run."""
    config, folder = experiment(AVERAGES[request.param]), tmp_path_factory.mktemp(request.param)
    return config, folder, train(config, Workdir(str(folder)), "averaged")


def test_evaluation_is_of_the_averaged_parameters_and_raw_ones_are_apart(whole):
    config, folder, outcome = whole
    program = build_program(config)
    evaluator, (name,) = Evaluator(program), outcome.state.average.keys() - {"count"}
    plain = Evaluator(build_program(replace(config, average=None, eval=Evaluation())))
    of_average = plain(outcome.state.average[name], {}, None)["eval/loss"]
    of_params = plain(outcome.state.params, {}, None)["eval/loss"]
    line = logged(folder)[8]
    assert (line["eval/loss"], line["eval_raw/loss"]) == (of_average, of_params)
    assert of_average != of_params
    assert evaluator(outcome.state.params, outcome.state.average, None)["eval/loss"] == of_average
    assert evaluate(config, Workdir(str(folder))) == (8, {"eval/loss": of_average, "eval_raw/loss": of_params})
    assert "eval_raw/loss" in logged(folder)[4]


def test_an_interrupted_run_ends_with_the_same_average_to_the_last_bit(whole, tmp_path):
    config, folder, outcome = whole
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    again = train(config, Workdir(str(tmp_path / "run")), "averaged")
    assert again.resumed_from == 4
    plain = lambda state: jax.tree.leaves(replace(state, key=jax.random.key_data(state.key)))
    for kept, restored in zip(plain(outcome.state), plain(again.state), strict=True):
        np.testing.assert_array_equal(kept, restored)


def test_another_average_is_refused_in_one_line_by_training_and_evaluation(whole):
    config, folder, _ = whole
    other = AVERAGES["uniform" if config.average == AVERAGES["ema"] else "ema"]
    messages = {None: "give the experiment that run's `average`", other: r"it has no average '(ema|uniform)/"}
    for average, message in messages.items():
        wrong = replace(config, average=average, eval=Evaluation(), train=replace(config.train, steps=9))
        for call in (train, evaluate):
            with pytest.raises(UserError, match=rf"checkpoints/8 .*{message}"):
                call(wrong, Workdir(str(folder)), *["averaged"] * (call is train))


def test_a_checkpoint_without_an_average_is_refused_where_one_is_wanted(tmp_path):
    train(experiment(None, steps=1), Workdir(str(tmp_path)), "plain")
    assert not (tmp_path / "checkpoints" / "1" / "average").exists()
    with pytest.raises(UserError, match=r"checkpoints/1 holds no averaged parameters; use a new --workdir, or leave"):
        train(experiment(Ema(decay=0.5), steps=2), Workdir(str(tmp_path)), "plain")


def test_an_average_that_begins_after_the_run_is_refused_by_its_path():
    with pytest.raises(UserError, match=r"^average\.start=9: 9 steps, longer than the run of 8"):
        build_program(experiment(Uniform(start=9)))


@pytest.mark.parametrize("method", [TeacherDistillation(), TwoPlayers()], ids=["teacher", "players"])
def test_the_average_is_of_all_trained_parameters_and_takes_the_others_as_they_are(method):
    config = experiment(Ema(decay=0.5), method)
    program = build_program(config)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    first = jax.device_get(flatten(state.params))
    state, _ = compile_step(program, batch := next(config.data.batches("train", 0, program.mesh)))(state, batch)
    params, used = flatten(state.params), flatten(program.averaged(state.params, state.average))
    trained = {path for path, spec in flatten(program.specs).items() if spec.role == "trained"}
    assert flatten(state.average["ema"]).keys() == trained
    for path, value in used.items():
        want = (first[path] + np.asarray(params[path])) / 2 if path in trained else params[path]
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-7)


def test_the_average_lies_like_its_parameters_takes_their_bytes_and_is_donated():
    config = experiment(Ema(decay=0.5))
    program = build_program(config)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    batch = next(config.data.batches("train", 0, program.mesh))
    new, _ = compile_step(program, batch)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.average))
    for path, leaf in flatten(new.params).items():
        mean = flatten(new.average["ema"])[path]
        assert mean.sharding == leaf.sharding
        assert not leaf.sharding.is_fully_replicated
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(new.average))
    assert effect(config, "cpu-8", 8, 1).bytes_per_device["averaged parameters"] == held
    assert "averaged parameters" not in effect(experiment(None), "cpu-8", 8, 1).bytes_per_device
