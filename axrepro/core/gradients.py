"""Gradients of an objective over microbatches, exactly those of the whole batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from axrepro.core.aux import losses_by_name, merge_stacked, objective
from axrepro.core.context import Context

LossFn = Callable[[dict, dict, Context], dict]
"""(trained params, batch, ctx) -> aux tree."""


def split_batch(batch: dict[str, jax.Array], parts: int, ctx: Context) -> dict[str, jax.Array]:
    """Every [B, ...] as [parts, B / parts, ...]. Row i goes to part i % parts, so each device splits its own rows.

    Raises:
      ValueError: if B is no multiple of `parts`.
    """

    def one(x):
        rows, rest = divmod(x.shape[0], parts)
        if rest:
            raise ValueError(f"a batch of {x.shape[0]} cannot be split into {parts} equal parts")
        x = x.reshape(rows, parts, *x.shape[1:]).swapaxes(0, 1)
        return ctx.shard(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(one, batch)


def accumulated_gradients(
    loss: LossFn, params: dict, batch: dict[str, jax.Array], ctx: Context, microbatches: int
) -> tuple[dict, dict]:
    """Gradients and aux of a batch, computed `microbatches` at a time in sequence.

    Each term of the objective is divided by its count over the *whole* batch, so masked tokens weigh the same however
    the batch is split. The counts are taken by a first pass in which everything else is dead code. A loss that is not
    a mean over examples (a balance loss) is averaged over the microbatches; so are the values of an `Update`.

    Returns:
      (gradients like `params`, aux merged over the microbatches).
    """

    def value(params, batch, ctx, counts):
        aux = loss(params, batch, ctx)
        return objective(aux, counts), aux

    if microbatches == 1:
        grads, aux = jax.grad(value, has_aux=True)(params, batch, ctx, None)
        return grads, aux

    parts = split_batch(batch, microbatches, ctx)
    indices = jnp.arange(microbatches)

    def counts_of(index_and_part):
        index, part = index_and_part
        return {name: term.count for name, term in losses_by_name(loss(params, part, ctx.fold(index))).items()}

    counts = jax.tree.map(lambda c: jax.lax.stop_gradient(c.sum(0)), jax.lax.map(counts_of, (indices, parts)))

    def accumulate(total, index_and_part):
        index, part = index_and_part
        grads, aux = jax.grad(value, has_aux=True)(params, part, ctx.fold(index), counts)
        return jax.tree.map(jnp.add, total, grads), aux

    grads, aux = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), (indices, parts))
    return grads, merge_stacked(aux)
