"""Language-model text: documents packed into rows of one length, nothing dropped."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int64

from axrepro.data.base import Data, Examples, Split
from axrepro.data.packing import Concatenate, Packing
from axrepro.data.records import BadRecord, Example, Faults, Records, Source, Transform, apply_transforms
from axrepro.data.vocabulary import Bytes, Vocabulary
from axrepro.errors import UserError, nearest, require, require_sizes

NAMES = ("tokens", "targets", "segment_ids", "positions")


class Store(ABC):
    """The ids of all documents, looked up by document and place.

    Attributes:
      sizes: int64[D], ids of each document.
      raw_bytes: of all documents before they were encoded; 0: unknown, or not all ids count.
    """

    sizes: np.ndarray
    raw_bytes: int

    @abstractmethod
    def pairs(
        self, document: Int64[np.ndarray, " S"], begin: Int64[np.ndarray, " S"], size: Int64[np.ndarray, " S"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Pairs of segments, end to end: (inputs, targets, weights of targets or None: all 1, and which of the segments
        cannot be read, or None: all can).

        Pair p of a document is (id p - 1, id p). The caller puts end ids before the first and after the last id, where
        this gives anything.
        """


class MemoryStore(Store):
    """All ids in one array, a byte each for `Bytes`, else two or four."""

    def __init__(self, encoded: Sequence[tuple[np.ndarray, np.ndarray | None]], vocabulary: Vocabulary, raw_bytes: int):
        """
        Args:
          encoded: ids of each document, and the weight of each where they are not all 1.
        """
        self._first = vocabulary.first_id
        dtype = np.min_scalar_type(vocabulary.size - 1 - self._first)
        self.sizes = np.array([len(ids) for ids, _ in encoded], np.int64)
        # A place before each document and one after the last: pair p of a document then is store[p], store[p + 1].
        self._places = np.cumsum(self.sizes + 1) - self.sizes - 1
        self._ids = np.zeros(int(self.sizes.sum()) + len(encoded) + 1, dtype)
        weighted = any(weights is not None for _, weights in encoded)
        self._weights = np.ones(len(self._ids), np.float32) if weighted else None
        self.raw_bytes = 0 if any(w is not None and not w.all() for _, w in encoded) else raw_bytes
        for place, (ids, weights) in zip(self._places.tolist(), encoded, strict=True):
            self._ids[place + 1 : place + 1 + len(ids)] = ids - self._first
            if self._weights is not None and weights is not None:
                self._weights[place : place + len(ids)] = weights
                self._weights[place + len(ids)] = weights[-1] if len(ids) else 1  # of the end id

    def pairs(self, document, begin, size):
        ends = np.cumsum(size)
        place = np.arange(int(ends[-1]) if len(ends) else 0)
        place += np.repeat(self._places[document] + begin - ends + size, size)
        weights = None if self._weights is None else self._weights[place]
        take = lambda places: self._ids.take(places).astype(np.int32) + self._first
        return take(place), take(place + 1), weights, None


class RecordStore(Store):
    """Ids that are read from records when their rows are made; in memory are only the sizes."""

    raw_bytes = 0

    def __init__(self, records: Records, sizes: np.ndarray, vocabulary: Vocabulary, faults: Faults):
        self.sizes = sizes
        self._records, self._vocabulary, self._faults = records, vocabulary, faults

    def _ids(self, document: int) -> tuple[np.ndarray, np.ndarray | None]:
        ids, weights = encode(self._records[document], self._vocabulary, self._records, document, "text")
        if len(ids) != self.sizes[document]:
            raise BadRecord(
                f"{self._records.name(document)} has {len(ids)} tokens, but its index says {self.sizes[document]}"
            )
        return ids, weights

    def pairs(self, document, begin, size):
        ends = np.cumsum(size)
        total = int(ends[-1]) if len(ends) else 0
        inputs, targets, bad = np.zeros(total, np.int32), np.zeros(total, np.int32), np.zeros(len(size), bool)
        all_weights = None
        last, ids, weights = -1, None, None
        for i, (number, first, count, end) in enumerate(np.stack([document, begin, size, ends], 1).tolist()):
            if number != last:
                try:
                    ids, weights = self._ids(number)
                except BadRecord as error:
                    self._faults.add(number, error)
                    ids = None
                last = number
            if ids is None:
                bad[i] = True
                continue
            at = end - count
            skip = first == 0  # its input is the end id
            inputs[at + skip : end] = ids[first - 1 + skip : first + count - 1]
            part = ids[first : first + count]
            targets[at : at + len(part)] = part
            if weights is not None:
                if all_weights is None:
                    all_weights = np.ones(total, np.float32)
                all_weights[at : at + len(part)] = weights[first : first + count]
                if len(part) < count:
                    all_weights[end - 1] = weights[-1] if len(weights) else 1
        return inputs, targets, all_weights, bad


