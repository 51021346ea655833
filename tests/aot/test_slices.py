"""Slices are those that Google documents, and the compiler knows their devices."""

import math
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from axrepro.aot.slices import Slice, devices, find_slice, shapes
from axrepro.core import MeshShape, make_mesh
from axrepro.errors import UserError
from axrepro.train.hardware import CHIPS, chip_name, parse_topology

# docs.cloud.google.com/tpu/docs/v5p: topology, cores, chips, hosts
V5P_PAGE = [
    ("2x2x1", 8, 4, 1),
    ("2x2x2", 16, 8, 2),
    ("2x4x4", 64, 32, 8),
    ("4x4x4", 128, 64, 16),
    ("4x4x8", 256, 128, 32),
    ("4x8x8", 512, 256, 64),
    ("8x8x8", 1024, 512, 128),
    ("8x8x16", 2048, 1024, 256),
    ("8x16x16", 4096, 2048, 512),
    ("16x16x16", 8192, 4096, 1024),
    ("16x16x24", 12288, 6144, 1536),
]
# docs.cloud.google.com/tpu/docs/v5e, whose list v6e shares: topology, chips
SQUARES_PAGE = [
    ("1x1", 1),
    ("2x2", 4),
    ("2x4", 8),
    ("4x4", 16),
    ("4x8", 32),
    ("8x8", 64),
    ("8x16", 128),
    ("16x16", 256),
]
# of accelerator_to_spec_map.py in github.com/AI-Hypercomputer/maxtext, those which no table of the pages has
MAXTEXT = {
    "v4-32": "2x2x4", "v4-384": "4x4x12", "v4-1536": "8x8x12", "v4-4096": "8x16x16", "v5p-32": "2x2x4",
    "v5p-640": "4x4x20", "v5p-1152": "4x12x12", "v5p-1920": "4x12x20", "v5p-3072": "8x12x16", "v5p-3456": "12x12x12",
    "v5p-3968": "4x4x124", "v5p-4480": "4x20x28", "v5p-6272": "4x28x28", "v5p-7808": "4x4x244", "v5p-7680": "12x16x20",
    "v5p-8960": "8x20x28", "v5p-10368": "12x12x36", "v5p-11264": "8x16x44", "tpu7x-2": "1x1x1", "tpu7x-128": "4x4x4",
    "tpu7x-13824": "12x24x24", "tpu7x-17920": "16x20x28", "tpu7x-18432": "16x24x24",
}  # fmt: skip


def sizes(shape: str) -> tuple[int, ...]:
    return tuple(map(int, shape.split("x")))


@pytest.mark.parametrize(("shape", "cores", "chips", "hosts"), V5P_PAGE)
def test_v5p_slices_are_those_of_the_page(shape, cores, chips, hosts):
    found = find_slice(f"v5p-{cores}")
    assert found == find_slice(f"v5p:{shape}") == Slice(kind="v5p", shape=sizes(shape))
    assert (found.chips, found.devices) == (chips, chips)
    assert found.chips / CHIPS["v5p"].host_chips == hosts


@pytest.mark.parametrize("kind", ["v5e", "v6e"])
def test_square_slices_are_those_of_the_page(kind):
    assert [find_slice(f"{kind}-{chips}").shape for _, chips in SQUARES_PAGE] == [sizes(s) for s, _ in SQUARES_PAGE]
    assert shapes(kind) == tuple(sizes(shape) for shape, _ in SQUARES_PAGE)


@pytest.mark.parametrize(("name", "shape"), MAXTEXT.items())
def test_slices_that_the_pages_leave_out_have_the_shapes_of_other_projects(name, shape):
    assert find_slice(name).shape == sizes(shape)


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p-64", (False, False, False)),
        ("v5p-128", (True, True, True)),
        ("v4:4x8x16", (True, True, True)),
        ("v7x-64", (False, False, False)),
        ("v6e-64", (False, False)),
        ("v5e-128", (False, True)),
        ("v6e-256", (True, True)),
    ],
)
def test_axes_are_rings_in_whole_cubes_and_along_sixteen_chips(name, wraps):
    assert find_slice(name).wraps == wraps


def test_names_of_several_slices():
    assert find_slice("2xv6e-256") == find_slice("2×v6e:16x16") == Slice(kind="v6e", shape=(16, 16), slices=2)
    assert find_slice("2xv5p:4x4x8").devices == 2 * 128
    assert find_slice("3xtpu7x-128").devices == 3 * 64 * 2  # two devices a chip
    assert find_slice("v5litepod-16") == find_slice("v5e-16")


