"""All comparisons: python -m benchmarks [--rounds=20] [--dim=128] ...; prints the tables of benchmarks/README.md.

The programs take turns in short rounds, so that what else the machine does falls on all of them. Every number is a
ratio of a peer's time to axrepro's in the same round: above 1 axrepro is the faster. On a machine that others share,
threads that wait for each other lose more than threads that do not: there the ratio of CPU times tells the work, and
the ratio of elapsed times mostly the waiting. Absolute times of a shared CPU mean little and are not printed.
"""

import argparse
import dataclasses
import importlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

from axrepro.study.step_time import in_turns
from benchmarks.sizes import Sizes
from benchmarks.timing import Time, header, row, timed_steps

PEERS = {"transformers": "transformers, eager torch", "linen": "flax.linen and optax"}


def throughput(sizes: Sizes, rounds: int, steps: int) -> None:
    """Prints the rows of one model."""
    programs = {name: importlib.import_module(f"benchmarks.{name}_program") for name in ("axrepro", *PEERS)}
    taken = {name: program.make_step(sizes) for name, program in programs.items()}
    timed = {name: lambda step=step: timed_steps(step, steps) for name, step in taken.items()}
    in_turns(timed, 1)  # compiles
    times = in_turns(timed, rounds)
    kind = f"{sizes.num_experts} experts, top-2, in every block" if sizes.num_experts else "dense"
    for peer, label in PEERS.items():
        print(row(f"{kind}, beside {label}", times[peer], times["axrepro"]), flush=True)


def first_step(folder: str, program: str, cache: str | None = None) -> Time:
    """From the start of a fresh process to the line that tells of its first step; its own files go to `folder`."""
    command = [sys.executable, "-m", "benchmarks.first_step", program, *([cache] if cache else [])]
    environment = {**os.environ, "TMPDIR": folder}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if line.startswith("step 1"):
                break
        else:
            raise RuntimeError(f"{' '.join(command)} ended without a step")
        elapsed = time.perf_counter() - started
        process.kill()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Time(elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def start_up(rounds: int) -> None:
    """Prints the rows of the time to the first step."""
    with tempfile.TemporaryDirectory() as folder:
        timed = {name: lambda name=name: first_step(folder, name) for name in ("axrepro", *PEERS)}
        for name in ("axrepro", "linen"):
            cache = os.path.join(folder, name)
            first_step(folder, name, cache)  # fills it
            timed[f"{name} cached"] = lambda name=name, cache=cache: first_step(folder, name, cache)
        times = in_turns(timed, rounds)
    for peer, label in PEERS.items():
        print(row(f"first run, beside {label}", times[peer], times["axrepro"]))
    print(row("with a compilation cache, beside flax.linen with one", times["linen cached"], times["axrepro cached"]))
    print(
        row(f"with a compilation cache, beside {PEERS['transformers']}", times["transformers"], times["axrepro cached"])
    )
    print(
        row("with a compilation cache, beside axrepro without", times["axrepro"], times["axrepro cached"]), flush=True
    )


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Sizes):
        if field.name != "num_experts":
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--rounds", type=int, default=20, help="of steps, per model")
    parser.add_argument("--steps", type=int, default=3, help="per program and round")
    parser.add_argument("--starts", type=int, default=3, help="rounds of fresh processes; 0 leaves them out")
    args = vars(parser.parse_args())
    rounds, steps, starts = (args.pop(name) for name in ("rounds", "steps", "starts"))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would else count as CPU time
    sizes = Sizes(**args)
    print(", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "torch", "transformers")))
    print(f"{os.cpu_count()} cores, {sizes}\n\n{header('step')}", flush=True)
    for num_experts in (0, 8):
        throughput(dataclasses.replace(sizes, num_experts=num_experts), rounds, steps)
    if starts:
        print(f"\n{header('start to first step, dense')}", flush=True)
        start_up(starts)


if __name__ == "__main__":
    main()