def encode(
    example: Example, vocabulary: Vocabulary, records: Records, index: int, field: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The ids of an example, and their weights in the loss where they are not all 1.

    It holds "tokens" (and "loss_mask" of the same length, if need be), or "parts", pairs of a text and whether it
    counts, each encoded by itself, or a text.

    Raises:
      BadRecord: naming the record, if it has none of them, or the vocabulary cannot encode it.
    """
    name = lambda: records.name(index)
    if "tokens" in example:
        ids, weights = _array(example["tokens"], "tokens", name), example.get("loss_mask")
        weights = None if weights is None else _array(weights, "loss_mask", name)
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not ids.size):
            raise BadRecord(f"{name()}: its tokens are {ids.dtype}{list(ids.shape)}, not a list of whole numbers")
        if weights is not None and weights.shape != ids.shape:
            raise BadRecord(f"{name()} has {len(ids)} tokens, but a loss_mask of shape {list(weights.shape)}")
        if weights is not None and weights.size and not (weights.dtype.kind in "biuf" and np.isfinite(weights).all()):
            raise BadRecord(f"{name()}: its loss_mask holds other things than finite numbers")
        if ids.size and not (ids.min() >= vocabulary.first_id and ids.max() < vocabulary.size):
            raise BadRecord(
                f"{name()} has tokens {ids.min()} ... {ids.max()}; those of the vocabulary {vocabulary.name} are "
                f"{vocabulary.first_id} ... {vocabulary.size - 1}"
            )
        return ids, None if weights is None else weights.astype(np.float32)
    if "parts" in example:
        if not _are_parts(example["parts"]):
            raise BadRecord(f"{name()}: its parts are {example['parts']!r:.40}, not pairs of a text and a number")
        parts = [(_encode(text, vocabulary, name), counts) for text, counts in example["parts"]]
        ids = np.concatenate([np.zeros(0, np.int32), *(part for part, _ in parts)])
        return ids, np.repeat(np.array([counts for _, counts in parts], np.float32), [len(part) for part, _ in parts])
    if field not in example:
        raise BadRecord(f"{name()} has no field {field!r}; {nearest(field, example)}")
    return _encode(example[field], vocabulary, name), None


def _array(value, field: str, name) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise BadRecord(f"{name()}: {field!r} is no array: {error}") from None


def _are_parts(parts) -> bool:
    pairs = isinstance(parts, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in parts)
    return pairs and all(isinstance(counts, (int, float, np.number, np.bool_)) for _, counts in parts)


def _encode(text, vocabulary: Vocabulary, name) -> np.ndarray:
    if not isinstance(text, (bytes, str)):
        raise BadRecord(f"{name()}: its text is {text!r:.40}, not a string")
    try:
        ids = vocabulary.encode(text)
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{name()} is not UTF-8 (byte {error.start}), which the vocabulary {vocabulary.name} "
            "needs; convert or remove it, or use Bytes"
        ) from None
    except UnicodeEncodeError as error:
        raise BadRecord(f"{name()} is not Unicode text: {error}") from None
    if ids.size and not (ids.min() >= vocabulary.first_id and ids.max() < vocabulary.size):
        raise ValueError(f"{vocabulary.name} gave ids {ids.min()} ... {ids.max()} for {name()}")
    return ids


class PackedText(Examples):
    """Rows of text, int32[N, T]: `tokens`, `targets`, `segment_ids` and `positions`, and float32 `loss_mask` if asked.

    A document of n ids gives n + 1 pairs: inputs end-id, id 1 ... id n, and targets id 1 ... id n, end-id; so no pair
    crosses documents. The packing lays all pairs of an epoch, each once, in rows of T; what is left of a row is padded.

    `segment_ids` number the documents of a row from 1 and are 0 for padding; `positions` count from 0 in each segment.
    """

    def __init__(
        self,
        store: Store,
        vocabulary: Vocabulary,
        length: int,
        seed: int = 0,
        shuffle: bool = True,
        packing: Packing = Concatenate(),
        loss_mask: bool = False,
        faults: Faults | None = None,
    ):
        """
        Args:
          length: T, pairs in a row.   faults: of the store's records.
        """
        self._store, self._vocabulary, self._length, self._loss_mask = store, vocabulary, length, loss_mask
        self._faults = Faults(0) if faults is None else faults
        self._plan = packing.plan(store.sizes + 1, length, seed, shuffle)

    def __len__(self) -> int:
        return self._plan.rows

    @property
    def bad_records(self) -> Mapping[int, str]:
        return self._faults.seen

    def stats(self) -> dict[str, int]:
        """`documents`, `tokens` (pairs per epoch: one end per document included), `bytes` before encoding, `rows`.

        There are no `bytes` where they are not known, or not all of them are to be predicted: bits per byte would mean
        nothing.
        """
        documents = len(self._store.sizes)
        stats = {"documents": documents, "tokens": int(self._store.sizes.sum()) + documents}
        return stats | ({"bytes": self._store.raw_bytes} if self._store.raw_bytes else {}) | {"rows": len(self)}

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        shape = (len(indices), self._length)
        out: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in NAMES}
        if self._loss_mask:
            out["loss_mask"] = np.zeros(shape, np.float32)
        if self._vocabulary.pad_id:
            out["tokens"][:] = out["targets"][:] = self._vocabulary.pad_id
        for chosen, epoch, rows in self._by_epoch(indices):
            self._fill(out, chosen, epoch, rows)
        return out

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """int64[N, T], the number of the document at each place of these rows; -1: padding."""
        indices = np.asarray(indices, np.int64)
        out = np.full((len(indices), self._length), -1)
        for chosen, epoch, rows in self._by_epoch(indices):
            row, document, _, size = self._plan.segments(epoch, rows)
            filled = np.arange(self._length) < np.bincount(row, size, len(rows))[:, None]
            part = np.full(filled.shape, -1)
            part[filled] = np.repeat(document, size)
            out[chosen] = part
        return out

    def _by_epoch(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """Which of the indices lie in an epoch, the epoch, and their rows in it."""
        epochs = indices // len(self)
        for epoch in sorted(set(epochs[indices >= 0].tolist())):
            chosen = np.flatnonzero((epochs == epoch) & (indices >= 0))
            yield chosen, epoch, indices[chosen] - epoch * len(self)

    def _fill(self, out: dict[str, np.ndarray], chosen: np.ndarray, epoch: int, rows: np.ndarray) -> None:
        """Writes rows of an epoch to the places `chosen` of the arrays."""
        row, document, begin, size = self._plan.segments(epoch, rows)
        tokens, targets, weights, bad = self._store.pairs(document, begin, size)
        flat_end = np.cumsum(size)
        flat_begin = flat_end - size
        eos = self._vocabulary.eos_id
        tokens[flat_begin[begin == 0]] = eos
        targets[flat_end[begin + size == self._store.sizes[document] + 1] - 1] = eos
        first = np.searchsorted(row, row)  # the first segment of each one's row
        number = np.arange(len(row)) - first + 1
        flat = np.arange(len(tokens))
        positions = flat - np.repeat(flat_begin, size)
        # where each pair goes in the arrays, rows end to end
        place = flat + np.repeat(chosen[row] * self._length - flat_begin[first], size)
        segment_ids = np.repeat(number, size)
        if bad is not None and bad.any():
            keep = np.repeat(~bad, size)
            tokens, targets, segment_ids, positions, place = (
                a[keep] for a in (tokens, targets, segment_ids, positions, place)
            )
            weights = None if weights is None else weights[keep]
        for name, values in zip(NAMES, (tokens, targets, segment_ids, positions), strict=True):
            out[name].reshape(-1)[place] = values
        if self._loss_mask:
            out["loss_mask"].reshape(-1)[place] = 1 if weights is None else weights
        elif weights is not None:
            raise UserError("some examples have a loss_mask: set loss_mask=True in the data")


class TransformedRows(Examples):
    """Rows to which transforms were applied, each with draws of its own: those of its global index."""

    def __init__(self, examples: Examples, transforms: Sequence[Transform], seed: int):
        self._examples, self._transforms, self._seed = examples, transforms, seed

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def bad_records(self) -> Mapping[int, str]:
        return self._examples.bad_records

    def stats(self) -> dict[str, int]:
        stats = self._examples.stats()
        return {name: stats[name] for name in stats if name != "bytes"}  # targets are no longer those of the text

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        asked = indices if len(indices) else np.array([-1])
        whole = self._examples.rows(asked)
        made = []
        for place, index in enumerate(asked.tolist()):
            rng = np.random.default_rng((2, self._seed, index + 1))
            row = {name: array[place] for name, array in whole.items()}
            made.append(apply_transforms(self._transforms, row, rng, f"row {index}"))
        for index, row in zip(asked.tolist(), made, strict=True):
            if (shapes := _shapes(row)) != _shapes(made[0]):
                raise UserError(
                    f"row_transforms gave row {index} the shapes {shapes}, and row {asked[0]} {_shapes(made[0])}; "
                    "those of all rows have to be the same"
                )
        return {name: np.stack([row[name] for row in made])[: len(indices)] for name in made[0]}


def _shapes(row: Example) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in row.items()}


@dataclass(frozen=True, kw_only=True)
class Text(Data):
    """Packed text for language models; see `PackedText`.

    Documents are read and encoded when a split is opened, and their ids kept in memory. Those of a source that holds
    tokens and knows how many (ArrayRecord files that `python -m axrepro.data convert` wrote) are read row by row.

    Attributes:
      sequence_length: T, tokens in a row.
      source: where documents come from.   vocabulary: how they become ids.   field: of the text in a record.
      transforms: of a record, before it is encoded (`encode` says what they leave); they draw once, not in each epoch.
      packing: how documents share rows.
      row_transforms: of a row, anew in every epoch.
      loss_mask: whether rows hold the weight of each target.
      shuffle: whether documents and rows are shuffled; the eval split has one order for all seeds.
      max_bad_records: how many bad ones a process may leave out; 0: the first one is an error.
    """

    sequence_length: int
    source: Source
    vocabulary: Vocabulary = Bytes()
    field: str = "text"
    transforms: tuple[Transform, ...] = ()
    packing: Packing = Concatenate()
    row_transforms: tuple[Transform, ...] = ()
    loss_mask: bool = False
    shuffle: bool = True
    max_bad_records: int = 0

    def __post_init__(self):
        super().__post_init__()
        require_sizes(self, "sequence_length")
        require(self, "max_bad_records", self.max_bad_records >= 0, "a whole number, 0 or above")
        for transform in (*self.transforms, *self.row_transforms):
            other = getattr(transform, "vocabulary", self.vocabulary)
            same = other == self.vocabulary
            require(self, "vocabulary", same, f"the vocabulary of its {type(transform).__name__}, {other!r}")

    def open(self, split: Split, seed: int) -> Examples:
        # the first batches of the eval split should be a fair sample of it, and the same whatever the seed of the run
        seed = seed if split == "train" else 0
        records, faults = self.source.open(split), Faults(self.max_bad_records)
        if records.vocabulary is not None and records.vocabulary[1] != self.vocabulary.fingerprint:
            name, fingerprint = records.vocabulary
            raise UserError(
                f"the tokens of {self.source} were made with the vocabulary {name} ({fingerprint:.8}), not with "
                f"{self.vocabulary.name} ({self.vocabulary.fingerprint:.8}); give that one, or tokenise anew"
            )
        if (sizes := records.sizes) is not None and not self.transforms:
            store = RecordStore(records, sizes, self.vocabulary, faults)
        else:
            store = self._encoded(records, split, seed, faults)
        rows = PackedText(
            store, self.vocabulary, self.sequence_length, seed, self.shuffle, self.packing, self.loss_mask, faults
        )
        return TransformedRows(rows, self.row_transforms, seed) if self.row_transforms else rows

    def _encoded(self, records: Records, split: Split, seed: int, faults: Faults) -> MemoryStore:
        encoded, raw_bytes = [], []
        for index in range(len(records)):
            try:
                example = records[index]
                if self.transforms:
                    rng = np.random.default_rng((1, seed, index))
                    example = apply_transforms(self.transforms, example, rng, records.name(index))
                ids, weights = encode(example, self.vocabulary, records, index, self.field)
            except BadRecord as error:
                faults.add(index, error)
                continue
            if weights is not None and not self.loss_mask:
                raise UserError(
                    f"{records.name(index)} has parts that do not count in the loss: set loss_mask=True in the data"
                )
            encoded.append((_narrow(ids, self.vocabulary), weights))
            raw_bytes.append(_raw_bytes(example, self.field))
        if not any(len(ids) for ids, _ in encoded):
            raise UserError(f"all {len(encoded)} documents of {self.source} in the {split} split are empty")
        return MemoryStore(encoded, self.vocabulary, 0 if None in raw_bytes else sum(raw_bytes))

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.batch_size, self.sequence_length)
        arrays = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in NAMES}
        if self.loss_mask:
            arrays["loss_mask"] = jax.ShapeDtypeStruct(shape, np.float32)
        if not self.row_transforms:
            return arrays
        row = {name: np.zeros(array.shape[1:], array.dtype) for name, array in arrays.items()}
        row = apply_transforms(self.row_transforms, row, np.random.default_rng(0), "a row of padding")
        as_array = lambda value: jax.ShapeDtypeStruct((self.batch_size, *np.shape(value)), np.asarray(value).dtype)
        return {name: as_array(value) for name, value in row.items()}

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size


def _narrow(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """In as few bytes as ids need, since all documents stand side by side until the last one is encoded."""
    return ids.astype(np.min_scalar_type(vocabulary.size - 1))


def _raw_bytes(example: Example, field: str) -> int | None:
    """Of the text that was encoded; None if it came as tokens."""
    if "tokens" in example:
        return None
    texts = [text for text, _ in example["parts"]] if "parts" in example else [example[field]]
    return sum(len(text.encode(errors="replace") if isinstance(text, str) else text) for text in texts)
