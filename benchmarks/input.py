"""How fast data comes: python -m benchmarks.input [--megabytes=4] [--rounds=5].

The same text (the standard library's files, cut into pieces of up to 500 bytes at line ends) lies on disk in every form
that axrepro reads, and in those of SeqIO and Grain. Each loader goes through it once, from opening the files: it reads,
shuffles, encodes as bytes, packs into rows of 512 and makes batches of 8. The loaders take turns; what counts is tokens
in rows per second of CPU time of all its threads, and of elapsed time. The ratio to a peer is that of one round.

SeqIO's own loader is `seqio.get_dataset` of a task over TFRecord files with `LMFeatureConverter(pack=True)`; Grain's is
a shuffled `MapDataset` over ArrayRecord files, `FirstFitPackIterDataset` and `batch`.

Then a run of `moe_tiny` tells what share of its steps it waited for data, and a process goes through a million small
examples and tells what memory it held along the way.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from axrepro.study.step_time import in_turns
from benchmarks.timing import Time

LENGTH, BATCH, PIECE = 512, 8, 500
PEERS = ("SeqIO", "Grain")


def pieces(megabytes: float) -> list[bytes]:
    """Text in pieces of whole lines, as far as they fit."""
    from axrepro.data import PythonStdlib

    out, size = [], 0
    for record in PythonStdlib(holdout=0).open("train"):
        piece = b""
        for line in record["text"].splitlines(keepends=True):
            if piece and len(piece) + len(line) > PIECE:
                out.append(piece)
                piece = b""
            piece = (piece + line)[:PIECE]
        out.append(piece or b"\n")
        size += len(record["text"])
        if size > megabytes * 1e6:
            break
    return out


def write(folder: Path, texts: list[bytes]) -> None:
    """Every form."""
    import pyarrow
    import pyarrow.parquet
    import tensorflow as tf
    from array_record.python.array_record_module import ArrayRecordWriter

    from axrepro.data import Bytes
    from axrepro.data.sources.array_record import write_array_records

    (folder / "text.txt").write_bytes(b"\0".join(texts))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text.decode() for text in texts]}), folder / "text.parquet")
    write_array_records([{"text": text} for text in texts], str(folder / "text"))
    tokens = [{"tokens": Bytes().encode(text)} for text in texts]
    write_array_records(tokens, str(folder / "tokens"), vocabulary=Bytes())
    writer = ArrayRecordWriter(str(folder / "raw.array_record"), "group_size:1")
    for text in texts:
        writer.write(text)
    writer.close()
    with tf.io.TFRecordWriter(str(folder / "text.tfrecord")) as records:
        for text in texts:
            value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text]))
            records.write(tf.train.Example(features=tf.train.Features(feature={"targets": value})).SerializeToString())


def write_tfds(folder: Path, texts: list[bytes]) -> None:
    import tensorflow_datasets as tfds

    class BenchmarkText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": ((i, {"text": text}) for i, text in enumerate(texts))}

        def _generate_examples(self):
            raise NotImplementedError

    BenchmarkText(data_dir=str(folder)).download_and_prepare()


def register(folder: Path) -> None:
    import seqio

    seqio.TaskRegistry.add(
        "benchmark_text",
        seqio.TFExampleDataSource(
            {"train": str(folder / "text.tfrecord")},
            feature_description={"targets": _string_feature()},
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
    )


def _string_feature():
    import tensorflow as tf

    return tf.io.FixedLenFeature([], tf.string)


def seqio_itself() -> Iterator[int]:
    import seqio

    rows = seqio.get_dataset(
        "benchmark_text",
        task_feature_lengths={"targets": LENGTH},
        dataset_split="train",
        shuffle=True,
        num_epochs=1,
        seed=0,
        feature_converter=seqio.LMFeatureConverter(pack=True),
        batch_size=BATCH,
    )
    for batch in rows.as_numpy_iterator():
        yield int((batch["decoder_segment_ids"] > 0).sum())


def grain_itself(folder: Path) -> Iterator[int]:
    import grain

    def encode(text: bytes) -> dict[str, np.ndarray]:
        ids = np.empty(len(text) + 1, np.int32)
        np.add(np.frombuffer(text, np.uint8), 3, out=ids[:-1], dtype=np.int32)
        ids[-1] = 1
        return {"tokens": ids}

    source = grain.sources.ArrayRecordDataSource(str(folder / "raw.array_record"))
    read = grain.MapDataset.source(source).shuffle(seed=0).map(encode).to_iter_dataset()
    packed = grain.experimental.FirstFitPackIterDataset(
        read, length_struct={"tokens": LENGTH}, num_packing_bins=64, shuffle_bins=True
    )
    for batch in packed.batch(BATCH, drop_remainder=False):
        yield int((batch["tokens_segment_ids"] > 0).sum())


def axrepro_loaders(folder: Path) -> dict[str, Callable[[], Iterator[int]]]:
    """By name; each goes through an epoch and yields the tokens of each batch."""
    from axrepro.data import BestFit, Concatenate, FirstFit, JsonLines, Text, TextFiles
    from axrepro.data.sources.array_record import ArrayRecords
    from axrepro.data.sources.parquet import Parquet
    from axrepro.data.sources.tfds import Tfds

    def epoch(source, packing) -> Iterator[int]:
        data = Text(batch_size=BATCH, sequence_length=LENGTH, source=source, packing=packing)
        cursor = data.cursor("train", 0)
        for _ in range(len(cursor.examples) // BATCH):
            yield int((cursor.rows(0, BATCH)["segment_ids"] > 0).sum())
            cursor.advance()

    sources = {
        "text file": TextFiles(str(folder / "text.txt"), separator="\0", holdout=0),
        "JSON lines": JsonLines(str(folder / "text.jsonl"), holdout=0),
        "Parquet": Parquet(str(folder / "text.parquet"), holdout=0),
        "ArrayRecord of text": ArrayRecords(str(folder / "text-*.array_record"), holdout=0),
        "ArrayRecord of tokens": ArrayRecords(str(folder / "tokens-*.array_record"), holdout=0),
        "TFDS (TFRecord)": Tfds(name="benchmark_text", data_dir=str(folder), eval_split=None),
    }
    loaders = {f"{name}, first fit": (lambda s=source: epoch(s, FirstFit())) for name, source in sources.items()}
    loaders["JSON lines, best fit"] = lambda: epoch(sources["JSON lines"], BestFit())
    loaders["JSON lines, concatenated"] = lambda: epoch(sources["JSON lines"], Concatenate())
    loaders["ArrayRecord of tokens, concatenated"] = lambda: epoch(sources["ArrayRecord of tokens"], Concatenate())
    loaders["SeqIO task"] = stream
    return loaders


def stream() -> Iterator[int]:
    """The task through axrepro's adapter."""
    from axrepro.data.seqio import SeqIO

    data = SeqIO(task="benchmark_text", batch_size=BATCH, task_feature_lengths=(("targets", LENGTH),))
    for row in data.examples("train", 0, 0, 0):
        yield int((row["segment_ids"] > 0).sum())


