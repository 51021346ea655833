"""The command: what it lists, and how it tells what is wrong before anything is trained."""

import json

import pytest

from axrepro.study.__main__ import main

WRONG = {
    "": "the name of a study is missing; --list prints them",
    "moe_vs_dens": "no study 'moe_vs_dens'; did you mean 'moe_vs_dense'?",
    "moe_50k": "no study 'moe_50k'; ",
    "moe_vs_dense --wrkdir=x": "unknown argument '--wrkdir=x'; did you mean 'workdir'?",
    "moe_vs_dense --train.steps=5": "unknown argument '--train.steps=5'",
    "moe_vs_dense --workdir=": "--workdir= is empty; give it a value, or leave it out",
    "moe_vs_dense --study.seeds": "'--study.seeds' needs a value: --study.seeds=VALUE",
    "moe_vs_dense --study.seeds=0,0": "seeds=(0, 0): it takes different numbers",
    "moe_vs_dense --study.seeds=()": "it takes different numbers",
    "moe_vs_dense --study.seeds=-1": "it takes different numbers from 0 to 4294967295",
    "moe_vs_dense --study.rules=time": "it takes tuple[Literal['wall_clock', 'step_time', 'tokens', 'flops'], ...]",
    "moe_vs_dense --study.hours=0": "hours=0.0: it takes a number above 0",
    "moe_vs_dense --study.token=5": "has no field 'token'",
    "moe_vs_dense --study.rounds=many": "rounds='many' has the wrong type; it takes int",
    "moe_vs_dense --rungs=50k,5k": "no rung '5k'; did you mean '50k'?",
    "moe_vs_dense --devices=0": "--devices=0 must be at least 1",
    "moe_vs_dense --plan --report": "--plan and --report are two things to do; give one of them",
    "moe_vs_dense --topology=v5p-1024 --plan": "--topology and --plan are two things to do",
    "moe_vs_dense --no_ladder --no_ablations": "leave nothing to train",
    "moe_vs_dense --experiment.train.steps=5": "--experiment.train.steps is what the study decides",
    "moe_vs_dense --experiment.train.seed=5": "--experiment.train.seed is what the study decides",
    "moe_vs_dense --experiment.data.batch=5": "arm 'dense 28k': Text (at data) has no field 'batch'",
    "moe_vs_dense --experiment.data.batch_size=12": "12",  # rows over eight devices
    "moe_vs_dense --topology=v5p-1026": "v5p-1026",
    "moe_vs_dense --topology=h100-8": "h100-8",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_told_in_one_line_and_leaves_nothing(flags, tmp_path, capsys):
    workdir = [] if "--workdir" in flags else [f"--workdir={tmp_path}/study"]
    assert main([*flags.split(), *workdir]) == 2
    err = capsys.readouterr().err
    assert err.startswith("axrepro: error: ")
    assert err.count("\n") == 1
    assert WRONG[flags] in err
    assert not list(tmp_path.rglob("cell*"))


def test_studies_are_listed_with_what_they_ask(capsys):
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.startswith("moe_vs_dense  For a given budget, train dense or a mixture of experts?")


def test_a_folder_of_another_study_or_of_a_run_is_refused(tmp_path, capsys):
    (tmp_path / "study.json").write_text(json.dumps({"study": "another", "starts": []}))
    assert main(["moe_vs_dense", f"--workdir={tmp_path}", "--report"]) == 2
    assert "holds the study 'another'; choose another --workdir" in capsys.readouterr().err
    (tmp_path / "study.json").rename(tmp_path / "config.json")
    assert main(["moe_vs_dense", f"--workdir={tmp_path}", "--report"]) == 2
    assert "holds a run, not a study" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    (tmp_path / "step_times.json").write_text('{"device": "8 x cpu", "arms":')
    assert main(["moe_vs_dense", f"--workdir={tmp_path}", "--report"]) == 2
    assert "step_times.json" in capsys.readouterr().err


def test_the_report_of_a_folder_that_holds_none_is_refused(tmp_path, capsys):
    assert main(["moe_vs_dense", f"--workdir={tmp_path}/none", "--report"]) == 2
    assert "/none holds no study; give the --workdir of one, or leave out --report" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_report_of_forecasts_alone_says_that_nothing_was_trained(tmp_path, capsys):
    (tmp_path / "forecasts").mkdir()
    assert main(["moe_vs_dense", f"--workdir={tmp_path}", "--report"]) == 0
    text = (tmp_path / "study.md").read_text()
    assert "Nothing can be said yet" in text
    assert "the ladder: no run has finished" in text
    assert f"the report is {tmp_path}/study.md" in capsys.readouterr().out
