"""The contract of every optimizer and schedule, and the options that act on paths."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from axrepro.core import MeshShape, UserError, make_mesh, override
from axrepro.core.config import from_config_dict, to_config_dict
from axrepro.core.param import Normal, Param, abstract_params, init_params, linear, vector
from axrepro.core.sharding import Rules, named, param_partitions
from axrepro.core.tree import flatten, map_tree
from axrepro.optim import (
    SGD,
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    PerPath,
    WarmupStableDecay,
    mup_simple,
    state_partitions,
)

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
    "sgd": lambda rate: SGD(learning_rate=rate(0.1), weight_decay=1e-4, clip=10.0),
    "sgd_nesterov": lambda rate: SGD(learning_rate=rate(0.1), nesterov=True),
    "sgd_plain": lambda rate: SGD(learning_rate=rate(0.3), momentum=None, update_scale=(("**/w", 0.8),)),
    "adafactor": lambda rate: Adafactor(learning_rate=rate(0.1), min_dim_size_to_factor=4),
    "adafactor_momentum": lambda rate: Adafactor(
        learning_rate=rate(0.1), min_dim_size_to_factor=4, momentum=0.9, weight_decay=1e-4, clip=5.0
    ),
    "per_path": lambda rate: PerPath(
        rules=(("bowl/*", SGD(learning_rate=rate(0.1))), ("**", AdamW(learning_rate=rate(0.1), weight_decay=1e-3)))
    ),
}
SPECS = {
    "bowl": {"x": Param(shape=(5,), axes=(None,), init=Normal(1.0), decay=False)},
    "regression": {
        "w": linear((8, 4), ("embed", "mlp"), fan_in=8),
        "b": vector((4,), ("mlp",), 0.5),
        "none": {},  # a layer without parameters
    },
}


@cache
def problem():
    """The two losses of a convex bowl and of a linear regression whose targets a linear map fits exactly."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs, weight = jax.random.normal(keys[0], (64, 8)), jax.random.normal(keys[1], (8, 4))
    centre = 1.0 + jax.random.normal(keys[2], (5,))

    def losses(params):
        outputs = inputs @ params["regression"]["w"] + params["regression"]["b"]
        bowl = jnp.sum(jnp.linspace(0.5, 2.0, 5) * jnp.square(params["bowl"]["x"] - centre))
        return jnp.stack([bowl, jnp.square(outputs - inputs @ weight - 0.3).mean()])

    return jax.jit(losses)


@cache
def first_params():
    flat = flatten(init_params(SPECS, jax.random.key(1)))
    return map_tree(lambda path, spec: flat[path], SPECS)


