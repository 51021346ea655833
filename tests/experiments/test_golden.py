"""What a change to shared code does to each experiment is seen in its golden files, see `goldens`."""

import goldens
import pytest

from axrepro import registry
from axrepro.core.config import override
from axrepro.errors import UserError
from axrepro.train.experiment import MeshRule

ENTRIES = registry.index()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.file}:{e.function}")
def test_golden_config_and_effect(entry, golden):
    experiment = registry.load(entry)
    config, effect, *_ = goldens.files(entry)
    golden(config, goldens.config_text(experiment))
    golden(effect, goldens.effect_text(experiment))


def test_golden_files_belong_to_experiments(request):
    expected = {path for entry in ENTRIES for path in goldens.files(entry)}
    stale = {path for path in goldens.FOLDER.rglob("*") if path.is_file()} - expected
    if request.config.getoption("--goldens"):
        for path in stale:
            path.unlink()
    else:
        assert not stale, f"no experiment has these: {sorted(map(str, stale))}; {goldens.HINT}"


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in goldens.FOLDER.rglob("*") if path.is_file()) < 1e6


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ({"method.z_weight": 1e-4}, "losses"),
        ({"method.model.tied": False}, "head"),
        ({"method.model.dim": 72}, "embed/table"),
        ({"optimizer.moment_dtype": "bfloat16"}, "bytes per device"),
        ({"data.sequence_length": 128}, "per step"),
    ],
)
def test_a_change_of_effect_is_seen(assignment, line):
    experiment = registry.load(registry.find("moe_dense:tiny", ENTRIES))
    old, new = (set(goldens.effect_text(e).splitlines()) for e in (experiment, override(experiment, assignment)))
    assert any(changed.startswith(line) for changed in old ^ new)


def test_a_difference_is_told_with_the_way_to_accept_it(tmp_path):
    path = tmp_path / "a.txt"
    assert goldens.text_fault(path, "a\nb\n") == "there is no such file"
    path.write_text("a\nb\n")
    assert goldens.text_fault(path, "a\nb\n") is None
    assert "-b\n+c\n" in goldens.text_fault(path, "a\nc\n")


def test_each_mesh_rule_has_a_slice_of_its_own():
    rules = (MeshRule("v5p-(64|128)", ()), MeshRule("v5p-.*", ()), MeshRule("h100-.*", ()))
    assert [goldens.representative(rule, rules) for rule in rules] == ["v5p-128", "v5p-512", "h100-256"]
    hidden = MeshRule("v5p-32", ())
    with pytest.raises(UserError, match="v5p-32"):
        goldens.representative(hidden, (*rules, hidden))
