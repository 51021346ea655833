"""Step times of small programs against times worked out by hand, and of compiled ones by what must hold of any."""

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import jaxtyping
import pytest

from axrepro import registry
from axrepro.aot import network, program
from axrepro.aot.compile import Compiled, compile_step
from axrepro.aot.slices import Slice
from axrepro.aot.step_time import Efficiency, StepTime, _attention_flops, step_time
from axrepro.core.config import override, swap
from axrepro.kernels.attention import Mask
from axrepro.nn import Attention
from axrepro.nn.block import Repeat, Sequence
from axrepro.train.hardware import CHIPS

V5P = CHIPS["v5p"]
CUBE = Slice(kind="v5p", shape=(2, 2, 2))
SHARES = Efficiency(product=0.5, attention=0.25, memory=0.8, link=0.4, host=0.2, overlap=1.0)
RATE, MEMORY, HOST = V5P.tflops * 1e12 * 0.5, V5P.hbm_gbs * 1e9 * 0.8, (V5P.pcie_gbs or 0) * 1e9 * 0.2
LINK, NETWORK = V5P.link_gbs * 1e9 * 0.4, (V5P.dcn_gbs or 0) * 1e9 * 0.4
HOP = network.HOP / 0.4

WIDE = "bf16[4096,4096]{1,0:T(8,128)(2,1)}"
LOW = "bf16[8,4096]{1,0:T(8,128)(2,1)}"
FAST = "bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)}"
FAR = "bf16[4096,4096]{1,0:T(8,128)(2,1)S(5)}"
HALF = "bf16[2048,4096]{1,0:T(8,128)(2,1)}"
PRODUCT, BYTES = 2 * 4096**3 / RATE, 2 * 4096**2
PAIRS = {"fsdp": "{{0,4},{1,5},{2,6},{3,7}}", "expert": "{{0,2},{1,3},{4,6},{5,7}}"}  # along x, and along y
GATHER = BYTES / 2 / LINK + HOP
SUM = 2 * GATHER  # of as many bytes


def indented(lines: str) -> str:
    return "\n".join("  " + line.strip() for line in lines.strip().split("\n"))


def entry(lines: str, others: str = "", devices: int = 8) -> str:
    """A program of these instructions on `%x` and `%y`, of 4096 x 4096."""
    return f"""HloModule step, is_scheduled=true, num_partitions={devices}
{others}
ENTRY %main (x: bf16[4096,4096], y: bf16[4096,4096]) -> bf16[4096,4096] {{
  %x = {WIDE} parameter(0)
  %y = {WIDE} parameter(1)
{indented(lines)}
}}
"""


def product(name: str, left: str = "x", right: str = "y") -> str:
    return f"%{name} = {WIDE} convolution(%{left}, %{right}), dim_labels=bf_io->bf"


def gathered(name: str, axis: str = "fsdp", of: str = "h") -> tuple[str, str]:
    """Start and end."""
    pair = f"({HALF}, {WIDE})"
    start = f"%{name}.0 = {pair} all-gather-start(%{of}), replica_groups={PAIRS[axis]}, dimensions={{0}}"
    return start, f"%{name} = {WIDE} all-gather-done(%{name}.0)"


SHARD = f"%h = {HALF} bitcast(%x)"


def timed(text: str, efficiency: Efficiency = SHARES, slices: int = 1) -> StepTime:
    hardware = replace(CUBE, slices=slices)
    chips = itertools.product(range(slices), range(2), range(2), range(2))
    compiled = Compiled(
        text=text,
        buffers="",
        live_ranges="",
        mesh={"data": slices, "fsdp": 2, "expert": 2, "model": 2},
        places=tuple(chips),
        capacity=None,
        seconds=0.0,
    )
    return sound(step_time(program.read(text), compiled, hardware, efficiency))


def sound(found: StepTime) -> StepTime:
    """What holds of every forecast."""
    assert found.seconds == found.passes[found.entry].seconds
    assert dict(found.parts) == dict(found.passes[found.entry].parts)
    for one in found.passes.values():
        assert sum(one.parts.values()) == pytest.approx(one.seconds, rel=1e-9, abs=1e-15)
        assert min(one.parts.values(), default=0.0) >= 0.0
        busy = defaultdict(list)
        for event in one.events:
            assert 0 <= event.start <= event.start + event.seconds <= one.seconds * (1 + 1e-9)
            for lane in event.lane.split(" + "):
                busy[lane].append((event.start, event.start + event.seconds))
            if event.part == "loop":
                assert event.seconds == pytest.approx(found.passes[event.name].seconds * event.trips)
        assert sum(end - start for start, end in busy["core"]) == pytest.approx(one.seconds)  # it works or waits
        for lane, events in busy.items():
            ordered = sorted(events)
            assert all(a[1] <= b[0] * (1 + 1e-9) for a, b in itertools.pairwise(ordered)), lane
    return found