@cache
def trained(optimizer, schedule):
    """(losses before, losses after, the compiled step, state before, state after) of a whole run."""
    losses = problem()
    tx = OPTIMIZERS[optimizer](SCHEDULES[schedule]).build(SPECS, STEPS)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: losses(p).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = first_params()
    first = state = tx.init(params)
    before = losses(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return before, losses(params), step, first, state


# An optimizer sees nothing of a schedule but its values, so each meets the cosine and each schedule meets AdamW.
TABLE = [(optimizer, "cosine") for optimizer in OPTIMIZERS]
TABLE += [("adamw", schedule) for schedule in SCHEDULES if schedule != "cosine"]


@pytest.mark.parametrize(("optimizer", "schedule"), TABLE)
def test_converges_on_a_convex_bowl_and_a_regression(optimizer, schedule):
    before, after, *_ = trained(optimizer, schedule)
    assert (after < 0.02 * before).all(), (before, after)


@pytest.mark.parametrize(("optimizer", "schedule"), TABLE)
def test_step_compiles_once_and_state_has_no_weak_types(optimizer, schedule):
    *_, step, first, last = trained(optimizer, schedule)
    assert step._cache_size() == 1
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert describe(first) == describe(last)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(last))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_keep_structure_and_dtype_while_state_is_float32(optimizer):
    tx = OPTIMIZERS[optimizer](SCHEDULES["constant"]).build(SPECS, STEPS)
    params = map_tree(lambda path, spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16), SPECS)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert updates == params
    assert new_state == state
    moments = {str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert moments <= {"float32", "bfloat16"} if optimizer == "adamw_bfloat16" else moments <= {"float32"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_config_survives_the_round_trip_and_is_hashable(optimizer):
    config = OPTIMIZERS[optimizer](SCHEDULES["wsd"])
    assert from_config_dict(config, to_config_dict(config)) == config
    assert isinstance(hash(config), int)


SHARDED_SPECS = {
    "w": linear((16, 8), ("embed", "mlp"), fan_in=16),
    "stacked": linear((3, 16, 8), ("layers", "embed", "mlp"), fan_in=16),
    "b": vector((8,), ("mlp",), 0.1),
}


def sharded_run(config):
    """(params and state after three steps on a mesh, the same without a mesh, the shardings they should have)."""
    mesh = make_mesh(MeshShape(data=1, fsdp=4, model=2), jax.devices()[:8])
    tx = config.build(SHARDED_SPECS, STEPS)
    partitions = param_partitions(SHARDED_SPECS, Rules(), dict(mesh.shape))
    shardings = (
        named(mesh, partitions),
        named(mesh, state_partitions(tx, abstract_params(SHARDED_SPECS), partitions)),
    )

    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    def run(step, params, state):
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    params = init_params(SHARDED_SPECS, jax.random.key(0))
    state = tx.init(params)
    on_mesh = jax.jit(step, in_shardings=shardings, out_shardings=shardings)
    return run(on_mesh, *jax.device_put((params, state), shardings)), run(jax.jit(step), params, state), shardings


SHARDED = {
    "adamw": OPTIMIZERS["adamw"],
    "adafactor": OPTIMIZERS["adafactor_momentum"],
    "per_path": lambda rate: PerPath(
        rules=(("stacked", OPTIMIZERS["adafactor"](rate)), ("**", OPTIMIZERS["sgd_nesterov"](rate)))
    ),
}


@pytest.mark.parametrize("optimizer", SHARDED)
def test_sharded_state_gives_the_unsharded_result_and_keeps_its_sharding(optimizer):
    on_mesh, alone, shardings = sharded_run(SHARDED[optimizer](SCHEDULES["constant"]))
    for got, sharding in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(shardings), strict=True):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
    for got, want in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)  # sums in another order
    if optimizer == "adamw":
        params, state = on_mesh
        assert not params["w"].sharding.is_fully_replicated
        for moments in (state["scale_by_adam"].mu, state["scale_by_adam"].nu):
            assert {path: x.sharding for path, x in moments.items()} == {path: x.sharding for path, x in params.items()}


# Clipping, masks and scales


def update_once(config, specs, grads, params, steps=10):
    tx = config.build(specs, steps)
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params)


TWO = {"a": {"w": linear((4, 2), (None, None), 4)}, "b": {"w": linear((4, 2), (None, None), 4)}}


def two(value):
    return map_tree(lambda path, spec: jnp.full(spec.shape, value), TWO)


