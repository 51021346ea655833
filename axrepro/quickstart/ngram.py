"""What counting and compressing reach: yardsticks for the held-out bits per byte of a byte-level language model."""

import lzma
from collections.abc import Iterator, Sequence

import numpy as np

_END = 256  # the symbol after the last byte; also the context before the first
_SYMBOLS = 257
_LONGEST = 6  # an order of 6 has keys of 7 symbols, and 257**8 is beyond int64


def interpolated_bits_per_byte(train: Sequence[bytes], held_out: Sequence[bytes], max_order: int) -> list[float]:
    """Code length of the held-out documents under n-gram models with 0 ... `max_order` bytes of context, one each.

    Interpolated Witten-Bell estimates (Witten and Bell 1991; Chen and Goodman 1998, section 2.5), counted in `train`:
        p(c | h) = (n(h, c) + T(h) p(c | h')) / (n(h) + T(h)),
    where n counts, T(h) is how many distinct symbols follow h, and h' is h without its oldest byte; below the empty
    context lies 1/257. After an h that `train` does not have, p(c | h) = p(c | h').

    The 257th symbol is the end, which each document has to predict after its bytes. It also stands in for the bytes
    before the first, so no context reaches into another document. The ends' bits are part of the code length, which is
    divided by the number of held-out bytes without them.

    Raises:
      ValueError: if `max_order` is outside 0 ... 6, or `held_out` has no bytes.
    """
    if not 0 <= max_order <= _LONGEST:
        raise ValueError(f"max_order={max_order}: it is at least 0 and at most {_LONGEST}")
    size = _size(held_out)
    probs, bits = np.array(1 / _SYMBOLS), []
    for counted, coded in zip(_ngrams(train, max_order), _ngrams(held_out, max_order), strict=True):
        probs = _interpolate(probs, counted, coded)
        bits.append(float(-np.log2(probs).sum() / size))
    return bits


def xz_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Bits that `xz -9` needs per byte of the documents, joined without marks between them.

    It sees these documents alone. A model that was fitted on other documents has an advantage over it.

    Raises:
      ValueError: if there are no bytes.
    """
    return 8 * len(lzma.compress(b"".join(documents), preset=9)) / _size(documents)


def _size(documents: Sequence[bytes]) -> int:
    size = sum(map(len, documents))
    if not size:
        raise ValueError(f"bits per byte of {len(documents)} documents without a byte; give some that have text")
    return size


def _ngrams(documents: Sequence[bytes], max_order: int) -> Iterator[np.ndarray]:
    """For each order k, a key int64[N] per symbol to predict: itself and the k before it in base 257, oldest first."""
    before, end = np.full(max_order, -1, np.int16), np.full(1, _END, np.int16)
    parts = [part for document in documents for part in (before, np.frombuffer(document, np.uint8), end)]
    stream = np.concatenate([before, *parts])  # `before` alone where there are no documents
    predicted = np.flatnonzero(stream >= 0)
    stream[stream < 0] = _END
    keys = np.zeros(predicted.size, np.int64)
    for order in range(max_order + 1):
        keys = keys + stream[predicted - order] * np.int64(_SYMBOLS**order)
        yield keys


def _interpolate(shorter: np.ndarray, counted: np.ndarray, coded: np.ndarray) -> np.ndarray:
    """p(c | h) for the keys (h, c) in `coded`, from all keys of the training text and `shorter`, p(c | h')."""
    keys, counts = np.unique(counted, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # how many n-grams are below each key
    # all n-grams with the context h lie between h * 257 and (h + 1) * 257
    context = coded // _SYMBOLS * _SYMBOLS
    start, stop = np.searchsorted(keys, context), np.searchsorted(keys, context + _SYMBOLS)
    here, after = np.searchsorted(keys, coded), np.searchsorted(keys, coded, side="right")
    distinct, total, count = stop - start, below[stop] - below[start], below[after] - below[here]
    shorter = np.broadcast_to(shorter, coded.shape)
    return np.divide(count + distinct * shorter, total + distinct, out=shorter.copy(), where=total > 0)
