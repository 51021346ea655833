"""A compiled program does what its text is read to do: FLOPs, trips and collectives against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from axrepro.aot.collectives import decode_groups
from axrepro.aot.program import Program, read
from axrepro.aot.slices import devices, find_slice
from axrepro.core import Context, MeshShape, Rules, make_mesh
from axrepro.core.param import abstract_params
from axrepro.core.sharding import named, param_partitions
from axrepro.errors import UserError
from axrepro.nn import FeedForward, MoE

F32, BF16 = jnp.float32, jnp.bfloat16


def compiled(fn, *args) -> Program:
    """Arguments are shapes, (shape, dtype) or arrays."""
    return read(jax.jit(fn).lower(*args).compile().as_text())


def array(*shape: int, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


# FLOPs and loops


def test_products_of_a_chain_count_two_flops_per_multiply_add():
    program = compiled(lambda x, a, b: jnp.tanh(x @ a) @ b, array(3, 5), array(5, 7), array(7, 11))
    assert program.flops() == 2 * 3 * 5 * 7 + 2 * 3 * 7 * 11


def test_attention_forward_and_backward():
    def loss(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.square(jnp.einsum("bhts,bshd->bthd", weights, v)).sum()

    batch, length, keys, heads, dim = 2, 5, 6, 3, 4
    q, kv = array(batch, length, heads, dim), array(batch, keys, heads, dim)
    program = compiled(jax.grad(loss, argnums=(0, 1, 2)), q, kv, kv)
    assert program.flops() == 6 * 2 * batch * heads * length * keys * dim


def test_bytes_are_those_that_xla_counts_where_nothing_loops():
    def program(x, w, at):
        narrow = (jnp.tanh(x @ w) @ jax.lax.dynamic_slice_in_dim(w, at, 8).T).astype(BF16)
        return jax.lax.dynamic_update_slice_in_dim(narrow, narrow[:4].astype(F32).astype(BF16) + 1, at, 0)

    step = jax.jit(program).lower(array(16, 32), array(32, 8), array(dtype=jnp.int32)).compile()
    assert read(step.as_text()).bytes() == step.cost_analysis()["bytes accessed"]


def layers(w, x):
    """The mean of the squares of what 7 layers of two products each yield, recomputed in the backward pass."""

    def layer(x, w):
        return jnp.tanh(x @ w[0]) @ w[1], None

    return jnp.square(jax.lax.scan(jax.checkpoint(layer), x, w)[0]).mean()


def test_a_scan_counts_per_trip_and_knows_what_is_recomputed():
    w = (array(7, 8, 16), array(7, 16, 8))
    program = compiled(jax.grad(layers), w, array(4, 8))
    one = 2 * 4 * 8 * 16
    assert [(loop.trips, loop.entered) for loop in program.loops] == [(7, 1), (7, 1)]
    # forward 2; backward 4, and the first again: of the second only its input is needed
    assert program.flops() == 7 * (2 + 4 + 1) * one
    assert program.recomputed() == 7 * one
    assert all(one.certain for one in program.instructions)


def test_nested_loops_multiply_and_a_count_that_depends_on_data_is_not_guessed():
    def program(x, n):
        inner = lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ x, x)
        x = jax.lax.fori_loop(2, 7, lambda i, x: inner(x), x)
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ x), (0, x))[1]

    program = compiled(program, array(8, 8), array(dtype=jnp.int32))
    assert [(loop.trips, loop.entered) for loop in program.loops] == [(5, 1), (3, 5), (None, 1)]
    assert program.flops() == (15 + 1) * 2 * 8**3
    assert {one.certain for one in program.instructions if one.flops and one.trips == 15} == {True}
    assert {one.certain for one in program.instructions if one.flops and one.trips == 1} == {False}


def test_a_conditional_counts_its_largest_branch():
    program = compiled(
        lambda n, x: jax.lax.switch(n, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x),
        array(dtype=jnp.int32),
        array(8, 8),
    )
    assert program.flops() == 2 * 2 * 8**3


def pairs(size, taps, stride, before, after, lhs_dilate, rhs_dilate) -> int:
    """How often a tap of a window meets an element, in one dimension, by sliding it over the padded input."""
    cells = [False] * before + [place % lhs_dilate == 0 for place in range((size - 1) * lhs_dilate + 1)]
    cells += [False] * after
    reach = (taps - 1) * rhs_dilate
    return sum(cells[start + tap * rhs_dilate] for start in range(0, len(cells) - reach, stride) for tap in range(taps))


@pytest.mark.parametrize(
    ("stride", "padding", "lhs_dilate", "rhs_dilate", "groups"),
    [(1, (0, 0), 1, 1, 1), (2, (1, 2), 1, 1, 1), (1, (2, 1), 3, 1, 1), (2, (3, 2), 3, 2, 1), (3, (4, 0), 2, 2, 2)],
)
def test_convolutions_count_taps_on_elements_only(stride, padding, lhs_dilate, rhs_dilate, groups):
    def program(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, 1), [padding, (0, 1)], (lhs_dilate, 1), (rhs_dilate, 2), ("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    batch, height, width, features, out = 2, 7, 6, 4, 6
    program = compiled(program, array(batch, height, width, features), array(3, 2, features // groups, out))
    meetings = pairs(height, 3, stride, *padding, lhs_dilate, rhs_dilate) * pairs(width, 2, 1, 0, 1, 1, 2)
    assert program.flops() == 2 * batch * out * (features // groups) * meetings


@pytest.mark.parametrize(
    ("out", "lhs", "rhs", "window", "labels", "flops"),
    [  # products as TPUs compute them, with more dimensions than two on either side, or batches of products
        ("4,32,16,8,1", "4,32,2,8,1", "2,8,16,8,1", "{size=1x16x2 pad=0_0x15_15x0_0 rhs_reversal=0x1x0}",
         "0b2f1_2i1o0->0b1f2", 2 * 4 * 32 * 16 * 8 * 2 * 8),
        ("2,4,24,40", "2,4,24,8", "2,4,8,40", "{size=2x4 stride=1x3 lhs_dilate=2x4}",
         "01bf_01io->01bf", 2 * 2 * 4 * 24 * 8 * 40),
        ("2,4,24,40", "2,4,24,8", "2,4,8,40", "{size=2x4 stride=2x4 pad=1_1x3_3 lhs_dilate=1x3 rhs_reversal=1x1}",
         "01bf_01io->01bf", 2 * 2 * 4 * 24 * 8 * 40),
    ],
)  # fmt: skip
def test_products_written_as_convolutions_count_as_products(out, lhs, rhs, window, labels, flops):
    text = f"""HloModule m

