"""Names of slices and devices, as their vendors use them."""

import re
from dataclasses import fields
from types import SimpleNamespace

import pytest

from axrepro.errors import UserError
from axrepro.train.hardware import CHIPS, Chip, chip_name, parse_topology, peak_flops, slice_name


@pytest.mark.parametrize(
    ("kind", "devices", "name"),
    [
        ("TPU v4", 32, "v4-64"),  # named by cores, two a chip
        ("TPU v5p", 512, "v5p-1024"),
        ("TPU v5 lite", 256, "v5e-256"),
        ("TPU v6 lite", 8, "v6e-8"),
        ("NVIDIA H100 80GB HBM3", 16, "h100-16"),
        ("TPU7x", 8, "v7x-8"),  # four chips of two devices
        ("NVIDIA H200", 8, "h200-8"),
        ("NVIDIA GB200", 72, "gb200-72"),
        ("cpu", 8, "cpu-8"),
    ],
)
def test_a_slice_is_named_by_its_devices_and_the_name_says_how_many(kind, devices, name):
    assert slice_name(kind, devices) == name
    assert parse_topology(name) == (name.split("-")[0], devices, 1)


def test_several_slices_multiply():
    assert parse_topology("4xv5p-1024") == parse_topology("4×v5p-1024") == ("v5p", 4 * 512, 4)


def test_a_shape_stands_for_its_chips():
    assert parse_topology("v5p:8x8x8") == parse_topology("v5p-1024")
    assert parse_topology("2xv7x:4x4x4") == parse_topology("2xtpu7x-128") == ("v7x", 2 * 64 * 2, 2)
    assert parse_topology("v6e:4x8") == ("v6e", 32, 1)


def test_an_unknown_device_keeps_its_name():
    assert chip_name("Radiant 9000 (TM)") == "radiant-9000-tm"


@pytest.mark.parametrize(("kind", "tflops"), [("TPU v5p", 459), ("TPU7x", 2307 / 2), ("NVIDIA B200", 2250)])
def test_the_peak_is_that_of_a_device(kind, tflops):
    assert peak_flops([SimpleNamespace(device_kind=kind)]) == tflops * 1e12


def test_unknown_devices_have_no_peak():
    assert peak_flops([SimpleNamespace(device_kind="cpu")]) is None


@pytest.mark.parametrize(
    "name", ["v9-8", "v5p", "v5p-", "v5p-9", "x2v5p-8", "v5p:8", "v5p:8x8", "v6e:0x4", "h100:2x4", "v5p:4x4x4-8", ""]
)
def test_other_names_are_errors(name):
    with pytest.raises(UserError):
        parse_topology(name)


TPUS = [kind for kind, chip in CHIPS.items() if chip.torus]


@pytest.mark.parametrize("kind", CHIPS)
def test_every_figure_has_a_source(kind):
    chip = CHIPS[kind]
    own = {"price", "sources"} | (set() if chip.torus else {"torus", "cores", "devices"})  # GPUs have one of each
    given = {field.name for field in fields(Chip) if getattr(chip, field.name) is not None} - own
    named = [name for names, _ in chip.sources for name in names.split()]
    assert set(named) == given
    assert len(named) == len(set(named))
    places = [source for _, source in chip.sources] + ([chip.price.source] if chip.price else [])
    assert all(re.search(r"[a-z0-9-]+\.[a-z]{2,}/|arXiv:", place) for place in places)


@pytest.mark.parametrize("kind", [kind for kind, chip in CHIPS.items() if chip.ghz])
def test_the_peak_is_that_of_the_matrix_units(kind):
    chip = CHIPS[kind]
    assert chip.cores * chip.mxus * chip.mxu**2 * 2 * chip.ghz / 1e3 == pytest.approx(chip.tflops, abs=0.5)


# of a pod, as the pages of v5e and v6e give them: PFLOP/s, TB/s of an all-reduce, TB/s between the halves
@pytest.mark.parametrize(
    ("kind", "pflops", "reduced", "bisection"), [("v5e", 50.4, 51.2, 1.6), ("v6e", 235, 102.4, 3.2)]
)
def test_the_figures_of_chips_come_to_those_of_a_pod(kind, pflops, reduced, bisection):
    chip, side = CHIPS[kind], 16
    assert chip.domain * chip.tflops / 1e3 == pytest.approx(pflops, rel=1e-3)
    assert chip.domain * chip.ici_gbs / 2 / 1e3 == pytest.approx(reduced)
    assert 2 * side * chip.link_gbs / 1e3 == pytest.approx(bisection)  # a torus is cut twice


@pytest.mark.parametrize("kind", CHIPS)
def test_figures_agree_with_each_other(kind):
    chip = CHIPS[kind]
    assert chip.links == 2 * chip.torus or kind not in TPUS
    assert all(rate >= chip.tflops for rate in (chip.int8_tops, chip.fp8_tflops) if rate)
    assert chip.domain % chip.host_chips == 0
    assert chip.hbm_gbs > chip.ici_gbs > 2 * max(filter(None, (chip.pcie_gbs, chip.dcn_gbs)), default=0)


def test_bandwidth_of_a_link_in_one_direction():
    assert [CHIPS[kind].link_gbs for kind in ("v4", "v5e", "v5p", "v6e", "v7x")] == [50, 50, 100, 100, 100]
    assert [CHIPS[kind].link_gbs for kind in ("a100", "h100", "b200")] == [25, 25, 50]