def told(found: StepTime) -> dict[str, float]:
    return {part: seconds for part, seconds in found.parts.items() if seconds}


def test_a_large_product_takes_as_long_as_its_arithmetic():
    found = timed(entry("ROOT " + product("a")))
    assert 3 * BYTES / MEMORY < PRODUCT
    assert told(found) == pytest.approx({"matrix products": PRODUCT})


def test_a_product_of_few_rows_takes_as_long_as_its_bytes():
    found = timed(
        entry(f"""
        %few = {LOW} slice(%x), slice={{[0:8], [0:4096]}}
        ROOT %a = {LOW} convolution(%few, %y), dim_labels=bf_io->bf""")
    )
    row = BYTES / 512
    took = (BYTES + 2 * row) / MEMORY
    assert took > 2 * 8 * 4096**2 / RATE
    assert told(found) == pytest.approx({"other compute": 2 * row / MEMORY, "matrix products": took})


def test_what_lies_in_the_fast_memory_costs_no_bandwidth():
    slow = timed(entry(f"ROOT %a = {WIDE} add(%x, %y)"))
    quick = timed(
        entry(f"""
        %near = {FAST} add(%x, %y)
        ROOT %a = {FAST} add(%near, %near)""")
    )
    assert slow.seconds == pytest.approx(3 * BYTES / MEMORY)
    assert quick.seconds == pytest.approx(2 * BYTES / MEMORY)


def counted(body: str, trips: int, name: str = "body", inner: str = "") -> str:
    """Computations of a loop that runs `body`, which yields %next from %p.x, so often."""
    state = f"(s32[], {WIDE})"
    return f"""
{inner}
%{name} (p: {state}) -> {state} {{
  %p = {state} parameter(0)
  %p.i = s32[] get-tuple-element(%p), index=0
  %p.x = {WIDE} get-tuple-element(%p), index=1
{indented(body)}
  %one = s32[] constant(1)
  %i = s32[] add(%p.i, %one)
  ROOT %out = {state} tuple(%i, %next)
}}

%{name}_condition (q: {state}) -> pred[] {{
  %q = {state} parameter(0)
  %q.i = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant({trips})
  ROOT %less = pred[] compare(%q.i, %limit), direction=LT
}}
"""


def loop(name: str = "body", start: str = "x") -> str:
    """Runs it."""
    state = f"(s32[], {WIDE})"
    return f"""%{name}.zero = s32[] constant(0)
        %{name}.start = {state} tuple(%{name}.zero, %{start})
        %{name}.while = {state} while(%{name}.start), condition=%{name}_condition, body=%{name}
        %{name}.end = {WIDE} get-tuple-element(%{name}.while), index=1"""


def test_a_loop_takes_its_trips():
    body = counted(product("next", "p.x", "p.x"), 7)
    found = timed(entry(f"{loop()}\nROOT {product('a', 'body.end', 'y')}", body))
    assert told(found)["matrix products"] == pytest.approx(8 * PRODUCT)
    assert found.passes["body"].parts["matrix products"] == pytest.approx(PRODUCT)
    (event,) = (event for event in found.passes["main"].events if event.part == "loop")
    assert (event.name, event.trips) == ("body", 7)


def test_loops_in_loops_multiply_also_where_the_outer_starts_with_the_inner():
    inner = counted(product("next", "p.x", "p.x"), 3, "inner")
    outer = counted(loop("inner", "p.x") + "\n" + product("next", "inner.end", "inner.end"), 5, "outer", inner)
    found = timed(entry(f"{loop('outer')}\nROOT {product('a', 'outer.end', 'y')}", outer))
    assert found.parts["matrix products"] == pytest.approx((5 * (3 + 1) + 1) * PRODUCT)
    each = [found.passes[name].parts["matrix products"] for name in ("inner", "outer")]
    assert each == pytest.approx([PRODUCT, 4 * PRODUCT])
    trips = [event.trips for name in ("main", "outer") for event in found.passes[name].events if event.part == "loop"]
    assert trips == [5, 3]


