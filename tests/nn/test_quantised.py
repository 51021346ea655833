"""Products in 8 bits: the rounding and its backward pass, where they apply, and what they cost in accuracy."""

import re
import sys
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axrepro.core import Context, MeshShape, Rules, UserError, make_mesh, override
from axrepro.core.aux import objective
from axrepro.core.param import abstract_params, init_params
from axrepro.core.products import Products
from axrepro.core.sharding import named, param_partitions
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM
from axrepro.nn import Attention, Block, FeedForward, MoE, Repeat
from axrepro.nn.linear import matmul
from axrepro.nn.quantised import quantised_product
from axrepro.train.experiment import Train
from axrepro.train.state import Program

CASES = {"to_width": ("btd,df->btf", 1), "to_heads": ("btd,dhk->bthk", 1), "from_heads": ("bthk,hkd->btd", 2)}
SIZES = dict(b=2, t=8, d=16, f=24, h=4, k=8)
TYPES = {
    "int8": (np.int8, np.int8, 127, 127),
    "fp8": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, 448, 57344),
}


def operands(einsum: str, dtype="float32"):
    """Random x, weight and gradient."""
    terms = einsum.replace("->", ",").split(",")
    shapes = [tuple(SIZES[axis] for axis in term) for term in terms]
    return tuple(jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes))


def rounded(a: np.ndarray, axes: tuple[int, ...], dtype, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the format, scale): one scale for each slice along `axes`."""
    a = np.asarray(a, np.float32)
    scale = np.abs(a).max(axes, keepdims=True) / np.float32(largest)
    a = a / scale
    a = np.rint(a) if dtype is np.int8 else a.astype(dtype)
    return a.astype(np.float64), scale


def oracle(x, w, g, contracted: int, kind: str):
    """y, dx and dw as the module's equations say, on matrices."""
    shapes = x.shape, w.shape
    inner = int(np.prod(w.shape[:contracted]))
    x, w = np.asarray(x, np.float32).reshape(-1, inner), np.asarray(w, np.float32).reshape(inner, -1)
    shape, g = g.shape, np.asarray(g, np.float32).reshape(x.shape[0], w.shape[1])
    forward, gradient, largest, largest_gradient = TYPES[kind]
    xq, xs = rounded(x, (1,), forward, largest)
    wq, ws = rounded(w, (0,), forward, largest)
    y = xs * ws * (xq @ wq)
    aq, a_scale = rounded(g * ws, (1,), gradient, largest_gradient)
    dx = a_scale * (aq @ wq.T)
    bq, b_scale = rounded(g * xs, (0,), gradient, largest_gradient)
    dw = x.astype(np.float64).T @ g if kind == "int8" else b_scale * (xq.T @ bq)
    return y.reshape(shape), dx.reshape(shapes[0]), dw.reshape(shapes[1])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_equations(case, kind, assert_close):
    einsum, contracted = CASES[case]
    x, w, g = operands(einsum)
    y, pull = jax.vjp(lambda x, w: quantised_product(x, w, contracted, kind), x, w)
    for actual, desired in zip((y, *pull(g)), oracle(x, w, g, contracted, kind), strict=True):
        assert_close(actual, desired, 1e-6)  # sums in float32


@pytest.mark.parametrize("kind", TYPES)
def test_the_error_is_at_most_what_rounding_to_the_nearest_allows(kind):
    x, w, _ = operands("btd,df->btf")
    exact = np.einsum("btd,df->btf", *(np.asarray(a, np.float64) for a in (x, w)))
    error = np.abs(quantised_product(x, w, 1, kind) - exact)

    def step(a, axis):  # half the distance of neighbours: constant, or 2^-4 of the number above the smallest normal one
        a = np.abs(np.asarray(a, np.float64))
        scale = a.max(axis, keepdims=True) / TYPES[kind][2]
        return scale / 2 if kind == "int8" else np.maximum(a / 16, scale * 2.0**-10)

    dx, dw = step(x, 2) + 0 * x, step(w, 0) + 0 * w
    terms = [(dx, np.abs(w)), (np.abs(x), dw), (dx, dw)]
    bound = sum(np.einsum("btd,df->btf", a, b) for a, b in terms)
    assert (error <= bound + 1e-5).all()
    assert error.mean() > 0.02 * bound.mean()  # random signs: 1 / sqrt(D) of the bound


