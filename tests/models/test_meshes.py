"""One model on many meshes: the same numbers, and the collectives that the partition is meant to cost."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axrepro.core import Context, MeshShape, Rules, make_mesh
from axrepro.core.aux import objective
from axrepro.core.param import abstract_params
from axrepro.core.sharding import named, param_partitions
from axrepro.core.tree import map_tree
from axrepro.errors import UserError
from axrepro.kernels.attention import Mask
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM
from axrepro.nn import Attention, Block, FeedForward, MoE, Repeat, every

ROWS, LENGTH = 8, 24  # no parameter has a dimension of 24, so that activations can be told by it
VOCAB, DIM, HIDDEN = 40, 16, 32
AXES = ("data", "fsdp", "expert", "seq", "model")
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
SPLIT_HEADS = [
    ("dense", (1, 1, 1, 1, 2)),
    ("shared", (1, 2, 1, 1, 4)),
    ("moe", (1, 2, 2, 1, 2)),
    ("shared", (1, 1, 2, 1, 4)),
]


def method(kind: str) -> LanguageModel:
    """Two blocks. In "moe" capacity binds; "shared" and "window" have few key-value heads and a tied head."""
    ffn = FeedForward(hidden=HIDDEN)
    if kind == "moe":
        ffn = MoE(expert=ffn, num_experts=4, capacity_factor=1.0)
    few = kind in ("shared", "window")
    mask = Mask(window=5) if kind == "window" else Mask()
    attention = Attention(num_heads=4, num_kv_heads=2 if few else None, mask=mask)
    layers = Repeat(layer=Block(attention=attention, ffn=ffn), times=2)
    model = CausalLM(vocab_size=VOCAB, dim=DIM, layers=layers, tied=few)
    return LanguageModel(model=model, chunk=None if kind == "moe" else 8)


def random_params(kind: str) -> dict:
    rng = np.random.default_rng(1)
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.25, leaf.shape).astype(np.float32)
    return map_tree(draw, abstract_params(method(kind).specs()))


def batch() -> dict:
    rng = np.random.default_rng(0)
    place, lengths = np.arange(LENGTH)[None], rng.integers(5, LENGTH + 1, ROWS)[:, None]
    return {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH), np.int32),
        "targets": rng.integers(0, VOCAB, (ROWS, LENGTH), np.int32),
        "segment_ids": np.where(place < lengths, 1 + (place >= 4), 0).astype(np.int32),
        "positions": np.broadcast_to(np.where(place < 4, place, place - 4).astype(np.int32), (ROWS, LENGTH)),
    }


@cache
def program(kind: str, dims: tuple, gradient: bool = True, context_parallel: str = "gather"):
    """(compiled loss or value and gradient, shardings of params, sharding of the batch)."""
    mesh = make_mesh(MeshShape(**dict(zip(AXES, dims, strict=False))), jax.devices()[: math.prod(dims)])
    model, ctx = method(kind), Context(mesh=mesh, train=True, context_parallel=context_parallel)
    shardings = named(mesh, param_partitions(model.specs(), Rules(), dict(mesh.shape)))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"), "seq"))
    loss = lambda params, batch: objective(model.loss(params, batch, ctx))
    run = (
        jax.jit(jax.value_and_grad(loss), in_shardings=(shardings, rows), out_shardings=(None, shardings))
        if gradient
        else jax.jit(loss, in_shardings=(shardings, rows))
    )
    return run.lower(abstract_params(model.specs()), batch()).compile(), shardings, rows


@cache
def result(kind: str, dims: tuple, context_parallel: str = "gather"):
    run, shardings, rows = program(kind, dims, context_parallel=context_parallel)
    value, grads = run(jax.device_put(random_params(kind), shardings), jax.device_put(batch(), rows))
    return float(value), jax.device_get(grads)


@pytest.mark.parametrize(
    ("kind", "dims"), [(kind, dims) for kind in ("dense", "moe") for dims in MESHES[1:]] + SPLIT_HEADS, ids=str
)
def test_loss_and_gradients_are_those_of_one_device(kind, dims, assert_close):
    expected, expected_grads = result(kind, MESHES[0])
    value, grads = result(kind, dims)
    # float32 sums over rows in another order
    assert value == pytest.approx(expected, rel=1e-6)
    assert_close(grads, expected_grads, 2e-5)


def collectives(compiled, kinds="all-to-all|all-gather|reduce-scatter|collective-permute") -> list[tuple[str, str]]:
    """(kind, result shapes) of every collective of a compiled program."""
    pattern = rf"= (\S+|\([^)]*\)) ({kinds})(?:-start)?\("
    return [(kind, shape) for shape, kind in re.findall(pattern, compiled.as_text())]


def sizes(shapes: str) -> list[list[int]]:
    """The dimensions of each array in the text of a result."""
    return [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"[a-z]\d+\[([\d,]*)\]", shapes)]


def count(kind: str, found: list) -> int:
    return sum(1 for name, _ in found if name == kind)


@pytest.mark.parametrize("dims", MESHES[3:], ids=str)
def test_a_sparse_layer_costs_two_all_to_alls_and_two_more_in_its_backward_pass(dims):
    # one sparse layer in the body of the loop over layers
    assert count("all-to-all", collectives(program("moe", dims, gradient=False)[0])) == 2
    assert count("all-to-all", collectives(program("moe", dims)[0])) == 4


@pytest.mark.parametrize("dims", MESHES[:3], ids=str)
def test_without_an_expert_axis_there_is_no_all_to_all(dims):
    assert count("all-to-all", collectives(program("moe", dims)[0])) == 0


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_data_parallelism_alone_gathers_nothing(kind):
    assert collectives(program(kind, (8, 1, 1))[0]) == []


@pytest.mark.parametrize("dims", MESHES[1:], ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_activations_are_never_gathered(kind, dims):
    # weights are: a device that gathered activations would hold those of rows that other devices work on
    found = collectives(program(kind, dims)[0])
    sizes = [(name, re.findall(r"\d+", re.sub(r"\{[\d,]*\}", "", shape))) for name, shape in found]
    assert not [shape for (name, numbers), (_, shape) in zip(sizes, found, strict=True)
                if name == "all-gather" and str(LENGTH) in numbers]  # fmt: skip
    if dims != (8, 1, 1):
        assert count("all-gather", found) > 0


def test_heads_hidden_units_and_vocabulary_on_a_model_axis_gather_nothing_and_add_up_twice_a_block():
    run = program("dense", (1, 1, 1, 1, 2))[0]
    assert collectives(run) == []
    sums = [sizes(shapes) for _, shapes in collectives(run, "all-reduce")]
    activations = [found for found in sums if math.prod(found[0]) == ROWS * LENGTH * DIM]
    # one for the embedding; and for each of attention and feed-forward one forward and one backward (Megatron-LM,
    # arXiv:1909.08053, Fig. 3), the latter for all the products that share an input
    assert sorted(len(found) for found in activations) == [1, 1, 1, 2, 3]
    # neither logits nor the head come together: what else is summed has a value per position, or the width of one
    others = [dims for found in sums if found not in activations for dims in found]
    assert not [dims for dims in others if VOCAB in dims]
    assert max(math.prod(dims) for dims in others) <= ROWS * 8 * DIM


def test_with_fsdp_a_model_axis_gathers_weights_over_fsdp_alone():
    found = [dims for _, shapes in collectives(program("dense", (1, 2, 1, 1, 4))[0]) for dims in sizes(shapes)]
    # the largest weight, the table that is also the head, in four parts
    assert max(math.prod(dims) for dims in found) == VOCAB * DIM // 4


def test_gradients_lie_as_their_parameters_do():
    run, shardings, _ = program("moe", (2, 2, 2))
    _, grads = run.output_shardings
    same = jax.tree.map(
        lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), grads, shardings, abstract_params(method("moe").specs())
    )
    assert all(jax.tree.leaves(same))


def test_sizes_that_the_mesh_does_not_divide_are_an_error():
    mesh = make_mesh(MeshShape(data=2, expert=4))
    model = method("dense").model
    tokens = jnp.zeros((4, LENGTH), jnp.int32)
    apply = lambda params: model.apply(params, tokens, Context(mesh=mesh))
    with pytest.raises(UserError, match="'batch' of size 4 is no multiple of mesh axes data×expert = 8"):
        jax.eval_shape(apply, abstract_params(model.specs()))
    layers = every(model.layers, 2, lambda ffn: MoE(expert=ffn, num_experts=2))
    with pytest.raises(UserError, match=r"parameter '1/ffn/experts/up': .* 'expert' of size 2"):
        param_partitions(layers.specs(DIM), Rules(), dict(mesh.shape))
