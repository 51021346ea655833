"""The options of optimizers that act on paths: clipping, masks, scales, and rules per group."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from axrepro.core import UserError, override
from axrepro.core.param import Normal, Param, linear, stack, vector
from axrepro.core.tree import map_tree
from axrepro.optim import (
    LARS,
    SGD,
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    Linear,
    Lion,
    Muon,
    PerPath,
    mup_simple,
)
from axrepro.optim.muon import matrix_dims

RATE = Constant(value=0.1)
SPECS = {
    "bowl": {"x": Param(shape=(5,), axes=(None,), init=Normal(1.0), decay=False)},
    "regression": {"w": linear((8, 4), ("embed", "mlp"), fan_in=8), "b": vector((4,), ("mlp",), 0.5), "none": {}},
}


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
        Lion(learning_rate=Constant(value=0.5), weight_decay=0.1),
        Muon(learning_rate=Constant(value=0.5), weight_decay=0.1),
    ):
        updates = update_once(config, specs, zero, params)
        np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
        np.testing.assert_array_equal(updates["norm"], 0.0)


def test_decoupled_decay_follows_the_schedule_but_not_its_peak():
    params, zero = two(1.0), two(0.0)
    for peak in (0.01, 1.0):
        for kind in (AdamW, Adafactor, Lion, Muon):
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
    config.build(SPECS, 10)


def test_scale_that_comes_after_a_wider_one_is_refused():
    config = SGD(learning_rate=Constant(value=0.1), update_scale=(("**", 0.5), ("bowl/x", 0.1)))
    with pytest.raises(UserError, match=r"SGD\.update_scale: 'bowl/x' comes too late, '\*\*' takes 'bowl/x' first"):
        config.check(SPECS)


def test_switching_steps_off_keeps_the_structure_of_the_state():
    rate = Constant(value=0.1)
    full = AdamW(learning_rate=rate, clip=1.0, weight_decay=0.1, update_scale=(("**", 0.5),), decay="decoupled")
    bare = AdamW(learning_rate=rate, clip=None, weight_decay=0.0)
    params = map_tree(lambda path, spec: jnp.zeros(spec.shape), SPECS)
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
    with pytest.raises(UserError, match=r"PerPath\.rules\.0\.1\.update_scale: 'b/\*' matches no .*is 'a/w'"):
        outside.check(TWO)


def test_muon_takes_the_inputs_and_outputs_of_a_matrix_from_its_axes():
    qkv = ("embed", "heads", "head_dim")
    shapes = {
        "q": (linear((8, 2, 4), qkv, 8), ((0,), (1, 2))),
        "k": (linear((8, 1, 4), ("embed", "kv_heads", "head_dim"), 8), ((0,), (1, 2))),
        "out": (linear((2, 4, 8), ("heads", "head_dim", "embed"), 8), ((0, 1), (2,))),
        "up": (linear((8, 16), ("embed", "mlp"), 8), ((0,), (1,))),
        "kernel": (linear((3, 3, 8, 16), (None, None, "embed", "mlp"), 72), ((0, 1, 2), (3,))),
        "head": (linear((8, 32), ("embed", "vocab"), 8), None),
        "table": (Param(shape=(32, 8), axes=("vocab", "embed"), init=Normal(1.0), decay=False), None),
        "router": (linear((8, 4), (None, None), 8, decay=False), None),
        "norm": (vector((8,), (None,), 1.0), None),
        "bias": (vector((2, 4), ("heads", "head_dim"), 0.0), None),
    }
    specs = {name: spec for name, (spec, _) in shapes.items()}
    layers = stack(stack(specs, 3, "expert"), 2, "layers")
    for name, (spec, dims) in shapes.items():
        assert matrix_dims(spec) == dims, name
        assert matrix_dims(layers[name]) == dims, name  # those of one layer
        assert (spec.num_stacks, layers[name].num_stacks) == (0, 2)


def test_muon_refuses_parameters_without_a_hidden_matrix():
    with pytest.raises(UserError, match=r"Muon\.learning_rate: none of its parameters is a hidden matrix; take AdamW"):
        Muon(learning_rate=RATE).check({"bowl": SPECS["bowl"]})


def test_learning_rates_have_readable_names_and_follow_the_optimizer_s_own_count():
    def rates(config, specs, updates):
        tx, params = config.build(specs, 10), map_tree(lambda path, spec: jnp.ones(spec.shape), specs)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(updates):
            _, state = update(params, state, params)
        return {name: float(rate) for name, rate in config.learning_rates(state, 10).items()}

    rate = lambda value: AdamW(learning_rate=Linear(peak=value))
    assert rates(rate(1.0), SPECS, 0) == {"learning_rate": 1.0}
    assert rates(rate(1.0), SPECS, 2) == {"learning_rate": pytest.approx(0.8)}
    config = PerPath(rules=(("bowl/**", rate(1.0)), ("**/b", rate(2.0)), ("**", rate(3.0)), ("*", rate(4.0))))
    want = {"learning_rate/bowl": 0.5, "learning_rate/b": 1.0, "learning_rate/rest": 1.5}
    assert rates(config, SPECS, 5) == {name: pytest.approx(value) for name, value in want.items()}
    assert rates(config, {"bowl": SPECS["bowl"]}, 0) == {"learning_rate/bowl": 1.0}  # a phase that trains a part


def test_overrides_reach_into_the_rules():
    config = PerPath(rules=(("**", AdamW(learning_rate=Cosine(peak=0.1), clip=1.0)),))
    changed = override(config, {"rules.0.1.learning_rate.peak": "0.2", "rules.0.1.clip": "none"})
    assert changed.rules[0][1].learning_rate.peak == 0.2
    assert changed.rules[0][1].clip is None


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
        (lambda: Lion(learning_rate=RATE, b1=1.0), "Lion.b1=1.0: it takes a number in [0, 1)"),
        (lambda: Muon(learning_rate=RATE, ns_steps=0), "Muon.ns_steps=0: it takes 1 step or more"),
        (lambda: Muon(learning_rate=RATE, rms=0.0), "Muon.rms=0.0: it takes a number above 0, or None"),
        (lambda: LARS(learning_rate=RATE, trust=0.0), "LARS.trust=0.0: it takes a number above 0"),
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
