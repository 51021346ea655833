"""MinHash against exact Jaccard similarities, and its groups against loops over all pairs."""

import ast
import inspect
import itertools
import textwrap
from pathlib import Path

import numpy as np
import pytest

from axrepro.data.tools.minhash import MinHash, groups, normalised, shingles
from axrepro.errors import UserError

pytest.importorskip("datasketch", reason="needs the extra beam")

RNG = np.random.default_rng(0)


def functions() -> list[str]:
    """Functions of the standard library of 60 words or more."""
    found = []
    for module in (ast, inspect, textwrap):
        text = Path(module.__file__).read_text()
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        found += ["\n".join(text.split("\n")[node.lineno - 1 : node.end_lineno]) for node in nodes]
    return [text for text in found if len(text.split()) >= 60]


def edited(text: str, edits: int) -> str:
    words = text.split()
    for place in RNG.choice(len(words), edits, replace=False):
        words[place] = f"edit{RNG.integers(10**6)}"
    return " ".join(words)


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    some = functions()[:60]
    return [normalised(text) for text in some + [edited(text, edits) for text in some for edits in (1, 2, 4, 8)]]


def test_estimates_are_the_exact_similarities_within_their_deviation(texts):
    hashing = MinHash(permutations=256)
    signatures = np.stack([hashing.signature(text) for text in texts])
    sets = [set(shingles(text, hashing.shingle)) for text in texts]
    errors, deviations = [], []
    for i, j in itertools.combinations(range(len(texts)), 2):
        exact = jaccard(sets[i], sets[j])
        if 0.05 < exact < 1:
            errors.append((signatures[i] == signatures[j]).mean() - exact)
            deviations.append(np.sqrt(exact * (1 - exact) / 256))
    ratio = np.array(errors) / np.array(deviations)
    assert len(ratio) > 400
    assert abs(ratio.mean()) < 0.3, "pairs share hashes, so they are not independent"
    assert 0.7 < ratio.std() < 1.3
    assert np.abs(ratio).max() < 5


def test_near_duplicates_are_those_of_all_pairs(texts):
    hashing = MinHash(threshold=0.7)
    signatures = np.stack([hashing.signature(text) for text in texts])
    ids = np.random.default_rng(1).permutation(len(texts)).astype(np.int64)
    found = set()
    for keys in hashing.band_keys(signatures):
        for group in groups(keys, ids):
            found |= set(ids[group[hashing.similar_to_earlier(signatures[group])]].tolist())
    sets, surely, perhaps = [set(shingles(text, 5)) for text in texts], set(), set()
    for i, j in itertools.combinations(range(len(texts)), 2):
        similarity, later = jaccard(sets[i], sets[j]), int(max(ids[i], ids[j]))
        if similarity >= 0.7 + 0.16:  # four deviations of the estimate
            surely.add(later)
        if similarity >= 0.7 - 0.16:
            perhaps.add(later)
    assert surely <= found <= perhaps
    assert len(surely) > 40
    assert len(perhaps) < len(texts)


def test_the_bands_find_almost_all_that_reaches_the_threshold():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands, rows = MinHash(threshold=threshold).bands
        assert bands * rows <= 128
        reach = np.linspace(threshold, 1, 50)
        assert (1 - (1 - reach**rows) ** bands).mean() > 0.95, (threshold, bands, rows)


def test_band_keys_are_equal_where_all_rows_of_the_band_are():
    hashing = MinHash()
    bands, rows = hashing.bands
    signatures = RNG.integers(0, 2, (300, 128)).astype(np.uint32)
    signatures[RNG.random((300, 128)) < 0.9] = 1
    keys = hashing.band_keys(signatures)
    assert keys.shape == (bands, 300)
    equal = 0
    for band in range(bands):
        part = signatures[:, band * rows : band * rows + rows]
        for i, j in itertools.combinations(range(0, 300, 3), 2):
            assert (keys[band, i] == keys[band, j]) == (part[i] == part[j]).all()
            equal += keys[band, i] == keys[band, j]
    assert equal > 100
    assert len({hashing.band_keys(np.array([[n] * 128], np.uint32))[0, 0] for n in range(100)}) == 100


def test_groups_are_those_of_a_dict_and_by_ascending_id():
    keys, ids = RNG.integers(0, 40, 100).astype(np.uint64), RNG.permutation(100).astype(np.int64)
    expected = {}
    for key, number in zip(keys.tolist(), ids.tolist(), strict=True):
        expected.setdefault(key, []).append(number)
    found = [ids[group].tolist() for group in groups(keys, ids)]
    assert sorted(found) == sorted(sorted(group) for group in expected.values() if len(group) > 1)
    assert groups(keys[:0], ids[:0]) == []


def test_similar_to_earlier_is_a_loop_over_all_pairs():
    hashing = MinHash(threshold=0.6, permutations=8)
    for _ in range(30):
        signatures = RNG.integers(0, 3, (25, 8)).astype(np.uint32)
        expected = [any((signatures[i] == signatures[j]).mean() >= 0.6 for i in range(j)) for j in range(25)]
        assert hashing.similar_to_earlier(signatures).tolist() == expected


def test_texts_that_differ_in_case_space_or_compatible_characters_are_one():
    assert normalised("Ａ  ﬁne\n\tDay ") == normalised(b"a fine day") == "a fine day"
    assert normalised(b"\xff") != normalised(b"\xfe")
    assert normalised("a b") != normalised("ab")
    assert shingles("a b", 5) == [b"a b"]
    assert shingles("a b c", 2) == [b"a b", b"b c"]
    assert shingles("", 5) == [b""]


@pytest.mark.parametrize("fields", [{"threshold": 0.0}, {"threshold": 1.5}, {"permutations": 1}, {"shingle": 0}])
def test_what_makes_no_signature_is_refused(fields, unchecked):
    with pytest.raises(UserError, match=rf"MinHash\.{next(iter(fields))}="):
        MinHash(**fields)
