"""Sampling continues a prompt as the model's own probabilities say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axrepro.core import Context
from axrepro.core.param import init_params
from axrepro.decode.sample import sample
from axrepro.models.causal_lm import llama
from axrepro.nn import MoE, every

DENSE = llama(vocab_size=11, dim=8, num_layers=2, num_heads=2, hidden=16)
# enough room for every token, so that the length of the row changes no routing
SPARSE = every(DENSE, 2, lambda ffn: MoE(expert=ffn, num_experts=4, capacity_factor=4.0))
NEVER = 99  # no end-id


def logits_of(model, params, tokens) -> np.ndarray:
    """Next-token logits after `tokens`, from the model run on them alone."""
    ctx = Context()
    hidden, _ = model.apply(params, jnp.asarray(tokens)[None], ctx)
    return np.asarray(model.logits(params, hidden, ctx))[0, -1]


def trained_alike(model, seed=0) -> dict:
    """Parameters whose logits are far apart."""
    return jax.tree.map(lambda x: 3 * x, init_params(model.specs(), jax.random.key(seed)))


@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "moe"])
def test_a_cold_sample_takes_the_likeliest_token_each_time(model):
    params = trained_alike(model)
    expected = [1, 2, 3]
    while len(expected) < 12:
        expected.append(int(logits_of(model, params, expected).argmax()))
    np.testing.assert_array_equal(sample(model, params, [1, 2, 3], 12, eos_id=NEVER, temperature=1e-6), expected)


def test_frequencies_are_those_of_the_softmax_at_the_temperature():
    params = trained_alike(DENSE)
    temperature, draws = 2.0, 2000
    logits = logits_of(DENSE, params, [1, 2]) / temperature
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    drawn = [sample(DENSE, params, [1, 2], 3, eos_id=NEVER, seed=s, temperature=temperature)[2] for s in range(draws)]
    found = np.bincount(drawn, minlength=11) / draws
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / draws)  # four standard deviations at most


def test_the_end_id_ends_it_and_is_left_out():
    params = trained_alike(DENSE)
    whole = sample(DENSE, params, [1], 12, eos_id=NEVER, temperature=1e-6)
    end = whole[5]
    first = int(np.flatnonzero(whole[1:] == end)[0]) + 1
    np.testing.assert_array_equal(sample(DENSE, params, [1], 12, eos_id=int(end), temperature=1e-6), whole[:first])


@pytest.mark.parametrize(("prompt", "length", "temperature"), [([], 4, 1.0), ([1, 2], 2, 1.0), ([1], 4, 0.0)])
def test_impossible_requests_are_errors(prompt, length, temperature):
    with pytest.raises(ValueError, match=f"a prompt of {len(prompt)} ids, length {length}"):
        sample(DENSE, trained_alike(DENSE), prompt, length, eos_id=NEVER, temperature=temperature)
