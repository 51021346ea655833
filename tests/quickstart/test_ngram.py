"""The yardsticks: the n-gram models against a loop written from the equation, and sources of known entropy."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrepro.data import PythonStdlib
from axrepro.quickstart.ngram import interpolated_bits_per_byte, xz_bits_per_byte

END = 256


class Loop:
    """Witten-Bell from its equation: a Counter of the symbols after each context, shorter ones included."""

    def __init__(self, train, order):
        self.order, self.after = order, defaultdict(Counter)
        for document in train:
            for context, symbol in self.events(document):
                for length in range(order + 1):
                    self.after[context[order - length :]][symbol] += 1

    def events(self, document):
        symbols = (END,) * self.order + tuple(document) + (END,)
        for i in range(self.order, len(symbols)):
            yield symbols[i - self.order : i], symbols[i]

    def probability(self, context, symbol):
        shorter = self.probability(context[1:], symbol) if context else 1 / 257
        after = self.after.get(context)
        if after is None:
            return shorter
        return (after[symbol] + len(after) * shorter) / (sum(after.values()) + len(after))

    def bits_per_byte(self, held_out):
        events = itertools.chain.from_iterable(map(self.events, held_out))
        return -sum(math.log2(self.probability(*event)) for event in events) / sum(map(len, held_out))


def few_symbols(alphabet):
    return st.lists(st.lists(st.sampled_from(alphabet), max_size=12).map(bytes), max_size=6)


# the highest bytes, in whose keys an overflow would show, and in the held-out documents one that training lacks
@settings(deadline=None)
@given(few_symbols(b"\x00a\xfe\xff"), few_symbols(b"\x00a\xff\x80").filter(any))
def test_the_loop_gives_the_same(train, held_out):
    expected = [Loop(train, order).bits_per_byte(held_out) for order in range(7)]
    assert interpolated_bits_per_byte(train, held_out, 6) == pytest.approx(expected, abs=1e-9)


def test_the_loop_gives_the_same_on_all_bytes():
    rng = np.random.default_rng(0)
    # the smaller of two bytes, so that some are rare
    documents = [rng.integers(0, 256, (2, size)).min(0).astype(np.uint8).tobytes() for size in (0, 1, 2, 700, 900, 0)]
    expected = [Loop(documents[1:4], order).bits_per_byte(documents) for order in range(5)]
    assert interpolated_bits_per_byte(documents[1:4], documents, 4) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("order", range(4))
def test_probabilities_of_the_loop_sum_to_one(order):
    loop = Loop([b"abracadabra", b"", b"bar"], order)
    for context in itertools.product([*b"abrz", END], repeat=order):  # seen, seen in part and not seen
        assert sum(loop.probability(context, symbol) for symbol in range(257)) == pytest.approx(1, abs=1e-12)


def test_by_hand():
    # after the empty context: a and the end, once each; after the end (the beginning) only a, after a only the end
    order_0 = (1 + 2 / 257) / 4
    order_1 = (1 + order_0) / 2
    expected = [-2 * math.log2(order_0), -2 * math.log2(order_1)]
    assert interpolated_bits_per_byte([b"a"], [b"a"], 1) == pytest.approx(expected, abs=1e-12)


def test_without_training_text_all_symbols_are_alike():
    assert interpolated_bits_per_byte([], [b"abc", b""], 2) == pytest.approx([math.log2(257) * 5 / 3] * 3, abs=1e-12)


def test_a_context_helps_when_it_reaches_back_to_the_cause():
    """Each byte is the last but one, or in one case of ten the other of two: only from order 2 on is it predictable."""
    flips = np.random.default_rng(0).random((100_000, 2)) < 0.1
    text = (ord("a") + np.cumsum(flips, axis=0) % 2).astype(np.uint8).tobytes()
    bits = interpolated_bits_per_byte([text[:100_000]], [text[100_000:]], 3)
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    # the mean of 100,000 code lengths has a standard deviation of 0.003; the models and one end cost less than that
    assert bits == pytest.approx([1, 1, entropy, entropy], abs=0.01)


def test_source_code_is_better_predicted_from_more_bytes():
    train, held_out = (
        [record["text"] for record in itertools.islice(PythonStdlib().open(split), count)]
        for split, count in (("train", 100), ("eval", 10))
    )
    bits = interpolated_bits_per_byte(train, held_out, 3)
    assert 6 > bits[0] > bits[1] > bits[2] > bits[3] > 1
    assert bits[0] - bits[2] > 1


def test_xz_finds_repetition_and_nothing_in_noise():
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
    # the container of the format takes less than 100 bytes, 0.04 bits per byte here
    assert 8 < xz_bits_per_byte([noise[:50], b"", noise[50:]]) < 8.1
    assert 4 < xz_bits_per_byte([noise, noise]) < 4.1


def test_what_cannot_be_measured_is_refused():
    for documents in ([], [b"", b""]):
        with pytest.raises(ValueError, match=f"{len(documents)} documents without a byte"):
            interpolated_bits_per_byte([b"a"], documents, 1)
        with pytest.raises(ValueError, match=f"{len(documents)} documents without a byte"):
            xz_bits_per_byte(documents)
    for order in (-1, 7):
        with pytest.raises(ValueError, match=f"max_order={order}"):
            interpolated_bits_per_byte([b"a"], [b"a"], order)
