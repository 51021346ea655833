"""The folder of experiments is the registry."""

import sys
from collections import Counter

import pytest

from axrepro import registry
from axrepro.errors import UserError
from axrepro.launch import main
from axrepro.train.experiment import Experiment

ENTRIES = registry.index()
FILE = '''
"""A file of experiments."""
raise RuntimeError("the index must not import this file")

def good() -> Experiment:
    """Its first line.

    More.
    """

def also_good(seed: int = 0, *, size=3) -> experiment.Experiment: pass
def tiny() -> Experiment: pass
def needs_an_argument(size) -> Experiment: pass
def needs_a_keyword(*, size) -> Experiment: pass
def _private() -> Experiment: pass
def not_one() -> int: pass
def unknown(): pass
'''


def write(root, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return registry.index(root)


def test_every_name_is_used_once_and_every_file_has_a_tiny():
    names = Counter(entry.function for entry in ENTRIES if entry.function != "tiny")
    assert names.most_common(1)[0][1] == 1, names.most_common(3)
    assert {e.file for e in ENTRIES} == {e.file for e in ENTRIES if e.function == "tiny"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_every_experiment_loads_and_says_what_it_is(entry):
    assert isinstance(registry.load(entry), Experiment)
    assert entry.description.endswith(".")


def test_the_index_reads_files_without_importing_them(tmp_path):
    entries = write(tmp_path, {"a.py": FILE, "vision/b.py": FILE})
    assert [e.name for e in entries if e.file == "vision/b"] == ["good", "also_good", "vision/b:tiny"]
    assert entries[0].description == "Its first line."
    assert not any(name.startswith("experiments.vision") for name in sys.modules)


def test_a_name_in_two_files_needs_its_file(tmp_path):
    entries = write(tmp_path, {"a.py": FILE, "vision/b.py": FILE})
    with pytest.raises(UserError, match="several files: a:good, vision/b:good"):
        registry.find("good", entries)
    assert registry.find("vision/b:good", entries).file == "vision/b"
    assert registry.find("b:good", entries).file == "vision/b"


@pytest.mark.parametrize(
    ("name", "message"), [("god", "'good'"), ("b:god", "'a:good'|'vision/b:good'"), ("c:good", "a:good|b:good")]
)
def test_an_unknown_name_is_an_error_with_the_nearest_one(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        registry.find(name, write(tmp_path, {"a.py": FILE, "vision/b.py": FILE}))


def test_a_file_that_cannot_be_parsed_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.py cannot be parsed"):
        write(tmp_path, {"a.py": "def broken(:"})


def test_the_list_shows_each_experiment_with_its_description(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ENTRIES)
    for entry, line in zip(ENTRIES, lines, strict=True):
        assert line.split("  ")[0].strip() == entry.name
        assert line.endswith(entry.description)


def test_a_folder_of_experiments_that_python_would_pass_over_is_told(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"experiments has no __init__\.py, without which Python takes .*add an empty"):
        registry.folder()
    (tmp_path / "experiments" / "__init__.py").touch()
    registry.folder()
