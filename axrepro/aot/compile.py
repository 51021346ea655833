"""The train step of an experiment, compiled for hardware that is not there.

The compiler runs in a process of its own and writes down what it does. Once it has optimised and scheduled the program
and given every buffer its place, all that a forecast needs is known; what is left, machine code, takes a hundred times
as long and is made only on demand. Until then one thing stays open: whether each kernel's scratch memory fits.
"""

import json
import multiprocessing
import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from axrepro.aot.slices import Slice
from axrepro.errors import UserError
from axrepro.train.experiment import Experiment

_POLL = 0.05  # seconds
_SETTLED = 6  # polls without growth, after which a file is taken to be complete


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a step, as it wrote it down.

    Attributes:
      text: the optimised and scheduled program.   buffers, live_ranges: where and when each of its values is in memory;
        "" if the compiler did not say.
      mesh: devices per mesh axis.   places: per device, in the order of the mesh, (slice, coordinates on its torus).
      capacity: bytes of a device's memory that a program may take; None of CPUs. What the step needs (see
        `axrepro.aot.memory`) can be more: the compiler then stops once it has planned the memory.
      seconds: what the compiler took.   executable: for `axrepro.train.saved`, if asked for.
    """

    text: str = field(repr=False)
    buffers: str = field(repr=False)
    live_ranges: str = field(repr=False)
    mesh: Mapping[str, int]
    places: tuple[tuple[int, ...], ...] = field(repr=False)
    capacity: int | None
    seconds: float
    executable: bytes | None = field(default=None, repr=False)


class DoesNotFitError(RuntimeError):
    """There is no program, since it needs more memory than a device has. `text` is what the compiler says of it."""

    def __init__(self, text: str):
        super().__init__(text.split("\n")[0])
        self.text = text


def compile_step(experiment: Experiment, hardware: Slice | int, machine_code: bool = False) -> Compiled:
    """Compiles the step that `train` would run; no array is made. Without machine code it need not fit into memory.

    Args:
      experiment: with mesh rule and overrides applied.   hardware: a slice, or a number of emulated CPU devices.
      machine_code: whether to end with a program that the hardware can load.
    Raises:
      UserError: if experiment, mesh and hardware do not fit, or the compiler is not installed.
      DoesNotFitError: if machine code was asked for and the step needs more memory than there is.
    """
    with (
        tempfile.TemporaryDirectory(prefix="axrepro_compile_") as folder,
        _compiler(experiment, hardware, machine_code, Path(folder)) as process,
    ):
        start = time.monotonic()
        return _collect(process, Path(folder), machine_code, start)


@contextmanager
def _compiler(experiment: Experiment, hardware: Slice | int, machine_code: bool, folder: Path) -> Iterator:
    """The process that compiles; it ends with the block."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_compile, args=(experiment, hardware, machine_code, str(folder)), daemon=True)
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the machine that compiles: accelerators that it may have stay untouched
    try:
        process.start()
    finally:
        if before is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = before
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _compile(experiment: Experiment, hardware: Slice | int, machine_code: bool, folder: str) -> None:
    """What the process does: leaves what the compiler writes, and either layout.json or error.json, in `folder`."""
    try:
        _compile_into(experiment, hardware, machine_code, Path(folder))
    except Exception as error:  # all of them are told to the process that waits
        from axrepro.train.out_of_memory import is_out_of_memory

        kind = "memory" if is_out_of_memory(error) else "input" if isinstance(error, UserError) else "fault"
        text = str(error) if kind != "fault" else traceback.format_exc()
        _write(Path(folder) / "error.json", json.dumps({"kind": kind, "text": text}))


def _compile_into(experiment: Experiment, hardware: Slice | int, machine_code: bool, folder: Path) -> None:
    import jax

    from axrepro.aot.slices import devices
    from axrepro.core.sharding import make_mesh
    from axrepro.train import loop, saved
    from axrepro.train.state import Program

    if isinstance(hardware, int):
        jax.config.update("jax_num_cpu_devices", hardware)
    found = jax.devices() if isinstance(hardware, int) else devices(hardware)
    experiment.method.check({name: array.shape for name, array in experiment.data.abstract().items()}, None)
    program = Program(experiment, make_mesh(experiment.mesh, found), "cpu" if isinstance(hardware, int) else "tpu")
    mesh = program.run_mesh
    places = [(getattr(d, "slice_index", 0) or 0, *getattr(d, "coords", (d.id,))) for d in mesh.devices.flat]
    capacity = None if isinstance(hardware, int) else _capacity(found[0])
    _write(folder / "layout.json", json.dumps({"mesh": dict(mesh.shape), "places": places, "capacity": capacity}))
    lowered = loop.lower_step(program, loop.abstract_batch(program))
    dumps = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    compiled = lowered.compile({**loop.compiler_options(experiment), **dumps})
    if machine_code:
        (folder / "executable").write_bytes(saved.dump(program, lowered, compiled))
    _write(folder / "program.txt", compiled.as_text() or "")


def _capacity(device) -> int:
    """Told, to 5 MiB, where the compiler refuses a program that takes more than any device has."""
    import jax
    import jax.numpy as jnp

    array = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative).lower(array).compile()
    except jax.errors.JaxRuntimeError as error:
        if (found := re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error))) is None:
            raise
        return int(float(found[1]) * 2**30)
    raise RuntimeError(f"a {device.device_kind} with more than 2 TiB of memory?")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    scratch = path.with_suffix(".new")
    scratch.write_text(text)
    scratch.rename(path)


def _collect(process, folder: Path, machine_code: bool, start: float) -> Compiled:
    """Waits until the program is there, by the compiler's notes or at its end."""
    sizes: list[int] = []
    while True:
        ended = not process.is_alive()
        if (folder / "error.json").exists():
            error = json.loads((folder / "error.json").read_text())
            planned = next(folder.glob("*after_optimizations.txt"), None)
            if error["kind"] == "memory" and planned is not None and not machine_code:
                return _compiled(folder, planned, start)
            _fail(error)
        if (folder / "program.txt").exists():
            return _compiled(folder, folder / "program.txt", start)
        noted = next(folder.glob("*after_optimizations_after_buffer_assignment.txt"), None)
        if noted is not None and not machine_code:
            sizes.append(noted.stat().st_size)
            if len(sizes) > _SETTLED and len(set(sizes[-_SETTLED:])) == 1 and sizes[-1]:
                return _compiled(folder, noted, start)
        if ended:
            raise RuntimeError(
                f"the compiler's process ended with exit code {process.exitcode} and said nothing; a script must ask "
                'for programs below `if __name__ == "__main__":`, as the process imports it'
            )
        time.sleep(_POLL)


def _fail(error: Mapping[str, str]) -> None:
    if error["kind"] == "memory":
        raise DoesNotFitError(error["text"])
    if error["kind"] == "input":
        raise UserError(error["text"])
    raise RuntimeError(f"the compiler failed:\n{error['text']}")


def _compiled(folder: Path, program: Path, start: float) -> Compiled:
    read = lambda ending: next((p.read_text() for p in folder.glob(f"*after_optimizations-{ending}.txt")), "")
    layout = json.loads((folder / "layout.json").read_text())
    executable = folder / "executable"
    return Compiled(
        text=program.read_text(),
        buffers=read("buffer-assignment"),
        live_ranges=read("live-range"),
        mesh=layout["mesh"],
        places=tuple(map(tuple, layout["places"])),
        capacity=layout["capacity"],
        seconds=time.monotonic() - start,
        executable=executable.read_bytes() if executable.exists() else None,
    )
