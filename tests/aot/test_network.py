"""Times of collectives against simulations that move parts over links, one by one, or count what each link carries."""

import itertools
import math
from collections import defaultdict

import pytest

from axrepro.aot import network
from axrepro.aot.slices import Slice
from axrepro.train.hardware import CHIPS

MESH = Slice(kind="v5e", shape=(4, 4))  # no rings
TORUS = Slice(kind="v5p", shape=(4, 4, 4))
LONG = Slice(kind="v5p", shape=(4, 4, 8))
WIDE = Slice(kind="v6e", shape=(16, 16))
TWO = Slice(kind="v5p", shape=(4, 4, 4), slices=2)
SIZE = 2.0**30

Chip = tuple[int, ...]


def chips(of: Slice) -> list[Chip]:
    """Coordinates of all chips of a slice; a device's number is its place here."""
    return list(itertools.product(*map(range, of.shape)))


def places(of: Slice) -> tuple[tuple[int, ...], ...]:
    return tuple((index, *chip) for index in range(of.slices) for chip in chips(of))


def groups(of: Slice, **along: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Groups of devices: for every axis named x, y or z, those that are alike in what is left of the coordinate.

    Args:
      along: (size, stride) of the group along an axis.
    """
    found = defaultdict(list)
    for number, chip in enumerate(chips(of)):
        rest = []
        for axis, place in zip("xyz", chip, strict=False):
            size, stride = along.get(axis, (1, 1))
            rest.append((place % stride, place // (stride * size)))
        found[tuple(rest)].append(number)
    return tuple(map(tuple, found.values()))


def hop(of: Slice, chip: Chip, axis: int, way: int) -> Chip | None:
    """The neighbour, or None at the end of a line."""
    place = chip[axis] + way
    if not 0 <= place < of.shape[axis] and not of.wraps[axis]:
        return None
    return (*chip[:axis], place % of.shape[axis], *chip[axis + 1 :])


def loads(of: Slice, messages: list[tuple[int, int, float]]) -> dict[tuple[Chip, Chip], float]:
    """Bytes on every directed link: axis after axis, the shorter way, or both by halves where they are as long."""
    found: dict[tuple[Chip, Chip], float] = defaultdict(float)
    where = chips(of)
    for source, target, size in messages:
        parts = [(where[source], size)]
        for axis, length in enumerate(of.shape):
            goal, moved = where[target][axis], []
            for chip, amount in parts:
                ahead, back = (goal - chip[axis]) % length, (chip[axis] - goal) % length
                ways = {1: ahead, -1: back}
                if not of.wraps[axis]:
                    ways = {1: ahead} if goal >= chip[axis] else {-1: back}
                shortest = [way for way, hops in ways.items() if hops == min(ways.values())]
                for way in shortest:
                    at = chip
                    for _ in range(ways[way]):
                        after = hop(of, at, axis, way)
                        found[at, after] += amount / len(shortest)
                        at = after
                moved.append((at, amount))
            parts = moved
    return found


def gather_rounds(of: Slice, among: tuple[tuple[int, ...], ...], pieces: int) -> int:
    """Rounds that an all-gather of all groups takes, in each of which a link carries one piece each way.

    Each device starts with `pieces` of its own. Over every link goes the piece that fewest chips have, of those that
    its end lacks; only links between chips of a group, or between the chips of a group that stand on a line, serve.
    """
    where = chips(of)
    need: dict[Chip, set] = {chip: set() for chip in where}
    have: dict[Chip, set] = {chip: set() for chip in where}
    for number, group in enumerate(among):
        whole = {(number, device, piece) for device in group for piece in range(pieces)}
        box = [sorted({where[device][axis] for device in group}) for axis in range(len(of.shape))]
        # chips between those of a group pass its pieces on
        spans = [
            range(of.shape[a]) if of.wraps[a] and len(on) > 1 and len(on) * (on[1] - on[0]) == of.shape[a] else
            range(on[0], on[-1] + 1) for a, on in enumerate(box)
        ]  # fmt: skip
        between = set(itertools.product(*spans))
        lines = {
            chip for chip in between
            if sum(chip[axis] not in box[axis] for axis in range(len(of.shape))) <= 1
        }  # fmt: skip
        for chip in lines:
            need[chip] |= whole
        for device in group:
            have[where[device]] |= {(number, device, piece) for piece in range(pieces)}
    counts: dict[tuple, int] = defaultdict(int)
    for held in have.values():
        for piece in held:
            counts[piece] += 1
    wanted = {(chip, piece) for number, group in enumerate(among) for chip in (where[device] for device in group)
              for piece in need[chip] if piece[0] == number}  # fmt: skip
    links = [(chip, after) for chip in where for axis in range(len(of.shape)) for way in (1, -1)
             if (after := hop(of, chip, axis, way)) is not None]  # fmt: skip
    rounds = 0
    while any(piece not in have[chip] for chip, piece in wanted):
        rounds += 1
        coming: dict[Chip, set] = defaultdict(set)
        for chip, after in links:
            useful = (have[chip] & need[after]) - have[after] - coming[after]
            if useful:
                coming[after].add(min(useful, key=lambda piece: (counts[piece], piece)))
        for chip, found in coming.items():
            have[chip] |= found
            for piece in found:
                counts[piece] += 1
    return rounds


def bandwidth(of: Slice) -> float:
    return CHIPS[of.kind].link_gbs * 1e9


def latency(hops: int) -> float:
    return network.HOP * hops


def taken(kind: str, among, of: Slice, size: float = SIZE) -> float:
    return network.seconds(kind, size, network.route(among, places(of), of), of)


ROUTES = [
    pytest.param(MESH, {"x": (4, 1)}, 3, id="line-of-4"),
    pytest.param(LONG, {"z": (8, 1)}, 4, id="ring-of-8"),
    pytest.param(LONG, {"z": (4, 1)}, 3, id="half-of-a-ring"),
    pytest.param(LONG, {"z": (4, 2)}, 4, id="every-second-of-a-ring"),
    pytest.param(MESH, {"y": (2, 2)}, 2, id="every-second-of-a-line"),
    pytest.param(MESH, {"x": (4, 1), "y": (4, 1)}, 6, id="grid-of-4x4"),
    pytest.param(TORUS, {"x": (4, 1), "y": (4, 1)}, 4, id="torus-of-4x4"),
    pytest.param(TORUS, {"x": (4, 1), "y": (4, 1), "z": (4, 1)}, 6, id="torus-of-4x4x4"),
]


@pytest.mark.parametrize(("of", "along", "hops"), ROUTES)
def test_a_gather_takes_as_many_rounds_as_pieces_need_on_the_links(of, along, hops):
    among = groups(of, **along)
    pieces = 2
    piece = SIZE / len(among[0]) / pieces
    simulated = gather_rounds(of, among, pieces) * piece / bandwidth(of)
    found = taken("all-gather", among, of) - latency(hops)
    # a schedule can only be slower than the bound, and the last rounds do not use all links
    assert found <= simulated * (1 + 1e-9)
    competing = any(stride > 1 for _, stride in along.values())  # for links, which pieces then do not share evenly
    assert simulated <= found * (1.2 if competing else 1.07)
    # a reduction is a gather backwards in time, and an all-reduce is both
    assert taken("reduce-scatter", among, of) == pytest.approx(found + latency(hops))
    assert taken("all-reduce", among, of) == pytest.approx(2 * (found + latency(hops)))


@pytest.mark.parametrize(("of", "along", "hops"), [*ROUTES, pytest.param(WIDE, {"y": (16, 1)}, 8, id="ring-of-16")])
def test_an_exchange_takes_what_the_most_loaded_link_carries(of, along, hops):
    among = groups(of, **along)
    messages = [(a, b, SIZE / len(group)) for group in among for a in group for b in group]
    expected = max(loads(of, messages).values()) / bandwidth(of)
    for kind in ("all-to-all", "ragged-all-to-all"):
        assert taken(kind, among, of) - latency(hops) == pytest.approx(expected)


def moved(of: Slice, steps: dict[int, int], only: slice = slice(None), cyclic: bool = True):
    """(source, target) pairs: so many chips along axes; around the ends, or not at all."""
    numbers = {chip: number for number, chip in enumerate(chips(of))}
    pairs = []
    for chip, number in list(numbers.items())[only]:
        target = tuple(place + steps.get(axis, 0) for axis, place in enumerate(chip))
        if cyclic or target in numbers:
            pairs.append((number, numbers[tuple(p % n for p, n in zip(target, of.shape, strict=True))]))
    return tuple(pairs)


@pytest.mark.parametrize(
    ("of", "pairs", "hops"),
    [
        pytest.param(LONG, moved(LONG, {2: 1}), 1, id="next-of-a-ring"),
        pytest.param(LONG, moved(LONG, {2: -1}), 1, id="last-of-a-ring"),
        pytest.param(LONG, moved(LONG, {2: 3}), 3, id="three-along-a-ring"),
        pytest.param(LONG, moved(LONG, {2: 6}), 2, id="the-shorter-way"),
        pytest.param(TORUS, moved(TORUS, {0: 1, 1: 1}), 2, id="diagonal"),
        pytest.param(MESH, moved(MESH, {0: 1}, cyclic=False), 1, id="next-of-a-line"),
        pytest.param(MESH, moved(MESH, {0: 1}), 3, id="around-a-line"),
        pytest.param(LONG, moved(LONG, {2: 3}, slice(1)), 3, id="one-pair"),
    ],
)
def test_a_permutation_takes_what_the_most_loaded_link_carries(of, pairs, hops):
    expected = max(loads(of, [(a, b, SIZE) for a, b in pairs]).values()) / bandwidth(of)
    found = network.seconds("collective-permute", SIZE, network.shift(pairs, places(of), of), of)
    assert found == pytest.approx(expected + latency(hops))


def test_a_broadcast_takes_at_least_what_goes_into_a_chip():
    among = groups(LONG, z=(8, 1))
    assert taken("collective-broadcast", among, LONG) == pytest.approx(SIZE / (2 * bandwidth(LONG)) + latency(4))


def test_what_is_alone_sends_nothing():
    alone = groups(TORUS)
    for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all"):
        assert taken(kind, alone, TORUS) <= 2 * network.HOP


def test_small_collectives_take_the_way_to_the_farthest_chip():
    corner = [taken("all-gather", groups(of, **along), of, 0.0) for of, along in
              ((MESH, {"x": (4, 1), "y": (4, 1)}), (TORUS, {"x": (4, 1), "y": (4, 1), "z": (4, 1)}))]  # fmt: skip
    assert corner == pytest.approx([6 * network.HOP, 6 * network.HOP])


def across(within: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Groups of `TWO` that consist of one of a slice and the same chips of the other."""
    return (tuple(number + index * TWO.chips for index in range(2) for number in within),)


@pytest.mark.parametrize("along", [{}, {"x": (4, 1)}, {"x": (4, 1), "y": (4, 1), "z": (4, 1)}])
def test_between_slices_a_sum_is_a_scatter_and_a_gather_and_each_chip_receives_all_that_it_lacks(along):
    """A chip takes its share of what the other slice has over the data centre, and the rest from its neighbours."""
    within = groups(TWO, **along)[0]
    among, many = across(within), len(within)
    slow = SIZE / many / 2 / (CHIPS["v5p"].dcn_gbs * 1e9)
    hops = 2 * len(along)  # rings of 4
    fast = SIZE * (many - 1) / many / (2 * max(len(along), 1) * bandwidth(TWO))
    gathered = taken("all-gather", among, TWO)
    assert gathered == pytest.approx(slow + fast + latency(max(hops, 1)))
    assert taken("reduce-scatter", among, TWO) == pytest.approx(gathered)
    assert taken("all-reduce", among, TWO) == pytest.approx(2 * gathered)


def test_an_exchange_between_slices_sends_half_of_the_array_over_the_data_centre():
    found = taken("all-to-all", across((0,)), TWO)
    assert found == pytest.approx(SIZE / 2 / (CHIPS["v5p"].dcn_gbs * 1e9) + latency(1))


def test_two_devices_of_a_chip_share_its_links():
    """Of v7x a chip is two devices; here each forms groups with those of the same number on other chips."""
    pod = Slice(kind="v7x", shape=(4, 4, 4))
    twice = tuple((0, *chip) for chip in chips(pod) for _ in range(2))
    line = groups(pod, z=(4, 1))
    single = tuple(tuple(2 * chip + core for chip in group) for group in line for core in range(2))
    both = tuple(tuple(2 * chip + core for chip in group for core in range(2)) for group in line)
    link = bandwidth(pod)
    seconds = lambda kind, among: network.seconds(kind, SIZE, network.route(among, twice, pod), pod)
    assert seconds("all-gather", single) == pytest.approx(2 * SIZE * 3 / 4 / (2 * link) + latency(2))
    messages = [(a // 2, b // 2, SIZE / len(group)) for group in single for a in group for b in group]
    assert seconds("all-to-all", single) == pytest.approx(max(loads(pod, messages).values()) / link + latency(2))
    messages = [(a // 2, b // 2, SIZE / len(group)) for group in both for a in group for b in group]
    assert seconds("all-to-all", both) == pytest.approx(max(loads(pod, messages).values()) / link + latency(2))
    # what comes for one of two devices of a group that share a chip serves the other
    assert seconds("all-gather", both) == pytest.approx(SIZE * 3 / 4 / (2 * link) + latency(2))


def occupied(among, of: Slice) -> set[str]:
    return set(network.resources(network.route(among, places(of), of)))


def test_collectives_along_disjoint_axes_share_nothing():
    x, yz = groups(TORUS, x=(4, 1)), groups(TORUS, y=(4, 1), z=(4, 1))
    assert occupied(x, TORUS)
    assert occupied(yz, TORUS)
    assert occupied(x, TORUS).isdisjoint(occupied(yz, TORUS))
    assert not occupied(yz, TORUS).isdisjoint(occupied(groups(TORUS, z=(4, 1)), TORUS))


def test_only_collectives_between_slices_use_the_network_between_them():
    assert occupied(across((0,)), TWO) == {"network"}
    assert occupied(across((0,)), TWO).isdisjoint(occupied(groups(TWO, x=(4, 1)), TWO))
    assert "network" in occupied(across(groups(TWO, x=(4, 1))[0]), TWO)


def test_permutations_share_links_only_in_the_same_direction():
    used = lambda of, steps: set(network.resources(network.shift(moved(of, steps), places(of), of)))
    assert used(LONG, {2: 1}).isdisjoint(used(LONG, {2: -1}))
    assert used(LONG, {2: 1}).isdisjoint(used(LONG, {1: 1}))
    assert not used(LONG, {2: 1}).isdisjoint(used(LONG, {2: 2}))
    assert not used(LONG, {2: 1}).isdisjoint(occupied(groups(LONG, z=(8, 1)), LONG))
    # what leaves a line at its end comes back along all of it
    assert not used(MESH, {0: 1}).isdisjoint(used(MESH, {0: -1}))


def test_any_split_of_the_devices_is_routed_in_finite_time():
    for along in ({axis: split for axis, split in zip("xyz", splits, strict=True)} for splits in
                  itertools.combinations_with_replacement([(1, 1), (2, 1), (2, 2), (4, 1)], 3)):  # fmt: skip
        among = groups(TORUS, **along)
        size = math.prod(size for size, _ in along.values())
        assert {len(group) for group in among} == {size}
        gathered, summed = (taken(kind, among, TORUS) for kind in ("all-gather", "all-reduce"))
        assert 0 < gathered < math.inf
        assert summed == pytest.approx(2 * gathered)
        messages = [(a, b, SIZE / size) for group in among for a in group for b in group]
        worst = max(loads(TORUS, messages).values(), default=0.0) / bandwidth(TORUS)
        hops = network.HOP * 3 * 3
        assert worst <= taken("all-to-all", among, TORUS) <= worst + hops
