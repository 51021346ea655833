"""Scores of a trained language model on its held-out split, by document and by question.

Axes: T tokens of a row, D documents, Q questions, C choices of each.
"""

import functools
import itertools
import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np

from axrepro.data import BadRecord, CursorBatches, Data, ExamplesCursor, PackedText, Split, Text, batch_shardings
from axrepro.data.base import place
from axrepro.data.sources.decontaminated import given_away, raw_text
from axrepro.data.text import NAMES
from axrepro.errors import UserError
from axrepro.methods.language_model import LanguageModel
from axrepro.train.state import Program

_TRIES = 1000  # to find the false choices of a question
_CHARACTERS = 16  # in a token, at most, as a mean over a row: contexts are not encoded from farther back


@dataclass(frozen=True)
class Documents:
    """Sums over the targets of each held-out document, its end mark included.

    Attributes:
      names: [D], as the source tells them.   bytes: int64[D], of the raw text.   bits: float64[D], -log2 p.
      tokens: float64[D], targets.   correct: float64[D], targets that were the most probable token.
    """

    names: tuple[str, ...]
    bytes: np.ndarray
    bits: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True)
class Questions:
    """Which of several texts continues a document?

    The choices of a question are rows one after the other, all with the same context: what precedes the true one, cut
    at the left so that the longest finds room.

    Attributes:
      tokens, targets, segment_ids, positions: int32[Q C, T], as a language model takes them.
      mask: bool[Q C, T], the targets that are compared: those of a choice, from the first token that is not of the
        context alone.
      truth: int64[Q], which choice is true.   document: int64[Q], the number of the document.
      texts: [Q][C], the choices.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    truth: np.ndarray
    document: np.ndarray
    texts: tuple[tuple[str, ...], ...]


def score_documents(program: Program, params: dict, batch_size: int | None = None) -> Documents:
    """Scores of every document of the whole held-out split, over the rows of the trainer's own evaluation.

    All processes take part, and each has the result.

    Args:
      params: those to evaluate (`Program.averaged`).   batch_size: rows at once; None: as in training.
    Raises:
      UserError: if the experiment trains no language model, or not on plain text.
    """
    step = _score_step(program)
    examples, names, texts = _held_out(_plain(program.experiment.data))
    size = batch_size or program.experiment.data.batch_size
    batches = CursorBatches(ExamplesCursor(examples, size, 1), program.run_mesh, program.experiment.rules)
    sums = {name: np.zeros(len(names)) for name in ("bits", "tokens", "correct")}
    for first, batch in zip(itertools.count(0, size), batches):
        document = examples.documents(np.arange(first, min(first + size, len(examples))))
        placed = document >= 0
        for name, values in jax.device_get(step(params, batch)).items():
            sums[name] += np.bincount(document[placed], values[: len(document)][placed], len(names))
    return Documents(tuple(names), np.array([len(text) for text in texts]), **sums)


def make_questions(data: Data, count: int, seed: int = 0, choices: int = 4, size: int = 48) -> Questions:
    """Questions about held-out documents: given the text up to the start of a line, which `size` characters follow?

    The false choices are as long, and begin at lines of other held-out documents. At least half of a choice is not
    blank, and every context has at least `size` characters. Documents take turns, and none is asked for one line twice.
    The questions follow from the held-out text and `seed`, so all models that share the data meet the same.

    Raises:
      UserError: if the data is no plain text, or too little of it is held out.
    """
    data = _plain(data)
    _, _, texts = _held_out(data)
    pool, rng = _Pool(data, texts, size), np.random.default_rng(seed)
    turns = deque((number, pool.continuations(number, rng)) for number in rng.permutation(sorted(pool.starts)).tolist())
    rows, truth, document, chosen = [], [], [], []
    while turns and len(document) < count:
        number, continuations = turns.popleft()
        start = next(continuations, None)
        if start is None:
            continue
        turns.append((number, continuations))
        drawn = pool.choices(number, start, choices, rng)
        if drawn is None:
            break
        truth.append(int(rng.integers(choices)))
        drawn.insert(truth[-1], drawn.pop(0))
        rows += _rows(data, pool.texts[number][:start], drawn)
        document.append(number)
        chosen.append(tuple(drawn))
    if len(document) < count:
        raise UserError(
            f"{len(texts)} held-out documents give {len(document)} of {count} questions with {choices} choices of "
            f"{size} characters in rows of {data.sequence_length} tokens; hold out more documents, ask fewer "
            "questions, or take longer rows"
        )
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Questions(**arrays, truth=np.array(truth), document=np.array(document), texts=tuple(chosen))


def score_questions(program: Program, params: dict, questions: Questions) -> np.ndarray:
    """bool[Q], whether the context makes the true choice more probable than it makes every other one.

    That is log p(choice | context) - log p(choice | last token of the context): choices differ in how probable they are
    anywhere, which says nothing about the question (Holtzman et al., arXiv:2104.08315). Ties and nan count as wrong.

    Rows are padded to whole batches. A mixture with a capacity routes each row by itself, unless its `group_size`
    exceeds the row: the rows of a group then share the room of its experts, and choices influence each other. Experts
    that are full leave out the last tokens of a row, which are those of the choice. All processes take part.

    Raises:
      UserError: if the experiment trains no language model.
    """
    bits = _choice_bits(program, params, questions) - _choice_bits(program, params, _without_context(questions))
    of_truth = np.take_along_axis(bits, questions.truth[:, None], 1)
    return (of_truth < bits).sum(1) == bits.shape[1] - 1


def _choice_bits(program: Program, params: dict, questions: Questions) -> np.ndarray:
    """float64[Q, C], -log2 p of the targets that are compared."""
    step, size = _score_step(program), program.experiment.data.batch_size
    rows, length = questions.tokens.shape
    arrays = {name: jax.ShapeDtypeStruct((size, length), np.int32) for name in NAMES}
    shardings = batch_shardings(arrays, program.run_mesh, program.experiment.rules)
    missing = -rows % size
    padded = {name: np.pad(getattr(questions, name), ((0, missing), (0, 0))) for name in (*NAMES, "mask")}
    bits = np.zeros(rows + missing)
    for first in range(0, rows, size):
        load = lambda start, stop, first=first: {name: padded[name][first + start : first + stop] for name in NAMES}
        scores = jax.device_get(step(params, place(load, arrays, shardings)))
        part = slice(first, first + size)
        bits[part] = np.where(padded["mask"][part], scores["bits"], 0).sum(1, dtype=np.float64)
    return bits[:rows].reshape(len(questions.truth), -1)


def _without_context(questions: Questions) -> Questions:
    """The same choices after nothing but the last token of the context, which the first target is predicted from."""
    length = questions.tokens.shape[1]
    sources = questions.mask.argmax(1)[:, None] + np.arange(length)
    moved = lambda values: np.take_along_axis(np.pad(values, ((0, 0), (0, length))), sources, 1)
    segments = moved(questions.segment_ids)
    return replace(
        questions,
        tokens=moved(questions.tokens),
        targets=moved(questions.targets),
        segment_ids=segments,
        positions=np.where(segments > 0, np.arange(length, dtype=np.int32), 0),
        mask=moved(questions.mask),
    )


def leaks(data: Data) -> list[str]:
    """Names of held-out documents that training documents give away (`Decontaminated` leaves them out).

    Raises:
      UserError: if the data is no plain text.
    """
    data = _plain(data)
    _, names, texts = _held_out(data)
    return [names[number] for number in given_away(texts, (text for _, _, text in _texts(data, "train")))]


@functools.lru_cache(maxsize=1)  # documents and questions of one model need one program
def _score_step(program: Program) -> Callable[[dict, dict], dict[str, jax.Array]]:
    """(params, batch) -> float32[B, T] each: "bits", "correct" and "tokens", 0 for padding; whole on every device."""
    method = program.experiment.method
    if not isinstance(method, LanguageModel):
        raise UserError(
            f"scores by token are those of a LanguageModel; the experiment trains a {type(method).__name__}"
        )

    def step(params, batch):
        scores, weight, _ = method.scores(params, batch, program.context(None, train=False))
        counted = lambda values: jax.numpy.where(weight > 0, values * weight, 0)
        return {
            "bits": counted(scores["nll"] / math.log(2)),
            "correct": counted(scores["correct"]),
            "tokens": counted(1.0),
        }

    return jax.jit(step, out_shardings=program.replicated)


def _plain(data: Data) -> Text:
    """Raises UserError for data whose documents are not texts as they stand."""
    if not isinstance(data, Text) or data.transforms or data.row_transforms:
        raise UserError(
            "a study takes data that is a Text without transforms and row_transforms, to tell documents apart; this is "
            f"{data.describe():.100}"
        )
    return data


def _held_out(data: Text) -> tuple[PackedText, list[str], list[bytes]]:
    """The rows of the held-out split, and names and texts of its documents by their number there."""
    examples = data.open("eval", 0)
    assert isinstance(examples, PackedText)
    documents = [(name, text) for index, name, text in _texts(data, "eval") if index not in examples.bad_records]
    return examples, [name for name, _ in documents], [text for _, text in documents]


def _texts(data: Text, split: Split) -> Iterator[tuple[int, str, bytes]]:
    """Number, name and text of each record that can be read."""
    records = data.source.open(split)
    for index in range(len(records)):
        try:
            record = records[index]
            if data.field not in record or {"tokens", "parts"} & set(record):
                raise UserError(
                    f"{records.name(index)} holds {', '.join(record)}; a study takes documents that hold their raw "
                    f"text alone, as {data.field!r} (data.field)"
                )
            yield index, records.name(index), raw_text(record, data.field, records.name(index))
        except BadRecord:
            continue  # told and counted where the split is opened


class _Pool:
    """What questions are made of.

    Attributes:
      texts: of the documents that are UTF-8, by number.
      starts: of each one's lines that `size` characters begin with, where there are any.
    """

    def __init__(self, data: Text, texts: list[bytes], size: int):
        self._vocabulary, self._size = data.vocabulary, size
        self._longest = 3 * data.sequence_length // 4  # tokens of a choice; the rest of a row is context
        self.texts: dict[int, str] = {}
        self.starts: dict[int, np.ndarray] = {}
        for number, raw in enumerate(texts):
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                continue
            starts = [0, *(found.end() for found in re.finditer("\n", text))]
            starts = [start for start in starts if start + size <= len(text)]
            if starts:
                self.texts[number], self.starts[number] = text, np.array(starts)

    def _choice(self, number: int, start: int) -> str | None:
        """The text there, if it can be a choice."""
        text = self.texts[number][start : start + self._size]
        fits = 2 * len("".join(text.split())) >= self._size and len(self._vocabulary.encode(text)) <= self._longest
        return text if fits else None

    def continuations(self, number: int, rng: np.random.Generator) -> Iterator[int]:
        """Where true choices start, each once, at random."""
        starts = self.starts[number]
        for start in rng.permutation(starts[starts >= self._size]).tolist():
            if self._choice(number, start) is not None:
                yield start

    def choices(self, number: int, start: int, count: int, rng: np.random.Generator) -> list[str] | None:
        """The true one and then false ones, all different; None if no more are found."""
        found = [self.texts[number][start : start + self._size]]
        others = [other for other in self.starts if other != number]
        for _ in range(_TRIES if others else 0):
            other = others[rng.integers(len(others))]
            text = self._choice(other, int(rng.choice(self.starts[other])))
            if text is not None and text not in found:
                found.append(text)
            if len(found) == count:
                return found
        return None


def _rows(data: Text, context: str, choices: list[str]) -> list[dict[str, np.ndarray]]:
    """A row for each choice."""
    vocabulary, length = data.vocabulary, data.sequence_length
    context = context[-_CHARACTERS * length :]
    whole = [vocabulary.encode(context + choice) for choice in choices]
    # a token may hold the end of the context and the start of a choice: then it is compared, too
    shared = min(_common(vocabulary.encode(context), ids) for ids in whole)
    cut = max(0, max(map(len, whole)) - length)
    rows = []
    for ids in whole:
        size = len(ids) - cut
        row = {name: np.zeros(length, np.int32) for name in NAMES} | {"mask": np.zeros(length, bool)}
        row["tokens"][:] = row["targets"][:] = vocabulary.pad_id
        row["tokens"][:size] = np.concatenate([[vocabulary.eos_id], ids[:-1]])[cut:]
        row["targets"][:size] = ids[cut:]
        row["segment_ids"][:size] = 1
        row["positions"][:size] = np.arange(size)
        row["mask"][max(0, shared - cut) : size] = True
        rows.append(row)
    return rows


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens are the same at the start."""
    size = min(len(one), len(other))
    return int(np.append(one[:size] != other[:size], True).argmax())
