"""python -m axrepro.data convert: writes the records of any source as ArrayRecord shards."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from axrepro.command_line import Parser
from axrepro.data.base import Data, Split
from axrepro.data.records import BadRecord, Example, Faults, Records, Source, Transform, apply_transforms
from axrepro.data.sources.array_record import (
    SUFFIX,
    ArrayRecords,
    ArrayRecordWriter,
    Index,
    Shard,
    array_record_writer,
    read_index,
    read_shard,
    require_absent,
    write_index,
    write_json,
)
from axrepro.data.sources.files import Files, JsonLines, TextFiles
from axrepro.data.sources.parquet import Parquet
from axrepro.data.sources.record_files import shard_path
from axrepro.data.stream import Stream
from axrepro.data.transforms.formats import Tokenise
from axrepro.data.vocabulary import Bytes, HuggingFace, SentencePiece, Vocabulary
from axrepro.errors import UserError

FORMATS = ("text", "jsonl", "parquet", "array_record", "example")
_EXTENSIONS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", SUFFIX: "array_record"}


def convert(
    records: Records | Iterable[Example],
    output: str,
    shards: int = 1,
    transforms: Sequence[Transform] = (),
    vocabulary: Vocabulary | None = None,
    text_field: str = "text",
    max_bad_records: int = 0,
    made_from: str = "",
) -> Index:
    """Writes records to OUTPUT-00000-of-... files and their index OUTPUT.json; see `array_record.py`.

    `Records`, or a list, keep their order, and shards that an interrupted call finished are not written again. Of
    another iterable record i goes to shard i modulo their number, in one pass, and nothing is there before its end. A
    random transform draws from a generator seeded by the record's number.

    Args:
      vocabulary: turns the text in `text_field` into `tokens`; None: nothing is tokenised.
      max_bad_records: how many may be left out, which are told and counted in the index (and may be counted again after
        a restart); 0: the first is an error.
      made_from: what the records are, such as their files and sizes: a call that finds shards made from something else
        is refused. The other arguments, and the number of `Records`, are added to it.
    Returns:
      The index, with counts of `read`, `bad` and `written`.
    Raises:
      UserError: if the output is there and was made otherwise, or cannot be written.
      BadRecord: for one that cannot be read, transformed or written.
    """
    steps = (*transforms, *([] if vocabulary is None else [Tokenise(vocabulary=vocabulary, field=text_field)]))
    plan = {
        "input": made_from or type(records).__name__,
        "records": len(records) if isinstance(records, Records | Sequence) else None,
        "shards": shards,
        "transforms": [described(transform) for transform in transforms],
        "vocabulary": vocabulary and [vocabulary.fingerprint, vocabulary.size, text_field],
    }
    if (index := begin(output, plan)) is not None:
        return index
    faults, paths = Faults(max_bad_records), [shard_path(output, number, shards, SUFFIX) for number in range(shards)]
    fixed = np.random.default_rng(0)  # for tokenising alone, which draws nothing: a new generator takes 15 µs

    def put(writer: ArrayRecordWriter, number: int, read: Callable[[], Example]) -> None:
        name = records.name(number) if isinstance(records, Records) else f"record {number}"
        rng = np.random.default_rng((0, number)) if transforms else fixed
        try:
            writer.write(apply_transforms(steps, read(), rng, name), name)
        except BadRecord as error:
            faults.add(number, error)

    if isinstance(records, Records | Sequence):
        written, read = _in_order(records, paths, put)
    else:
        written, read = _in_one_pass(records, paths, put)
    kept = sum(shard.records for shard in written)
    made_with = records.vocabulary if isinstance(records, Records) else None  # of tokens that are there already
    if vocabulary is not None:
        made_with = vocabulary.name, vocabulary.fingerprint
    return finish(output, plan, written, made_with, {"read": read, "bad": read - kept, "written": kept})


_Put = Callable[[ArrayRecordWriter, int, Callable[[], Example]], None]


def _in_order(records: Records | Sequence[Example], paths: list[str], put: _Put) -> tuple[list[Shard], int]:
    written = []
    for number, path in enumerate(paths):
        if os.path.exists(path):
            written.append(read_shard(path))
            continue
        with array_record_writer(path) as writer:
            for index in range(len(records) * number // len(paths), len(records) * (number + 1) // len(paths)):
                put(writer, index, lambda index=index: records[index])
        written.append(writer.shard)
    return written, len(records)


def _in_one_pass(records: Iterable[Example], paths: list[str], put: _Put) -> tuple[list[Shard], int]:
    read = 0
    with ExitStack() as stack:
        # one that is there is of a call that was killed between the ends of two shards
        there = {path: read_shard(path) for path in paths if os.path.exists(path)}
        writers = {path: stack.enter_context(array_record_writer(path)) for path in paths if path not in there}
        for number, record in enumerate(records):
            read += 1
            if (path := paths[number % len(paths)]) in writers:
                put(writers[path], number, lambda record=record: record)
    return [there[path] if path in there else writers[path].shard for path in paths], read


def described(value: Any) -> Any:
    """A config value as JSON that is the same in every process: functions by name, dataclasses by their fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"": type(value).__name__, **{f.name: described(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, (tuple, list)):
        return [described(one) for one in value]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
    return value


def states(source: Source, split: Split) -> list[list[str | int]]:
    """Path, size and time of the last change of each file, for sources of files."""
    if not isinstance(source, Files):
        return []
    return [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in source.files(split)[0]]


def begin(output: str, plan: dict) -> Index | None:
    """Notes in OUTPUT.plan.json what is about to be made; the index if the same was made already.

    Raises:
      UserError: if something else lies there, or was begun.
    """
    if plan["shards"] < 1:
        raise UserError(f"shards={plan['shards']} must be at least 1")
    made_from = sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    path = f"{output}.plan.json"
    if (index := read_index(output)) is not None and index.made_from == made_from:
        Path(path).unlink(missing_ok=True)  # killed just before it was removed
        return index
    require_absent(f"{output}.json")
    folder, name = os.path.split(os.path.abspath(output))
    if os.path.isdir(folder):
        for left in os.listdir(folder):
            if left.startswith((f"{name}-", f"{name}.")) and left.endswith(".incomplete"):  # of a call that was killed
                os.remove(os.path.join(folder, left))
    if not os.path.exists(path):
        shards = plan["shards"]
        for number in range(shards):
            require_absent(shard_path(output, number, shards, SUFFIX))
        write_json(path, plan)
        return None
    try:
        begun = json.loads(Path(path).read_text())
        differ = [name for name in plan if begun.get(name) != json.loads(json.dumps(plan[name]))]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}; remove what begins with {output} and start again") from None
    if differ:
        raise UserError(
            f"{output} was begun with another {' and '.join(differ)} ({path}); give the same arguments to go on, "
            "remove what was begun, or name another output"
        )
    return None


