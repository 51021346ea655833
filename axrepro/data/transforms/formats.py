"""Records to text: templates of their fields, and conversations in the format of a chat model.

What is learnt and what is only read are different `parts` of a text: pairs (text, in_loss). Each is encoded by itself,
as a prompt and its answer are when the model is used.
"""

import itertools
import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from axrepro.data.records import Example
from axrepro.data.vocabulary import Vocabulary
from axrepro.errors import UserError, nearest, require, require_choice

Part = tuple[str, bool]


def _with_parts(example: Example, parts: Iterable[Part]) -> Example:
    """The example with these parts for a text: neighbours of one kind joined, empty ones left out."""
    groups = itertools.groupby((part for part in parts if part[0]), key=lambda part: part[1])
    joined = tuple(("".join(text for text, _ in group), in_loss) for in_loss, group in groups)
    others = {name: value for name, value in example.items() if name not in ("text", "tokens", "loss_mask")}
    return {**others, "parts": joined}


def _text(value: Any, what: str) -> str:
    """A field as text."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (str, int, float, np.number)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{what} is {type(value).__name__}, and no text or number")


@dataclass(frozen=True, kw_only=True)
class Template:
    """Text with fields of the record in it: "parts" from "Question: {question}\\nAnswer: {answer}".

    A field is a name in braces and nothing more, so a record is looked up and never evaluated; `{{` and `}}` are
    braces. The fields go on beside the parts.

    Attributes:
      loss: the fields to be learnt; everything around them is only read. Empty: all of the text is learnt.
    """

    template: str
    loss: tuple[str, ...] = ()

    def __post_init__(self):
        require(self, "template", bool(self._pieces()), "text with names of fields in braces")
        names = [name for _, name in self._pieces() if name is not None]
        for name in self.loss:
            require(self, "loss", name in names, f"fields of the template; {nearest(name, names)}")

    def _pieces(self) -> list[tuple[str, str | None]]:
        """Pairs of a literal text and the field behind it, if there is one."""
        try:
            pieces = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise UserError(
                f"Template.template={self.template!r}: {error}; write {{{{ and }}}} for braces that name no field"
            ) from None
        for _, name, spec, conversion in pieces:
            plain = name is None or (name.isidentifier() and not spec and not conversion)
            require(self, "template", plain, f"names of fields in braces, such as {{answer}}, and not {name!r}")
        return [(literal, name) for literal, name, _, _ in pieces]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """
        Raises:
          UserError: if the record lacks a field, or has there what is no text or number.
        """
        parts = []
        for literal, name in self._pieces():
            parts.append((literal, not self.loss))
            if name is None:
                continue
            if name not in example:
                raise UserError(f"the record has no field {name!r}, which the template names; {nearest(name, example)}")
            parts.append((_text(example[name], f"the field {name!r}"), not self.loss or name in self.loss))
        return _with_parts(example, parts)


# The formats that models were trained with, as templates like those of published tokenizers; each ends a turn of the
# assistant with the token at which generation stops.
_FORMATS = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "<|begin_of_text|>"
        "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # no turn of the system: its text opens the first turn of the user
    "gemma": (
        "<bos>{% set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}"
        "{% for message in messages if message.role != 'system' %}"
        "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{% if loop.first and system %}{{ system | join('\n\n') }}\n\n{% endif %}"
        "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
}
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


@lru_cache(maxsize=8)
def _compiled(template: str):
    """A template of jinja2, in a sandbox: it comes with a tokenizer, from wherever that comes.

    The options, filters and functions are those that templates in a tokenizer_config.json expect, without that for the
    time of day: a record gives the same text on every host and every day.
    """
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("a Chat needs the package jinja2, which is missing: pip install axrepro[data]") from None

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the assistant says, and is what stands within."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    known: dict[str, Any] = environment.globals
    known["raise_exception"] = refuse
    try:
        return environment.from_string(template)
    except (TemplateError, RecursionError) as error:
        told = getattr(error, "message", error)
        raise UserError(
            f"Chat.template is no template of jinja2 (line {getattr(error, 'lineno', '?')}: {told})"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation as "parts" of text: the turns of the assistant are learnt, the others are only read.

    What is learnt of a turn is what generation would have to produce: all that comes after the prompt for it
    (`add_generation_prompt`), so the token that ends the turn too, and what a template writes behind that. What comes
    after the last turn of the assistant is left out, since nothing of it is learnt. The fields go on beside the parts.

    Prompts are the template's text for the messages so far; so the text for some messages must begin with that for
    fewer. Some templates break this on purpose, and show earlier turns without their reasoning: they can only be
    learnt with `loss="last"`.

    ShareGPT: `Chat(messages="conversations", role="from", content="value")`.

    Attributes:
      template: "chatml", "llama3", "gemma" or "plain" (User: ..., Assistant: ...), or a template of jinja2 as in the
        "chat_template" of a tokenizer_config.json. It is given messages (role, content and their other fields),
        add_generation_prompt, and the names of `variables`.
      messages: the field of the record that holds them.   role, content: the fields of a message. "human" is a user;
        "gpt", "model" and "bot" are the assistant.
      loss: "all" turns of the assistant, or the "last".
      variables: more names for the template, as pairs: (("bos_token", "<s>"), ("eos_token", "</s>")).
    """

    template: str = "chatml"
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    loss: Literal["all", "last"] = "all"
    variables: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        require_choice(self, "loss", Literal["all", "last"])
        jinja = "{{" in self.template or "{%" in self.template
        takes = f"{', '.join(map(repr, _FORMATS))}, or a template of jinja2"
        require(self, "template", jinja or self.template in _FORMATS, takes)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """
        Raises:
          UserError: if the record holds no messages or none of the assistant, or the template refuses them.
        """
        messages = self._messages(example)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            roles = ", ".join(message["role"] for message in messages) or "no messages"
            raise UserError(f"the conversation has no turn of the assistant to learn from ({roles})")
        parts, done = [], ""
        for turn in turns if self.loss == "all" else turns[-1:]:
            prompt = self._render(messages[:turn], True)
            text = self._render(messages[: turn + 1], False)
            for shorter, longer in ((done, prompt), (prompt, text)):
                if not longer.startswith(shorter):
                    raise self._broken(turn, shorter, longer)
            parts += [(prompt[len(done) :], False), (text[len(prompt) :], True)]
            done = text
        return _with_parts(example, parts)

    def _messages(self, example: Example) -> list[dict[str, Any]]:
        if self.messages not in example:
            hint = nearest(self.messages, example)
            raise UserError(f"the record has no field {self.messages!r}, which should hold the messages; {hint}")
        given = example[self.messages]
        if not isinstance(given, (list, tuple)) or not all(isinstance(message, Mapping) for message in given):
            raise UserError(f"the field {self.messages!r} is no list of messages, each with fields of its own")
        messages = []
        for number, message in enumerate(given):
            for field in (self.role, self.content):
                if field not in message:
                    raise UserError(f"message {number} has no field {field!r}; {nearest(field, message)}")
            role = _text(message[self.role], f"the role of message {number}")
            content = message[self.content]
            # a turn that only calls tools has no content, which templates for tools expect
            content = content if content is None else _text(content, f"the content of message {number}")
            others = {name: value for name, value in message.items() if name not in (self.role, self.content)}
            messages.append({**others, "role": _ROLES.get(role, role), "content": content})
            if content is None and self.template in _FORMATS:
                raise UserError(f"message {number} has no content, which the format {self.template!r} needs")
        return messages

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        template = _compiled(_FORMATS.get(self.template, self.template))
        from jinja2 import TemplateError

        try:
            return template.render(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **dict(self.variables)
            )
        except Exception as error:  # a template computes, so it can fail in any way: 1 / 0, no end of a recursion ...
            told = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UserError(f"the chat template refuses the first {len(messages)} message(s): {told}") from None

    def _broken(self, turn: int, shorter: str, longer: str) -> UserError:
        place = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
        remedy = 'another template, or loss="last"' if self.loss == "all" and turn else "another template"
        return UserError(
            f"the chat template's text for messages 0 to {turn} does not begin with its text for fewer: "
            f"{longer[place : place + 20]!r} stands where {shorter[place : place + 20]!r} was, so it is not known what "
            f"the assistant said; use {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class Tokenise:
    """A transform: `tokens`, in as few bytes as hold any id, in place of the text in `field`."""

    vocabulary: Vocabulary
    field: str = "text"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        if self.field not in example:
            raise ValueError(f"it has no field {self.field!r} to tokenise; {nearest(self.field, example)}")
        text = example[self.field]
        if not isinstance(text, str | bytes):
            raise ValueError(f"the field {self.field!r} is {text!r:.40}, not text")
        tokens = self.vocabulary.encode(text).astype(np.min_scalar_type(self.vocabulary.size - 1))
        return {**{name: value for name, value in example.items() if name != self.field}, "tokens": tokens}
