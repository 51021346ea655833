"""What all programs of a comparison share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A Llama with a tied head; those of `dense_tiny` by default.

    Attributes:
      batch, length: rows and tokens per row of a batch.
      vocab_size, dim, hidden, num_layers, num_heads: of the model.
      num_experts: of the mixture in every block, of which a token uses two; 0: dense blocks.
    """

    batch: int = 8
    length: int = 256
    vocab_size: int = 264
    dim: int = 128
    hidden: int = 344
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 0
