"""Routers against loops in NumPy, torch and transformers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from mixtures import (
    DIM,
    EXPERTS,
    FFN,
    GROUPS,
    NO_LOSSES,
    ROUNDING,
    TOKENS,
    applied,
    exact,
    gradients,
    inputs,
    mixture,
    padded_rows,
    params_of,
    route,
    softmax,
    weight_of,
)

from axrepro.core import Context, Loss, MeshShape, Update, collect, make_mesh
from axrepro.core.aux import objective
from axrepro.core.param import init_params
from axrepro.errors import UserError
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM
from axrepro.nn import Attention, Block, FeedForward, MoE, RouterLosses, TopK
from axrepro.nn.moe import AdaptiveBalance, ExpertChoice, Gumbel, Hash, Jitter, PerExample, Prefix, Room, Routed
from axrepro.train.histograms import effective_bins, shares

# ---- TopK ----


@pytest.mark.parametrize(
    ("router", "bias"),
    [
        (TopK(k=2), False),
        (TopK(k=3, scores="sigmoid", scale=2.5), False),
        (TopK(k=2, scores="sigmoid", renormalise=False, bias_rate=0.1), True),
        (TopK(k=2, logit_cap=0.7, scale=0.5, bias_rate=0.1), True),
        (TopK(k=1, renormalise=False), False),
    ],
    ids=lambda value: None if isinstance(value, bool) else f"{value.scores}-{value.k}",
)
def test_top_k_equals_a_loop_over_tokens(router, bias, assert_close):
    router = replace(router, losses=NO_LOSSES)
    params = {"weight": weight_of()} | ({"bias": jnp.array([0.6, -0.5, 0.0, 0.3])} if bias else {})
    x = inputs()
    routing, _ = route(router, params, x)
    moved = 0
    for group in range(GROUPS):
        for place in range(TOKENS):
            logits = exact(x[group, place]) @ exact(params["weight"])
            if router.logit_cap:
                logits = router.logit_cap * np.tanh(logits / router.logit_cap)
            scores = softmax(logits) if router.scores == "softmax" else 1 / (1 + np.exp(-logits))
            ranked = sorted(range(EXPERTS), key=lambda e: -(scores[e] + (exact(params["bias"])[e] if bias else 0)))
            best = ranked[: router.k]
            moved += bias and set(best) != set(np.argsort(-scores)[: router.k])
            gates = scores[best] / (scores[best].sum() if router.renormalise else 1.0)
            np.testing.assert_array_equal(routing.expert[group, place], best)
            np.testing.assert_allclose(routing.gate[group, place], router.scale * gates, rtol=1e-5)
    assert not bias or moved > 5  # the bias did change choices
    assert routing.chosen.all()


def test_of_equal_scores_the_lower_index_comes_first():
    tied = jnp.zeros((DIM, EXPERTS)).at[:, 1].set(-1.0)
    routing, _ = route(TopK(k=3), {"weight": tied}, jnp.ones((1, 2, DIM)))
    np.testing.assert_array_equal(routing.expert, [[[0, 2, 3]] * 2])
    routing, _ = route(TopK(k=2, bias_rate=0.1), {"weight": tied * 0, "bias": jnp.array([0.0, 1, 1, 0])}, inputs())
    assert (np.asarray(routing.expert) == [1, 2]).all()
    np.testing.assert_allclose(routing.gate, 0.5, rtol=1e-6)


def test_the_bias_follows_the_sign_of_the_load_of_valid_choices():
    x, valid, bias = inputs(), padded_rows(), jnp.array([0.2, -0.1, 0.0, 0.0])
    router = TopK(k=2, bias_rate=0.05)
    # a capacity of 1 drops most choices: the load counts them all the same
    routing, aux = route(router, {"weight": weight_of(), "bias": bias}, x, valid, capacity=1)
    load = np.zeros(EXPERTS)
    for group, place in zip(*np.nonzero(valid), strict=True):
        for expert in np.asarray(routing.expert[group, place]):
            load[expert] += 1
    assert load.sum() == 2 * 19
    assert len(set(np.sign(load.mean() - load))) > 1
    assert isinstance(aux["bias"], Update)
    np.testing.assert_allclose(aux["bias"].value, bias + 0.05 * np.sign(load.mean() - load), rtol=1e-6)
    assert not np.asarray(routing.chosen)[~np.asarray(valid)].any()


def test_the_bias_alone_balances_a_skewed_router():
    router = TopK(k=2, scores="sigmoid", bias_rate=0.004, losses=NO_LOSSES)
    x = jnp.abs(inputs(groups=8, tokens=32))
    params = {"weight": weight_of() * 0.3 + jnp.array([0.4, 0.2, -0.2, -0.4]), "bias": jnp.zeros(EXPERTS)}
    violations = []
    for _ in range(150):
        routing, aux = route(router, params, x)
        load = np.bincount(np.asarray(routing.expert).reshape(-1), minlength=EXPERTS)
        violations.append(load.max() / load.mean() - 1)
        params = params | {"bias": aux["bias"].value}
    assert violations[0] > 0.8
    assert np.mean(violations[-10:]) < 0.1


def test_the_gradient_of_the_gates_is_that_of_torch(assert_close):
    x, weight, bias = inputs(), weight_of(), jnp.array([0.3, -0.2, 0.1, 0.0])
    router = TopK(k=2, scores="sigmoid", scale=2.0, bias_rate=0.1, losses=NO_LOSSES)
    probe = jax.random.normal(jax.random.key(4), (GROUPS, TOKENS, 2))

    def value(weight, x):
        routing, _ = route(router, {"weight": weight, "bias": bias}, x)
        return (routing.gate * probe).sum()

    grads = jax.grad(value, argnums=(0, 1))(weight, x)
    w, t = (torch.tensor(exact(a), requires_grad=True) for a in (weight, x))
    scores = (t @ w).sigmoid()
    index = (scores + torch.tensor(exact(bias))).topk(2).indices
    gate = scores.gather(-1, index)
    (2.0 * gate / gate.sum(-1, keepdim=True) * torch.tensor(exact(probe))).sum().backward()
    assert_close(grads[0], w.grad.numpy(), 1e-5)
    assert_close(grads[1], t.grad.numpy(), 1e-5)


# ---- ExpertChoice ----


@pytest.mark.parametrize(("capacity", "padded"), [(3, False), (5, True), (12, True)])
def test_expert_choice_equals_a_loop_over_experts(capacity, padded):
    x, weight = inputs(), weight_of()
    valid = padded_rows() if padded else jnp.ones((GROUPS, TOKENS), bool)
    routing, aux = route(ExpertChoice(), {"weight": weight}, x, valid, capacity=capacity)
    taken = np.zeros((GROUPS, TOKENS), int)
    for group in range(GROUPS):
        probs = softmax(exact(x[group]) @ exact(weight))  # over experts
        allowed = np.flatnonzero(valid[group])
        for expert in range(EXPERTS):
            best = sorted(allowed, key=lambda s: -probs[s, expert])[:capacity]
            chosen = np.asarray(routing.chosen[group, expert])
            assert chosen.sum() == len(best) == min(capacity, len(allowed))
            np.testing.assert_array_equal(np.asarray(routing.token[group, expert])[chosen], best)
            np.testing.assert_allclose(np.asarray(routing.gate[group, expert])[chosen], probs[best, expert], rtol=1e-5)
            np.testing.assert_array_equal(np.asarray(routing.gate[group, expert])[~chosen], 0)
            taken[group, best] += 1
    known = np.asarray(valid)
    assert float(aux["unchosen"].total / aux["unchosen"].count) == pytest.approx((taken[known] == 0).mean())
    assert float(aux["experts_max"].total) == taken.max(1).sum()
    assert aux["experts_max"].count == known.any(1).sum()


def expert_choice(**changes) -> MoE:
    return mixture(**{"router": ExpertChoice(), "capacity_factor": 1.5} | changes)


def to_torch(params):
    if isinstance(params, dict):
        return {name: to_torch(value) for name, value in params.items()}
    return torch.tensor(exact(params), requires_grad=True)


def swiglu(experts, index, rows):
    up, gate, down = (experts[name][index] for name in ("up", "gate", "down"))
    return (torch.nn.functional.silu(rows @ gate) * (rows @ up)) @ down


@pytest.mark.parametrize("dispatch", ["einsum", "gather"])
def test_expert_choice_in_a_layer_equals_torch_in_value_and_gradient(dispatch, assert_close):
    layer = expert_choice(dispatch=dispatch)
    params, x, probe = params_of(layer), inputs(), inputs(5)
    y, _ = applied(layer)(params, x, {})
    grads, x_grad = gradients(layer)(params, x, probe, {})

    theirs, t = to_torch(params), torch.tensor(exact(x), requires_grad=True)
    scores = (t @ theirs["router"]["weight"]).softmax(-1)
    gates, index = scores.mT.topk(int(TOKENS * 1.5 / EXPERTS), dim=-1)  # [N, E, C]
    rows = []
    for n in range(GROUPS):
        out = torch.zeros_like(t[n])
        for e in range(EXPERTS):
            out = out.index_add(0, index[n, e], gates[n, e, :, None] * swiglu(theirs["experts"], e, t[n, index[n, e]]))
        rows.append(out)
    expected = torch.stack(rows)
    (expected * torch.tensor(exact(probe))).sum().backward()
    assert_close(y, expected.detach().numpy(), ROUNDING)
    assert_close(x_grad, t.grad.numpy(), 1e-5)
    assert_close(grads, jax.tree.map(lambda w: w.grad.numpy(), theirs), 1e-5)


def test_expert_choice_depends_on_no_order_of_tokens_and_on_no_other_group(assert_close):
    layer = expert_choice()
    params, x = params_of(layer), inputs()
    y, aux = applied(layer)(params, x, {})
    order = jax.random.permutation(jax.random.key(3), TOKENS)
    assert_close(applied(layer)(params, x[:, order], {})[0], y[:, order], ROUNDING)
    other = jnp.concatenate([x[:1], 3 * inputs(9)[1:]])
    np.testing.assert_array_equal(applied(layer)(params, other, {})[0][0], y[0])
    # every expert has the same load, and what it has room for is all that it takes
    np.testing.assert_array_equal(aux["load"].counts, [GROUPS * 4] * EXPERTS)
    assert aux["dropped"].total == 0


def test_expert_choice_with_room_for_all_and_equal_experts_is_the_dense_layer(assert_close):
    for changes in ({"capacity_factor": float(EXPERTS)}, {"num_experts": 1, "capacity_factor": 1.0}):
        layer = expert_choice(**changes)
        params, x = params_of(layer), inputs()
        params["experts"] = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), params["experts"])
        dense, _ = FFN.apply(jax.tree.map(lambda w: w[0], params["experts"]), x, Context())
        assert_close(applied(layer)(params, x, {})[0], dense, ROUNDING)


def test_the_router_gradient_of_expert_choice_equals_finite_differences():
    layer = expert_choice(dispatch="einsum")
    params, x, probe = params_of(layer, spread=1.0), inputs(), inputs(5)
    value = jax.jit(
        lambda w: (layer.apply(params | {"router": {"weight": w}}, x, Context(train=True))[0] * probe).sum()
    )
    weight = params["router"]["weight"]
    direction = jax.random.normal(jax.random.key(8), weight.shape)
    grads, _ = gradients(layer)(params, x, probe, {})
    choices = lambda w: np.asarray(route(ExpertChoice(), {"weight": w}, x, capacity=4)[0].token)
    step = 1e-3
    np.testing.assert_array_equal(choices(weight + step * direction), choices(weight - step * direction))
    slope = (value(weight + step * direction) - value(weight - step * direction)) / (2 * step)
    assert float((grads["router"]["weight"] * direction).sum()) == pytest.approx(float(slope), rel=5e-3)


def test_without_a_gate_expert_choice_gives_its_router_no_gradient():
    # the gates enter through the output alone: where it does not count, the chosen indices carry nothing
    layer = expert_choice()
    params, x = params_of(layer), inputs()
    grads, _ = gradients(layer)(params, x, jnp.zeros_like(x), {})
    assert not np.any(grads["router"]["weight"])


# ---- Hash ----


def test_hash_routing_is_a_fixed_even_function_of_the_token(assert_close):
    experts, k = 16, 3
    ids = jnp.arange(16384, dtype=jnp.int32).reshape(4, -1)
    room, valid = Room(experts, 4096), jnp.ones(ids.shape, bool)

    def routed(ids, seed=0):
        return Hash(k=k, seed=seed).apply({}, jnp.zeros((*ids.shape, DIM)), valid[:, : ids.shape[1]], room,
                                          Context(tokens=ids))[0]  # fmt: skip

    routing = routed(ids)
    assert routing.expert.dtype == jnp.int32
    sorted_experts = np.sort(routing.expert, -1)
    assert (np.diff(sorted_experts, axis=-1) > 0).all()
    assert sorted_experts.min() == 0
    assert sorted_experts.max() == experts - 1
    np.testing.assert_allclose(routing.gate, 1 / 3, rtol=1e-6)
    # as even as independent draws would be: within five standard deviations
    load = np.bincount(np.asarray(routing.expert[..., 0]).reshape(-1), minlength=experts)
    assert np.abs(load - 1024).max() < 5 * np.sqrt(1024 * 15 / 16)
    # the same token has the same experts anywhere; another seed has others
    order = jax.random.permutation(jax.random.key(0), ids.shape[1])
    np.testing.assert_array_equal(routed(ids[:, order]).expert, routing.expert[:, order])
    same = (np.asarray(routed(ids, seed=1).expert[..., 0]) == np.asarray(routing.expert[..., 0])).mean()
    assert abs(same - 1 / experts) < 0.02


def test_hash_routing_needs_tokens_and_enough_experts():
    layer = mixture(router=Hash(k=2))
    with pytest.raises(UserError, match="hash routing needs token ids"):
        layer.apply(params_of(layer), inputs(), Context())
    whole = replace(layer, router=PerExample(router=Hash()))
    with pytest.raises(UserError, match="hash routing is by token, not of 3 whole examples"):
        whole.apply(params_of(whole), inputs(), Context(tokens=jnp.zeros((GROUPS, TOKENS), jnp.int32)))
    with pytest.raises(UserError, match="k=5 needs at least as many experts, not 4"):
        replace(layer, router=Hash(k=5)).specs(DIM)


def test_a_language_model_with_hash_routing_learns():
    ffn = mixture(router=Hash(k=2), dispatch="gather")
    layers = Block(attention=Attention(num_heads=2), ffn=ffn)
    method = LanguageModel(model=CausalLM(vocab_size=11, dim=DIM, layers=layers))
    params = init_params(method.specs(), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 11)
    batch = {"tokens": tokens, "targets": (3 * tokens + 1) % 11}

    @jax.jit
    def step(params):
        loss, grads = jax.value_and_grad(lambda p: objective(method.loss(p, batch, Context(train=True))))(params)
        return loss, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

    losses = []
    for _ in range(40):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]


# ---- PerExample ----


def per_example(k=1, pool="mean", **changes) -> MoE:
    router = PerExample(router=TopK(k=k, renormalise=False, losses=NO_LOSSES), pool=pool)
    return mixture(**{"router": router, "dispatch": "dropless"} | changes)


SEGMENTS = jnp.asarray(np.arange(TOKENS)[None] < np.array([12, 7, 0])[:, None], jnp.int32)


@pytest.mark.parametrize(
    ("k", "padded", "dispatch", "pool"),
    [(1, False, "gather", "first"), (2, True, "einsum", "mean"), (1, True, "dropless", "first"),
     (4, False, "dropless", "mean")],
)  # fmt: skip
def test_per_example_routing_equals_a_loop_over_images(k, padded, dispatch, pool, assert_close):
    layer = per_example(k, pool, dispatch=dispatch, capacity_factor=float(EXPERTS))
    params, x = params_of(layer), inputs()
    y, aux = applied(layer)(params, x, {"segment_ids": SEGMENTS} if padded else {})
    theirs = to_torch(params)
    lengths = [12, 7, 0] if padded else [12, 12, 12]
    for row, length in enumerate(lengths):
        image = torch.tensor(exact(x[row]))
        if not length:
            np.testing.assert_array_equal(y[row], 0)  # an example of padding goes nowhere
            continue
        pooled = image[:length].mean(0) if pool == "mean" else image[0]
        gates, experts = (pooled @ theirs["router"]["weight"]).softmax(-1).topk(k)
        expected = sum(g * swiglu(theirs["experts"], int(e), image) for g, e in zip(gates, experts, strict=True))
        assert_close(y[row], expected.detach().numpy(), ROUNDING)
    assert aux["load"].counts.sum() == k * sum(length > 0 for length in lengths)
    assert aux["dropped"].total == 0


def test_an_example_is_routed_whatever_the_others_are():
    layer = per_example(2)
    params, x = params_of(layer), inputs()
    y, _ = applied(layer)(params, x, {})
    other, _ = applied(layer)(params, jnp.concatenate([5 * inputs(9)[:2], x[2:]]), {})
    np.testing.assert_allclose(other[2], y[2], rtol=1e-6, atol=1e-7)


def test_examples_overflow_in_groups_of_examples(assert_close):
    # four examples a group, capacity 1: the first example of each expert stays, the others are dropped whole
    layer = per_example(1, group_size=4, capacity_factor=1.0, dispatch="gather")
    params, x = params_of(layer), inputs(groups=8)
    y, aux = applied(layer)(params, x, {})
    every, _ = applied(replace(layer, dispatch="dropless"))(params, x, {})
    best = np.argmax(np.asarray(x.mean(1) @ params["router"]["weight"]), -1)
    kept = np.zeros(8, bool)
    for group in (range(0, 4), range(4, 8)):
        seen = set()
        for row in group:
            kept[row] = best[row] not in seen
            seen.add(best[row])
    assert 0 < kept.sum() < 8
    assert_close(y[kept], every[kept], ROUNDING)
    np.testing.assert_array_equal(y[~kept], 0)
    assert (aux["dropped"].total, aux["dropped"].count) == ((~kept).sum(), 8)


def test_groups_of_examples_divide_the_batch_and_are_divided_by_the_devices():
    layer = per_example(1, dispatch="gather")
    params, x = params_of(layer), inputs(groups=8)
    four = Context(mesh=make_mesh(MeshShape(data=4), jax.devices()[:4]))
    wrong = [
        (3, Context(), "group_size=3 must divide the 8 examples"),
        (3, four, "group_size=3 must divide the 8 examples"),
        (4, four, "2 groups of whole examples cannot be split over 4 devices; set group_size to a divisor of 2,"),
        (None, four, "1 groups of whole examples cannot be split over 4 devices; set group_size to a divisor of 2,"),
    ]
    for size, ctx, message in wrong:
        with pytest.raises(UserError, match=message):
            replace(layer, group_size=size).apply(params, x, ctx)


def test_experts_that_mix_tokens_see_whole_examples(assert_close):
    attention = Attention(num_heads=2)
    layer = per_example(2, expert=attention, dispatch="gather", capacity_factor=float(EXPERTS))
    params, x = params_of(layer), inputs()
    y, _ = applied(layer)(params, x, {})
    run = jax.jit(lambda weights, x: attention.apply(weights, x, Context())[0])
    for row in range(GROUPS):
        probs = jax.nn.softmax(x[row].mean(0) @ params["router"]["weight"])
        gates, experts = jax.lax.top_k(probs, 2)
        parts = [
            g * run(jax.tree.map(lambda w, e=e: w[e], params["experts"]), x[row : row + 1])
            for g, e in zip(gates, experts, strict=True)
        ]
        assert_close(y[row], sum(parts)[0], ROUNDING)


@pytest.mark.slow
def test_per_example_gradients_agree_between_dispatches(assert_close):
    layer = per_example(2, capacity_factor=float(EXPERTS), router=PerExample(router=TopK(k=2)))
    params, x, probe = params_of(layer), inputs(), inputs(5)
    fields = {"segment_ids": SEGMENTS}
    expected, grads = (
        gradients(replace(layer, dispatch=dispatch))(params, x, probe, fields) for dispatch in ("einsum", "dropless")
    )
    assert_close(grads[0], expected[0], 1e-5)
    assert_close(grads[1], expected[1], 1e-5)


# ---- Prefix ----

NESTED = FeedForward(hidden=5, act="relu", gated=True)


def nested(**changes) -> MoE:
    """Slices of five hidden units; without a target the router's loss is left out."""
    router = Prefix(losses=RouterLosses(balance=0.0, z=0.0))
    return mixture(**{"expert": NESTED, "router": router, "capacity_factor": float(EXPERTS)} | changes)


