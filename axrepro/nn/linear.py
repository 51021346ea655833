"""Products of activations with weights: the one place where every dense layer meets its matrix unit."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from axrepro.core.context import Context
from axrepro.core.products import Part
from axrepro.core.remat import tag
from axrepro.nn.dropout import dropout
from axrepro.nn.quantised import quantised_product

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A weight W + scale A B with thin A and B (LoRA, arXiv:2106.09685, Eq. 3), where a layer expects an array.

    A pytree, so that stacks of layers and experts are scanned and mapped as those of W. `matmul` adds two thin products
    and never forms the sum; anything else that a layer does with it works on the dense sum, formed on the spot.

    Attributes:
      base: W[*D, *F].   a: A[*D, R].   b: B[R, *F]; leading dimensions of stacks on all three.
      dropout: on the input of A.   name: by which its mask differs from those of other weights.
    """

    base: Any  # an array, or what jax's transformations put in its place
    a: Any
    b: Any
    scale: float = field(metadata=_static)
    dropout: float = field(metadata=_static)
    name: str = field(metadata=_static)

    def dense(self) -> jax.Array:
        """W + scale A B, without dropout."""
        product = lambda a, b: jnp.tensordot(a, b, axes=1)
        for _ in range(self.a.ndim + self.b.ndim - 2 - self.base.ndim):
            product = jax.vmap(product)
        return self.base + self.scale * product(self.a, self.b)

    __jax_array__ = dense

    def astype(self, dtype) -> jax.Array:
        """The dense sum in another type."""
        return self.dense().astype(dtype)


def matmul(
    x: Float[Array, "..."],
    weight: Float[Array, "..."] | LowRank,
    ctx: Context,
    *,
    contracted: int = 1,
    dtype: str | None = None,
    part: Part | None = None,
) -> Float[Array, "..."]:
    """x[*B, *D] weight[*D, *F] -> [*B, *F], where *D are `contracted` dimensions; both in the compute type.

    On CPU the product is taken between matrices: for operands with more dimensions XLA's CPU compiler transposes both
    of them in memory before each weight gradient, which made a step of `dense_tiny` 1.4 times slower (jaxlib 0.10.2).
    Elsewhere, and where the sequence is split, the dimensions stay, so that each can keep its own sharding.

    Args:
      dtype: of accumulation and result; None: that of the operands.
      part: what of a model this is, by which `ctx.products` may choose 8 bits; None: exact.
    """
    if isinstance(weight, LowRank):
        y = matmul(x, weight.base, ctx, contracted=contracted, dtype=dtype, part=part)
        thin = matmul(dropout(x, weight.dropout, ctx.fold(weight.name)), weight.a, ctx, contracted=contracted)
        return y + matmul(weight.scale * thin, weight.b, ctx, dtype=dtype)
    x, weight = ctx.cast(x), ctx.cast(weight)
    if (format := ctx.products.of(part)) != "exact":
        return tag(quantised_product(x, weight, contracted, format).astype(dtype or ctx.dtype), "product")
    batch, out = x.shape[: x.ndim - contracted], weight.shape[contracted:]
    if ctx.platform == "cpu" and ctx.shards("seq") == 1:
        inner = math.prod(weight.shape[:contracted])
        rows, weight = x.reshape(-1, inner), weight.reshape(inner, -1)
        product = jax.lax.dot(rows, weight, preferred_element_type=dtype)
        return product.reshape(*batch, *out)
    axes = tuple(range(len(batch), x.ndim)), tuple(range(contracted))
    return jax.lax.dot_general(x, weight, (axes, ((), ())), preferred_element_type=dtype)
