"""Forecasts of experiments on their slices, and what experts add to the step time of a dense model.

Run: python -m benchmarks.forecasts [--write]     (about a quarter of an hour; --write replaces docs/forecasts.md)
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from axrepro import registry
from axrepro.aot.forecast import Forecast, forecast
from axrepro.aot.slices import Slice, find_slice
from axrepro.core.config import override
from axrepro.core.sharding import Rules
from axrepro.nn.moe import GATHER_REDUCE
from axrepro.train.experiment import on_hardware

PAGE = Path(__file__).parents[1] / "docs" / "forecasts.md"
GIB = 2**30

EXPERIMENTS = (
    ("moe_29b", "v5p-1024", {}),
    ("dense_29b", "v5p-1024", {}),
    ("moe_13b", "v5p-1024", {}),
    ("dense_13b", "v5p-1024", {}),
    ("moe_6b", "v5p-1024", {}),
    ("dense_6b", "v5p-1024", {}),
    ("moe_1p6b_256e", "v5p-1024", {}),
    ("dense_6b", "v6e-256", {}),
    ("moe_6b", "v6e-256", {}),
    ("llama2_7b", "v5p-256", {}),
    ("llama2_70b", "v5p-1024", {}),
    ("llama3_8b", "v5p-512", {}),
    ("llama3_8b", "v6e-256", {}),
    ("llama3_70b", "v5p-1024", {}),
    ("llama3_405b", "v5p-2048", {"train.grad_accumulation": "2"}),
    ("mixtral_8x7b", "v5p-1024", {}),
    ("mixtral_8x22b", "v5p-1024", {}),
)
SCALES = (("dense_6b", "moe_6b"), ("dense_13b", "moe_13b"), ("dense_29b", "moe_29b"))
_EXPERTS = "method.model.layers.layer.layers.3.ffn"


def run(name: str, topology: str, changes: Mapping[str, str], rules: Rules | None = None) -> Forecast:
    """The forecast of an experiment by name."""
    hardware: Slice = find_slice(topology)
    experiment, _ = on_hardware(registry.load(registry.find(name, registry.index())), topology.split("x")[-1])
    experiment = override(experiment, changes)
    return forecast(replace(experiment, rules=rules or experiment.rules), hardware)


def _mesh(f: Forecast) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in f.compiled.mesh.items() if size > 1)


def experiments() -> list[str]:
    """A row per experiment and slice."""
    lines = [
        "| experiment | slice | mesh | remat | compiled s | GiB of | step s | MFU | tokens/s | USD per 1e9 tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, topology, changes in EXPERIMENTS:
        f = run(name, topology, changes)
        assert f.time is not None
        assert f.compiled.capacity is not None
        extra = "".join(f", {path.split('.')[-1]} {value}" for path, value in changes.items())
        speed = f.speed
        room = f"{f.memory.total / GIB:.1f} of {f.compiled.capacity / GIB:.1f}{'' if f.fits else ', does not fit'}"
        lines.append(
            f"| {name} | {topology} | {_mesh(f)} | {f.experiment.train.remat}{extra} | {f.compiled.seconds:.0f} | "
            f"{room} | {f.time.seconds:.3f} | {speed['mfu']:.1%} | {speed['tokens_per_second']:,.0f} | "
            f"{speed['usd_per_billion_tokens']:,.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def experts() -> list[str]:
    """What 64 experts in every fourth block add on v5p-1024, by capacity factor and partition map."""
    lines = [
        "| scale | arm | added arithmetic | added step time | step s | MFU | communication that shows, and the most |",
        "|---|---|---|---|---|---|---|",
    ]
    arms = (
        ("exchange, capacity 2.0", {}, None),
        ("exchange, capacity 1.25", {f"{_EXPERTS}.capacity_factor": "1.25"}, None),
        ("gather and reduce, capacity 2.0", {}, Rules().replace(**GATHER_REDUCE)),
    )
    for dense, sparse in SCALES:
        base = run(dense, "v5p-1024", {})
        for arm, changes, rules in (("dense", None, None), *arms):
            f = base if changes is None else run(sparse, "v5p-1024", changes, rules)
            assert f.time is not None
            assert base.time is not None
            waits = {part: t for part, t in f.time.parts.items() if part.startswith(("waiting", "slowed"))}
            most = max(waits, key=waits.__getitem__)
            work, time = f.program.flops() / base.program.flops() - 1, f.time.seconds / base.time.seconds - 1
            lines.append(
                f"| {dense if changes is None else sparse} | {arm} | {work:+.1%} | {time:+.1%} | "
                f"{f.time.seconds:.3f} | {f.speed['mfu']:.1%} | {sum(waits.values()) / f.time.seconds:.1%}: {most} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    text = "\n\n".join(
        [
            "# Forecasts",
            f"Written by `python -m benchmarks.forecasts --write` with jax {version('jax')} and libtpu "
            f"{version('libtpu')}, on two CPU cores: nothing here ran on a TPU. How far forecasts were from published "
            "runs is in [the results of the step-time model](../benchmarks/results/step_time_model.md).",
            "## Experiments on their slices",
            "\n".join(experiments()),
            "## What experts add to a dense model's step, v5p-1024",
            "64 experts, top-2, in every fourth block, on the dense model's backbone; the same batch. The authors "
            "report less than about 20 % (arXiv:2405.15052, by a secondary source). *Exchange* is the partition map of "
            "their Table 1, *gather and reduce* that of the released code.",
            "\n".join(experts()),
        ]
    )
    if args.write:
        scratch = PAGE.with_suffix(".new")
        scratch.write_text(text + "\n")
        os.replace(scratch, PAGE)


if __name__ == "__main__":
    main()
