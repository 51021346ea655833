"""Filtering and deduplication against loops over all pairs; nothing is lost, and kills and order change nothing."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from axrepro.data import Bytes
from axrepro.data.__main__ import main as command
from axrepro.data.records import BadRecord
from axrepro.data.sources.array_record import ArrayRecords
from axrepro.data.tools import preprocess as module
from axrepro.data.tools.minhash import MinHash, normalised, shingles
from axrepro.data.tools.preprocess import preprocess
from axrepro.errors import UserError

for name in ("array_record", "apache_beam", "datasketch"):
    pytest.importorskip(name, reason="needs the extra beam")

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)


def main(argv: list[str]) -> int:
    return command(["preprocess", *argv])


def quality(record) -> float:
    return 0.0 if record["text"].startswith("spam") else 1.0


def documents() -> list[str]:
    """Lines of JSON: 240 documents, of which some are the same up to case, some edited, some spam, and 3 unreadable."""
    words = [f"word{i}" for i in range(3000)]
    texts = [" ".join(RNG.choice(words, 80)) for _ in range(120)]
    texts += [text.upper() + " " for text in texts[:20]] * 2
    for text in texts[15:60]:  # one word of 80 changed: J = 71/81 = 0.88; all others share nothing
        edited = text.split()
        edited[RNG.integers(10, 70)] = "edited"
        texts.append(" ".join(edited))
    texts += [f"spam {i}" for i in range(32)]
    lines = [json.dumps({"text": text, "number": i}) for i, text in enumerate(texts)]
    lines += ["{", '{"number": 1}', '{"text": 5}']
    return RNG.permutation(np.array(lines, object)).tolist()


LINES = documents()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "in.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return str(path)


def arguments() -> dict:
    return {"shards": 5, "scorer": quality, "threshold": 0.5, "vocabulary": Bytes(), "max_bad_records": 3}


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """(folder, index) of one run, on Beam."""
    folder = tmp_path_factory.mktemp("made")
    return folder, preprocess(source, f"{folder}/a", **arguments(), beam_flags=["--runner=FnApiRunner"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def without_beam(monkeypatch):
    """Units one after the other in this process, the last first. Returns the units done."""
    done = []

    def run(job, options, do, units):
        for path, unit in reversed(units.items()):
            if not os.path.exists(path):
                done.append(path)
                do(job, unit)

    monkeypatch.setattr(module, "_run", run)
    return done


def expected() -> tuple[list[dict], dict[str, int]]:
    """The records that stay and the counts, by a loop over all pairs."""
    counts = dict.fromkeys(module.STAGES, 0)
    stay, before = [], []  # what stays; and (normalised text, shingles) of all before that are neither bad nor spam
    for line in LINES:
        counts["read"] += 1
        try:
            record = json.loads(line)
            text = normalised(record["text"])
        except (ValueError, KeyError, TypeError, AttributeError):
            counts["bad"] += 1
            continue
        if quality(record) < 0.5:
            counts["filtered"] += 1
            continue
        grams = set(shingles(text, 5))
        if any(text == other for other, _ in before):
            counts["exact_duplicates"] += 1
        elif any(len(grams & other) / len(grams | other) >= 0.8 for _, other in before):
            counts["near_duplicates"] += 1
        else:
            counts["written"] += 1
            stay.append(record)
        before.append((text, grams))
    return stay, counts


def test_what_stays_is_what_a_loop_over_all_pairs_leaves(made):
    folder, index = made
    stay, counts = expected()
    assert index.counts == counts
    assert all(counts.values())
    assert counts["read"] == sum(counts.values()) - counts["read"]
    records = list(ArrayRecords(f"{folder}/a-*", holdout=0).open("train"))
    assert [(r["number"], Bytes().decode(r["tokens"])) for r in records] == [(r["number"], r["text"]) for r in stay]
    assert index.tokens == sum(len(record["text"]) for record in stay)
    assert len(index.records) == 5
    assert sorted(contents(folder)) == [f"a-0000{i}-of-00005.array_record" for i in range(5)] + [
        "a.json",
        "a.lengths.npy",
    ]


def test_order_runner_and_buckets_change_nothing(made, source, tmp_path, without_beam, monkeypatch):
    monkeypatch.setattr(module, "_MATCHED_AT_ONCE", 50)
    assert preprocess(source, f"{tmp_path}/a", **arguments()) == made[1]
    assert contents(tmp_path) == contents(made[0])
    assert sum("match-exact" in path for path in without_beam) == 5
    done = len(without_beam)
    assert preprocess(source, f"{tmp_path}/a", **arguments()) == made[1]
    assert len(without_beam) == done, "what is finished is not done again"


def test_another_number_of_shards_keeps_the_same_records(made, source, tmp_path, without_beam):
    index = preprocess(source, f"{tmp_path}/a", **{**arguments(), "shards": 2})
    assert index.counts == made[1].counts
    texts = [
        [record["tokens"].tobytes() for record in ArrayRecords(f"{folder}/a-*", holdout=0).open("train")]
        for folder in (tmp_path, made[0])
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("dedupe", "dropped"), [((), ()), (("exact",), ("exact_duplicates",)), (("minhash",), ("near_duplicates",))]
)
def test_a_stage_that_is_left_out_drops_nothing(made, source, tmp_path, without_beam, dedupe, dropped):
    counts = preprocess(source, f"{tmp_path}/a", **{**arguments(), "dedupe": dedupe}).counts
    assert {name for name in ("exact_duplicates", "near_duplicates") if counts[name]} == set(dropped)
    assert counts["read"] == sum(counts.values()) - counts["read"]
    if dedupe == ("minhash",):  # the same text is similar
        assert counts["written"] == made[1].counts["written"]


class Planted(Exception):
    pass


def test_a_restart_does_what_is_missing_and_ends_as_one_run_would_have(
    made, source, tmp_path, without_beam, monkeypatch
):
    """Interrupted before each of its renames in turn."""
    renames = itertools.count()
    replace = os.replace
    limit = 0

    def failing(old, new):
        if next(renames) == limit:
            raise Planted
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)
    fields = {**arguments(), "shards": 2, "minhash": MinHash(threshold=0.9, permutations=16)}
    whole = tmp_path / "whole"
    limit = 10**9
    index = preprocess(source, f"{whole}/a", **fields)
    steps = next(renames)
    assert steps > 10
    for limit in range(0, steps - 1, 4):
        folder = tmp_path / str(limit)
        renames = itertools.count()
        with pytest.raises(Planted):
            preprocess(source, f"{folder}/a", **fields)
        renames = itertools.count(10**10)
        assert preprocess(source, f"{folder}/a", **fields) == index
        assert contents(folder) == contents(whole)
        shutil.rmtree(folder)


def test_other_arguments_are_refused_while_it_is_under_way_and_after(made, source, tmp_path, without_beam, monkeypatch):
    with pytest.raises(UserError, match=r"a\.json exists, and is not overwritten"):
        preprocess(source, f"{made[0]}/a", **{**arguments(), "threshold": 0.4})
    write, folder = module._write, tmp_path / "begun"

    def fail(*args):
        raise Planted

    monkeypatch.setattr(module, "_write", fail)
    with pytest.raises(Planted):
        preprocess(source, f"{folder}/a", **arguments())
    monkeypatch.setattr(module, "_write", write)
    for change in ({"threshold": 0.4}, {"minhash": MinHash(threshold=0.9)}, {"shards": 4}, {"scorer": None}):
        with pytest.raises(UserError, match=f"was begun with another .*{next(iter(change))}"):
            preprocess(source, f"{folder}/a", **{**arguments(), **change})
    assert preprocess(source, f"{folder}/a", **arguments()) == made[1]


def test_the_work_of_a_run_whose_plan_was_removed_is_not_taken_up(source, tmp_path, without_beam, monkeypatch):
    match, fields = module._match, {**arguments(), "shards": 2, "dedupe": ("exact",)}
    monkeypatch.setattr(module, "_match", lambda *args: (_ for _ in ()).throw(Planted()))
    with pytest.raises(Planted):
        preprocess(source, f"{tmp_path}/a", **{**fields, "scorer": None})
    monkeypatch.setattr(module, "_match", match)
    (tmp_path / "a.plan.json").unlink()
    assert preprocess(source, f"{tmp_path}/a", **fields).counts["filtered"] == 32


def test_it_is_killed_at_random_and_goes_on_to_the_same_bytes(made, source, tmp_path):
    """In children of a process that has loaded everything, on Beam: kill -9 after random times, then no more."""
    code = f"""