def finish(output: str, plan: dict, shards: Sequence[Shard], vocabulary: tuple[str, str] | None, counts: dict) -> Index:
    """Writes the index of what `begin` began; see `write_index`."""
    made_from = sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    index = write_index(output, shards, vocabulary, made_from, counts)
    Path(f"{output}.plan.json").unlink(missing_ok=True)
    return index


def source_of(pattern: str, format: str | None = None) -> Source:
    """All records of files, whose kind their names tell, or `format`.

    Raises:
      UserError: if the names tell no kind.
    """
    name = pattern.removesuffix(".gz").removesuffix(".zst")
    format = format or next((kind for end, kind in _EXTENSIONS.items() if name.endswith(end)), None)
    if format == "text":
        return TextFiles(pattern, holdout=0)
    if format == "jsonl":
        return JsonLines(pattern, holdout=0)
    if format == "parquet":
        return Parquet(pattern, holdout=0)
    if format == "array_record":
        return ArrayRecords(pattern, holdout=0)
    if format == "example":
        return ArrayRecords(pattern, holdout=0, encoding="example")
    raise UserError(
        f"the name {pattern!r} does not tell the kind of its files; let it end in "
        f"{', '.join(_EXTENSIONS)} (or these and .gz or .zst), or give --format, one of {', '.join(FORMATS)}"
    )


