"""What silently makes comparing mixtures with dense models unfair: each trap of the protocol, on the study itself."""

import jax
import numpy as np
import pytest

from axrepro import registry
from axrepro.core.aux import Metric, collect
from axrepro.core.config import override
from axrepro.core.tree import flatten
from axrepro.launch import configured
from axrepro.study.study import Arm
from axrepro.study.sweep import Cell, experiment_of
from axrepro.train.effect import effect
from axrepro.train.loop import build_program
from axrepro.train.step import passes

STUDY = registry.load(registry.find("moe_vs_dense", registry.index(kind="Study")))
HARDWARE = ("cpu-8", 8, 1)
ARMS = [pytest.param(arm, id=f"{arm.experiment} {arm.label}") for arm in STUDY.trained()]


def experiment(arm: Arm, **changes: str):
    """An arm as a sweep would train it, with few files held out so that it opens quickly."""
    return experiment_of(arm, HARDWARE, {**dict(arm.changes), "data.source.source.holdout": "1500", **changes})


@pytest.mark.parametrize("arm", ARMS)
def test_the_schedule_of_every_cell_is_stretched_to_its_steps_and_never_cut(arm):
    rates = {}
    for steps in (300, 390):
        cell = Cell(arm, steps, seed=0)
        config = experiment_of(arm, HARDWARE, cell.overrides)
        assert config.train.steps == steps
        schedule = config.optimizer.learning_rate
        rate = schedule.build(config.train.steps)
        rates[steps] = [float(rate(round(share * steps))) for share in (0.05, 0.1, 0.5, 0.9, 1.0)]
        assert rates[steps][-1] == pytest.approx(schedule.floor * schedule.peak)
    np.testing.assert_allclose(rates[300], rates[390], rtol=0.02)


def test_all_arms_of_a_seed_see_the_same_tokens_in_the_same_order_and_other_seeds_others():
    def tokens(arm, seed):
        config = experiment(arm, **{"train.seed": str(seed)})
        batches = config.data.batches("train", config.train.seed, build_program(config).run_mesh, config.rules)
        return np.stack([np.asarray(next(batches)["tokens"]) for _ in range(3)])

    reference = STUDY.ladder[0].dense
    assert all(experiment(arm).data == experiment(reference).data for arm in STUDY.trained())
    largest = STUDY.ladder[-1].dense
    np.testing.assert_array_equal(tokens(largest, 1), tokens(reference, 1))
    assert (tokens(largest, 2) != tokens(reference, 1)).any()


def test_arms_of_a_rung_differ_in_their_feed_forward_layers_alone():
    for rung in STUDY.ladder:
        dense = experiment(rung.dense)
        for arm in rung.sparse:
            sparse = experiment(arm)
            for name in ("data", "optimizer", "train", "eval", "mesh", "rules"):
                assert getattr(sparse, name) == getattr(dense, name)
            shapes = [
                {path: p.shape for path, p in flatten(build_program(e).specs).items() if "ffn" not in path}
                for e in (sparse, dense)
            ]
            total = [sum(np.prod(shape) for shape in one.values()) for one in shapes]
            assert total[0] == total[1]


@pytest.mark.parametrize("rung", STUDY.ladder, ids=lambda rung: rung.name)
def test_parameters_are_those_of_the_names(rung):
    dense = effect(experiment(rung.dense), *HARDWARE)
    promised = {"28k": (24, 64, 28e3), "50k": (32, 88, 50e3), "76k": (40, 104, 76e3), "150k": (56, 152, 150e3)}
    dim, hidden, outside = promised[rung.name]
    assert dense.outside == 4 * (4 * dim**2 + 3 * dim * hidden + 2 * dim) + dim
    assert dense.outside == pytest.approx(outside, rel=0.02)
    assert dense.outside == dense.total - 264 * dim  # tied: one matrix
    experts, mixtures = 8, 2
    for arm in rung.sparse:
        sparse = effect(experiment(arm), *HARDWARE)
        assert sparse.total == dense.total + mixtures * (dim * experts + (experts - 1) * 3 * dim * hidden)
        assert sparse.active == dense.active + mixtures * (dim * experts + 3 * dim * hidden)


def router_gradient(config, batch) -> dict[str, np.ndarray]:
    """Gradients of the routers' weights in the first step."""
    program = build_program(config)
    state = jax.jit(program.init, static_argnums=0)(0)
    (grads,) = jax.jit(lambda state, batch: [p.grads for p in passes(program, state, batch)])(state, batch)
    return {path: np.asarray(g) for path, g in flatten(grads).items() if "router" in path}


def test_the_balance_and_z_losses_reach_the_routers_of_the_ladder():
    arm = STUDY.ladder[0].sparse[0]
    small = {"method.model.dim": "16", "method.model.layers.times": "1", "data.sequence_length": "32"}
    config = experiment(arm, **small)
    layer = "method.model.layers.layer.layers.1.ffn.router.losses"
    batches = config.data.batches("train", 0, build_program(config).run_mesh, config.rules)
    batch = next(batches)
    whole = router_gradient(config, batch)
    assert whole
    for field in ("balance", "z"):
        value = getattr(config.method.model.layers.layer.layers[1].ffn.router.losses, field)
        assert value > 0
        without = router_gradient(override(config, {f"{layer}.{field}": 0.0}), batch)
        twice = router_gradient(override(config, {f"{layer}.{field}": 2 * value}), batch)
        for path, gradient in whole.items():
            part = gradient - without[path]
            assert np.abs(part).max() > 1e-6
            np.testing.assert_allclose(twice[path] - gradient, part, rtol=1e-3, atol=1e-7)  # its weight counts once


def test_models_trained_with_less_room_are_evaluated_with_that_of_the_others():
    (series,) = [series for series in STUDY.ablations if series.name == "capacity factor"]
    for arm in series.arms:
        moe = experiment(arm).method.model.layers.layer.layers[1].ffn
        assert moe.capacity(128, train=False) == 32  # 128 tokens, 8 experts, factor 2
        assert moe.capacity(128, train=True) == int(128 * arm.x / 8)
    tight = experiment(series.arms[0])
    program = build_program(tight)
    params = jax.jit(program.init, static_argnums=0)(0).params
    batch = next(tight.data.batches("train", 0, program.run_mesh, tight.rules))

    def dropped(train):
        key = jax.random.key(0) if train else None
        aux = jax.jit(lambda p, b: tight.method.loss(p, b, program.context(key, train=train)))(params, batch)
        found = [m for path, m in collect(aux, Metric).items() if path.endswith("dropped")]
        return sum(float(m.total.sum()) for m in found) / sum(float(m.count.sum()) for m in found)

    assert dropped(train=False) < dropped(train=True)


def test_what_a_cell_trains_is_what_its_command_launches():
    arm = STUDY.ablations[1].arms[0]
    cell = Cell(arm, steps=123, seed=2, changes={"data.batch_size": "32"})
    import shlex

    from axrepro.launch import parse

    argv = shlex.split(cell.command("somewhere"))
    assert argv[:3] == ["python", "-m", "axrepro.launch"]
    args, overrides = parse(argv[3:])
    entry = registry.find(args.experiment, registry.index())
    assert configured(entry, HARDWARE, overrides)[0] == experiment_of(arm, HARDWARE, cell.overrides)
    assert args.workdir == "somewhere"
