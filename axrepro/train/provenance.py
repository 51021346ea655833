"""config.json: what a run was made from."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import jax

from axrepro.core.config import differences, to_json
from axrepro.errors import UserError
from axrepro.train.experiment import Experiment
from axrepro.train.workdir import Workdir

PACKAGES = ("axrepro", "jax", "jaxlib", "libtpu", "optax", "orbax-checkpoint", "ml-collections", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide about a run."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this source tree, with "+changes" where it differs; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        git = lambda *args: subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def check_workdir(workdir: Workdir, name: str) -> None:
    """Makes the folder if need be. Raises UserError if it cannot be written, or holds a run of another experiment."""
    folder, path = workdir.local, workdir.local / "config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text()) if path.exists() else None
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write")
        if old is not None and not (isinstance(old, dict) and isinstance(old.get("config", {}), dict)):
            raise ValueError("is no record of a run")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot use the workdir {workdir.address}: {path.name if path.exists() else ''} {error}; choose another"
        ) from None
    if old is not None and old.get("experiment") != name:
        raise UserError(
            f"{workdir.address} holds a run of {old.get('experiment')!r}, not of {name!r}; choose another --workdir"
        )


def record_config(workdir: Workdir, name: str, experiment: Experiment) -> None:
    """Writes `workdir`/config.json; one with other settings is kept beside it, and the differences are printed."""
    record = {
        "experiment": name,
        "config": json.loads(to_json(experiment)),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    folder = workdir.local
    path = folder / "config.json"
    old = json.loads(path.read_text()) if path.exists() else None
    if old == record:
        return
    if old is not None:
        if changed := differences(old.get("config", {}), record["config"]):
            print(f"settings changed since the last start: {'; '.join(changed[:8])}", flush=True)
        number = sum(1 for _ in folder.glob("config.*.json"))
        os.replace(path, folder / f"config.{number}.json")
    scratch = folder / "config.json.new"
    scratch.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    os.replace(scratch, path)
