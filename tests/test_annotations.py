"""The shapes and types that axrepro's signatures state are checked at every call in these tests."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from axrepro.core import Context
from axrepro.kernels.attention import Mask, attention
from axrepro.losses.cross_entropy import softmax_cross_entropy
from axrepro.nn import FeedForward, Repeat


@pytest.mark.parametrize(
    "call",
    [
        lambda: softmax_cross_entropy(jnp.zeros((2, 3, 5)), jnp.zeros((3, 2), jnp.int32)),
        lambda: softmax_cross_entropy(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3))),
        lambda: attention(*[jnp.zeros((1, 4, 2, 8))] * 2, jnp.zeros((1, 5, 2, 8)), mask=Mask()),
        lambda: Repeat(layer=FeedForward(hidden=4), times="2"),
    ],
    ids=["shapes that disagree", "another dtype", "keys without values", "a field of another type"],
)
def test_what_contradicts_an_annotation_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()


def test_a_result_that_contradicts_its_annotation_is_refused():
    layer = FeedForward(hidden=4)
    params = {"up": jnp.zeros((3, 4)), "gate": jnp.zeros((3, 4)), "down": jnp.zeros((4, 2))}  # of another width
    with pytest.raises(TypeCheckError, match="return value"):
        layer.apply(params, jnp.zeros((1, 3)), Context())
