"""FLOPs per token and model FLOPs utilisation are those that other projects published, from models of ours.

The runs are those of MaxText's documentation and recipe logs, of axlearn's experiment comments, and of torchtitan.
"""

from functools import cache

import pytest

from axrepro.core.config import swap
from axrepro.core.flops import Flops, speeds
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM, llama
from axrepro.nn import FeedForward, MoE
from axrepro.train.hardware import CHIPS

_MHA_8192 = dict(vocab_size=32000, dim=8192, num_heads=64, hidden=28672)
_GQA_4096 = dict(dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, hidden=14336)


def model(name: str) -> CausalLM:
    """The architecture of this name."""
    if name == "Mixtral-8x7B":
        dense = llama(vocab_size=32000, **_GQA_4096)
        return swap(dense, FeedForward, lambda ffn: MoE(expert=ffn, num_experts=8, capacity_factor=1.25))
    if name == "GPT3-175B":
        gated = llama(vocab_size=50304, dim=12288, num_layers=96, num_heads=96, hidden=49152)
        return swap(gated, FeedForward, lambda ffn: FeedForward(hidden=ffn.hidden, gated=False, act="gelu"))
    return {
        "Llama2-70B": llama(num_layers=80, num_kv_heads=8, **_MHA_8192),
        "Llama3.1-8B": llama(vocab_size=128256, **_GQA_4096),
        "32B": llama(num_layers=32, **_MHA_8192),
        "64B": llama(num_layers=64, **_MHA_8192),
        # the shape of Llama 7B with axlearn's vocabulary of 32 * 1024; with Llama's 32000 the v4 row is 42.1 / 40.6
        "axlearn-7B": llama(vocab_size=32768, dim=4096, num_layers=32, num_heads=32, hidden=11008),
    }[name]


@cache
def per_token(name: str, length: int) -> Flops:
    """Train FLOPs of one token in a row of this length."""
    flops = LanguageModel(model=model(name)).flops({"tokens": (1, length), "targets": (1, length)})
    return Flops(causal=flops.causal / length, full=flops.full / length)


def measured(name: str, length: int, tokens_per_second: float, chip: str) -> dict[str, float]:
    """The logged scalars of a chip with this throughput; MFU in percent."""
    peak = CHIPS[chip].tflops * 1e12
    scalars = speeds(per_token(name, length), 1 / tokens_per_second, num_devices=1, peak=peak)
    return {key: value * (100 if key.startswith("mfu") else 1) for key, value in scalars.items()}


@pytest.mark.parametrize(
    ("name", "length", "causal", "full"),
    [("Llama2-70B", 4096, 428.39, 444.49), ("Llama3.1-8B", 8192, 51.47, 57.91), ("Mixtral-8x7B", 4096, 79.71, 82.93)],
)
def test_gflop_per_token(name, length, causal, full):
    flops = per_token(name, length)
    assert (round(flops.causal / 1e9, 2), round(flops.full / 1e9, 2)) == (causal, full)


# Step times as published, and the rounded figures that follow from them.
@pytest.mark.parametrize(
    ("name", "chip", "rows", "length", "seconds", "tflops", "mfu_full", "mfu"),
    [
        ("Llama2-70B", "v6e", 2, 4096, 9.052, 402.3, 43.8, 42.2),
        ("Llama3.1-8B", "v6e", 4, 8192, 4.546, 417.4, 45.5, 40.4),
        ("Llama3.1-8B", "v6e", 3, 8192, 3.443, 413.4, 45.0, 40.0),
        ("GPT3-175B", "v6e", 3, 2048, 17.182, 384.9, 41.9, 41.4),
        ("Mixtral-8x7B", "v6e", 12, 4096, 13.484, 302.3, 32.9, 31.7),
    ],
)
def test_runs_with_a_published_step_time(name, chip, rows, length, seconds, tflops, mfu_full, mfu):
    ours = measured(name, length, rows * length / seconds, chip)
    assert round(ours["tflops_per_device_full"], 1) == tflops
    assert (round(ours["mfu_full"], 1), round(ours["mfu"], 1)) == (mfu_full, mfu)


@pytest.mark.parametrize(
    ("chip", "chips", "seconds", "mfu_full", "mfu"),
    [("v4", 512, 3.03, 42.2, 40.6), ("v5e", 4 * 256, 2.44, 36.5, 35.2), ("v5p", 256, 2.85, 53.7, 51.7)],
)
def test_runs_with_a_published_global_batch(chip, chips, seconds, mfu_full, mfu):
    ours = measured("axlearn-7B", 2048, 4_194_304 / seconds / chips, chip)
    assert (round(ours["mfu_full"], 1), round(ours["mfu"], 1)) == (mfu_full, mfu)


@pytest.mark.parametrize(("tokens_per_second", "mfu_full"), [(5762, 33.7), (6667, 39.0)])
def test_runs_on_gpus(tokens_per_second, mfu_full):
    assert round(measured("Llama3.1-8B", 8192, tokens_per_second, "h100")["mfu_full"], 1) == mfu_full


# Here TFLOP/s are published, to three digits, and the step time follows. The published MFU comes from more digits than
# the published TFLOP/s, so it is compared with what all values that round to those can give. The masked MFU, `mfu`, is
# arithmetic of the collectors of these figures: 68.4 comes from a full one of 69.5, and more digits give 68.3.
@pytest.mark.parametrize(
    ("name", "rows", "seconds", "tflops", "mfu_full", "mfu"),
    [("32B", 6, 7.30, 328, 71.5, 70.3), ("32B", 6, 7.51, 319, 69.4, 68.4), ("64B", 3, 7.38, 323, 70.3, 69.2)],
)
def test_runs_with_published_tflops(name, rows, seconds, tflops, mfu_full, mfu):
    tokens_per_second = tflops * 1e12 / per_token(name, 2048).full
    assert round(rows * 2048 / tokens_per_second, 2) == seconds
    lowest, highest = (
        measured(name, 2048, tokens_per_second * factor, "v5p") for factor in (1 - 0.5 / tflops, 1 + 0.5 / tflops)
    )
    assert lowest["mfu_full"] - 0.05 <= mfu_full <= highest["mfu_full"] + 0.05
    assert lowest["mfu"] - 0.05 <= mfu <= highest["mfu"] + 0.05


def test_the_run_whose_figures_disagree_with_each_other():
    # published: about 300 TFLOP/s, 65.4 % in full and, by its collectors' arithmetic, 64.6 % as masked. The first two
    # agree. The quotient of the last two is that of rows of some 1,300 tokens, and the run had rows of 4,096.
    ours = measured("Llama2-70B", 4096, 300e12 / per_token("Llama2-70B", 4096).full, "v5p")
    assert (round(ours["mfu_full"], 1), round(ours["mfu"], 1)) == (65.4, 63.0)
    shorter = per_token("Llama2-70B", 1300)
    assert round(65.4 * shorter.causal / shorter.full, 1) == 64.6


def test_devices_share_the_work_and_an_unknown_peak_gives_no_mfu():
    step = Flops(causal=6e12, full=8e12)
    assert speeds(step, 0.5, 4, None) == {"tflops_per_device": 3.0, "tflops_per_device_full": 4.0}
    assert speeds(step, 0.5, 4, 10e12) == {
        "tflops_per_device": 3.0, "tflops_per_device_full": 4.0, "mfu": 0.3, "mfu_full": 0.4
    }  # fmt: skip
