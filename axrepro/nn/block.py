"""Residual blocks, and the containers that stack them."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from axrepro.core.config import swap
from axrepro.core.context import Context
from axrepro.core.interfaces import Layer
from axrepro.core.param import stack
from axrepro.core.remat import rematerialised, tag
from axrepro.errors import UserError, is_number, require, require_sizes
from axrepro.nn.dropout import dropout
from axrepro.nn.feed_forward import FeedForward
from axrepro.nn.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class Block(Layer):
    """x + attention(norm(x)), then x + ffn(norm(x)). It is the unit of rematerialisation.

    Attributes:
      norm: before attention and feed-forward; None for post-norm only.
      post_norm: on their outputs, inside the residual branch; with `norm` the hybrid of Gemma 2 and axlearn.
      dropout: on their outputs.
    """

    attention: Layer
    ffn: Layer
    norm: Layer | None = RMSNorm()
    post_norm: Layer | None = None
    dropout: float = 0.0

    def __post_init__(self):
        require(self, "dropout", is_number(self.dropout) and 0 <= self.dropout < 1, "a number in [0, 1)")

    def _norms(self, branch: str) -> dict[str, Layer]:
        norms = {f"{branch}_norm": self.norm, f"{branch}_post_norm": self.post_norm}
        return {name: norm for name, norm in norms.items() if norm is not None}

    def specs(self, dim: int) -> dict:
        specs = {"attention": self.attention.specs(dim), "ffn": self.ffn.specs(dim)}
        for branch in ("attention", "ffn"):
            specs |= {name: norm.specs(dim) for name, norm in self._norms(branch).items()}
        return specs

    def apply(self, params: dict, x: Float[Array, "B T D"], ctx: Context) -> tuple[Float[Array, "B T D"], dict]:
        return rematerialised(self._apply, ctx.remat, ctx.in_scan)(params, x, ctx)

    def _apply(self, params, x, ctx):
        x, aux = tag(x, "block_input"), {}  # in here, or its place would be no choice of the policy
        for branch, layer in (("attention", self.attention), ("ffn", self.ffn)):
            inner, y = ctx.fold(branch), x
            if self.norm is not None:
                with jax.named_scope(f"{branch}_norm"):
                    y, aux[f"{branch}_norm"] = self.norm.apply(params[f"{branch}_norm"], y, ctx)
            with jax.named_scope(branch):
                y, aux[branch] = layer.apply(params[branch], y, inner)
            if self.post_norm is not None:
                name = f"{branch}_post_norm"
                with jax.named_scope(name):
                    y, aux[name] = self.post_norm.apply(params[name], y, ctx)
            x = ctx.shard(x + dropout(y, self.dropout, inner.fold("dropout")), "batch", "seq", "embed_act")
        return x, aux

    def attention_flops(self, dim: int, length: int, full: bool) -> float:
        return self.attention.attention_flops(dim, length, full) + self.ffn.attention_flops(dim, length, full)


@dataclass(frozen=True)
class Sequence(Layer):
    """Layers one after another; their parameters are called "0", "1", ..."""

    layers: tuple[Layer, ...]

    def specs(self, dim: int) -> dict:
        return {str(i): layer.specs(dim) for i, layer in enumerate(self.layers)}

    def apply(self, params: dict, x: Float[Array, "*B D"], ctx: Context) -> tuple[Float[Array, "*B D"], dict]:
        aux = {}
        for i, layer in enumerate(self.layers):
            with jax.named_scope(str(i)):
                x, aux[str(i)] = layer.apply(params[str(i)], x, ctx.fold(i))
        return x, aux

    def token_wise(self) -> bool:
        return all(layer.token_wise() for layer in self.layers)

    def attention_flops(self, dim: int, length: int, full: bool) -> float:
        return sum(layer.attention_flops(dim, length, full) for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Repeat(Layer):
    """One layer `times` times with separate parameters, stacked on a leading axis and scanned: compiled once.

    Attributes:
      unroll: iterations compiled in a row; `times` writes the loop out, for short stacks on CPU.
    """

    layer: Layer
    times: int
    unroll: int = 1

    def __post_init__(self):
        require_sizes(self, "times", "unroll")

    def specs(self, dim: int) -> dict:
        return stack(self.layer.specs(dim), self.times, "layers")

    def apply(self, params: dict, x: Float[Array, "*B D"], ctx: Context) -> tuple[Float[Array, "*B D"], dict]:
        unroll = min(self.unroll, self.times)
        inner = ctx.replace(in_scan=ctx.in_scan or unroll < self.times)

        def body(x, params_and_key):
            # a closed-over key would give every iteration the same dropout mask
            params, key = params_and_key
            return self.layer.apply(params, x, inner.replace(key=key))

        return jax.lax.scan(body, x, (params, ctx.keys(self.times)), unroll=unroll)

    def attention_flops(self, dim: int, length: int, full: bool) -> float:
        return self.times * self.layer.attention_flops(dim, length, full)


def every(tree, k: int, change: Callable[[Layer], Layer], kind: type[Layer] = FeedForward):
    """`tree` with `change` applied to the `kind` layers of every k-th block: `every(experiment, 4, to_moe)`.

    A `Repeat` of n blocks becomes a `Repeat` of n / k groups, the last block of each group changed.

    Raises:
      UserError: if there is no `Repeat`, or its length is no multiple of k.
    """

    def interleave(repeat: Repeat) -> Repeat:
        if k < 1 or repeat.times % k:
            raise UserError(
                f"every {k}-th block of {repeat.times} cannot be changed: choose a divisor of {repeat.times}"
            )
        changed = swap(repeat.layer, kind, change)
        if k == 1:
            return Repeat(layer=changed, times=repeat.times, unroll=repeat.unroll)
        layers = (repeat.layer,) * (k - 1) + (changed,)
        return Repeat(layer=Sequence(layers), times=repeat.times // k, unroll=max(1, repeat.unroll // k))

    return swap(tree, Repeat, interleave)