ENTRY %e (a: bf16[{lhs}], b: bf16[{rhs}]) -> bf16[{out}] {{
  %a = bf16[{lhs}] parameter(0)
  %b = bf16[{rhs}] parameter(1)
  ROOT %c = bf16[{out}] convolution(%a, %b), window={window}, dim_labels={labels}
}}
"""
    assert read(text).flops() == flops


# collectives


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshShape(data=1, fsdp=4, expert=2), jax.devices())


def sizes(mesh) -> dict[str, int]:
    return dict(mesh.shape)


def placed(mesh, spec: tuple, *shape: int):
    return jax.ShapeDtypeStruct(shape, F32, sharding=NamedSharding(mesh, P(*spec)))


def told(collectives) -> set[tuple]:
    return {(c.kind, c.axes, c.size, c.bytes, c.trips) for c in collectives}


def test_collectives_name_their_axes_bytes_and_trips(mesh):
    both = ("fsdp", "expert")

    def program(x, w):  # 16 x 8 of x and 8 x 4 of w on each device
        def layer(x, _):
            whole = jax.lax.all_gather(w, "fsdp", axis=1, tiled=True)  # 8 x 16
            y = jax.lax.all_to_all((x @ whole).reshape(2, 8, 16), "expert", 0, 0).reshape(16, 16)
            y = jax.lax.ppermute(y, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
            y = jax.lax.psum_scatter(y, "fsdp", scatter_dimension=0, tiled=True)  # 4 x 16
            return x + jax.lax.psum(y, both).sum(), None

        return jax.lax.scan(layer, x, None, length=5)[0]

    run = jax.shard_map(
        program, mesh=mesh, in_specs=(P(both), P(None, "fsdp")), out_specs=P(both), check_vma=False
    )  # fmt: skip
    program = compiled(run, placed(mesh, (both,), 128, 8), placed(mesh, (None, "fsdp"), 8, 16))
    found = program.collectives(sizes(mesh))
    gather = {one for one in told(found) if one[0] == "all-gather"}
    assert {one[:4] for one in gather} == {("all-gather", ("fsdp",), 4, 8 * 16 * 4)}
    assert told(found) - gather == {
        ("all-to-all", ("expert",), 2, 16 * 16 * 4, 5),
        ("collective-permute", ("fsdp",), 2, 16 * 16 * 4, 5),
        ("reduce-scatter", ("fsdp",), 4, 16 * 16 * 4, 5),
        ("all-reduce", both, 8, 4 * 16 * 4, 5),
    }
    by_kind = {c.kind: c for c in found}
    assert by_kind["all-gather"].sent == 8 * 16 * 4 * 3 / 4
    assert by_kind["all-reduce"].sent == 2 * 4 * 16 * 4 * 7 / 8
    assert by_kind["reduce-scatter"].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert str(by_kind["all-to-all"].source).startswith(__file__)
    with pytest.raises(UserError, match="compiled for 8 devices"):
        program.collectives({"data": 4})


def test_weights_split_over_fsdp_are_gathered_in_every_trip_of_the_forward_and_of_the_backward_pass(mesh):
    both = ("fsdp", "expert")
    w = (placed(mesh, (None, "fsdp"), 7, 64, 128), placed(mesh, (None, None, "fsdp"), 7, 128, 64))
    x = placed(mesh, (both,), 32, 64)

    def loss(w, x):
        layer = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w[0]) @ w[1], x_sharding), None)
        x_sharding = NamedSharding(mesh, P(both))
        return jnp.square(jax.lax.scan(jax.checkpoint(layer), x, w)[0]).mean()

    program = compiled(jax.grad(loss), w, x)
    whole = 64 * 128 * 4
    gathers = [c for c in program.collectives(sizes(mesh)) if c.kind == "all-gather" and c.trips == 7]
    assert {(c.axes, c.size, c.bytes) for c in gathers} == {(("fsdp",), 4, whole)}
    assert len(gathers) in (4, 5)  # two forward; two backward, and the first again for what is recomputed
    assert program.flops() == 7 * 7 * 2 * 4 * 64 * 128


def test_a_mixture_exchanges_tokens_over_expert_and_gathers_weights_over_fsdp():
    mesh, rules = make_mesh(MeshShape(data=1, fsdp=2, expert=4), jax.devices()), Rules()
    rows, length, dim, hidden, experts = 16, 16, 24, 32, 8
    moe = MoE(expert=FeedForward(hidden=hidden), num_experts=experts, dispatch="einsum")
    ctx = Context(train=True, dtype="float32", platform="cpu", mesh=mesh, rules=rules)
    shardings = named(mesh, param_partitions(moe.specs(dim), rules, sizes(mesh)))
    params = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), abstract_params(moe.specs(dim)), shardings
    )
    x = placed(mesh, (("fsdp", "expert"),), rows, length, dim)
    program = compiled(lambda params, x: moe.apply(params, x, ctx)[0], params, x)
    slots = rows // 8 * experts * (length * 2 // experts)  # of one device's tokens, each of which takes two
    found = [(c.kind, c.axes, c.bytes) for c in program.collectives(sizes(mesh))]
    assert found.count(("all-to-all", ("expert",), slots * dim * 4)) == 2
    assert found.count(("all-gather", ("fsdp",), experts // 4 * dim * hidden * 4)) == 3
    assert len(found) == 5


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=4,'b'=1,'c'=2] {'a'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4], device_ids=([8]<=[4,2]T(1,0)) {'a'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
    ],
)
def test_groups_of_devices_in_all_their_forms(text, groups):
    assert decode_groups(text, 8) == groups


def test_an_unknown_form_of_groups_is_refused():
    with pytest.raises(UserError, match="unknown form"):
        decode_groups("ring(0..7)", 8)


# the forms of TPU programs, by hand

ASYNC = """HloModule step, is_scheduled=true, num_partitions=8

