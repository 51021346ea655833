"""Chunked cross entropy equals the whole, equals torch, and never holds all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from axrepro.errors import UserError
from axrepro.losses.cross_entropy import chunked_cross_entropy, softmax_cross_entropy

BATCH, LENGTH, DIM, VOCAB = 2, 24, 16, 37


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(BATCH, LENGTH, DIM)), rng.normal(size=(DIM, VOCAB))
    return hidden, head, rng.integers(0, VOCAB, (BATCH, LENGTH)), rng.normal(size=(2, BATCH, LENGTH))


def scores_and_gradients(hidden, head, targets, probe, chunk):
    """All outputs, and the gradients of a random combination of nll and log_z, so that no position can be lost."""

    def value(hidden, head):
        out = chunked_cross_entropy(lambda h: h @ head, hidden, targets, chunk)
        return (probe[0] * out["nll"] + probe[1] * out["log_z"]).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(hidden, head)
    return out | {"d_hidden": gradients[0], "d_head": gradients[1]}


@pytest.mark.parametrize("chunk", [None, 100, 24, 8, 7, 1])  # 100 is longer than the row; 7 becomes 6
def test_every_chunk_equals_torch(chunk, inputs, assert_close):
    hidden, head, targets, probe = inputs
    theirs = torch.tensor(hidden, requires_grad=True), torch.tensor(head, requires_grad=True)
    logits = theirs[0] @ theirs[1]
    nll = torch.nn.functional.cross_entropy(logits.mT, torch.tensor(targets), reduction="none")
    log_z = logits.logsumexp(-1)
    (torch.tensor(probe[0]) * nll + torch.tensor(probe[1]) * log_z).sum().backward()
    expected = {
        "nll": nll.detach().numpy(),
        "log_z": log_z.detach().numpy(),
        "correct": (logits.argmax(-1).numpy() == targets).astype(float),
        "d_hidden": theirs[0].grad.numpy(),
        "d_head": theirs[1].grad.numpy(),
    }
    hidden, head, probe = (jnp.asarray(x, jnp.float32) for x in (hidden, head, probe))
    actual = scores_and_gradients(hidden, head, jnp.asarray(targets), probe, chunk)
    assert_close(actual, expected, 3e-6)  # float32 against float64, sums of 16 products and 37 exponentials
    assert actual["nll"].dtype == jnp.float32


def test_large_logits_neither_overflow_nor_lose_the_target():
    logits = jnp.array([[[3e4, -3e4, 0.0]]])
    nll, log_z = softmax_cross_entropy(logits, jnp.array([[0]]))
    assert nll[0, 0] == 0.0
    assert log_z[0, 0] == 3e4
    assert softmax_cross_entropy(logits, jnp.array([[1]]))[0] == 6e4


def test_scores_are_float32_for_bfloat16_logits():
    logits = jax.random.normal(jax.random.key(0), (3, 50)).astype(jnp.bfloat16)
    nll, _ = softmax_cross_entropy(logits, jnp.array([0, 1, 2]))
    exact, _ = softmax_cross_entropy(logits.astype(jnp.float32), jnp.array([0, 1, 2]))
    assert nll.dtype == jnp.float32
    np.testing.assert_array_equal(nll, exact)


@pytest.mark.parametrize(("length", "chunk", "taken"), [(24, 7, 6), (24, 5, 4), (26, 10, 13), (23, 5, 23), (22, 1, 1)])
def test_a_chunk_that_does_not_divide_the_row_becomes_one_that_does(length, chunk, taken):
    seen = []
    head = lambda h: seen.append(h.shape[1]) or h
    chunked_cross_entropy(head, jnp.zeros((2, length, 3)), jnp.zeros((2, length), int), chunk)
    assert set(seen) == {taken}


@pytest.mark.parametrize("chunk", [0, -4])
def test_a_chunk_of_nothing_is_an_error(chunk):
    with pytest.raises(UserError, match=f"chunk={chunk}"):
        chunked_cross_entropy(lambda h: h, jnp.zeros((2, 4, 3)), jnp.zeros((2, 4), int), chunk)


def compiled_gradient(chunk, vocab, length=256):
    def value(hidden, head, targets):
        return chunked_cross_entropy(lambda h: h @ head, hidden, targets, chunk)["nll"].sum()

    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, length, 8), (8, vocab)))
    targets = jax.ShapeDtypeStruct((2, length), jnp.int32)
    return jax.jit(jax.grad(value, (0, 1))).lower(hidden, head, targets).compile()


def largest_logits(compiled, vocab: int) -> int:
    """Numbers in the largest array with a vocabulary dimension, in the program that runs."""
    shapes = re.findall(rf"\[((?:\d+,)*{vocab}(?:,\d+)*)\]", compiled.as_text())
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


def test_the_program_never_holds_the_logits_of_a_whole_batch():
    vocab, length, chunk = 1009, 256, 16  # a prime vocabulary marks its arrays in the program
    whole, chunked = compiled_gradient(None, vocab), compiled_gradient(chunk, vocab)
    assert largest_logits(whole, vocab) == 2 * length * vocab
    assert largest_logits(chunked, vocab) == 2 * chunk * vocab
    # temporary memory: no more than a few chunks of float32 logits
    assert whole.memory_analysis().temp_size_in_bytes >= 4 * 2 * length * vocab
    assert chunked.memory_analysis().temp_size_in_bytes <= 4 * 4 * 2 * chunk * vocab
