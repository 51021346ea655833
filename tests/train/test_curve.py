"""The curve marks where a run was resumed and which steps it left out, from a history that outlives restarts."""

import json

import numpy as np
from faults import experiment
from matplotlib import pyplot as plt

from axrepro.core.config import override
from axrepro.train import writers
from axrepro.train.loop import train
from axrepro.train.workdir import Workdir


def history(folder) -> list[tuple[int, str]]:
    """(step, event) of each line of history.jsonl."""
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [(line["step"], line["event"]) for line in map(json.loads, lines)]


def vertical_lines(axes) -> dict[float, str]:
    """Step -> colour of the lines from bottom to top."""
    return {float(line.get_xdata()[0]): line.get_color() for line in axes.lines if len(set(line.get_xdata())) == 1}


def drawn(folder, monkeypatch) -> dict[float, str]:
    """The vertical lines of the curve as it is drawn."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    writers.draw_curve(folder, "a run")
    monkeypatch.undo()
    marks = vertical_lines(figures[0].axes[0])
    plt.close(figures[0])
    return marks


def test_a_run_that_was_resumed_twice_has_a_mark_at_each(tmp_path, monkeypatch):
    for steps in (3, 5, 8):
        train(experiment(steps=steps), Workdir(str(tmp_path)), "stack")
    train(experiment(steps=8), Workdir(str(tmp_path)), "stack")  # complete: nothing is resumed
    assert history(tmp_path) == [(3, "resumed"), (5, "resumed")]
    assert drawn(tmp_path, monkeypatch) == {3.0: "tab:gray", 5.0: "tab:gray"}
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))  # one object per logged step, as before


def test_skipped_steps_are_marked_one_by_one(tmp_path, monkeypatch):
    config = override(experiment(rate=1e30, not_finite="skip", log_every=4), {"eval.batches": 1})
    outcome = train(config, Workdir(str(tmp_path)), "stack")
    events = history(tmp_path)
    assert [event for _, event in events] == ["skipped"] * int(outcome.scalars["skipped_steps"])
    marks = drawn(tmp_path, monkeypatch)
    assert sorted(marks) == [float(step) for step, _ in events]
    assert set(marks.values()) == {"tab:red"}
    assert np.load(tmp_path / "not_finite" / f"step{events[0][0]}.npz")["x"].shape == (32, 8)
