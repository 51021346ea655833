"""The compiled train step in a file: a run that reads it starts without the compiler.

The file has a line of JSON, which tells what the program was made of, and then what the compiler made, in its own form.
Trees, shardings and donation come from the experiment that runs, which is traced as ever; nothing is unpickled. A
program is nonetheless code: read only those of people whose code you would run.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from axrepro.core.config import differences, to_config_dict
from axrepro.errors import UserError
from axrepro.train.hardware import slice_name
from axrepro.train.state import Program

_FORMAT = "axrepro train step 1"
_LONGEST = 1 << 24  # bytes of the line
_TOLD = 3  # settings


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """A compiled step and what it was made of.

    Attributes:
      origin: see `origin`.   executable: as the compiler serialises it.
    """

    origin: Mapping[str, Any] = field(repr=False)
    executable: bytes = field(repr=False)

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """What keeps it from being the step of another origin, in words; None if it is that step."""
        for name in ("jaxlib", "libtpu", "hardware", "places"):
            if (mine := self.origin.get(name)) != (wanted := other.get(name)):
                told = "its devices stand in another order" if name == "places" else f"it is for {name} {mine}"
                return told if name == "places" else f"{told}, and this is {wanted}"
        if self.origin.get("step") == other["step"]:
            return None
        changed = differences(self.origin.get("config", {}), other["config"])
        return f"it is of another step: {'; '.join(changed[:_TOLD]) or 'the same settings in other code'}"

    def load(self, lowered: jax.stages.Lowered, options: Mapping[str, str | bool]) -> jax.stages.Compiled:
        """The lowered step, compiled as it was, where `difference` finds none.

        Raises:
          jax.errors.JaxRuntimeError: if the device refuses the program.
        """
        arguments = lowered._lowering.compile_args  # jax has no public way that does not unpickle (0.10.2)
        client = arguments["backend"]
        arguments["backend"] = _Reader(client, self.executable)
        try:
            return lowered.compile(dict(options) or None)
        finally:
            arguments["backend"] = client


class _Reader:
    """A device client which, asked to compile, reads what has been compiled."""

    def __init__(self, client: Any, executable: bytes):
        self._client, self._executable = client, executable

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def compile_and_load(self, module: Any, executable_devices: Any, compile_options: Any) -> Any:
        del module
        return self._client.deserialize_executable(self._executable, executable_devices, compile_options)


def origin(program: Program, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """What a compiled step depends on, in values that JSON knows: the settings only tell where steps differ."""
    devices = list(program.run_mesh.devices.flat)
    version = {"libtpu": importlib.metadata.version("libtpu")} if program.platform == "tpu" else {}
    place = lambda d: [getattr(d, "slice_index", 0) or 0, *getattr(d, "coords", (d.id,)), getattr(d, "core_on_chip", 0)]
    options = sorted(program.experiment.train.compiler_options)
    return {
        "format": _FORMAT,
        "jaxlib": importlib.metadata.version("jaxlib"),
        **version,
        "hardware": slice_name(devices[0].device_kind, len(devices)),
        "places": list(map(place, devices)),
        "step": hashlib.sha256(f"{options}\n{lowered.as_text()}".encode()).hexdigest(),
        "config": json.loads(json.dumps(to_config_dict(program.experiment).to_dict())),
    }


def dump(program: Program, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> bytes:
    """The content of a file."""
    # pyrefly: ignore[missing-attribute]  # jax types it as what a program that was never compiled has, None
    executable = compiled.runtime_executable().serialize()
    line = {**origin(program, lowered), "bytes": len(executable), "sha256": hashlib.sha256(executable).hexdigest()}
    return json.dumps(line).encode() + b"\n" + executable


def read(path: str) -> SavedStep:
    """What a file holds. Raises UserError if it is not there, is not such a file, or is damaged."""
    try:
        with open(path, "rb") as file:
            line, executable = file.readline(_LONGEST), file.read()
    except OSError as error:
        raise UserError(f"cannot read the program {path}: {error}") from None
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise UserError(f"{path} is no program that --mode=compile --save=FILE wrote with this version")
    if found.get("sha256") != hashlib.sha256(executable).hexdigest():
        raise UserError(f"the program {path} is damaged: {len(executable)} bytes of {found.get('bytes')}")
    return SavedStep(origin=found, executable=executable)