%gather_start (p: bf16[64,16]) -> (bf16[64,16], bf16[64,128], u32[]) {
  %p = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.0 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=8] {'x'}, dimensions={1}, metadata={op_name="f/gather"}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %begin = (bf16[64,16]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}

%step (p.1: bf16[64,16], p.2: bf16[64,128], p.3: u32[], p.4: bf16[32,64], p.5: bf16[64,32]) -> (bf16[32,32], bf16[64,16], bf16[64,128], u32[]) {
  %p.1 = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %p.3 = u32[]{:S(2)} parameter(2)
  %p.4 = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(3)
  %p.5 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(4)
  %product = bf16[32,32]{1,0:T(8,128)(2,1)} convolution(%p.4, %p.5), dim_labels=bf_io->bf, metadata={op_name="f/rematted_computation/dot"}
  %gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['x'=8] {'x'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"1","flag_end":"2"}}
  ROOT %out = (bf16[32,32]{1,0:T(8,128)(2,1)}, bf16[64,16]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) tuple(%product, %p.1, %gather.1, %p.3)
}

%gather_done (p.6: bf16[64,16], p.7: bf16[64,128], p.8: u32[]) -> bf16[64,128] {
  %p.6 = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %p.7 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %p.8 = u32[]{:S(2)} parameter(2)
  %gather.2 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.6), channel_id=7, replica_groups=mesh['x'=8] {'x'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"1","flag_end":"2"}}
  ROOT %end = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(%p.6, %p.7, %gather.2, %p.8), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[64,16], x: bf16[32,64], y: bf16[64,32]) -> (bf16[64,128], bf16[32,32]) {
  %w = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(1)
  %y = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(2)
  %started = (bf16[64,16]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%gather_start, backend_config={"aliasing_operands":{"lists":[{"indices":["0","1"]}]}}
  %g.0 = bf16[64,16]{1,0:T(8,128)(2,1)} get-tuple-element(%started), index=0
  %g.1 = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%started), index=1
  %g.2 = u32[]{:S(2)} get-tuple-element(%started), index=2
  %during = (bf16[32,32]{1,0:T(8,128)(2,1)}, bf16[64,16]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%g.0, %g.1, %g.2, %x, %y), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (2, {})}, calls=%step, backend_config={"window_config":{"estimated_cycles":"123"},"aliasing_operands":{"lists":[]}}
  %h.0 = bf16[64,16]{1,0:T(8,128)(2,1)} get-tuple-element(%during), index=1
  %h.1 = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%during), index=2
  %h.2 = u32[]{:S(2)} get-tuple-element(%during), index=3
  %h.3 = bf16[32,32]{1,0:T(8,128)(2,1)} get-tuple-element(%during), index=0
  %whole = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%h.0, %h.1, %h.2), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%gather_done
  ROOT %result = (bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[32,32]{1,0:T(8,128)(2,1)}) tuple(%whole, %h.3)
}
"""  # noqa: E501


def test_a_collective_inside_fusions_is_one_and_the_product_beside_it_hides_it():
    program = read(ASYNC)
    (gather,) = program.collectives({"data": 2, "fsdp": 4})
    assert (gather.kind, gather.name, gather.op_name) == ("all-gather", "started", "f/gather")
    assert (gather.bytes, gather.axes, gather.span.done.name) == (64 * 128 * 2, ("data", "fsdp"), "whole")
    assert [one.name for one in gather.span.between] == ["during"]
    assert gather.span.hidden_flops == program.flops() == program.recomputed() == 2 * 32 * 64 * 32
    # arrays of 64 x 32 and narrower are stored 128 wide; what is gathered is moved once, by the start
    tile = lambda rows: rows * 128 * 2
    assert {one.name: one.bytes for one in program.instructions} == {
        "started": tile(64) + tile(64),
        "during": tile(32) + tile(64) + tile(32),
        "whole": 0,
    }
    assert {one.name: one.cycles for one in program.instructions}["during"] == 123


LOOP = """HloModule step, is_scheduled=true, num_partitions=8

