"""Language-model text: documents packed into rows of one length, nothing dropped."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from axrepro.data.base import Data, Examples, Split
from axrepro.data.shuffle import permutation
from axrepro.data.sources import Document, Source
from axrepro.data.vocabulary import Bytes, Vocabulary
from axrepro.errors import UserError, require_sizes

NAMES = ("tokens", "targets", "segment_ids", "positions")


class _Order(NamedTuple):
    """The documents of one epoch end to end, as a stream of (input, target) pairs; a last entry stands for padding.

    Attributes:
      starts: int64[D + 2], where each document starts in the stream, where padding does, and a bound behind it.
      places: int64[D + 1], where each document starts in the store.
      shuffled: from the number of a row in the epoch to its number in the stream.
    """

    starts: np.ndarray
    places: np.ndarray
    shuffled: Callable[[np.ndarray], np.ndarray]


class PackedText(Examples):
    """Rows of text, int32[N, T]: `tokens`, `targets`, `segment_ids` and `positions`.

    A document of n ids gives n + 1 pairs: inputs end-id, id 1 ... id n, and targets id 1 ... id n, end-id; so no pair
    crosses documents. In every epoch the documents are shuffled, their pairs laid end to end and cut into rows of T,
    and the rows shuffled: every pair occurs exactly once per epoch. The last row of the stream is padded. Where a row
    ends within a document, the rest of it is a segment of its own in another row.

    `segment_ids` number the documents of a row from 1 and are 0 for padding; `positions` count from 0 in each segment.

    The ids of the split lie in one array in memory, a byte each for `Bytes`, else two or four. The order of documents
    takes 24 bytes per document and epoch, two epochs at a time; a row is found by bisection in it.
    """

    def __init__(
        self, documents: Iterable[Document], vocabulary: Vocabulary, length: int, seed: int = 0, shuffle: bool = True
    ):
        """
        Args:
          length: T, pairs in a row.
        Raises:
          UserError: naming the document, if the vocabulary cannot encode it; or if there is none.
        """
        self._vocabulary = vocabulary
        self._length = length
        self._seed = seed
        self._shuffle = shuffle
        dtype = np.min_scalar_type(vocabulary.size - 1 - vocabulary.first_id)
        encoded = []
        self._bytes = 0
        for document in documents:
            encoded.append(self._encode(document).astype(dtype))
            self._bytes += len(document.data)
        if not encoded:
            raise UserError("the source gave no documents")
        self._sizes = np.array([len(ids) + 1 for ids in encoded], np.int64)
        self._places = np.cumsum(self._sizes) - self._sizes
        self._total = int(self._sizes.sum())
        # A place before each document and one after the last: pair p of a document then is store[p], store[p + 1]. The
        # end id goes into the batch only, since a byte has no value to spare for it.
        self._store = np.zeros(self._total + 1, dtype)
        for place, ids in zip(self._places, encoded, strict=True):
            self._store[place + 1 : place + 1 + len(ids)] = ids
        self._orders: dict[int, _Order] = {}

    def _encode(self, document: Document) -> np.ndarray:
        """Ids from 0, that is less `first_id`."""
        try:
            ids = self._vocabulary.encode(document.data)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{document.name} is not UTF-8 (byte {error.start}), which the vocabulary {self._vocabulary.name} "
                "needs; convert or remove it, or use Bytes"
            ) from None
        if ids.size and not (ids.min() >= self._vocabulary.first_id and ids.max() < self._vocabulary.size):
            raise ValueError(f"{self._vocabulary.name} gave ids {ids.min()} ... {ids.max()} for {document.name}")
        return ids - self._vocabulary.first_id

    def __len__(self) -> int:
        return -(-self._total // self._length)

    def stats(self) -> dict[str, int]:
        """`documents`, `tokens` (pairs per epoch: one end per document included), `bytes` before encoding, `rows`."""
        return {"documents": len(self._sizes), "tokens": self._total, "bytes": self._bytes, "rows": len(self)}

    def _order(self, epoch: int) -> _Order:
        if epoch not in self._orders:
            order, shuffled = np.arange(len(self._sizes)), lambda rows: rows
            if self._shuffle:
                order = permutation(len(order), self._seed, epoch, stream=0)(order)
                shuffled = permutation(len(self), self._seed, epoch, stream=1)
            # the row after the last, which padding examples show, ends before the bound
            starts = np.concatenate([[0], np.cumsum(self._sizes[order]), [self._total + 2 * self._length]])
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = _Order(starts, np.append(self._places[order], 0), shuffled)
        return self._orders[epoch]

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        epochs, rows = np.divmod(indices, len(self))
        padding = indices < 0
        epochs[padding] = epochs.max(initial=0)  # any epoch will do
        parts = {}
        for epoch in sorted(set(epochs.tolist())) or [0]:
            order, chosen = self._order(epoch), epochs == epoch
            real = chosen & ~padding
            rows[real] = order.shuffled(rows[real])
            rows[chosen & padding] = len(self)
            parts[epoch] = self._cut(order, rows[chosen])
        if len(parts) == 1:
            return parts[epoch]
        out = {name: np.empty((len(indices), self._length), np.int32) for name in NAMES}
        for epoch, arrays in parts.items():
            for name, values in arrays.items():
                out[name][epochs == epoch] = values
        return out

    def _cut(self, order: _Order, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one epoch, by their place in the stream."""
        first, last = rows * self._length, (rows + 1) * self._length
        low = np.searchsorted(order.starts, first, side="right") - 1
        counts = np.searchsorted(order.starts, last, side="left") - low
        # segments of all rows in one list: document, number in the row, and the pairs [begin, end) of the stream
        row = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        document = low[row] + number
        begin = np.maximum(order.starts[document], first[row])
        end = np.minimum(order.starts[document + 1], last[row])
        sizes = end - begin
        flat_end = np.cumsum(sizes)
        flat_begin = flat_end - sizes
        # tokens of all rows in one list
        flat = np.arange(len(rows) * self._length)
        shift = order.places[document] + begin - order.starts[document] - flat_begin
        place = flat + np.repeat(shift, sizes)
        first_id, eos = self._vocabulary.first_id, self._vocabulary.eos_id
        tokens = self._store.take(place, mode="clip").astype(np.int32) + first_id  # clip: padding points anywhere
        targets = self._store.take(place + 1, mode="clip").astype(np.int32) + first_id
        tokens[flat_begin[begin == order.starts[document]]] = eos
        targets[flat_end[end == order.starts[document + 1]] - 1] = eos
        segment_ids = np.repeat(number.astype(np.int32) + 1, sizes)
        positions = (flat - np.repeat(flat_begin, sizes)).astype(np.int32)
        for segment in np.flatnonzero(document == len(order.starts) - 2):
            padding = slice(flat_begin[segment], flat_end[segment])
            tokens[padding] = targets[padding] = self._vocabulary.pad_id
            segment_ids[padding] = positions[padding] = 0
        arrays = (tokens, targets, segment_ids, positions)
        return {name: array.reshape(-1, self._length) for name, array in zip(NAMES, arrays, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Text(Data):
    """Packed text for language models; see `PackedText`. Documents are read and encoded when a split is opened.

    Attributes:
      sequence_length: T, tokens in a row.
      source: where documents come from.   vocabulary: how they become ids.
      shuffle: whether documents and rows are shuffled; the eval split has one order for all seeds.
    """

    sequence_length: int
    source: Source
    vocabulary: Vocabulary = Bytes()
    shuffle: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_sizes(self, "sequence_length")

    def open(self, split: Split, seed: int) -> PackedText:
        # the first batches of the eval split should be a fair sample of it, and the same whatever the seed of the run
        seed = seed if split == "train" else 0
        text = PackedText(self.source.documents(split), self.vocabulary, self.sequence_length, seed, self.shuffle)
        if not (stats := text.stats())["bytes"]:
            raise UserError(f"all {stats['documents']} documents of {self.source} in the {split} split are empty")
        return text

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct((self.batch_size, self.sequence_length), np.int32) for name in NAMES}

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size