def timed(loader: Callable[[], Iterator[int]], seen: dict[str, int], name: str) -> Time:
    gc.collect()
    started = time.perf_counter(), time.process_time()
    seen[name] = sum(loader())
    return Time(time.perf_counter() - started[0], time.process_time() - started[1])


def compare(folder: Path, megabytes: float, rounds: int) -> list[str]:
    """The table."""
    texts = pieces(megabytes)
    write(folder, texts)
    write_tfds(folder, texts)
    register(folder)
    loaders = {"SeqIO": seqio_itself, "Grain": lambda: grain_itself(folder), **axrepro_loaders(folder)}
    seen: dict[str, int] = {}
    for name, loader in loaders.items():  # imports and traces
        timed(loader, seen, name)
    times = in_turns({name: (lambda n=name: timed(loaders[n], seen, n)) for name in loaders}, rounds)
    lines = [
        f"{len(texts):,} texts, {sum(map(len, texts)):,} bytes; {rounds} rounds",
        "",
        "| loader | tokens/s per core | tokens/s elapsed | beside SeqIO, per core | beside Grain, per core |",
        "|---|---|---|---|---|",
    ]
    for name, taken in times.items():
        speed = [np.median([seen[name] / seconds for seconds in column]) for column in zip(*taken, strict=True)]
        cells = [name, f"{speed[1]:,.0f}", f"{speed[0]:,.0f}"]
        for peer in PEERS:
            ratios = [
                (seen[name] / mine.cpu) / (seen[peer] / theirs.cpu)
                for mine, theirs in zip(taken, times[peer], strict=True)
            ]
            low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            cells.append("" if name == peer else f"{median:.2f} ({low:.2f}–{high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def stall(steps: int = 60) -> str:
    """The share of the steps of moe_tiny in which it waited for data, from its own log."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "axrepro.launch", "--experiment=moe_tiny", f"--workdir={folder}"]
        more = [f"--experiment.train.steps={steps}", "--experiment.eval.every=1000000", "--experiment.eval.batches=1"]
        subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL)
        logged = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait_s"] / line["step_time_s"] for line in logged if "data_wait_s" in line]
    return f"moe_tiny waited for data in {np.median(shares):.3%} of its step time (median of {len(shares)} lines)"


class _Small(Sequence):
    """Records of a few tokens, made when they are looked up."""

    def __init__(self, number: int):
        self._number = number

    def __len__(self):
        return self._number

    def __getitem__(self, index):
        return {"tokens": np.arange(3, 3 + index % 30, dtype=np.int32)}


def memory(examples: int = 1_000_000) -> list[str]:
    """What a process holds while it goes through so many examples of each kind."""
    from axrepro.data import FirstFit, JsonLines, Text
    from axrepro.data.sources.array_record import ArrayRecords, write_array_records

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.jsonl")
        with path.open("w") as file:
            for i in range(examples):
                file.write(f'{{"text": "example number {i}"}}\n')
        write_array_records(_Small(examples), f"{folder}/small")
        for name, source in (
            ("JSON lines", JsonLines(str(path), holdout=0)),
            ("ArrayRecord of tokens", ArrayRecords(f"{folder}/small-*.array_record", holdout=0)),
        ):
            cursor = Text(batch_size=64, sequence_length=64, source=source, packing=FirstFit()).cursor("train", 0)
            batches = len(cursor.examples) // 64
            held = []
            for number in range(batches):
                cursor.rows(0, 64)
                cursor.advance()
                if number % (batches // 8) == 0:
                    held.append(_resident())
            lines.append(f"{name}: {examples:,} examples; MB held along the way: {', '.join(map(str, held))}")
    lines.append(f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB, opening included")
    return lines


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "stall", "memory"), help="one part")
    args = parser.parse_args()
    if args.only in (None, "speed"):
        with tempfile.TemporaryDirectory() as folder:
            print(*compare(Path(folder), args.megabytes, args.rounds), sep="\n")
    if args.only in (None, "stall"):
        print(stall())
    if args.only in (None, "memory"):
        print(*memory(), sep="\n")


if __name__ == "__main__":
    main()
