"""The compiled step: one program per run, its state in place, equal on every mesh; nothing kept that is not finite."""

import json
import logging
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from launched import ROOT

from axrepro.core import MeshShape, make_mesh
from axrepro.core.config import override
from axrepro.core.tree import flatten
from axrepro.data import Text, TextFiles
from axrepro.errors import UserError
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import llama
from axrepro.nn import MoE, every
from axrepro.optim import SGD, AdamW, Constant, Cosine, Ema, Linear
from axrepro.train.checkpoint import Checkpoints
from axrepro.train.experiment import Checkpointing, Evaluation, Experiment, Train
from axrepro.train.loop import build_program, compile_step, train
from axrepro.train.not_finite import NotFiniteError
from axrepro.train.state import Program
from axrepro.train.workdir import Workdir

STEPS = 10
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]  # data, fsdp, expert


def experiment(kind: str) -> Experiment:
    """Two blocks on a text that never changes; "moe" has four experts in the second.

    With a text that changes, some day a token's two best experts are one rounding apart, and which comes first decides
    who is dropped: then every mesh has its own losses, and none is wrong.
    """
    model = llama(vocab_size=264, dim=32, num_layers=2, num_heads=4, hidden=64, tied=True)
    dense = Experiment(
        method=LanguageModel(model=model),
        data=Text(
            source=TextFiles(pattern=str(ROOT / "LICENSE"), separator="\n\n", holdout=5),
            batch_size=8,
            sequence_length=64,
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=1e-2, warmup=2)),
        train=Train(steps=STEPS, dtype="float32", log_every=1),
        checkpoint=Checkpointing(every=4),
        eval=Evaluation(every=5, batches=2),
    )
    return dense if kind == "dense" else every(dense, 2, lambda ffn: MoE(expert=ffn, num_experts=4))


def program_on(config: Experiment, dims: tuple = (1, 1, 1)) -> Program:
    shape = MeshShape(data=dims[0], fsdp=dims[1], expert=dims[2])
    return Program(replace(config, mesh=shape), make_mesh(shape, jax.devices()[: np.prod(dims)]), "cpu")


def pointers(tree) -> set[int]:
    """Addresses of every shard of every array."""
    return {shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for shard in x.addressable_shards}


def first_state(program: Program):
    return jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)


@cache
def history(kind: str, dims: tuple) -> np.ndarray:
    """float64[steps, 2]: loss and gradient norm of each step."""
    program = program_on(experiment(kind), dims)
    batches = program.experiment.data.batches("train", 0, program.mesh, program.experiment.rules)
    state, batch, rows = first_state(program), next(batches), []
    step = compile_step(program, batch)
    for _ in range(STEPS):
        state, report = step(state, batch)
        rows.append([float(report["scalars"]["loss"]), float(report["scalars"]["grad_norm"])])
        batch = next(batches)
    return np.array(rows)


@pytest.mark.parametrize(
    ("kind", "dims"),
    [("moe", dims) for dims in MESHES[1:]]
    + [pytest.param("dense", dims, marks=[] if dims == (2, 2, 2) else pytest.mark.slow) for dims in MESHES[1:]],
    ids=str,
)
def test_ten_steps_have_the_losses_and_gradient_norms_of_one_device(kind, dims):
    one = history(kind, MESHES[0])
    assert one[-1, 0] < one[0, 0] - 0.5  # it trains, so that a wrong update would be seen
    # float32 sums in another order; Adam's first steps divide small gradients by themselves
    np.testing.assert_allclose(history(kind, dims), one, rtol=2e-5)


