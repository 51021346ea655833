"""Optimizers and averages against their equations in numpy, against optax's aliases and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from axrepro.core.param import init_params, linear, vector
from axrepro.core.tree import flatten
from axrepro.optim import LARS, SGD, Adafactor, AdamW, Constant, Cosine, Ema, Linear, Lion, Muon, Uniform

SPECS = {
    "embed": {"table": linear((12, 6), (None, None), 6, decay=False)},
    "ffn": {"up": linear((6, 8), (None, None), 6), "bias": vector((8,), (None,), 0.5)},
}
STEPS = 20


def gradients(step):
    """Gradients of varied size: their global norm lies on both sides of 1."""
    rng = np.random.default_rng(step)
    size = 0.02 if step % 3 == 0 else 1.0
    return {path: (size * rng.normal(size=spec.shape)).astype(np.float32) for path, spec in flatten(SPECS).items()}


def nested(flat):
    return {
        "embed": {"table": jnp.asarray(flat["embed/table"])},
        "ffn": {"up": jnp.asarray(flat["ffn/up"]), "bias": jnp.asarray(flat["ffn/bias"])},
    }


def run(tx):
    """Parameters after 20 updates of `tx`, by path."""
    params = init_params(SPECS, jax.random.key(0))
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(STEPS):
        params, state = step(params, state, nested(gradients(index)))
    return flatten(params)


def assert_close(got, want, rtol=2e-5):
    # float32 against float64 (or another order of operations): a few units in the last place, summed over 20 steps
    for path in got:
        np.testing.assert_allclose(np.asarray(got[path]), np.asarray(want[path]), rtol=rtol, atol=1e-6, err_msg=path)


def adamw_by_hand(rate, peak, b1, b2, eps, wd, decoupled, clip, scale):
    """The equations of AdamW's docstring in float64."""
    params = {path: np.asarray(x, np.float64) for path, x in flatten(init_params(SPECS, jax.random.key(0))).items()}
    first = {path: np.zeros_like(x) for path, x in params.items()}
    second = {path: np.zeros_like(x) for path, x in params.items()}
    clipped = []
    for t in range(STEPS):
        grads = {path: g.astype(np.float64) for path, g in gradients(t).items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        clipped.append(clip is not None and norm > clip)
        for path, p in params.items():
            g = grads[path] * (clip / norm if clipped[-1] else 1.0)
            first[path] = b1 * first[path] + (1 - b1) * g
            second[path] = b2 * second[path] + (1 - b2) * g**2
            m, v = first[path] / (1 - b1 ** (t + 1)), second[path] / (1 - b2 ** (t + 1))
            u = scale.get(path, 1.0) * m / (np.sqrt(v) + eps)
            w = wd if path == "ffn/up" else 0.0
            if decoupled:
                params[path] = p - rate(t) / peak * (peak * u + w * p)
            else:
                params[path] = p - rate(t) * (u + w * p)
    return params, clipped


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize(("clip", "scale"), [(None, ()), (1.0, (("ffn/*", 0.25), ("**/table", 2.0)))])
def test_adamw_follows_its_equations(decay, clip, scale):
    config = AdamW(
        learning_rate=Linear(peak=0.05, warmup=4, floor=0.2),
        b1=0.8,
        b2=0.95,
        eps=1e-3,
        weight_decay=0.3,
        decay=decay,
        clip=clip,
        update_scale=scale,
    )
    rate = lambda t: 0.05 * t / 4 if t < 4 else 0.05 * (1 - 0.8 * (t - 4) / (STEPS - 4))
    factors = {"ffn/up": 0.25, "ffn/bias": 0.25, "embed/table": 2.0} if scale else {}
    want, clipped = adamw_by_hand(rate, 0.05, 0.8, 0.95, 1e-3, 0.3, decay == "decoupled", clip, factors)
    assert clip is None or 0 < sum(clipped) < STEPS  # both branches of the clipping are met
    assert_close(run(config.build(SPECS, STEPS)), want)


DECAYED = {"embed": {"table": False}, "ffn": {"up": True, "bias": False}}


def test_coupled_adamw_is_that_of_optax():
    cosine = Cosine(peak=0.05, warmup=4, floor=0.1)
    config = AdamW(learning_rate=cosine, b1=0.9, b2=0.98, weight_decay=0.3, clip=None)
    theirs = optax.adamw(cosine.build(STEPS), b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.3, mask=DECAYED)
    assert_close(run(config.build(SPECS, STEPS)), run(theirs), rtol=1e-6)


def test_decoupled_adamw_is_that_of_optax_with_the_decay_divided_by_the_peak():
    cosine = Cosine(peak=0.05, warmup=4, floor=0.1)
    config = AdamW(learning_rate=cosine, weight_decay=0.02, decay="decoupled", clip=1.0)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(cosine.build(STEPS), b1=0.9, b2=0.95, weight_decay=0.02 / 0.05, mask=DECAYED),
    )
    assert_close(run(config.build(SPECS, STEPS)), run(theirs), rtol=1e-6)


