"""Several data sets in one batch, at rates that may change with the step."""

import itertools
import math
import operator
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from axrepro.data.base import Cursor, Data, Examples, Split
from axrepro.data.stream import Stream
from axrepro.errors import UserError, require, require_positive, require_sizes


@dataclass(frozen=True, kw_only=True)
class Part:
    """A data set of a mixture, or a domain of several: its data then is a mixture itself.

    Attributes:
      name: what reports call it.   data: its batch size is that of the mixture.
      rate: its share of the examples, relative to the other parts'.
    """

    name: str
    data: Data
    rate: float = 1.0

    def __post_init__(self):
        require(self, "name", bool(self.name) and "/" not in self.name, "a name without /")
        require(self, "rate", math.isfinite(self.rate) and self.rate >= 0, "a number, 0 or above")


class Rates(ABC):
    """A frozen dataclass that says what share of the examples each part has at a step."""

    @abstractmethod
    def at(self, step: int, rates: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Shares of the parts, relative to each other.

        Args:
          rates: float64[P], `Part.rate`.   sizes: float64[P], tokens of the parts, or examples where they have none.
        """

    def check(self, parts: Sequence[str]) -> None:
        """Raises UserError if it cannot be used for these parts."""


@dataclass(frozen=True)
class Fixed(Rates):
    """`Part.rate` at all steps."""

    def at(self, step, rates, sizes):
        return rates


@dataclass(frozen=True, kw_only=True)
class Temperature(Rates):
    """rate * min(size, limit)^(1 / temperature) (arXiv:1910.10683, Sec. 3.5.2): 1 is by size, more is more even."""

    temperature: float = 1.0
    limit: int | None = None

    def __post_init__(self):
        require_positive(self, "temperature")
        require_sizes(self, "limit")

    def at(self, step, rates, sizes):
        sizes = np.minimum(sizes, np.inf if self.limit is None else self.limit)
        # at most 1, so that no power is infinite; only sizes that do not count are above the largest that does
        return rates * np.minimum(sizes / sizes[rates > 0].max(), 1) ** (1 / self.temperature)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The rates of all parts, in their order, from a step on."""

    step: int
    rates: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Curriculum(Rates):
    """Rates that change with the step; `Part.rate` is not used.

    Attributes:
      stages: by step, the first at 0.
      linear: go from each stage to the next in a line, not at once.
    """

    stages: tuple[Stage, ...]
    linear: bool = False

    def __post_init__(self):
        steps = [stage.step for stage in self.stages]
        rising = bool(steps) and steps[0] == 0 and all(a < b for a, b in itertools.pairwise(steps))
        require(self, "stages", rising, "stages in the order of their steps, the first at step 0")

    def check(self, parts):
        for stage in self.stages:
            positive = all(math.isfinite(rate) and rate >= 0 for rate in stage.rates) and sum(stage.rates) > 0
            if len(stage.rates) != len(parts) or not positive:
                raise UserError(
                    f"the stage at step {stage.step} has rates {stage.rates}; it takes a number of 0 or above for each "
                    f"of {', '.join(parts)}, not all 0"
                )

    def at(self, step, rates, sizes):
        steps, shares = [stage.step for stage in self.stages], np.array([stage.rates for stage in self.stages], float)
        shares /= shares.sum(1, keepdims=True)
        if self.linear:
            return np.array([np.interp(step, steps, column) for column in shares.T])
        return shares[np.searchsorted(steps, step, side="right") - 1]


@dataclass(frozen=True, kw_only=True)
class Mixture(Data):
    """Batches of several data sets: of each about its share of every batch, and its examples in their own order.

    With share p and batch size B, a batch holds p B of a part, rounded up or down; over many batches the counts differ
    from the sum of the shares by a few examples. The counts are exact in the logs (`data/NAME`). The eval split holds
    every part's once.

    The position of every part is in the checkpoint, so a run resumes where it was, also with other rates, another batch
    size or number of hosts.

    Attributes:
      parts: data sets, or domains that are mixtures themselves: their parts share the domain's rate.
      rates: of the parts at a step.
      sequence_length: in place of that of all parts.
    """

    parts: tuple[Part, ...]
    rates: Rates = Fixed()
    sequence_length: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require_sizes(self, "sequence_length")
        names = [part.name for part in self.parts]
        require(self, "parts", bool(names) and len(set(names)) == len(names), "at least one, each with its own name")
        own = isinstance(self.rates, Curriculum) or sum(part.rate for part in self.parts) > 0
        require(self, "parts", own, "a rate above 0 in one of them")
        self.rates.check(names)
        for part in self.parts:
            if isinstance(part.data, Stream) or part.data.workers:
                what = "a stream, which is not looked up" if isinstance(part.data, Stream) else "workers of its own"
                raise UserError(f"the part {part.name!r} has {what}; a mixture takes neither (it has workers itself)")

    def _data(self, part: Part) -> Data:
        changes: dict[str, Any] = {"batch_size": self.batch_size}
        if self.sequence_length is not None:
            if not hasattr(part.data, "sequence_length"):
                raise UserError(f"the part {part.name!r} has no sequence_length that the mixture's could replace")
            changes["sequence_length"] = self.sequence_length
        return replace(part.data, **changes)

    def leaves(self) -> dict[str, Data]:
        """The data sets of all levels, by the names on the way to them, with "/" between."""
        found: dict[str, Data] = {}
        for part in self.parts:
            data = self._data(part)
            below = data.leaves() if isinstance(data, Mixture) else {"": data}
            found |= {f"{part.name}/{name}".rstrip("/"): leaf for name, leaf in below.items()}
        return found

    def shares(self, step: int, sizes: Mapping[str, float]) -> np.ndarray:
        """float64[leaves], of every data set at a step, in the order of `leaves`; their sum is 1.

        Args:
          sizes: of the data sets, by name.
        """
        below: list[np.ndarray] = []
        totals = []
        for part in self.parts:
            if isinstance(part.data, Mixture):
                prefix = f"{part.name}/"
                inner = {name[len(prefix) :]: size for name, size in sizes.items() if name.startswith(prefix)}
                below.append(part.data.shares(step, inner))
                totals.append(sum(inner.values()))
            else:
                below.append(np.ones(1))
                totals.append(sizes[part.name])
        shares = self.rates.at(step, np.array([part.rate for part in self.parts]), np.array(totals, float))
        return np.concatenate([share * some for share, some in zip(shares / shares.sum(), below, strict=True)])

    def open(self, split: Split, seed: int) -> Examples:
        """Those of all parts, each in its own order and spread evenly, so that the first ones are of all parts too."""
        return _Joined(self._opened(split, seed))

    def _opened(self, split: Split, seed: int) -> dict[str, Examples]:
        opened = {}
        for name, data in self.leaves().items():
            try:
                # parts of one size must not be shuffled alike
                opened[name] = data.open(split, (seed + zlib.crc32(name.encode())) % 2**63)
            except UserError as error:
                raise UserError(f"the part {name!r}: {error}") from None
        return opened

    def cursor(self, split: Split, seed: int) -> Cursor:
        if split == "eval":
            return super().cursor(split, seed)
        return MixtureCursor(self, self._opened(split, seed), seed)

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        leaves = self.leaves()
        (first, data), *others = leaves.items()
        arrays = data.abstract()
        for name, other in others:
            if (found := other.abstract()) != arrays:
                raise UserError(f"the parts of a mixture give the same arrays; {first} gives {arrays}, {name} {found}")
            one, two = (getattr(each, "vocabulary", each.vocab_size) for each in (data, other))
            if one != two:
                raise UserError(f"the parts of a mixture share a vocabulary; {first} has {one}, {name} {two}")
        return arrays

    @property
    def vocab_size(self) -> int | None:
        return next(iter(self.leaves().values())).vocab_size

    def describe(self) -> str:
        return f"Mixture of {', '.join(self.leaves())}"


class _Joined(Examples):
    """Examples of several kinds: number k of a part of n stands at (k + 1/2) / n of an epoch."""

    def __init__(self, parts: Mapping[str, Examples]):
        self._parts = list(parts.values())
        self._sizes = np.array([len(part) for part in self._parts])
        places = np.concatenate([(np.arange(size) + 0.5) / size for size in self._sizes.tolist()])
        order = np.argsort(places, kind="stable")
        self._part = np.repeat(np.arange(len(self._parts)), self._sizes)[order]
        self._number = np.concatenate([np.arange(size) for size in self._sizes.tolist()])[order]

    def __len__(self) -> int:
        return len(self._part)

    @property
    def bad_records(self) -> Mapping[int, str]:
        # numbers of records in different parts may be equal
        seen = [reason for part in self._parts for reason in part.bad_records.values()]
        return dict(enumerate(seen))

    def stats(self) -> dict[str, int]:
        return _joined_stats(self._parts)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        epochs, places = np.divmod(indices, len(self))
        part = self._part[places]
        own = self._number[places] + epochs * self._sizes[part]
        return gather(self._parts, part, np.where(indices < 0, -1, own))


def _joined_stats(parts: Sequence[Examples]) -> dict[str, int]:
    """The sums of what all of them have."""
    stats = [part.stats() for part in parts]
    names = [name for name in stats[0] if all(name in one for one in stats)]
    return {name: sum(one[name] for one in stats) for name in names}


def gather(
    parts: Sequence[Examples], part: np.ndarray, indices: np.ndarray, note: Callable[[int], None] = lambda part: None
) -> dict[str, np.ndarray]:
    """Row n is example `indices[n]` of `parts[part[n]]`; `note` is told which part is read next."""
    out: dict[str, np.ndarray] = {}
    for number in sorted(set(part.tolist())) or [0]:
        here = np.flatnonzero(part == number)
        note(number)
        for name, rows in parts[number].rows(indices[here]).items():
            if name not in out:
                out[name] = np.empty((len(indices), *rows.shape[1:]), rows.dtype)
            out[name][here] = rows
    return out


class MixtureCursor(Cursor):
    """Where each part of a mixture stands."""

    def __init__(self, mixture: Mixture, parts: Mapping[str, Examples], seed: int):
        self._mixture, self._parts, self._seed = mixture, dict(parts), seed
        self.arrays = mixture.abstract()
        for name, examples in parts.items():
            if not len(examples):
                raise UserError(f"the part {name!r} has no examples")
        self._sizes = {name: float(_size(examples)) for name, examples in parts.items()}
        self._batch = 0
        self._next: np.ndarray = np.zeros(len(parts), np.int64)
        self._reading = ""

    @property
    def ended(self) -> bool:
        return False

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """The part of each row of the current batch, and its number there."""
        size = self._mixture.batch_size
        ends = np.cumsum(self._mixture.shares(self._batch, self._sizes))
        # systematic sampling; its offsets go round by the golden ratio, which spreads the roundings evenly over steps
        offset = (np.random.default_rng((4, self._seed)).random() + self._batch * (math.sqrt(5) - 1) / 2) % 1
        part = np.searchsorted(ends[:-1], (np.arange(size) + offset) / size, side="right")
        part = np.random.default_rng((4, self._seed, self._batch)).permutation(part)
        by_part = np.argsort(part, kind="stable")
        number = np.empty(size, np.int64)
        number[by_part] = np.arange(size) - np.searchsorted(part[by_part], part[by_part])
        return part, self._next[part] + number

    def rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        part, number = self._plan()
        return gather(list(self._parts.values()), part[start:stop], number[start:stop], self._note)

    def _note(self, part: int) -> None:
        self._reading = list(self._parts)[part]

    def advance(self) -> None:
        part, _ = self._plan()
        self._next += np.bincount(part, minlength=len(self._next))
        self._batch += 1

    @property
    def bad_records(self) -> Mapping[str, str]:
        return {
            f"{name}/{index}": reason
            for name, examples in self._parts.items()
            for index, reason in examples.bad_records.items()
        }

    def stats(self) -> dict[str, int]:
        return _joined_stats(list(self._parts.values()))

    def counts(self) -> dict[str, int]:
        return dict(zip(self._parts, self._next.tolist(), strict=True))

    def reading(self) -> str:
        return self._reading or self._mixture.describe()

    def position(self) -> dict:
        return {"next_batch": self._batch, "next_example": self.counts()}

    def seek(self, position: Mapping) -> None:
        try:
            batch, counts = operator.index(position["next_batch"]), dict(position["next_example"])
            following = np.array([operator.index(counts[name]) for name in self._parts], np.int64)
        except (KeyError, TypeError, ValueError, OverflowError):
            batch, counts, following = -1, {}, np.zeros(0)
        if batch < 0 or len(counts) != len(self._parts) or (following < 0).any():
            raise UserError(
                f"{position!r:.200} is no position of a mixture of {', '.join(self._parts)}; it has next_batch and, in "
                "next_example, the number of each of these"
            )
        self._batch, self._next = batch, following


def _size(examples: Examples) -> int:
    return examples.stats().get("tokens") or len(examples)
