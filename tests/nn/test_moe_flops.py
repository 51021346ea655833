"""The FLOPs of a compiled mixture are those of its formulas."""

import jax
import jax.numpy as jnp
import pytest

from axrepro.aot.program import read
from axrepro.core import Context
from axrepro.core.param import abstract_params
from axrepro.nn import FeedForward, MoE, TopK

ROWS, LENGTH, DIM, HIDDEN = 4, 128, 64, 160
TOKENS = ROWS * LENGTH


def compiled_flops(moe: MoE) -> int:
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, DIM), jnp.float32)
    run = jax.jit(lambda params, x: moe.apply(params, x, Context(train=True)))
    return read(run.lower(abstract_params(moe.specs(DIM)), x).compile().as_text()).flops()


@pytest.mark.parametrize(
    ("experts", "factor", "size", "k"),
    [(8, 2.0, 32, 2), (4, 2.0, 32, 2), (16, 2.0, 32, 2), (8, 1.1, 32, 2), (8, 4.0, 32, 2), (8, 2.0, 16, 2),
     (8, 2.0, 256, 2), (8, 2.0, 32, 1), (16, 0.1, 32, 3)],
)  # fmt: skip
def test_flops_with_one_hot_dispatch_over_experts_capacity_and_group_size(experts, factor, size, k):
    moe = MoE(
        expert=FeedForward(hidden=HIDDEN),
        num_experts=experts,
        router=TopK(k=k),
        capacity_factor=factor,
        group_size=size,
        dispatch="einsum",
    )
    slots = TOKENS // size * experts * max(1, int(size * factor / experts))  # N E C
    router = 2 * TOKENS * DIM * experts
    one_hot = 4 * slots * size * k if k > 1 else 0  # places and weights, each a sum over the choices
    there_and_back = 4 * slots * size * DIM
    swiglu = 6 * slots * DIM * HIDDEN
    assert compiled_flops(moe) == router + one_hot + there_and_back + swiglu
