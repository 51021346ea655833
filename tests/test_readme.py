"""The README keeps its promises: its code runs, and its map is the tree. Its commands: test_docs.py."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from documents import environment

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\w*\n(.*?)```", TEXT, re.DOTALL)


def run(folder, command: str, *extra: str) -> str:
    """What a command prints, run in `folder`; `python` is this one."""
    words = shlex.split(command)
    assert words[0] == "python"
    env = environment()
    arguments = [sys.executable, *words[1:], *extra]
    done = subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_experiment_and_its_mixture_run(tmp_path):
    code, mixture = (block for block in BLOCKS if "-> Experiment:" in block)
    assert len(code[code.index("def ") :].strip().splitlines()) <= 20
    assert len(mixture.strip().splitlines()) == 2  # the function and its one line
    package = tmp_path / "experiments"
    package.mkdir()
    (package / "mine.py").write_text(code + "\n\nfrom axrepro.nn import MoE, every\n\n" + mixture)
    (tmp_path / "data").mkdir()
    for i in range(60):
        (tmp_path / "data" / f"{i}.txt").write_text(f"Document {i}. " + "Some text to learn from. " * 40)
    short = ("--method.model.dim=32", "--method.model.layers.times=2", "--train.steps=4", "--data.batch_size=4",
             "--data.sequence_length=64")  # fmt: skip
    out = run(tmp_path, "python -m axrepro.launch --experiment=my_moe", *short)
    assert "complete at step 4" in out
    listed = run(tmp_path, "python -m axrepro.launch --list")
    assert "my_lm   A small dense model on the text files in data/." in listed


def test_the_map_names_every_folder():
    table = TEXT[TEXT.index("## Where things are") :]
    named = set(re.findall(r"`([a-z/]+)/`", table))
    folders = {f"axrepro/{p.parent.name}" for p in (ROOT / "axrepro").glob("*/__init__.py")} | {
        "experiments",
        "benchmarks",
        "docs",
        "tests",
    }
    assert named == folders


def test_files_of_a_run_are_named():
    for name in ("config.json", "metrics.jsonl", "events/", "checkpoints/", "curve.png"):
        assert f"`{name}`" in TEXT
