"""Low-rank adapters and freezing, around any method."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axrepro import registry
from axrepro.core import Context, MeshShape, Method, make_mesh, override, swap
from axrepro.core.aux import objective
from axrepro.core.param import abstract_params, count_params, init_params, linear, stack
from axrepro.core.sharding import Rules, param_partitions
from axrepro.core.tree import fill, flatten, map_tree, matches, select, unflatten
from axrepro.errors import UserError
from axrepro.methods.adapter import Freeze, LoRA
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM
from axrepro.nn import Attention, Block, FeedForward, MoE, Repeat, TopK, every
from axrepro.nn.linear import LowRank, matmul
from axrepro.train.effect import effect
from axrepro.train.loop import build_program, compile_step

VOCAB, DIM, ROWS, LENGTH = 20, 8, 8, 8


@cache
def language_model() -> LanguageModel:
    """Blocks in a scan, dense and sparse by turns, with a head of its own."""
    block = Block(attention=Attention(num_heads=2, num_kv_heads=1), ffn=FeedForward(hidden=12))
    sparse = every(Repeat(layer=block, times=4), 2, lambda ffn: MoE(expert=ffn, num_experts=4, router=TopK(k=2)))
    return LanguageModel(model=CausalLM(vocab_size=VOCAB, dim=DIM, layers=sparse), chunk=4)


ADAPTED = LoRA(method=language_model(), rank=2, alpha=6.0)


def batch() -> dict:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, ROWS, LENGTH), np.int32))
    return {"tokens": tokens[0], "targets": tokens[1]}


def random_params(method: Method) -> dict:
    """Every parameter random, the second factors and norms included."""
    rng = np.random.default_rng(1)
    draw = lambda path, leaf: jnp.asarray(rng.normal(path.endswith("scale"), 0.3, leaf.shape), jnp.float32)
    return map_tree(draw, abstract_params(method.specs()))


def dense(params: dict) -> dict:
    """The base parameters with W + 3 A B, from the definition; an index of a stack at a time."""
    flat, out = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}, {}
    for path, weight in flat.items():
        if "_lora_" in path:
            continue
        if f"{path}_lora_a" in flat:
            a, b, weight = flat[f"{path}_lora_a"], flat[f"{path}_lora_b"], weight.copy()
            stacks = 0 if path == "head" else 2 if "experts" in path else 1
            for index in np.ndindex(weight.shape[:stacks]):
                rows, columns = a[index].reshape(-1, 2), b[index].reshape(2, -1)
                weight[index] += 3.0 * (rows @ columns).reshape(weight[index].shape)
        out[path] = weight
    return fill(language_model().specs(), unflatten(out))


@cache
def value_and_gradients():
    """(params, value and gradients of the adapted method on a mesh, those of the plain one at W + 3 A B on none)."""
    params, mesh = random_params(ADAPTED), make_mesh(MeshShape(data=2, fsdp=2, expert=2))

    def of(method, params, mesh):
        ctx = Context(train=True, mesh=mesh)
        return jax.jit(jax.value_and_grad(lambda p, b: objective(method.loss(p, b, ctx))))(params, batch())

    return params, of(ADAPTED, params, mesh), of(language_model(), dense(params), None)


def test_the_product_adds_two_thin_products(assert_close):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, w, a, b = draw(3, 4, 5), draw(4, 5, 2, 3), draw(4, 5, 2), draw(2, 2, 3)
    weight = LowRank(w, a, b, scale=0.5, dropout=0.0, name="w")
    expected = np.einsum("bde,defg->bfg", x, w) + 0.5 * np.einsum("bde,der,rfg->bfg", x, a, b)
    for platform in ("cpu", "tpu"):
        assert_close(matmul(x, weight, Context(platform=platform), contracted=2), expected, 1e-6)
    assert_close(jnp.einsum("bde,defg->bfg", x, weight), expected, 1e-6)  # a layer with a product of its own


def test_dropout_is_on_the_input_of_the_first_factor_alone():
    eye, weight = jnp.eye(64), jnp.full((64, 64), 2.0)
    adapter = LowRank(weight, eye, eye, scale=1.0, dropout=0.25, name="w")
    ctx = Context(train=True, key=jax.random.key(0))
    y = matmul(eye, adapter, ctx) - weight
    np.testing.assert_allclose(np.unique(np.diag(y)), [0.0, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(matmul(eye, adapter, ctx.replace(train=False)), weight + eye)
    other = matmul(eye, replace(adapter, name="v"), ctx) - weight
    assert not np.array_equal(y, other)


def test_at_first_it_is_its_base_to_the_last_bit():
    params = init_params(ADAPTED.specs(), jax.random.key(0))
    base = init_params(language_model().specs(), jax.random.key(0))
    kept = select(params, lambda path: "_lora_" not in path)
    jax.tree.map(np.testing.assert_array_equal, kept, base)
    loss = jax.jit(lambda method, p: objective(method.loss(p, batch(), Context(train=True))), static_argnums=0)
    assert float(loss(ADAPTED, params)) == float(loss(language_model(), base))


def test_every_product_has_its_adapter_and_nothing_else():
    adapted = {path.removesuffix("_lora_a") for path in flatten(ADAPTED.specs()) if path.endswith("_lora_a")}
    weights = {path for path, spec in flatten(language_model().specs()).items() if spec.matmul}
    assert adapted == weights
    assert {"head", "layers/1/ffn/experts/up", "layers/1/ffn/router/weight", "layers/0/attention/out"} < adapted


def test_values_are_those_of_the_dense_sum(assert_close):
    _, (ours, _), (plain, _) = value_and_gradients()
    assert_close(ours, plain, 1e-5)


def test_gradients_of_the_factors_follow_from_that_of_the_dense_sum(assert_close):
    # of W + s A B: dA = s dW B', dB = s A' dW, and everything else as it is
    params, (_, ours), (_, plain) = value_and_gradients()
    flat, ours, plain = flatten(params), flatten(ours), flatten(plain)
    for path, gradient in plain.items():
        assert_close(ours[path], gradient, 1e-4)
        if f"{path}_lora_a" not in flat:
            continue
        a, b = flat[f"{path}_lora_a"], flat[f"{path}_lora_b"]
        stacks = 0 if path == "head" else 2 if "experts" in path else 1
        for index in np.ndindex(gradient.shape[:stacks]):
            rows, columns = a[index].reshape(-1, 2), b[index].reshape(2, -1)
            full = np.asarray(gradient[index]).reshape(len(rows), -1)
            to_a, to_b = 3.0 * full @ columns.T, 3.0 * rows.T @ full
            assert_close(ours[f"{path}_lora_a"][index], to_a.reshape(a[index].shape), 1e-4)
            assert_close(ours[f"{path}_lora_b"][index], to_b.reshape(b[index].shape), 1e-4)


def test_merged_parameters_are_the_dense_sums(assert_close):
    params, *_ = value_and_gradients()
    assert_close(ADAPTED.merged(params), dense(params), 1e-6)


def test_the_gradients_of_the_factors_never_form_a_product_of_the_size_of_the_weight():
    x, w, a, b = jnp.ones((3, 4)), jnp.ones((4, 5)), jnp.ones((4, 2)), jnp.ones((2, 5))
    value = lambda w, a, b: matmul(x, LowRank(w, a, b, scale=2.0, dropout=0.0, name="w"), Context()).sum()

    def products(wanted):
        jaxpr = jax.make_jaxpr(jax.grad(value, wanted))(w, a, b)
        shapes = [eqn.outvars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
        return sum(sorted(shape) == [4, 5] for shape in shapes)

    assert products((1, 2)) == 0
    assert products((0, 1, 2)) == 1


def test_factors_are_sharded_as_the_sides_of_their_weight():
    wide = linear((16, 4, 8), ("embed", "heads", "head_dim"), fan_in=16)

    class Wide(LanguageModel):
        def specs(self):
            return {"w": wide, "stacked": stack(stack({"w": wide}, 8, "expert"), 3, "layers")}

    specs = LoRA(method=Wide(model=language_model().model), rank=2).specs()
    partitions = flatten(param_partitions(specs, Rules(), {"fsdp": 2, "expert": 4, "model": 2}))
    assert partitions["w_lora_a"] == PartitionSpec(("fsdp", "expert"))
    assert partitions["w_lora_b"] == PartitionSpec(None, "model")
    assert partitions["stacked/w_lora_a"] == PartitionSpec(None, "expert", "fsdp")
    assert partitions["stacked/w_lora_b"] == PartitionSpec(None, "expert", None, "model")


@cache
def experiment():
    """moe_dense:tiny, smaller."""
    small = {
        "method.model.dim": 16,
        "method.model.layers.times": 1,
        "method.model.layers.layer.layers.0.ffn.hidden": 32,
        "method.model.layers.layer.layers.1.ffn.expert.hidden": 32,
        "data.sequence_length": 16,
    }
    return override(registry.load(registry.find("moe_dense:tiny", registry.index())), small)


def test_one_line_adapts_an_experiment_whose_base_then_stays_bit_for_bit():
    config = swap(experiment(), Method, lambda method: LoRA(method=method, rank=2, trained=("**/ffn_norm/*",)))
    program = build_program(config)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    start, losses = flatten(jax.device_get(state.params)), []
    tokens = np.random.default_rng(0).integers(0, 200, (8, 16), np.int32)
    rows = {"tokens": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens), "positions": tokens * 0}
    rows = jax.device_put(rows, NamedSharding(program.mesh, PartitionSpec("data")))
    step = compile_step(program, rows)
    for _ in range(8):
        state, report = step(state, rows)
        losses.append(float(report["scalars"]["loss"]))
    assert losses[-1] < losses[0] - 0.1
    params = flatten(jax.device_get(state.params))
    moved = {path for path, leaf in params.items() if not np.array_equal(leaf, start[path])}
    assert moved == {path for path in params if "_lora_" in path or "ffn_norm" in path}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(params[path].size for path in moved)


def test_frozen_parameters_cost_a_device_neither_gradient_nor_moments():
    config = swap(experiment(), Method, lambda method: Freeze(method=method, frozen=("layers/**",)))
    trained = sum(4 * spec.size for path, spec in flatten(config.method.specs()).items() if "layers" not in path)
    cost = effect(config, "cpu-1", 1).bytes_per_device
    assert cost["gradients"] == trained
    assert cost["optimizer state"] == pytest.approx(2 * trained, abs=64)  # and the counts of steps
    assert cost["parameters"] == effect(experiment(), "cpu-1", 1).bytes_per_device["parameters"]


def test_exceptions_from_freezing_stay_trained():
    method = Freeze(method=language_model(), trained=("**/*norm/scale", "head"))
    for path, spec in flatten(method.specs()).items():
        assert (spec.role == "trained") == (matches(path, "**/*norm/scale") or path == "head")


def test_flops_are_those_of_the_base_without_weight_gradients_and_with_thin_products():
    shapes = {name: array.shape for name, array in batch().items()}
    tokens, base = ROWS * LENGTH, language_model().flops(shapes)
    frozen = swap(ADAPTED, LoRA, lambda lora: replace(lora, targets=("head",)))
    forward = count_params(
        select(language_model().specs(), lambda p: flatten(language_model().specs())[p].matmul), True
    )
    thin = 2 * (DIM + VOCAB)
    expected = tokens * (-2 * forward + 3 * 2 * thin)
    got = frozen.flops(shapes)
    assert (got.causal - base.causal, got.full - base.full) == pytest.approx((expected, expected))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: LoRA(method=m, targets=("**/atention/*",)), r"'\*\*/atention/\*' matches no .*attention/"),
        (lambda m: LoRA(method=m, targets=("embed/table",)), "'embed/table' matches no parameter that it could choose"),
        (lambda m: LoRA(method=m, trained=("haed",)), "did you mean 'head'"),
        (lambda m: Freeze(method=m, frozen=("haed",)), "did you mean 'head'"),
        (lambda m: Freeze(method=m, trained=("haed",)), "did you mean 'head'"),
        (lambda m: LoRA(method=LoRA(method=m)), "matches no parameter that it could choose"),  # all is frozen there
        (lambda m: LoRA(method=m, rank=0), "rank of at least 1"),
    ],
)
def test_a_glob_without_a_match_is_an_error_with_the_nearest(make, message):
    with pytest.raises(UserError, match=message):
        make(language_model()).specs()
