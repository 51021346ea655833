"""Scores by document and by question, against the trainer's evaluation and loops over rows."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from axrepro.core import MeshShape, make_mesh
from axrepro.core.config import swap
from axrepro.core.interfaces import Layer
from axrepro.data import BestFit, Bytes, FromFunction, Text
from axrepro.errors import UserError
from axrepro.methods.adapter import Freeze
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM, llama
from axrepro.nn import FeedForward, MoE
from axrepro.optim import AdamW, Constant
from axrepro.study.held_out import leaks, make_questions, score_documents, score_questions
from axrepro.train.evaluate import Evaluator
from axrepro.train.experiment import Experiment, Train
from axrepro.train.state import Program
from experiments import markov_chains

WORDS = ["alpha", "beta", "delta", "zeta", "theta", "iota", "kappa", "lambda", "omicron", "sigma", "tau", "omega"]
MESHES = {"one device": MeshShape(), "eight devices": MeshShape(data=2, fsdp=2, expert=2)}


def lower_and_upper_case(split) -> list[dict]:
    """Twelve documents of 3 to 25 lines in lower case to train on, and twelve in upper case."""
    rng = np.random.default_rng(split == "eval")
    texts = ["".join(" ".join(rng.choice(WORDS, 8)) + "\n" for _ in range(3 + 2 * i)) for i in range(12)]
    return [{"text": text if split == "train" else text.upper().encode()} for text in texts]


DATA = Text(source=FromFunction(lower_and_upper_case), batch_size=8, sequence_length=80)


def in_memory(train: Sequence[str | bytes], held_out: Sequence[str | bytes], **settings) -> Text:
    records = {"train": [{"text": text} for text in train], "eval": [{"text": text} for text in held_out]}
    return replace(DATA, source=FromFunction(records.__getitem__), **settings)


@functools.cache
def program_of(kind: str, mesh: str = "one device", data: Text = DATA) -> Program:
    model = llama(vocab_size=264, dim=32, num_layers=2, num_heads=2, hidden=32)
    experiment = Experiment(
        method=LanguageModel(model=model, chunk=32),
        data=data,
        optimizer=AdamW(learning_rate=Constant(value=0.0)),
        train=Train(steps=1, dtype="float32"),
        mesh=MESHES[mesh],
    )
    if kind == "moe":  # which drops choices, and fewer in evaluation than in training
        moe = lambda ffn: MoE(expert=ffn, num_experts=4, capacity_factor=0.5, eval_capacity_factor=1.5)
        experiment = swap(experiment, FeedForward, moe)
    devices = jax.devices()[: 1 if mesh == "one device" else 8]
    return Program(experiment, make_mesh(experiment.mesh, devices), "cpu")


def params_of(program: Program) -> dict:
    """Far enough from the first values that predictions differ."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + np.float32(0.2) * rng.normal(size=x.shape).astype("f"), program.init(0).params)
    return jax.device_put(params, program.shardings.params)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_sums_over_documents_are_the_means_of_the_evaluation(kind, mesh):
    program = program_of(kind, mesh)
    params = params_of(program)
    documents, expected = score_documents(program, params), Evaluator(program)(params, {}, None)
    assert documents.bits.sum() / documents.bytes.sum() == pytest.approx(expected["eval/bits_per_byte"], rel=2e-6)
    assert documents.bits.sum() / documents.tokens.sum() == pytest.approx(expected["eval/bits_per_token"], rel=2e-6)
    assert documents.correct.sum() / documents.tokens.sum() == pytest.approx(expected["eval/accuracy"], rel=2e-6)
    raw = [record["text"] for record in lower_and_upper_case("eval")]
    assert documents.bytes.tolist() == [len(text) for text in raw]
    np.testing.assert_array_equal(documents.tokens, documents.bytes + 1)
    assert len(documents.names) == len(set(documents.names)) == 12
    if kind == "moe":
        assert 0 < expected["eval/layers/ffn/dropped"] < 1


