"""An allocation that failed, told by what takes the memory."""

import re

import jax

from axrepro.train.describe import readable
from axrepro.train.effect import bytes_per_device
from axrepro.train.state import Program


class OutOfMemoryError(RuntimeError):
    """A device has too little memory for the run; the message is one line and a table."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is an allocation that failed; INTERNAL where it came to light only when results were waited for."""
    found = re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE)
    return isinstance(error, jax.errors.JaxRuntimeError) and found is not None


def explain(error: Exception, program: Program, compiled) -> OutOfMemoryError:
    """The error with the bytes of one device by kind.

    Args:
      compiled: the train step; None if it was not compiled yet.
    """
    experiment = program.experiment
    mesh, device = dict(program.run_mesh.shape), program.run_mesh.local_devices[0]
    rows = {kind: readable(size) for kind, size in bytes_per_device(program, mesh).items()}
    if (analysis := compiled.memory_analysis() if compiled is not None else None) is not None:
        rows["step: arguments"] = readable(analysis.argument_size_in_bytes)
        rows["step: outputs"] = f"{readable(analysis.output_size_in_bytes)}, of which in place of arguments "
        rows["step: outputs"] += readable(analysis.alias_size_in_bytes)
        rows["step: temporaries"] = f"{readable(analysis.temp_size_in_bytes)} (activations and the like)"
    capacity = (device.memory_stats() or {}).get("bytes_limit")
    rows["capacity"] = readable(capacity) if capacity else f"not known on {device.device_kind}"
    asked = re.search(r"(?:allocating|allocate) ([\d.]+ ?\w*)", str(error))
    width = max(map(len, rows))
    train = experiment.train
    ways = mesh["data"] * mesh["fsdp"] * mesh["expert"]  # every microbatch is split over these
    more = range(train.grad_accumulation + 1, experiment.data.batch_size // ways + 1)
    parts = next((n for n in more if experiment.data.batch_size % (n * ways) == 0), None)
    remedies = []
    if train.remat != "full":
        remedies.append("--train.remat=full recomputes activations in the backward pass")
    if parts is not None:
        remedies.append(f"--train.grad_accumulation={parts} holds those of 1/{parts} of the batch at a time")
    if mesh["fsdp"] < program.run_mesh.size:
        remedies.append("--mesh.data=1 --mesh.fsdp=-1 splits parameters and optimizer state over all devices")
    remedies.append("more devices with --mesh.fsdp=-1, or a smaller --data.batch_size, need less memory each")
    when = "while the step ran" if compiled is not None else "before the first step"
    lines = [
        f"out of memory {when}" + (f" (could not allocate {asked[1]})" if asked else "") + "; bytes per device:",
        *(f"  {kind:{width}}  {text}" for kind, text in rows.items()),
        "what helps:",
        *(f"  {remedy}" for remedy in remedies),
    ]
    return OutOfMemoryError("\n".join(lines))
