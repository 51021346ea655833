"""Memory is what the compiler counts, at the moment that it names, and the buffers there are those known by hand."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from axrepro.aot.memory import Memory, read_memory
from axrepro.aot.slices import devices, find_slice
from axrepro.core import hlo
from axrepro.errors import UserError

F32 = 4


pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture
def tpu():
    pytest.importorskip("libtpu", reason="programs for TPUs need their compiler: pip install libtpu")
    return devices(find_slice("v5p-8"))[0]


def array(*shape: int, device=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=SingleDeviceSharding(device) if device else None)


def notes(folder: Path, name: str) -> str:
    return next(folder.glob(f"*after_optimizations-{name}.txt")).read_text()


def read(folder: Path) -> Memory:
    text = next(folder.glob("*after_optimizations.txt")).read_text()
    return read_memory(notes(folder, "buffer-assignment"), notes(folder, "live-range"), hlo.parse(text))


def compiled(folder: Path, fn, *args, donate=(), **options):
    """The program, and what is read of the notes on it."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True, **options}
    program = jax.jit(fn, donate_argnums=donate).lower(*args).compile(options)
    return program, read(folder)


def agree(program, memory: Memory) -> None:
    """With what the compiler says."""
    says = program.memory_analysis()
    assert memory.arguments == says.argument_size_in_bytes
    assert memory.outputs == says.output_size_in_bytes - says.alias_size_in_bytes
    assert memory.host == 0
    assert sum(one.bytes for one in memory.peak.buffers) == memory.peak.bytes == memory.total - memory.fragmentation


def temporaries(memory: Memory, least: int) -> list[tuple[str, str]]:
    """Shapes and origins of those of `least` bytes."""
    found = [one for one in memory.peak.buffers if one.kind == "temporary" and one.bytes >= least]
    return sorted((one.shape, one.op_name.removesuffix(":").rpartition("/")[2]) for one in found)


def test_results_in_place_of_donated_arguments_are_counted_once(tmp_path):
    step = lambda w, x: (w - x, x * w)
    for donate, new in (((), 2), ((0,), 1)):
        program, memory = compiled(tmp_path / str(new), step, array(1000), array(1000), donate=donate)
        agree(program, memory)
        addresses = 2 * 8  # of the two results
        assert (memory.arguments, memory.outputs) == (2 * 1000 * F32, new * 1000 * F32 + addresses)
        assert (memory.temporaries, memory.constants) == (0, 0)
        assert [one.kind for one in memory.peak.buffers][: 2 + new].count("output") == new
        assert {one.op_name for one in memory.peak.buffers if one.kind == "argument"} == {"w", "x"}


def loss(layer, w, x):
    """The mean of the squares of what 7 layers yield."""
    return jnp.square(jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]).mean()


def layer(x, w):
    return jnp.sin(jnp.tanh(x) @ w)


def test_a_loop_holds_what_it_stacks_and_rematerialisation_its_inputs_only(tmp_path):
    rows, dim, depth = 256, 64, 7
    w, x = array(depth, dim, dim), array(rows, dim)
    one = rows * dim * F32
    kept = {}
    for name, body in (("none", layer), ("full", jax.checkpoint(layer))):
        gradient = jax.grad(lambda w, x, body=body: loss(body, w, x))
        program, memory = compiled(tmp_path / name, gradient, w, x)
        agree(program, memory)
        assert memory.temporaries == program.memory_analysis().temp_size_in_bytes
        assert memory.arguments == (depth * dim**2 + rows * dim) * F32
        assert depth * dim**2 * F32 <= memory.outputs <= depth * dim**2 * F32 + 8
        kept[name] = [found for found in memory.peak.buffers if found.bytes == depth * one]
        assert {found.shape for found in kept[name]} == {f"f32[{depth},{rows},{dim}]"}
        assert {str(found.source).rpartition(":")[0] for found in kept[name]} <= {__file__}
        # beside the stacks: a few arrays of one layer
        assert 0 < memory.temporaries - len(kept[name]) * depth * one < 5 * one
        assert memory.fragmentation < 0.1 * memory.temporaries
    assert len(kept["full"]) == 1
    assert len(kept["none"]) > 1


