"""A run's files in a folder, and in a bucket that is written through a local copy."""

import json

import pytest
from buckets import Bucket, register

from axrepro.errors import UserError
from axrepro.train.workdir import Workdir
from axrepro.train.writers import Writers, read_metrics


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


@pytest.fixture
def bucket():
    Bucket.store.clear()
    yield Bucket
    Bucket.fails = False


def logged(workdir: Workdir, after: int, steps: range) -> None:
    writers = Writers(workdir, after, 100)
    for step in steps:
        writers.write(step, {"loss": 1.0 / step})
    writers.close()


def test_a_folder_is_absolute_whatever_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = Workdir("runs/x")
    assert workdir.local == tmp_path / "runs" / "x"
    assert str(workdir.checkpoints) == str(tmp_path / "runs" / "x" / "checkpoints")
    assert not (tmp_path / "runs").exists()  # looking at it makes nothing


def test_a_bucket_gets_every_file_and_a_later_start_goes_on_with_them(bucket):
    first = Workdir("s3://bucket/run")
    (first.local / "config.json").write_text('{"experiment": "a"}')
    logged(first, 0, range(1, 5))
    assert {"config.json", "metrics.jsonl", "curve.png"} <= {p.split("/")[-1] for p in bucket.store}
    assert any("/bucket/run/events/events.out.tfevents" in p for p in bucket.store)
    second = Workdir("s3://bucket/run")
    assert second.local != first.local
    assert json.loads((second.local / "config.json").read_text()) == {"experiment": "a"}
    logged(second, 3, range(4, 7))  # it went back to step 3
    third = Workdir("s3://bucket/run")
    assert [line["step"] for line in read_metrics(third.local / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert str(third.checkpoints) == "s3://bucket/run/checkpoints"


def test_only_what_changed_is_copied_again(bucket):
    workdir = Workdir("s3://bucket/run")
    for name in ("a", "b"):
        (workdir.local / name).write_text(name)
    workdir.publish()
    bucket.store.clear()
    (workdir.local / "b").write_text("new")
    workdir.publish()
    assert [path.split("/")[-1] for path in bucket.store] == ["b"]


def test_a_failed_copy_is_told_kept_and_tried_again(bucket, capsys):
    workdir = Workdir("s3://bucket/run")
    (workdir.local / "a").write_text("a")
    bucket.fails = True
    workdir.publish()
    assert "the network is away" in capsys.readouterr().err
    bucket.fails = False
    workdir.publish()
    assert any(path.endswith("/run/a") for path in bucket.store)


@pytest.mark.parametrize("address", ["gs://bucket/run", "ftp://bucket/run"])
def test_a_bucket_that_cannot_be_reached_is_an_error_that_names_it(address):
    with pytest.raises(UserError, match=f"cannot use the workdir {address}"):
        Workdir(address)