%add (p.0: f32[], p.1: f32[]) -> f32[] {
  %p.0 = f32[] parameter(0)
  %p.1 = f32[] parameter(1)
  ROOT %sum = f32[] add(%p.0, %p.1)
}

%all-reduce-scatter.3 (input: f32[64,128]) -> f32[16,128] {
  %input = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce = f32[64,128]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[16,128]{1,0:T(8,128)} dynamic-slice(%all-reduce, %zero, %zero), dynamic_slice_sizes={16,128}
}

%take (stack: f32[6,64,128], at: s32[]) -> f32[64,128] {
  %stack = f32[6,64,128]{2,1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)S(6)} parameter(1)
  %nil = s32[] constant(0)
  %one_layer = f32[1,64,128]{2,1,0:T(8,128)} dynamic-slice(%stack, %at, %nil, %nil), dynamic_slice_sizes={1,64,128}
  ROOT %flat = f32[64,128]{1,0:T(8,128)S(1)} bitcast(%one_layer)
}

%put (base: f32[6,16,128], row: f32[16,128], where: s32[]) -> f32[6,16,128] {
  %base = f32[6,16,128]{2,1,0:T(8,128)} parameter(0)
  %row = f32[16,128]{1,0:T(8,128)} parameter(1)
  %where = s32[]{:T(128)S(6)} parameter(2)
  %none = s32[] constant(0)
  %lifted = f32[1,16,128]{2,1,0:T(8,128)} bitcast(%row)
  ROOT %placed = f32[6,16,128]{2,1,0:T(8,128)} dynamic-update-slice(%base, %lifted, %where, %none, %none)
}

