"""Small mixtures and their inputs, for tests."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from axrepro.core import Context, Loss, collect
from axrepro.core.aux import objective
from axrepro.core.param import init_params
from axrepro.nn import FeedForward, MoE, RouterLosses
from axrepro.nn.moe import Room

DIM, EXPERTS, GROUPS, TOKENS = 8, 4, 3, 12
FFN = FeedForward(hidden=10)
NO_LOSSES = RouterLosses(balance=0.0, z=0.0)
ROUNDING = 3e-6  # float32 sums of at most some tens of terms in another order, or against float64


def inputs(seed=1, groups=GROUPS, tokens=TOKENS):
    return jax.random.normal(jax.random.key(seed), (groups, tokens, DIM))


def weight_of(seed=0, experts=EXPERTS):
    """Router weights whose logits are of order 1."""
    return jax.random.normal(jax.random.key(100 + seed), (DIM, experts))


def padded_rows():
    """True for the first 12, 7 and 0 tokens of the three groups."""
    return jnp.arange(TOKENS)[None] < jnp.array([12, 7, 0])[:, None]


@partial(jax.jit, static_argnames=("router", "capacity"))
def route(router, params, x, valid=None, ctx=Context(), capacity=TOKENS):
    """(routing, aux) of a router."""
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    return router.apply(params, x, valid, Room(params["weight"].shape[1], capacity), ctx)


def exact(a) -> np.ndarray:
    return np.asarray(a, np.float64)


def softmax(logits) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mixture(**changes) -> MoE:
    """Four experts, with the grouped product that compiles fastest (all agree: test_grouped_products.py)."""
    return replace(MoE(expert=FFN, num_experts=EXPERTS, implementation="ragged_dot"), **changes)


def params_of(layer, seed=0, spread=4.0):
    params = init_params(layer.specs(DIM), jax.random.key(seed))
    if "weight" in params["router"]:
        params["router"]["weight"] *= spread
    return params


@cache
def applied(layer, **options):
    """The compiled layer, (params, x, fields of the context) to (y, aux)."""
    return jax.jit(lambda params, x, fields: layer.apply(params, x, Context(**fields, **options)))


@cache
def gradients(layer, train=True):
    def value(params, x, probe, fields):
        y, aux = layer.apply(params, x, Context(**fields, train=train))
        return (y * probe).sum() + (objective(aux) if collect(aux, Loss) else 0.0)

    return jax.jit(jax.grad(value, argnums=(0, 1)))