def bits_by_row(program: Program, params: dict, tokens, targets, segment_ids, positions) -> np.ndarray:
    """-log2 p of every target, from the logits of one row at a time."""
    model, plain = program.experiment.method.model, program.context(None, train=False)

    @jax.jit
    def logits(tokens, segment_ids, positions):
        ctx = plain.replace(segment_ids=segment_ids[None], positions=positions[None])
        return model.logits(params, model.apply(params, tokens[None], ctx)[0], ctx)[0]

    rows = []
    for i, row in enumerate(targets):
        log_p = log_softmax(np.asarray(logits(tokens[i], segment_ids[i], positions[i]), np.float64), axis=-1)
        rows.append(-np.take_along_axis(log_p, row[:, None], 1)[:, 0] / np.log(2))
    return np.stack(rows)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_documents_and_questions_equal_a_loop_over_rows(kind):
    program = program_of(kind)
    params = params_of(program)
    questions = make_questions(DATA, 15)
    given = bits_by_row(
        program, params, questions.tokens, questions.targets, questions.segment_ids, questions.positions
    )
    alone = np.zeros((4, 60, 80), np.int32)  # tokens, targets, segments and positions of rows that hold a choice alone
    for row, mask in enumerate(questions.mask):
        compared = mask.nonzero()[0]
        tokens, targets = questions.tokens[row][compared], questions.targets[row][compared]
        alone[:, row, : len(compared)] = tokens, targets, np.ones(len(compared)), range(len(compared))
    given = np.where(questions.mask, given, 0).sum(1).reshape(15, 4)
    alone = np.where(alone[2], bits_by_row(program, params, *alone), 0).sum(1).reshape(15, 4)
    answers = score_questions(program, params, questions)
    np.testing.assert_array_equal(answers, (alone - given).argmax(1) == questions.truth)
    assert ((alone - given).argmax(1) != given.argmin(1)).any()  # what a choice is anywhere matters here
    assert answers.any()
    assert not answers.all()

    # documents one after the other in rows, so that the targets of each follow from its length
    data = replace(DATA, shuffle=False)
    rows = data.open("eval", 0).rows(np.arange(len(data.open("eval", 0))))
    bits = bits_by_row(program, params, *(rows[name] for name in ("tokens", "targets", "segment_ids", "positions")))
    documents = score_documents(program_of(kind, data=data), params)
    ends = np.cumsum(documents.bytes + 1)
    by_document = np.split(bits.ravel()[: ends[-1]], ends[:-1])
    np.testing.assert_allclose(documents.bits, [part.sum() for part in by_document], rtol=1e-5)


def test_a_document_is_scored_alike_however_rows_are_packed_and_batched():
    whole = replace(DATA, sequence_length=1200, packing=BestFit())
    documents = score_documents(program_of("dense", data=whole), params := params_of(program_of("dense")), 1)
    other = score_documents(program_of("dense", data=replace(whole, shuffle=False)), params, 3)
    np.testing.assert_allclose(documents.bits, other.bits, rtol=1e-5)
    np.testing.assert_array_equal(documents.correct, other.correct)


def test_questions_are_answered_alike_on_one_device_and_on_eight():
    questions = make_questions(DATA, 13)
    answers = [score_questions(p, params_of(p), questions) for p in (program_of("moe", mesh) for mesh in MESHES)]
    np.testing.assert_array_equal(*answers)
    assert answers[0].shape == (13,)


def test_a_question_is_a_context_and_texts_of_one_size_from_held_out_documents():
    questions, vocabulary = make_questions(DATA, 30), DATA.vocabulary
    held_out = [record["text"].decode() for record in lower_and_upper_case("eval")]
    seen = set()
    for i, (number, truth, texts) in enumerate(zip(questions.document, questions.truth, questions.texts, strict=True)):
        assert len(set(texts)) == 4
        assert {len(text) for text in texts} == {48}
        for j, text in enumerate(texts):
            row = 4 * i + j
            real = questions.segment_ids[row] == 1
            tokens, targets, mask = questions.tokens[row], questions.targets[row], questions.mask[row]
            assert vocabulary.decode(targets[mask]) == text
            np.testing.assert_array_equal(tokens[1:][real[1:]], targets[:-1][real[1:]])
            assert mask.sum() == 48
            assert real.all()  # each context is longer than what is left of a row
            np.testing.assert_array_equal(questions.positions[row], np.arange(80))
            np.testing.assert_array_equal(targets[~mask], questions.targets[4 * i][~questions.mask[4 * i]])
            sources = {d for d, document in enumerate(held_out) if f"\n{text}" in f"\n{document}"}
            assert sources == {number} if j == truth else sources and number not in sources
        context = vocabulary.decode(questions.targets[4 * i][~questions.mask[4 * i]])
        assert context.endswith("\n")
        assert context + texts[truth] in held_out[number]
        seen.add((number, texts[truth]))
    assert len(seen) == 30


