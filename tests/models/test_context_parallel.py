"""Sequences split over devices: the same numbers, and no more of a sequence on a device than its attention needs."""

import math

import pytest
from test_meshes import DIM, HIDDEN, LENGTH, ROWS, collectives, program, result, sizes

SPLIT = [
    ("dense", (1, 1, 1, 2), "gather"),
    ("window", (1, 1, 1, 8), "gather"),
    ("shared", (1, 2, 1, 2, 2), "gather"),
    ("moe", (1, 2, 2, 2), "gather"),
    ("shared", (1, 1, 1, 4, 2), "ring"),
    ("window", (1, 1, 1, 8), "ring"),
    ("moe", (1, 1, 2, 2, 2), "ring"),
]


@pytest.mark.parametrize(("kind", "dims", "context_parallel"), SPLIT, ids=str)
def test_loss_and_gradients_are_those_of_one_device(kind, dims, context_parallel, assert_close):
    expected, expected_grads = result(kind, (1, 1, 1))
    value, grads = result(kind, dims, context_parallel)
    # float32 sums over tokens in another order
    assert value == pytest.approx(expected, rel=1e-6)
    assert_close(grads, expected_grads, 2e-5)


def test_gathering_moves_keys_and_values_alone_and_scatters_their_gradients():
    found = collectives(program("window", (1, 1, 1, 8))[0])
    whole, part = [ROWS, LENGTH, 2, 4], [ROWS, LENGTH // 8, 2, 4]  # two key-value heads of width four
    moved = sorted((kind, *sizes(shape)) for kind, shape in found if "s32" not in shape)
    assert moved == [("all-gather", whole)] * 2 + [("reduce-scatter", part)] * 2
    # and the segments of the keys, once for all layers
    assert [(kind, *sizes(shape)) for kind, shape in found if "s32" in shape] == [("all-gather", [ROWS, LENGTH])]


def test_a_ring_passes_parts_and_no_activation_of_the_whole_length_exists():
    run = program("window", (1, 1, 1, 8), context_parallel="ring")[0]
    assert {kind for kind, _ in collectives(run)} == {"collective-permute"}
    found = sizes(run.as_text())
    assert [ROWS, LENGTH // 8, HIDDEN] in found
    # less than the width of all tokens, and far less than the logits of all pairs
    assert max(math.prod(dims) for dims in found) < ROWS * LENGTH * DIM < ROWS * LENGTH * LENGTH
