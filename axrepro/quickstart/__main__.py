"""python -m axrepro.quickstart: trains `moe_tiny` and says how good it is. `make train` runs it on a fresh machine."""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

WORKDIR = Path("runs/moe_tiny")
BAND = (1.70, 1.95)  # bits per byte that a right build ends in; outside it something is broken, too good included
PROMPT = "def read_lines(path):\n"


def _yardsticks(holdout: int) -> dict[str, float]:
    """Bits per byte of models that only count, on the same split."""
    from axrepro.data import PythonStdlib
    from axrepro.quickstart.ngram import interpolated_bits_per_byte, xz_bits_per_byte

    source = PythonStdlib(holdout=holdout)
    train, held_out = ([record["text"] for record in source.open(split)] for split in ("train", "eval"))
    bits = interpolated_bits_per_byte(train, held_out, max_order=3)
    size = sum(map(len, held_out))
    by_file = sum(xz_bits_per_byte([d]) * len(d) for d in held_out if d) / size
    return {f"{k}-byte contexts": bits[k] for k in (1, 2, 3)} | {"xz -9, file by file": by_file}


def _text_sample(experiment) -> str:
    """What the trained model writes after `PROMPT`."""
    from axrepro.decode.sample import sample
    from axrepro.train.checkpoint import Checkpoints
    from axrepro.train.loop import build_program
    from axrepro.train.workdir import Workdir

    program, data = build_program(experiment), experiment.data
    checkpoints = Checkpoints(Workdir(str(WORKDIR)), read_only=True)
    params, _ = checkpoints.restore_params(program.abstract_state.params)
    checkpoints.close()
    prompt = [data.vocabulary.eos_id, *data.vocabulary.encode(PROMPT)]
    ids = sample(
        experiment.method.model, params, prompt, data.sequence_length, eos_id=data.vocabulary.eos_id, temperature=0.7
    )
    return data.vocabulary.decode(ids)


def main(argv: Sequence[str] = ()) -> int:
    """Trains, compares and reports; returns 0 if the result lies in the band. Arguments go to the launcher."""
    from axrepro import launch, registry
    from axrepro.data import PythonStdlib, Text
    from axrepro.train.writers import read_metrics

    started = time.perf_counter()
    experiment = registry.load(registry.find("moe_tiny", registry.index()))
    assert isinstance(experiment.data, Text)
    assert isinstance(experiment.data.source, PythonStdlib)
    cached = WORKDIR / "yardsticks.json"
    with ProcessPoolExecutor(1) as pool:
        pending = None if cached.exists() else pool.submit(_yardsticks, experiment.data.source.holdout)
        if code := launch.main(["--experiment=moe_tiny", f"--workdir={WORKDIR}", *argv]):
            return code
        if pending is not None:
            cached.write_text(json.dumps(pending.result(), indent=2) + "\n")
    lines = read_metrics(WORKDIR / "metrics.jsonl")
    final = next((line for line in reversed(lines) if "eval/bits_per_byte" in line), None)
    if final is None or final["step"] < experiment.train.steps:
        print(f"the run in {WORKDIR} has not reached its last step; run the same command again to go on")
        return 1
    bits = final["eval/bits_per_byte"]
    speeds = sorted(line["tokens_per_s"] for line in lines if "tokens_per_s" in line)

    print("\nA sample (temperature 0.7):")
    print("\n".join("    " + line for line in _text_sample(experiment).split("\n")[:16]))
    print("\nHeld-out files of the standard library, bits per byte (less is better):")
    rows = {f"{name}": value for name, value in json.loads(cached.read_text()).items()}
    print(f"    moe_tiny                 {bits:.3f}   <- trained here, {experiment.train.steps} steps")
    for name, value in rows.items():
        kind = "n-gram, " if "contexts" in name else ""
        print(f"    {kind + name:24} {value:.3f}")
    print(
        f"\n{speeds[len(speeds) // 2]:,.0f} tokens/s; {time.perf_counter() - started:.0f} s; curve: {WORKDIR}/curve.png"
    )
    passed = BAND[0] <= bits <= BAND[1]
    verdict = "PASS" if passed else "FAIL"
    print(f"{verdict}: {bits:.3f} bits per byte, {'inside' if passed else 'outside'} the band {BAND[0]} to {BAND[1]}")
    print(
        "\nNext:\n"
        "    .venv/bin/python -m axrepro.launch --list\n"
        "    .venv/bin/python -m axrepro.launch --experiment=dense_tiny --train.steps=300\n"
        "    .venv/bin/python -m axrepro.launch --experiment=moe_29b --mode=describe --topology=v5p-1024"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
