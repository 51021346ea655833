"""Planted faults are found in compiled programs, with tensor and line; the same programs without them are clean."""

import inspect
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from axrepro.aot.lint import Finding, check
from axrepro.aot.program import read
from axrepro.aot.slices import devices, find_slice
from axrepro.core import MeshShape, Rules, make_mesh
from axrepro.nn.moe import GATHER_REDUCE
from axrepro.train.hardware import CHIPS

LAYERS, DIM, HIDDEN, EXPERTS = 4, 512, 1024, 8
BF16 = jnp.bfloat16


pytestmark = pytest.mark.usefixtures("optimised")


@cache
def mesh(platform: str, **sizes: int):
    if platform == "cpu":
        return make_mesh(MeshShape(data=1, **sizes), jax.devices()[:8])
    pytest.importorskip("libtpu", reason="programs for TPUs need their compiler: pip install libtpu")
    return make_mesh(MeshShape(data=1, **sizes), devices(find_slice("v5p:2x2x2")))


def findings(fn, on, rules=Rules(), **arguments) -> list[Finding]:
    """Of a program; an argument is (shape, dtype, partition) or that with a kind of memory."""
    shapes = {}
    for name, (shape, dtype, spec, *memory) in arguments.items():
        sharding = NamedSharding(on, spec, memory_kind=memory[0] if memory else None)
        shapes[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    program = read(jax.jit(fn).lower(**shapes).compile().as_text())
    return check(program, dict(on.shape), CHIPS["v5p"], rules)


def line(fn, text: str) -> str:
    """FILE:LINE of the line of a function that holds a text."""
    lines, first = inspect.getsourcelines(fn)
    (at,) = (number for number, one in enumerate(lines, first) if text in one)
    return f"tests/aot/test_step_lint.py:{at}"


def layers(w, batch):
    """As many products as there are layers."""

    def body(x, one):
        return jnp.tanh(x @ one), None

    return jax.lax.scan(body, batch, w)[0]


PLATFORMS = [pytest.param("cpu"), pytest.param("tpu")]
STACK, SQUARE = (LAYERS, DIM, DIM), ((4096, DIM), BF16, P("fsdp"))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("spec", "faulty"), [(P(), True), (P(None, "fsdp"), False)])
def test_a_weight_that_lies_whole_on_every_device(platform, spec, faulty):
    found = findings(layers, mesh(platform, fsdp=8), w=(STACK, BF16, spec), batch=SQUARE)
    found = [one for one in found if one.kind == "replicated"]
    expected = [("w", line(layers, "x @ one"), LAYERS * DIM * DIM * 2 * 7 / 8)] if faulty else []
    assert [(one.tensor, one.source, one.bytes) for one in found] == expected


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("faulty", [True, False])
def test_the_weights_of_all_layers_gathered_before_their_loop(platform, faulty):
    on = mesh(platform, fsdp=8)

    def program(w, batch):
        if faulty:
            w = jax.lax.with_sharding_constraint(w, NamedSharding(on, P()))
        return layers(w, batch)

    found = [one for one in findings(program, on, w=(STACK, BF16, P(None, "fsdp")), batch=SQUARE)]
    found = [one for one in found if one.kind == "stack-gathered"]
    assert [(one.tensor, one.source) for one in found] == ([("w", line(program, "constraint"))] if faulty else [])


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("fault", ["none", "constraint", "rules"])
def test_tokens_gathered_in_place_of_an_exchange(platform, fault):
    on = mesh(platform, expert=8)

    def program(w, batch):
        with jax.named_scope("experts"):
            x = jnp.tanh(batch)
            spec = P("expert") if fault == "none" else P()
            sent = jax.lax.with_sharding_constraint(x, NamedSharding(on, spec))
            y = jnp.einsum("etd,edf->etf", sent, w)
            return jax.lax.with_sharding_constraint(y, NamedSharding(on, P("expert")))

    rules = Rules().replace(**GATHER_REDUCE) if fault == "rules" else Rules()
    w, batch = ((EXPERTS, DIM, HIDDEN), BF16, P("expert")), ((EXPERTS, 512, DIM), BF16, P(None, "expert"))
    found = findings(program, on, rules, w=w, batch=batch)
    expected = [] if fault == "none" else [("tokens-gathered", "batch", line(program, "tanh"))]
    assert [(one.kind, one.tensor, one.source) for one in found] == expected
    assert all(("the rules ask for it" in one.text) == (fault == "rules") for one in found)


@pytest.mark.parametrize(("tokens", "faulty"), [(8 * 64, True), (8 * 4096, False)])
def test_collectives_that_their_loop_cannot_hide(tokens, faulty):
    batch = ((tokens, DIM), BF16, P("fsdp"))
    found = findings(layers, mesh("tpu", fsdp=8), w=(STACK, BF16, P(None, "fsdp")), batch=batch)
    expected = [("exposed", "w", line(layers, "x @ one"), LAYERS * DIM * DIM * 2 * 7 / 8)] if faulty else []
    assert [(one.kind, one.tensor, one.source, one.bytes) for one in found] == expected
    assert all("all-gather" in one.text and "fsdp (8 devices)" in one.text for one in found)


@pytest.mark.parametrize("before", [0, 400])
def test_a_transfer_from_the_host_that_nothing_hides(before):
    on = mesh("tpu", fsdp=8)

    def program(w, v, batch):
        x = jax.lax.fori_loop(0, before, lambda _, x: jnp.tanh(x @ v), batch)
        here = jax.device_put(w, NamedSharding(on, P(None, "fsdp"), memory_kind="device"))
        return x @ here

    square = ((1024, 1024), BF16, P())
    batch = ((2048, 1024), BF16, P())
    w = ((1024, 8 * 1024), BF16, P(None, "fsdp"), "pinned_host")
    found = [one for one in findings(program, on, w=w, v=square, batch=batch) if one.kind == "host-blocks"]
    assert [(one.tensor, one.source, one.bytes) for one in found] == (
        [] if before else [("w", line(program, "@ here"), 1024 * 1024 * 2)]
    )


@pytest.mark.parametrize(("sizes", "faulty"), [({"fsdp": 8}, True), ({"fsdp": 4, "expert": 2}, False)])
def test_a_reduce_scatter_that_the_compiler_writes_as_an_all_reduce(sizes, faulty):
    on = mesh("tpu", **sizes)

    def part(batch):
        return jnp.tanh(jax.lax.psum_scatter(batch.T @ batch, "fsdp", tiled=True))

    def program(batch):
        return jax.shard_map(part, mesh=on, in_specs=P("fsdp"), out_specs=P("fsdp"))(batch)

    found = findings(program, on, batch=((64, DIM), jnp.float32, P("fsdp")))
    expected = [("reduced-whole", line(part, "psum_scatter"), DIM * DIM * 4 * 2 * 7 / 8)] if faulty else []
    assert [(one.kind, one.source, one.bytes) for one in found] == expected
