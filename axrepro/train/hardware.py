"""What the devices are called, and their public figures."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from axrepro.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Price:
    """List price of a chip with its share of the host. Prices change and differ by region and contract: edit them.

    Attributes:
      usd: US dollars per chip and hour.   terms: region, and what is bought.   read: the date.   source: where.
    """

    usd: float
    terms: str
    read: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Per chip, as published; None where nothing is. GB/s are 1e9 bytes per second.

    Attributes:
      tflops: dense bfloat16 TFLOP/s.   int8_tops, fp8_tflops: the same for narrower products, dense.
      cores: TensorCores of a TPU, which a slice name counts (v5p-8 is 4 chips); 1 for GPUs.
      devices: what jax shows of one chip: since v7x a device is a TensorCore, before it two of them acted as one.
      mxus, mxu, ghz: matrix units per TensorCore, their side, and their clock.
      hbm_gib: memory of the chip.   hbm_gbs: bandwidth of that memory.
      links, ici_gbs: links of the fast network (ICI, NVLink) and their bandwidth together, both directions added.
      torus: dimensions of the torus that the links form; 0 where they go to switches that join all chips of a domain.
      domain: chips that the fast network joins at most.
      dcn_gbs: bandwidth of the network between domains, for one chip in one direction.
      host_chips, host_gib: chips and memory of the machine that one process sees.
      pcie_gbs: bandwidth between chip and host, in one direction.
      sources: (names of fields, where their values were published).
    """

    tflops: float
    int8_tops: float | None = None
    fp8_tflops: float | None = None
    cores: int = 1
    devices: int = 1
    mxus: int | None = None
    mxu: int | None = None
    ghz: float | None = None
    hbm_gib: float
    hbm_gbs: float
    links: int
    ici_gbs: float
    torus: int = 0
    domain: int
    dcn_gbs: float | None = None
    host_chips: int
    host_gib: float | None = None
    pcie_gbs: float | None = None
    price: Price | None = None
    sources: tuple[tuple[str, str], ...]

    @property
    def link_gbs(self) -> float:
        """Bandwidth of one link in one direction. The scaling book reckons with a tenth less on TPUs."""
        return self.ici_gbs / self.links / 2


# pages of Google and of projects that run on its chips
_BOOK = "How to Scale Your Model, section 2, jax-ml.github.io/scaling-book/tpus (February 2025)"
_V4 = "TPU v4, docs.cloud.google.com/tpu/docs/v4"
_V5E = "TPU v5e, docs.cloud.google.com/tpu/docs/v5e"
_V5P = "TPU v5p, docs.cloud.google.com/tpu/docs/v5p"
_V6E = "TPU v6e, docs.cloud.google.com/tpu/docs/v6e"
_V7X = "TPU7x (Ironwood), docs.cloud.google.com/tpu/docs/tpu7x, with v5p and v6e beside it"
_MAXTEXT = "accelerator_to_spec_map.py of github.com/AI-Hypercomputer/maxtext"
_ANNOUNCED = "Google's announcement of v5p (December 2023), as reported in newsflash.city/2401/a7c7c408caada5fa.html"
_ISCA = "TPU v4 paper (arXiv:2304.01433), as told in brendanjameslynskey.github.io/Google_TPU_06_v4_OCS_SparseCore"
# data sheets of NVIDIA where they are reprinted; rates "with sparsity" are halved
_A100 = "A100 data sheet, in glennklockwood.com/garden/processors/A100 (80 GB, SXM)"
_H100 = "H100 data sheet, in archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html (SXM)"
_H200 = "H200 as an H100 with more memory, glennklockwood.com/garden/processors/h100"
_BLACKWELL = "Blackwell architecture brief, in glennklockwood.com/garden/processors/B200"
_HOPPERS = "Hardware assumptions, ttsugriy.github.io/distributed-training-book/appendices/hardware-assumptions"
_BASEPOD = "DGX BasePOD core components, docs.nvidia.com/dgx-basepod: 8 ConnectX-7 of 400 Gb/s, 2 TB"
_DGX_B200 = "DGX B200 user guide, docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html"
_HGX_B200 = "HGX B200 hardware overview, docs.vultr.com/inference-cookbook/cuda/getting-started/hardware-overview"
_MLPERF = "MLPerf systems, github.com/mlcommons/inference_results_v4.1 (NVIDIA, H200), _v6.1 (Crusoe, GB200)"

