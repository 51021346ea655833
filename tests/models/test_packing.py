"""Documents packed into one row are scored as if each were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axrepro.core import Context
from axrepro.core.param import init_params
from axrepro.losses.cross_entropy import softmax_cross_entropy
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM
from axrepro.nn import Attention, Block, FeedForward, MoE, Repeat, RouterLosses, TopK

VOCAB, LENGTH = 29, 20
LENGTHS = (8, 8)  # of equal length, so that one program serves both alone; four positions of padding follow
KINDS = {
    "dense": FeedForward(hidden=24),
    # with room for all: what one document takes from another is slots, and there is no shortage of them
    "moe": MoE(
        expert=FeedForward(hidden=12),
        num_experts=4,
        capacity_factor=4.0,
        router=TopK(losses=RouterLosses(balance=0.0, z=0.0)),
    ),
}


def model(kind: str) -> CausalLM:
    attention = Attention(num_heads=4, num_kv_heads=2)
    return CausalLM(vocab_size=VOCAB, dim=16, layers=Repeat(layer=Block(attention=attention, ffn=KINDS[kind]), times=2))


def packed(documents) -> dict:
    """One row of all documents and padding with arbitrary contents."""
    rest = LENGTH - sum(tokens.size for tokens, _ in documents)
    filler = np.full(rest, 5)
    join = lambda parts, end: jnp.asarray(np.concatenate([*parts, end]))[None]
    return {
        "tokens": join([tokens for tokens, _ in documents], filler),
        "targets": join([targets for _, targets in documents], filler),
        "segment_ids": join([np.full(tokens.size, i + 1) for i, (tokens, _) in enumerate(documents)], 0 * filler),
        "positions": join([np.arange(tokens.size) for tokens, _ in documents], 0 * filler),
    }


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, VOCAB, (2, length))) for length in LENGTHS]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_of_a_packed_row_are_those_of_its_documents(kind, documents, assert_close):
    network = model(kind)
    params = init_params(network.specs(), jax.random.key(0))

    @jax.jit
    def run(params, batch):
        ctx = Context(segment_ids=batch.get("segment_ids"), positions=batch.get("positions"))
        mask = jnp.ones(batch["tokens"].shape) if ctx.segment_ids is None else ctx.segment_ids > 0

        def total(params):
            logits = network.logits(params, network.apply(params, batch["tokens"], ctx)[0], ctx)
            return (softmax_cross_entropy(logits, batch["targets"])[0] * mask).sum(), logits

        (value, logits), grads = jax.value_and_grad(total, has_aux=True)(params)
        return value, logits, grads

    row = packed(documents)
    value, logits, grads = run(params, row)
    alone = [run(params, {"tokens": jnp.asarray(x)[None], "targets": jnp.asarray(y)[None]}) for x, y in documents]
    joined = np.concatenate([part[1] for part in alone], axis=1)
    assert_close(logits[:, : sum(LENGTHS)], joined, 3e-6)  # longer softmax sums, of zeros
    assert_close(value, sum(part[0] for part in alone), 1e-6)
    assert_close(grads, jax.tree.map(lambda *g: sum(g), *(part[2] for part in alone)), 1e-5)

    # the method, which sees the segment ids in the batch, scores the same tokens
    term = jax.jit(LanguageModel(model=network, chunk=10).loss)(params, row, Context())["lm"]
    assert term.count == sum(LENGTHS)
    assert_close(term.total, value, 1e-6)


def test_segments_separate_the_documents_and_their_positions_need_not_restart(documents, assert_close):
    network = model("dense")
    params = init_params(network.specs(), jax.random.key(0))
    row, (first, second) = packed(documents), LENGTHS
    apply = jax.jit(lambda ctx: network.apply(params, row["tokens"], ctx)[0])
    restarting = apply(Context(segment_ids=row["segment_ids"], positions=row["positions"]))
    running = apply(Context(segment_ids=row["segment_ids"]))
    assert_close(running[:, : first + second], restarting[:, : first + second], 1e-5)  # RoPE is relative
    # guards the test above: in one segment the second document sees the first
    mixed = apply(Context())
    np.testing.assert_allclose(mixed[0, :first], running[0, :first], atol=1e-5)
    assert np.abs(mixed[0, first : first + second] - running[0, first : first + second]).max() > 0.01


def test_earlier_positions_see_the_prefix_of_their_own_segment_alone(documents):
    network = model("dense")
    params = init_params(network.specs(), jax.random.key(0))
    row = packed(documents)
    prefix = np.zeros((1, LENGTH), bool)
    prefix[0, :5] = prefix[0, 8:12] = True
    loss = jax.jit(lambda batch: LanguageModel(model=network).loss(params, batch, Context())["lm"].total)

    def change(place: int, position: int, **more) -> float:
        """Of the loss at a position, where another token stands at a place."""
        batch = row | more | {"loss_mask": jnp.zeros((1, LENGTH)).at[0, position].set(1.0)}
        other = row["tokens"].at[0, place].add(1) % VOCAB
        return abs(float(loss(batch | {"tokens": other})) - float(loss(batch)))

    assert change(4, 1) == 0
    assert change(4, 1, prefix=jnp.asarray(prefix)) > 1e-4
    assert change(5, 1, prefix=jnp.asarray(prefix)) == 0  # behind the prefix
    assert change(10, 1, prefix=jnp.asarray(prefix)) == 0  # of another segment
