"""Shuffled order without a shuffled list: a keyed bijection of 0 ... size-1, evaluated where it is needed."""

import math
from collections.abc import Callable

import numpy as np

# 0-d arrays: beside a small array they cost half the time of Python ints
_ONE, _S27, _S30, _S31, _M1, _M2, _GOLDEN = (
    np.array(value, np.uint64)
    for value in (1, 27, 30, 31, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15)  # the last: 2**64 / phi
)


def _mix(x: np.ndarray) -> np.ndarray:
    """uint64[N] hashed: the finaliser of SplitMix64 (Steele, Lea and Flood 2014). Products wrap around."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def permutation(size: int, seed: int, epoch: int, stream: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """A pseudorandom bijection of 0 ... size-1, as a function of int64[N] indices.

    A Feistel network on pairs (left, right) of a grid of a * b >= size points, in which each round adds to one half,
    modulo its range, a hash of the other. Values beyond `size`, which are few, are walked along their cycle until they
    are below it (Black and Rogaway 2002). It takes no memory, and its integers are the same on every platform.

    Args:
      seed, epoch, stream: any ints below 2**64; each gives another permutation. `stream` tells apart those that share a
        seed and an epoch.
    Raises:
      ValueError: if `size` is less than 1; from the function, if an index is outside 0 ... size-1.
    """
    if size < 1:
        raise ValueError(f"a permutation needs a size of at least 1, not {size}")
    a = max(2, math.isqrt(size))
    b = max(2, -(-size // a))
    a, b = np.array(a, np.uint64), np.array(b, np.uint64)
    rounds = 8 if size >= 1024 else 24  # with 8, some orders of 5 or 6 values came up far too often
    state = np.zeros(1, np.uint64)
    for value in (seed, epoch, stream):
        state = _mix((state + _GOLDEN) ^ np.array([value % 2**64], np.uint64))
    keys = _mix(state + np.arange(1, rounds + 1, dtype=np.uint64) * _GOLDEN)

    def scramble(x: np.ndarray) -> np.ndarray:
        left, right = x // b, x % b
        for i in range(rounds):
            # the hash is halved, so that the sum fits 64 bits
            if i % 2:
                left = (left + (_mix(right ^ keys[i]) >> _ONE)) % a
            else:
                right = (right + (_mix(left ^ keys[i]) >> _ONE)) % b
        return left * b + right

    def apply(indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < size):
            raise ValueError(f"indices {indices.min()} ... {indices.max()} are outside a permutation of {size}")
        out = scramble(indices.astype(np.uint64)).astype(np.int64)
        while (outside := out >= size).any():
            out[outside] = scramble(out[outside].astype(np.uint64)).astype(np.int64)
        return out

    return apply
