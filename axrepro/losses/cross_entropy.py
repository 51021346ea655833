"""Softmax cross entropy over a vocabulary, without ever holding the logits of a whole batch.

Axes: B batch, T sequence, D width, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axrepro.errors import UserError


def softmax_cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """-log softmax(logits)[target] in nats, and the log-partition log sum exp(logits); both float32."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def chunked_cross_entropy(
    head: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int | None,
    shards: int = 1,
) -> dict[str, Float[Array, "B T"]]:
    """Cross entropy of the next token, `chunk` positions of every row and shard at a time.

    Only [B, shards chunk, V] logits exist at once; the backward pass computes them again (2 D V FLOPs a token more).

    Args:
      head: logits of hidden states; its parameters may be closed over.
      chunk: positions at once; where it does not divide T, the next smaller divisor down to its half, else the next
        larger one (a prime T is taken whole, not one by one). None: all, and nothing is computed twice.
      shards: equal parts of the sequence that lie on different devices; each chunk takes as much of every part.
    Returns:
      float32[B, T] each: "nll" in nats, "log_z" the log-partition, "correct" 1.0 where the target is the likeliest.
    Raises:
      UserError: if `chunk` is less than 1.
    """

    def one(hidden, targets):
        logits = head(hidden)
        with jax.named_scope("loss"):
            nll, log_z = softmax_cross_entropy(logits, targets)
            return {"nll": nll, "log_z": log_z, "correct": (logits.argmax(-1) == targets).astype(jnp.float32)}

    batch, length = targets.shape
    if chunk is not None and chunk < 1:
        raise UserError(f"the loss takes chunk={chunk} positions at once; it is at least 1, or None for all")
    part = length // shards
    if chunk is None or chunk >= part:
        return one(hidden, targets)
    divisors = [size for size in range(1, part + 1) if part % size == 0]
    chunk = next((size for size in reversed(divisors) if chunk / 2 <= size <= chunk), 0) or next(
        size for size in divisors if size > chunk
    )

    def chunks(x):  # [B, T, ...] -> [part / chunk, B, shards, chunk, ...] -> [part / chunk, B, shards chunk, ...]
        x = jnp.moveaxis(x.reshape(batch, shards, part // chunk, chunk, *x.shape[2:]), 2, 0)
        return x.reshape(part // chunk, batch, shards * chunk, *x.shape[4:])

    def whole(x):
        return jnp.moveaxis(x.reshape(part // chunk, batch, shards, chunk), 0, 2).reshape(batch, length)

    _, out = jax.lax.scan(
        lambda _, xs: (None, jax.checkpoint(one, prevent_cse=False)(*xs)), None, (chunks(hidden), chunks(targets))
    )
    return jax.tree.map(whole, out)
