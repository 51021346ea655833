"""Products of activations with weights: the one place where every dense layer meets its matrix unit."""

import math

import jax
from jaxtyping import Array, Float

from axrepro.core.context import Context
from axrepro.core.products import Part
from axrepro.core.remat import tag
from axrepro.nn.quantised import quantised_product


def matmul(
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    ctx: Context,
    *,
    contracted: int = 1,
    dtype: str | None = None,
    part: Part | None = None,
) -> Float[Array, "..."]:
    """x[*B, *D] weight[*D, *F] -> [*B, *F], where *D are `contracted` dimensions; both in the compute type.

    On CPU the product is taken between matrices: for operands with more dimensions XLA's CPU compiler transposes both
    of them in memory before each weight gradient, which made a step of `dense_tiny` 1.4 times slower (jaxlib 0.10.2).
    Elsewhere the dimensions stay, so that each can keep its own sharding.

    Args:
      dtype: of accumulation and result; None: that of the operands.
      part: what of a model this is, by which `ctx.products` may choose 8 bits; None: exact.
    """
    x, weight = ctx.cast(x), ctx.cast(weight)
    if (format := ctx.products.of(part)) != "exact":
        return tag(quantised_product(x, weight, contracted, format).astype(dtype or ctx.dtype), "product")
    batch, out = x.shape[: x.ndim - contracted], weight.shape[contracted:]
    if ctx.platform == "cpu":
        inner = math.prod(weight.shape[:contracted])
        rows, weight = x.reshape(-1, inner), weight.reshape(inner, -1)
        product = jax.lax.dot(rows, weight, preferred_element_type=dtype)
        return product.reshape(*batch, *out)
    axes = tuple(range(len(batch), x.ndim)), tuple(range(contracted))
    return jax.lax.dot_general(x, weight, (axes, ((), ())), preferred_element_type=dtype)