_GOOGLE = "Google Cloud's prices in catalogs/v8/gcp/vms.csv of github.com/skypilot-org/skypilot-catalog at 006059e0"
_AWS = "EC2 Capacity Blocks pricing, aws.amazon.com/ec2/capacityblocks/pricing, a copy from late 2024"


def _on_demand(usd: float, region: str) -> Price:
    return Price(usd=usd, terms=f"on demand, Google Cloud {region}", read="2026-11-21", source=_GOOGLE)


def _reserved(usd: float, region: str) -> Price:
    return Price(usd=usd, terms=f"reserved for days, AWS {region}", read="2026-11-21", source=_AWS)


# Where sources disagree, a comment says so. Machines of v5e and v6e have 4 chips where a slice spans several, half of a
# physical host. What Google and NVIDIA call GB of memory is taken for GiB; drivers show up to 2 less (178 of a B200).
CHIPS = {
    "v4": Chip(
        tflops=275, int8_tops=275, cores=2, mxus=4, mxu=128, ghz=1.05, hbm_gib=32,
        hbm_gbs=1200,  # 1228 in the announcement of v5p
        links=6,
        ici_gbs=600,  # 50 for a link in one direction; the page's 24 TB/s between the halves of a pod come to 47
        torus=3, domain=4096, host_chips=4, pcie_gbs=16, price=_on_demand(3.22, "us-central2"),
        sources=(
            ("tflops int8_tops cores mxus hbm_gib hbm_gbs torus domain", _V4), ("ghz", _ISCA),
            ("devices mxu links host_chips pcie_gbs", _BOOK), ("ici_gbs", f"{_ANNOUNCED}: 2400 Gb/s in one direction"),
        ),
    ),
    "v5e": Chip(
        tflops=197, int8_tops=393, mxus=4, mxu=128, ghz=1.5, hbm_gib=16,
        hbm_gbs=819,  # some versions of the page say 800 GiB/s, which is 859
        links=4, ici_gbs=400, torus=2, domain=256,
        dcn_gbs=3.125,  # two NICs of 100 Gb/s for 8 chips
        host_chips=4, host_gib=192, pcie_gbs=15, price=_on_demand(1.2, "us-central1"),
        sources=(
            ("tflops int8_tops cores mxus hbm_gib hbm_gbs links ici_gbs", _V5E),
            ("torus domain dcn_gbs host_chips host_gib", _V5E), ("devices mxu ghz pcie_gbs", _BOOK),
        ),
    ),
    "v5p": Chip(
        tflops=459,
        int8_tops=918,  # not on the pages of the documentation
        fp8_tflops=459, cores=2, mxus=4, mxu=128,
        hbm_gib=95,  # 96 in the chip, of which 1 is kept by the system
        hbm_gbs=2765, links=6,
        ici_gbs=1200,  # older pages say 4800 Gb/s, which is one direction
        torus=3,
        domain=6144,  # a pod has 8960, the largest slice 6144
        dcn_gbs=6.25, host_chips=4, host_gib=448, pcie_gbs=15, price=_on_demand(4.2, "us-central1"),
        sources=(
            ("tflops fp8_tflops cores mxus hbm_gib hbm_gbs ici_gbs torus domain dcn_gbs host_chips host_gib", _V5P),
            ("int8_tops", f"{_ANNOUNCED}; {_BOOK}"), ("devices mxu links pcie_gbs", _BOOK),
        ),
    ),
    "v6e": Chip(
        tflops=918, int8_tops=1836, fp8_tflops=918, mxus=2, mxu=256, hbm_gib=32, hbm_gbs=1638, links=4, ici_gbs=800,
        torus=2, domain=256, dcn_gbs=12.5, host_chips=4, host_gib=720, pcie_gbs=32,
        price=_on_demand(2.7, "us-central1"),
        sources=(
            ("tflops int8_tops cores mxus mxu hbm_gib hbm_gbs links ici_gbs torus domain", _V6E),
            ("fp8_tflops dcn_gbs host_chips host_gib", _V7X), ("devices pcie_gbs", _BOOK),
        ),
    ),
    "v7x": Chip(  # no page with a price was found
        tflops=2307, fp8_tflops=4614, cores=2, devices=2, hbm_gib=192,
        hbm_gbs=7380,  # 7.2 and 7.37 TB/s in announcements
        links=6, ici_gbs=1200, torus=3, domain=9216, dcn_gbs=12.5, host_chips=4, host_gib=960,
        sources=(
            ("tflops fp8_tflops cores devices hbm_gib hbm_gbs ici_gbs domain dcn_gbs host_chips host_gib", _V7X),
            ("links torus", f"{_MAXTEXT}: AxBxC, with two links along every axis"),
        ),
    ),
    "a100": Chip(  # no page with a price was found for that of 80 GB
        tflops=312, int8_tops=624, hbm_gib=80, hbm_gbs=2039, links=12, ici_gbs=600, domain=8, host_chips=8, pcie_gbs=32,
        sources=(
            ("tflops int8_tops hbm_gib hbm_gbs ici_gbs pcie_gbs", _A100), ("links", _HOPPERS),
            ("domain host_chips", "A100 white paper, in jingchaozhang.github.io/A100-white-paper"),
        ),
    ),
    "h100": Chip(
        tflops=989, int8_tops=1979, fp8_tflops=1979, hbm_gib=80, hbm_gbs=3350, links=18, ici_gbs=900, domain=8,
        dcn_gbs=50, host_chips=8, host_gib=2048, pcie_gbs=64,
        price=_reserved(4.916, "us-east-2"),  # on demand 10.8 from Google, by the scaling book's section 8
        sources=(
            ("tflops int8_tops fp8_tflops hbm_gib hbm_gbs ici_gbs pcie_gbs", _H100),
            ("links", _HOPPERS), ("domain dcn_gbs host_chips host_gib", _BASEPOD),
        ),
    ),
    "h200": Chip(
        tflops=989, int8_tops=1979, fp8_tflops=1979, hbm_gib=141, hbm_gbs=4800, links=18, ici_gbs=900, domain=8,
        dcn_gbs=50, host_chips=8, host_gib=2048, pcie_gbs=64, price=_reserved(5.408, "us-east-2"),
        sources=(
            ("tflops fp8_tflops hbm_gib hbm_gbs", _HOPPERS), ("int8_tops", _H200), ("links ici_gbs pcie_gbs", _MLPERF),
            ("domain dcn_gbs host_chips host_gib", _BASEPOD),
        ),
    ),
    "b200": Chip(  # no page with a price was found
        tflops=2250, int8_tops=4500, fp8_tflops=4500, hbm_gib=180,
        hbm_gbs=8000,  # 7672 by the width and clock that the driver reports (github.com/pytorch/ao/pull/4002)
        links=18, ici_gbs=1800, domain=8, dcn_gbs=50, host_chips=8, host_gib=2048,
        pcie_gbs=64,  # the hosts have PCIe 5, the chips themselves PCIe 6
        sources=(
            ("tflops int8_tops fp8_tflops hbm_gbs", _BLACKWELL),
            ("hbm_gib ici_gbs domain dcn_gbs host_chips host_gib pcie_gbs", _DGX_B200),
            ("links", _HGX_B200),
        ),
    ),
    "gb200": Chip(  # no page with a price was found; sources disagree about the memory of a host
        tflops=2500, int8_tops=5000, fp8_tflops=5000, hbm_gib=186, hbm_gbs=8000, links=18, ici_gbs=1800, domain=72,
        host_chips=4,
        sources=(
            ("tflops int8_tops fp8_tflops hbm_gbs ici_gbs domain", _BLACKWELL),
            ("hbm_gib links host_chips", _MLPERF),
        ),
    ),
}  # fmt: skip