def test_documents_take_turns_and_the_place_of_the_truth_is_uniform():
    questions = make_questions(DATA, 100)
    counts = np.bincount(questions.document, minlength=12)
    usable = []
    for record in lower_and_upper_case("eval"):
        starts = [i + 1 for i, byte in enumerate(record["text"]) if byte == ord("\n")]
        usable.append(sum(48 <= start <= len(record["text"]) - 48 for start in starts))
    # a document that has no line left is passed over; the others are asked equally often
    most = counts.max()
    assert all(count in (most - 1, most) or count == lines for count, lines in zip(counts, usable, strict=True))
    assert counts.sum() == 100
    assert 0 < (counts < most - 1).sum() < 6
    assert np.bincount(make_questions(DATA, 10).document, minlength=12).max() == 1
    # 100 draws of four: a count above 40 or below 12 has a probability of 1 in 1000
    places = np.bincount(questions.truth, minlength=4)
    assert 12 <= places.min() <= places.max() <= 40


def test_questions_follow_from_text_and_seed_alone():
    one, two = make_questions(DATA, 20, seed=3), make_questions(replace(DATA, batch_size=2, shuffle=False), 20, seed=3)
    for name in ("tokens", "targets", "segment_ids", "positions", "mask", "truth", "document"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.texts == two.texts != make_questions(DATA, 20, seed=4).texts
    two_choices = make_questions(DATA, 5, choices=2, size=20)
    assert two_choices.tokens.shape == (10, 80)
    assert {len(text) for texts in two_choices.texts for text in texts} == {20}


def test_a_short_context_begins_with_the_end_mark_of_the_document_before():
    questions = make_questions(replace(DATA, sequence_length=1200), 5)
    assert (questions.tokens[:, 0] == 1).all()
    for row, length in zip(questions.tokens, questions.segment_ids.sum(1), strict=True):
        assert not row[length:].any()
    held_out = lower_and_upper_case("eval")
    for i, number in enumerate(questions.document):
        first = DATA.vocabulary.decode(questions.targets[4 * i][:40])
        assert held_out[number]["text"].decode().startswith(first)


def test_blank_choices_and_documents_that_are_not_utf8_are_left_out():
    blank = ("word " * 20 + "\n" + " " * 60 + "a\n") * 5
    texts = [blank.replace("word", word) for word in WORDS[:4]]
    questions = make_questions(in_memory(["a"], [*texts, b"\xff" + texts[0].encode()]), 8)
    assert set(questions.document.tolist()) <= {0, 1, 2, 3}
    assert all(len(text.replace(" ", "")) >= 24 for texts in questions.texts for text in texts)


def test_choices_of_wide_characters_see_the_same_context():
    texts = [record["text"].decode() for record in lower_and_upper_case("eval")]
    texts = [text if i % 2 else text.replace("A", "Ä") for i, text in enumerate(texts)]
    questions = make_questions(in_memory(["a"], texts), 20)
    sizes = questions.mask.sum(1).reshape(20, 4)
    assert (sizes.min(1) < sizes.max(1)).any()
    assert sizes.max() <= 60
    for i in range(20):
        contexts = {questions.targets[row][~questions.mask[row]][: 80 - sizes[i].max()].tobytes() for row in range(4)}
        contexts = {questions.targets[row][: questions.mask[row].argmax()].tobytes() for row in range(4 * i, 4 * i + 4)}
        assert len(contexts) == 1


@dataclass(frozen=True)
class Pairs(Bytes):
    """Two bytes a token, from the start of the text; what is left is a token of its own."""

    @property
    def size(self):
        return self.first_id + 2**17

    def encode(self, text):
        raw = text.encode() if isinstance(text, str) else text
        return np.array([int.from_bytes(b"\1" + raw[i : i + 2]) for i in range(0, len(raw), 2)], np.int32) + 3

    def decode(self, ids):
        return b"".join((int(i) - 3).to_bytes(3).lstrip(b"\0")[1:] for i in ids).decode()


def test_a_token_across_the_start_of_a_choice_is_compared():
    questions, extra = make_questions(replace(DATA, vocabulary=Pairs()), 20), []
    for row, text in enumerate(text for texts in questions.texts for text in texts):
        mask, first = questions.mask[row], questions.mask[row - row % 4]
        compared = Pairs().decode(questions.targets[row][mask])
        assert compared.removesuffix(text) in ("", "\n")
        assert compared.endswith(text)
        extra.append(compared != text)
        np.testing.assert_array_equal(mask.argmax(), first.argmax())
    assert any(extra)
    assert not all(extra)


@dataclass(frozen=True, kw_only=True)
class Counts(Layer):
    """How often each token has occurred so far: a model that knows a document by its letters."""

    def specs(self, dim):
        return {}

    def apply(self, params, x, ctx):
        return jnp.cumsum(x, 1), {}


@dataclass(frozen=True, kw_only=True)
class Same(Layer):
    def specs(self, dim):
        return {}

    def apply(self, params, x, ctx):
        return x, {}


def test_a_model_that_recalls_the_context_answers_all_and_an_untrained_one_a_quarter():
    """Each document has a letter of its own; the model predicts the letters that it has seen."""
    data = in_memory(["-"], [(letter * 60 + "\n") * 9 for letter in "abcdefgh"])
    questions = make_questions(data, 50)
    trained = program_of("dense", data=data)
    model = CausalLM(vocab_size=264, dim=264, layers=Counts(), norm=Same())
    program = replace(trained, experiment=replace(trained.experiment, method=LanguageModel(model=model)))
    eye = jnp.eye(264)
    params = {"embed": {"table": eye}, "layers": {}, "norm": {}, "head": eye}
    assert score_questions(program, params, questions).all()
    assert not score_questions(program, params | {"head": 0 * eye}, questions).any()  # a tie is no answer
    assert not score_questions(program, params | {"head": jnp.nan * eye}, questions).any()
    # 100 questions: less than 11 or more than 40 right ones have a probability of 1 in 1000
    untrained = score_questions(program_of("dense"), program_of("dense").init(0).params, make_questions(DATA, 100))
    assert 11 <= untrained.sum() <= 40


def test_held_out_documents_that_stand_in_training_ones_are_named():
    lines = [f"a line of text that is long enough to tell, number {i:03}" for i in range(30)]
    held_out = [
        "\n".join(lines[:10]),  # half of it is in training, with other white space
        "\n".join(lines[10:19]),  # four lines of nine are
        "\n".join(lines[20:24]),  # four lines of four
        "short\nlines\nalone",
        "a copy",
        " \n",
        "\n".join([lines[25]] * 9 + lines[26:30]),  # one line many times
        "\n".join(lines[2:7] + [line.upper() for line in lines[:6]]),  # five lines of eleven
    ]
    train = ["\n".join(f"  {line}\t" for line in lines[2:7]), "\n".join([*lines[12:16], *lines[20:24], lines[25]])]
    train += ["a copy", " \n", "short\nlines"]
    data = in_memory(train, held_out)
    names = score_documents(program_of("dense", data=data), program_of("dense").init(0).params).names
    assert leaks(data) == [names[0], names[4]]
    assert leaks(DATA) == []


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (DATA, 1000, r"12 held-out documents give \d+ of 1000 questions with 4 choices .*hold out more"),
        (in_memory(["a"], [lower_and_upper_case("eval")[9]["text"]]), 1, "1 held-out documents give 0 of 1"),
        (replace(DATA, sequence_length=48), 1, "give 0 of 1 .* in rows of 48 tokens.*longer rows"),
        (in_memory(["a"], ["a\n" * 400, "b\n" * 400]), 1, "give 0 of 1"),
        (markov_chains.tiny().data, 1, "data that is a Text without transforms .* this is MarkovChains"),
        (replace(DATA, row_transforms=(lambda row, rng: row,)), 1, "without transforms and row_transforms"),
    ],
)
def test_too_little_or_other_data_is_refused_with_what_to_do(data, count, message):
    with pytest.raises(UserError, match=message):
        make_questions(data, count)


def test_records_without_raw_text_and_other_methods_are_refused():
    tokens = replace(DATA, source=FromFunction(lambda split: [{"tokens": [5, 6, 7]}]))
    with pytest.raises(UserError, match="record 0 holds tokens; a study takes documents that hold their raw text"):
        leaks(tokens)
    program = program_of("dense")
    other = Freeze(method=program.experiment.method, frozen=("head",))
    with pytest.raises(UserError, match="those of a LanguageModel; the experiment trains a Freeze"):
        score_documents(replace(program, experiment=replace(program.experiment, method=other)), {})


def test_bad_records_shift_no_document():
    source = FromFunction(lambda split: [{"text": "one"}, {"text": 5}, {"text": "three"}])
    program = program_of("dense", data=replace(DATA, source=source, max_bad_records=1))
    documents = score_documents(program, program.init(0).params)
    assert documents.bytes.tolist() == [3, 5]
    assert documents.tokens.tolist() == [4, 6]
    assert [name[-1] for name in documents.names] == ["0", "2"]
