"""Records to text: what is learnt of a template and of a conversation, against the renderer of transformers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from axrepro.core import UserError
from axrepro.data import Bytes, JsonLines, Text
from axrepro.data.transforms.formats import _FORMATS, Chat, Template

DATA = os.environ.get("AXREPRO_DATA", Path(__file__).resolve().parents[2].parent / "shared/data")
GSM8K = Path(DATA, "gsm8k/train.jsonl")
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6, of course"},
)
# the tag with which a template can mark what the assistant says; the library's own reader of it is the oracle
MARKED = (
    "{% for message in messages %}\n    {% if message.role == 'assistant' %}\n"
    "<|im_start|>assistant\n{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}\n"
    "    {% else %}\n<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\n    {% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)


def apply(transform, example) -> dict:
    return transform(example, np.random.default_rng(0))


def parts(transform, messages, **fields) -> tuple:
    return apply(transform, {"messages": list(messages), **fields})["parts"]


def text(found) -> str:
    return "".join(piece for piece, _ in found)


def learnt(found) -> list[str]:
    return [piece for piece, in_loss in found if in_loss]


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")


def test_a_template_learns_the_fields_that_are_named_and_no_more():
    template = Template(template="Question: {question}\nAnswer: {answer}\n", loss=("answer",))
    example = apply(template, {"question": "2 + 2?", "answer": 4, "id": "a"})
    assert example["parts"] == (("Question: 2 + 2?\nAnswer: ", False), ("4", True), ("\n", False))
    assert example["id"] == "a"


def test_a_template_without_a_choice_is_learnt_whole():
    assert apply(Template(template="{{{a}}} {b}"), {"a": b"x", "b": "y"})["parts"] == (("{x} y", True),)


def test_what_stands_in_a_field_is_text_and_no_template():
    secret = "{b.__class__} {b}"
    assert apply(Template(template="{a}"), {"a": secret, "b": "y"})["parts"] == ((secret, True),)


def test_a_template_takes_the_place_of_the_text_that_it_was_made_from():
    assert "text" not in apply(Template(template="- {text}"), {"text": "fox"})


@pytest.mark.parametrize("field", ["{a.b}", "{a[0]}", "{a!r}", "{a:>{b}}", "{}", "{0}", "{a", "a}"])
def test_a_field_is_a_name_and_nothing_that_is_evaluated(field):
    with pytest.raises(UserError, match=r"Template\.template="):
        Template(template=field)


def test_an_unknown_field_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="no field 'anwser', which the template names; did you mean 'answer'"):
        apply(Template(template="{anwser}"), {"answer": "4", "question": "2 + 2"})
    with pytest.raises(UserError, match=r"Template\.loss=.*did you mean 'answer'"):
        Template(template="{answer}", loss=("answr",))
    with pytest.raises(UserError, match="'answer' is NoneType, and no text or number"):
        apply(Template(template="{answer}"), {"answer": None})


@pytest.mark.parametrize("name", sorted(_FORMATS))
def test_the_parts_are_the_whole_conversation_as_transformers_renders_it(name, tokenizer):
    for messages in (TALK, (SYSTEM, *TALK), TALK[:2]):
        theirs = tokenizer.apply_chat_template(list(messages), chat_template=_FORMATS[name], tokenize=False)
        assert text(parts(Chat(template=name), messages)) == theirs


def test_the_formats_are_those_that_models_were_trained_with():
    asked = (SYSTEM, *TALK[:2])
    assert text(parts(Chat(template="chatml"), asked)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert text(parts(Chat(template="llama3"), asked)) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
    )
    assert text(parts(Chat(template="gemma"), asked)) == (
        "<bos><start_of_turn>user\nBe brief.\n\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
    )
    assert text(parts(Chat(template="plain"), asked)) == "System: Be brief.\nUser: What is 2 + 2?\nAssistant: 4\n"


def test_the_turns_of_the_assistant_are_learnt_with_the_token_that_ends_them():
    assert learnt(parts(Chat(template="llama3"), (SYSTEM, *TALK))) == ["4<|eot_id|>", "6, of course<|eot_id|>"]
    assert learnt(parts(Chat(template="llama3", loss="last"), TALK)) == ["6, of course<|eot_id|>"]
    assert learnt(parts(Chat(template="gemma"), TALK)) == ["4<end_of_turn>\n", "6, of course<end_of_turn>\n"]


def test_what_is_learnt_is_what_transformers_masks_as_the_assistants(tokenizer):
    found = parts(Chat(template=MARKED), (SYSTEM, *TALK))
    theirs = tokenizer.apply_chat_template(
        [SYSTEM, *TALK], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [i for piece, _ in found for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    mask = [int(learn) for piece, learn in found for _ in piece.encode()]
    assert ids == theirs["input_ids"]
    assert mask == theirs["assistant_masks"]
    assert 0 < sum(mask) < len(mask)


def test_a_template_gets_its_variables_and_the_fields_of_messages():
    template = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ m.weight | tojson }}{% endfor %}"
    messages = [
        {"role": "user", "content": "a", "weight": {"é": 1}},
        {"role": "assistant", "content": "b", "weight": 2},
    ]
    found = parts(Chat(template=template, variables=(("bos_token", "<s>"),)), messages)
    assert found == (('<s>ua{"é": 1}', False), ("ab2", True))


def test_sharegpt_is_read_by_the_names_of_its_fields():
    talk = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    chat = Chat(template="plain", messages="conversations", role="from", content="value")
    found = apply(chat, {"conversations": talk, "id": 7})
    assert found["parts"] == (("User: 2 + 2?\nAssistant: ", False), ("4\n", True))
    assert found["id"] == 7


def test_what_follows_the_last_answer_is_left_out():
    assert parts(Chat(), TALK[:3]) == parts(Chat(), TALK[:2])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([TALK[0]], r"no turn of the assistant to learn from \(user\)"),
        ([], r"no turn of the assistant to learn from \(no messages\)"),
        ([{"role": "user", "contents": "a"}], "message 0 has no field 'content'; did you mean 'contents'"),
        (
            [TALK[0], {"role": "assistant", "content": None}],
            "message 1 has no content, which the format 'chatml' needs",
        ),
        ([TALK[0], {"role": "assistant", "content": ["b"]}], "the content of message 1 is list, and no text"),
        ("hello", "'messages' is no list of messages"),
    ],
)
def test_a_conversation_that_cannot_be_learnt_is_a_bad_record(messages, message):
    with pytest.raises(ValueError, match=message):
        apply(Chat(), {"messages": messages})
    with pytest.raises(UserError, match="no field 'messages', which should hold the messages; did you mean 'message'"):
        apply(Chat(), {"message": messages})


def test_a_template_that_rewrites_earlier_turns_is_refused_and_learnt_by_its_last():
    hides = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(UserError, match=r'messages 0 to 3 does not begin with its text for fewer.*loss="last"'):
        parts(Chat(template=hides), TALK)
    assert learnt(parts(Chat(template=hides, loss="last"), TALK)) == ["6, of course"]


def test_a_template_cannot_leave_its_sandbox_or_change_the_record():
    for template in ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(UserError, match="the chat template refuses"):
            parts(Chat(template=template), TALK)


def test_what_a_template_raises_is_told():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with pytest.raises(UserError, match=r"refuses the first 1 message\(s\): no system here"):
        parts(Chat(template=refusing), (SYSTEM, *TALK[1:]))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x'.encode('nothing') }}", "LookupError"),
    ],
)
def test_a_template_whose_computation_fails_is_told_like_one_that_refuses(template, told):
    with pytest.raises(UserError, match=rf"refuses the first 1 message\(s\): {told}"):
        parts(Chat(template=template), TALK)


@pytest.mark.parametrize("template", ["chatlm", "{% for %}", "{{ x", "{{ " + "(" * 3000 + ")" * 3000 + " }}"])
def test_a_wrong_template_is_named(template):
    with pytest.raises(UserError, match=r"Chat\.template.*jinja2"):
        parts(Chat(template=template), TALK)


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K, at AXREPRO_DATA or beside the repository")
def test_real_records_keep_every_character_of_question_and_answer():
    template = Template(template="Question: {question}\nAnswer: {answer}", loss=("answer",))
    chat = Chat(template="plain")
    for line in GSM8K.read_text().splitlines()[:200]:
        record = json.loads(line)
        (prompt, _), (answer, in_loss) = apply(template, record)["parts"]
        assert (prompt, answer, in_loss) == (f"Question: {record['question']}\nAnswer: ", record["answer"], True)
        talk = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
        assert learnt(parts(chat, talk)) == [record["answer"] + "\n"]


@pytest.mark.parametrize("transform", [Chat(template="llama3"), Template(template="{messages_}: {a}", loss=("a",))])
def test_only_what_is_learnt_counts_in_rows_of_text(transform, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [SYSTEM, *TALK], "messages_": "quéstion", "a": "answer"}) + "\n")
    source = JsonLines(str(path), holdout=0)
    data = Text(source=source, transforms=(transform,), loss_mask=True, sequence_length=600, batch_size=1)
    row = {name: array[0] for name, array in data.open("train", seed=0).rows(np.array([0])).items()}
    (record,) = source.open("train")
    found = apply(transform, record)["parts"]
    assert Bytes().decode(row["targets"]) == text(found)
    counted = row["targets"][row["loss_mask"] > 0]
    assert Bytes().decode(counted) == "".join(learnt(found))
    assert counted[-1] == Bytes().eos_id