import os, random, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import apache_beam, datasketch, array_record.python.array_record_module, axrepro.data.tools.preprocess
from test_preprocess import arguments, preprocess
random.seed(0)
def child():
    if pid := os.fork():
        return pid
    preprocess({source!r}, {f"{tmp_path}/a"!r}, **arguments(), beam_flags=["--runner=FnApiRunner"])
    os._exit(0)
killed = 0
for _ in range(4):
    pid = child()
    time.sleep(random.uniform(0.1, 1.0))
    os.kill(pid, 9)
    killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
print(killed, os.waitstatus_to_exitcode(os.waitpid(child(), 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    killed, rc = done.stdout.split()[-2:]
    assert (int(killed) >= 2, rc) == (True, "0"), done.stdout + done.stderr
    assert contents(tmp_path) == contents(made[0])


def test_a_bad_record_is_named_where_none_may_be_left_out(source, tmp_path):
    with pytest.raises(BadRecord, match=r"in\.jsonl:\d+ is not JSON|in\.jsonl:\d+: .*text"):
        preprocess(source, f"{tmp_path}/a", scorer=len, beam_flags=["--runner=FnApiRunner"])


def test_too_many_bad_records_over_all_shards_are_refused(source, tmp_path, without_beam):
    with pytest.raises(UserError, match=r"3 bad records of .*max_bad_records=2"):
        preprocess(source, f"{tmp_path}/a", **{**arguments(), "shards": 20, "max_bad_records": 2})
    assert preprocess(source, f"{tmp_path}/a", **{**arguments(), "shards": 20}).counts["bad"] == 3


def test_a_score_that_is_no_number_is_told(source, tmp_path, without_beam, unchecked):
    with pytest.raises(BadRecord, match=r"in\.jsonl:\d+: its score is nan"):
        preprocess(source, f"{tmp_path}/a", scorer=lambda record: float("nan"), dedupe=())


def test_a_corrupt_intermediate_file_is_named_and_made_again(made, source, tmp_path, without_beam, monkeypatch):
    match = module._match
    monkeypatch.setattr(module, "_match", lambda *args: (_ for _ in ()).throw(Planted()))
    with pytest.raises(Planted):
        preprocess(source, f"{tmp_path}/a", **arguments())
    monkeypatch.setattr(module, "_match", match)
    for name in ("read-00002/keys.npy", "read-00002/signatures.npy"):
        path = tmp_path / "a.work" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:50])
        with pytest.raises(UserError, match=rf"a\.work/{name} is corrupt"):
            preprocess(source, f"{tmp_path}/a", **arguments())
        path.write_bytes(whole)
    shutil.rmtree(tmp_path / "a.work")
    assert preprocess(source, f"{tmp_path}/a", **arguments()) == made[1]


def test_the_command_takes_flags_of_its_own_and_of_beam(made, source, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    flags = [f"--input={source}", f"--output={tmp_path}/a", "--shards=5", "--scorer=test_preprocess:quality"]
    flags += ["--threshold=0.5", "--vocabulary=bytes", "--max_bad_records=3"]
    for wrong, told in (
        (["--theshold=1"], "unknown argument '--theshold=1', for Beam too; did you mean 'threshold'?"),
        (["--scorer=test_preprocess:none"], "--scorer=test_preprocess:none is not found"),
        (["--scorer=quality"], "must be MODULE:FUNCTION"),
        (["--dedupe=exakt"], "dedupe='exakt': it takes 'exact' and 'minhash'"),
        (["--jaccard=2"], "MinHash.threshold=2.0"),
        (["--shards=0"], "shards=0 must be at least 1"),
    ):
        assert main([*flags, *wrong]) == 2
        assert told in capsys.readouterr().err
    assert not os.listdir(tmp_path)
    assert (
        main([*flags, "--runner=FnApiRunner", "--direct_running_mode=multi_threading", "--direct_num_workers=2"]) == 0
    )
    assert f"{len(LINES)} read, 3 bad, 32 filtered" in capsys.readouterr().out
    assert {name: data for name, data in contents(tmp_path).items() if name != "a.json"} == {
        name: data for name, data in contents(made[0]).items() if name != "a.json"
    }
