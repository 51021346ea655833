"""Forecast step times beside published ones: the efficiencies are fitted to some runs, the others check them.

Run: python -m benchmarks.step_time_model --cache=DIR [--write] [NAME ...]
Every run of `benchmarks.published_runs` is compiled for its slice (half a minute each; --cache keeps the programs) and
timed with `axrepro.aot.step_time`. Runs of one family share a model and who measured it, so they are all fitted or all
checked. --write replaces benchmarks/results/step_time_model.md; the efficiencies go to axrepro/aot/efficiency.py by
hand.
"""

import argparse
import gzip
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from axrepro.aot import program as programs
from axrepro.aot.compile import Compiled, compile_step
from axrepro.aot.efficiency import EFFICIENCY
from axrepro.aot.program import Program
from axrepro.aot.slices import Slice, find_slice
from axrepro.aot.step_time import Efficiency, StepTime, step_time
from axrepro.errors import UserError
from benchmarks.published_runs import RUNS, PublishedRun

FITTED = ("maxtext_2023_v4", "maxtext_2023_v5e", "maxtext_2023_v5p", "maxtext_gpt3", "maxtext_llama3_8b")
SHARED = ("attention", "overlap")
"""Fitted for all chips together; `product` is fitted for each kind."""
LIMITS = {"product": 0.97, "attention": 0.7, "overlap": 1.0}
"""No more is plausible: a step's other work shares its time with products, softmax that with attention."""
RESULT = Path(__file__).parent / "results" / "step_time_model.md"


@dataclass(frozen=True)
class Row:
    """A published run and its program."""

    run: PublishedRun
    hardware: Slice
    compiled: Compiled
    program: Program

    def forecast(self, efficiency: Mapping[str, Efficiency]) -> StepTime:
        """With the efficiencies of its chip."""
        return step_time(self.program, self.compiled, self.hardware, efficiency[self.hardware.kind])


def compiled(run: PublishedRun, cache: Path | None) -> Compiled:
    """The run's step, from the cache if it is there."""
    file = cache / f"{run.name}.json.gz" if cache is not None else None
    if file is not None and file.exists():
        with gzip.open(file, "rt") as stream:
            found = json.load(stream)
        return Compiled(**{**found, "places": tuple(map(tuple, found["places"])), "executable": None})
    result = compile_step(run.experiment(), find_slice(run.topology))
    if file is not None:
        scratch = file.with_suffix(".new")
        with gzip.open(scratch, "wt") as stream:
            json.dump({**asdict(result), "executable": None}, stream)
        os.replace(scratch, file)
    return result


def load(names: list[str], cache: Path | None) -> tuple[list[Row], dict[str, str]]:
    """The rows, and of runs that do not compile, why."""
    rows, failed = [], {}
    for run in RUNS:
        if names and run.name not in names:
            continue
        start = time.monotonic()
        try:
            step = compiled(run, cache)
        except (UserError, RuntimeError) as error:
            failed[run.name] = " ".join(str(error).split())[-200:]
            print(f"{run.name}: {failed[run.name]}", file=sys.stderr, flush=True)
            continue
        print(f"{run.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        rows.append(Row(run, find_slice(run.topology), step, programs.read(step.text)))
    return rows, failed


def fit(rows: list[Row], start: Mapping[str, Efficiency]) -> dict[str, Efficiency]:
    """The efficiencies at which forecasts are nearest to published times, outliers weighted down."""
    from scipy.optimize import least_squares

    kinds = sorted({row.hardware.kind for row in rows})

    def unpacked(values) -> dict[str, Efficiency]:
        shared = dict(zip(SHARED, values, strict=False))
        found = dict(start)
        for kind, product in zip(kinds, values[len(SHARED) :], strict=True):
            found[kind] = Efficiency(**{**asdict(start[kind]), **shared, "product": product})
        return found

    def errors(values) -> list[float]:
        efficiency = unpacked(values)
        return [math.log(row.forecast(efficiency).seconds / row.run.step_seconds()) for row in rows]

    first = [getattr(start[kinds[0]], name) for name in SHARED] + [start[kind].product for kind in kinds]
    upper = [LIMITS[name] for name in SHARED] + [LIMITS["product"]] * len(kinds)
    first = [min(value, limit - 0.01) for value, limit in zip(first, upper, strict=True)]
    found = least_squares(errors, first, bounds=(0.02, upper), loss="soft_l1", f_scale=0.1, diff_step=0.02)
    fitted = unpacked(found.x)
    shared = {name: getattr(fitted[kinds[0]], name) for name in SHARED}
    return {kind: Efficiency(**{**asdict(one), **shared}) for kind, one in fitted.items()}


def table(rows: list[Row], efficiency: Mapping[str, Efficiency]) -> tuple[list[str], dict[str, list[float]]]:
    """The table, and the errors of each set."""
    lines = [
        "| run | slice | set | published s | forecast s | error | MFU published | forecast | longest parts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    errors: dict[str, list[float]] = {"fit": [], "check": []}
    for row in sorted(rows, key=lambda row: (row.run.family not in FITTED, row.run.topology, row.run.name)):
        which = "fit" if row.run.family in FITTED else "check"
        time_, published = row.forecast(efficiency), row.run.step_seconds()
        errors[which].append(time_.seconds / published - 1)
        mfu = row.run.mfu()[0]
        longest = sorted(time_.parts.items(), key=lambda part: -part[1])[:4]
        parts = ", ".join(f"{part} {seconds / time_.seconds:.0%}" for part, seconds in longest)
        lines.append(
            f"| {row.run.name} | {row.run.topology} | {which} | {published:.3f} | {time_.seconds:.3f} | "
            f"{time_.seconds / published - 1:+.1%} | {mfu:.1%} | {mfu * published / time_.seconds:.1%} | {parts} |"
        )
    return lines, errors


def said(errors: Mapping[str, list[float]]) -> list[str]:
    """Median and worst error of each set."""
    lines = []
    for which, values in errors.items():
        if values:
            sizes = np.abs(values)
            lines.append(
                f"{which}: {len(values)} runs, median error {np.median(sizes):.1%}, worst {sizes.max():.1%}, "
                f"within 10 %: {(sizes <= 0.1).sum()}, within 20 %: {(sizes <= 0.2).sum()}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--compile", action="store_true", help="only fill the cache")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    rows, failed = load(args.names, args.cache)
    if args.compile:
        return
    efficiency = fit([row for row in rows if row.run.family in FITTED], EFFICIENCY)
    lines, errors = table(rows, efficiency)
    factors = [
        f"{kind}: " + ", ".join(f"{name} {value:.3f}" for name, value in asdict(one).items())
        for kind, one in efficiency.items()
    ]
    missing = [f"{name}: {reason}" for name, reason in failed.items()]
    text = "\n\n".join(
        [
            "# Forecast and published step times",
            f"`python -m benchmarks.step_time_model`, jax {version('jax')}, libtpu {version('libtpu')}. "
            "Published figures are those of the projects named in benchmarks/published_runs.py.",
            "\n".join(lines),
            "\n".join(f"- {line}" for line in said(errors)),
            "Efficiencies:",
            "\n".join(f"- {line}" for line in factors),
            *(["Not compiled:", "\n".join(f"- {line}" for line in missing)] if missing else []),
        ]
    )
    print(text)
    if args.write:
        RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
