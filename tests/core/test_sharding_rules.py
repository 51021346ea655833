"""The sharding table, mesh shapes and the layout of devices."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from axrepro.core import Context, MeshShape, Rules, make_mesh
from axrepro.core.param import linear, stack
from axrepro.core.sharding import named, param_partitions, shard_bytes
from axrepro.errors import UserError
from axrepro.nn import FeedForward, MoE

SIZES = {"data": 2, "fsdp": 4, "expert": 2, "model": 1}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (16, 32), P(("fsdp", "expert"))),  # trailing unsplit dimensions vanish
        (("mlp", "embed"), (32, 16), P(None, ("fsdp", "expert"))),
        (("embed", "mlp"), (4, 32), P("fsdp")),  # 4 / 8 is none: the optional axis stays away
        (("expert", "embed", "mlp"), (2, 16, 32), P("expert", "fsdp")),  # the expert axis is taken
        (("layers", "expert", "embed", "mlp"), (3, 2, 16, 32), P(None, "expert", "fsdp")),
        (("batch", "seq", "embed_act"), (16, 8, 4), P(("data", "fsdp", "expert"))),
        (("group_dispatched", "expert", None, "embed_act"), (8, 2, 5, 4), P(("data", "fsdp"), "expert")),
        ((None, None), (3, 5), P()),
        ((), (), P()),
    ],
)
def test_the_table_maps_logical_axes_to_mesh_axes(axes, shape, expected):
    assert Rules().spec(axes, shape, SIZES) == expected


def test_mesh_axes_of_one_device_split_nothing():
    assert Rules().spec(("batch", "embed"), (3, 5), {"data": 1, "fsdp": 1}) == P()
    assert Rules().spec(("batch",), (3,), {}) == P()


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embd",), (16,), "no sharding rule for the logical axis 'embd'; did you mean 'embed'"),
        (("embed", "embed"), (16, 16), "uses the mesh axis 'fsdp' twice"),
        (("embed",), (6,), r"'embed' of size 6 is no multiple of mesh axes fsdp = 4; change mesh\.fsdp"),
        (("batch",), (8,), r"'batch' of size 8 is no multiple of mesh axes data×fsdp×expert = 16"),
        (("batch", "expert"), (16, 2), "uses the mesh axis 'expert' twice"),
        (("expert",), (3,), r"'expert' of size 3 is no multiple of mesh axes expert = 2"),
    ],
)
def test_what_cannot_be_split_is_an_error_that_says_so(axes, shape, message):
    with pytest.raises(UserError, match=message):
        Rules().spec(axes, shape, SIZES)


def test_another_table_is_another_partition():
    rules = Rules().replace(embed=("model",), mlp=("fsdp",)).add(thing=("data",))
    assert rules.spec(("embed", "mlp"), (5, 32), SIZES) == P(None, "fsdp")
    assert rules.spec(("thing",), (2,), SIZES) == P("data")
    assert Rules().replace() == Rules()


def test_param_partitions_name_the_parameter_that_does_not_fit():
    moe = MoE(expert=FeedForward(hidden=8), num_experts=4)
    partitions = param_partitions(stack(moe.specs(16), 3, "layers"), Rules(), SIZES)
    assert partitions["experts"]["up"] == P(None, "expert", "fsdp")
    assert partitions["experts"]["down"] == P(None, "expert", None, "fsdp")
    assert partitions["router"]["weight"] == P()
    specs = {"layers": {"ffn": {"up": linear((6, 8), ("embed", "mlp"), fan_in=6)}}}
    with pytest.raises(UserError, match=r"parameter 'layers/ffn/up': .* change mesh\.fsdp"):
        param_partitions(specs, Rules(), SIZES)


def test_bytes_per_device_equal_those_of_a_real_shard():
    mesh = make_mesh(MeshShape(data=1, fsdp=4, expert=2))
    sizes = dict(mesh.shape)
    for axes, shape in [(("embed", "mlp"), (16, 3)), (("expert", "embed"), (2, 8)), ((None,), (5,))]:
        spec = Rules().spec(axes, shape, sizes)
        array = jax.device_put(np.zeros(shape, np.float32), named(mesh, spec))
        assert shard_bytes(shape, 4, spec, sizes) == array.addressable_shards[0].data.nbytes


@pytest.mark.parametrize(
    ("shape", "devices", "expected"),
    [
        (MeshShape(), 8, {"data": 8}),
        (MeshShape(data=1, fsdp=-1, expert=2), 8, {"fsdp": 4, "expert": 2}),
        (MeshShape(data=2, fsdp=2, expert=2), 8, {"data": 2, "fsdp": 2, "expert": 2}),
        (MeshShape(data=1), 1, {}),
        (MeshShape(stage=2, data=1, seq=2, model=-1), 12, {"stage": 2, "seq": 2, "model": 3}),
    ],
)
def test_mesh_sizes_multiply_to_the_devices(shape, devices, expected):
    full = {"stage": 1, "data": 1, "fsdp": 1, "expert": 1, "seq": 1, "model": 1} | expected
    assert shape.sizes(devices) == full
    assert list(shape.sizes(devices)) == list(full)


@pytest.mark.parametrize(
    ("shape", "devices", "message"),
    [
        (MeshShape(data=3), 8, "mesh data 3 needs 3 devices, but there are 8"),
        (MeshShape(fsdp=3), 8, "mesh data -1 × fsdp 3 needs a multiple of 3 devices, but there are 8"),
        (MeshShape(data=16), 8, "needs 16 devices, but there are 8"),
        (MeshShape(fsdp=-1), 8, "only one axis can be -1 .* not data and fsdp"),
        (MeshShape(expert=0), 8, r"mesh\.expert=0: an axis size is at least 1"),
        (MeshShape(expert=-2), 8, r"mesh\.expert=-2"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_would(shape, devices, message):
    with pytest.raises(UserError, match=message):
        shape.sizes(devices)


def test_make_mesh_uses_every_device_once():
    mesh = make_mesh(MeshShape(fsdp=2, expert=2))
    assert dict(mesh.shape) == {"stage": 1, "data": 2, "fsdp": 2, "expert": 2, "seq": 1, "model": 1}
    assert set(mesh.devices.ravel()) == set(jax.devices())
    assert make_mesh(MeshShape(), jax.devices()[:3]).size == 3


@dataclass(frozen=True)
class Chip:
    """What the layout asks of a device."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "chip"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        """Place in a slice of 2 x 2."""
        return self.id % 4 % 2, self.id % 4 // 2, 0


def test_the_data_axis_spans_the_slices_and_the_others_stay_inside(monkeypatch, unchecked):
    # the stand-ins are no jax devices, so the mesh around their grid is left out
    monkeypatch.setattr("axrepro.core.sharding.Mesh", lambda grid, names, axis_types: grid)
    chips = [Chip(id=i, slice_index=i // 4) for i in range(8)]
    grid = make_mesh(MeshShape(data=4, fsdp=2), chips).reshape(4, 2)
    slices = np.vectorize(lambda chip: chip.slice_index)(grid)
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])
    assert len(set(grid.ravel())) == 8
    with pytest.raises(UserError, match=r"mesh\.data=1 must be a multiple of the 2 slices"):
        make_mesh(MeshShape(data=1, fsdp=8), chips)


def test_hosts_of_gpus_are_no_slices_and_their_devices_stay_together(monkeypatch, unchecked):
    monkeypatch.setattr("axrepro.core.sharding.Mesh", lambda grid, names, axis_types: grid)
    gpus = [Chip(id=i, slice_index=i // 4, platform="gpu") for i in range(8)]  # XLA numbers hosts as slices
    grid = make_mesh(MeshShape(data=1, fsdp=4, expert=2), gpus).reshape(4, 2)
    np.testing.assert_array_equal(np.vectorize(lambda gpu: gpu.id)(grid), np.arange(8).reshape(4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Rules().replace(embed="fsdp"), r"embed='fsdp' must be a tuple of mesh axes, such as \('fsdp',\)"),
        (lambda: Rules().replace(embed=("fdsp",)), "'fdsp'; did you mean 'fsdp'"),
        (lambda: Rules().replace(embd=("fsdp",)), "'embd' to replace; did you mean 'embed'"),
        (lambda: Rules().add(mine=("modle",)), "'modle'; did you mean 'model'"),
    ],
)
def test_a_misspelt_rule_is_an_error_and_no_replicated_weight(change, message, unchecked):
    with pytest.raises(UserError, match=message):
        change()


def test_without_a_mesh_nothing_is_constrained_and_positions_count_up():
    x = jax.numpy.ones((2, 3))
    assert Context().shard(x, "batch", "seq") is x
    np.testing.assert_array_equal(Context().token_positions(2, 3), [[0, 1, 2], [0, 1, 2]])


def test_folding_gives_each_child_its_own_key():
    ctx = Context(key=jax.random.key(0))
    bits = lambda ctx: tuple(np.asarray(jax.random.key_data(ctx.key)))
    children = [ctx, ctx.fold("a"), ctx.fold("b"), ctx.fold(0), ctx.fold(1), ctx.fold("a").fold("b")]
    assert len({bits(child) for child in children}) == len(children)
    assert bits(ctx.fold("a")) == bits(Context(key=jax.random.key(0)).fold("a"))
    assert Context().fold("a").key is None
