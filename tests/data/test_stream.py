"""Batches of streams: which shard each row comes from, where they go on, and who reads what."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from counting import Counting

from axrepro.core import MeshShape, UserError, make_mesh
from axrepro.data import prefetch

ROOT = Path(__file__).resolve().parents[2]


def one_device():
    return make_mesh(MeshShape(), jax.devices()[:1])


def expected(batch_size: int, shards: int, steps: int, seed: int = 5) -> list[list[list[int]]]:
    """The train batches, as a loop over rows."""
    epoch, number = [0] * shards, [0] * shards
    batches = []
    for _ in range(steps):
        rows = []
        for r in range(batch_size):
            s = r * shards // batch_size
            if number[s] == 3 + 2 * s:
                epoch[s], number[s] = epoch[s] + 1, 0
            rows.append([seed, epoch[s], s, number[s]])
            number[s] += 1
        batches.append(rows)
    return batches


@pytest.mark.parametrize("shards", [1, 2, 4, 16])
@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(data=2, seq=4), MeshShape(data=1, model=8)])
def test_each_row_comes_from_its_shard_and_shards_begin_epochs_by_themselves(shards, shape):
    batches = Counting(batch_size=16, shards=shards).batches("train", 5, make_mesh(shape))
    assert [next(batches)["tokens"].tolist() for _ in range(9)] == expected(16, shards, 9)


def test_seeking_any_position_gives_the_batches_from_there():
    stream = Counting(batch_size=8, shards=2)
    batches, seen = stream.batches("train", 5, one_device()), expected(8, 2, 12)
    positions = []
    for rows in seen:
        positions.append(json.loads(json.dumps(batches.position())))
        assert next(batches)["tokens"].tolist() == rows
    resumed = prefetch(stream.batches("train", 5, one_device()))
    for start in (3, 11, 7, 0, 5):  # forwards and backwards
        resumed.seek(positions[start])
        for rows in seen[start : start + 3]:
            assert next(resumed)["tokens"].tolist() == rows
    resumed.close()


def test_another_batch_size_goes_on_at_the_next_examples():
    first = Counting(batch_size=8, shards=2).batches("train", 5, one_device())
    next(first)
    second = Counting(batch_size=16, shards=2).batches("train", 5, one_device())
    second.seek(first.position())
    rows = [row for batch in expected(4, 2, 6) for row in batch]  # batches of 4 have the same order in each shard
    by_shard = [[row for row in rows if row[2] == shard] for shard in (0, 1)]
    assert next(second)["tokens"].tolist() == by_shard[0][4:12] + by_shard[1][4:12]


def test_the_eval_split_ends_once_every_shard_has_and_padding_fills_its_batches():
    batches = Counting(batch_size=8, shards=4).batches("eval", 0, make_mesh(MeshShape()))
    for _ in range(2):  # shards of 0, 2, 4 and 6 examples, two of each in a batch
        seen = list(batches)
        assert len(seen) == 3
        for step, batch in enumerate(seen):
            for row in range(8):
                shard, number = row // 2, 2 * step + row % 2
                real = number < 2 * shard
                assert batch["tokens"][row].tolist() == ([0, 0, shard, number] if real else [0] * 4)
                assert batch["segment_ids"][row].tolist() == [int(real)] * 4
        with pytest.raises(StopIteration):
            next(batches)
        batches.seek({"next_example": 0, "shards": 4})


def test_a_split_without_examples_is_refused():
    with pytest.raises(UserError, match="no examples in the eval split"):
        next(Counting(batch_size=8).batches("eval", 0, one_device()))


@pytest.mark.parametrize(
    "position",
    [
        {},
        {"next_example": 8},
        {"next_example": -8, "shards": 2},
        {"next_example": 1.5, "shards": 2},
        {"next_example": True, "shards": 2},
        {"next_example": 7, "shards": 2},
        {"next_example": 8, "shards": 2, "a": 1},
    ],
)
def test_a_malformed_position_is_refused_and_nothing_moves(position):
    batches = Counting(batch_size=8, shards=2).batches("train", 0, one_device())
    next(batches)
    with pytest.raises(UserError, match="is no position of a stream"):
        batches.seek(position)
    assert batches.position() == {"next_example": 8, "shards": 2}


def test_a_position_of_other_shards_is_refused_with_the_number_to_set():
    batches = Counting(batch_size=8, shards=2).batches("train", 0, one_device())
    with pytest.raises(UserError, match="so set shards=4"):
        batches.seek({"next_example": 8, "shards": 4})


def test_shards_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(UserError, match="divisor of the batch size, 8"):
        Counting(batch_size=8, shards=3)


def test_a_stream_has_no_examples_by_number():
    with pytest.raises(UserError, match="is a stream"):
        Counting(batch_size=8).open("train", 0)


class Broken(Counting):
    """Fails at the third example."""

    def examples(self, split, seed, epoch, shard):
        for number, example in enumerate(super().examples(split, seed, epoch, shard)):
            if number == 2:
                raise UserError("line 3 is broken")
            yield example


def test_a_shard_that_failed_fails_again_and_never_gives_padding():
    batches = Broken(batch_size=2).batches("train", 0, one_device())
    next(batches)
    for _ in range(2):
        with pytest.raises(UserError, match="line 3 is broken"):
            next(batches)
    assert batches.position() == {"next_example": 2, "shards": 1}


class Shapeless(Counting):
    """Its examples are shorter than it says, though they would broadcast."""

    def examples(self, split, seed, epoch, shard):
        for example in super().examples(split, seed, epoch, shard):
            yield {name: value[:1] for name, value in example.items()}


def test_examples_of_another_shape_than_promised_are_refused():
    with pytest.raises(UserError, match="promised"):
        next(Shapeless(batch_size=2).batches("train", 0, one_device()))


class Silent(Counting):
    """A stream that does not say which rows are padding."""

    def abstract(self):
        return {"tokens": super().abstract()["tokens"]}


def test_an_eval_split_that_cannot_mark_padding_is_refused():
    with pytest.raises(UserError, match="segment_ids or valid"):
        Silent(batch_size=2).batches("eval", 0, one_device())


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_sees_the_same_batches_and_reads_its_own_shards(hosts):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start, steps, shards = 3, 4, 8
    program = [sys.executable, str(ROOT / "tests/data/counting.py"), str(port), str(hosts)]
    started = [
        subprocess.Popen(
            [*program, *map(str, (host, 4, shards, start, steps))],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]
    try:
        found = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in started]
    finally:
        for process in started:
            process.kill()
    merged = [{int(row): value for seen, _ in found for row, value in seen[step].items()} for step in range(steps)]
    assert [[rows[r] for r in range(16)] for rows in merged] == expected(16, shards, start + steps)[start:]
    for host, (_, opened) in enumerate(found):
        assert opened == list(range(shards * host // hosts, shards * (host + 1) // hosts))