%next (i: s32[], by: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  %by = s32[] parameter(1)
  ROOT %i2 = s32[] add(%i, %by)
}

%body (state: (s32[], f32[6,64,128], f32[6,16,128], s32[])) -> (s32[], f32[6,64,128], f32[6,16,128], s32[]) {
  %state = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}, f32[6,16,128]{2,1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %s.0 = s32[]{:T(128)} get-tuple-element(%state), index=0
  %s.1 = f32[6,64,128]{2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %s.2 = f32[6,16,128]{2,1,0:T(8,128)} get-tuple-element(%state), index=2
  %s.3 = s32[]{:T(128)} get-tuple-element(%state), index=3
  %here = s32[]{:T(128)S(6)} copy(%s.0)
  %layer = f32[64,128]{1,0:T(8,128)S(1)} fusion(%s.1, %here), kind=kLoop, calls=%take
  %part = f32[16,128]{1,0:T(8,128)} fusion(%layer), kind=kCustom, calls=%all-reduce-scatter.3, metadata={op_name="f/grads"}
  %offload = (f32[16,128]{1,0:T(8,128)S(5)}, f32[16,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%part)
  %kept = f32[6,16,128]{2,1,0:T(8,128)} fusion(%s.2, %part, %here), kind=kLoop, calls=%put
  %away = f32[16,128]{1,0:T(8,128)S(5)} copy-done(%offload)
  %i3 = s32[]{:T(128)} fusion(%s.0, %s.3), kind=kLoop, calls=%next
  ROOT %states = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}, f32[6,16,128]{2,1,0:T(8,128)}, s32[]{:T(128)}) tuple(%i3, %s.1, %kept, %s.3)
}