@pytest.mark.parametrize("dispatch", ["einsum", "dropless"])
def test_prefix_routing_is_a_feed_forward_cut_to_its_first_units(dispatch, assert_close):
    layer = nested(dispatch=dispatch)
    params, x, probe = params_of(layer), inputs(), inputs(5)
    y, aux = applied(layer)(params, x, {})
    grads, x_grad = gradients(layer)(params, x, probe, {})
    difficulty = np.argmax(np.asarray(x @ params["router"]["weight"]), -1)
    assert len(set(difficulty.reshape(-1))) == EXPERTS
    assert float(aux["router"]["width"].total / aux["router"]["width"].count) == pytest.approx(
        (difficulty + 1).mean() / EXPERTS
    )

    def cut(experts, x):
        # slices side by side are one layer of twenty units, of which each token sees the first 5 (e + 1)
        join = lambda w: w.swapaxes(0, 1).reshape(DIM, -1)
        hidden = jax.nn.relu(x @ join(experts["gate"])) * (x @ join(experts["up"]))
        seen = jnp.arange(hidden.shape[-1]) < 5 * (difficulty[..., None] + 1)
        return jnp.where(seen, hidden, 0) @ experts["down"].reshape(-1, DIM)

    @jax.jit
    def expected_of(experts, x):
        y, back = jax.vjp(cut, experts, x)
        return y, *back(probe)

    expected_y, expected, expected_x = expected_of(params["experts"], x)
    assert_close(y, expected_y, ROUNDING)
    assert_close(grads["experts"], expected, 1e-5)
    assert_close(x_grad, expected_x, 1e-5)
    assert not np.any(grads["router"]["weight"])  # hard choices carry no gradient


