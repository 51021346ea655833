"""Noise on routers: when it acts, and its distribution."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import DIM, EXPERTS, NO_LOSSES, exact, inputs, route, weight_of

from axrepro.core import Context
from axrepro.core.param import init_params
from axrepro.nn import TopK
from axrepro.nn.moe import Gumbel, Jitter, LearnedGaussian


def logits_seen(router, params, x, **options):
    """log p of the router's probabilities, through the gates of all experts."""
    routing, _ = route(router, params, x, ctx=Context(**options))
    order = np.argsort(np.asarray(routing.expert), -1)
    return np.log(np.take_along_axis(np.asarray(routing.gate), order, -1))


@pytest.mark.parametrize("noise", [Jitter(eps=0.3), Gumbel(), LearnedGaussian()], ids=lambda n: type(n).__name__)
def test_noise_acts_in_training_with_a_key_alone(noise):
    router = TopK(k=EXPERTS, noise=noise, losses=NO_LOSSES)
    params = {"weight": weight_of(), "noise": init_params(noise.specs(DIM, EXPERTS), jax.random.key(0))}
    x, key = inputs(), jax.random.key(7)
    quiet = logits_seen(replace(router, noise=None), params, x)
    for options in ({}, {"key": key}, {"train": True}):
        np.testing.assert_array_equal(logits_seen(router, params, x, **options), quiet)
    first, again, other = (logits_seen(router, params, x, key=k, train=True) for k in (key, key, jax.random.key(8)))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - quiet).max() > 0.05
    assert np.abs(first - other).max() > 0.05


def test_gumbel_noise_of_scale_one_samples_the_softmax():
    draws = 20000
    x = jnp.broadcast_to(inputs(groups=1, tokens=1), (1, draws, DIM))
    router = TopK(k=1, noise=Gumbel(), losses=NO_LOSSES)
    params = {"weight": 0.5 * weight_of(), "noise": {}}
    routing, _ = route(router, params, x, ctx=Context(train=True, key=jax.random.key(0)))
    found = np.bincount(np.asarray(routing.expert).reshape(-1), minlength=EXPERTS) / draws
    expected = np.asarray(jax.nn.softmax(x[0, 0] @ params["weight"]))
    assert expected.max() - expected.min() > 0.1
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / draws))


def test_jitter_multiplies_the_inputs_of_the_router_by_uniform_numbers():
    # one input feature per expert, so that a log-ratio of gates is the ratio of two factors
    x = jnp.broadcast_to(jnp.eye(DIM)[0] + jnp.eye(DIM)[1], (1, 4000, DIM))
    params = {"weight": jnp.eye(DIM)[:, :2], "noise": {}}
    router = TopK(k=2, noise=Jitter(eps=0.25), losses=NO_LOSSES)
    seen = logits_seen(router, params, x, key=jax.random.key(0), train=True)
    difference = (seen[..., 0] - seen[..., 1]).reshape(-1)  # u - v with u, v uniform in [0.75, 1.25]
    assert np.abs(difference).max() <= 0.5
    assert np.abs(difference).max() > 0.45
    assert difference.var() == pytest.approx(2 * 0.5**2 / 12, rel=0.06)
    assert difference.mean() == pytest.approx(0, abs=0.02)


def test_learned_gaussian_noise_has_a_width_per_token_and_expert_that_learns():
    router = TopK(k=EXPERTS, noise=LearnedGaussian(), losses=NO_LOSSES)
    weight, noise = weight_of(), {"weight": 0.5 * weight_of(5)}
    # many draws at one token, along the group
    token = inputs(groups=1, tokens=1)
    x = jnp.broadcast_to(token, (1, 8000, DIM))
    seen = logits_seen(router, {"weight": weight, "noise": noise}, x, key=jax.random.key(0), train=True)[0]
    width = np.log1p(np.exp(exact(token[0, 0]) @ exact(noise["weight"])))
    # differences of log-probabilities are differences of logits
    for other in range(1, EXPERTS):
        difference = seen[:, 0] - seen[:, other]
        assert difference.std() == pytest.approx(np.hypot(width[0], width[other]), rel=0.05)
    params = {"weight": weight, "noise": init_params(LearnedGaussian().specs(DIM, EXPERTS), jax.random.key(0))}
    assert not np.any(params["noise"]["weight"])
    probe = inputs(5)[..., :EXPERTS]

    def value(params):
        routing, _ = route(router, params, inputs(), ctx=Context(train=True, key=jax.random.key(1)))
        return (routing.gate * probe).sum()

    assert np.linalg.norm(jax.grad(value)(params)["noise"]["weight"]) > 1e-3
