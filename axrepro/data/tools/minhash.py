"""Near-duplicate documents by MinHash signatures, as Lee et al. (arXiv:2107.06499, Sec. 4.2 and Appendix A) find them.

The Jaccard similarity of two documents is that of their sets of n-grams of words. A signature estimates it; documents
that share a band of their signatures are candidates, and candidates are compared by their whole signatures.
"""

import unicodedata
import zlib
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from jaxtyping import Bool, Int64, UInt32, UInt64

from axrepro.data.shuffle import _mix
from axrepro.errors import UserError, is_number, require, require_sizes


def normalised(text: str | bytes) -> str:
    """A text with all that exact duplicates may differ in taken away: compatible characters, case and white space.

    Bytes that are not UTF-8 are written as escapes, so that they tell texts apart.
    """
    text = text.decode(errors="backslashreplace") if isinstance(text, bytes) else text
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str, size: int) -> list[bytes]:
    """The n-grams of the words of a normalised text, of which a shorter text is one by itself."""
    words = text.encode(errors="surrogatepass").split(b" ")
    return [b" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1))]


def _datasketch():
    try:
        import datasketch
    except ImportError:
        raise UserError("near-duplicates need the package datasketch: pip install axrepro[beam]") from None
    return datasketch


@cache
def _empty(permutations: int):
    """The sketch of no shingles; to make its permutations takes longer than those of a page."""
    return _datasketch().MinHash(permutations, seed=1, scheme="affine32", hashfunc=zlib.crc32)


@dataclass(frozen=True)
class MinHash:
    """How similar documents are, and from where on they are duplicates.

    The estimate from P permutations has the standard deviation √(J(1-J)/P): 0.035 at J = 0.8 for 128.

    Attributes:
      threshold: estimated Jaccard similarity from which on two documents are duplicates.
      permutations: P, numbers in a signature, 4 bytes each.
      shingle: words in an n-gram. Text without spaces between words, such as Chinese, is one word a sentence or so, and
        is found only where whole sentences agree.
    """

    threshold: float = 0.8
    permutations: int = 128
    shingle: int = 5

    def __post_init__(self):
        require_sizes(self, "permutations", "shingle")
        require(self, "permutations", self.permutations >= 2, "at least 2")
        allowed = is_number(self.threshold) and 0 < self.threshold <= 1
        require(self, "threshold", allowed, "a similarity above 0, up to 1")

    @cached_property
    def bands(self) -> tuple[int, int]:
        """(bands, rows of each) of which documents of the similarity `threshold` share one band or more.

        datasketch minimises the weighted integrals of the chances of a false candidate below the threshold, and of a
        missed one above. A missed one weighs nine times more, since false candidates are only compared in vain.
        """
        lsh = _datasketch().MinHashLSH(self.threshold, self.permutations, weights=(0.1, 0.9))
        return lsh.b, lsh.r

    def signature(self, text: str) -> UInt32[np.ndarray, " P"]:
        """Of a normalised text.

        datasketch computes it, with crc32 in place of its SHA-1, which took four fifths of the time; it mixes the bits
        itself.
        """
        sketch = _empty(self.permutations).copy()
        sketch.update_batch(shingles(text, self.shingle))
        return sketch.hashvalues

    def band_keys(self, signatures: UInt32[np.ndarray, "N P"]) -> UInt64[np.ndarray, "bands N"]:
        """A hash of each band of each signature."""
        bands, rows = self.bands
        keys = np.zeros((bands, len(signatures)), np.uint64)
        for row in range(rows):
            keys = _mix(keys + signatures[:, row : bands * rows : rows].T.astype(np.uint64) + np.uint64(row + 1))
        return keys

    def similar_to_earlier(self, signatures: UInt32[np.ndarray, "N P"]) -> Bool[np.ndarray, " N"]:
        """Of candidates in order: whether one before it, itself a duplicate or not, is similar to each."""
        found = np.zeros(len(signatures), bool)
        open_ = np.arange(1, len(signatures))  # to none so far; in a group of true duplicates soon nothing
        for number in range(len(signatures)):
            open_ = open_[np.searchsorted(open_, number, side="right") :]
            if not len(open_):
                break
            similar = (signatures[open_] == signatures[number]).mean(axis=1) >= self.threshold
            found[open_[similar]] = True
            open_ = open_[~similar]
        return found


def groups(keys: UInt64[np.ndarray, " N"], ids: Int64[np.ndarray, " N"]) -> list[Int64[np.ndarray, " G"]]:
    """The positions of two or more documents with one key, each group by ascending id."""
    order = np.lexsort((ids, keys))
    starts = np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1])) if len(keys) else np.zeros(0, int)
    sizes = np.diff(np.append(starts, len(keys)))
    return [order[start : start + size] for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True)]
