"""Runs of the launcher in processes of their own, small enough for a test."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from documents import environment

ROOT = Path(__file__).resolve().parents[2]

# moe_dense:tiny made smaller still
SMALL = (
    "--experiment=moe_dense:tiny",
    "--method.model.dim=32",
    "--method.model.layers.times=1",
    "--method.model.layers.layer.layers.0.ffn.hidden=64",
    "--method.model.layers.layer.layers.1.ffn.expert.hidden=64",
    "--data.sequence_length=32",
    "--data.batch_size=16",
    "--data.source.holdout=1000",
    "--eval.batches=2",
    "--train.steps=10",
    "--train.log_every=1",
)


def command(workdir, *args) -> list[str]:
    """The launcher's command line for a small run."""
    return [sys.executable, "-m", "axrepro.launch", *SMALL, f"--workdir={workdir}", *args]


def launch(workdir, *args, timeout=300) -> subprocess.CompletedProcess:
    """Runs it to its end."""
    return subprocess.run(
        command(workdir, *args), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def start(workdir, *args) -> subprocess.Popen:
    """Starts it and returns at once; the output is dropped."""
    null = subprocess.DEVNULL
    return subprocess.Popen(command(workdir, *args), cwd=ROOT, env=environment(), stdout=null, stderr=null)


def stop_at(workdir, process: subprocess.Popen, lines: int, how=signal.SIGKILL, timeout=300) -> int:
    """Sends a signal once metrics.jsonl has this many lines; returns the exit code."""
    deadline = time.monotonic() + timeout
    while len(lines_of(workdir)) < lines and process.poll() is None:
        assert time.monotonic() < deadline, f"no {lines} lines in {workdir} within {timeout} s"
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait(timeout)


def lines_of(workdir) -> list[str]:
    """The complete lines of metrics.jsonl."""
    path = Path(workdir) / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def losses(workdir) -> dict[int, tuple]:
    """Step -> (loss, gradient norm, held-out loss), exactly as written."""
    records = map(json.loads, lines_of(workdir))
    return {r["step"]: (r.get("loss"), r.get("grad_norm"), r.get("eval/loss")) for r in records}


def params_of(workdir, step: int) -> dict[str, np.ndarray]:
    """All parameters of a checkpoint by path, read by Orbax alone."""
    checkpointer = ocp.StandardCheckpointer()
    tree = checkpointer.restore((Path(workdir) / "checkpoints" / str(step) / "params").resolve())
    checkpointer.close()
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}
