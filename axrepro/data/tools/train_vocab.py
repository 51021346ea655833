"""A vocabulary from text: `python -m axrepro.data train-vocab`."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from axrepro.command_line import Parser
from axrepro.data.records import Example
from axrepro.data.sources.files import JsonLines, TextFiles, held_out
from axrepro.data.vocabulary import HuggingFace, SentencePiece, Vocabulary
from axrepro.errors import UserError, nearest

Kind = Literal["sentencepiece-unigram", "sentencepiece-bpe", "bpe"]
_HOLDOUT = 50
_LONGEST = 1000  # characters of a sentence: SentencePiece leaves out those of more than 4192 bytes
_PAD, _EOS = "<pad>", "</s>"


class Trained(NamedTuple):
    """A vocabulary, and how it came about.

    Attributes:
      sentences: it was trained on.   held_out_bytes, held_out_tokens: of text that it was not trained on.
    """

    vocabulary: Vocabulary
    sentences: int
    held_out_bytes: int
    held_out_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """The compression of what was held out; nan if that is nothing."""
        return self.held_out_bytes / self.held_out_tokens if self.held_out_tokens else float("nan")


def train_vocab(
    records: Iterable[Example],
    path: str,
    *,
    size: int,
    kind: Kind = "sentencepiece-unigram",
    extra_ids: int = 100,
    field: str = "text",
    max_sentences: int = 1_000_000,
    seed: int = 0,
) -> Trained:
    """Trains a vocabulary on the text of records and writes it, whole or not at all.

    Ids: 0 padding, 1 end of document, the pieces, and last the sentinels <extra_id_99> ... <extra_id_0>, which no text
    gives. No text is unknown, and decoding gives it back: the SentencePiece kinds write rare characters as bytes, and
    neither normalise text nor put a space before it, so that a text encoded in parts has the same characters; but
    they take U+2581 for a space. "bpe" is byte-level, as in GPT-2.

    A sentence is a line, or 1000 characters of it. In memory are at most `max_sentences` of them, a uniform sample. One
    in fifty, by its crc32, is held out, and a sample of a hundredth of that size measures the compression.

    Args:
      path: the file to write, which must not exist. `SentencePiece(path)` reads it, and a "bpe" is read by
        `HuggingFace(path, eos="</s>", pad="<pad>", parse_special=False)`.
      size: ids, special ones included.   extra_ids: sentinels among them, for denoising.
      field: of the records, its text.   seed: of the sample.
    Raises:
      UserError: if the file exists or cannot be written, or the text is too little for so many ids.
    """
    if kind not in get_args(Kind):
        raise UserError(f"{kind!r} is no kind of vocabulary; {nearest(kind, get_args(Kind))}")
    for name, value, least in (("size", size, 1), ("extra_ids", extra_ids, 0), ("max_sentences", max_sentences, 1)):
        if value < least:
            raise UserError(f"{name}={value}: it takes a whole number from {least} on")
    target = Path(path)
    if target.exists():
        raise UserError(f"{path} exists, and texts may have been encoded with it; give another name, or delete it")
    if not os.access(target.parent, os.W_OK):  # told before hours of training, not after
        raise UserError(f"cannot write {path}; name a file in a folder that is there and can be written")
    sentences, evaluate = _samples(_sentences(records, field), max_sentences, seed)
    if not sentences:
        raise UserError("there is no text to train a vocabulary on")
    fit = _byte_level if kind == "bpe" else _sentencepiece
    content = fit(sentences, size - extra_ids, extra_ids, kind)
    scratch = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name a file in a folder that can be written") from None
    finally:
        scratch.unlink(missing_ok=True)
    made = HuggingFace(path, _EOS, _PAD, parse_special=False) if kind == "bpe" else SentencePiece(path)
    tokens = sum(len(made.encode(sentence)) for sentence in evaluate)
    return Trained(made, len(sentences), sum(len(sentence.encode()) for sentence in evaluate), tokens)


def _sentences(records: Iterable[Example], field: str) -> Iterator[str]:
    """The lines of all texts in pieces of at most `_LONGEST`, with their line feeds; empty ones are left out."""
    for number, record in enumerate(records):
        text = _text(record, field, f"record {number}")
        lines = (line for line in io.StringIO(text, newline="\n") if line != "\n")
        yield from (line[start : start + _LONGEST] for line in lines for start in range(0, len(line), _LONGEST))


def _text(record: Example, field: str, name: str) -> str:
    if field not in record:
        raise UserError(f"{name} has no field {field!r}; {nearest(field, record)}")
    try:
        return record[field].decode() if isinstance(record[field], bytes) else str(record[field])
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}); convert or remove it") from None


def _samples(sentences: Iterator[str], most: int, seed: int) -> tuple[list[str], list[str]]:
    """Sentences to train on, at most `most`, and such as are held out: uniform samples (Vitter's algorithm R)."""
    rng = np.random.default_rng(seed)
    samples: tuple[list[str], list[str]] = ([], [])
    seen, limits = [0, 0], (most, max(most // 100, 1000))
    for sentence in sentences:
        which = int(held_out(sentence, _HOLDOUT))
        sample, limit = samples[which], limits[which]
        seen[which] += 1
        if len(sample) < limit:
            sample.append(sentence)
        elif (place := int(rng.integers(seen[which]))) < limit:
            sample[place] = sentence
    return samples


def _sentinel_names(count: int) -> list[str]:
    """In the order of their ids: the first to be used is the highest."""
    return [f"<extra_id_{i}>" for i in reversed(range(count))]


def _sentencepiece(sentences: list[str], size: int, extra_ids: int, kind: str) -> bytes:
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            "training this vocabulary needs the package sentencepiece, which is missing: pip install axrepro[text]"
        ) from None
    model = io.BytesIO()
    trainer: Any = sentencepiece.SentencePieceTrainer  # whose type some versions do not tell
    try:
        trainer.train(
            sentence_iterator=(sentence.rstrip("\n") for sentence in sentences),
            model_writer=model,
            model_type=kind.removeprefix("sentencepiece-"),
            vocab_size=size,
            pad_id=0,
            pad_piece=_PAD,
            eos_id=1,
            eos_piece=_EOS,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # an indentation is a token, and not as many as it has spaces
            num_threads=4,  # sums are ordered by thread, so the same number everywhere
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"no vocabulary of {size} ids and {extra_ids} sentinels comes from {len(sentences)} sentences: "
            f"{' '.join(str(error).split())}"
        ) from None
    # Messages of protocol buffers end to end are one message with the repeated fields of all. The trainer has no other
    # way to give a control piece one of the last ids.
    pieces = []
    for name in _sentinel_names(extra_ids):
        piece = b"\x0a" + bytes([len(name)]) + name.encode() + b"\x18\x03"  # 1: its text, 3: its type, control
        pieces.append(b"\x0a" + bytes([len(piece)]) + piece)  # 1: a piece of the model
    return model.getvalue() + b"".join(pieces)


def _byte_level(sentences: list[str], size: int, extra_ids: int, kind: str) -> bytes:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError(
            "training this vocabulary needs the package tokenizers, which is missing: pip install axrepro[data]"
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_PAD, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    if (found := tokenizer.get_vocab_size()) != size:
        raise UserError(
            f"no vocabulary of {size} ids and {extra_ids} sentinels comes from {len(sentences)} sentences, but one of "
            f"{found} and the sentinels"
        )
    tokenizer.add_special_tokens(_sentinel_names(extra_ids))
    return tokenizer.to_str().encode()


def _parser() -> Parser:
    parser = Parser(
        prog="python -m axrepro.data train-vocab",
        description="Train a vocabulary on text, and report how well it compresses lines held out.",
    )
    parser.add_argument(
        "--input", metavar="GLOB", nargs="+", action="extend", required=True, help="files of text, or of JSON lines"
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="the file to write; it must not exist")
    parser.add_argument("--size", type=int, required=True, metavar="N", help="ids, special ones included")
    parser.add_argument("--kind", choices=get_args(Kind), default="sentencepiece-unigram")
    parser.add_argument("--extra_ids", type=int, default=100, metavar="N", help="sentinels among the ids; default: 100")
    parser.add_argument("--field", default="text", metavar="NAME", help="of JSON lines; default: text")
    parser.add_argument(
        "--max_sentences", type=int, default=1_000_000, metavar="N", help="the most to train on; default: 1000000"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample of sentences; default: 0")
    return parser


def _records(patterns: list[str], field: str) -> Iterator[Example]:
    """The texts in `field` of JSON lines, and lines of other files, under that name too."""
    for pattern in patterns:
        bare = pattern.removesuffix(".gz").removesuffix(".zst")
        json_lines = bare.endswith((".json", ".jsonl", ".ndjson"))
        source = JsonLines(pattern, holdout=0) if json_lines else TextFiles(pattern, holdout=0, separator="\n")
        records = source.open("train")
        for number, record in enumerate(records):
            yield {field: _text(record, field if json_lines else "text", records.name(number))}


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit code. Raises UserError for wrong input."""
    args = _parser().parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name not in ("input", "output")}
    trained = train_vocab(_records(args.input, args.field), args.output, **given)
    vocabulary = trained.vocabulary
    print(f"{vocabulary}: {vocabulary.size} ids from {trained.sentences} sentences")
    print(f"{trained.bytes_per_token:.3f} bytes per token in {trained.held_out_bytes} bytes of lines held out")
    return 0
