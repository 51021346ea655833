"""One mixture of experts beside a dense layer of equal active FLOPs: python -m benchmarks.moe_layer [--write].

Prints tables of ratios of the time of a forward and backward pass: router, dispatch, SwiGLU experts and combine, with
gradients for parameters and input, over that of a dense feed-forward layer with k times an expert's hidden units. All
programs of a table take turns in one run; above 1 the mixture is the slower. On CPU further tables tell how the ratio
grows with the number of experts, the ratio to transformers' Mixtral block on the same weights, the memory of a pass,
and what it moves between devices; on an accelerator there is one table, with FLOP/s. `--write` keeps the output in
benchmarks/moe_layer.md.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from axrepro.core import Context
from axrepro.core.param import count_params, matmul_flops
from axrepro.nn import MoE
from axrepro.study.step_time import in_turns
from benchmarks.layer_pass import Pass, Shape, biased, inputs, load, weights
from benchmarks.timing import Time, header, row, timed_steps

CPU, ACCELERATOR = Shape(rows=8, length=512, dim=512, hidden=1376), Shape(rows=8, length=2048, dim=4096, hidden=2048)
GROWTH = Shape(rows=16, length=1024, dim=256, hidden=1376)
GROWTH_EXPERTS = (8, 32, 64, 128, 256)
_lines: list[str] = []


def say(line: str = "") -> None:
    """Prints a line, and keeps it for `--write`."""
    _lines.append(line)
    print(line, flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def take_turns(passes: Mapping[str, Callable], rounds: int) -> dict[str, list[Time]]:
    """Times of one call each, in every round but a first one that is left out."""
    timed = {name: partial(timed_steps, step, 1, settle=False) for name, step in passes.items()}
    return {name: times[1:] for name, times in in_turns(timed, rounds + 1).items()}


def pass_flops(shape: Shape) -> float:
    """Of the dense layer; and of k experts for every token."""
    return 3 * shape.tokens * matmul_flops(shape.dense().specs(shape.dim))


def mixtures(shape: Shape, num_experts: int, platform: str) -> dict[str, MoE]:
    """Every dispatch with k slots per token, and those that have slots with a quarter more."""
    kinds = {kind: shape.mixture(num_experts, dispatch=kind) for kind in ("gather", "dropless", "einsum")}
    if platform == "cpu":
        for kind in ("gather", "einsum"):
            factor = 1.25 * shape.k
            kinds[f"{kind}, capacity factor {factor}"] = shape.mixture(
                num_experts, dispatch=kind, capacity_factor=factor
            )
    return kinds


def beside_dense(shape: Shape, num_experts: int, rounds: int, ctx: Context) -> None:
    """Prints the ratios of all dispatches, and their memory; on an accelerator FLOP/s."""
    x, g = inputs(shape, ctx.dtype)
    passes = {"dense": Pass(shape.dense(), weights(shape.dense(), shape.dim, ctx.dtype), x, g, ctx, held={})}
    layers, held = mixtures(shape, num_experts, ctx.platform), {}
    params = weights(next(iter(layers.values())), shape.dim, ctx.dtype)
    labels = {"dense": "dense"}
    for name, moe in layers.items():
        passes[name] = Pass(moe, params, x, g, ctx, held)
        dropped, fullest = load(moe, params, x, ctx)
        labels[name] = f"{name} ({percent(dropped)} dropped)"
    say(f"{shape}, {num_experts} experts, {ctx.dtype}; the fullest expert has {fullest:.2f} times the mean\n")
    times = take_turns(passes, rounds)
    say(header("mixture over dense"))
    for name in layers:
        say(row(labels[name], times[name], times["dense"]))
    if ctx.platform != "cpu":
        say("\n| layer | TFLOP/s |\n|---|---|")
        for name, label in labels.items():
            seconds = np.median([time.elapsed for time in times[name]])
            say(f"| {label} | {pass_flops(shape) / seconds / 1e12:.1f} |")
    memory(shape, passes, layers, jnp.dtype(ctx.dtype).itemsize)


def kept_numbers(shape: Shape, rows: float) -> float:
    """What a pass must hold at once besides its arguments and results: R (3 F + D) numbers for R rows of experts.

    The backward pass needs both products of width F, and the experts' outputs for the gradients of the gates; a third
    array of width F is the gradient of the hidden units, after which the others may be overwritten.
    """
    return rows * (3 * shape.hidden + shape.dim)


def memory(shape: Shape, passes: Mapping[str, Pass], layers: Mapping[str, MoE], itemsize: int) -> None:
    """Prints the compiler's account of each pass beside what it must hold."""
    mib = lambda number: f"{number / 2**20:.0f}"
    say(
        "\nMiB. At least: R (3 F + D) numbers, R rows of experts (slots, where there are any) of D wide and F hidden.\n"
    )
    say("| layer | weights, x, g | results | temporary | at least | ratio |\n|---|---|---|---|---|---|")
    for name, step in passes.items():
        used = step.compiled.memory_analysis()
        if name in layers:
            factor = shape.k if layers[name].dispatch == "dropless" else layers[name].capacity_factor
            least = itemsize * kept_numbers(shape, factor * shape.tokens)
        else:
            least = itemsize * shape.tokens * 3 * shape.k * shape.hidden
        results = used.output_size_in_bytes
        arguments = used.argument_size_in_bytes - results  # the results of the last call are among them
        cells = (name, *map(mib, (arguments, results, used.temp_size_in_bytes, least)))
        say(f"| {' | '.join(cells)} | {used.temp_size_in_bytes / least:.2f} |")


