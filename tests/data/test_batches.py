"""Batches on an emulated mesh of eight devices, and prefetching them."""

import gc
import json
import re
import threading
import time
import weakref
from dataclasses import replace

import jax
import numpy as np
import pytest

from axrepro.core import MeshShape, UserError, make_mesh
from axrepro.data import (
    Batches,
    Bytes,
    CursorBatches,
    Examples,
    ExamplesCursor,
    Feature,
    JsonLines,
    MemoryStore,
    Mixture,
    PackedText,
    Part,
    Pipeline,
    Text,
    TextFiles,
    prefetch,
)
from axrepro.data.workers import _Elements

RAW = [bytes([97 + i]) * (5 * i % 43) for i in range(26)]
MESHES = [MeshShape(), MeshShape(data=2, fsdp=4), MeshShape(data=2, seq=4), MeshShape(data=1, model=8)]


def packed(seed=0) -> PackedText:
    return PackedText(MemoryStore([(Bytes().encode(data), None) for data in RAW], Bytes(), 0), Bytes(), 8, seed)


class Recorded(Examples):
    """Packed text that notes which indices were asked for."""

    def __init__(self):
        self._inner = packed()
        self.asked = []

    def __len__(self):
        return len(self._inner)

    def rows(self, indices):
        self.asked.append(indices.tolist())
        return self._inner.rows(indices)


class Failing(Batches):
    """Counts 0, 1, 2 and then fails."""

    def __init__(self):
        self.next, self.closed = 0, False

    def __next__(self):
        if self.next == 3:
            raise OSError("the disk is gone")
        self.next += 1
        return {"x": jax.numpy.full((), self.next - 1)}

    def position(self):
        return {"next": self.next}

    def seek(self, position):
        self.next = position["next"]

    def close(self):
        self.closed = True


def one_device():
    return make_mesh(MeshShape(), jax.devices()[:1])


def assert_batches_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.fixture
def batches():
    return CursorBatches(ExamplesCursor(packed(), 16), make_mesh(MeshShape()))


