"""What holds of every optimizer and every average, a row each; the equations are in the oracle tests."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from axrepro.core import MeshShape, make_mesh
from axrepro.core.config import from_config_dict, to_config_dict
from axrepro.core.param import Normal, Param, abstract_params, init_params, linear, stack, vector
from axrepro.core.sharding import Rules, named, param_partitions
from axrepro.core.tree import flatten, map_tree
from axrepro.optim import (
    LARS,
    SGD,
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    Ema,
    InverseSqrt,
    Linear,
    Lion,
    Muon,
    PerPath,
    Uniform,
    WarmupStableDecay,
    state_partitions,
)
from axrepro.train.checkpoint import Checkpoints
from axrepro.train.state import TrainState
from axrepro.train.workdir import Workdir

STEPS = 200
SCHEDULES = {
    "constant": lambda peak: Constant(value=peak),
    "cosine": lambda peak: Cosine(peak=peak, warmup=10, floor=0.1),
    "linear": lambda peak: Linear(peak=peak, warmup=0.05),
    "wsd": lambda peak: WarmupStableDecay(peak=peak, warmup=10, decay=0.2),
    "inverse_sqrt": lambda peak: InverseSqrt(peak=peak, warmup=20),
}
OPTIMIZERS = {
    "adamw": lambda rate: AdamW(learning_rate=rate(0.1), weight_decay=1e-3),
    "adamw_decoupled": lambda rate: AdamW(learning_rate=rate(0.1), weight_decay=1e-4, decay="decoupled"),
    "adamw_bfloat16": lambda rate: AdamW(learning_rate=rate(0.1), moment_dtype="bfloat16", clip=None, weight_decay=0.0),
    "sgd": lambda rate: SGD(learning_rate=rate(0.1), weight_decay=1e-4, clip=20.0),
    "sgd_nesterov": lambda rate: SGD(learning_rate=rate(0.1), nesterov=True),
    "sgd_plain": lambda rate: SGD(learning_rate=rate(0.3), momentum=None, update_scale=(("**/w", 0.8),)),
    "adafactor": lambda rate: Adafactor(learning_rate=rate(0.1), min_dim_size_to_factor=4),
    "adafactor_momentum": lambda rate: Adafactor(
        learning_rate=rate(0.1), min_dim_size_to_factor=4, momentum=0.9, weight_decay=1e-4, clip=5.0
    ),
    "lion": lambda rate: Lion(learning_rate=rate(0.05), weight_decay=1e-3),
    "muon": lambda rate: Muon(learning_rate=rate(0.1), weight_decay=1e-3),
    "muon_jordan": lambda rate: Muon(learning_rate=rate(0.1), rms=None, nesterov=False, weight_decay=0.0, clip=None),
    "lars": lambda rate: LARS(learning_rate=rate(0.1), trust=0.1, weight_decay=1e-4),
    "per_path": lambda rate: PerPath(
        rules=(
            ("bowl/*", SGD(learning_rate=rate(0.1))),
            ("**/b", Lion(learning_rate=rate(0.05), weight_decay=1e-3)),
            ("**", Muon(learning_rate=rate(0.1), weight_decay=1e-3)),
        )
    ),
}
AVERAGES = {
    "ema": Ema(decay=0.9),
    "ema_warmup": Ema(decay=0.99, warmup=True),
    "ema_narrow": Ema(decay=0.5, dtype="param"),
    "uniform": Uniform(start=0.8),
    "uniform_every": Uniform(start=150, every=20, dtype="param"),
}
# An optimizer sees nothing of a schedule but its values, an average nothing of an optimizer but its parameters; so each
# optimizer meets the cosine, and each schedule and average meets AdamW.
TABLE = {name: (name, "cosine", None) for name in OPTIMIZERS}
TABLE |= {name: ("adamw", name, None) for name in SCHEDULES if name != "cosine"}
TABLE |= {name: ("adamw", "cosine", average) for name, average in AVERAGES.items()}
rows = pytest.mark.parametrize("row", TABLE)

ONE = {"w": linear((6, 8), ("embed", "mlp"), fan_in=6), "b": vector((8,), ("mlp",), 0.5)}
SPECS = {
    "bowl": {"x": Param(shape=(5,), axes=(None,), init=Normal(1.0), decay=False)},
    "regression": {
        "w": linear((8, 4), ("embed", "mlp"), fan_in=8),
        "b": vector((4,), ("mlp",), 0.5),
        "none": {},  # a layer without parameters
    },
    "stacked": stack(stack(ONE, 2, "expert"), 2, "layers"),
    "separate": {"01": ONE, "10": ONE},  # two of its four layers again, by their indices
}


def config_of(row):
    optimizer, schedule, average = TABLE[row]
    return OPTIMIZERS[optimizer](SCHEDULES[schedule]), average


@cache
def problem():
    """Three losses: of a convex bowl, a linear regression whose targets a linear map fits, and layers with targets."""
    keys = jax.random.split(jax.random.key(0), 4)
    inputs, weight = jax.random.normal(keys[0], (64, 8)), jax.random.normal(keys[1], (8, 4))
    centre, layers = 1.0 + jax.random.normal(keys[2], (5,)), jax.random.normal(keys[3], (2, 2, 7, 8))

    def losses(params):
        outputs = inputs @ params["regression"]["w"] + params["regression"]["b"]
        bowl = jnp.sum(jnp.linspace(0.5, 2.0, 5) * jnp.square(params["bowl"]["x"] - centre))
        distance = lambda layer, target: (
            jnp.square(layer["w"] - target[..., 1:, :]).sum() + jnp.square(layer["b"] - target[..., 0, :]).sum()
        )
        apart = [distance(params["separate"][name], layers[int(name[0]), int(name[1])]) for name in ("01", "10")]
        layered = distance(params["stacked"], layers) + sum(apart)
        return jnp.stack([bowl, jnp.square(outputs - inputs @ weight - 0.3).mean(), 0.3 * layered])

    return jax.jit(losses)


@cache
def first_params():
    flat = flatten(jax.jit(lambda: init_params(SPECS, jax.random.key(1)))())
    for name in ONE:
        for layer in ("01", "10"):
            flat[f"separate/{layer}/{name}"] = flat[f"stacked/{name}"][int(layer[0]), int(layer[1])]
    return map_tree(lambda path, spec: flat[path], SPECS)


@cache
def compiled(optimizer, schedule):
    """(first params and optimizer state, the compiled step)."""
    losses, tx, params = problem(), OPTIMIZERS[optimizer](SCHEDULES[schedule]).build(SPECS, STEPS), first_params()

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: losses(p).sum())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return (params, jax.jit(tx.init)(params)), step


@cache
def averaging(average):
    """The compiled update of an average."""
    if average is None:
        return lambda mean, params, step: mean
    return jax.jit(lambda mean, params, step: average.update(mean, params, step, STEPS))


def start(row):
    """Params, optimizer state and average before the first step."""
    optimizer, schedule, average = TABLE[row]
    (params, opt_state), _ = compiled(optimizer, schedule)
    return params, opt_state, {} if average is None else average.init(params)


def step(row, params, opt_state, mean, number):
    """The same after step `number`, counted from 1."""
    optimizer, schedule, average = TABLE[row]
    params, opt_state = compiled(optimizer, schedule)[1](params, opt_state)
    return params, opt_state, averaging(average)(mean, params, jnp.int32(number))


def steps(row, count):
    """The same after so many steps."""
    state = start(row)
    for number in range(1, count + 1):
        state = step(row, *state, number)
    return state


whole_run = cache(lambda row: steps(row, STEPS))


@rows
def test_the_parameters_that_are_evaluated_converge(row):
    params, _, mean = whole_run(row)
    _, average = config_of(row)
    before, after = problem()(first_params()), problem()(params if average is None else average.params(mean, params))
    assert (after < 0.02 * before).all(), (before, after)


@rows
def test_the_step_compiles_once_and_the_states_keep_their_form_without_weak_types(row):
    first, last = start(row), whole_run(row)
    optimizer, schedule, average = TABLE[row]
    assert compiled(optimizer, schedule)[1]._cache_size() == 1
    assert average is None or averaging(average)._cache_size() == 1
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert describe(first) == describe(last)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(last))


@rows
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_and_averages_keep_the_parameters_dtype_while_moments_are_float32(row, dtype):
    config, average = config_of(row)
    tx = config.build(SPECS, STEPS)
    params = map_tree(lambda path, spec: jax.ShapeDtypeStruct(spec.shape, dtype), SPECS)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert updates == params
    assert new_state == state
    moments = {str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert moments <= {"float32", "bfloat16"} if row == "adamw_bfloat16" else moments <= {"float32"}
    if average is not None:
        mean = jax.eval_shape(average.init, params)
        stored = dtype if average.dtype == "param" else "float32"
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(mean) if leaf.ndim} == {stored}
        again = jax.eval_shape(lambda m, p: average.update(m, p, jnp.int32(1), STEPS), mean, params)
        assert again == mean
        assert jax.eval_shape(average.params, mean, params) == params


@rows
def test_a_stack_moves_like_its_layers_one_by_one(row):
    params, _, mean = steps(row, 3)
    for tree in (params, *(value for name, value in mean.items() if name != "count")):
        for path, alone in flatten(tree["separate"]).items():
            layer, name = path.split("/")
            index = int(layer[0]), int(layer[1])
            np.testing.assert_allclose(tree["stacked"][name][index], alone, rtol=1e-5, atol=1e-6)
            assert not np.allclose(alone, first_params()["stacked"][name][index])


@rows
def test_a_saved_state_goes_on_to_the_last_bit(row, tmp_path):
    zero, params, opt_state, mean = jnp.int32(0), *steps(row, 3)
    skips = {"total": zero, "in_row": zero}
    whole = TrainState(jnp.int32(3), params, {"train": opt_state}, jax.random.key(0), skips, mean)
    checkpoints = Checkpoints(Workdir(str(tmp_path)))
    checkpoints.save(whole, {})
    checkpoints.finished(wait=True)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), whole)
    saved = checkpoints.restore(abstract).state
    checkpoints.close()
    assert jax.tree.structure(saved) == jax.tree.structure(whole)
    on, again = (step(row, s.params, s.opt_state["train"], s.average, 4) for s in (whole, saved))
    for one, other in zip(jax.tree.leaves(on), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@rows
def test_config_survives_the_round_trip_is_hashable_and_fits_its_parameters(row):
    config, average = config_of(row)
    config.check(SPECS)
    for part in (config, average):
        if part is not None:
            assert from_config_dict(part, to_config_dict(part)) == part
            assert isinstance(hash(part), int)


# Sharding

SHARDED_SPECS = {
    "w": linear((16, 8), ("embed", "mlp"), fan_in=16),
    "experts": linear((3, 4, 16, 8), ("layers", "expert", "embed", "mlp"), fan_in=16),
    "q": linear((3, 16, 4, 2), ("layers", "embed", "heads", "head_dim"), fan_in=16),
    "out": linear((3, 4, 2, 16), ("layers", "heads", "head_dim", "embed"), fan_in=8),
    "b": vector((8,), ("mlp",), 0.1),
}
SHARDED = {name: OPTIMIZERS[name] for name in ("adamw", "adafactor_momentum", "muon", "lars")}
SHARDED["per_path"] = lambda rate: PerPath(
    rules=(("experts", OPTIMIZERS["muon"](rate)), ("**", OPTIMIZERS["sgd_nesterov"](rate)))
)


@cache
def sharded_run(optimizer):
    """(params, state and average after three steps on a mesh, the same without one, the shardings they should have)."""
    mesh = make_mesh(MeshShape(data=1, fsdp=2, expert=2, model=2), jax.devices()[:8])
    config, average = SHARDED[optimizer](SCHEDULES["constant"]), Ema(decay=0.5)
    tx = config.build(SHARDED_SPECS, STEPS)
    partitions = param_partitions(SHARDED_SPECS, Rules(), dict(mesh.shape))
    layout = (
        partitions,
        state_partitions(tx, abstract_params(SHARDED_SPECS), partitions),
        average.partitions(partitions),
    )
    shardings = named(mesh, layout)

    def step(params, state, mean):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, average.update(mean, params, jnp.int32(1), STEPS)

    @jax.jit
    def init():
        params = init_params(SHARDED_SPECS, jax.random.key(0))
        return params, tx.init(params), average.init(params)

    first = init()
    on_mesh = jax.jit(step, in_shardings=shardings, out_shardings=shardings)
    alone = jax.jit(step)
    here, there = first, jax.device_put(first, shardings)
    for _ in range(3):
        here, there = alone(*here), on_mesh(*there)
    return there, here, shardings


@pytest.mark.parametrize("optimizer", SHARDED)
def test_sharded_state_gives_the_unsharded_result_and_keeps_its_sharding(optimizer):
    on_mesh, alone, shardings = sharded_run(optimizer)
    for got, sharding in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(shardings), strict=True):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
    for got, want in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)  # sums in another order


def test_moments_and_average_lie_exactly_like_the_parameters():
    lie = lambda tree: {path: leaf.sharding for path, leaf in flatten(tree).items()}
    params, state, mean = sharded_run("adamw")[0]
    assert not any(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    for moments in (state["scale_by_adam"].mu, state["scale_by_adam"].nu, mean["ema"]):
        assert lie(moments) == lie(params)
    for optimizer, momentum in (
        ("muon", lambda s: s["momentum"].inner_state.trace),
        ("lars", lambda s: s["momentum"].trace),
    ):
        params, state, _ = sharded_run(optimizer)[0]
        matrices = {path: leaf for path, leaf in flatten(momentum(state)).items() if isinstance(leaf, jax.Array)}
        assert {"w", "experts", "q", "out"} <= matrices.keys()
        assert lie(matrices) == {path: leaf for path, leaf in lie(params).items() if path in matrices}
