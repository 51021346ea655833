"""Examples of any kind: records, transformed one by one and stacked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from axrepro.data.base import Data, Examples, Split
from axrepro.data.records import BadRecord, Example, Faults, Records, Source, Transform, apply_transforms
from axrepro.data.shuffle import permutation
from axrepro.data.transforms.pairs import PairTransform
from axrepro.errors import UserError, nearest, require

VALID = "valid"
# those that jax has without 64 bits
_TYPES = ("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32")
_WINDOW = 8  # blocks among which records are shuffled, where they are read in blocks


@dataclass(frozen=True, kw_only=True)
class Feature:
    """An array of an example that goes into the batch.

    Attributes:
      name: the field of the example.   shape, dtype: as NumPy writes them.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        try:
            valid = np.dtype(self.dtype).name in _TYPES and self.name != VALID
        except TypeError:
            valid = False
        require(self, "dtype", valid, f"one of {', '.join(_TYPES)}, with a name other than {VALID!r}")
        whole = all(isinstance(n, int) and n >= 0 for n in self.shape)
        require(self, "shape", whole, "whole numbers, which no example may change")


@dataclass(frozen=True, kw_only=True)
class Pipeline(Data):
    """Records that transforms turn into arrays of fixed shapes, stacked.

    An example and all that is drawn for it follow from the seed, the epoch and its number alone, so every host, worker
    and restart sees the same. A batch holds the features and `valid`, bool[B], False for padding: what fills up the
    last batch of the eval split, and the places of bad records.

    Attributes:
      source: where records come from.   transforms: from a record to an example.   features: what is kept of it.
      shuffle: whether the train split is shuffled in every epoch. Where records are read in blocks, blocks are
        shuffled, and their records among those of eight blocks.
      max_bad_records: how many bad ones a process may leave out; 0: the first one is an error.
    """

    source: Source
    features: tuple[Feature, ...]
    transforms: tuple[Transform | PairTransform, ...] = ()
    shuffle: bool = True
    max_bad_records: int = 0

    def __post_init__(self):
        super().__post_init__()
        require(self, "max_bad_records", self.max_bad_records >= 0, "a whole number, 0 or above")
        names = [feature.name for feature in self.features]
        require(self, "features", bool(names) and len(set(names)) == len(names), "at least one, each with its own name")

    def open(self, split: Split, seed: int) -> "Transformed":
        shuffle = self.shuffle and split == "train"
        seed = seed if split == "train" else 0
        faults = Faults(self.max_bad_records)
        return Transformed(self.source.open(split), self.transforms, self.features, seed, shuffle, faults)

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = {f.name: jax.ShapeDtypeStruct((self.batch_size, *f.shape), np.dtype(f.dtype)) for f in self.features}
        return arrays | {VALID: jax.ShapeDtypeStruct((self.batch_size,), np.dtype(bool))}

    @property
    def vocab_size(self) -> None:
        return None