%condition (state.1: (s32[], f32[6,64,128], f32[6,16,128], s32[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}, f32[6,16,128]{2,1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %c.0 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%c.0, %limit), direction=LT
}

ENTRY %main (stacked: f32[6,64,128]) -> f32[6,16,128] {
  %stacked = f32[6,64,128]{2,1,0:T(8,128)} parameter(0)
  %first = s32[]{:T(128)} constant(1)
  %stride = s32[]{:T(128)} constant(2)
  %begin = s32[]{:T(128)} copy(%first)
  %room = f32[6,16,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %states.0 = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}, f32[6,16,128]{2,1,0:T(8,128)}, s32[]{:T(128)}) tuple(%begin, %stacked, %room, %stride)
  %while = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}, f32[6,16,128]{2,1,0:T(8,128)}, s32[]{:T(128)}) while(%states.0), condition=%condition, body=%body
  ROOT %grads = f32[6,16,128]{2,1,0:T(8,128)} get-tuple-element(%while), index=2
}
"""  # noqa: E501
ROW = 128 * 4


def test_a_loop_without_a_stated_count_is_counted_by_its_counter():
    (loop,) = read(LOOP).loops
    assert loop.trips == 3  # 1, 3 and 5 are below 6
    assert read(LOOP.replace("direction=LT", "direction=NE")).loops[0].trips is None  # 7, 9, ... never meets 6
    assert read(LOOP.replace("constant(2)", "constant(5)")).loops[0].trips == 1
    assert read(LOOP.replace("constant(6)", "constant(100000)")).loops[0].trips == 50000
    never = read(LOOP.replace("constant(6)", "constant(1)"))
    assert (never.loops[0].trips, never.collectives({"fsdp": 8})) == (0, [])
    data = LOOP.replace("%first = s32[]{:T(128)} constant(1)", "%first = s32[]{:T(128)} parameter(1)")
    assert read(data).loops[0].trips is None


def test_the_fusion_that_reduces_and_keeps_a_part_is_a_reduce_scatter():
    (scatter,) = read(LOOP).collectives({"fsdp": 4, "expert": 2})
    assert (scatter.kind, scatter.name, scatter.op_name) == ("reduce-scatter", "part", "f/grads")
    assert (scatter.bytes, scatter.axes, scatter.size, scatter.trips) == (64 * ROW, ("fsdp",), 4, 3)
    assert not scatter.span.asynchronous


def test_slices_of_stacked_arrays_move_their_own_bytes_and_memories_are_told_apart():
    by_name = {one.name: one for one in read(LOOP).instructions}
    scalar = 128 * 4
    layer, kept = by_name["layer"], by_name["kept"]
    assert (layer.reads, layer.writes) == ({0: 64 * ROW, 6: scalar}, {1: 64 * ROW})
    assert (kept.reads, kept.writes) == ({0: 16 * ROW, 6: scalar}, {0: 16 * ROW})
    assert by_name["room"].bytes == 0


def test_copies_to_the_host_are_told_with_what_they_overlap():
    (transfer,) = read(LOOP).transfers()
    assert (transfer.to_host, transfer.from_host, transfer.trips) == (16 * ROW, 0, 3)
    assert transfer.span.asynchronous
    assert [one.name for one in transfer.span.between] == ["kept"]
    assert transfer.span.hidden_bytes == 2 * 16 * ROW


KERNELS = """HloModule step, is_scheduled=true, num_partitions=4

