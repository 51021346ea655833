"""Next-token prediction."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from axrepro.core.aux import Loss, Metric
from axrepro.core.context import Context
from axrepro.core.flops import Flops, train_flops
from axrepro.core.interfaces import Method
from axrepro.errors import UserError, require_not_negative, require_sizes
from axrepro.losses.cross_entropy import chunked_cross_entropy
from axrepro.models.causal_lm import CausalLM


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Method):
    """Cross entropy of the next token, averaged over all tokens that are not padding.

    A batch holds int32[B, T] "tokens" and "targets", and may hold "segment_ids" (0 = padding), "positions", a float
    "loss_mask" (weight of each target), and a bool "prefix" (inputs that earlier ones of their segment see, too).

    Attributes:
      z_weight: of the mean squared log-partition of the output softmax (PaLM, arXiv:2204.02311, Sec. 5).
      chunk: positions per row, or per device's part of it, whose logits exist at once; None: all.
    """

    model: CausalLM
    z_weight: float = 0.0
    chunk: int | None = 512

    def __post_init__(self):
        require_not_negative(self, "z_weight")
        require_sizes(self, "chunk")

    def specs(self) -> dict:
        return self.model.specs()

    def loss(self, params: dict, batch: dict[str, jax.Array], ctx: Context) -> dict:
        scores, mask, aux = self.scores(params, batch, ctx)
        aux = {**aux, "lm": Loss.mean(scores["nll"], mask), "accuracy": Metric.mean(scores["correct"], mask)}
        if self.z_weight:
            aux["lm_z"] = Loss.mean(scores["log_z"] ** 2, mask, self.z_weight)
        return aux

    def evaluate(self, params: dict, batch: dict[str, jax.Array], ctx: Context) -> dict:
        scores, mask, aux = self.scores(params, batch, ctx)
        bits = scores["nll"] / jnp.log(2.0)
        return {
            **aux,
            "lm": Loss.mean(scores["nll"], mask),
            "accuracy": Metric.mean(scores["correct"], mask),
            "bits_per_token": Metric.mean(bits, mask),
        }

    def scores(
        self, params: dict, batch: dict[str, jax.Array], ctx: Context
    ) -> tuple[dict[str, jax.Array], jax.Array, dict]:
        """What the means are of.

        Returns:
          [B, T] scores of each target by name (`chunked_cross_entropy`), its weight [B, T], and the aux of the model.
        """
        ctx = ctx.replace(**{name: batch.get(name) for name in ("segment_ids", "positions", "prefix")})
        hidden, aux = self.model.apply(params, batch["tokens"], ctx)
        head = lambda h: self.model.logits(params, h, ctx)
        scores = chunked_cross_entropy(head, hidden, batch["targets"], self.chunk, ctx.shards("seq"))
        mask = jnp.ones(batch["tokens"].shape, bool) if ctx.segment_ids is None else ctx.segment_ids > 0
        return scores, mask * batch["loss_mask"] if "loss_mask" in batch else mask, aux

    def flops(self, batch: Mapping[str, tuple[int, ...]]) -> Flops:
        rows, length = batch["tokens"]
        return train_flops(self.specs(), rows * length, lambda full: self.model.attention_flops(length, full))

    def check(self, batch: Mapping[str, tuple[int, ...]], vocab_size: int | None) -> None:
        if missing := sorted({"tokens", "targets"} - set(batch)):
            raise UserError(f"a language model needs {missing[0]!r} in its batches; the data gives {', '.join(batch)}")
        if vocab_size is not None and vocab_size > self.model.vocab_size:
            raise UserError(
                f"the data's vocabulary has {vocab_size} ids, the model only method.model.vocab_size="
                f"{self.model.vocab_size}; raise it to at least {vocab_size}"
            )