def test_a_collective_waits_for_what_a_product_does_not_hide():
    start, end = gathered("g")
    quarter = "%few = bf16[1024,4096]{1,0:T(8,128)(2,1)} slice(%y), slice={[0:1024], [0:4096]}"
    short = "%a = bf16[1024,4096]{1,0:T(8,128)(2,1)} convolution(%few, %y), dim_labels=bf_io->bf"
    found = timed(entry(f"{SHARD}\n{quarter}\n{start}\n{short}\n{end}\nROOT {product('b', 'g')}"))
    assert PRODUCT / 4 < GATHER
    assert told(found) == pytest.approx({
        "other compute": BYTES / 2 / MEMORY,
        "matrix products": 1.25 * PRODUCT,
        "waiting: all-gather over fsdp": GATHER - PRODUCT / 4,
    })  # fmt: skip
    again = timed(entry(f"{SHARD}\n{quarter}\n{start}\n{short}\n{end}\nROOT {product('b', 'g')}"),
                  replace(SHARES, overlap=0.75))  # fmt: skip
    assert again.parts["slowed by: all-gather over fsdp"] == pytest.approx(0.25 * PRODUCT / 4)
    assert again.seconds == pytest.approx(found.seconds + 0.25 * PRODUCT / 4)


def test_a_collective_that_is_hidden_whole_takes_no_time():
    start, end = gathered("g")
    products = "\n".join(product(f"a.{i}") for i in range(math.ceil(GATHER / PRODUCT)))
    found = timed(entry(f"{SHARD}\n{start}\n{products}\n{end}\nROOT {product('b', 'g')}"))
    assert set(told(found)) == {"matrix products"}


@pytest.mark.parametrize(("second", "together"), [("fsdp", 2 * GATHER), ("expert", GATHER)])
def test_the_second_of_two_collectives_waits_for_links_that_both_use(second, together):
    (start, end), (later, last) = gathered("g"), gathered("k", second)
    found = timed(entry(f"{SHARD}\n{start}\n{later}\n{end}\n{last}\nROOT {product('b', 'g', 'k')}"))
    assert found.seconds == pytest.approx(PRODUCT + together)
    starts = {event.name: event.start for event in found.passes["main"].events if event.lane != "core"}
    assert starts == pytest.approx({"g.0": 0.0, "k.0": together - GATHER})


def test_a_synchronous_collective_stops_the_core():
    found = timed(
        entry(f"""
        {product("a")}
        %sum = {WIDE} all-reduce(%a), replica_groups={PAIRS["expert"]}, to_apply=%add
        ROOT {product("b", "sum")}""")
    )
    assert told(found) == pytest.approx({"matrix products": 2 * PRODUCT, "waiting: all-reduce over expert": SUM})
    starts = [event.start for event in found.passes["main"].events if event.name]
    assert starts == pytest.approx([0, PRODUCT, PRODUCT + SUM])


def moved(to: str, name: str = "c", of: str = "x") -> tuple[str, str]:
    start = f"%{name}.0 = ({to}, {WIDE}, u32[]{{:S(2)}}) copy-start(%{of})"
    return start, f"%{name} = {to} copy-done(%{name}.0)"


def test_a_transfer_to_the_host_is_as_slow_as_the_bus_and_slows_nothing_that_hides_it():
    start, end = moved(FAR)
    slow = replace(SHARES, overlap=0.5)
    found = timed(entry(f"{start}\n{product('a')}\n{end}\nROOT {product('b')}"), slow)
    assert PRODUCT < BYTES / HOST
    assert told(found) == pytest.approx(
        {"matrix products": 2 * PRODUCT, "waiting: host memory": BYTES / HOST - PRODUCT}
    )


def test_copies_between_memories_run_beside_the_core_one_after_the_other():
    (start, end), (later, last) = moved(FAST), moved(FAST, "d", "y")
    copy = BYTES / MEMORY
    found = timed(entry(f"{start}\n{later}\n{end}\n{last}\nROOT %a = {FAST} add(%c, %d)"))
    assert told(found) == pytest.approx({"waiting: copies": 2 * copy})
    hidden = timed(entry(f"{start}\n{later}\n{product('b')}\n{end}\n{last}\nROOT {product('e', 'c', 'd')}"))
    assert set(told(hidden)) == {"matrix products"}