def growth(shape: Shape, rounds: int, ctx: Context) -> None:
    """Prints how the time grows with the number of experts at equal active FLOPs."""
    x, g = inputs(shape, ctx.dtype)
    passes: dict[str, Callable] = {"dense": Pass(shape.dense(), weights(shape.dense(), shape.dim), x, g, ctx, held={})}
    largest = weights(shape.mixture(GROWTH_EXPERTS[-1]), shape.dim)
    labels, weight_bytes = {}, {}
    for number in GROWTH_EXPERTS:
        held: dict = {}
        params = {
            "experts": jax.tree.map(lambda w, n=number: w[:n], largest["experts"]),
            "router": {"weight": largest["router"]["weight"][:, :number]},
        }
        for power, routing in ((0, "even loads"), (0.4, "skewed loads")):
            routed = biased(params, power)
            dropped, fullest = load(shape.mixture(number, dispatch="gather"), routed, x, ctx)
            for kind, lost in (("gather", dropped), ("dropless", 0.0)):
                moe = shape.mixture(number, dispatch=kind)
                passes[kind, routing, number] = Pass(moe, routed, x, g, ctx, held)
                labels[kind, routing, number] = (
                    f"{number} | {kind} | {routing} | {shape.k * shape.tokens // number} | {fullest:.1f} | "
                    f"{percent(lost)}"
                )
        weight_bytes[number] = 4 * count_params(moe.specs(shape.dim)["experts"])
    block = jnp.zeros(2**26)
    negate = jax.jit(lambda a: -a, donate_argnums=0)

    def stream():
        nonlocal block
        block = jax.block_until_ready(negate(block))

    passes["stream"] = stream
    times = take_turns(passes, rounds)
    median = {name: np.median([time.elapsed for time in of]) for name, of in times.items()}
    bandwidth = 2 * block.nbytes / median["stream"]
    say(
        f"{shape}. Weights: the time to read all experts' weights twice and write their gradients once, at the "
        f"{bandwidth / 1e9:.0f} GB/s with which a large array is negated in place, over the time of the dense layer.\n"
    )
    columns = "experts", "dispatch", "routing", "rows an expert", "fullest / mean", "dropped", "weights"
    say(f"{header(' | '.join(columns)).splitlines()[0]} over 8 experts, elapsed |")
    say("|---" * (len(columns) + 4) + "|")
    for name, label in labels.items():
        traffic = 3 * weight_bytes[name[2]] / bandwidth / median["dense"]
        over_dense = row(f"{label} | {percent(traffic)}", times[name], times["dense"])
        over_eight = row("", times[name], times[*name[:2], GROWTH_EXPERTS[0]])
        say(f"{over_dense}{over_eight.split('|')[2]}|")


