"""Losses of routers against NumPy, and their state over steps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import DIM, EXPERTS, GROUPS, NO_LOSSES, TOKENS, exact, inputs, padded_rows, route, softmax, weight_of

from axrepro.core import Context, Loss, Metric, Update, collect
from axrepro.core.aux import objective
from axrepro.core.param import init_params
from axrepro.nn import RouterLosses, TopK
from axrepro.nn.moe import AdaptiveBalance


@pytest.mark.parametrize("over", ["first", "all"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_losses_equal_numpy(scores, over):
    x, weight, valid = inputs(), weight_of(), padded_rows()
    losses = RouterLosses(balance=0.3, balance_over=over, z=0.2, entropy=0.5, spread=0.7)
    router = TopK(k=2, scores=scores, losses=losses)
    _, aux = route(router, {"weight": weight}, x, valid)
    logits = exact(x) @ exact(weight)
    probs = softmax(logits)
    if scores == "sigmoid":
        probs = 1 / (1 + np.exp(-logits))
        probs /= probs.sum(-1, keepdims=True)
    entropy = lambda p: -(p * np.log(p)).sum(-1)
    balance, spread = [], []
    for group, length in ((0, 12), (1, 7)):
        p = probs[group, :length]
        best = np.argsort(-p, -1)[:, : 1 if over == "first" else 2]
        share = np.bincount(best.reshape(-1), minlength=EXPERTS) / best.size
        balance.append(EXPERTS * (share * p.mean(0)).sum())
        spread.append(-entropy(p.mean(0)))
    known = np.asarray(valid)
    expected = {
        "balance": 0.3 * np.mean(balance),
        "router_z": 0.2 * (np.log(np.exp(logits).sum(-1)) ** 2)[known].mean(),
        "entropy": 0.5 * entropy(probs)[known].mean(),
        "spread": 0.7 * np.mean(spread),
    }
    found = {name: float(term.total / term.count) for name, term in collect(aux, Loss).items()}
    assert found == pytest.approx(expected, rel=1e-5)
    metric = collect(aux, Metric)["router_entropy"]
    assert float(metric.total / metric.count) == pytest.approx(entropy(probs)[known].mean(), rel=1e-5)


def test_a_weight_of_zero_leaves_a_loss_out():
    names = ("balance", "z", "entropy", "spread", "target")
    nothing = RouterLosses(**dict.fromkeys(names, 0.0))
    ctx = Context(routing_target=jnp.ones((GROUPS, TOKENS, EXPERTS)) / EXPERTS)
    losses_of = lambda losses: set(collect(route(TopK(losses=losses), {"weight": weight_of()}, inputs(), ctx=ctx)[1],
                                           Loss))  # fmt: skip
    assert losses_of(nothing) == set()
    for name in names:
        assert losses_of(replace(nothing, **{name: 0.1})) == {"router_z" if name == "z" else name}


@pytest.mark.slow
def test_spread_and_entropy_pull_the_router_as_they_say(assert_close):
    # LIMoE: the local term makes tokens decide, the global one makes the experts share them
    x = inputs()
    entropy = lambda p: -(p * jnp.log(p)).sum(-1)
    for losses, formula in (
        (replace(NO_LOSSES, entropy=1.0), lambda p: entropy(p).mean()),
        (replace(NO_LOSSES, spread=1.0), lambda p: -entropy(p.mean(1)).mean()),
    ):
        found = jax.grad(lambda w, losses=losses: objective(route(TopK(losses=losses), {"weight": w}, x)[1]))
        expected = jax.grad(lambda w, formula=formula: formula(jax.nn.softmax(x @ w)))
        assert_close(found(weight_of()), expected(weight_of()), 1e-5)


def test_the_adaptive_weight_follows_a_loop_over_steps_and_multiplies_the_gradient(assert_close):
    adaptive = AdaptiveBalance(low=0.05, high=0.2, log_step=0.3, decay=0.5)
    router = TopK(k=1, losses=RouterLosses(balance=0.4, z=0.0, adaptive=adaptive))
    fixed = replace(router, losses=replace(router.losses, adaptive=None))
    x = jnp.abs(inputs())
    skewed, even = jnp.zeros((DIM, EXPERTS)).at[:, 0].set(1.0), weight_of()
    state = {"over_capacity": jnp.zeros(()), "log_scale": jnp.zeros(())}
    average, log_scale, scales = 0.0, 0.0, []
    grad = jax.jit(
        jax.grad(lambda w, state: objective(route(router, {"weight": w, "adaptive": state}, x, capacity=3)[1]))
    )
    plain = jax.jit(jax.grad(lambda w: objective(route(fixed, {"weight": w}, x, capacity=3)[1])))
    for step in range(14):
        # a collapsed router first; then room for all
        weight, capacity = (skewed, 3) if step < 5 else (even, TOKENS)
        _, aux = route(router, {"weight": weight, "adaptive": state}, x, capacity=capacity)
        scale = np.exp(log_scale)
        scales.append(scale)
        _, base = route(fixed, {"weight": weight}, x, capacity=capacity)
        assert float(aux["balance"].total) == pytest.approx(scale * float(base["balance"].total), rel=1e-5)
        over = 9 / 12 if step < 5 else 0.0
        average = 0.5 * average + 0.5 * over
        log_scale += 0.3 if average > 0.2 else -0.3 if average < 0.05 else 0.0
        updates = aux["adaptive"]
        assert float(updates["over_capacity"].value) == pytest.approx(average, rel=1e-5)
        assert float(updates["log_scale"].value) == pytest.approx(log_scale, rel=1e-5, abs=1e-6)
        state = {name: update.value for name, update in updates.items()}
        if step == 4:
            assert_close(grad(even, state), np.exp(log_scale) * plain(even), 1e-5)
    assert max(scales) > 3 > 1 > scales[-1] / max(scales)


def test_the_state_of_the_adaptive_weight_is_updated_and_not_trained():
    router = TopK(losses=RouterLosses(adaptive=AdaptiveBalance()), bias_rate=0.1)
    specs = router.specs(DIM, EXPERTS)
    assert {specs["adaptive"][name].role for name in ("over_capacity", "log_scale")} == {"updated"}
    assert specs["bias"].role == "updated"
    params = init_params(specs, jax.random.key(0))
    _, aux = route(router, params, inputs())
    assert set(collect(aux, Update)) == {"bias", "adaptive/over_capacity", "adaptive/log_scale"}