def test_values_that_share_a_place_are_counted_once(tmp_path):
    size = 1000 * F32
    program, memory = compiled(
        tmp_path,
        lambda x: jax.lax.fori_loop(0, 9, lambda i, x: jnp.sort(jnp.cos(x)) + 1, x),
        array(1000),
    )
    agree(program, memory)
    # the carry, which is the result, and at most two at a time in the body
    assert memory.total < (1 + 1 + 2) * size + 200
    assert memory.peak.bytes >= (1 + 1) * size


def test_without_notes_there_is_an_error():
    with pytest.raises(UserError, match="left no notes"):
        read_memory("", "", hlo.Module({}, {}, "", {}))


NOTES = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}:
 value: <1 p @0> (size=4096,offset=0): f32[1024]{0}
allocation 1: size 4096, color 5, parameter 1, shape |f32[1024]| at ShapeIndex {}:
 value: <2 h @5> (size=4096,offset=0): f32[1024]{0:S(5)}
allocation 2: size 4096, maybe-live-out:
 value: <3 a @0> (size=1024,offset=0): f32[256]{0}
 value: <4 r @0> (size=4096,offset=0): f32[1024]{0}
allocation 3: size 64, thread-local:
 value: <5 t @0> (size=64,offset=0): f32[16]{0}
allocation 4: size 10240, preallocated-temp:
 value: <6 a{0} @0> (size=4096,offset=0): f32[1024]{0}
 value: <7 b @0> (size=4096,offset=0): f32[1024]{0}
 value: <8 c (phi) @0> (size=1024,offset=3072): f32[256]{0}
 value: <9 d{1} (phi) @0> (size=2048,offset=8192): f32[512]{0}
allocation 5: size 512, color 1, preallocated-temp:
 value: <10 v @1> (size=512,offset=0): f32[128]{0:S(1)}
"""
RANGES = """HloLiveRange (max 6):
  InstructionSequence:
    0:p
    1:a
    2:b
    3:c
    4:d
    5:r
  BufferLiveRange:
    p{}:0-6
    h{}:0-6
    a{}:1-2
    a{0}:1-3
    b{}:3-4
    c{}:4-4
    d{1}:4-5
    r{}:5-6
    v{}:1-2
"""


def test_memories_and_moments_are_told_apart():
    parameters = "".join(f"  %{name} = f32[1024] parameter({place})\n" for place, name in enumerate("ph"))
    module = hlo.parse(f"HloModule m\n\nENTRY %e (p: f32[1024]) -> f32[1024] {{\n{parameters}}}\n")
    memory = read_memory(NOTES, RANGES, module)
    assert (memory.arguments, memory.outputs, memory.constants, memory.temporaries) == (4096, 4096, 0, 10240)
    assert (memory.host, memory.total) == (4096, 4096 + 4096 + 10240)
    assert memory.peak.at == "d"  # b with c inside of it, and d
    assert memory.peak.bytes == 4096 + 4096 + 4096 + 2048
    assert memory.fragmentation == 10240 - 4096 - 2048
    assert [(one.bytes, one.kind, one.shape) for one in memory.peak.buffers] == [
        (4096, "argument", "f32[1024]"),
        (4096, "output", "f32[1024]"),
        (4096, "temporary", "f32[1024]"),
        (2048, "temporary", "f32[512]"),
    ]


def test_a_tpu_program_needs_what_the_compiler_says_where_it_refuses_it(tmp_path, tpu):
    def step(w, x):
        value, gradient = jax.value_and_grad(lambda w: loss(layer, w, x))(w)
        return w - gradient, value

    given = array(7, 256, 256, device=tpu), array(2048, 256, device=tpu)
    program, memory = compiled(tmp_path / "fits", step, *given, donate=0)
    agree(program, memory)
    assert memory.peak.bytes == pytest.approx(program.memory_analysis().peak_memory_in_bytes, abs=2**13)
    assert 0 <= memory.fragmentation < 0.1 * memory.temporaries
    assert memory.peak.buffers[0].shape in ("f32[7,2048,256]", "bf16[7,2048,256]")
    assert memory.peak.buffers[0].op_name.startswith("jit(step)/jvp()/while/body")
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        compiled(tmp_path / "not", step, *given, donate=0, xla_tpu_max_hbm_size_mib=memory.total // 2**20)
    needed = re.search(r"temporaries \(([\d.]+)M\) exceeds", str(error.value))
    assert read(tmp_path / "not").total / 2**20 == pytest.approx(float(needed[1]), abs=0.01)
