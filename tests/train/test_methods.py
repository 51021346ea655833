"""The `Method` interface carries what papers need beyond a plain loss."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import OwnData, Points, Regression, RobustMean, TeacherDistillation, TwoPlayers

from axrepro.core.param import init_params
from axrepro.core.tree import flatten
from axrepro.errors import UserError
from axrepro.methods.adapter import LoRA
from axrepro.optim import SGD, AdamW, Constant, PerPath
from axrepro.train.checkpoint import Checkpoints
from axrepro.train.experiment import Experiment, Train
from axrepro.train.loop import build_program, compile_step, first_state
from axrepro.train.step import train_step
from axrepro.train.workdir import Workdir


def experiment(method, optimizer=None, batch_size=64, outliers=0, steps=100, accumulation=1):
    return Experiment(
        method=method,
        data=Points(batch_size=batch_size, outliers=outliers),
        optimizer=optimizer or AdamW(learning_rate=Constant(value=0.01), weight_decay=0.0),
        train=Train(steps=steps, dtype="float32", grad_accumulation=accumulation),
    )


def run(config, steps):
    """(first state, last state, scalars of each step)."""
    program = build_program(config)
    first = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    start = jax.device_get(first.params)
    batches = config.data.batches("train", 0, program.mesh, config.rules)
    state, step, history = first, None, []
    for _ in range(steps):
        batch = next(batches)
        step = step or compile_step(program, batch)
        state, report = step(state, batch)
        history.append(jax.device_get(report["scalars"]))
    return start, state, history


def test_a_teacher_is_the_moving_average_of_its_student():
    config = experiment(TeacherDistillation(momentum=0.9))
    program = build_program(config)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    jax.tree.map(np.testing.assert_array_equal, state.params["student"], state.params["teacher"])  # CopyOf
    batches = config.data.batches("train", 0, program.mesh, config.rules)
    step = jax.jit(train_step, static_argnums=0)
    expected = jax.device_get(state.params["teacher"])
    for _ in range(5):
        student = jax.device_get(state.params["student"])
        expected = jax.tree.map(lambda t, s: 0.9 * t + 0.1 * s, expected, student)
        state, _ = step(program, state, next(batches))
    for name, value in flatten(state.params["teacher"]).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)
        assert not np.allclose(value, state.params["student"][name])
    assert set(flatten(state.opt_state)) == set() or "teacher" not in str(jax.tree.structure(state.opt_state))


def test_two_players_with_two_optimizers_reach_the_saddle():
    rules = (
        ("low/**", SGD(learning_rate=Constant(value=0.2), momentum=None)),
        ("high/**", AdamW(learning_rate=Constant(value=0.1))),
    )
    config = experiment(TwoPlayers(), PerPath(rules=rules))
    start, state, history = run(config, 100)
    distance = float(jnp.sum(state.params["low"]["x"] ** 2 + state.params["high"]["y"] ** 2))
    before = float(np.sum(start["low"]["x"] ** 2 + start["high"]["y"] ** 2))
    assert distance < 1e-2 * before
    assert {"low/loss", "high/loss", "low/grad_norm", "high/distance"} <= set(history[0])


def test_a_player_stands_still_while_the_other_moves():
    zero = SGD(learning_rate=Constant(value=0.0), momentum=None)
    moving = AdamW(learning_rate=Constant(value=0.1), weight_decay=0.5)
    config = experiment(TwoPlayers(), PerPath(rules=(("low/**", zero), ("high/**", moving))))
    start, state, _ = run(config, 3)
    np.testing.assert_array_equal(start["low"]["x"], state.params["low"]["x"])
    assert not np.allclose(start["high"]["y"], state.params["high"]["y"])
    assert set(state.opt_state) == {"low", "high"}


def test_the_second_player_sees_the_first_one_s_move():
    sgd = SGD(learning_rate=Constant(value=0.1), momentum=None, clip=None, weight_decay=0.0)
    start, state, _ = run(experiment(TwoPlayers(), sgd), 1)
    x, y = start["low"]["x"], start["high"]["y"]
    x = x - 0.1 * (y + x) / 4  # mean over 4 coordinates
    for _ in range(2):
        y = y + 0.1 * (x - y) / 4
    np.testing.assert_allclose(state.params["low"]["x"], x, rtol=1e-5)
    np.testing.assert_allclose(state.params["high"]["y"], y, rtol=1e-5)


def test_an_adapter_learns_and_its_base_stays_bit_for_bit():
    start, state, history = run(experiment(LoRA(method=Regression(), rank=2)), 60)
    params = flatten(jax.device_get(state.params))
    for path in flatten(Regression().specs()):
        np.testing.assert_array_equal(flatten(start)[path], params.pop(path))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in params.values())  # Adam's two moments, of the adapter alone


def test_an_adapter_starts_as_its_base():
    base, adapted = (run(experiment(m), 1)[2][0]["loss"] for m in (Regression(), LoRA(method=Regression())))
    assert adapted == base


def test_a_run_starts_from_the_parameters_of_another(tmp_path):
    def program(method, init_from=None, seed=1):
        config = experiment(method)
        return build_program(replace(config, train=replace(config.train, init_from=init_from, seed=seed)))

    def saved(name, state):
        checkpoints = Checkpoints(Workdir(str(tmp_path / name)))
        checkpoints.save(state, {})
        checkpoints.close()
        return str(tmp_path / name)

    base = first_state(program(Regression(), seed=0))
    adapted = first_state(program(LoRA(method=Regression()), saved("base", base)))
    params = flatten(adapted.params)
    for path, leaf in flatten(base.params).items():
        np.testing.assert_array_equal(params[path], leaf)
    other = first_state(program(LoRA(method=Regression()), seed=1))
    np.testing.assert_array_equal(params["out_lora_a"], other.params["out_lora_a"])  # its own values are as ever
    assert (params["out"] != other.params["out"]).any()
    with pytest.raises(UserError, match="lora_a', which this one lacks"):
        first_state(program(Regression(), saved("adapted", adapted)))
    with pytest.raises(UserError, match=r"no checkpoint in .*nowhere"):
        first_state(program(Regression(), str(tmp_path / "nowhere")))


def test_copies_of_a_parameter_that_is_given_follow_it():
    specs = TeacherDistillation().specs()
    given = {"student": jax.tree.map(lambda spec: jnp.full(spec.shape, 3.0), Regression().specs())}
    jax.tree.map(
        np.testing.assert_array_equal, init_params(specs, jax.random.key(0), given)["teacher"], given["student"]
    )


def test_the_median_of_workers_survives_bad_workers_and_the_mean_does_not():
    errors = {}
    for median in (True, False):
        method = RobustMean(base=Regression(), workers=8, median=median)
        config = experiment(method, SGD(learning_rate=Constant(value=0.05), momentum=None, clip=None), outliers=1)
        _, state, _ = run(config, 40)
        clean = next(Points(batch_size=256).batches("train", 0, build_program(config).mesh))
        error = Regression().loss(state.params, clean, None)["square"]
        errors[median] = float(error.total / error.count)
    assert errors[True] < 5.0 < 1e3 < errors[False] or not np.isfinite(errors[False])


def test_the_mean_of_worker_gradients_is_the_gradient_of_the_batch():
    plain = run(experiment(Regression()), 3)[1].params
    workers = run(experiment(RobustMean(base=Regression(), median=False)), 3)[1].params
    for path, value in flatten(plain).items():
        np.testing.assert_allclose(value, flatten(workers)[path], rtol=1e-4, atol=1e-6)


def test_a_method_can_train_on_what_it_samples_between_steps():
    from axrepro.train.loop import _rollout

    config = experiment(OwnData())
    program = build_program(config)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    batches, rollout = config.data.batches("train", 0, program.mesh, config.rules), _rollout(program)
    first, second = rollout(state, next(batches)), rollout(state, next(batches))
    np.testing.assert_array_equal(first["x"], second["x"])  # the key follows the step, not the data
    step = compile_step(program, first)
    losses = []
    for _ in range(80):
        state, report = step(state, rollout(state, next(batches)))
        losses.append(float(report["scalars"]["loss"]))
    assert losses[-1] < 0.2 * losses[0]
    assert not np.array_equal(first["x"], rollout(state, next(batches))["x"])


def test_accumulation_leaves_the_losses_of_every_method_alone():
    for method in (Regression(), TeacherDistillation(), LoRA(method=Regression())):
        whole = [h["loss"] for h in run(experiment(method), 3)[2]]
        parts = [h["loss"] for h in run(experiment(method, accumulation=4), 3)[2]]
        np.testing.assert_allclose(whole, parts, rtol=1e-5)