@pytest.mark.parametrize("kind", [kind for kind, chip in CHIPS.items() if chip.torus])
def test_shapes_are_ordered_distinct_and_no_larger_than_the_largest_slice(kind):
    there = shapes(kind)
    counts = [math.prod(shape) for shape in there]
    assert counts == sorted(counts)
    assert len(set(there)) == len(there)
    assert counts[-1] == CHIPS[kind].domain


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p-12", ["no v5p slice of 6 chips", "multiples of 4", "v5p-8 (2x2x1) and v5p-16 (2x2x2)"]),
        ("v5p-9088", ["4544 chips", "v5p-8960 (8x20x28) and v5p-9216 (12x16x24)"]),
        ("v5p-16384", ["8192 chips", "at most 6144", "the nearest are v5p-12288 (16x16x24)"]),
        ("v5p:8x4x4", ["8x4x4", "A<=B<=C", "v5p-256 (4x4x8)"]),
        ("v7x-10", ["5 chips", "v7x-8 (2x2x1) and v7x-16 (2x2x2)"]),
        ("v6e-24", ["24 chips", "2x4, 4x4", "v6e-16 (4x4) and v6e-32 (4x8)"]),
        ("v6e:16x16x1", ["v6e has 2 sizes"]),
        ("v9:2x2", ["v9:2x2", "KIND:SHAPE", "v5p"]),
        ("h100-8", ["v4, v5e, v5p, v6e, v7x, not of h100"]),
        ("cpu:2x4", ["cpu has no torus"]),
    ],
)
def test_a_slice_that_is_not_to_be_had_is_an_error_that_names_those_near(name, says):
    with pytest.raises(UserError) as error:
        find_slice(name)
    assert all(part in str(error.value) for part in says)
    assert "\n" not in str(error.value)


def test_without_the_compiler_the_error_tells_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as if it were not there
    with pytest.raises(UserError, match=r"pip install axrepro\[tpu\]"):
        devices(find_slice("v5p-8"))


@pytest.fixture
def compiler():
    pytest.importorskip("libtpu", reason="TPU devices need their compiler: pip install libtpu")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["v4-16", "v5e-1", "v5e-16", "v5p-1024", "v5p:4x8x16", "2xv6e-256", "2xv7x-128"])
def test_the_compiler_knows_the_devices(name):
    of = find_slice(name)
    found = devices(of)
    assert {chip_name(device.device_kind) for device in found} == {of.kind}
    assert len(found) == of.devices == parse_topology(name)[1]
    assert len({getattr(device, "slice_index", 0) for device in found}) == of.slices
    per_host = min(of.chips, CHIPS[of.kind].host_chips)
    assert len({device.process_index for device in found}) == of.slices * of.chips // per_host
    last = max(tuple(device.coords) for device in found)
    assert last == (*(size - 1 for size in of.shape), 0)[:3]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", [kind for kind, chip in CHIPS.items() if chip.torus])
def test_programs_compile_for_every_kind(kind):
    mesh = make_mesh(
        MeshShape(data=-1), devices(find_slice(f"{kind}:2x2x1" if CHIPS[kind].torus == 3 else f"{kind}:2x2"))
    )
    x = jax.ShapeDtypeStruct((16, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    assert jax.jit(lambda x: x @ x.T).lower(x).compile().cost_analysis()["flops"] > 0


@pytest.mark.usefixtures("compiler")
def test_what_the_compiler_refuses_is_an_error_of_one_line():
    with pytest.raises(UserError, match=r"the compiler refuses v5p:3x3x3: [^\n]*divisible[^\n]*$"):
        devices(Slice(kind="v5p", shape=(3, 3, 3)))


@pytest.mark.usefixtures("compiler")
def test_the_compiler_uses_the_rings():
    from jax.experimental.topologies import get_topology_desc

    def ways(found) -> list[str]:
        """In which the compiler copies a matrix to all chips, along two axes of a cube."""
        mesh = make_mesh(MeshShape(data=16, fsdp=4), found)
        split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=split)
        compiled = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile()
        return re.findall(r'"emitter":"(\w+)"', compiled.as_text())

    rings, grid = (ways(get_topology_desc("v5p:4x4x4", "tpu", wrap=(on,) * 3).devices) for on in (True, False))
    assert ways(devices(find_slice("v5p-128"))) == rings != grid
