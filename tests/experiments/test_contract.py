"""What holds of every experiment: its `tiny` learns, keeps its state's form, updates what it should, and resumes."""

from functools import cache

import jax
import numpy as np
import pytest

from axrepro import registry
from axrepro.core.aux import Loss, Update, collect
from axrepro.core.config import from_config_dict, to_config_dict
from axrepro.core.tree import flatten
from axrepro.train.checkpoint import Checkpoints
from axrepro.train.loop import build_program, compile_step
from axrepro.train.workdir import Workdir

STEPS = 30
ENTRIES = registry.index()
TINY = [entry.file for entry in ENTRIES if entry.function == "tiny"]


@cache
def tiny(file: str):
    """(program, compiled step, first batch, state after STEPS, loss of each step, whether each step was finite)."""
    program = build_program(registry.load(registry.find(f"{file}:tiny", ENTRIES)))
    config = program.experiment
    batches = config.data.batches("train", config.train.seed, program.mesh, config.rules)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(config.train.seed)
    first = batch = next(batches)
    step, losses, ok = compile_step(program, batch), [], []
    for _ in range(STEPS):
        state, report = step(state, batch)
        losses.append(float(report["scalars"]["loss"]))
        ok.append(bool(report["ok"]))
        batch = next(batches)
    return program, step, first, state, losses, ok


@pytest.mark.parametrize("file", TINY)
def test_its_loss_falls_and_stays_finite(file):
    *_, losses, ok = tiny(file)
    assert all(ok)
    assert np.isfinite(losses).all()
    spread = np.std(np.diff(losses[-10:]))  # from batch to batch, once the first fast fall is over
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 3 * spread


@pytest.mark.parametrize("file", TINY)
def test_a_step_keeps_shapes_dtypes_and_shardings(file):
    program, _, _, state, *_ = tiny(file)
    for wanted, found in zip(jax.tree.leaves(program.abstract_state), jax.tree.leaves(state), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
        assert not getattr(found, "weak_type", False)  # it would compile again; random keys have no such type


@pytest.mark.parametrize("file", TINY)
def test_exactly_the_updated_parameters_receive_an_update(file):
    program, _, batch, state, *_ = tiny(file)
    method = program.experiment.method
    updated = {path for path, spec in flatten(program.specs).items() if spec.role == "updated"}
    got = set()
    for phase in program.phases:
        ctx = program.context(jax.random.key(0), train=True, phase=phase.name)
        aux = jax.eval_shape(lambda params, batch, ctx=ctx: method.loss(params, batch, ctx), state.params, batch)
        got |= set(collect(aux, Update))
        assert collect(aux, Loss), "a phase without a loss"
    assert got == updated


@pytest.mark.parametrize("file", TINY)
def test_a_restored_state_takes_the_same_next_step(file, tmp_path):
    program, step, batch, state, *_ = tiny(file)
    checkpoints = Checkpoints(Workdir(str(tmp_path)))
    checkpoints.save(state, {})
    assert checkpoints.finished(wait=True) == STEPS
    copies = [checkpoints.restore(program.abstract_state).state for _ in range(2)]
    checkpoints.close()
    for kept, restored in zip(jax.tree.leaves(state), jax.tree.leaves(copies[0]), strict=True):
        assert kept.sharding.is_equivalent_to(restored.sharding, kept.ndim)
    again = jax.tree.map(lambda x: x.copy(), state)  # the step takes its argument's memory
    ours, theirs = step(again, batch)[0], step(copies[0], batch)[0]
    for one, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(jax.tree.leaves(ours.opt_state), jax.tree.leaves(theirs.opt_state), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_its_tree_survives_the_exchange_with_a_config_dict(entry):
    experiment = registry.load(entry)
    assert from_config_dict(experiment, to_config_dict(experiment)) == experiment
