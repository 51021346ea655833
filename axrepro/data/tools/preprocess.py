"""python -m axrepro.data preprocess: filters, deduplicates and tokenises records on many machines, with Apache Beam.

The work is cut into units, which read and write files on a file system that all workers share. A unit's files appear
under their names when they are complete, so a restart does only what is missing, and a unit does the same whoever does
it and whenever: the output depends on neither workers nor order. Beam carries units to workers, and nothing else.

1. `read`, a range of records each: what cannot be read or scores too low is left out; of the others a hash of the
   normalised text, and the MinHash signature.
2. `match`, a part of all hashes, or of one band of all signatures, each: which records are duplicates.
3. `write`, the ranges of 1 again: the records that stay, as one ArrayRecord shard.

Of records with the same normalised text the one with the smallest number stays; and a record that is similar to one
with a smaller number, whether that stays or not, is a near-duplicate. So no two that stay are similar candidates.
Departure from arXiv:2107.06499: it keeps one of each connected component, and drops also what is similar to none
before it.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from axrepro.command_line import Parser, find_function
from axrepro.data.records import BadRecord, Example, Faults, Records, Source, apply_transforms
from axrepro.data.sources.array_record import (
    SUFFIX,
    Index,
    Shard,
    array_record_writer,
    read_shard,
    whole,
    write_json,
)
from axrepro.data.sources.record_files import shard_path
from axrepro.data.tools.convert import (
    FORMATS,
    begin,
    described,
    finish,
    source_of,
    states,
    vocabulary_of,
)
from axrepro.data.tools.minhash import MinHash, groups, normalised
from axrepro.data.transforms.formats import Tokenise
from axrepro.data.vocabulary import Vocabulary
from axrepro.errors import UserError, is_number, nearest

Scorer = Callable[[Example], float]
STAGES = ("read", "bad", "filtered", "exact_duplicates", "near_duplicates", "written")
_MATCHED_AT_ONCE = 50_000_000  # records whose hashes a unit of `match` holds, at 24 bytes each


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every unit knows; see `preprocess`."""

    source: Source
    output: str
    identity: str
    records: int
    shards: int
    text_field: str
    scorer: Scorer | None
    threshold: float
    exact: bool
    near: MinHash | None
    vocabulary: Vocabulary | None
    max_bad_records: int

    @property
    def buckets(self) -> int:
        return -(-self.records // _MATCHED_AT_ONCE)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The records of a shard."""
        return self.records * shard // self.shards, self.records * (shard + 1) // self.shards

    def path(self, name: str) -> str:
        """A file of the work in progress."""
        return os.path.join(f"{self.output}.work", name)

    def shard(self, shard: int) -> str:
        return shard_path(self.output, shard, self.shards, SUFFIX)

    def matches(self) -> list[tuple[int, int]]:
        """(band, bucket) of every unit of `match`; band -1 is the exact one."""
        bands = [-1] * self.exact + list(range(self.near.bands[0] if self.near is not None else 0))
        return [(band, bucket) for band in bands for bucket in range(self.buckets)]


def preprocess(
    source: Source | str,
    output: str,
    shards: int = 1,
    *,
    scorer: Scorer | None = None,
    threshold: float = 0.0,
    dedupe: Sequence[str] = ("exact", "minhash"),
    minhash: MinHash = MinHash(),
    vocabulary: Vocabulary | None = None,
    text_field: str = "text",
    max_bad_records: int = 0,
    beam_flags: Sequence[str] = (),
) -> Index:
    """Writes what is worth training on of records to OUTPUT-00000-of-... and their index OUTPUT.json.

    The work in progress lies in OUTPUT.work/ until the end: per record 28 bytes, 4 per permutation and 12 per band.

    Args:
      source: its train split is read; or the pattern of files, all of which are.
      shards: files to write, each of an equal range of the records read; as many units of work can go on at once.
      scorer: of a record that has text; those below `threshold` are left out. One that it refuses with a ValueError is
        bad. It is told apart from other scorers by its name only.
      dedupe: "exact": by the normalised text; "minhash": by `minhash`.
      vocabulary: turns the text into `tokens`.
      max_bad_records: how many may be left out since they cannot be read, scored or tokenised; 0: none.
      beam_flags: which runner, and how; none: in this process.
    Returns:
      The index, whose counts are those of `STAGES`: `read` is the sum of the others.
    Raises:
      UserError: if the output exists or was begun with other arguments, or for wrong arguments.
      BadRecord: for one that cannot be used, where none may be left out.
    """
    if foreign := set(dedupe) - {"exact", "minhash"}:
        raise UserError(f"dedupe={min(foreign)!r}: it takes 'exact' and 'minhash'")
    if not is_number(threshold):
        raise UserError(f"threshold={threshold!r} is no number")
    options = _beam_options(beam_flags)
    source = source_of(source) if isinstance(source, str) else source
    near = minhash if "minhash" in dedupe else None
    records = source.open("train")
    plan = {
        "input": [described(source), states(source, "train")],
        "records": len(records),
        "shards": shards,
        "scorer": described(scorer),
        "threshold": threshold if scorer is not None else None,
        "dedupe": sorted(set(dedupe)),
        "minhash": described(near),
        "vocabulary": vocabulary and [vocabulary.fingerprint, vocabulary.size],
        "text_field": text_field,
    }
    begun = os.path.exists(f"{output}.plan.json")
    index = begin(output, plan)
    if index is not None or not begun:  # the work of a run that is over, or whose plan was removed
        shutil.rmtree(f"{output}.work", ignore_errors=True)
    if index is not None:
        return index
    job = _Job(
        source=source,
        output=output,
        identity=json.dumps(plan, sort_keys=True),
        records=len(records),
        shards=shards,
        text_field=text_field,
        scorer=scorer,
        threshold=float(threshold),
        exact="exact" in dedupe,
        near=near,
        vocabulary=vocabulary,
        max_bad_records=max_bad_records,
    )
    every = range(shards)
    _run(job, options, _read, {job.path(f"read-{n:05d}"): n for n in every})
    if (bad := sum(int(_made(job, n, "counts")[0]) for n in every)) > max_bad_records:
        raise UserError(f"{bad} bad records of {len(records)}, and max_bad_records={max_bad_records}")
    _run(job, options, _match, {_match_path(job, *unit): unit for unit in job.matches()})
    _run(job, options, _write, {job.path(f"write-{n:05d}.json"): n for n in every})
    counts, written = dict.fromkeys(STAGES, 0), []
    for number in every:
        made = json.loads(Path(job.path(f"write-{number:05d}.json")).read_text())
        written.append(Shard.of(made["shard"]))
        for name, count in made["counts"].items():
            counts[name] += count
    if counts["read"] != sum(counts[name] for name in STAGES[1:]) or counts["read"] != len(records):
        raise RuntimeError(f"records were lost or made: {counts} of {len(records)}")
    if counts["bad"] > max_bad_records:
        raise UserError(f"{counts['bad']} bad records of {len(records)}, and max_bad_records={max_bad_records}")
    made_with = records.vocabulary if vocabulary is None else (vocabulary.name, vocabulary.fingerprint)
    index = finish(output, plan, written, made_with, counts)
    shutil.rmtree(f"{output}.work")
    return index


def _beam_options(flags: Sequence[str]):
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Beam tells which clients of clouds it has not found
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("preprocessing needs the package apache-beam: pip install axrepro[beam]") from None
    finally:
        logging.disable(before)
    try:
        return PipelineOptions(list(flags))
    except SystemExit:  # of its argument parser, which has said why
        raise UserError(f"Beam takes no flags {' '.join(flags)}") from None


def _run(job: _Job, options, do: Callable, units: dict[str, object]) -> None:
    """Lets Beam do the units whose files, by which they are named here, are missing.

    Raises:
      UserError: what the first of them, in their order, raised.
    """
    import apache_beam as beam

    missing = [(path, unit) for path, unit in units.items() if not os.path.exists(path)]
    for path in units:
        Path(f"{path}.error").unlink(missing_ok=True)
    if not missing:
        return
    os.makedirs(job.path(""), exist_ok=True)
    with beam.Pipeline(options=options) as pipeline:
        _ = pipeline | beam.Create(missing) | beam.Reshuffle() | do.__name__ >> beam.Map(partial(_attempt, do, job))
    for path in units:
        if os.path.exists(error := f"{path}.error"):
            told = json.loads(Path(error).read_text())
            raise (BadRecord if told["bad"] else UserError)(told["error"])
    lost = [path for path in units if not os.path.exists(path)]
    if lost:
        raise RuntimeError(f"the workers have not written {lost[0]}; do they share the file system of {job.output}?")


def _attempt(do: Callable, job: _Job, named: tuple) -> None:
    """Does a unit. An error that a user can mend goes to a file, since a remote runner would tell it only in a log."""
    path, unit = named
    if os.path.exists(path):
        return
    try:
        do(job, unit)
    except UserError as error:
        if not os.path.exists(path):  # otherwise another attempt at it was faster
            write_json(f"{path}.error", {"bad": isinstance(error, BadRecord), "error": str(error)})


@lru_cache(maxsize=1)
def _open(source: Source, identity: str) -> Records:
    return source.open("train")


def _made(job: _Job, number: int, name: str) -> np.ndarray:
    """One of the arrays that a unit of `read` wrote, mapped."""
    return _mapped(job.path(f"read-{number:05d}/{name}.npy"))


def _mapped(path: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is corrupt ({error}); remove its folder, and go on") from None


def _text(record: Example, job: _Job) -> str | bytes:
    text = record.get(job.text_field)
    if not isinstance(text, str | bytes):
        raise ValueError(
            f"the field {job.text_field!r} is {text!r:.40}, not text"
            if job.text_field in record
            else f"it has no field {job.text_field!r}; {nearest(job.text_field, record)}"
        )
    return text


def _score(record: Example, scorer: Scorer) -> float:
    score = scorer(record)
    if not is_number(score):
        raise ValueError(f"its score is {score!r}, no finite number")
    return score


def _read(job: _Job, number: int) -> None:
    records, (start, stop) = _open(job.source, job.identity), job.bounds(number)
    faults, filtered = Faults(job.max_bad_records), 0
    ids, hashes, signatures = [], [], []
    for index in range(start, stop):
        try:
            record = records[index]
            try:
                text = _text(record, job)
                if job.scorer is not None and _score(record, job.scorer) < job.threshold:
                    filtered += 1
                    continue
                text = normalised(text)
            except BadRecord:
                raise
            except ValueError as error:
                raise BadRecord(f"{records.name(index)}: {error}") from None
        except BadRecord as error:
            faults.add(index, error)
            continue
        ids.append(index)
        if job.exact:
            hashes.append(blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest())
        if job.near is not None:
            signatures.append(job.near.signature(text))
    keys = np.zeros((0, len(ids)), np.uint64)
    arrays = {"counts": np.array([len(faults.seen), filtered]), "ids": np.array(ids, np.int64)}
    if job.near is not None:
        arrays["signatures"] = np.array(signatures, np.uint32).reshape(-1, job.near.permutations)
        keys = job.near.band_keys(arrays["signatures"])
    if job.exact:
        halves = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
        keys, arrays["halves"] = np.concatenate([keys, halves[None, :, 0]]), halves[:, 1]
    # each band, and the exact hashes as a last one, sorted by bucket, so that what a unit of `match` reads is one piece
    buckets = keys % np.uint64(job.buckets)
    arrays["rows"] = np.argsort(buckets, axis=1, kind="stable").astype(np.uint32)
    arrays["keys"] = np.take_along_axis(keys, arrays["rows"], axis=1)
    arrays["starts"] = np.stack([(buckets < bucket).sum(axis=1) for bucket in range(job.buckets + 1)], axis=1)
    folder = job.path(f"read-{number:05d}")
    scratch = f"{folder}.{secrets.token_hex(4)}"
    os.makedirs(scratch)
    for name, array in arrays.items():
        np.save(os.path.join(scratch, f"{name}.npy"), array, allow_pickle=False)
    try:
        os.replace(scratch, folder)
    except OSError:
        if not os.path.exists(folder):  # otherwise another attempt at it was faster
            raise
        shutil.rmtree(scratch)


def _match_path(job: _Job, band: int, bucket: int) -> str:
    return job.path(f"match-{'exact' if band < 0 else f'{band:03d}'}-{bucket:05d}.npy")


def _match(job: _Job, unit: tuple[int, int]) -> None:
    band, bucket = unit
    dropped = np.sort(_exact(job, bucket) if band < 0 else _similar(job, band, bucket))
    with whole(_match_path(job, band, bucket)) as path, open(path, "wb") as file:
        np.save(file, dropped, allow_pickle=False)


class _Bucket(NamedTuple):
    """One bucket of a band, of all shards: uint64[N] keys, and the shard, row there and id of each."""

    keys: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    ids: np.ndarray


def _bucket(job: _Job, band: int, bucket: int) -> _Bucket:
    parts = []
    for number in range(job.shards):
        start, stop = _made(job, number, "starts")[band, bucket : bucket + 2].tolist()
        rows = _made(job, number, "rows")[band, start:stop]
        ids = _made(job, number, "ids")[rows]
        parts.append((_made(job, number, "keys")[band, start:stop], np.full(len(rows), number, np.uint32), rows, ids))
    return _Bucket(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _exact(job: _Job, bucket: int) -> np.ndarray:
    """The ids of records that another one with a smaller id has the text of."""
    found = _bucket(job, -1, bucket)
    halves = np.concatenate([_made(job, n, "halves")[found.row[found.shard == n]] for n in range(job.shards)])
    order = np.lexsort((found.ids, halves, found.keys))
    keys, halves = found.keys[order], halves[order]
    same = (keys[1:] == keys[:-1]) & (halves[1:] == halves[:-1])
    return found.ids[order[1:][same]]


def _similar(job: _Job, band: int, bucket: int) -> np.ndarray:
    """The ids of records that are similar to one with a smaller id, and share this band with it."""
    assert job.near is not None
    found = _bucket(job, band, bucket)
    mapped = [_made(job, number, "signatures") for number in range(job.shards)]
    dropped = [np.zeros(0, np.int64)]
    for group in groups(found.keys, found.ids):
        places = zip(found.shard[group].tolist(), found.row[group].tolist(), strict=True)
        signatures = np.stack([mapped[shard][row] for shard, row in places])
        dropped.append(found.ids[group[job.near.similar_to_earlier(signatures)]])
    return np.unique(np.concatenate(dropped))


def _write(job: _Job, number: int) -> None:
    start, stop = job.bounds(number)
    ids, (bad, filtered) = _made(job, number, "ids"), _made(job, number, "counts").tolist()
    gone = {True: np.zeros(0, np.int64), False: np.zeros(0, np.int64)}  # by whether they are exact duplicates
    for band, bucket in job.matches():
        dropped = _mapped(_match_path(job, band, bucket))
        here = dropped[np.searchsorted(dropped, start) : np.searchsorted(dropped, stop)]
        gone[band < 0] = np.union1d(gone[band < 0], here)
    near = np.setdiff1d(gone[False], gone[True])
    stay = np.setdiff1d(ids, np.union1d(gone[True], near))
    path = job.shard(number)
    shard = read_shard(path) if os.path.exists(path) else _write_shard(job, path, stay, bad)
    counts = (stop - start, bad + len(stay) - shard.records, filtered, len(gone[True]), len(near), shard.records)
    made = {"shard": shard.as_json(), "counts": dict(zip(STAGES, counts, strict=True))}
    write_json(job.path(f"write-{number:05d}.json"), made)


def _write_shard(job: _Job, path: str, ids: np.ndarray, bad: int) -> Shard:
    records, rng = _open(job.source, job.identity), np.random.default_rng(0)  # tokenising draws nothing
    steps = [] if job.vocabulary is None else [Tokenise(vocabulary=job.vocabulary, field=job.text_field)]
    faults = Faults(max(0, job.max_bad_records - bad))
    with array_record_writer(path) as writer:
        for index in ids.tolist():
            name = records.name(index)
            try:
                writer.write(apply_transforms(steps, records[index], rng, name), name)
            except BadRecord as error:
                faults.add(index, error)
    return writer.shard


def _parser() -> Parser:
    parser = Parser(
        prog="python -m axrepro.data preprocess",
        description="Filters, deduplicates and tokenises records, and writes ArrayRecord shards.",
        epilog="Other flags go to Apache Beam, as --direct_num_workers=2 --direct_running_mode=multi_processing.",
    )
    parser.add_argument("--input", metavar="GLOB", required=True, help="files, whose kind their names tell")
    parser.add_argument("--format", choices=FORMATS, help="the kind of the files, where their names do not tell it")
    parser.add_argument("--output", metavar="PREFIX", required=True, help="writes PREFIX-00000-of-N... and PREFIX.json")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="files to write, and units of work")
    parser.add_argument("--scorer", metavar="MODULE:FUNCTION", help="scores a record")
    parser.add_argument("--threshold", type=float, default=0.0, metavar="X", help="the least score that stays")
    parser.add_argument("--dedupe", default="exact,minhash", metavar="KINDS", help="exact, minhash, both or nothing")
    parser.add_argument("--jaccard", type=float, default=MinHash.threshold, metavar="X", help="near from here on")
    parser.add_argument("--permutations", type=int, default=MinHash.permutations, metavar="N", help="of a signature")
    parser.add_argument("--shingle", type=int, default=MinHash.shingle, metavar="N", help="words of an n-gram")
    parser.add_argument(
        "--vocabulary",
        metavar="bytes|PATH",
        help="tokenise: bytes, a SentencePiece model, a tokenizer.json, or hf://OWNER/NAME",
    )
    parser.add_argument("--text_field", default="text", metavar="NAME", help="where the text is; default: text")
    parser.add_argument("--max_bad_records", type=int, default=0, metavar="N", help="how many may be left out")
    return parser


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit code. Raises UserError for wrong input."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    options = _beam_options(rest)
    known = options.get_all_options()
    for flag in rest:
        name = flag.removeprefix("--").removeprefix("no_").partition("=")[0]
        if flag.startswith("-") and name not in known:
            flags = [action.option_strings[-1].removeprefix("--") for action in parser._actions]
            raise UserError(f"unknown argument {flag!r}, for Beam too; {nearest(name, [*flags, *known])}")
    if args.max_bad_records < 0:
        raise UserError(f"--max_bad_records={args.max_bad_records} must be at least 0")
    index = preprocess(
        source_of(args.input, args.format),
        args.output,
        args.shards,
        scorer=args.scorer and find_function("scorer", args.scorer),
        threshold=args.threshold,
        dedupe=[kind for kind in args.dedupe.split(",") if kind],
        minhash=MinHash(threshold=args.jaccard, permutations=args.permutations, shingle=args.shingle),
        vocabulary=vocabulary_of(args.vocabulary) if args.vocabulary else None,
        text_field=args.text_field,
        max_bad_records=args.max_bad_records,
        beam_flags=rest,
    )
    told = {**index.counts} | ({} if index.tokens is None else {"tokens": index.tokens})
    print(f"{args.output}: {args.shards} shards, " + ", ".join(f"{n:,} {name}" for name, n in told.items()))
    return 0
