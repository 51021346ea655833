"""Where metrics go: metrics.jsonl, TensorBoard events, curve.png, and the console."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from axrepro.errors import UserError
from axrepro.train import histograms
from axrepro.train.workdir import Workdir

_NOTHING: Mapping[str, Mapping] = MappingProxyType({})


class MetricsFile:
    """One JSON object per step. Values that JSON has no number for (nan, inf) are written as strings."""

    def __init__(self, path: Path, after_step: int):
        """Opens `path` for appending; lines of steps beyond `after_step`, which will be taken again, are cut off."""
        self._path = path
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= after_step]
            scratch = path.with_name(path.name + ".new")
            scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(scratch, path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of numbers, or nested dicts and lists of them; on disk when this returns."""
        self._file.write(json.dumps({"step": step, **_plain(values)}) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _plain(value):
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if math.isfinite(value) else str(value)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
      UserError: for a damaged line elsewhere.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); move it away to go on without its history") from None
    out = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) - 1:
                break
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(
                f"{path}:{number + 1} is no record of a step; move the file away to go on without its history"
            )
        out.append(record)
    return out


class Silent:
    """The writers of every process but the first: they write nothing."""

    def write(self, step: int, scalars: Mapping[str, float], details: Mapping[str, Mapping] = _NOTHING) -> None:
        """Nothing."""

    def note(self, step: int, event: str, text: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def publish(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _summary_writer() -> type:
    """tensorboardX's writer, which would import torch where that is installed: seconds, for types not used here."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyrefly: ignore[unsupported-operation]  # what Python takes for "there is none"
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


class Writers:
    """All outputs of a run, written by its first process."""

    def __init__(self, workdir: Workdir, after_step: int, steps: int):
        """
        Args:
          after_step: the step the run starts from.   steps: of the whole run, for the progress bar.
        Raises:
          UserError: if the metrics of an earlier start cannot be read.
        """
        self._bar = None
        self._workdir, self._folder = workdir, workdir.local
        try:
            (self._folder / "events").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self._folder / 'events'}: {error}") from None
        self._file = MetricsFile(self._folder / "metrics.jsonl", after_step)
        self._events = _summary_writer()(str(self._folder / "events"), purge_step=after_step + 1)
        self._steps = steps
        if 0 < after_step < steps:
            self.note(after_step, "resumed", f"resumed from step {after_step}")
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=after_step, unit="step", dynamic_ncols=True)

    def write(self, step: int, scalars: Mapping[str, float], details: Mapping[str, Mapping] = _NOTHING) -> None:
        """One step's scalars to every output; the details, lists by name, to the file, and those by layer as events."""
        self._file.write(step, {**scalars, **details})
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        for name, values in details.get("by_layer", {}).items():
            for layer, value in enumerate(values):
                self._events.add_scalar(f"{name}/{layer}", value, step)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(_summary(scalars))
        else:
            self.say(f"step {step}/{self._steps}  {_summary(scalars)}")
        self._workdir.publish(now=False)

    def note(self, step: int, event: str, text: str) -> None:
        """An event of the run ("resumed", "skipped") on the console and, for good, in history.jsonl."""
        record = {"step": step, "event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "text": text}
        with (self._folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.say(text)

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def publish(self) -> None:
        """Brings what is written to where it can be read."""
        self._workdir.publish()

    def close(self) -> None:
        """Ends the files and draws the curve."""
        self._file.close()
        self._events.close()
        if self._bar is not None:
            self._bar.close()
        draw_curve(self._folder, self._workdir.address)
        histograms.draw(self._folder, read_metrics(self._folder / "metrics.jsonl"))
        self._workdir.publish()


def _summary(scalars: Mapping[str, float]) -> str:
    shown = {"loss": "{:.4f}", "eval/loss": "{:.4f}", "eval/bits_per_byte": "{:.4f}", "grad_norm": "{:.2f}"}
    shown |= {"tokens_per_s": "{:,.0f}", "mfu": "{:.1%}", "mfu_full": "{:.1%}", "skipped_steps": "{:.0f}"}
    parts = [f"{name} {form.format(scalars[name])}" for name, form in shown.items() if name in scalars]
    return "  ".join(parts)


def draw_curve(folder: Path, title: str) -> None:
    """`folder`/curve.png: the loss over steps, smoothed in front of the raw values, with evaluations and events."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(folder / "metrics.jsonl")
    history = read_metrics(folder / "history.jsonl") if (folder / "history.jsonl").exists() else []
    train = [(line["step"], line["loss"]) for line in lines if isinstance(line.get("loss"), float)]
    held_out = [(line["step"], line["eval/loss"]) for line in lines if isinstance(line.get("eval/loss"), float)]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = np.array(train).T
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"train (mean of {window} logged steps)")
    if held_out:
        axes.plot(*np.array(held_out).T, "o-", color="tab:orange", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    for event, color, style in (("resumed", "tab:gray", "--"), ("skipped", "tab:red", ":")):
        for number, step in enumerate(sorted({line["step"] for line in history if line["event"] == event})):
            axes.axvline(step, color=color, linestyle=style, linewidth=1, label=None if number else event)
    if train or held_out:
        lowest = min(value for _, value in train + held_out)
        start = train[min(len(train) - 1, max(1, len(train) // 50))][1] if train else held_out[0][1]
        axes.set_ylim(lowest - 0.05 * (start - lowest + 0.1), start + 0.1 * (start - lowest + 0.1))
        axes.legend()
    axes.grid(alpha=0.3)
    scratch = folder / "curve.new.png"
    figure.savefig(scratch, dpi=120)
    plt.close(figure)
    os.replace(scratch, folder / "curve.png")


class Stopwatch:
    """Seconds per step since the last reading."""

    def __init__(self, step: int):
        self.restart(step)

    def lap(self, step: int) -> tuple[float, float]:
        """Seconds per step since the last lap, and those of them that passed `waiting`."""
        now, steps = time.perf_counter(), max(1, step - self._step)
        seconds, waited = (now - self._time) / steps, self._waited / steps
        self._step, self._time, self._waited = step, now, 0.0
        return seconds, waited

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens within is time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def leave_out(self, seconds: float) -> None:
        """Does not count what took these seconds of the lap."""
        self._time += seconds

    def restart(self, step: int) -> None:
        """Starts a lap here, leaving out what came before (compiling, evaluating)."""
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0
