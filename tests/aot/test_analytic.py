"""Estimates for GPUs are what follows by hand from the config, and as near to published runs as they say."""

import json
from functools import cache

import pytest

from axrepro import registry
from axrepro.aot.analytic import EFFICIENCY, Estimate, estimate, ring_seconds
from axrepro.core.config import override
from axrepro.errors import UserError
from axrepro.launch import main
from axrepro.train.experiment import on_hardware
from axrepro.train.hardware import CHIPS

# llama:tiny
LAYERS, DIM, HEADS, KV_HEADS, HEAD, HIDDEN, WORDS = 2, 48, 4, 2, 16, 128, 264
ROWS, LENGTH = 8, 64
ATTENTION = 2 * DIM * HEAD * (HEADS + 2 * KV_HEADS) + 2 * HEADS * HEAD * DIM
MATRIX = 2 * 2 * LENGTH * HEADS * HEAD  # FLOPs a token of logits and of what they weigh, nothing masked
BLOCK = ATTENTION + MATRIX + 6 * DIM * HIDDEN
NORMS = (2 * LAYERS + 1) * DIM  # copied to all devices
WEIGHTS = LAYERS * (ATTENTION // 2 + 3 * DIM * HIDDEN) + 2 * WORDS * DIM


@cache
def found(name: str, topology: str, *changes: tuple[str, object]) -> Estimate:
    experiment, _ = on_hardware(registry.load(registry.find(name, registry.index())), topology)
    return estimate(override(experiment, dict(changes)), topology)


def tiny(topology: str, *changes: tuple[str, object]) -> Estimate:
    return found("llama:tiny", topology, *changes)


def test_flops_and_their_time_are_those_by_hand():
    one = tiny("h100-8", ("mesh.fsdp", 8), ("mesh.data", 1), ("data.batch_size", 8 * 1024))
    tokens = 8 * 1024 * LENGTH
    model = 3 * tokens * (LAYERS * (BLOCK - MATRIX / 2) + 2 * DIM * WORDS)
    assert one.effect.flops.causal == model
    assert one.recomputed == 0
    assert one.seconds == pytest.approx(model / (8 * 989e12 * EFFICIENCY), rel=1e-9)
    assert one.speed["mfu"] == pytest.approx(EFFICIENCY, rel=1e-9)
    assert one.speed["tokens_per_second"] == pytest.approx(tokens / one.seconds, rel=1e-9)
    assert one.speed["usd_per_billion_tokens"] == pytest.approx(
        CHIPS["h100"].price.usd * 8 / 3600 * one.seconds / tokens * 1e9, rel=1e-9
    )


def test_recomputed_products_are_those_that_the_policy_does_not_keep():
    whole = 3 * (LAYERS * BLOCK + 2 * DIM * WORDS) + LAYERS * MATRIX / 2  # attention does its logits twice in any case
    again = lambda policy: tiny("h100-8", ("train.remat", policy)).recomputed * whole / LAYERS
    assert again("full") == pytest.approx(BLOCK - 2 * DIM * HIDDEN, rel=1e-9)  # the last product is not needed again
    assert again("save:ffn_up,ffn_gate") == pytest.approx(BLOCK - 6 * DIM * HIDDEN, rel=1e-9)


def test_memory_is_the_state_and_what_the_policy_keeps():
    mesh = (("mesh.fsdp", 4), ("mesh.data", 1), ("train.grad_accumulation", 2))
    one, more = (tiny("h100-4", ("train.remat", policy), *mesh) for policy in ("full", "save:q,ffn_up"))
    assert one.memory["parameters"] == one.memory["gradients"] == 4 * (WEIGHTS // 4 + NORMS)
    values = ROWS // 4 // 2 * LAYERS * LENGTH * (HEADS * HEAD + HIDDEN)
    assert more.activations - one.activations == 4 * values


def test_a_gather_takes_what_the_slower_network_takes():
    h100 = CHIPS["h100"]  # 450 GB/s to the seven others of its host, 50 GB/s to other hosts
    mesh = {"data": 4, "fsdp": 16}
    assert ring_seconds(8e9, ("fsdp",), {"data": 1, "fsdp": 8}, h100) == pytest.approx(7e9 / 450e9)
    # two hosts: each GPU brings in an eighth of the other host's half
    assert ring_seconds(8e9, ("fsdp",), mesh, h100) == pytest.approx(max(8e9 / 2 / 8 / 50e9, 7.5e9 / 450e9))
    # one GPU of each of four hosts: nobody shares the load
    assert ring_seconds(8e9, ("data",), mesh, h100) == pytest.approx(6e9 / 50e9)
    assert ring_seconds(8e9, (), mesh, h100) == 0


def test_a_step_with_little_to_do_waits_for_weights_and_gradients():
    split = tiny("h100-8", ("mesh.fsdp", 8), ("mesh.data", 1))
    copied = tiny("h100-8", ("mesh.fsdp", 1), ("mesh.data", 8))
    # gathered twice and its gradient reduced and split once; or that and a gather of the sum
    for one, passes in ((split, 3), (copied, 2)):
        assert one.seconds == pytest.approx((passes * WEIGHTS + 2 * NORMS) * 4 * 7 / 8 / 450e9, rel=1e-9)
        assert one.parts["waiting: network"] > 0


def test_traffic_that_is_not_reckoned_with_is_told():
    one = found("moe_dense:tiny", "h100-8", ("mesh.expert", 2), ("mesh.model", 2), ("mesh.data", 2), ("mesh.fsdp", 1))
    assert one.left_out == ("traffic along model", "the exchange of tokens with experts")


@pytest.mark.parametrize(
    ("name", "rows", "published", "off"),
    [
        ("llama3_8b", 8, 6667, 1.2),  # torchtitan, compiled
        ("llama2_7b", 32, 11362, 1.2),  # MaxText
        ("llama3_8b", 8, 5762, 1.4),  # torchtitan without its compiler, to which nothing was fitted
    ],
)
def test_published_runs_on_8_h100_are_as_near_as_is_said(name, rows, published, off):
    one = found(name, "h100-8", ("data.batch_size", rows), ("train.remat", "none"))
    assert 1 / off < one.speed["tokens_per_second"] / 8 / published < off


def launched(*args: str) -> int:
    return main(["--mode=compile", *args])


def test_the_report_says_that_nothing_was_compiled(capsys):
    assert launched("--experiment=llama:tiny", "--topology=h100-8") == 0
    assert "estimated from the config, not compiled" in capsys.readouterr().out
    assert launched("--experiment=llama:tiny", "--topology=b200-8", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["estimated"]
    assert {"hardware", "devices", "mesh", "memory", "flops", "step_seconds", "mfu", "breakdown"} <= figures.keys()
    assert "usd_per_billion_tokens" not in figures  # no page with a price of b200 was found


def test_a_run_that_does_not_fit_ends_with_3(capsys):
    assert launched("--experiment=llama3_70b", "--topology=h200-8") == 3
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--topology=h1000-8"], "unknown topology 'h1000-8'"),
        (["--topology=h100:2x2x2"], "h100 has no torus shapes"),
        (["--topology=h100-12"], "8 h100 are joined by NVLink; more must be a multiple of that"),
        (["--topology=gb200-144"], "72 gb200 are joined by NVLink; the network between more of them is not known"),
        (["--topology=h100-8", "--search"], "--search needs a compiled step, and h100-8 is only estimated"),
        (["--topology=h100-8", "--save=x"], "--save needs a compiled step"),
    ],
)
def test_wrong_names_and_flags_end_in_one_line(args, told, capsys):
    assert launched("--experiment=llama:tiny", *args) == 2
    assert told in capsys.readouterr().err


def test_other_hardware_is_not_estimated():
    with pytest.raises(UserError, match="estimates are for a100, h100, h200, b200, gb200"):
        tiny("v5p-8")