%exchange (p: bf16[32,128]) -> bf16[32,128] {
  %p = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %swap = bf16[32,128]{1,0:T(8,128)(2,1)} all-to-all(%p), replica_groups=[2,2]<=[4], dimensions={0}
}

ENTRY %main (x: bf16[32,128], w: bf16[4,128,256]) -> bf16[32,256] {
  %x = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[4,128,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = ((bf16[32,128]{1,0:T(8,128)(2,1)}), bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) async-start(%x), calls=%exchange, metadata={op_name="f/all_to_all"}
  %scores = f32[32,128]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"{\\"block\\": 128}"
}}, metadata={op_name="f/attention"}, backend_config={"custom_call_config":{"body":"TUzv"}}
  %done = bf16[32,128]{1,0:T(8,128)(2,1)} async-done(%start)
  %gather = (bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) all-gather-start(%done), replica_groups={{0,1},{2,3}}, dimensions={0}
  %gathered = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather-done(%gather)
  ROOT %experts = bf16[32,256]{1,0:T(8,128)(2,1)} custom-call(%done, %w), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"2097152","bytes_accessed":"1"}}}
}
"""  # noqa: E501


def test_kernels_count_what_they_state_and_the_silent_are_named():
    program = read(KERNELS)
    assert program.flops() == 2 * 32 * 128 * 256
    assert [one.name for one in program.instructions if one.opaque] == ["scores"]


def test_asynchronous_computations_and_pairs_of_start_and_done():
    exchange, gather = read(KERNELS).collectives({"data": 2, "expert": 2})
    assert (exchange.kind, exchange.bytes, exchange.axes) == ("all-to-all", 32 * 128 * 2, ("expert",))
    assert (exchange.span.asynchronous, [one.name for one in exchange.span.between]) == (True, ["scores"])
    assert (gather.kind, gather.bytes, gather.axes) == ("all-gather", 64 * 128 * 2, ("expert",))
    assert (gather.span.asynchronous, gather.span.between) == (True, ())


# a program for TPUs


def test_a_program_for_a_v5p_slice(optimised):
    pytest.importorskip("libtpu", reason="programs for TPUs need their compiler: pip install libtpu")
    mesh = make_mesh(MeshShape(data=1, fsdp=4, expert=2), devices(find_slice("v5p:2x2x2")))
    both = ("fsdp", "expert")
    shape = lambda spec, *dims: jax.ShapeDtypeStruct(dims, BF16, sharding=NamedSharding(mesh, P(*spec)))
    w = (shape((None, "fsdp"), 6, 512, 2048), shape((None, None, "fsdp"), 6, 2048, 512))

    def loss(w, x):
        def layer(x, w):
            hidden = jax.lax.with_sharding_constraint(jax.nn.relu(x @ w[0]), NamedSharding(mesh, P(both)))
            return hidden @ w[1], None

        return jnp.square(jax.lax.scan(jax.checkpoint(layer), x, w)[0].astype(F32)).mean()

    step = jax.jit(jax.value_and_grad(loss)).lower(w, shape((both,), 4096, 512)).compile()
    program = read(step.as_text())
    one = 2 * 512 * 512 * 2048
    assert [(loop.trips, loop.entered) for loop in program.loops] == [(6, 1), (6, 1)]
    assert program.flops() == 6 * 7 * one
    assert program.recomputed() == 6 * one
    assert sum(one.opaque for one in program.instructions) == 0
    found = program.collectives(dict(mesh.shape))
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {(c.axes, c.bytes, c.trips) for c in gathers} == {(("fsdp",), 512 * 2048 * 2, 6)}
    assert len(gathers) == 4
    reduced = sum(c.bytes * c.trips for c in found if c.kind in ("all-reduce", "reduce-scatter"))
    assert reduced == 6 * 2 * 512 * 2048 * 2 + 4  # the gradients of all layers, and the loss
    products = [one for one in program.instructions if one.flops]
    assert all(one.cycles for one in products)
