"""How long a collective takes on a torus of links, from where its devices stand.

Every chip has a link to both neighbours along each axis of the torus; an axis on which the outermost chips are joined
is a ring. A gather or a reduction sends parts along all axes at once. In an exchange each byte goes from its chip to
one other, so that links carry it on the way (scaling book, jax-ml.github.io/scaling-book/sharding, "A Deeper Dive").
Between slices, bytes go over the data centre's network.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from axrepro.aot.slices import Slice
from axrepro.train.hardware import CHIPS

HOP = 1e-6  # seconds from a chip to its neighbour (scaling book, "TPUs")
UNKNOWN_DCN = 1.0  # GB/s of a chip between slices, assumed where nothing is published (v4)

Places = tuple[tuple[int, ...], ...]
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Side:
    """What a group of devices has of one axis of the torus.

    Attributes:
      axis: which.   size: how many chips of the group stand on a line along it.   ring: whether they form one.
      stride: chips from one to the next; the links between them serve as many groups.
    """

    axis: int
    size: int
    ring: bool
    stride: int

    @property
    def hops(self) -> int:
        """To the farthest chip."""
        return self.stride * self.size // 2 if self.ring else self.stride * (self.size - 1)


@dataclass(frozen=True)
class Route:
    """How the devices of a group reach each other: along `sides` within a slice, and among how many `slices`.

    Attributes:
      size: devices of the group.   sharing: groups that have a device on the same chip (v7x, where a chip is two).
      ways: of a permutation, (axis, +1 or -1) wherever it sends.   load: how many of its pairs the most loaded link
        serves.   hops: of its longest pair.
    """

    sides: tuple[Side, ...]
    slices: int
    size: int
    sharing: int = 1
    ways: tuple[tuple[int, int], ...] = ()
    load: int = 0
    hops: int = 0


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
            sides.append(Side(axis, len(on_line), ring=wraps and whole, stride=stride))
    on_chip = len(where) // len(np.unique(where, axis=0))
    sharing = CHIPS[hardware.kind].devices // on_chip
    return Route(tuple(sides), len(np.unique(where[:, 0])), len(groups[0]), sharing)


@lru_cache(maxsize=1 << 10)
def shift(pairs: Groups, places: Places, hardware: Slice) -> Route:
    """The route of a permutation, axis after axis, the shorter way."""
    links: Counter[tuple[tuple[int, ...], int, int]] = Counter()
    slices, hops = 1, 0
    for source, target in pairs:
        here, there = list(places[source]), places[target]
        slices, far = max(slices, 1 + int(here[0] != there[0])), 0
        for axis, (length, wraps) in enumerate(zip(hardware.shape, hardware.wraps, strict=True)):
            step = there[1 + axis] - here[1 + axis]
            if wraps and abs(step) > length // 2:
                step -= length if step > 0 else -length
            way, far = 1 if step > 0 else -1, far + abs(step)
            for _ in range(abs(step)):
                links[tuple(here), axis, way] += 1
                here[1 + axis] = (here[1 + axis] + way) % length
        hops = max(hops, far)
    ways = tuple(sorted({(axis, way) for _, axis, way in links}))
    return Route((), slices, 2, ways=ways, load=max(links.values(), default=0), hops=hops)


def seconds(kind: str, size: float, over: Route, hardware: Slice) -> float:
    """How long a collective takes if nothing else uses its links, at the published bandwidths.

    Args:
      kind: "all-gather", ...   size: bytes of the whole array of one device (`Collective.bytes`).
    """
    chip = CHIPS[hardware.kind]
    if kind == "collective-permute":
        slow = size / ((chip.dcn_gbs or UNKNOWN_DCN) * 1e9) if over.slices > 1 else 0.0
        return slow + size * over.load / (chip.link_gbs * 1e9) + HOP * over.hops
    within = over.size // over.slices
    time = _within(kind, size, over, chip.link_gbs * 1e9)
    if over.slices > 1:
        # each chip sends its own part: what has been reduced, or is yet to be gathered, within the slice
        crossing = {"all-reduce": 2 * size / within, "all-to-all": size}.get(kind, size / within)
        time += crossing * (over.slices - 1) / over.slices / ((chip.dcn_gbs or UNKNOWN_DCN) * 1e9)
    hops = sum(side.hops for side in over.sides)
    return time + HOP * max(hops, 1) * (2 if kind == "all-reduce" else 1)


def _within(kind: str, size: float, over: Route, link: float) -> float:
    """Inside one slice."""
    if not over.sides:
        return 0.0
    chips = math.prod(side.size for side in over.sides)
    if kind in ("all-to-all", "ragged-all-to-all"):
        # of a line's pairs those that pass its middle; a ring has half as many, and half of them go either way
        middle = max((s.size**2 - s.size % 2) / (8 if s.ring else 4) / s.size * s.stride for s in over.sides)
        return size * over.size / over.slices / chips * over.sharing * middle / link
    ways = sum((2 if side.ring else 1) / side.stride for side in over.sides)
    share = 1.0 if kind == "collective-broadcast" else (chips - 1) / chips
    return (2 if kind == "all-reduce" else 1) * size * share * over.sharing / (ways * link)


def resources(over: Route) -> tuple[str, ...]:
    """What a collective occupies, by axis and direction: two that share one wait for each other."""
    network = ("network",) if over.slices > 1 else ()
    if over.ways:
        return (*(f"axis {axis}{'+' if way > 0 else '-'}" for axis, way in over.ways), *network)
    return (*(f"axis {side.axis}{way}" for side in over.sides for way in "+-"), *network)