def test_the_difficulty_is_learnt_from_targets(assert_close):
    layer = nested(router=Prefix(losses=RouterLosses(balance=0.0, z=0.0, target=0.3)))
    params, x = params_of(layer), inputs()
    target = jax.nn.softmax(jax.random.normal(jax.random.key(6), (GROUPS, TOKENS, EXPERTS)))
    fields = {"routing_target": target, "segment_ids": SEGMENTS}
    _, aux = applied(layer, train=True)(params, x, fields)
    grads, x_grad = gradients(layer)(params, x, jnp.zeros_like(x), fields)
    weight, t = to_torch(params["router"]["weight"]), torch.tensor(exact(x), requires_grad=True)
    known = torch.tensor(np.array(SEGMENTS > 0))
    loss = 0.3 * torch.nn.functional.cross_entropy((t @ weight)[known], torch.tensor(exact(target))[known])
    loss.backward()
    term = aux["router"]["target"]
    assert float(term.total / term.count) == pytest.approx(loss.item(), rel=1e-5)
    assert_close(grads["router"]["weight"], weight.grad.numpy(), 1e-5)
    assert_close(x_grad, t.grad.numpy(), 1e-5)


def test_targets_that_are_missing_or_of_other_experts_are_refused():
    layer = nested(router=Prefix())
    params, x = params_of(layer), inputs()
    shapes = lambda **fields: jax.eval_shape(lambda p: layer.apply(p, x, Context(**fields))[1], params)
    with pytest.raises(UserError, match=r"target=1.0 needs a method that sets Context\.routing_target"):
        shapes(train=True)
    with pytest.raises(UserError, match="routing_target has 7 experts, not 4"):
        shapes(train=True, routing_target=jnp.ones((GROUPS, TOKENS, 7)))
    with pytest.raises(UserError, match=r"of shape \(3, 4\) is not one distribution for each of the 36 tokens"):
        shapes(train=True, routing_target=jnp.ones((GROUPS, EXPERTS)))
    # a model that is used, not trained, has no target
    assert not collect(shapes(), Loss)


