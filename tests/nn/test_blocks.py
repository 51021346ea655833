"""Blocks and stacks: residuals, dropout and rematerialisation."""

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axrepro.core import Context, Layer
from axrepro.core.config import swap
from axrepro.core.param import abstract_params, init_params
from axrepro.core.remat import NAMES, POLICIES
from axrepro.core.tree import flatten
from axrepro.errors import UserError
from axrepro.nn import Attention, Block, FeedForward, LayerNorm, MoE, Repeat, RMSNorm, Sequence, TopK, dropout

DIM = 8
BLOCK = Block(attention=Attention(num_heads=2), ffn=FeedForward(hidden=12))
X = jax.random.normal(jax.random.key(9), (2, 6, DIM))


@dataclass(frozen=True)
class Scale(Layer):
    """Multiplies by a number; stands for attention or feed-forward where only the residual matters."""

    factor: float

    def specs(self, dim):
        return {}

    def apply(self, params, x, ctx):
        return self.factor * x, {}


@dataclass(frozen=True)
class Noise(Layer):
    """Ones with dropout, whatever the input."""

    rate: float = 0.5

    def specs(self, dim):
        return {}

    def apply(self, params, x, ctx):
        return dropout(jnp.ones_like(x), self.rate, ctx), {}


@pytest.mark.parametrize("norm", [None, RMSNorm(), LayerNorm()], ids=["no_pre", "rms", "layer"])
@pytest.mark.parametrize("post", [None, LayerNorm()], ids=["no_post", "post"])
def test_a_block_adds_each_branch_to_its_input(norm, post, assert_close):
    block = Block(attention=Scale(3.0), ffn=Scale(-0.5), norm=norm, post_norm=post)
    params = init_params(block.specs(DIM), jax.random.key(0))
    assert set(params) - {"attention", "ffn"} == {
        f"{branch}_{place}" for branch in ("attention", "ffn")
        for place, layer in (("norm", norm), ("post_norm", post)) if layer is not None
    }  # fmt: skip

    def normed(layer, x):
        return x if layer is None else layer.apply(init_params(layer.specs(DIM), jax.random.key(0)), x, Context())[0]

    expected = X
    for factor in (3.0, -0.5):
        expected = expected + normed(post, factor * normed(norm, expected))
    assert_close(block.apply(params, X, Context())[0], expected, 1e-6)


def test_scanned_unrolled_and_written_out_stacks_are_equal(assert_close):
    params = init_params(Repeat(layer=BLOCK, times=3).specs(DIM), jax.random.key(0))
    written = {str(i): jax.tree.map(lambda w, i=i: w[i], params) for i in range(3)}
    apply = jax.jit(lambda stack, params: stack.apply(params, X, Context())[0], static_argnums=0)
    scanned = apply(Repeat(layer=BLOCK, times=3), params)
    assert_close(apply(Repeat(layer=BLOCK, times=3, unroll=2), params), scanned, 1e-6)
    assert_close(apply(Sequence((BLOCK,) * 3), written), scanned, 1e-6)


def test_dropout_keeps_the_mean_and_rescales_what_it_keeps():
    x = jnp.full((400, 500), 3.0)
    y = np.asarray(dropout(x, 0.25, Context(key=jax.random.key(0), train=True)))
    assert set(np.unique(y)) == {0.0, 4.0}
    # five standard errors of a share of 200 000 draws
    assert abs((y == 0).mean() - 0.25) < 5 * (0.25 * 0.75 / y.size) ** 0.5


def test_dropout_is_for_training_alone():
    ctx = Context(key=jax.random.key(0))
    np.testing.assert_array_equal(dropout(X, 0.5, ctx), X)
    np.testing.assert_array_equal(dropout(X, 0.0, ctx.replace(train=True)), X)
    assert np.any(dropout(X, 0.5, ctx.replace(train=True)) != X)
    with pytest.raises(ValueError, match=r"dropout=0\.5 in training needs ctx\.key"):
        dropout(X, 0.5, Context(train=True))
    assert dropout(X.astype(jnp.bfloat16), 0.5, ctx.replace(train=True)).dtype == jnp.bfloat16


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("stack", [Repeat, Sequence], ids=["scanned", "written_out"])
def test_every_layer_and_branch_drops_its_own_elements(stack, remat):
    # branches of zeros and ones: the output counts in how many of the four each element survived
    block = Block(attention=Noise(0.0), ffn=Noise(0.0), norm=None, dropout=0.5)
    layers = Repeat(layer=block, times=2) if stack is Repeat else Sequence((block, block))
    params = init_params(layers.specs(DIM), jax.random.key(0))
    x = jnp.zeros((4, 64, DIM))
    run = jax.jit(lambda key: layers.apply(params, x, Context(key=key, train=True, remat=remat))[0])
    y = np.asarray(run(jax.random.key(0))) / 2
    shares = [(y == n).mean() for n in range(5)]
    # binomial; one mask shared by two of the four would give 1/8 or more to the ends
    np.testing.assert_allclose(shares, np.array([1, 4, 6, 4, 1]) / 16, atol=5 * 0.5 / y.size**0.5)
    np.testing.assert_array_equal(run(jax.random.key(0)) / 2, y)
    assert np.any(run(jax.random.key(1)) / 2 != y)


