"""What a mixture costs between devices, read from programs compiled for TPU slices, without a TPU."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from axrepro.aot.slices import devices, find_slice
from axrepro.core import Context, MeshShape, Rules, make_mesh
from axrepro.core.aux import objective
from axrepro.core.param import abstract_params
from axrepro.core.remat import rematerialised
from axrepro.core.sharding import named, param_partitions
from axrepro.nn import FeedForward, MoE
from axrepro.nn.moe import GATHER_REDUCE

pytest.importorskip("libtpu", reason="programs for TPUs need their compiler: pip install libtpu")

ROWS, LENGTH, DIM, HIDDEN, EXPERTS = 16, 160, 256, 384, 8  # capacity 40: all of them can be told by their size
CAPACITY = LENGTH * 2 // EXPERTS
WEIGHTS = 3
V5P, V6E = "v5p:2x2x2", "v6e:2x4"


pytestmark = pytest.mark.usefixtures("optimised")


@cache
def text(name: str, dispatch: str, dims=(1, 2, 4), gradient=True, remat="none", rules=Rules(), **changes) -> str:
    """The compiled program of a mixture's output, or of a loss and all gradients; dims of data, fsdp and expert."""
    mesh = make_mesh(MeshShape(**dict(zip(("data", "fsdp", "expert"), dims, strict=True))), devices(find_slice(name)))
    moe = MoE(expert=FeedForward(hidden=HIDDEN), num_experts=EXPERTS, dispatch=dispatch, **changes)
    ctx = Context(train=True, dtype="bfloat16", platform="tpu", mesh=mesh, rules=rules)
    sizes = dict(mesh.shape)
    x_spec = rules.spec(("batch", None, "embed_act"), (ROWS, LENGTH, DIM), sizes)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, DIM), jnp.bfloat16, sharding=NamedSharding(mesh, x_spec))
    specs = moe.specs(DIM)
    shardings = named(mesh, param_partitions(specs, rules, sizes))
    params = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), abstract_params(specs), shardings
    )
    layer = rematerialised(lambda params, x: moe.apply(params, x, ctx), remat, False)

    def loss(params, x):
        y, aux = layer(params, x)
        return jnp.square(y.astype(jnp.float32)).mean() + objective(aux)

    run = jax.value_and_grad(loss, argnums=(0, 1)) if gradient else lambda params, x: layer(params, x)[0]
    return jax.jit(run).lower(params, x).compile().as_text()


def shapes_of(program: str, kind: str) -> list[tuple[int, ...]]:
    """The result of every collective of a kind."""
    found = re.findall(rf"= \(?[a-z]+\d+\[([\d,]*)\]\S* (?:.*\) )?{kind}(?:-start)?\(", program)
    return [tuple(map(int, dims.split(","))) for dims in found]


def count(program: str, kind: str) -> int:
    return len(shapes_of(program, kind))


def tensors(program: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays in a program, those inside fusions included."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"[a-z]+\d+\[(\d[\d,]*)\]", program)}


def has_one_hot_dispatch(program: str) -> bool:
    """Whether there is an array with a dimension of tokens and one of slots, and as many numbers as all its experts."""
    return any(LENGTH in t and CAPACITY in t and math.prod(t) >= LENGTH * CAPACITY * EXPERTS for t in tensors(program))


def gathers_weights_alone(program: str) -> bool:
    """Over `fsdp`: each of the experts' weights once in each pass at most; activations have another size."""
    found = shapes_of(program, "all-gather")
    return 0 < len(found) <= 2 * WEIGHTS and {math.prod(dims) for dims in found} == {EXPERTS // 4 * DIM * HIDDEN}


@pytest.mark.parametrize("name", [V5P, pytest.param(V6E, marks=pytest.mark.slow)])
def test_tokens_change_places_twice_forward_and_twice_backward(name):
    program = text(name, "einsum")
    assert count(program, "all-to-all") == 4
    # nothing is gathered over `expert`
    assert gathers_weights_alone(program)
    assert has_one_hot_dispatch(program)


@pytest.mark.slow
def test_half_of_the_exchanges_belong_to_the_forward_pass():
    assert count(text(V5P, "einsum", gradient=False), "all-to-all") == 2
    assert count(text(V5P, "dropless", gradient=False), "ragged-all-to-all") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("dispatch", "exchange"), [("einsum", "all-to-all"), ("dropless", "ragged-all-to-all")])
def test_recomputing_a_block_repeats_the_exchanges_unless_they_are_kept(dispatch, exchange):
    # the output of the last exchange is needed again for the gradient of the gates
    assert count(text(V5P, dispatch, remat="full"), exchange) == 6
    assert count(text(V5P, dispatch, remat="save:moe_in,moe_out,moe_routing"), exchange) == 4


@pytest.mark.parametrize("dispatch", ["einsum", pytest.param("dropless", marks=pytest.mark.slow)])
def test_without_an_expert_axis_nothing_is_exchanged(dispatch):
    program = text(V5P, dispatch, dims=(1, 8, 1))
    assert count(program, "all-to-all") + count(program, "ragged-all-to-all") == 0


@pytest.mark.parametrize("name", [V6E, pytest.param(V5P, marks=pytest.mark.slow)])
def test_dropless_rows_travel_twice_forward_and_twice_backward_and_are_never_one_hot(name):
    program = text(name, "dropless")
    assert count(program, "ragged-all-to-all") == 4
    assert count(program, "all-to-all") == 0
    assert gathers_weights_alone(program)
    assert not has_one_hot_dispatch(program)


@pytest.mark.slow
def test_rows_by_index_cost_the_same_exchanges():
    program = text(V5P, "gather")
    assert count(program, "all-to-all") == 4
    assert gathers_weights_alone(program)


def test_the_released_partition_gathers_tokens_and_scatters_sums_of_outputs():
    program = text(V5P, "einsum", rules=Rules().replace(**GATHER_REDUCE))
    assert count(program, "all-to-all") == 0
    tokens = ROWS * LENGTH * DIM // 2  # of the devices that share `expert`
    gathered = [dims for dims in shapes_of(program, "all-gather") if math.prod(dims) == tokens]
    # this compiler's name for a reduce-scatter
    scattered = re.findall(r"%all-reduce-scatter\S* \(.*\) -> \w+\[([\d,]*)\]", program)
    scattered = [dims for dims in scattered if math.prod(map(int, dims.split(","))) == tokens // 4]
    # tokens in, outputs out, and the same backward
    assert (len(gathered), len(scattered)) == (2, 2)