def test_a_run_compiles_its_step_exactly_once(tmp_path, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        outcome = train(experiment("moe"), Workdir(str(tmp_path)), "once")
    assert outcome.complete
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert sum("train_step" in message for message in compiled) == 1, compiled
    assert sum("eval_step" in message for message in compiled) == 1, compiled
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize("dims", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_new_state_lies_where_the_old_one_lay(dims):
    program = program_on(experiment("moe"), dims)
    state, batch = first_state(program), next(program.experiment.data.batches("train", 0, program.mesh))
    step = compile_step(program, batch)
    arrays = jax.tree.leaves((state.params, state.opt_state))
    size = sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == jax.devices()[0])
    assert step.memory_analysis().alias_size_in_bytes >= size
    before = pointers(arrays)
    new, _ = step(state, batch)
    assert all(x.is_deleted() for x in arrays)
    assert before == pointers((new.params, new.opt_state))


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    program = program_on(experiment("dense"))
    checkpoints = Checkpoints(Workdir(str(tmp_path)))
    state = first_state(program)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("in the way")
    save = lambda: checkpoints.save(state, {}) or checkpoints.finished(wait=True)
    with pytest.raises(UserError, match=r"saving checkpoint .*checkpoints/0 failed"):
        save()


def overflowing() -> Experiment:
    """Its first step makes parameters so large that the second overflows."""
    return replace(experiment("dense"), optimizer=SGD(learning_rate=Constant(value=1e30), momentum=None))


def test_a_step_that_is_not_finite_stops_the_run_and_names_the_first_tensor(tmp_path):
    with pytest.raises(NotFiniteError, match=r"step 2 is not finite: '.+', \d+ of \d+ tensors"):
        train(overflowing(), Workdir(str(tmp_path)), "stops")
    saved = list((tmp_path / "checkpoints").iterdir()) if (tmp_path / "checkpoints").exists() else []
    assert saved == []


def test_skipped_steps_change_nothing_are_counted_and_end_after_the_limit(tmp_path, capsys):
    config = override(overflowing(), {"train.not_finite": "skip", "train.max_skips": 3})
    with pytest.raises(NotFiniteError, match=r"4 in a row are more than train.max_skips=3"):
        train(config, Workdir(str(tmp_path)), "skips")
    assert capsys.readouterr().out.count("skipped: step") == 3


def test_skipped_steps_are_counted_over_a_resume_and_the_rate_is_the_one_that_the_optimizer_is_at(tmp_path):
    config = replace(
        overflowing(), optimizer=SGD(learning_rate=Linear(peak=1e30), momentum=None), average=Ema(decay=0.5)
    )
    config = override(config, {"train.not_finite": "skip", "train.max_skips": 5})
    with pytest.raises(NotFiniteError, match=r"step 7 is not finite.* 6 in a row are more than train\.max_skips=5"):
        train(config, Workdir(str(tmp_path)), "counts")
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} == {4}
    lines = lambda: [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped_steps") for line in lines()] == [None, 1, 2, 3, 4, 5]
    # the step after the only one that was taken is tried again and again
    np.testing.assert_allclose([line["learning_rate"] for line in lines()], [1e30, *[0.9e30] * 5], rtol=1e-6)
    with pytest.raises(NotFiniteError, match=r"step 7 is not finite.* 6 in a row are more than train\.max_skips=5"):
        train(config, Workdir(str(tmp_path)), "counts")
    assert [line.get("skipped_steps") for line in lines()] == [None, 1, 2, 3, 4, 5]
    saved = Checkpoints(Workdir(str(tmp_path)), read_only=True).restore(build_program(config).abstract_state).state
    assert jax.device_get(saved.skips) == {"total": 3, "in_row": 3}
    assert int(saved.average["count"]) == 1


def test_a_step_that_is_not_finite_leaves_parameters_and_moments_to_the_bit():
    program = program_on(experiment("moe"))
    state, batch = first_state(program), next(program.experiment.data.batches("train", 0, program.mesh))
    table = state.params["embed"]["table"].at[3, 5].set(np.nan)
    state = replace(state, params={**state.params, "embed": {"table": table}})
    before = jax.device_get(flatten(state.params)), [np.asarray(x) for x in jax.tree.leaves(state.opt_state)]
    new, report = compile_step(program, batch)(state, batch)
    assert not report["ok"]
    assert int(new.step) == 1
    for path, value in flatten(new.params).items():
        np.testing.assert_array_equal(value, before[0][path], err_msg=path)
    for old, value in zip(before[1], jax.tree.leaves(new.opt_state), strict=True):
        np.testing.assert_array_equal(value, old)
