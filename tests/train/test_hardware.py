"""Names of slices and devices, as their vendors use them."""

import pytest

from axrepro.errors import UserError
from axrepro.train.hardware import chip_name, parse_topology, slice_name


@pytest.mark.parametrize(
    ("kind", "devices", "name"),
    [
        ("TPU v4", 32, "v4-64"),  # named by cores, two a chip
        ("TPU v5p", 512, "v5p-1024"),
        ("TPU v5 lite", 256, "v5e-256"),
        ("TPU v6 lite", 8, "v6e-8"),
        ("NVIDIA H100 80GB HBM3", 16, "h100-16"),
        ("NVIDIA H200", 8, "h200-8"),
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


@pytest.mark.parametrize("name", ["v9-8", "v5p", "v5p-", "v5p-9", "x2v5p-8", ""])
def test_other_names_are_errors(name):
    with pytest.raises(UserError):
        parse_topology(name)
