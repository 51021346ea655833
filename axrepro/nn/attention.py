"""Multi-head attention with grouped keys and values, rotary positions and packed segments."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from axrepro.core.context import Context
from axrepro.core.interfaces import Layer
from axrepro.core.param import linear, vector
from axrepro.core.remat import tag
from axrepro.errors import UserError, require, require_positive, require_sizes
from axrepro.kernels.attention import Implementation, Mask, attention
from axrepro.nn.linear import matmul
from axrepro.nn.rope import RoPE


@dataclass(frozen=True, kw_only=True)
class Attention(Layer):
    """Self-attention, or cross-attention to `ctx.memory`.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key-value heads, a divisor of `num_heads`: equal is multi-head, 1 multi-query (arXiv:1911.02150), in
        between grouped (arXiv:2305.13245). None: as many as queries.
      head_dim: None: dim / num_heads.
      mask: causal or not, and the window.
      rope: None leaves positions out.
      qk_norm: a norm on each head's query and key before RoPE (arXiv:2302.05442, Sec. 2.1).
      logit_cap: soft limit of the attention logits.
      qkv_bias, out_bias: additive terms.
      cross: keys and values come from `ctx.memory`; no RoPE and no causal mask then.
      implementation: kernel; "auto" chooses by platform.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mask: Mask = Mask()
    rope: RoPE | None = RoPE()
    qk_norm: Layer | None = None
    logit_cap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    cross: bool = False
    implementation: Implementation = "auto"

    def __post_init__(self):
        require_sizes(self, "num_heads", "num_kv_heads", "head_dim")
        require_positive(self, "logit_cap")
        divides = self.num_heads % self.kv_heads == 0
        require(self, "num_kv_heads", divides, f"a divisor of num_heads={self.num_heads}")
        if self.cross and (self.rope is not None or self.mask.causal):
            raise ValueError("cross-attention takes rope=None and mask=Mask(causal=False)")

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def _head_dim(self, dim: int) -> int:
        if self.head_dim is None and dim % self.num_heads:
            raise UserError(f"width {dim} is no multiple of num_heads={self.num_heads}; set head_dim")
        return dim // self.num_heads if self.head_dim is None else self.head_dim

    def specs(self, dim: int) -> dict:
        head_dim, heads, kv_heads = self._head_dim(dim), self.num_heads, self.kv_heads
        if self.rope is not None:
            self.rope.frequencies(head_dim)  # raises if it cannot rotate this many
        specs: dict = {
            "q": linear((dim, heads, head_dim), ("embed", "heads", "head_dim"), fan_in=dim),
            "k": linear((dim, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), fan_in=dim),
            "v": linear((dim, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), fan_in=dim),
            "out": linear((heads, head_dim, dim), ("heads", "head_dim", "embed"), fan_in=heads * head_dim),
        }
        if self.qkv_bias:
            specs["q_bias"] = vector((heads, head_dim), ("heads", "head_dim"), 0.0)
            specs["k_bias"] = vector((kv_heads, head_dim), ("kv_heads", "head_dim"), 0.0)
            specs["v_bias"] = vector((kv_heads, head_dim), ("kv_heads", "head_dim"), 0.0)
        if self.out_bias:
            specs["out_bias"] = vector((dim,), (None,), 0.0)
        if self.qk_norm is not None:
            specs["q_norm"] = self.qk_norm.specs(head_dim)
            specs["k_norm"] = self.qk_norm.specs(head_dim)
        return specs

    def apply(self, params: dict, x: Float[Array, "B T D"], ctx: Context) -> tuple[Float[Array, "B T D"], dict]:
        if self.cross and ctx.memory is None:
            raise ValueError("cross-attention reads ctx.memory, which is not set")
        source = ctx.memory if self.cross else x
        aux = {}

        def project(inputs, name, heads):
            y = matmul(inputs, params[name], ctx, part="attention")
            if self.qkv_bias:
                y += ctx.cast(params[f"{name}_bias"])
            if self.qk_norm is not None and name != "v":
                y, aux[f"{name}_norm"] = self.qk_norm.apply(params[f"{name}_norm"], y, ctx)
            if self.rope is not None and name != "v":
                y = self.rope.rotate(y, ctx.token_positions(*y.shape[:2]))
            return tag(ctx.shard(y, "batch", "seq", heads, "head_dim"), name)

        q, k, v = project(x, "q", "heads"), project(source, "k", "kv_heads"), project(source, "v", "kv_heads")
        y = attention(
            q,
            k,
            v,
            mask=self.mask,
            # padding of the memory is masked; queries of any segment read all of it
            segment_ids=self._memory_segments(x, ctx) if self.cross else ctx.segment_ids,
            key_segment_ids=(ctx.memory_segment_ids > 0).astype(jnp.int32)
            if self.cross and ctx.memory_segment_ids is not None
            else None,
            prefix=None if self.cross else ctx.prefix,
            logit_cap=self.logit_cap,
            implementation=self.implementation,
            platform=ctx.platform,
            sharding=self._sharding(q, ctx),
            context_parallel=ctx.context_parallel,
        )
        out = matmul(tag(y, "attention"), params["out"], ctx, contracted=2, part="attention")
        if self.out_bias:
            out += ctx.cast(params["out_bias"])
        return tag(ctx.shard(out, "batch", "seq", "embed_act"), "attention_out"), aux

    def _memory_segments(self, x, ctx: Context):
        return None if ctx.memory_segment_ids is None else jnp.ones(x.shape[:2], jnp.int32)

    def _sharding(self, q, ctx: Context) -> NamedSharding | None:
        if ctx.mesh is None or ctx.mesh.size == 1:
            return None
        spec = ctx.rules.spec(("batch", "seq", "heads", None), q.shape, dict(ctx.mesh.shape))
        return NamedSharding(ctx.mesh, spec)

    def attention_flops(self, dim: int, length: int, full: bool) -> float:
        # memory that cross-attention reads counts as long as the queries
        window = length if self.mask.window is None else min(length, self.mask.window)
        keys = length if full or not self.mask.causal else window * (1 - window / (2 * length))
        return 2 * 2.0 * keys * self.num_heads * self._head_dim(dim)
