"""Real data, from files to batches: what comes out is what the files say, every token or picture of it once."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from axrepro.core import MeshShape, make_mesh
from axrepro.data import BestFit, Bytes, JsonLines, Mixture, Part, Text, TextFiles
from axrepro.data.formats import Template

DATA = Path(os.environ.get("AXREPRO_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def needs(name: str):
    return pytest.mark.skipif(not (DATA / name).exists(), reason=f"needs {DATA / name}; AXREPRO_DATA says where it is")


def one_epoch(data: Text, split="train") -> dict[str, np.ndarray]:
    examples = data.open(split, 0)
    return examples.rows(np.arange(len(examples)))


@needs("gsm8k/train.jsonl")
def test_only_the_answers_of_word_problems_are_learnt():
    files = DATA / "gsm8k"
    data = Text(
        batch_size=8,
        sequence_length=1024,
        source=JsonLines(str(files / "train.jsonl"), eval_pattern=str(files / "test.jsonl")),
        transforms=(Template(template="Q: {question}\nA: {answer}", loss=("answer",)),),
        packing=BestFit(),
        loss_mask=True,
    )
    rows = one_epoch(data, "eval")
    written = [json.loads(line) for line in (files / "test.jsonl").read_text().splitlines()]
    assert data.open("eval", 0).stats()["documents"] == len(written) == 1319
    # segments that were not cut are whole problems
    answers = set()
    for row in range(len(rows["tokens"])):
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            here = rows["segment_ids"][row] == segment
            learnt = rows["targets"][row][here & (rows["loss_mask"][row] > 0)]
            answers.add(Bytes().decode(learnt))
    whole = {r["answer"] for r in written if len(f"Q: {r['question']}\nA: {r['answer']}".encode()) < 1024}
    assert whole <= answers
    assert rows["loss_mask"].sum() == sum(len(r["answer"].encode()) + 1 for r in written)
    filled = (rows["segment_ids"] > 0).mean()
    assert filled > 0.97  # the most that fits: problems have 200 to 1,000 bytes


@needs("tinyshakespeare")
def test_plays_are_cut_at_speeches_and_nothing_is_lost():
    (path,) = (DATA / "tinyshakespeare").glob("*.txt")
    data = Text(batch_size=8, sequence_length=256, source=TextFiles(str(path), separator="\n\n", holdout=10))
    speeches = sorted(filter(None, path.read_bytes().split(b"\n\n")))
    found = []
    for split in ("train", "eval"):
        rows = one_epoch(data, split)
        assert (rows["segment_ids"] > 0).sum() == data.open(split, 0).stats()["tokens"]
        found += [record["text"] for record in data.source.open(split)]
    assert sorted(found) == speeches


@needs("multi30k")
def test_languages_are_mixed_at_their_rates_in_their_own_order():
    files = {path.name.split(".")[-2]: path for path in sorted((DATA / "multi30k").glob("val.*.gz"))}
    assert len(files) >= 2
    rates = {name: rate for name, rate in zip(files, (4.0, 2.0, 1.0, 1.0), strict=False)}
    parts = tuple(
        Part(
            name=name,
            rate=rates[name],
            data=Text(
                batch_size=8,
                sequence_length=64,
                source=TextFiles(str(path), separator="\n", holdout=0),
                packing=BestFit(),
                shuffle=False,
            ),
        )
        for name, path in files.items()
    )
    batches = Mixture(batch_size=8, parts=parts).batches("train", 0, make_mesh(MeshShape()))
    texts = {name: gzip.decompress(path.read_bytes()) for name, path in files.items()}
    taken = {name: 0 for name in files}
    for _ in range(50):
        batch = {name: np.asarray(array) for name, array in next(batches).items()}
        for tokens in batch["targets"]:
            first = bytes(int(t) - 3 for t in tokens[: int(np.argmax(tokens == 1))])
            homes = [name for name, text in texts.items() if first in text]
            assert homes
            if len(homes) == 1:
                taken[homes[0]] += 1
    counts = batches.counts()
    assert sum(counts.values()) == 400
    total = sum(rates.values())
    for name, rate in rates.items():
        assert abs(counts[name] - 400 * rate / total) < 4
        assert taken[name] <= counts[name]