def test_every_expert_drops_its_own_elements():
    # all tokens visit all experts with equal gates, each in the same slot everywhere: equal masks would leave 0 and 2
    moe = MoE(expert=Noise(), num_experts=4, router=TopK(k=4), capacity_factor=4.0)
    params = {"router": {"weight": jnp.zeros((DIM, 4))}, "experts": {}}
    x = jnp.ones((2, 16, DIM))
    y = jax.jit(lambda key: moe.apply(params, x, Context(key=key, train=True))[0])(jax.random.key(0))
    halves = 2 * np.asarray(y)
    np.testing.assert_allclose(halves, np.round(halves), atol=1e-5)
    assert set(np.unique(np.round(halves))) == {0, 1, 2, 3, 4}


STACKS = {
    "dense": Repeat(layer=BLOCK, times=2),
    "moe": Repeat(layer=replace(BLOCK, ffn=MoE(expert=FeedForward(hidden=12), num_experts=4)), times=2),
}


def value(stack, policy, params, x):
    y, _ = stack.apply(params, x, Context(remat=policy))
    return jnp.sin(3 * y).sum()


def gradient(stack, policy):
    return jax.value_and_grad(lambda params, x: value(stack, policy, params, x), argnums=(0, 1))


@cache
def compiled(kind: str, policy: str):
    stack = STACKS[kind]
    return jax.jit(gradient(stack, policy)).lower(abstract_params(stack.specs(DIM)), X).compile()


CASES = [("dense", name) for name in POLICIES if name != "none"] + [("moe", "full"), ("moe", "products_but_ffn")]


@pytest.mark.parametrize(("kind", "policy"), CASES)
def test_every_policy_gives_the_same_loss_and_gradients(kind, policy, assert_close):
    params = init_params(STACKS[kind].specs(DIM), jax.random.key(0))
    expected, (params_grad, x_grad) = compiled(kind, "none")(params, X)
    actual, (other_params_grad, other_x_grad) = compiled(kind, policy)(params, X)
    # the same operations on the same numbers, fused in other ways
    assert_close(actual, expected, 1e-6)
    assert_close(other_params_grad, params_grad, 3e-6)
    assert_close(other_x_grad, x_grad, 3e-6)


def products(kind: str, policy: str) -> int:
    """Matrix products in the gradient of one block, as traced."""
    stack = STACKS[kind]
    return str(jax.make_jaxpr(gradient(stack, policy))(abstract_params(stack.specs(DIM)), X)).count("dot_general[")


RECOMPUTED = {
    # of q, k, v, logits, weighted values, out, up, gate; the last product is never needed again
    "full": 8,
    "products": 2,  # the two of attention have no weight
    "attention": 7,
    "qkvo": 4,
    "products_but_ffn": 4,
    "offload_qkv": 5,
    "offload_qkvo": 4,
    "offload_input_qkvo": 4,
}


def test_each_policy_recomputes_the_products_it_does_not_keep():
    assert set(RECOMPUTED) == set(POLICIES) - {"none"}
    kept = products("dense", "none")
    assert {policy: products("dense", policy) - kept for policy in RECOMPUTED} == RECOMPUTED


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy and policy.offload])
def test_every_name_that_a_policy_moves_to_the_host_goes_there_and_back(policy):
    stack = STACKS["dense"]
    text = str(jax.make_jaxpr(gradient(stack, policy))(abstract_params(stack.specs(DIM)), X))
    assert text.count("device_put[") == 2 * len(POLICIES[policy].offload)


def test_keeping_all_products_with_weights_keeps_those_of_experts():
    # recomputed: the two of attention, and the sum over choices
    assert products("moe", "products") - products("moe", "none") <= 3


def test_recomputation_survives_compilation_and_saves_memory():
    count = lambda policy: compiled("moe", policy).as_text().count(" dot(")
    memory = lambda policy: compiled("moe", policy).memory_analysis().temp_size_in_bytes
    assert count("full") >= count("none") + 8
    assert memory("full") < 0.7 * memory("none")


def test_recomputation_survives_in_a_stack_that_is_written_out():
    # attention by rows is a loop itself
    block = swap(BLOCK, Attention, lambda attention: replace(attention, implementation="xla"))
    written_out = Repeat(layer=block, times=2, unroll=2)
    inputs = (abstract_params(written_out.specs(DIM)), X)
    texts = {p: jax.jit(gradient(written_out, p)).lower(*inputs).compile().as_text() for p in ("none", "full")}
    assert all(" while(" not in text for text in texts.values())
    assert texts["full"].count(" dot(") >= texts["none"].count(" dot(") + 2 * 8


def test_policies_name_activations_that_exist():
    text = str(jax.make_jaxpr(gradient(STACKS["moe"], "none"))(abstract_params(STACKS["moe"].specs(DIM)), X))
    for name in NAMES:
        assert f"name={name}\n" in text or f"name={name}]" in text, name
    for policy in POLICIES.values():
        assert policy is None or set(policy.save + policy.offload) <= set(NAMES)


def test_an_unknown_policy_is_an_error_with_the_nearest_name():
    with pytest.raises(UserError, match=r"unknown remat policy 'ful' \(train\.remat\); did you mean 'full'"):
        BLOCK.apply(init_params(BLOCK.specs(DIM), jax.random.key(0)), X, Context(remat="ful"))


def test_aux_mirrors_the_parameters():
    stack = STACKS["moe"]
    aux = jax.eval_shape(lambda params: stack.apply(params, X, Context())[1], abstract_params(stack.specs(DIM)))
    assert {path.rsplit("/", 1)[0] for path in flatten(aux)} == {"ffn", "ffn/router"}
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(aux))
