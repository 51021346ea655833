"""Objectives that move text about: span corruption and prefixes, on packed rows; fill-in-the-middle, on documents.

Row transforms take a packed row of T tokens ("tokens", "targets", "segment_ids", "positions") and give arrays whose
shapes follow from T alone. The sentinels are the highest ids of the vocabulary, the first of them the highest, as in
T5; no text may give them (`extra_ids`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from axrepro.data.records import Example
from axrepro.data.vocabulary import Vocabulary
from axrepro.errors import UserError, is_number, nearest, require, require_choice


@lru_cache(maxsize=64)
def _sentinels(vocabulary: Vocabulary, count: int) -> Int32[np.ndarray, " K"]:
    """The ids of the first `count` sentinels.

    Raises:
      UserError: if text or an end has one of these ids.
    """
    ids = np.arange(vocabulary.size - 1, vocabulary.size - 1 - count, -1, dtype=np.int32)
    taken = (vocabulary.eos_id, vocabulary.pad_id)
    used = (i for i, id_ in enumerate(ids.tolist()) if id_ < 0 or id_ in taken or vocabulary.decode([id_]))
    if (free := next(used, count)) < count:
        raise UserError(
            f"{count} sentinels are needed, and of the highest ids of the vocabulary {vocabulary.name} only {free} "
            "stand for nothing yet; take one with more extra_ids"
        )
    return ids


def _pad(pieces: Sequence[np.ndarray], length: int, fill: int = 0) -> np.ndarray:
    """The pieces end to end, and `fill` behind them."""
    out = np.full(length, fill, np.int32)
    joined = np.concatenate([np.zeros(0, np.int32), *pieces])
    out[: len(joined)] = joined
    return out


def _numbered(pieces: Sequence[np.ndarray], length: int) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
    """The `segment_ids` and `positions` of the pieces end to end."""
    segment_ids = _pad([np.full(len(piece), number) for number, piece in enumerate(pieces, 1)], length)
    return segment_ids, _pad([np.arange(len(piece)) for piece in pieces], length)


def _prefix_masks(
    positions: Int32[np.ndarray, " T"], segment_ids: Int32[np.ndarray, " T"], sizes: Int[np.ndarray, " T"]
) -> tuple[Bool[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """What every token of its segment sees, and what is learnt, where the first `sizes` tokens are the prefix.

    A token of the prefix but the last is followed by one that it sees, so nothing is learnt there.
    """
    real = segment_ids > 0
    return real & (positions < sizes), real & (positions >= sizes - 1)


def _cut(total: int, parts: int, rng: np.random.Generator) -> Int64[np.ndarray, " K"]:
    """`total` as a sum of `parts` sizes of 1 or more, all such sums being equally likely."""
    places = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], places, [total]]))


def _share(total: int, weights: np.ndarray, least: np.ndarray, most: np.ndarray) -> Int64[np.ndarray, " G"]:
    """`total` in whole shares between `least` and `most`, in proportion to `weights` (Webster's method)."""
    shares = np.clip(total * weights // weights.sum(), least, most)
    while (left := total - shares.sum()) > 0:
        shares[np.argmax(np.where(shares < most, weights / (shares + 0.5), -1))] += 1
    while left < 0:
        shares[np.argmin(np.where(shares > least, weights / (shares - 0.5), np.inf))] -= 1
        left += 1
    return shares


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Spans of the text are taken out, a sentinel standing for each, and are what is learnt.

    T5 (arXiv:1910.10683, Sec. 3.1.4 and Fig. 2). As in its code, text and noise alternate, beginning with text and
    ending with noise; numbers of noise tokens and spans follow from the length; their sizes are drawn such that all
    are equally likely; inputs and targets both end with the end-id, which in targets has the place of the paper's final
    sentinel. A departure: targets are preceded by the end-id, as all rows here are, and not by padding.

    T5 cuts its examples from one stream of documents, which see one another. Here, with `documents="apart"`, each
    segment of a row is a complete example: sentinels from the first, ends of its own, no span across a border, and
    segment ids on both sides. The row's noise tokens and spans are shared out by length. An end for each segment costs
    room, and the arrays have the lengths of T5's for T tokens: so a row of G segments has up to G / 2 spans fewer than
    one of a single segment, and where it has more than 2/3 as many segments as spans (documents of fewer than 30
    tokens, at the defaults), less noise too; the shortest segments may then be left out (4 of 40 documents of 13
    tokens). For such data there is `"together"`: the row is one stream as in T5, ends of documents in it included.

    Encoder and decoder, from rows of T tokens (568 give T5's 512 and 114):
      `inputs`, `inputs_segment_ids`, `inputs_positions`: int32[T - noise + spans + 1], what the encoder reads.
      `tokens`, `targets`, `segment_ids`, `positions`: int32[noise + spans + 1], what the decoder reads and predicts.
    One decoder (`causal_lm`): inputs and targets of a segment behind one another, all four int32[T + 2 spans + 2], and
    `loss_mask`, bool, True on the targets. `prefix_lm` adds `prefix`, bool, True on the inputs.

    Attributes:
      vocabulary: the one of the text; its highest ids are the sentinels.
      noise_density: share of the tokens that is taken out.   mean_span_length: tokens per span, on average.
      form: for which network.   documents: what the documents of a row see of one another.
    """

    vocabulary: Vocabulary
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    form: Literal["encoder_decoder", "prefix_lm", "causal_lm"] = "encoder_decoder"
    documents: Literal["apart", "together"] = "apart"

    def __post_init__(self):
        density, span = self.noise_density, self.mean_span_length
        require(self, "noise_density", is_number(density) and 0 < density < 1, "a number between 0 and 1")
        allowed = is_number(span) and span >= 1 and density / span <= 1 - density
        require(self, "mean_span_length", allowed, "a number from 1 on, so large that text is left between the spans")
        require_choice(self, "form", Literal["encoder_decoder", "prefix_lm", "causal_lm"])
        require_choice(self, "documents", Literal["apart", "together"])

    def _noise(self, size: int) -> tuple[int, int]:
        """Noise tokens and spans of a text of 2 or more tokens."""
        noise = min(max(round(size * self.noise_density), 1), size - 1)
        return noise, min(max(round(noise / self.mean_span_length), 1), noise, size - noise)

    def lengths(self, size: int) -> tuple[int, int]:
        """Lengths of inputs and targets for rows of `size` tokens, their ends included."""
        noise, spans = self._noise(max(size, 2))
        return max(size, 2) - noise + spans + 1, noise + spans + 1

    def __call__(self, row: Example, rng: np.random.Generator) -> Example:
        """
        Raises:
          UserError: if the vocabulary lacks sentinels, or part of the text is not to be learnt.
        """
        if "loss_mask" in row:
            raise UserError("SpanCorruption learns any part of a text, and this text has parts that are only read")
        length, (inputs_length, targets_length) = len(row["targets"]), self.lengths(len(row["targets"]))
        sentinels = _sentinels(self.vocabulary, self._noise(max(length, 2))[1])
        end = np.array([self.vocabulary.eos_id], np.int32)
        texts = self._texts(row)
        inputs, targets = [], []
        for number, noise, spans in self._shares(np.array([len(text) for text in texts], np.int64), length):
            kept, taken = _cut(len(texts[number]) - noise, spans, rng), _cut(noise, spans, rng)
            pieces = np.split(texts[number], np.cumsum(np.stack([kept, taken], 1).ravel())[:-1])
            marks = np.split(sentinels[:spans], spans)
            pairs = lambda first, second: [x for pair in zip(first, second, strict=True) for x in pair]
            inputs.append(np.concatenate([*pairs(pieces[0::2], marks), end]))
            targets.append(np.concatenate([*pairs(marks, pieces[1::2]), end]))
        if self.form == "encoder_decoder":
            pad = self.vocabulary.pad_id
            segment_ids, positions = _numbered(inputs, inputs_length)
            read = {"inputs_segment_ids": segment_ids, "inputs_positions": positions}
            return {"inputs": _pad(inputs, inputs_length, pad), **read, **self._rows(targets, targets_length)}
        both = [np.concatenate(pair) for pair in zip(inputs, targets, strict=True)]
        out = self._rows(both, inputs_length + targets_length)
        # the end-id before the inputs belongs to them
        sizes = _pad(
            [np.full(len(all_), len(read) + 1) for all_, read in zip(both, inputs, strict=True)], len(out["tokens"])
        )
        prefix, loss_mask = _prefix_masks(out["positions"], out["segment_ids"], sizes)
        return {**out, "loss_mask": loss_mask} | ({"prefix": prefix} if self.form == "prefix_lm" else {})

    def _rows(self, pieces: list[np.ndarray], length: int) -> Example:
        """What a decoder reads and predicts."""
        pad, end = self.vocabulary.pad_id, [self.vocabulary.eos_id]
        segment_ids, positions = _numbered(pieces, length)
        tokens = _pad([np.concatenate([end, piece[:-1]]) for piece in pieces], length, pad)
        return {
            "tokens": tokens,
            "targets": _pad(pieces, length, pad),
            "segment_ids": segment_ids,
            "positions": positions,
        }

    def _texts(self, row: Example) -> list[Int32[np.ndarray, " N"]]:
        """The texts of a row, without their last ends: each gets one anyway."""
        ids, segment_ids = row["targets"], row["segment_ids"]
        if self.documents == "together":
            segment_ids = (segment_ids > 0).astype(np.int32)
        texts = [ids[segment_ids == number] for number in range(1, segment_ids.max(initial=0) + 1)]
        return [text[:-1] if len(text) and text[-1] == self.vocabulary.eos_id else text for text in texts]

    def _shares(self, sizes: Int64[np.ndarray, " G"], length: int) -> list[tuple[int, int, int]]:
        """Which of the texts are used, and the number of noise tokens and of spans in each.

        With n tokens in G texts, inputs take n - noise + spans + G places and targets noise + spans + G. Both fit if
        spans <= (places - n) / 2 - G and noise lies between what either leaves over.
        """
        room, learnt = self.lengths(length)
        used = np.argsort(-sizes, kind="stable")
        used = used[sizes[used] > 1]  # text, and noise
        while len(used):
            chosen, count = sizes[used], len(used)
            total = int(chosen.sum())
            noise, spans = self._noise(total)
            spans = min(max(spans, count), (room + learnt - total) // 2 - count, int((chosen // 2).sum()))
            noise = min(max(noise, total + spans + count - room), learnt - count - spans)
            spans = min(spans, noise)
            if spans >= count and noise <= total - spans:
                each = _share(spans, chosen, np.ones_like(chosen), chosen // 2)
                taken = _share(noise, chosen, each, chosen - each)
                return sorted(zip(used.tolist(), taken.tolist(), each.tolist(), strict=True))
            used = used[:-1]
        return []


@dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """The first tokens of each segment are only read, and see one another; the rest is learnt.

    T5 (arXiv:1910.10683, Sec. 3.2.1) and its comparison of objectives (Sec. 3.3.1): the prefix of a segment of n tokens
    has 1 to n of them, all being equally likely. The end-id before the first token counts, so a prefix of 1 is an
    ordinary language model.

    Adds `prefix`, bool[T], True for tokens that all of their segment sees, and `loss_mask`, bool[T], True for targets
    that are learnt; a mask that is there already is multiplied by it.
    """

    def __call__(self, row: Example, rng: np.random.Generator) -> Example:
        segment_ids = row["segment_ids"]
        sizes = rng.integers(1, np.maximum(np.bincount(segment_ids), 1) + 1)
        prefix, learnt = _prefix_masks(row["positions"], segment_ids, sizes[segment_ids])
        return {**row, "prefix": prefix, "loss_mask": row["loss_mask"] * learnt if "loss_mask" in row else learnt}


@dataclass(frozen=True, kw_only=True)
class FillInTheMiddle:
    """Some documents are given with their middle at the end, for models that write between what is there.

    arXiv:2207.14255, Sec. 3. A document is cut at two of its characters, drawn uniformly, and written as
      PSM: PRE prefix SUF suffix MID middle
      SPM: PRE SUF suffix MID prefix middle (the paper's second variant, which shares its order of marks with PSM)
    with an end behind it, as packing gives every document; all of it is learnt. It works on records and not on rows:
    the cuts are between characters, so within tokens too, as an editor's cursor is, and only a record has characters.
    The price is that packing may cut a document between its parts, the more often the shorter the rows (Sec. 3.2,
    whose "context-level" cutting is not done here).

    Turns the text into "tokens"; documents that are not cut keep it.

    Attributes:
      vocabulary: the one of the text.   field: of the record, its text.
      rate: share of the documents that are cut.   spm_rate: share of those that are given as SPM.
      marks: the ids of PRE, SUF and MID; None: the first three sentinels, the highest ids of the vocabulary.
    """

    vocabulary: Vocabulary
    field: str = "text"
    rate: float = 0.5
    spm_rate: float = 0.5
    marks: tuple[int, int, int] | None = None

    def __post_init__(self):
        for name in ("rate", "spm_rate"):
            value = getattr(self, name)
            require(self, name, is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
        different = self.marks is None or (len(set(self.marks)) == 3 and min(self.marks) >= 0)
        require(self, "marks", different, "three different ids")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """
        Raises:
          UserError: if the record has no text, or the vocabulary no sentinels.
        """
        if self.field not in example:
            raise UserError(f"the record has no field {self.field!r} to cut; {nearest(self.field, example)}")
        if rng.random() >= self.rate:
            return example
        text = example[self.field]
        if not isinstance(text, str | bytes):
            raise UserError(f"the field {self.field!r} is {text!r:.40}, not text")
        text = text.decode() if isinstance(text, bytes) else text
        first, second = np.sort(rng.integers(0, len(text) + 1, 2))
        prefix, middle, suffix = map(self.vocabulary.encode, (text[:first], text[first:second], text[second:]))
        ids = _sentinels(self.vocabulary, 3) if self.marks is None else np.array(self.marks, np.int32)
        pre, suf, mid = np.split(ids, 3)
        spm = rng.random() < self.spm_rate
        order = (pre, suf, suffix, mid, prefix, middle) if spm else (pre, prefix, suf, suffix, mid, middle)
        others = {name: value for name, value in example.items() if name != self.field}
        return {**others, "tokens": np.concatenate(order)}
