"""What a forecast of memory is worth, against steps that run: python -m benchmarks.memory [ROWS LENGTH].

`dense_tiny` is compiled for eight emulated CPU devices without being run, and trained for some steps in a process of
its own. Printed, in bytes per device: arguments, forecast beside the shards of state and batch that lie on a device;
temporaries, forecast beside those of the program that runs ("planned"), and beside what the process' resident memory
rises by while a step runs, at its highest, over the devices ("resident"). The latter is all that a step takes, also
threads, copies in collectives and the workspace of libraries, which the compiler does not plan: 8 rows of 256 tokens
hold 1.07 of the forecast that way, and 1.0000 as planned. `malloc` is told to return what it can, so that no step finds
pages of the step before.
"""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

DEVICES, STEPS = 8, 4


def _experiment(rows: str, length: str):
    from axrepro import registry
    from axrepro.core.config import override

    experiment = registry.load(registry.find("dense_tiny", registry.index()))
    return override(experiment, {"data.batch_size": rows, "data.sequence_length": length})


def _resident(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _run(rows: str, length: str) -> None:
    """Trains, and prints what a device holds between steps, and besides in the last: as planned, and as measured."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    from axrepro.train import loop

    experiment = _experiment(rows, length)
    program = loop.build_program(experiment)
    state = loop.first_state(program)
    batch = next(experiment.data.batches("train", 0, program.run_mesh, experiment.rules))
    step, device = loop.compile_step(program, batch), jax.devices()[0]
    shards = [shard for array in jax.tree.leaves((state, batch)) for shard in array.addressable_shards]
    arguments, rise = sum(shard.data.nbytes for shard in shards if shard.device == device), 0
    del shards  # they would keep the state from being donated
    for _ in range(STEPS):
        jax.block_until_ready(state)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = _resident("VmRSS")
        state, _ = step(state, batch)
        jax.block_until_ready(state)
        rise = (_resident("VmHWM") - before) // DEVICES
    print(json.dumps([arguments, step.memory_analysis().temp_size_in_bytes, rise]))


def main(rows: str, length: str) -> None:
    """Prints forecast, measured and their ratio."""
    from axrepro.aot.compile import compile_step
    from axrepro.aot.memory import read_memory
    from axrepro.core import hlo

    compiled = compile_step(_experiment(rows, length), DEVICES)
    forecast = read_memory(compiled.buffers, compiled.live_ranges, hlo.parse(compiled.text))
    command = [sys.executable, "-m", "benchmarks.memory", "run", rows, length]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    arguments, planned, rise = json.loads(done.stdout.splitlines()[-1])
    lines = {
        "arguments": (forecast.arguments, arguments),
        "temporaries, planned": (forecast.temporaries, planned),
        "temporaries, resident": (forecast.temporaries, rise),
        "all, planned": (forecast.total, arguments + planned),
        "all, resident": (forecast.total, arguments + rise),
    }
    for name, (told, held) in lines.items():
        print(f"{name:21} forecast {told:12,}  held {held:12,}  held/forecast {held / told:.4f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        _run(*sys.argv[2:])
    else:
        main(*(sys.argv[1:] or ("16", "256")))
