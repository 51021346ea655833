"""Imports point down, and heavy libraries load only where they are used."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# folder -> what of axrepro it may import besides itself and axrepro.errors
MAY_IMPORT = {
    "core": set(),
    "kernels": set(),
    "losses": set(),
    "data": {"core", "registry"},  # the command line names experiments
    "optim": {"core"},
    "nn": {"core", "kernels"},
    "models": {"core", "kernels", "nn"},
    "methods": {"core", "nn", "models", "losses"},
    "decode": {"core", "nn", "models"},
    "train": {"core", "data", "optim"},
    "aot": {"core", "train"},
    "study": {"core", "data", "methods", "train", "aot", "registry", "launch"},
    "quickstart": {"core", "data", "decode", "train", "registry", "launch"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at whatever level."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", sorted(p.name for p in (ROOT / "axrepro").iterdir() if (p / "__init__.py").exists()))
def test_a_folder_imports_only_those_below_it(folder):
    allowed = MAY_IMPORT[folder] | {folder, "errors", "command_line"}
    for path in sorted((ROOT / "axrepro" / folder).rglob("*.py")):
        parts = [name.split(".") for name in imported(path)]
        ours = {p[1] for p in parts if p[0] == "axrepro" and len(p) > 1}
        assert ours <= allowed, f"{path} imports axrepro.{min(ours - allowed)}"
        assert not any(p[0] in ("experiments", "tests") for p in parts), path


def test_experiments_choose_and_compute_nothing():
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        foreign = {name.split(".")[0] for name in imported(path)} & {"jax", "numpy", "optax"}
        assert not foreign, f"{path} imports {foreign}: arithmetic on arrays belongs to axrepro/"


HEAVY = (
    "[m for m in ('tensorflow', 'tensorflow_datasets', 'torch', 'transformers', 'seqio', 'matplotlib', 'tokamax', "
    "'qwix') if m in sys.modules]"
)


def output(code: str) -> str:
    """What Python prints in a fresh process."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_package_imports_no_heavy_library_and_no_jax():
    assert output(f"import sys, axrepro; print({HEAVY}, 'jax' in sys.modules)") == "[] False\n"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_describing_the_largest_experiment_is_quiet_and_light():
    code = f"""
import re, sys
from pathlib import Path
from axrepro.launch import main
code = main(["--experiment=moe_29b", "--mode=describe", "--topology=v5p-1024"])
# not getrusage: its maximum takes in the parent's memory at the fork
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(code, {HEAVY}, peak < 1e9)
"""
    lines = output(code).splitlines()
    assert lines[-1] == "0 [] True"
    assert any(line.startswith("parameters       339,8") for line in lines)


def test_sources_that_need_tensorflow_import_nothing_of_it_before_they_are_opened():
    code = f"""
import sys
from axrepro.data.seqio import SeqIO, SeqIOVocabulary
from axrepro.data.sources.tfds import Tfds
Tfds(name="any")
SeqIO(batch_size=8, task="any", task_feature_lengths=(("targets", 8),))
SeqIOVocabulary("any")
print({HEAVY}, [m for m in ("array_record", "google_crc32c") if m in sys.modules])
"""
    assert output(code) == "[] []\n"