def beside_mixtral(shape: Shape, num_experts: int, rounds: int, ctx: Context) -> None:
    """Prints the ratios of transformers' block to our dispatches without drops, after comparing what they compute."""
    from benchmarks import mixtral_layer

    x, g = inputs(shape)
    layers = {kind: shape.mixture(num_experts, dispatch=kind) for kind in ("gather", "dropless")}
    params = weights(layers["gather"], shape.dim)
    passes: dict[str, Callable] = {kind: Pass(moe, params, x, g, ctx) for kind, moe in layers.items()}
    for kind in ("eager", "grouped_mm"):
        passes[kind] = mixtral_layer.make_pass(params, x, g, shape.k, kind)
    errors = {kind: differences(passes["dropless"](), passes[kind]()) for kind in ("eager", "grouped_mm")}
    if max(errors.values()) > 1e-4:
        raise RuntimeError(f"transformers computes something else: relative differences {errors}")
    dropped, _ = load(layers["gather"], params, x, ctx)
    times = take_turns(passes, rounds)
    say(f"{shape}, {num_experts} experts; results differ by at most {max(errors.values()):.0e} of their norm\n")
    say(header("transformers' Mixtral over axrepro"))
    for theirs in ("eager", "grouped_mm"):
        for ours, note in (("gather", f"{percent(dropped)} dropped"), ("dropless", "none dropped")):
            say(row(f"{theirs} over {ours} ({note})", times[theirs], times[ours]))


def differences(ours, theirs) -> float:
    """The largest norm of a difference over the norm of ours, of all arrays in two trees."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / np.linalg.norm(a)

    return max(jax.tree.leaves(jax.tree.map(one, ours, theirs)))


def collectives(tpu: str | None) -> None:
    """Prints the tables of `benchmarks.moe_collectives`, whose eight devices need a process of their own."""
    say(
        "Bytes that each device moves in a forward and backward pass, read from the compiled programs. Formula: "
        "T cf D / e numbers in each of four all-to-alls, and T D in each of two gathers and two sums. What travels of "
        "ragged exchanges depends on the routing: shown is the room at the receivers.\n"
    )
    for arguments in ((), *([(f"--tpu={tpu}",)] if tpu else [])):
        command = [sys.executable, "-m", "benchmarks.moe_collectives", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        say(f"{done.stdout.rstrip()}\n")


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="of all tables but that of growth")
    parser.add_argument("--growth-rounds", type=int, default=3, help="0 leaves the table out")
    parser.add_argument("--collectives", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tpu", help="a topology of eight chips for collectives, such as v5e:2x4; needs libtpu")
    parser.add_argument("--divide", type=int, default=1, help="all rows and widths by this, to try the program")
    parser.add_argument("--write", action="store_true", help="keep the output in benchmarks/moe_layer.md")
    args = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for a TPU
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would else count as CPU time
    platform = jax.default_backend()
    say("# A mixture of experts beside a dense layer of equal active FLOPs\n")
    packages = "jax", *(("torch", "transformers") if platform == "cpu" else ())
    say(
        f"`python -m benchmarks.moe_layer {' '.join(sys.argv[1:])}`".replace(" `", "`")
        + f" on {platform}, "
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + f", {os.cpu_count()} cores. "
        "Ratios of times in the same round of one run, forward and backward.\n"
    )
    if platform == "cpu":
        measure_cpu(args)
    else:
        shape, ctx = smaller(ACCELERATOR, args.divide), Context(train=True, dtype="bfloat16", platform=platform)
        beside_dense(shape, 64, args.rounds, ctx)
    if args.write:
        Path(__file__).with_suffix(".md").write_text("\n".join(_lines) + "\n")


def smaller(shape: Shape, by: int) -> Shape:
    return replace(shape, rows=-(-shape.rows // by), dim=shape.dim // by, hidden=shape.hidden // by)


def measure_cpu(args: argparse.Namespace) -> None:
    """All tables of a CPU."""
    ctx, shape = Context(train=True), smaller(CPU, args.divide)
    say("## Time and memory of a pass\n")
    beside_dense(shape, 8, args.rounds, ctx)
    say("\n## Beside transformers\n")
    beside_mixtral(shape, 8, args.rounds, ctx)
    if args.growth_rounds:
        say("\n## Growth with the number of experts\n")
        growth(smaller(GROWTH, args.divide), args.growth_rounds, ctx)
    if args.collectives:
        say("\n## Between devices\n")
        collectives(args.tpu)


if __name__ == "__main__":
    main()