@pytest.mark.parametrize("kind", TYPES)
def test_gradients_of_any_size_keep_their_digits(kind):
    x, w, g = operands("btd,df->btf")
    _, pull = jax.vjp(lambda x, w: quantised_product(x, w, 1, kind), x, w)
    for small, usual in zip(pull(g * 2.0**-70), pull(g), strict=True):
        np.testing.assert_array_equal(small, usual * 2.0**-70)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", TYPES)
def test_what_is_not_finite_stays_so(kind, bad):
    # int8 has no number for it: a run would go on with garbage
    x, w, g = operands("btd,df->btf")
    y, pull = jax.vjp(lambda x, w: quantised_product(x, w, 1, kind), x, w)
    dx, dw = pull(g.at[1, 2, 3].set(bad))
    assert not np.isfinite(dx[1, 2]).any()
    assert not np.isfinite(dw[:, 3]).any()
    y = quantised_product(x.at[1, 2, 3].set(bad), w, 1, kind)
    assert not np.isfinite(y[1, 2]).any()
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(quantised_product(x, w.at[3, 4].set(bad), 1, kind)[..., 4]).any()


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_zeros_give_zeros(kind):
    x, w, g = operands("btd,df->btf")
    y, pull = jax.vjp(lambda x, w: quantised_product(x, w, 1, kind), x.at[0].set(0), w)
    dx, dw = pull(g.at[1].set(0))
    assert not y[0].any()
    assert not dx[1].any()
    assert not dw.any()


@pytest.mark.parametrize("kind", TYPES)
def test_gradients_have_the_types_of_their_operands(kind):
    x, w, g = operands("btd,df->btf", "bfloat16")
    ctx = Context(dtype="bfloat16", products=Products(format=kind))
    y, pull = jax.vjp(lambda x, w: matmul(x, w, ctx, part="ffn"), x, w.astype("float32"))
    assert (y.dtype, *(a.dtype for a in pull(g))) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("kind", TYPES)
def test_each_expert_has_scales_of_its_own(kind):
    x, w, _ = operands("btd,dhk->bthk")
    x, w = jnp.stack([x, 100 * x]), jnp.stack([w, w[::-1] / 7])
    product = lambda x, w: quantised_product(x, w, 1, kind)
    for actual, a, b in zip(jax.vmap(product)(x, w), x, w, strict=True):
        np.testing.assert_array_equal(actual, product(a, b))


VOCAB, DIM, HIDDEN, LENGTH, ROWS = 48, 32, 64, 16, 8


@cache
def method(ffn: str) -> LanguageModel:
    """Two blocks, dense or sparse."""
    layer = FeedForward(hidden=HIDDEN)
    if ffn == "moe":
        layer = MoE(expert=layer, num_experts=4)
    layers = Repeat(layer=Block(attention=Attention(num_heads=4), ffn=layer), times=2)
    return LanguageModel(model=CausalLM(vocab_size=VOCAB, dim=DIM, layers=layers), chunk=None)


def batch(step: int = 0) -> dict:
    """Each token follows from the one before it, but for one in eight."""
    rng = np.random.default_rng(step)
    tokens = np.zeros((ROWS, LENGTH + 1), np.int32)
    tokens[:, 0] = rng.integers(0, VOCAB, ROWS)
    for t in range(LENGTH):
        noise = rng.random(ROWS) < 1 / 8
        tokens[:, t + 1] = np.where(noise, rng.integers(0, VOCAB, ROWS), (5 * tokens[:, t] + 7) % VOCAB)
    return {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}


