import pytest

from axrepro.aot.slices import find_slice
from axrepro.train.effect import effect
from axrepro.train.hardware import CHIPS, parse_slice
from benchmarks.published_runs import RUNS

BY_NAME = {run.name: run for run in RUNS}


def flops_per_token(*, e, hq, f, n, v, s, hkv=None, d=128, products=3, experts=0, k=1) -> tuple[float, float]:
    """W + A of the published formula: E width, Hq and Hkv heads of D, F hidden, n layers, V vocabulary, S length."""
    hkv = hq if hkv is None else hkv
    ffn = k * 2 * products * e * f + 2 * e * experts
    weights = 3 * (n * (2 * e * (hq + 2 * hkv) * d + 2 * e * hq * d + ffn) + 2 * e * v)
    causal = 3 * n * 2 * s * hq * d
    return weights + causal, weights + 2 * causal


LLAMA3_8B = {"e": 4096, "hq": 32, "hkv": 8, "f": 14336, "n": 32, "v": 128_256}
LLAMA_70B = {"e": 8192, "hq": 64, "hkv": 8, "f": 28672, "n": 80}
MOE = {"hkv": 8, "experts": 8, "k": 2}
PLAIN = {"d": 256, "products": 2, "v": 32_768}
SHAPES = {  # the beginning of a name, and the shape that its source states
    "maxtext_16b": {"e": 5120, "hq": 32, "f": 32768, "n": 32, **PLAIN},
    "maxtext_22b": {"e": 6144, "hq": 24, "f": 24576, "n": 48, **PLAIN},
    "maxtext_32b": {"e": 10240, "hq": 32, "f": 32768, "n": 32, **PLAIN},
    "maxtext_64b": {"e": 10240, "hq": 32, "f": 32768, "n": 64, **PLAIN},
    "maxtext_128b": {"e": 10240, "hq": 64, "f": 65536, "n": 64, **PLAIN},
    "maxtext_512b": {"e": 20480, "hq": 64, "f": 65536, "n": 128, **PLAIN},
    "llama2_70b": {**LLAMA_70B, "v": 32_000},
    "llama3_8b": LLAMA3_8B,
    "llama3_70b": {**LLAMA_70B, "v": 128_256},
    "llama3_405b": {"e": 16384, "hq": 128, "hkv": 8, "f": 53248, "n": 126, "v": 128_256},
    "gpt3_175b": {"e": 12288, "hq": 96, "f": 49152, "n": 96, "v": 50_304, "products": 2},
    "mistral_7b": {**LLAMA3_8B, "v": 32_000},
    "mixtral_8x7b": {"e": 4096, "hq": 32, "f": 14336, "n": 32, "v": 32_000, **MOE},
    "mixtral_8x22b": {"e": 6144, "hq": 48, "f": 16384, "n": 56, "v": 32_768, **MOE},
    "fuji_7b": {"e": 4096, "hq": 32, "f": 11008, "n": 32, "v": 32_768},
    "fuji_70b": {**LLAMA_70B, "v": 32_768},
    "honeycrisp_3b": {"e": 3072, "hq": 24, "hkv": 8, "f": 8064, "n": 26, "v": 49_152},
}
WINDOWED = "gemma3_12b"  # the formula knows no window


@pytest.mark.parametrize("run", [run for run in RUNS if not run.name.startswith(WINDOWED)], ids=lambda run: run.name)
def test_flops_per_token_are_those_of_the_published_formula(run):
    (shape,) = [shape for start, shape in SHAPES.items() if run.name.startswith(start)]
    causal, full = flops_per_token(**shape, s=run.length)
    assert run.flops().causal == pytest.approx(causal, rel=0.01)
    assert run.flops().full == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("run", [run for run in RUNS if run.seconds and run.tflops], ids=lambda run: run.name)
def test_published_seconds_and_published_rate_agree(run):
    causal, full = run.rates()
    assert {"causal": causal, "full": full}[run.counts] == pytest.approx(run.tflops, rel=0.015)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_run_can_be_described_on_its_slice(run):
    found = find_slice(run.topology)
    result = effect(run.experiment(), run.topology, found.devices, found.slices)
    assert result.units == run.tokens * run.chips
    stored = result.bytes_per_device["parameters"] + result.bytes_per_device["optimizer state"]
    assert stored < CHIPS[found.kind].hbm_gib / CHIPS[found.kind].devices * 2**30


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_run_has_a_figure_a_source_and_a_possible_speed(run):
    assert "github.com/" in run.source or "readthedocs" in run.source
    assert run.seconds or run.tflops
    assert 0.2 < run.mfu()[0] < 0.75


def test_names_are_unique_and_no_family_is_most_of_the_runs():
    assert len(BY_NAME) == len(RUNS)
    families = [run.family for run in RUNS]
    assert max(map(families.count, families)) < len(RUNS) / 4
    assert {parse_slice(run.topology)[0] for run in RUNS} >= {"v4", "v5e", "v5p", "v6e"}


@pytest.mark.parametrize(
    ("name", "causal", "full"),
    [
        ("llama2_70b_v6e-256", 428.39, 444.49),
        ("llama3_8b_v6e-256", 51.47, 57.91),
        ("mixtral_8x7b_v6e-256", 79.71, 82.93),
    ],
)
def test_flops_per_token_are_those_that_others_printed(name, causal, full):
    assert BY_NAME[name].flops().causal / 1e9 == pytest.approx(causal, abs=0.01)
    assert BY_NAME[name].flops().full / 1e9 == pytest.approx(full, abs=0.01)