# ---- alarms ----


@pytest.mark.parametrize("experts", [1, 2, 3, 6, 7, 10, 64])
def test_a_router_that_uses_all_experts_evenly_is_never_below_the_floor(experts):
    routers = [TopK(k=k, losses=NO_LOSSES) for k in {1, experts}] + [ExpertChoice(), Prefix(), PerExample()]
    for router in routers:
        layer = MoE(expert=FFN, num_experts=experts, router=router, capacity_factor=float(experts))
        assert effective_bins(shares(np.full((1, experts), 7.0)))[0] >= layer._floor(), router


def test_a_prefix_router_that_spreads_tokens_over_all_widths_is_not_below_the_floor():
    # expert 0 serves every token, the last one few: an uneven load is what this router is for
    layer = nested()
    _, aux = applied(layer)(params_of(layer), inputs(), {})
    assert effective_bins(shares(np.asarray(aux["load"].counts)))[0] >= aux["load"].floor


# ---- wrong inputs ----


def test_wrong_settings_are_refused_in_one_line():
    wrong = [
        (lambda: RouterLosses(balance=-0.1), r"RouterLosses\.balance=-0\.1: it takes a number, 0 or above"),
        (lambda: RouterLosses(target=float("nan")), r"RouterLosses\.target=nan"),
        (lambda: TopK(scale=0.0), r"TopK\.scale=0\.0: it takes a number above 0"),
        (lambda: TopK(bias_rate=-1.0), r"TopK\.bias_rate=-1\.0"),
        (lambda: TopK(logit_cap=-2.0), r"TopK\.logit_cap=-2\.0"),
        (lambda: Jitter(eps=1.0), r"Jitter\.eps=1\.0: it takes a number in \(0, 1\)"),
        (lambda: Gumbel(scale=0.0), r"Gumbel\.scale=0\.0"),
        (lambda: Hash(k=0), r"Hash\.k=0"),
        (lambda: Prefix(mean_width=1.5), r"Prefix\.mean_width=1\.5: it takes a number in \(0, 1\]"),
        (
            lambda: AdaptiveBalance(low=0.3, high=0.2),
            r"AdaptiveBalance\.low=0\.3: it takes a number in \[0, high=0\.2\)",
        ),
        (lambda: AdaptiveBalance(decay=1.0), r"AdaptiveBalance\.decay=1\.0"),
        (lambda: Routed(k=0), r"Routed\.k=0"),
    ]
    for make, message in wrong:
        with pytest.raises(UserError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
    layer = mixture(router=PerExample(router=ExpertChoice()))
    with pytest.raises(UserError, match="PerExample needs a router by which examples choose, not ExpertChoice"):
        layer.apply(params_of(layer), inputs(), Context())