def vocabulary_of(name: str) -> Vocabulary:
    """`bytes`, the path of a SentencePiece model, or what `HuggingFace` takes: a tokenizer.json, its folder, or hf://."""
    vocabulary = SentencePiece(name)
    if name == "bytes":
        vocabulary = Bytes()
    elif name.startswith("hf://") or name.endswith(".json") or Path(name).expanduser().is_dir():
        vocabulary = HuggingFace(name)
    vocabulary.fingerprint  # noqa: B018  a wrong path shall be told first
    return vocabulary


def _experiment_data(name: str) -> Data:
    from axrepro import registry

    return registry.load(registry.find(name, registry.index())).data


def examples_of(stream: Stream, split: Split, number: int | None = None) -> Iterator[Example]:
    """The examples of a stream's first epoch with seed 0, one shard after the other; of a long one the first `number`.

    Raises:
      UserError: if there is no end to them, and no number is given.
    """
    if number is None and stream.endless(split):
        raise UserError(f"the {split} split of {stream.describe()} has no end; say how many examples (--examples=N)")
    every = (stream.examples(split, 0, 0, shard) for shard in range(stream.shards))
    return itertools.islice(itertools.chain.from_iterable(every), number)


def _parser() -> Parser:
    parser = Parser(prog="python -m axrepro.data convert", description=__doc__)
    parser.add_argument("--input", metavar="GLOB", help="files, whose kind their names tell: .txt .jsonl .parquet ...")
    parser.add_argument("--experiment", metavar="NAME", help="in place of --input: what an experiment's data reads")
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="with --experiment; default: train")
    parser.add_argument("--examples", type=int, metavar="N", help="of a stream (SeqIO): how many; default: all")
    parser.add_argument("--format", choices=FORMATS, help="the kind of the --input files, where names do not tell it")
    parser.add_argument("--output", metavar="PREFIX", required=True, help="writes PREFIX-00000-of-N... and PREFIX.json")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="files to write; default: 1")
    parser.add_argument(
        "--vocabulary",
        metavar="bytes|PATH",
        help="tokenise: bytes, a SentencePiece model, a tokenizer.json, or hf://OWNER/NAME",
    )
    parser.add_argument("--text_field", default="text", metavar="NAME", help="what is tokenised; default: text")
    parser.add_argument("--max_bad_records", type=int, default=0, metavar="N", help="how many may be left out")
    return parser


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit code. Raises UserError for wrong input."""
    args = _parser().parse_args(argv)
    if (args.input is None) == (args.experiment is None):
        raise UserError("give one of --input=GLOB and --experiment=NAME")
    if args.max_bad_records < 0:
        raise UserError(f"--max_bad_records={args.max_bad_records} must be at least 0")
    if not args.output:
        raise UserError("--output= is empty; name where the shards go")
    data = None if args.experiment is None else _experiment_data(args.experiment)
    records: Records | Iterable[Example]
    if isinstance(data, Stream):
        if args.vocabulary:
            raise UserError("--vocabulary is for text, and a stream gives what its own converter made")
        records, of = examples_of(data, args.split, args.examples), [described(data), args.split, args.examples]
    else:
        source = source_of(args.input, args.format) if data is None else getattr(data, "source", None)
        if args.examples is not None:
            raise UserError("--examples is for streams; records are converted all")
        if not isinstance(source, Source):
            raise UserError(f"the data of {args.experiment!r} has no source of records; give --input=GLOB")
        records, of = source.open(args.split), [described(source), args.split, states(source, args.split)]
    vocabulary = args.vocabulary and vocabulary_of(args.vocabulary)
    index = convert(
        records,
        args.output,
        args.shards,
        vocabulary=vocabulary or None,
        text_field=args.text_field,
        max_bad_records=args.max_bad_records,
        made_from=json.dumps(of),
    )
    told = {**index.counts, "bytes": index.payload} | ({} if index.tokens is None else {"tokens": index.tokens})
    print(f"{args.output}: {args.shards} shards, " + ", ".join(f"{count:,} {name}" for name, count in told.items()))
    return 0