@pytest.mark.parametrize("shape", MESHES)
def test_every_mesh_holds_the_rows_in_order(shape):
    assert len(jax.devices()) == 8
    examples = packed()
    batches = CursorBatches(ExamplesCursor(examples, 16), make_mesh(shape))
    for step in range(2 * len(examples) // 16 + 2):
        batch = next(batches)
        assert_batches_equal(batch, examples.rows(np.arange(16) + 16 * step))
        assert batch["tokens"].shape == (16, 8)


@pytest.mark.parametrize("shape", MESHES)
def test_each_device_gets_its_rows_and_each_range_is_made_once(shape):
    examples, mesh = Recorded(), make_mesh(shape)
    batches = CursorBatches(ExamplesCursor(examples, 16), mesh)
    examples.asked.clear()
    batch = next(batches)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    assert sorted(examples.asked) == np.arange(16).reshape(ways, -1).tolist()
    whole = packed().rows(np.arange(16))
    for name, array in batch.items():
        for shard in array.addressable_shards:
            assert shard.data.shape == (16 // ways, 8 // mesh.shape["seq"])
            np.testing.assert_array_equal(shard.data, whole[name][shard.index])


def test_seeking_any_position_gives_the_batches_from_there(batches):
    seen = []
    for _ in range(12):
        seen.append((json.loads(json.dumps(batches.position())), next(batches)))
    for start in (0, 3, 7, 11):
        resumed = CursorBatches(ExamplesCursor(packed(), 16), make_mesh(MeshShape(data=4, fsdp=2)))
        resumed.seek(seen[start][0])
        for _, batch in seen[start:]:
            assert_batches_equal(next(resumed), batch)


def test_another_batch_size_goes_on_at_the_next_example(batches):
    next(batches)
    smaller = CursorBatches(ExamplesCursor(packed(), 8), make_mesh(MeshShape()))
    smaller.seek(batches.position())
    assert_batches_equal(next(smaller), packed().rows(np.arange(16, 24)))


def test_one_epoch_ends_with_padding_rows():
    examples = packed()
    batches = list(CursorBatches(ExamplesCursor(examples, 16, epochs=1), make_mesh(MeshShape())))
    assert len(batches) == -(-len(examples) // 16)
    assert len(examples) % 16
    rows = np.concatenate([batch["segment_ids"] for batch in batches])
    np.testing.assert_array_equal(rows[: len(examples)], examples.rows(np.arange(len(examples)))["segment_ids"])
    assert not rows[len(examples) :].any()
    assert (rows > 0).sum() == examples.stats()["tokens"]


def test_a_config_reads_eval_once_and_train_without_end(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" ".join(RAW))
    data = Text(batch_size=8, sequence_length=8, source=TextFiles(f"{tmp_path}/a.txt", separator=" ", holdout=3))
    mesh = make_mesh(MeshShape())
    for _ in range(2):
        seen = sum(int((batch["segment_ids"] > 0).sum()) for batch in data.batches("eval", 0, mesh))
        assert seen == data.open("eval", 0).stats()["tokens"]
    train, examples = data.batches("train", 0, mesh), data.open("train", 0)
    for step in range(3 * len(examples) // 8):
        assert_batches_equal(next(train), examples.rows(np.arange(8) + 8 * step))


@pytest.mark.parametrize(
    "position",
    [{}, {"next_example": -1}, {"next_example": 1.5}, {"next_example": True}, {"at": 3}, {"next_example": 1, "a": 2}],
)
def test_a_malformed_position_is_refused_and_nothing_moves(batches, position):
    next(batches)
    for target in (batches, prefetch(batches)):
        with pytest.raises(UserError, match="is no data position"):
            target.seek(position)
        assert target.position() == {"next_example": 16}


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused():
    with pytest.raises(UserError, match="batch"):
        CursorBatches(ExamplesCursor(packed(), 12), make_mesh(MeshShape()))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetching_changes_neither_batches_nor_positions(depth):
    plain = CursorBatches(ExamplesCursor(packed(), 16, epochs=2), one_device())
    ahead = prefetch(CursorBatches(ExamplesCursor(packed(), 16, epochs=2), one_device()), depth)
    assert ahead.position() == {"next_example": 0}
    for batch in plain:
        assert_batches_equal(next(ahead), batch)
        assert ahead.position() == plain.position()
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ahead)
    ahead.close()


def test_prefetch_stays_depth_batches_ahead_and_counts_what_was_consumed():
    inner = CursorBatches(ExamplesCursor(packed(), 16), one_device())
    ahead = prefetch(inner, depth=3)
    next(ahead)
    deadline = time.monotonic() + 10
    while inner.position() != {"next_example": 4 * 16} and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert inner.position() == {"next_example": 4 * 16}
    assert ahead.position() == {"next_example": 16}
    ahead.close()


def test_seeking_a_prefetch_goes_back_and_on():
    ahead = prefetch(CursorBatches(ExamplesCursor(packed(), 16), one_device()))
    first = [next(ahead) for _ in range(4)]
    for start in (1, 0, 3):
        ahead.seek({"next_example": 16 * start})
        assert ahead.position() == {"next_example": 16 * start}
        for batch in first[start:]:
            assert_batches_equal(next(ahead), batch)
    with pytest.raises(UserError):
        ahead.seek({"next": 0})
    assert_batches_equal(next(ahead), packed().rows(np.arange(64, 80)))
    ahead.close()


def test_an_exception_is_raised_where_its_batch_would_have_been():
    ahead = prefetch(Failing(), depth=2)
    assert [int(next(ahead)["x"]) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    ahead.seek({"next": 2})
    assert int(next(ahead)["x"]) == 2
    ahead.close()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_early_ends_the_thread(taken):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "prefetch"]

    before, inner = threads(), Failing()
    ahead = prefetch(inner, depth=1)
    for _ in range(taken):
        next(ahead)
    ahead.close()
    ahead.close()
    assert inner.closed
    assert threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(ahead)


def test_a_forgotten_prefetch_is_collected_with_its_thread():
    ahead = prefetch(CursorBatches(ExamplesCursor(packed(), 16), one_device()))
    next(ahead)
    thread, forgotten = ahead._producer._thread, weakref.ref(ahead)
    del ahead
    gc.collect()
    assert forgotten() is None
    assert not thread.is_alive()


def test_a_depth_below_one_is_refused(batches):
    with pytest.raises(UserError, match="depth 0"):
        prefetch(batches, depth=0)


def test_a_source_that_stalls_is_named(caplog):
    class Slow(Failing):
        def __next__(self):
            time.sleep(0.5)
            return super().__next__()

        def reading(self):
            return "web/c4"

    made = prefetch(Slow(), patience=0.1)
    next(made)
    made.close()
    assert re.search(r"no batch for 0 s; being read: web/c4", caplog.text)


def test_counts_are_of_the_batches_handed_out_not_of_those_made_ahead(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" ".join(RAW))
    text = Text(batch_size=1, sequence_length=8, source=TextFiles(f"{tmp_path}/a.txt", separator=" ", holdout=0))
    mixed = Mixture(batch_size=16, parts=(Part(name="a", data=text), Part(name="b", data=text, rate=3.0)))
    made = prefetch(mixed.batches("train", 0, make_mesh(MeshShape())), depth=4)
    for step in range(3):
        assert made.counts() == {"a": 4 * step, "b": 12 * step}
        next(made)
        time.sleep(0.05)
    assert made.reading() in ("a", "b")
    made.close()


def test_worker_processes_make_the_same_batches_also_from_another_position(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{"x" * i}"}}\n' for i in range(60)))
    data = Text(batch_size=16, sequence_length=8, source=JsonLines(f"{tmp_path}/a.jsonl", holdout=0))
    mesh = make_mesh(MeshShape(data=2, fsdp=4))
    alone, helped = data.batches("train", 0, mesh), replace(data, workers=2).batches("train", 0, mesh)
    try:
        for _ in range(5):
            assert_batches_equal(next(helped), next(alone))
        assert helped.position() == alone.position()
        for batches in (alone, helped):
            batches.seek({"next_example": 24})
        for _ in range(3):
            assert_batches_equal(next(helped), next(alone))
    finally:
        helped.close()


def test_an_error_of_a_worker_is_told_with_its_kind(tmp_path):
    def fail(example, rng):
        return example["m"]

    (tmp_path / "a.jsonl").write_text('{"n": 1}')
    source = JsonLines(f"{tmp_path}/a.jsonl", holdout=0)
    data = Pipeline(batch_size=1, source=source, features=(Feature(name="n"),), transforms=(fail,))
    element = _Elements(data.cursor("train", 0), [(0, 1)])[0]
    assert json.loads(element["error"].tobytes()) == [False, "KeyError: 'm'"]


def test_what_a_worker_meets_reaches_the_run_as_it_is(tmp_path):
    lines = [f'{{"n": {i}}}' for i in range(8)]
    lines[5] = "broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = Pipeline(
        batch_size=8, source=JsonLines(f"{tmp_path}/a.jsonl", holdout=0), features=(Feature(name="n"),), workers=1
    )
    failing = data.batches("train", 0, make_mesh(MeshShape()))
    with pytest.raises(UserError, match=r"a\.jsonl:6 is not JSON"):
        next(failing)
    failing.close()
    counted = replace(data, max_bad_records=1).batches("train", 0, make_mesh(MeshShape()))
    assert int(next(counted)["valid"].sum()) == 7
    assert counted.counts() == {"bad_records": 1}
    counted.close()
