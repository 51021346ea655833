"""Dropout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from axrepro.core.context import Context


def dropout(x: Float[Array, "*B"], rate: float, ctx: Context) -> Float[Array, "*B"]:
    """Zeroes elements with probability `rate` and scales the others by 1 / (1 - rate), in training only."""
    if rate == 0.0 or not ctx.train:
        return x
    if ctx.key is None:
        raise ValueError(f"dropout={rate} in training needs ctx.key")
    keep = jax.random.bernoulli(ctx.key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
