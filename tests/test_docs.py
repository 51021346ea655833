"""Every page does what it says: its files are written, its commands run, its output comes."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import environment, left_out, steps

from axrepro.train.lint import KINDS

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
SHORT = ("setup", "goldens")  # the targets of make that are run; of the others, only that they exist
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def checkout(tmp_path):
    """A copy of this source tree, as a clone would be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = tmp_path / "axrepro" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)  # with its time, by which make knows what is up to date
    if VENV.is_dir():
        (tmp_path / "axrepro" / ".venv").symlink_to(VENV)
    return tmp_path / "axrepro"


def _run(words: list[str], folder: Path) -> str:
    env = environment()
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _command(text: str, extra: str, folder: Path) -> str:
    words = shlex.split(text)
    if words[0] == "python":
        return _run([sys.executable, *words[1:], *shlex.split(extra)], folder)
    if words[0] == "make":
        dry = () if words[1] in SHORT and VENV.is_dir() else ("--dry-run",)
        return _run(["make", *dry, *words[1:]], folder)
    assert words[0] in ("source", "cd"), f"the tests cannot run {text!r}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_does_what_it_says(page, checkout):
    output = ""
    for step in steps(page):
        if step.kind == "sh":
            output = _command(step.text, step.extra, checkout)
        elif step.kind == "diff":
            subprocess.run(["git", "apply", "-"], cwd=checkout, input=step.text, text=True, check=True)
        elif step.path is not None:
            (checkout / step.path).parent.mkdir(parents=True, exist_ok=True)
            (checkout / step.path).write_text(step.text)
        else:
            for line in filter(str.strip, step.text.splitlines()):
                pattern = ".*".join(map(re.escape, line.strip().split("…")))
                assert re.search(pattern, output), f"{line!r} is not in the output:\n{output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_kinds_of_findings_are_listed():
    listed = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "experiments.md").read_text(), re.MULTILINE)
    assert set(KINDS) == set(listed)


def test_only_what_needs_other_machines_is_not_run():
    reasons = {reason for page in PAGES for reason in left_out(page)}
    assert all(re.match(r"needs (a TPU|a GPU|a bucket|several machines|minutes)", reason) for reason in reasons), (
        reasons
    )
