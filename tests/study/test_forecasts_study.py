"""Forecasts of a study's outlook are made once per configuration, survive a kill, and are read back beside their dense
model."""

import json
from dataclasses import replace

import jaxtyping
import pytest
from buckets import register
from etils import epath

from axrepro import registry
from axrepro.core.config import override
from axrepro.core.param import count_params
from axrepro.errors import UserError
from axrepro.study.__main__ import main
from axrepro.study.files import write_json
from axrepro.study.forecasts import forecast_all, read
from axrepro.study.study import Arm, Outlook, Rung, Series, Study
from axrepro.train.effect import effect
from axrepro.train.experiment import on_hardware
from experiments.moe_dense import _outlook

SLICE = "v5e-4"
SMALL = (("method.model.dim", "64"), ("data.sequence_length", "64"), ("method.model.layers.unroll", "1"))
DENSE = Arm(label="dense", experiment="dense_tiny", changes=SMALL)
SPARSE = Arm(label="8 experts", experiment="moe_dense:tiny", changes=(("mesh.expert", "4"), ("mesh.data", "1")))
AGAIN = Arm(label="capacity 2", experiment="moe_dense:tiny", changes=(*SPARSE.changes, ("mesh.fsdp", "1")), x=2)
THREE = Arm(label="three ways", experiment="moe_dense:tiny", changes=(("mesh.expert", "3"),))
OUTLOOK = Outlook(
    ladder=(Rung(name="tiny", dense=DENSE, sparse=(SPARSE, THREE)),), series=(Series(name="capacity", arms=(AGAIN,)),)
)


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Programs are read unchecked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, what was told)."""
    pytest.importorskip("libtpu", reason="programs for TPUs need their compiler: pip install libtpu")
    folder, told = epath.Path(tmp_path_factory.mktemp("study")), []
    forecast_all(OUTLOOK, {}, SLICE, folder, told.append)
    return folder, told


def lines(folder) -> list[dict]:
    return json.loads((folder / "forecasts" / f"{SLICE}.json").read_text())


def test_an_arm_that_does_not_fit_is_told_and_the_others_are_forecast(made):
    folder, told = made
    assert [text.split(", ")[1].split(" (")[0] for text in told] == ["dense", "8 experts", "three ways", "capacity 2"]
    dense, sparse, three, again = read(folder, Study(ladder=(), outlook=OUTLOOK), {})
    assert [one.where for one in (dense, sparse, three, again)] == ["tiny", "tiny", "tiny", "capacity"]
    assert [one.arm for one in (dense, sparse, three, again)] == [DENSE, SPARSE, THREE, AGAIN]
    assert [one.dense for one in (dense, sparse, three, again)] == [True, False, False, False]
    assert (three.seconds, three.fits, three.increase, dict(three.training_tokens)) == (0, False, None, {})
    assert "expert 3" in three.error
    assert three.error in told[2]
    assert (dense.mesh, sparse.mesh) == ({"data": 4}, {"expert": 4})
    for one in (dense, sparse):
        assert (one.slice, one.fits, one.error) == (SLICE, True, "")
        assert sum(one.parts.values()) == pytest.approx(one.seconds)
        assert 0 < one.memory < one.capacity
        assert one.tokens == 8 * 64
    # the same configuration by other words: not compiled again, and with nothing to compare it with
    of_the_rung = {"where": "tiny", "rung": True, "arm": SPARSE, "increase": sparse.increase}
    assert replace(again, **of_the_rung, training_tokens={}) == replace(sparse, training_tokens={})
    assert (again.increase, dict(again.training_tokens)) == (None, {})


def test_increase_and_budgets_follow_from_the_dense_model_of_the_rung(made):
    study = Study(ladder=(), outlook=OUTLOOK, tokens_per_parameter=7.0, hours=1.0)
    dense, sparse, *_ = read(made[0], study, {})
    assert sparse.increase == sparse.seconds / dense.seconds - 1
    budget = 7.0 * dense.outside
    assert dict(dense.training_tokens) == dict.fromkeys(("wall_clock", "tokens", "flops"), pytest.approx(budget))
    # spending it all at this model's price of a token
    steps = budget / dense.tokens
    assert sparse.training_tokens["wall_clock"] / sparse.tokens * sparse.seconds == pytest.approx(steps * dense.seconds)
    assert sparse.training_tokens["flops"] / sparse.tokens * sparse.flops == pytest.approx(steps * dense.flops)
    assert sparse.training_tokens["tokens"] == budget


def test_again_does_nothing_more_and_what_is_missing_is_made(made, tmp_path):
    folder, told = epath.Path(tmp_path), []
    path = tmp_path / "forecasts" / f"{SLICE}.json"
    path.parent.mkdir()
    whole = (made[0] / "forecasts" / path.name).read_text()
    path.write_text(whole)
    forecast_all(OUTLOOK, {}, SLICE, folder, told.append)
    assert path.read_text() == whole
    assert ["three ways" in text for text in told] == [True]  # tried again, to the same end
    path.write_text(json.dumps(lines(tmp_path)[:-1]))
    assert len(read(folder, Study(ladder=(), outlook=OUTLOOK), {})) == 3
    forecast_all(OUTLOOK, {}, SLICE, folder, told.append)
    assert path.read_text() == whole


def test_a_changed_experiment_is_forecast_anew(made, tmp_path):
    folder = epath.Path(tmp_path)
    (tmp_path / "forecasts").mkdir()
    *kept, last = lines(made[0])
    stale = {**last, "config": "of another day", "seconds": 99.0}
    (tmp_path / "forecasts" / f"{SLICE}.json").write_text(json.dumps([*kept, stale]))
    assert read(folder, Study(ladder=(), outlook=OUTLOOK), {})[-1].seconds == 99.0
    forecast_all(OUTLOOK, {}, SLICE, folder, lambda text: None)
    assert lines(tmp_path) == [*kept, last]
    assert read(folder, Study(ladder=(), outlook=OUTLOOK), {})[-1].seconds == last["seconds"]


def test_forecasts_and_their_report_may_be_in_a_bucket(made, capsys):
    register()
    folder = epath.Path("s3://forecasts/study")
    write_json(folder / "forecasts" / f"{SLICE}.json", lines(made[0])[:-1])
    forecast_all(OUTLOOK, {}, SLICE, folder, lambda text: None)
    assert json.loads((folder / "forecasts" / f"{SLICE}.json").read_text()) == lines(made[0])
    assert [path.name for path in (folder / "forecasts").iterdir()] == [f"{SLICE}.json"]
    found = [read(where, Study(ladder=(), outlook=OUTLOOK), {}) for where in (folder, made[0])]
    assert found[0] == found[1]
    assert main(["moe_vs_dense", f"--workdir={folder}", "--report"]) == 0
    assert "the report is s3://forecasts/study/study.md" in capsys.readouterr().out
    assert "## What was not run" in (folder / "study.md").read_text()


def test_a_slice_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="v5p-1026"):
        forecast_all(OUTLOOK, {}, "v5p-1026", epath.Path(tmp_path), lambda text: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_left_out_whether_tied_or_not(tied):
    experiment = override(registry.load(registry.find("moe_dense:tiny", registry.index())), {"method.model.tied": tied})
    model = experiment.method.model
    layers = count_params(model.layers.specs(model.dim)) + model.dim
    assert effect(experiment, "cpu-1", 1).outside == layers


def test_the_arms_of_the_paper_differ_on_each_slice():
    outlook = _outlook()
    for topology in ("v5p-1024", "v6e-256"):
        for dense, arms in [(r.dense, r.sparse) for r in outlook.ladder] + [(s.dense, s.arms) for s in outlook.series]:
            found = set()
            for arm in (dense, *arms):
                experiment = registry.load(registry.find(arm.experiment, registry.index()))
                found.add(override(on_hardware(experiment, topology)[0], dict(arm.changes)))
            assert len(found) == 1 + len(arms)