def test_update_scale_multiplies_the_adam_update_but_not_the_decay():
    grads, params = two(1.0), two(2.0)
    config = AdamW(learning_rate=Constant(value=0.1), weight_decay=0.5, update_scale=(("a/*", 0.25),))
    updates = update_once(config, TWO, grads, params)
    np.testing.assert_allclose(updates["a"]["w"], -0.1 * (0.25 * 1.0 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["b"]["w"], -0.1 * (1.0 + 0.5 * 2.0), rtol=1e-5)


def test_first_matching_scale_wins():
    config = SGD(learning_rate=Constant(value=1.0), update_scale=(("a/*", 0.5), ("**", 3.0)))
    updates = update_once(config, TWO, two(1.0), two(0.0))
    np.testing.assert_allclose(updates["a"]["w"], -0.5)
    np.testing.assert_allclose(updates["b"]["w"], -3.0)


def test_decay_skips_parameters_whose_spec_says_so():
    specs = {"w": linear((2, 2), (None, None), 2), "norm": vector((2,), (None,), 1.0)}
    params = {"w": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    for config in (
        AdamW(learning_rate=Constant(value=0.5), weight_decay=0.1),
        SGD(learning_rate=Constant(value=0.5), weight_decay=0.1),
        Adafactor(learning_rate=Constant(value=0.5), weight_decay=0.1),
    ):
        updates = update_once(config, specs, zero, params)
        np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
        np.testing.assert_array_equal(updates["norm"], 0.0)


def test_decoupled_decay_follows_the_schedule_but_not_its_peak():
    params, zero = two(1.0), two(0.0)
    for peak in (0.01, 1.0):
        for kind in (AdamW, Adafactor):
            config = kind(learning_rate=Linear(peak=peak), weight_decay=0.1, decay="decoupled")
            tx = config.build(TWO, 4)
            state, update = tx.init(params), jax.jit(tx.update)
            for share in (1.0, 0.75, 0.5, 0.25):
                updates, state = update(zero, state, params)
                np.testing.assert_allclose(updates["a"]["w"], -0.1 * share, rtol=1e-5)


def test_clip_bounds_the_global_norm_and_leaves_small_gradients_alone():
    config = SGD(learning_rate=Constant(value=1.0), momentum=None, clip=2.0)
    large = update_once(config, TWO, two(10.0), two(0.0))
    assert optax.tree.norm(large) == pytest.approx(2.0, rel=1e-6)
    np.testing.assert_allclose(large["a"]["w"], -0.5, rtol=1e-6)  # 16 equal elements of norm 2
    np.testing.assert_allclose(update_once(config, TWO, two(0.1), two(0.0))["a"]["w"], -0.1, rtol=1e-6)


def test_mup_simple_shrinks_wide_models_and_leaves_narrow_ones():
    assert mup_simple(3072, globs=("**/ffn/*", "**/attention/*")) == (("**/ffn/*", 0.25), ("**/attention/*", 0.25))
    assert mup_simple(256, globs=("**",)) == (("**", 1.0),)
    assert mup_simple(512, globs=("**",), base=128) == (("**", 0.25),)


def test_scale_that_matches_nothing_is_refused_by_check_and_ignored_by_build():
    config = AdamW(learning_rate=Constant(value=0.1), update_scale=(("regresion/*", 0.5),))
    with pytest.raises(UserError, match=r"AdamW\.update_scale: 'regresion/\*' matches no .*nearest is 'regression/"):
        config.check(SPECS)
    config.build(SPECS, STEPS)


def test_scale_that_comes_after_a_wider_one_is_refused():
    config = SGD(learning_rate=Constant(value=0.1), update_scale=(("**", 0.5), ("bowl/x", 0.1)))
    with pytest.raises(UserError, match=r"SGD\.update_scale: 'bowl/x' comes too late, '\*\*' takes 'bowl/x' first"):
        config.check(SPECS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_check_accepts_globs_that_all_apply(optimizer):
    OPTIMIZERS[optimizer](SCHEDULES["constant"]).check(SPECS)


def test_switching_steps_off_keeps_the_structure_of_the_state():
    rate = Constant(value=0.1)
    full = AdamW(learning_rate=rate, clip=1.0, weight_decay=0.1, update_scale=(("**", 0.5),), decay="decoupled")
    bare = AdamW(learning_rate=rate, clip=None, weight_decay=0.0)
    params = first_params()
    states = [jax.eval_shape(config.build(SPECS, 10).init, params) for config in (full, bare)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


# PerPath


def test_per_path_gives_each_rule_the_result_of_its_optimizer_alone():
    sgd, adamw = SGD(learning_rate=Constant(value=0.5), clip=1.0), AdamW(learning_rate=Constant(value=0.1))
    params, grads = two(1.0), two(3.0)
    updates = update_once(PerPath(rules=(("a/*", sgd), ("**", adamw))), TWO, grads, params)
    for name, config in (("a", sgd), ("b", adamw)):
        part = lambda tree, name=name: {name: tree[name]}
        alone = update_once(config, part(TWO), part(grads), part(params))
        np.testing.assert_array_equal(updates[name]["w"], alone[name]["w"])


def test_per_path_builds_on_a_part_of_the_parameters():
    rate = Constant(value=0.5)
    config = PerPath(rules=(("a/*", SGD(learning_rate=rate)), ("b/*", AdamW(learning_rate=rate))))
    specs, params = {"a": TWO["a"]}, {"a": two(1.0)["a"]}
    updates = update_once(config, specs, params, params)
    np.testing.assert_allclose(updates["a"]["w"], -0.5)


def test_per_path_refuses_a_parameter_without_a_rule():
    config = PerPath(rules=(("a/*", SGD(learning_rate=Constant(value=0.5))),))
    for call in (lambda: config.build(TWO, 10), lambda: config.check(TWO)):
        with pytest.raises(UserError, match=r"PerPath\.rules: no glob matches the parameter 'b/w'; add"):
            call()


def test_per_path_check_refuses_a_rule_without_parameters_and_looks_into_its_optimizers():
    rate = Constant(value=0.1)
    unused = PerPath(rules=(("c/*", SGD(learning_rate=rate)), ("**", AdamW(learning_rate=rate))))
    with pytest.raises(UserError, match=r"PerPath\.rules: 'c/\*' matches no trained parameter"):
        unused.check(TWO)
    scaled = SGD(learning_rate=rate, update_scale=(("b/*", 0.5),))
    outside = PerPath(rules=(("a/*", scaled), ("**", SGD(learning_rate=rate))))
    with pytest.raises(UserError, match=r"SGD\.update_scale: 'b/\*' matches no .*; the nearest is 'a/w'"):
        outside.check(TWO)


def test_learning_rates_have_readable_names():
    rate = lambda value: AdamW(learning_rate=Constant(value=value))
    assert list(rate(0.1).learning_rates(10)) == ["learning_rate"]
    config = PerPath(rules=(("generator/**", rate(1)), ("**/embed/*", rate(2)), ("**", rate(3)), ("*", rate(4))))
    rates = {name: float(fn(0)) for name, fn in config.learning_rates(10).items()}
    assert rates == {
        "learning_rate/generator": 1.0,
        "learning_rate/embed": 2.0,
        "learning_rate/rest": 3.0,
        "learning_rate/rest~2": 4.0,
    }


def test_overrides_reach_into_the_rules():
    config = PerPath(rules=(("**", AdamW(learning_rate=Cosine(peak=0.1), clip=1.0)),))
    changed = override(config, {"rules.0.1.learning_rate.peak": "0.2", "rules.0.1.clip": "none"})
    assert changed.rules[0][1].learning_rate.peak == 0.2
    assert changed.rules[0][1].clip is None


RATE = Constant(value=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(learning_rate=0.1), "AdamW.learning_rate=0.1: it takes a schedule, such as Constant(value=0.1)"),
        (lambda: AdamW(learning_rate=RATE, b1=1.0), "AdamW.b1=1.0: it takes a number in [0, 1)"),
        (lambda: AdamW(learning_rate=RATE, b2=-0.1), "AdamW.b2=-0.1: "),
        (lambda: AdamW(learning_rate=RATE, eps=0.0), "AdamW.eps=0.0: "),
        (lambda: AdamW(learning_rate=RATE, weight_decay=-0.1), "AdamW.weight_decay=-0.1: "),
        (lambda: AdamW(learning_rate=RATE, decay="fully"), "AdamW.decay='fully': it takes 'coupled' or 'decoupled'"),
        (lambda: AdamW(learning_rate=RATE, clip=0.0), "AdamW.clip=0.0: it takes a norm above 0, or None"),
        (lambda: AdamW(learning_rate=RATE, moment_dtype="int8"), "AdamW.moment_dtype='int8': it takes 'float32' or"),
        (lambda: AdamW(learning_rate=RATE, update_scale=("**", 0.5)), "AdamW.update_scale=('**', 0.5): it takes pairs"),
        (lambda: AdamW(learning_rate=RATE, update_scale=(("**", 0.0),)), "AdamW.update_scale=(('**', 0.0),): "),
        (lambda: AdamW(learning_rate=Constant(value=0.0), decay="decoupled"), "AdamW.decay='decoupled' follows the "),
        (lambda: SGD(learning_rate=RATE, momentum=1.5), "SGD.momentum=1.5: "),
        (lambda: SGD(learning_rate=RATE, momentum=None, nesterov=True), "SGD.nesterov=True: it takes False where "),
        (lambda: Adafactor(learning_rate=RATE, decay_rate=1.5), "Adafactor.decay_rate=1.5: "),
        (lambda: Adafactor(learning_rate=RATE, clipping_threshold=0.5), "Adafactor.clipping_threshold=0.5: "),
        (lambda: Adafactor(learning_rate=RATE, min_dim_size_to_factor=0), "Adafactor.min_dim_size_to_factor=0: "),
        (lambda: PerPath(rules=()), "PerPath.rules=(): it takes pairs of a glob and an optimizer, at least one"),
        (lambda: PerPath(rules=(("**", RATE),)), "PerPath.rules="),
        (
            lambda: PerPath(rules=(("**", PerPath(rules=(("**", SGD(learning_rate=RATE)),))),)),
            "PerPath.rules holds another PerPath",
        ),
    ],
)
def test_refused_value_is_named_with_its_field(make, message, unchecked):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value).startswith(message)