class Transformed(Examples):
    """The examples of a `Pipeline`."""

    def __init__(
        self,
        records: Records,
        transforms: Sequence[Transform | PairTransform],
        features: Sequence[Feature],
        seed: int,
        shuffle: bool,
        faults: Faults,
    ):
        self._records, self._transforms, self._features = records, tuple(transforms), tuple(features)
        self._seed, self._shuffle, self._faults = seed, shuffle, faults

    def __len__(self) -> int:
        return len(self._records)

    @property
    def bad_records(self) -> Mapping[int, str]:
        return self._faults.seen

    def stats(self) -> dict[str, int]:
        return {"examples": len(self._records)}

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        out = {f.name: np.zeros((len(indices), *f.shape), f.dtype) for f in self._features}
        valid = np.zeros(len(indices), bool)
        epochs = indices // len(self)
        for epoch in sorted(set(epochs[indices >= 0].tolist())):
            chosen = np.flatnonzero((epochs == epoch) & (indices >= 0))
            records = self._order(indices[chosen] - epoch * len(self), epoch)
            for place, index, record in zip(chosen.tolist(), indices[chosen].tolist(), records.tolist(), strict=True):
                rng = np.random.default_rng((3, self._seed, index))
                try:
                    example = self.example(record, rng)
                    for feature in self._features:
                        out[feature.name][place] = self._feature(example, feature, record)
                    valid[place] = True
                except BadRecord as error:
                    self._faults.add(record if error.index is None else error.index, error)
                    for array in out.values():
                        array[place] = 0
        return {**out, VALID: valid}

    def example(self, record: int, rng: np.random.Generator) -> Example:
        """A record after all transforms. Raises BadRecord if it cannot be read, or one of them refuses it."""
        return self._made(record, self._transforms, rng)

    def _made(self, record: int, transforms: tuple[Transform | PairTransform, ...], rng) -> Example:
        example = self._records[record]
        for number, transform in enumerate(transforms):
            if not isinstance(transform, PairTransform):
                example = apply_transforms((transform,), example, rng, self._records.name(record))
            elif rng.random() < transform.probability:
                other = self._other(int(rng.integers(len(self))), transforms[:number], rng)
                mix = lambda one, rng, pair=transform, other=other: pair.mix(one, other, rng)
                example = apply_transforms((mix,), example, rng, self._records.name(record))
        return example

    def _other(self, record: int, transforms: tuple[Transform | PairTransform, ...], rng) -> Example:
        try:
            return self._made(record, transforms, rng)
        except BadRecord as error:
            error.index = record if error.index is None else error.index
            raise

    def _feature(self, example: Example, feature: Feature, record: int) -> np.ndarray:
        name = self._records.name(record)
        if feature.name not in example:
            raise UserError(f"{name} has no field {feature.name!r} in the end; {nearest(feature.name, example)}")
        try:
            value = np.asarray(example[feature.name])
        except ValueError as error:
            raise BadRecord(f"{name}: {feature.name!r} is no array: {error}") from None
        if value.shape != feature.shape:
            raise BadRecord(f"{name}: {feature.name!r} has shape {list(value.shape)}, not {list(feature.shape)}")
        if not np.can_cast(value.dtype, feature.dtype, "same_kind"):
            raise BadRecord(f"{name}: {feature.name!r} is {value.dtype}, which is no {feature.dtype}")
        if np.dtype(feature.dtype).kind in "iu" and (value.astype(feature.dtype) != value).any():
            raise BadRecord(
                f"{name}: {feature.name!r} has {value.min()} to {value.max()}, too much for {feature.dtype}"
            )
        return value

    def _order(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        """The numbers of records by their place in an epoch."""
        if not self._shuffle:
            return indices
        if self._records.blocks is None:
            return permutation(len(self), self._seed, epoch)(indices)
        return block_permutation(self._records.blocks, self._seed, epoch)(indices)


def block_permutation(blocks: np.ndarray, seed: int, epoch: int):
    """As `permutation`, but neighbours in the order are from few blocks: eight at a time, drawn at random.

    Args:
      blocks: int64[G + 1], where each block of records starts, and their number.
    """
    number = len(blocks) - 1
    order = permutation(number, seed, epoch, stream=1)(np.arange(number))
    starts = np.concatenate([[0], np.cumsum((blocks[1:] - blocks[:-1])[order])])  # in the shuffled order of blocks
    windows = np.append(starts[:-1:_WINDOW], starts[-1])

    def apply(indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        window = np.searchsorted(windows, indices, side="right") - 1
        out = np.empty_like(indices)
        for one in set(window.tolist()):
            here, first, size = window == one, windows[one], int(windows[one + 1] - windows[one])
            place = first + permutation(size, seed, epoch, stream=2 + one)(indices[here] - first)
            block = np.searchsorted(starts, place, side="right") - 1
            out[here] = blocks[order[block]] + place - starts[block]
        return out

    return apply
