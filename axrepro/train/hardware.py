"""What the devices are called, and their public peak figures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from axrepro.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Per chip, as the vendors publish it: docs.cloud.google.com/tpu/docs, nvidia.com data sheets (HGX, SXM models).

    Attributes:
      tflops: dense bfloat16 TFLOP/s.   hbm_gib: memory of the chip, GiB.
      cores: what a slice name counts per chip (v5p-8 is 4 chips).
      devices: what jax shows of one chip: since v7x a device is a TensorCore, before it two of them acted as one.
    """

    tflops: float
    hbm_gib: float
    cores: int = 1
    devices: int = 1


CHIPS = {
    "v4": Chip(275, 32, cores=2),
    "v5e": Chip(197, 16),
    "v5p": Chip(459, 95, cores=2),
    "v6e": Chip(918, 32),
    "v7x": Chip(2307, 192, cores=2, devices=2),
    "a100": Chip(312, 80),
    "h100": Chip(989, 80),
    "h200": Chip(989, 141),
    "b200": Chip(2250, 180),
    "gb200": Chip(2500, 186),
}

# parts of `device_kind`, the most specific first
_KINDS = (
    ("v5 lite", "v5e"), ("v5e", "v5e"), ("v5p", "v5p"), ("v5", "v5p"), ("v6", "v6e"), ("v7", "v7x"), ("tpu7x", "v7x"),
    ("v4", "v4"), ("a100", "a100"), ("h200", "h200"), ("h100", "h100"), ("gb200", "gb200"), ("b200", "b200"),
)  # fmt: skip


def chip_name(device_kind: str) -> str:
    """The short name of a device kind as jax reports it: "TPU v5 lite" is "v5e"; unknown kinds keep their own name."""
    kind = device_kind.lower()
    return next((name for part, name in _KINDS if part in kind), re.sub(r"\W+", "-", kind).strip("-"))


def slice_name(device_kind: str, num_devices: int) -> str:
    """The public name of this many devices: "v5p-1024" is 512 chips, "h100-16" two hosts, "cpu-8" is emulated."""
    chip = chip_name(device_kind)
    return f"{chip}-{num_devices * CHIPS[chip].cores // CHIPS[chip].devices if chip in CHIPS else num_devices}"


def parse_topology(name: str) -> tuple[str, int, int]:
    """(kind of chip, devices in all, slices) of a public slice name; `2x` or `2×` in front stands for several slices.

    Raises:
      UserError: if the name is not of the form "v5p-1024".
    """
    match = re.fullmatch(r"(?:(\d+)[x×])?([a-z]+\w*)-(\d+)", name.lower())
    if not match or (match[2] not in CHIPS and match[2] != "cpu"):
        allowed = ", ".join([*CHIPS, "cpu"])
        raise UserError(f"unknown topology {name!r}; it is KIND-COUNT such as v5p-1024, with KIND one of {allowed}")
    chip = CHIPS.get(match[2], Chip(0, 0))  # "cpu" names its devices
    count = int(match[3])
    if match[1] and int(match[1]) < 1:
        raise UserError(f"topology {name!r}: there is at least 1 slice")
    if count < 1 or count % chip.cores:
        raise UserError(
            f"topology {name!r}: {match[2]} counts {chip.cores} per chip, so COUNT must be a multiple of {chip.cores}"
        )
    slices = int(match[1] or 1)
    return match[2], slices * count // chip.cores * chip.devices, slices


def peak_flops(devices: Sequence) -> float | None:
    """Dense bfloat16 FLOP/s of one of these devices, where it is known."""
    chip = chip_name(devices[0].device_kind)
    return CHIPS[chip].tflops * 1e12 / CHIPS[chip].devices if chip in CHIPS else None
