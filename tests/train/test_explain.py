"""Where a value comes from is told in the order in which it was set, with the line that set it."""

import sys
from pathlib import Path

import pytest

from axrepro import registry
from axrepro.errors import UserError
from axrepro.train import experiment as experiment_module
from axrepro.train.explain import construct, explain

SOURCE = """
from dataclasses import replace

from axrepro.core.config import override
from axrepro.data import Text, TextFiles
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import llama
from axrepro.nn import MoE, every
from axrepro.optim import AdamW, Constant
from axrepro.train.experiment import Experiment, MeshRule, Train


def base() -> Experiment:
    model = llama(vocab_size=264, dim=32, num_layers=2, num_heads=4, hidden=64)  # model
    return Experiment(
        method=LanguageModel(model=model),
        data=Text(source=TextFiles(pattern="*"), batch_size=8, sequence_length=64),
        optimizer=AdamW(learning_rate=Constant(value=1e-2)),
        train=Train(steps=100),  # train
        mesh_rules=(MeshRule("v5p-.*", (("train.remat", "qkvo"), ("train.seed", 0))),),
    )


def other() -> Experiment:
    return replace(base(), train=Train(steps=7, log_every=3))


def derived() -> Experiment:
    longer = override(base(), {"train.steps": 200})  # longer
    mixed = every(longer, 2, lambda ffn: MoE(expert=ffn, num_experts=4))  # mixed
    return replace(mixed, data=other().data)  # data
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiments_of_a_test")
    (folder / "file.py").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def history(folder):
    scope: dict = {}
    exec(compile(SOURCE, str(folder / "file.py"), "exec"), scope)
    return construct(scope["derived"], folder, "derived")


def line(folder: Path, comment: str) -> str:
    """File and line that end in a comment."""
    numbers = [i for i, text in enumerate(SOURCE.splitlines(), 1) if text.endswith(f"  # {comment}")]
    return f"{folder / 'file.py'}:{numbers[0]}"


def declared(text: str) -> str:
    """File and line of `text` in the experiment module."""
    path = Path(experiment_module.__file__)
    number = next(i for i, other in enumerate(path.read_text().splitlines(), 1) if other.strip() == text)
    return f"{path.name}:{number}"


def test_the_chain_is_default_code_mesh_rule_and_command_line(history, folder):
    shown = explain("train.remat", history, "v5p-1024", {"train.remat": "none"}).splitlines()
    assert shown[0] == "train.remat = 'none'"
    assert shown[1].startswith(f"  {line(folder, 'train')} base leaves the default of Train.remat (")
    assert shown[1].endswith(declared('remat: str = "none"') + "): 'none'")
    assert shown[2:] == ["  mesh rule 'v5p-.*' (v5p-1024): 'none' -> 'qkvo'", "  command line: 'qkvo' -> 'none'"]
    elsewhere = explain("train.remat", history, "h100-8", {})
    assert elsewhere.splitlines()[0] == "train.remat = 'none'"
    assert "mesh rule" not in elsewhere


def test_each_line_of_code_that_changed_the_value_is_named(history, folder):
    assert explain("train.steps", history, "cpu-1", {"train.steps": "300"}).splitlines() == [
        "train.steps = 300",
        f"  {line(folder, 'train')} base: 100",
        f"  {line(folder, 'longer')} derived: 100 -> 200",
        "  command line: 200 -> 300",
    ]
    times = explain("method.model.layers.times", history, "cpu-1", {}).splitlines()
    assert times[1:] == [f"  {line(folder, 'model')} base: 2", f"  {line(folder, 'mixed')} derived: 2 -> 1"]


def test_a_part_that_was_swapped_in_names_the_line_of_the_swap(history, folder):
    path = "method.model.layers.layer.layers.1.ffn.num_experts"
    assert explain(path, history, "cpu-1", {}).splitlines()[1:] == [f"  {line(folder, 'mixed')} derived: 4"]


def test_another_experiment_that_lent_a_part_is_no_ancestor(history):
    assert "7" not in explain("train.steps", history, "cpu-1", {})
    assert "leaves the default of Train.log_every" in explain("train.log_every", history, "cpu-1", {})


def test_what_sets_the_same_value_again_is_told_so(history):
    shown = explain("train.seed", history, "v5p-8", {"train.seed": "0"}).splitlines()
    assert shown[2:] == ["  mesh rule 'v5p-.*' (v5p-8): 0, as it was", "  command line: 0, as it was"]


def test_a_group_explains_the_fields_that_something_sets(history):
    shown = explain("train", history, "cpu-1", {"train.seed": "3"})
    assert [text.split(" = ")[0] for text in shown.splitlines() if not text.startswith(" ")] == [
        "train.steps",
        "train.seed",
    ]
    assert explain("checkpoint", history, "cpu-1", {}) == "checkpoint: every field has the default of its class"
    everything = explain("", history, "cpu-1", {})
    assert "data.batch_size = 8" in everything
    assert "checkpoint.every" not in everything


def test_an_unknown_path_is_an_error_with_the_nearest(history):
    with pytest.raises(UserError, match="no field 'stepz'; did you mean 'steps'"):
        explain("train.stepz", history, "cpu-1", {})


def test_watching_leaves_the_experiment_and_the_profiler_alone():
    entry = registry.find("moe_6b", registry.index())
    seen = []
    profiler = lambda *event: seen.append(event)
    sys.setprofile(profiler)
    try:
        history = construct(lambda: registry.load(entry), registry.folder(), entry.name)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert history.stages[-1] == registry.load(entry)
    with pytest.raises(ZeroDivisionError):
        construct(lambda: 1 // 0, registry.folder(), "nothing")
    assert sys.getprofile() is None


def test_every_field_has_an_explanation():
    for name in ("moe_29b", "qwen3:tiny", "llama3_405b"):
        entry = registry.find(name, registry.index())
        history = construct(lambda entry=entry: registry.load(entry), registry.folder(), entry.name)
        for block in explain("", history, "v5p-1024", {}).split("\n"):
            assert block.startswith("  ") or " = " in block