def test_an_exchange_with_other_slices_takes_the_network_between_them():
    received = f"({WIDE}, u32[]{{:S(2)}}, token[])"
    notes = 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    text = entry(f"""
        %token = token[] after-all()
        %send = {received} send(%x, %token), channel_id=1, is_host_transfer=true, {notes}
        %recv = {received} recv(%token), channel_id=2, is_host_transfer=true, {notes}
        {product("a")}
        %sent = token[] send-done(%send), channel_id=1, is_host_transfer=true
        %got = ({WIDE}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
        %z = {WIDE} get-tuple-element(%got), index=0
        ROOT {product("b", "z")}""")
    found = timed(text, slices=2)
    took = BYTES / NETWORK + 2 * HOP  # each of the two sends half of it to be summed, and half of what was
    assert told(found) == pytest.approx(
        {"matrix products": 2 * PRODUCT, "waiting: all-reduce over data": took - PRODUCT}
    )
    (event,) = (event for event in found.passes["main"].events if event.lane != "core")
    assert (event.lane, event.start) == ("network", 0.0)


def test_what_starts_in_a_pass_ends_in_it():
    """The compiler may leave the end of a collective to the next trip."""
    start, _ = gathered("g")
    found = timed(entry(f"{SHARD}\n{start}\nROOT {product('b')}"))
    assert found.seconds == pytest.approx(GATHER + PRODUCT)


# programs that the compiler made

LENGTH, HEADS, DIM, BLOCK = 1152, 4, 64, 128  # 9 blocks of the largest size that divides the length
MASKS = (Mask(), Mask(window=300), Mask(causal=False))


@pytest.fixture(scope="module")
def attending():
    """The step of a model with a causal, a windowed and a full layer: (its program, the step time)."""
    pytest.importorskip("libtpu", reason="programs for TPUs need their compiler: pip install libtpu")
    tiny = registry.load(registry.find("llama:tiny", registry.index()))
    sizes = {"data.sequence_length": str(LENGTH), "data.batch_size": "8"}
    tiny = override(tiny, {**sizes, "mesh.data": "1", "mesh.fsdp": "8"})

    def masked(repeat: Repeat) -> Repeat:
        shape = {"num_heads": HEADS, "num_kv_heads": 2, "head_dim": DIM}
        blocks = [swap(repeat.layer, Attention, lambda a, mask=mask: replace(a, mask=mask, **shape)) for mask in MASKS]
        return Repeat(layer=Sequence(tuple(blocks)), times=2)

    compiled = compile_step(swap(tiny, Repeat, masked), CUBE)
    jaxtyping.config.update("jaxtyping_disable", True)  # 17 thousand instructions
    read = program.read(compiled.text)
    found = read, step_time(read, compiled, CUBE, replace(SHARES, overlap=0.6))
    jaxtyping.config.update("jaxtyping_disable", False)
    return found


@pytest.mark.parametrize(("kernel", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_attention_kernels_compute_the_blocks_that_their_mask_leaves(attending, kernel, products):
    """Forward: logits, and what they weigh; backward: those again, the weights' gradient, and one or two more."""
    expected = []
    for mask in MASKS:
        blocks = 0
        for row, column in itertools.product(range(LENGTH // BLOCK), repeat=2):
            spans = (range(place * BLOCK, (place + 1) * BLOCK) for place in (row, column))
            seen = lambda q, k, mask=mask: (k <= q or not mask.causal) and (not mask.window or q - k < mask.window)
            blocks += any(seen(q, k) for q, k in itertools.product(*spans))
        expected.append(blocks * HEADS * products * 2 * BLOCK * BLOCK * DIM)
    assert len(set(expected)) == 3
    read, _ = attending
    kernels = [one for one in read.instructions if f"splash_mha_{kernel}" in one.instruction.op_name and one.opaque]
    assert {one.trips for one in kernels} == {2}
    found = sorted(_attention_flops(read, one) for one in kernels)
    again = len(found) // 3  # recomputed kernels
    assert found == sorted(expected * again)


def test_a_forecast_of_a_compiled_step_adds_up(attending):
    read, found = attending
    sound(found)
    assert {"matrix products", "attention", "other compute"} <= set(told(found))
    # all that the program's collectives and products take is told, beside the core or on it
    lanes = sum(e.seconds * e.trips for one in found.passes.values() for e in one.events if "axis" in e.lane)
    assert lanes > 0
    floor = read.flops() / RATE
    assert found.parts["matrix products"] >= floor * (1 - 1e-9)
    assert found.seconds > floor