# parts of `device_kind`, the most specific first
_KINDS = (
    ("v5 lite", "v5e"), ("v5e", "v5e"), ("v5p", "v5p"), ("v5", "v5p"), ("v6", "v6e"), ("v7", "v7x"), ("tpu7x", "v7x"),
    ("v4", "v4"), ("a100", "a100"), ("h200", "h200"), ("h100", "h100"), ("gb200", "gb200"), ("b200", "b200"),
)  # fmt: skip

_ALIASES = {"v5litepod": "v5e", "tpu7x": "v7x"}  # in the names of slices


def chip_name(device_kind: str) -> str:
    """The short name of a device kind as jax reports it: "TPU v5 lite" is "v5e"; unknown kinds keep their own name."""
    kind = device_kind.lower()
    return next((name for part, name in _KINDS if part in kind), re.sub(r"\W+", "-", kind).strip("-"))


def slice_name(device_kind: str, num_devices: int) -> str:
    """The public name of this many devices: "v5p-1024" is 512 chips, "h100-16" two hosts, "cpu-8" is emulated."""
    chip = chip_name(device_kind)
    return f"{chip}-{num_devices * CHIPS[chip].cores // CHIPS[chip].devices if chip in CHIPS else num_devices}"


def parse_slice(name: str) -> tuple[str, int, tuple[int, ...], int]:
    """(kind of chip, chips of a slice, its shape if the name has it, slices) of a public slice name.

    `v5p-1024` counts cores, `v5p:8x8x8` gives the chips along every axis of the torus; `2x` or `2×` in front stands for
    several slices. The shape need not be one that is to be had. Of "cpu" the devices are counted.

    Raises:
      UserError: if the name has neither form.
    """
    match = re.fullmatch(r"(?:(\d+)[x×])?([a-z]\w*)(?:-(\d+)|:(\d+(?:x\d+)*))", name.lower())
    kind = _ALIASES.get(match[2], match[2]) if match else ""
    if not match or (kind not in CHIPS and kind != "cpu"):
        allowed = ", ".join([*CHIPS, "cpu"])
        raise UserError(
            f"unknown topology {name!r}; it is KIND-COUNT such as v5p-1024, or KIND:SHAPE such as v5p:8x8x8, with KIND "
            f"one of {allowed}"
        )
    slices = int(match[1] or 1)
    if slices < 1:
        raise UserError(f"topology {name!r}: there is at least 1 slice")
    if match[4]:
        shape, torus = tuple(map(int, match[4].split("x"))), CHIPS[kind].torus if kind in CHIPS else 0
        if len(shape) != torus or min(shape) < 1:
            form = f"{torus} sizes of at least 1, such as {kind}:{'x'.join('4' * torus)}"
            raise UserError(f"topology {name!r}: " + (f"{kind} has {form}" if torus else f"{kind} has no torus shapes"))
        return kind, math.prod(shape), shape, slices
    count, cores = int(match[3]), CHIPS[kind].cores if kind in CHIPS else 1
    if count < 1 or count % cores:
        raise UserError(f"topology {name!r}: {kind} counts {cores} per chip, so COUNT must be a multiple of {cores}")
    return kind, count // cores, (), slices


def parse_topology(name: str) -> tuple[str, int, int]:
    """(kind of chip, devices in all, slices) of a public slice name, see `parse_slice`.

    Raises:
      UserError: if the name has none of its forms.
    """
    kind, chips, _, slices = parse_slice(name)
    return kind, slices * chips * (CHIPS[kind].devices if kind in CHIPS else 1), slices


def peak_flops(devices: Sequence) -> float | None:
    """Dense bfloat16 FLOP/s of one of these devices, where it is known."""
    chip = chip_name(devices[0].device_kind)
    return CHIPS[chip].tflops * 1e12 / CHIPS[chip].devices if chip in CHIPS else None