@cache
def params(ffn: str) -> dict:
    return init_params(method(ffn).specs(), jax.random.key(0))


def loss(ffn: str, params: dict, batch: dict, **settings):
    return objective(method(ffn).loss(params, batch, Context(train=True, **settings)))


def eight_bit_products(ffn: str, products: Products) -> int:
    """How many products of a forward pass are in int8; the layers are a loop, so one block counts."""
    run = lambda params: loss(ffn, params, batch(), products=products)
    return str(jax.make_jaxpr(run)(abstract_params(method(ffn).specs()))).count("preferred_element_type=int32")


@pytest.mark.parametrize(
    ("ffn", "parts", "expected"),
    [
        ("dense", ("attention",), 4),
        ("dense", ("ffn",), 3),
        ("dense", ("experts",), 0),
        ("moe", ("ffn",), 0),
        ("moe", ("experts",), 3),
        ("moe", ("attention", "ffn", "experts"), 4 + 3),  # neither router nor head
    ],
)
def test_the_parts_that_are_named_are_in_8_bits_and_no_others(ffn, parts, expected):
    assert eight_bit_products(ffn, Products(format="int8", parts=parts)) == expected
    assert eight_bit_products(ffn, Products(parts=parts)) == 0


def test_exact_products_are_the_plain_ones():
    x, w, _ = operands("btd,df->btf")
    plain = lambda x, w: jax.lax.dot(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)
    expected = str(jax.make_jaxpr(plain)(x, w))
    for products in (Products(), Products(format="int8", parts=("experts",))):
        ours = lambda x, w, products=products: matmul(x, w, Context(products=products), part="ffn")
        assert str(jax.make_jaxpr(ours)(x, w)) == expected


def test_names_that_do_not_exist_are_errors(unchecked):
    with pytest.raises(UserError, match="unknown format of products 'int4'; did you mean 'int8'"):
        Products(format="int4")
    with pytest.raises(UserError, match="unknown part 'expert'; did you mean 'experts'"):
        Products(format="int8", parts=("expert",))


def test_the_choice_is_a_setting_of_the_run_and_reaches_evaluation_too(unchecked):
    settings = override(Train(steps=1), {"products.format": "int8", "products.parts": "ffn,experts"})
    program = Program(SimpleNamespace(train=settings, rules=Rules()), mesh=None, platform="cpu")
    for train in (True, False):
        assert program.context(None, train).products == Products(format="int8", parts=("ffn", "experts"))
    assert Train(steps=1).products.of("ffn") == "exact"


def test_without_qwix_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    x, w, _ = operands("btd,df->btf")
    assert matmul(x, w, Context(), part="ffn").shape == (2, 8, 24)
    with pytest.raises(UserError, match=r"pip install axrepro\[quant\]"):
        quantised_product(x, w, 1, "int8")


# Other fusions change last bits, by which a few numbers round to their other neighbour: a small part of what rounding
# all of them does to these gradients.
FLIPS = 5e-3


@cache
def gradient(ffn: str, kind: str, remat: str = "none"):
    """Compiled (loss, gradients) of a model."""
    run = jax.value_and_grad(partial(loss, ffn, products=Products(format=kind), remat=remat))
    return jax.jit(run).lower(abstract_params(method(ffn).specs()), batch()).compile()


def test_rematerialisation_changes_nothing(assert_close):
    expected, expected_grads = gradient("dense", "int8")(params("dense"), batch())
    actual, grads = gradient("dense", "int8", "products")(params("dense"), batch())
    assert_close(actual, expected, 1e-4)
    assert_close(grads, expected_grads, FLIPS)


def test_keeping_products_keeps_their_values_and_not_their_sums(capsys):
    run = lambda x, params, remat: method("dense").model.layers.layer.apply(
        params, x, Context(dtype="bfloat16", products=Products(format="fp8"), remat=remat)
    )[0]
    x = jnp.zeros((ROWS, LENGTH, DIM), jnp.bfloat16)
    block = jax.tree.map(lambda a: a[0], params("dense")["layers"])
    jax.ad_checkpoint.print_saved_residuals(partial(run, remat="products"), x, block)
    kept = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]
    assert sum("named 'product'" in line or "named 'ffn_" in line for line in kept) == 4 + 2  # the last is not needed
    assert not [line for line in kept if re.match(r"(f32|i32)\[8,16,(32|64|4,8)\]", line)]