def test_bfloat16_moment_changes_adamw_by_its_rounding_only():
    wide, narrow = (
        run(AdamW(learning_rate=Constant(value=0.01), moment_dtype=dtype).build(SPECS, STEPS))
        for dtype in ("float32", "bfloat16")
    )
    for path in wide:
        difference = np.abs(np.asarray(wide[path] - narrow[path])).max()
        assert 0 < difference < 0.01  # 20 steps of at most about 0.01, each off by about 2**-8 of itself


@pytest.mark.parametrize(("momentum", "scaled"), [(None, True), (0.9, False)])
def test_adafactor_is_that_of_optax(momentum, scaled):
    cosine = Cosine(peak=0.1, warmup=4)
    common = {"min_dim_size_to_factor": 6, "decay_rate": 0.7, "momentum": momentum}
    common["multiply_by_parameter_scale"] = scaled
    config = Adafactor(learning_rate=cosine, **common)
    assert_close(run(config.build(SPECS, STEPS)), run(optax.adafactor(cosine.build(STEPS), **common)), rtol=1e-6)


def test_adafactor_with_decoupled_decay_is_that_of_optax_at_a_constant_rate():
    config = Adafactor(learning_rate=Constant(value=0.1), weight_decay=0.02, decay="decoupled", clipping_threshold=None)
    theirs = optax.adafactor(0.1, weight_decay_rate=0.02, weight_decay_mask=DECAYED, clipping_threshold=None)
    assert_close(run(config.build(SPECS, STEPS)), run(theirs), rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_of_optax(nesterov):
    linear_rate = Linear(peak=0.1, warmup=2)
    config = SGD(learning_rate=linear_rate, momentum=0.8, nesterov=nesterov)
    theirs = optax.sgd(linear_rate.build(STEPS), momentum=0.8, nesterov=nesterov)
    assert_close(run(config.build(SPECS, STEPS)), run(theirs), rtol=1e-6)


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_lion_is_that_of_optax(decay):
    cosine = Cosine(peak=0.02, warmup=4)
    weight_decay = 0.3 if decay == "coupled" else 0.3 * 0.02
    config = Lion(learning_rate=cosine, b1=0.8, weight_decay=weight_decay, decay=decay, clip=None)
    theirs = optax.lion(cosine.build(STEPS), b1=0.8, b2=0.99, weight_decay=0.3, mask=DECAYED)
    assert_close(run(config.build(SPECS, STEPS)), run(theirs), rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_that_of_optax(nesterov):
    cosine = Cosine(peak=0.5, warmup=4)
    config = LARS(learning_rate=cosine, trust=0.02, weight_decay=0.1, momentum=0.8, nesterov=nesterov)
    theirs = optax.lars(cosine.build(STEPS), 0.1, DECAYED, 0.02, 0.0, DECAYED, 0.8, nesterov)
    assert_close(run(config.build(SPECS, STEPS)), run(theirs), rtol=1e-6)


def newton_schulz(matrix, steps=5):
    """Jordan's iteration in float64, on the smaller Gram matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize(("nesterov", "rms", "decay"), [(True, 0.2, "coupled"), (False, None, "decoupled")])
def test_muon_follows_its_equations_and_others_adamw(nesterov, rms, decay):
    rate = Linear(peak=0.05, warmup=4, floor=0.2)
    common = {"learning_rate": rate, "weight_decay": 0.3, "decay": decay, "clip": None}
    got = run(Muon(nesterov=nesterov, rms=rms, momentum=0.9, **common).build(SPECS, STEPS))
    adamw = run(AdamW(b1=0.9, b2=0.95, **common).build(SPECS, STEPS))
    p = np.asarray(flatten(init_params(SPECS, jax.random.key(0)))["ffn/up"], np.float64)
    momentum, rates = np.zeros_like(p), rate.build(STEPS)
    for t in range(STEPS):
        g = gradients(t)["ffn/up"].astype(np.float64)
        momentum = 0.9 * momentum + g
        u = newton_schulz(g + 0.9 * momentum if nesterov else momentum)
        u *= np.sqrt(8 / 6) if rms is None else rms * np.sqrt(8)  # 6 inputs, 8 outputs
        r = float(rates(t))
        p = p - r * (u + 0.3 * p) if decay == "coupled" else p - r / 0.05 * (0.05 * u + 0.3 * p)
    assert_close(got, {**adamw, "ffn/up": p})


def test_muon_orthogonalises_the_matrices_of_layers_experts_and_heads_as_optax_does():
    dims = optax.contrib.MuonDimensionNumbers
    specs = {
        "experts": linear((2, 3, 4, 6), ("layers", "expert", "embed", "mlp"), 4),
        "q": linear((2, 6, 2, 4), ("layers", "embed", "heads", "head_dim"), 6),
        "out": linear((2, 2, 4, 6), ("layers", "heads", "head_dim", "embed"), 8),
    }
    numbers = {"experts": dims(2, 3), "q": dims(1, (2, 3)), "out": dims((1, 2), 3)}
    params, gradient = init_params(specs, jax.random.key(0)), init_params(specs, jax.random.key(1))
    ours = Muon(learning_rate=Constant(value=0.1), nesterov=False, weight_decay=0.0, clip=None).build(specs, STEPS)
    theirs = optax.contrib.muon(0.1, nesterov=False, muon_weight_dimension_numbers=numbers, consistent_rms=0.2)
    got, want = (jax.jit(lambda tx=tx: tx.update(gradient, tx.init(params), params)[0])() for tx in (ours, theirs))
    assert_close(got, want)
    one = np.asarray(got["q"][1]).reshape(6, 8)
    assert np.linalg.svd(one)[1].min() > 0.3 * 0.1 * 0.2 * np.sqrt(8)  # every direction moves, not one alone


@pytest.mark.parametrize(("average", "until"), [(Ema(decay=0.8), 12), (Ema(decay=0.8, warmup=True), 60)])
def test_moving_averages_follow_their_equation(average, until):
    values = np.random.default_rng(0).normal(size=(until + 1, 3))
    state, want = average.init({"w": jnp.asarray(values[0])}), values[0]
    update = jax.jit(lambda state, value, step: average.update(state, {"w": value}, step, until))
    for t in range(until):
        decay = min(0.8, (1 + t) / (10 + t)) if average.warmup else 0.8
        want = decay * want + (1 - decay) * values[t + 1]
        state = update(state, jnp.asarray(values[t + 1], jnp.float32), t + 1)
    np.testing.assert_allclose(state["ema"]["w"], want, rtol=1e-5, atol=1e-6)
    assert int(state["count"]) == until


def test_the_uniform_average_is_the_mean_of_every_nth_iterate_and_before_that_the_last():
    average, values = Uniform(start=0.5, every=3), np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)
    state = average.init({"w": jnp.asarray(values[0])})
    update = jax.jit(lambda state, value, step: average.update(state, {"w": value}, step, 20))
    for step in range(1, 21):
        state = update(state, jnp.asarray(values[step]), step)
        taken = values[10 : step + 1 : 3] if step >= 10 else values[step : step + 1]
        np.testing.assert_allclose(state["uniform"]["w"], taken.mean(0), rtol=1e-5, atol=1e-6)
    assert int(state["count"]) == 4  # after steps 10, 13, 16 and 19


def torch_run(make):
    """Parameters after 20 steps of a torch optimizer; `make(decayed, others)` builds it."""
    torch = pytest.importorskip("torch", reason="torch is the reference here; install the dev extra to compare")
    start = flatten(init_params(SPECS, jax.random.key(0)))
    params = {path: torch.nn.Parameter(torch.tensor(np.asarray(x))) for path, x in start.items()}
    optimizer = make(torch.optim, [params["ffn/up"]], [params["embed/table"], params["ffn/bias"]])
    for index in range(STEPS):
        for path, grad in gradients(index).items():
            params[path].grad = torch.tensor(grad)
        optimizer.step()
    return {path: x.detach().numpy() for path, x in params.items()}


def test_adamw_is_that_of_torch():
    def make(optim, decayed, others):
        groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
        return optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8)

    config = AdamW(learning_rate=Constant(value=0.02), weight_decay=0.3, clip=None)
    assert_close(run(config.build(SPECS, STEPS)), torch_run(make))


@pytest.mark.parametrize(("momentum", "nesterov"), [(None, False), (0.9, False), (0.9, True)])
def test_sgd_with_decay_is_that_of_torch(momentum, nesterov):
    def make(optim, decayed, others):
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return optim.SGD(groups, lr=0.02, momentum=momentum or 0.0, nesterov=nesterov)

    config = SGD(learning_rate=Constant(value=0.02), momentum=momentum, nesterov=nesterov, weight_decay=0.1)
    assert_close(run(config.build(SPECS, STEPS)), torch_run(make))


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_that_of_torch_but_for_its_bfloat16(nesterov):
    """Their weights are [outputs, inputs], and their iteration rounds to bfloat16."""
    torch = pytest.importorskip("torch", reason="torch is the reference here; install the dev extra to compare")
    spec = {"up": linear((6, 8), (None, None), 6)}
    start = init_params(spec, jax.random.key(0))["up"]
    weight = torch.nn.Parameter(torch.tensor(np.asarray(start).T))
    optimizer = torch.optim.Muon([weight], lr=0.02, weight_decay=0.3, momentum=0.9, nesterov=nesterov)
    config = Muon(
        learning_rate=Constant(value=0.02), weight_decay=0.3, momentum=0.9, nesterov=nesterov, rms=None, clip=None
    )
    tx = config.build(spec, STEPS)
    params, update = {"up": start}, jax.jit(tx.update)
    state = tx.init(params)
    for index in range(STEPS):
        grad = gradients(index)["ffn/up"]
        weight.grad = torch.tensor(grad.T)
        optimizer.step()
        updates, state = update({"up": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    moved = np.linalg.norm(np.asarray(params["up"] - start))
    # 0.6 % with five iterations in bfloat16; 14 % where one of the two has nesterov and the other has not
    assert np.linalg.norm(np.asarray(params["up"]) - weight.detach().numpy().T) < 0.015 * moved
