"""One routing decision for several layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import DIM, EXPERTS, FFN, GROUPS, NO_LOSSES, ROUNDING, TOKENS, applied, gradients, inputs, mixture

from axrepro.core import Context
from axrepro.core.param import init_params
from axrepro.errors import UserError
from axrepro.nn import Block, Repeat, Sequence, TopK
from axrepro.nn.moe import ExpertChoice, PerExample, Routed, RouteOnce


def once(router, inner, times=2, experts=EXPERTS, **changes) -> RouteOnce:
    inside = mixture(router=inner, capacity_factor=float(EXPERTS), **changes)
    return RouteOnce(layer=Sequence((inside,) * times), router=router, num_experts=experts)


@pytest.mark.parametrize(("whole", "dispatch"), [(False, "dropless"), (True, "gather")])
def test_layers_that_are_routed_once_follow_one_decision_and_both_train_its_router(whole, dispatch, assert_close):
    router = TopK(k=2, losses=NO_LOSSES)
    layer = once(PerExample(router=router) if whole else router, Routed(k=2, whole=whole), dispatch=dispatch)
    params, x, probe = init_params(layer.specs(DIM), jax.random.key(0)), inputs(), inputs(5)
    params["router"]["weight"] *= 4.0
    y, aux = applied(layer)(params, x, {})
    first, second = (aux["layer"][i]["load"].counts for i in "01")
    np.testing.assert_array_equal(first, second)
    assert first.sum() == 2 * (GROUPS if whole else GROUPS * TOKENS)

    def by_hand(params, x):
        """The first layer's gates, used again in the second though its input is another."""
        seen = x.mean(1, keepdims=True) if whole else x
        gates, index = jax.lax.top_k(jax.nn.softmax(seen @ params["router"]["weight"]), 2)
        dense = (jax.nn.one_hot(index, EXPERTS) * (gates / gates.sum(-1, keepdims=True))[..., None]).sum(-2)
        for i in "01":
            experts = params["layer"][i]["experts"]
            each = jax.vmap(lambda e, x=x: FFN.apply(e, x, Context())[0])(experts)  # [E, B, T, D]
            x = jnp.einsum("bte,ebtd->btd", jnp.broadcast_to(dense, (*x.shape[:2], EXPERTS)), each)
        return x

    @jax.jit
    def expected_of(params, x):
        y, back = jax.vjp(by_hand, params, x)
        return y, back(probe)

    expected_y, expected = expected_of(params, x)
    assert_close(y, expected_y, ROUNDING)
    grads, x_grad = gradients(layer)(params, x, probe, {})
    assert_close(x_grad, expected[1], 1e-5)
    flat = lambda tree: {"router": tree["router"]["weight"]} | {i: tree["layer"][i]["experts"]["up"] for i in "01"}
    assert_close(flat(grads), flat(expected[0]), 1e-5)


@pytest.mark.slow
def test_a_router_reaches_through_scanned_and_rematerialised_blocks(assert_close):
    ffn = mixture(router=Routed(k=2), dispatch="gather")
    stack = Repeat(layer=Block(attention=FFN, ffn=ffn), times=2)
    layer = RouteOnce(layer=stack, router=TopK(k=2), num_experts=EXPERTS)
    params, x, probe = init_params(layer.specs(DIM), jax.random.key(0)), inputs(), inputs(5)
    run = lambda remat: jax.jit(
        jax.grad(lambda p: (layer.apply(p, x, Context(train=True, remat=remat))[0] * probe).sum())
    )(params)
    plain, full = run("none"), run("full")
    assert np.any(plain["router"]["weight"])
    assert_close(full["router"]["weight"], plain["router"]["weight"], ROUNDING)


def test_routings_that_do_not_fit_are_refused():
    x = inputs()
    alone = mixture(router=Routed(k=2))
    with pytest.raises(UserError, match="needs a RouteOnce around it"):
        alone.apply(
            {"router": {}, "experts": init_params(alone.specs(DIM), jax.random.key(0))["experts"]}, x, Context()
        )
    wrong = [
        (once(TopK(k=2), Routed(k=1)), r"Routed\(k=1, whole=False\) does not fit"),
        (once(TopK(k=2), Routed(k=2, whole=True)), r"Routed\(k=2, whole=True\) does not fit"),
        (once(TopK(k=2), Routed(k=2), experts=8), "routes to 8 experts.* not 4"),
        (once(ExpertChoice(), Routed(k=2)), "needs a router by which tokens choose, not ExpertChoice"),
    ]
    for layer, message in wrong:
        params = init_params(layer.specs(DIM), jax.random.key(0))
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda p, layer=layer: layer.apply(p, x, Context()), params)
