"""How long a collective takes on a torus of links, from where its devices stand.

Every chip has a link to both neighbours along each axis of the torus; an axis on which the outermost chips are joined
is a ring. A gather or a reduction sends parts along all axes at once. In an exchange each byte goes from its chip to
one other, so that links carry it on the way (scaling book, jax-ml.github.io/scaling-book/sharding, "A Deeper Dive").
Between slices, bytes go over the data centre's network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from axrepro.aot.slices import Slice
from axrepro.train.hardware import CHIPS

HOP = 1e-6  # seconds from a chip to its neighbour (scaling book, "TPUs")

Places = tuple[tuple[int, ...], ...]
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Side:
    """What a group of devices has of one axis of the torus.

    Attributes:
      axis: which.   size: how many chips of the group stand on a line along it.   ring: whether they form one.
      crowd: how many groups share its links, whose chips stand between each other's.
    """

    axis: int
    size: int
    ring: bool
    crowd: int


@dataclass(frozen=True)
class Route:
    """How the devices of a group reach each other: along `sides` within a slice, and among how many `slices`.

    Attributes:
      shift: of a permutation, (axis, chips that each goes along it), with its sign; the longest of its pairs.
    """

    sides: tuple[Side, ...]
    slices: int
    size: int
    shift: tuple[tuple[int, int], ...] = ()


@lru_cache(maxsize=1 << 10)
def route(groups: Groups, places: Places, hardware: Slice) -> Route:
    """The route of a collective's first group; the others lie alike.

    Args:
      places: (slice, coordinates) of each device, in the order of the mesh.
    """
    where = np.array([places[device] for device in groups[0]])
    sides = []
    for axis, (length, wraps) in enumerate(zip(hardware.shape, hardware.wraps, strict=True)):
        on_line = np.unique(where[:, 1 + axis])
        if len(on_line) > 1:
            stride = int(np.diff(on_line).min())
            whole = len(on_line) * stride == length
            sides.append(Side(axis, len(on_line), ring=wraps and whole, crowd=stride))
    return Route(tuple(sides), len(np.unique(where[:, 0])), len(groups[0]))


@lru_cache(maxsize=1 << 10)
def shift(pairs: Groups, places: Places, hardware: Slice) -> Route:
    """The route of a permutation."""
    longest: tuple[tuple[int, int], ...] = ()
    slices = 1
    for source, target in pairs:
        here, there = np.array(places[source]), np.array(places[target])
        slices = max(slices, 1 + int(here[0] != there[0]))
        steps = []
        for axis, (length, wraps) in enumerate(zip(hardware.shape, hardware.wraps, strict=True)):
            step = int(there[1 + axis] - here[1 + axis])
            if wraps and abs(step) > length // 2:
                step -= int(np.sign(step)) * length
            if step:
                steps.append((axis, step))
        longest = max(longest, tuple(steps), key=lambda steps: sum(abs(step) for _, step in steps))
    return Route((), slices, 2, longest)


def seconds(kind: str, size: float, over: Route, hardware: Slice) -> float:
    """How long a collective takes if nothing else uses its links, at the published bandwidths.

    Args:
      kind: "all-gather", ...   size: bytes of the whole array of one device (`Collective.bytes`).
    """
    chip = CHIPS[hardware.kind]
    if kind in ("collective-permute", "collective-broadcast"):
        hops = sum(abs(step) for _, step in over.shift)
        slow = size / ((chip.dcn_gbs or 1.0) * 1e9) if over.slices > 1 else 0.0
        # a link carries what all chips send that lie so far before it
        return slow + size * max((abs(step) for _, step in over.shift), default=0) / (chip.link_gbs * 1e9) + HOP * hops
    within = over.size // over.slices
    part = size
    if over.slices > 1 and kind in ("all-gather", "reduce-scatter", "all-reduce"):
        part = size / over.slices if kind != "all-reduce" else size
    time = _within(kind, part, over.sides, within, chip.link_gbs * 1e9)
    if over.slices > 1:
        # each chip sends its own part: what has been reduced, or is yet to be gathered, within the slice
        crossing = {"all-reduce": 2 * size / within, "all-to-all": size}.get(kind, size / within)
        time += crossing * (over.slices - 1) / over.slices / ((chip.dcn_gbs or 1.0) * 1e9)
    hops = sum(side.size // 2 if side.ring else side.size - 1 for side in over.sides)
    return time + HOP * max(hops, 1) * (2 if kind == "all-reduce" else 1)


def _within(kind: str, size: float, sides: Sequence[Side], devices: int, link: float) -> float:
    """Inside one slice."""
    if devices < 2 or not sides:
        return 0.0
    if kind in ("all-to-all", "ragged-all-to-all"):
        return max(size * side.size * side.crowd / (8 if side.ring else 4) for side in sides) / link
    ways = sum((2 if side.ring else 1) / side.crowd for side in sides)
    passes = 2 if kind == "all-reduce" else 1
    return passes * size * (devices - 1) / devices / (ways * link)


def resources(over: Route) -> tuple[str, ...]:
    """What a collective occupies, by axis and direction: two that share one wait for each other."""
    network = ("network",) if over.slices > 1 else ()
    if over.shift:
        return (*(f"axis {axis}{'+' if step > 0 else '-'}" for axis, step in over.shift), *network)
    return (*(f"axis {side.axis}{way}" for side in over.sides for way in "+-"), *network)
