"""Names of slices and devices, as their vendors use them."""

from types import SimpleNamespace

import pytest

from axrepro.errors import UserError
from axrepro.train.hardware import chip_name, parse_topology, peak_flops, slice_name


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


def test_an_unknown_device_keeps_its_name():
    assert chip_name("Radiant 9000 (TM)") == "radiant-9000-tm"


@pytest.mark.parametrize(("kind", "tflops"), [("TPU v5p", 459), ("TPU7x", 2307 / 2), ("NVIDIA B200", 2250)])
def test_the_peak_is_that_of_a_device(kind, tflops):
    assert peak_flops([SimpleNamespace(device_kind=kind)]) == tflops * 1e12


def test_unknown_devices_have_no_peak():
    assert peak_flops([SimpleNamespace(device_kind="cpu")]) is None


@pytest.mark.parametrize("name", ["v9-8", "v5p", "v5p-", "v5p-9", "x2v5p-8", ""])
def test_other_names_are_errors(name):
    with pytest.raises(UserError):
        parse_topology(name)
