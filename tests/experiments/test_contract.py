"""What holds of every experiment: its `tiny` learns, keeps its state's form, updates what it should, and resumes."""

import logging
from dataclasses import dataclass
from functools import cache

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axrepro import registry
from axrepro.core.aux import Loss, Update, collect
from axrepro.core.config import from_config_dict, to_config_dict
from axrepro.core.tree import flatten
from axrepro.data import Batches
from axrepro.train.checkpoint import Checkpoints
from axrepro.train.loop import build_program, compile_step
from axrepro.train.state import Program, TrainState
from axrepro.train.workdir import Workdir

STEPS = 30
ENTRIES = registry.index()
FILES = [entry.file for entry in ENTRIES if entry.function == "tiny"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training of STEPS steps.

    Attributes:
      step: compiled.   batches: the data, STEPS batches on.   first: the initial parameters.   state: the last one.
      compilations: what jax logged of compiling the step.   scalars, ok: of each step.
    """

    program: Program
    step: jax.stages.Compiled
    batches: Batches
    first: dict[str, np.ndarray]
    state: TrainState
    compilations: list[str]
    scalars: list[dict[str, float]]
    ok: list[bool]


class _Messages(logging.Handler):
    """Keeps what is logged of compiling the step."""

    def __init__(self):
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record):
        if "Finished XLA compilation of jit(train_step" in (message := record.getMessage()):
            self.kept.append(message)


@cache
def tiny(file: str) -> Trained:
    """The `tiny` of a file, trained once for all tests."""
    program = build_program(registry.load(registry.find(f"{file}:tiny", ENTRIES)))
    config = program.experiment
    batches = config.data.batches("train", config.train.seed, program.mesh, config.rules)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(config.train.seed)
    first = jax.device_get(flatten(state.params))
    step, scalars, ok, log = None, [], [], _Messages()
    logging.getLogger("jax").addHandler(log)
    with jax.log_compiles():
        for _ in range(STEPS):
            batch = next(batches)
            step = step or compile_step(program, batch)
            state, report = step(state, batch)
            scalars.append({name: float(value) for name, value in report["scalars"].items()})
            ok.append(bool(report["ok"]))
    logging.getLogger("jax").removeHandler(log)
    return Trained(
        program=program, step=step, batches=batches, first=first, state=state,
        compilations=log.kept, scalars=scalars, ok=ok,
    )  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_golden_curve(file, golden):
    curve = {n: [s[n] for s in tiny(file).scalars] for n in tiny(file).scalars[0] if _is_curve(n)}
    golden(
        goldens.FOLDER / file / "tiny.curve.json",
        goldens.curve_text(curve),
        lambda path, _: goldens.curve_fault(path, curve),
    )


def _is_curve(name: str) -> bool:
    """Loss and gradient norm, with the phase in front where there are several."""
    return name.split("/")[-1] in ("loss", "grad_norm")


@pytest.mark.parametrize("file", FILES)
def test_its_loss_falls_and_stays_finite(file):
    trained = tiny(file)
    losses = [sum(v for n, v in scalars.items() if n.split("/")[-1] == "loss") for scalars in trained.scalars]
    assert all(trained.ok)
    assert np.isfinite([list(scalars.values()) for scalars in trained.scalars]).all()
    spread = np.std(np.diff(losses[-10:]))  # from batch to batch, once the first fast fall is over
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 3 * spread


@pytest.mark.parametrize("file", FILES)
def test_its_step_compiles_once(file):
    assert len(tiny(file).compilations) == 1


@pytest.mark.parametrize("file", FILES)
def test_exactly_what_trains_or_is_updated_changes(file):
    trained = tiny(file)
    after = jax.device_get(flatten(trained.state.params))
    changed = {path for path, value in after.items() if not np.array_equal(value, trained.first[path])}
    assert changed == {path for path, spec in flatten(trained.program.specs).items() if spec.role != "frozen"}


@pytest.mark.parametrize("file", FILES)
def test_a_step_keeps_shapes_dtypes_and_shardings(file):
    program, state = tiny(file).program, tiny(file).state
    for wanted, found in zip(jax.tree.leaves(program.abstract_state), jax.tree.leaves(state), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
        assert not getattr(found, "weak_type", False)  # it would compile again; random keys have no such type


@pytest.mark.parametrize("file", FILES)
def test_exactly_the_updated_parameters_receive_an_update(file):
    program, params = tiny(file).program, tiny(file).state.params
    method, batch = program.experiment.method, program.experiment.data.abstract()
    updated = {path for path, spec in flatten(program.specs).items() if spec.role == "updated"}
    got = set()
    for phase in program.phases:
        ctx = program.context(jax.random.key(0), train=True, phase=phase.name)
        aux = jax.eval_shape(lambda params, batch, ctx=ctx: method.loss(params, batch, ctx), params, batch)
        got |= set(collect(aux, Update))
        assert collect(aux, Loss), "a phase without a loss"
    assert got == updated


@pytest.mark.parametrize("file", FILES)
def test_a_restored_state_takes_the_same_next_step(file, tmp_path):
    trained = tiny(file)
    state, step, batches = trained.state, trained.step, trained.batches
    checkpoints = Checkpoints(Workdir(str(tmp_path)))
    checkpoints.save(state, batches.position())
    assert checkpoints.finished(wait=True) == STEPS
    restored = checkpoints.restore(trained.program.abstract_state)
    checkpoints.close()
    for kept, found in zip(jax.tree.leaves(state), jax.tree.leaves(restored.state), strict=True):
        assert kept.sharding.is_equivalent_to(found.sharding, kept.ndim)
    again = jax.tree.map(lambda x: x.copy(), state)  # the step takes its argument's memory
    ours = step(again, next(batches))
    batches.seek(restored.data_position)
    theirs = step(restored.state, next(batches))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = (
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (one, other)
        )
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_its_tree_survives_the_exchange_with_a_config_dict(entry):
    experiment = registry.load(entry)
    assert from_config_dict(experiment, to_config_dict(experiment)) == experiment
