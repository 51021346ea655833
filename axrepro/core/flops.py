"""Train FLOPs, and the speeds that follow from them: the one formula behind every such figure.

Counted are matrix products, 2 FLOPs per multiply-add: of a token with every weight that it uses (`Param.matmul`,
`Param.active`), and of attention. The backward pass has twice those of the forward pass. Not counted: what
rematerialisation computes again, elementwise work, lookups, and the moving of tokens to experts. Tokens that an expert
dropped count as if it had taken them, padding counts as tokens, and packed documents as one.

Attention is counted in two ways, which projects use without saying which; compare like with like. With heads H, head
dim K and S keys a row, a query costs 2 * 2 H K FLOPs per key, and has S keys ("full", the whole matrix) or S/2
("causal"; the mask lets (S + 1)/2 through). Of a window of W keys it sees W (1 - W / 2S).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from axrepro.core.param import matmul_flops


@dataclass(frozen=True)
class Flops:
    """Train FLOPs of one step: forward and backward, nothing recomputed.

    Attributes:
      causal: with the part of the attention matrices that the masks let through.
      full: with whole attention matrices, as some projects count.
    """

    causal: float
    full: float


def train_flops(specs: Mapping, tokens: int, attention: Callable[[bool], float] = lambda full: 0.0) -> Flops:
    """Train FLOPs of this many tokens.

    Args:
      specs: all parameters.
      attention: forward FLOPs per token of products between activations, in full (True) or as masked.
    """
    weights = matmul_flops(specs)
    causal, full = (3 * tokens * (weights + attention(full)) for full in (False, True))
    return Flops(causal=causal, full=full)


def speeds(flops: Flops, seconds: float, num_devices: int, peak: float | None) -> dict[str, float]:
    """What a step of so many seconds amounts to: the scalars that are logged.

    "tflops_per_device" and, where the peak is known, "mfu" (model FLOPs utilisation: the share of the peak, PaLM,
    arXiv:2204.02311, App. B) count attention as masked; "tflops_per_device_full" and "mfu_full" count it whole.

    Args:
      flops: of the step, all devices together.   peak: FLOP/s of one device.
    """
    rates = {"": flops.causal / seconds / num_devices, "_full": flops.full / seconds / num_devices}
    scalars = {f"tflops_per_device{name}": rate / 1e12 for name, rate in rates.items()}
    if peak is not None:
        scalars |= {f"mfu{name}": rate / peak for name, rate in rates.items()}
    return scalars
