"""TPU slices without TPUs: their shapes, and the devices that a program is compiled for ahead of time.

Which slices there are is told by docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} and, for the slices that their
tables leave out, by `accelerator_to_spec_map.py` of github.com/AI-Hypercomputer/maxtext.
"""

import itertools
import math
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import jax

from axrepro.errors import UserError
from axrepro.train.hardware import CHIPS, parse_slice, slice_name

Shape = tuple[int, ...]

_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LONGEST = 256  # no listed slice has a longer side

# the compiler asks neither a metadata server nor the lock of another process, nor complains that it does not know where
# it is; what is said of this machine does not reach the programs
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Chips that links join to a grid, or several such slices with the data centre's network between them.

    Attributes:
      kind: of the chips, a name in CHIPS.   shape: chips along every axis of one slice, whose torus is not twisted.
      slices: how many there are.
    """

    kind: str
    shape: Shape
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """As jax counts them, in all."""
        return self.slices * self.chips * CHIPS[self.kind].devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which axes are rings: of v5e and v6e those of 16 chips, of the others all or none, as whole cubes are there.

        So the page on v5p and the scaling book (jax-ml.github.io/scaling-book/tpus); that on v4 promises a torus only
        where it can also be twisted.
        """
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3


@cache
def shapes(kind: str) -> tuple[Shape, ...]:
    """All slices of a kind of chip: fewest chips first, of as many that next to a cube or square first."""
    chip = CHIPS[kind]
    if chip.torus == 2:
        return _SQUARES
    sides = range(4, min(chip.domain // 16, _LONGEST) + 1, 4)
    cubes = [
        (a, b, c)
        for a, b in itertools.combinations_with_replacement(sides, 2)
        for c in range(b, min(chip.domain // (a * b), _LONGEST) + 1, 4)
    ]
    single = ((1, 1, 1),) if kind == "v7x" else ()
    return *single, *_PARTS_OF_A_CUBE, *sorted(cubes, key=lambda s: (math.prod(s), s[2] - s[0], s))


def _written(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _allowed(kind: str) -> str:
    if CHIPS[kind].torus == 2:
        return f"there are {', '.join(map(_written, _SQUARES))}"
    return f"above 2x4x4 they are AxBxC with A<=B<=C, multiples of 4, and at most {CHIPS[kind].domain} chips"


def _nearest(kind: str, chips: int) -> str:
    """The names of the slices with the next smaller, or as many, and the next larger number of chips."""
    by_chips = {math.prod(shape): shape for shape in reversed(shapes(kind))}
    counts = sorted(by_chips)
    near = [n for n in counts if n <= chips][-1:] + [n for n in counts if n > chips][:1]
    return " and ".join(f"{slice_name(kind, n * CHIPS[kind].devices)} ({_written(by_chips[n])})" for n in near)


def find_slice(topology: str) -> Slice:
    """The slice of a public name: v5p-1024, 2xv6e-256, v5p:4x8x16. Without a shape it is that next to a cube or square.

    Raises:
      UserError: for a name that is none, chips that form no torus, or a slice that is not to be had.
    """
    kind, chips, shape, slices = parse_slice(topology)
    kinds = [name for name, chip in CHIPS.items() if chip.torus]
    if kind not in kinds:
        raise UserError(f"topology {topology!r}: there are slices of {', '.join(kinds)}, not of {kind}")
    found = [s for s in shapes(kind) if s == shape or (not shape and math.prod(s) == chips)]
    if not found:
        raise UserError(
            f"topology {topology!r}: there is no {kind} slice of {_written(shape) if shape else f'{chips} chips'}; "
            f"{_allowed(kind)}; the nearest are {_nearest(kind, chips)}"
        )
    return Slice(kind=kind, shape=found[0], slices=slices)


def devices(of: Slice) -> list[jax.Device]:
    """Devices of a slice, for which programs can be compiled here, and not run; `slice_index` tells several apart.

    Raises:
      UserError: where the compiler is not installed, or refuses the slice.
    """
    if find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs their compiler: pip install axrepro[tpu]")
    from jax.experimental import topologies

    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    chip = CHIPS[of.kind]
    name = f"{'tpu7x' if of.kind == 'v7x' else of.kind}:{_written(of.shape)}"
    try:
        return list(
            topologies.get_topology_desc(
                name,
                "tpu",
                num_slices=of.slices,
                chips_per_host_bounds=(1, 1, 1) if of.chips == 1 else (2, 2, 1),
                # a v4 chip would be two devices, and no axis a ring, unless they are asked for (libtpu 0.0.42)
                chip_config_name="megacore" if chip.cores > chip.devices else "default",
                wrap=(*of.wraps, False)[:3],
            ).devices
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler refuses {name}: {' '.join(str(error).split())[:300]}") from None
