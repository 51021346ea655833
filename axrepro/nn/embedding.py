"""Token embedding, and the output head that may share its table."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axrepro.core.context import Context
from axrepro.core.interfaces import Layer
from axrepro.core.param import Normal, Param
from axrepro.errors import require_positive, require_sizes


@dataclass(frozen=True, kw_only=True)
class Embedding(Layer):
    """A row of a table per token id.

    Attributes:
      vocab_size: rows; ids must be in [0, vocab_size).
      std: initial standard deviation; None: dim**-0.5.
      scale: factor on the looked-up rows (Gemma: sqrt(dim)).
      tied: whether an output head reads the table too, so that it takes part in a matrix product.
    """

    vocab_size: int
    std: float | None = None
    scale: float = 1.0
    tied: bool = False

    def __post_init__(self):
        require_sizes(self, "vocab_size")
        require_positive(self, "std", "scale")

    def specs(self, dim: int) -> dict:
        init = Normal(dim**-0.5 if self.std is None else self.std)
        shape, axes = (self.vocab_size, dim), ("vocab", "embed")
        return {"table": Param(shape=shape, axes=axes, init=init, decay=False, matmul=self.tied)}

    def apply(self, params: dict, x: Int[Array, "B T"], ctx: Context) -> tuple[Float[Array, "B T D"], dict]:
        table = ctx.shard(ctx.cast(params["table"]), "vocab", None)
        rows = jnp.take(table, x, axis=0) * jnp.asarray(self.scale, ctx.dtype)
        return ctx.shard(rows, "batch", "seq", "embed_act"), {}