def test_eight_devices_compute_what_one_does(assert_close):
    mesh = make_mesh(MeshShape(data=1, fsdp=2, expert=2, model=2))
    shardings = named(mesh, param_partitions(method("moe").specs(), Rules(), dict(mesh.shape)))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    run = jax.value_and_grad(partial(loss, "moe", products=Products(format="fp8"), mesh=mesh))
    step = jax.jit(run, in_shardings=(shardings, rows), out_shardings=(None, shardings))
    actual, grads = step(jax.device_put(params("moe"), shardings), jax.device_put(batch(), rows))
    expected, expected_grads = gradient("moe", "fp8")(params("moe"), batch())
    # float32 sums in another order
    assert float(actual) == pytest.approx(float(expected), rel=1e-4)
    assert_close(jax.device_get(grads), expected_grads, FLIPS)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_scale_covers_a_slice_that_is_split_over_devices(case, kind):
    einsum, contracted = CASES[case]
    x, w, _ = operands(einsum)
    mesh = make_mesh(MeshShape(data=2, model=4))
    inner = (None,) * (contracted - 1)
    split = [PartitionSpec("data", None, "model"), PartitionSpec("model", *inner, None)]
    product = jax.jit(lambda x, w: quantised_product(x, w, contracted, kind))
    sharded = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip((x, w), split, strict=True))
    # int32 sums are exact in any order
    np.testing.assert_allclose(product(*sharded), product(x, w), rtol=0, atol=0 if kind == "int8" else 1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_the_error_of_a_model_is_that_of_its_products(kind):
    def logits(kind):
        model, ctx = method("dense").model, Context(products=Products(format=kind))
        hidden, _ = model.apply(params("dense"), batch()["tokens"], ctx)
        return np.asarray(model.logits(params("dense"), hidden, ctx), np.float64)

    exact, ours = logits("exact"), logits(kind)
    # root mean square of rounding a Gaussian number, relative: a step of 2.5 sigma / 127.5 over sqrt(12) for slices of
    # 32 to 64; for 3 bits of mantissa a step of 1/8 to 1/16 of it. Either operand of a product has it.
    one = np.sqrt(2) * {"int8": 2.5 / 127.5 / np.sqrt(12), "fp8": 1 / 11 / np.sqrt(12)}[kind]
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    # two blocks of seven products, each of which may make up most of the stream: errors add as squares
    assert one < error < one * np.sqrt(2 * 7)
    losses = [gradient("dense", k)(params("dense"), batch())[0] for k in (kind, "exact")]
    # the slope of a token's loss is at most sqrt(2), and errors of 128 tokens have random signs
    assert abs(losses[0] - losses[1]) < np.sqrt(2) * np.std(ours - exact) * np.sqrt(VOCAB) / np.sqrt(128)


OPTIMIZER = optax.adamw(optax.cosine_decay_schedule(1e-2, 120))


@jax.jit
def update(params, state, grads):
    """One step of the optimizer."""
    delta, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, delta), state


@cache
def trained(kind: str, steps: int = 120) -> float:
    """Mean loss of the last steps of a short training."""
    weights, losses = params("dense"), []
    state = OPTIMIZER.init(weights)
    for i in range(steps):
        value, grads = gradient("dense", kind)(weights, batch(i))
        weights, state = update(weights, state, grads)
        losses.append(float(value))
    return float(np.mean(losses[-20:]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_training_ends_where_exact_training_does(kind):
    assert trained("exact") < 2.0 < np.log(VOCAB) / 1.5
    assert trained(kind) == pytest.approx(trained("exact"), rel=0.05)
