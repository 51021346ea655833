"""From made-up cells to the report's numbers, against plain arithmetic: no model is trained here."""

import json
from dataclasses import replace

import numpy as np
import pytest
from etils import epath

from axrepro.errors import UserError
from axrepro.study.__main__ import main
from axrepro.study.bootstrap import Estimate
from axrepro.study.compare import assemble, verdict
from axrepro.study.measured import read_measured, step_ratio
from axrepro.study.plan import Plan
from axrepro.study.study import Arm, Expectation, Rung, Series, Study
from axrepro.study.sweep import slug

DENSE = {size: Arm(label=f"dense {size}", experiment=f"dense_{size}") for size in ("s", "m")}
MOE = Arm(label="8 experts", experiment="moe_s")
TIGHT = Arm(label="capacity 1", experiment="moe_s", changes=(("method.capacity_factor", "1.0"),), x=1)
STUDY = Study(
    ladder=(Rung(name="s", dense=DENSE["s"], sparse=(MOE,)), Rung(name="m", dense=DENSE["m"], sparse=())),
    seeds=(0, 1, 2),
    ablations=(
        Series(
            name="capacity",
            arms=(TIGHT, replace(MOE, label="capacity 2", x=2)),
            expected=tuple(
                Expectation(measure=measure, direction=direction)
                for measure, direction in (("dropped", "falls"), ("busiest", "rises"), ("step_time", "rises"))
            ),
        ),
    ),
    ablation_steps=50,
)
ROUNDS = {  # a machine that becomes slower: only ratios within a round tell
    "dense_s": (0.1, 0.2, 0.3, 0.4, 0.5),
    "dense_m": (0.2, 0.4, 0.6, 0.8, 1.0),
    "moe_s": (0.14, 0.28, 0.42, 0.56, 0.9),
    "tight": (0.11, 0.22, 0.33, 0.44, 0.55),
}
SIZES = np.array([1000.0, 3000.0])


def facts(name: str, flops: float, outside: int) -> dict:
    counts = {"total": 2 * outside, "active": outside, "outside": outside, "tokens": 100, "flops": flops}
    return {"config": "", "session": "one", "rounds": ROUNDS[name], "parts": {"rest": 0.1}, "memory": None, **counts}


def bits(base: float, seed: int) -> np.ndarray:
    """Of the two documents."""
    return (base + 0.01 * seed + np.array([0.1, -0.1])) * SIZES


def cell(base: float, seed: int, dropped: float = 0.0) -> dict:
    sums = {"names": ["a", "b"], "bytes": SIZES.tolist(), "tokens": SIZES.tolist(), "correct": (SIZES / 4).tolist()}
    routing = {f"layers/{i}/ffn/max_violation": 0.5 for i in (1, 3)}
    routing |= {f"layers/{i}/ffn/dropped": dropped + 0.02 * i - 0.04 for i in (1, 3)}
    routing |= {f"layers/{i}/ffn/router/router_logit_square": 4.0 for i in (1, 3)}
    return {
        "documents": {**sums, "bits": bits(base, seed).tolist()},
        "choice": {"asked": [2, 2], "correct": [1, seed % 2]},
        "train": [[10, 3.0], [20, 2.0]],
        "scalars": {"eval/bits_per_byte": base},
        "step_time_s": 0.3,
        "routing": routing,
        "loads": {"layers/ffn/load": [[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]]},
        "data": "text",
        "given_away": [],
    }


@pytest.fixture
def folder(tmp_path):
    """A study whose cells are all there."""
    arms = {"dense_s": (1e6, 500), "dense_m": (3e6, 2000), "moe_s": (1.25e6, 900)}
    known = {name: facts(name, *values) for name, values in arms.items()}
    known[slug(TIGHT, {})] = facts("tight", 1.25e6, 900)
    (tmp_path / "step_times.json").write_text(json.dumps({"device": "made up", "arms": known}))
    found = epath.Path(tmp_path)
    plan = Plan(STUDY, read_measured(STUDY, {}, found).facts, {})
    for one in plan.cells():
        base = {"dense_s": 2.0, "dense_m": 1.0}.get(one.arm.experiment, 3.0 - 0.2 * np.log(one.steps))
        path = found / one.folder / "cell.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cell(base, one.seed, 0.3 if one.arm == TIGHT else 0.1)))
    return found


def test_budgets_and_the_reported_increase_are_of_one_ratio(folder):
    results = assemble("made_up", STUDY, {}, folder)
    dense, sparse = results.rows[0], {row.rule: row for row in results.rows if row.facts.arm == MOE}
    assert dense.steps == 20 * 500 / 100
    assert sparse["wall_clock"].increase.value == pytest.approx(0.4)
    steps = {"wall_clock": 71, "step_time": 196, "tokens": 100, "flops": 80}
    assert {rule: row.steps for rule, row in sparse.items()} == steps
    assert np.median(ROUNDS["moe_s"]) / np.median(ROUNDS["dense_s"]) == pytest.approx(1.4)
    assert sparse["wall_clock"].hours == pytest.approx(71 * 0.3 * 1.4 / 3600)
    assert sparse["tokens"].tokens == dense.tokens
    assert sparse["flops"].flops == pytest.approx(dense.flops)


def test_step_times_of_different_sessions_are_not_paired(folder):
    known = read_measured(STUDY, {}, folder).facts
    moe, dense = known["moe_s"], known["dense_s"]
    other = replace(moe, session="another")
    assert step_ratio(other, dense).value == pytest.approx(moe.seconds.value / dense.seconds.value)
    assert step_ratio(other, dense).low == pytest.approx(moe.seconds.low / dense.seconds.high)
    assert step_ratio(other, dense).high - step_ratio(other, dense).low > 5 * (step_ratio(moe, dense).high - 1.4)
    fewer = replace(moe, rounds=moe.rounds[:2])
    assert step_ratio(fewer, dense).low < step_ratio(moe, dense).low


def test_scores_and_gains_are_those_of_plain_sums(folder):
    results = assemble("made_up", STUDY, {}, folder)
    rows = {(row.facts.arm.label, row.rule): row for row in results.rows}
    of = lambda base: np.mean([bits(base, seed).sum() / SIZES.sum() for seed in (0, 1, 2)])
    row, dense = rows["8 experts", "tokens"], rows["dense s", "tokens"]
    assert row.scores["bits_per_byte"].value == pytest.approx(of(3 - 0.2 * np.log(100)))
    assert row.gain["bits_per_byte"].value == pytest.approx(of(3 - 0.2 * np.log(100)) - of(2.0))
    assert row.gain["bits_per_byte"].high - row.gain["bits_per_byte"].low < 1e-9  # documents and seeds shift both
    assert row.by_seed["bits_per_byte"] == pytest.approx(
        [bits(3 - 0.2 * np.log(100), s).sum() / 4000 for s in range(3)]
    )
    assert row.scores["choice"].value == pytest.approx((1 / 4 + 2 / 4 + 1 / 4) / 3)
    assert dense.scores["accuracy"].value == pytest.approx(0.25)
    np.testing.assert_allclose(row.loads, [(0.6, 0.3, 0.1), (0.5, 0.25, 0.25)])
    assert row.dropped == pytest.approx(0.1)


def test_at_equal_wall_clock_the_interval_holds_that_of_the_ratio(folder):
    row = next(row for row in assemble("made_up", STUDY, {}, folder).rows if row.gain and row.rule == "wall_clock")
    gain, ratio = row.gain["bits_per_byte"], row.increase
    slope = -0.2  # of bits over the logarithm of steps, as made up
    assert gain.low - gain.value == pytest.approx(
        0, abs=1e-6
    )  # no round is below the median: fewer seconds win nothing
    assert gain.high - gain.value == pytest.approx(slope * np.log(1.4 / (1 + ratio.high)), abs=1e-6)
    assert ratio.high == pytest.approx(0.8)


def test_at_equal_step_time_a_mixture_is_compared_with_what_lies_between_two_dense_models(folder):
    row = next(row for row in assemble("made_up", STUDY, {}, folder).rows if row.gain and row.rule == "step_time")
    share = np.log(0.42 / 0.3) / np.log(0.6 / 0.3)
    assert row.steps == round(100 * 4**share) == 196  # a dense model of 0.6 s has 400, one of 0.3 s 100
    assert row.hours == pytest.approx(196 * 0.42 / 3600)
    gain = row.gain["bits_per_byte"]
    assert gain.value == pytest.approx(3 - 0.2 * np.log(196) - ((1 - share) * 2.0 + share * 1.0), abs=1e-6)
    # with a longer step it would have had more steps, and a better dense model to beat
    slope = 2 * -0.2 - (1.0 - 2.0) / np.log(2)
    assert slope > 0
    assert gain.low == pytest.approx(gain.value, abs=1e-6)
    assert gain.high - gain.value == pytest.approx(slope * np.log((1 + row.increase.high) / 1.4), abs=1e-6)


def test_without_a_larger_dense_model_nothing_is_trained_at_equal_step_time(folder):
    single = replace(STUDY, ladder=STUDY.ladder[:1])
    results = assemble("made_up", single, {}, folder)
    assert {row.rule for row in results.rows if not row.dense} == {"wall_clock", "tokens", "flops"}
    assert all(
        cell.steps in (100, 71, 80, 50) for cell in Plan(single, read_measured(single, {}, folder).facts, {}).cells()
    )


def test_expectations_are_judged_by_their_intervals(folder):
    found = {f.expectation.measure: f for f in assemble("made_up", STUDY, {}, folder).findings}
    assert (found["dropped"].change.value, found["dropped"].verdict) == (pytest.approx(-0.2), "held")
    assert [value.value for value in found["dropped"].values] == pytest.approx([0.3, 0.1])
    assert (found["busiest"].change.value, found["busiest"].verdict) == (0, "open")
    assert found["busiest"].values[0].value == pytest.approx(1.5)
    assert (found["step_time"].change.value, found["step_time"].verdict) == (pytest.approx(1.4 / 1.1 - 1), "held")
    assert len(found["dropped"].commands) == 6


@pytest.mark.parametrize(
    ("direction", "interval", "expected"),
    [
        ("falls", (-2, -1), "held"), ("falls", (-1, 1), "open"), ("falls", (1, 2), "did not hold"),
        ("rises", (1, 2), "held"), ("rises", (-1, 1), "open"), ("rises", (-2, -1), "did not hold"),
        ("stays", (-0.05, 0.09), "held"), ("stays", (0.05, 0.2), "open"), ("stays", (0.2, 0.3), "did not hold"),
        ("stays", (-0.3, -0.2), "did not hold"), ("stays", (-0.3, 0.3), "open"),
    ],
)  # fmt: skip
def test_verdicts(direction, interval, expected):
    assert verdict(direction, Estimate(sum(interval) / 2, *map(float, interval))) == expected


def test_runs_scored_on_other_documents_are_not_compared(folder):
    path = next(iter(sorted(folder.glob("cells/dense_s/*/cell.json"))))
    found = json.loads(path.read_text())
    found["documents"]["names"] = ["a", "c"]
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match="scored on different held-out documents"):
        assemble("made_up", STUDY, {}, folder)


def test_what_was_not_measured_is_named_and_the_rest_compared(folder):
    more = replace(STUDY, ladder=(*STUDY.ladder, Rung(name="l", dense=replace(MOE, experiment="dense_l"), sparse=())))
    results = assemble("made_up", more, {}, folder)
    assert "8 experts at l: not measured" in results.not_run
    assert {row.rung for row in results.rows} == {"s", "m"}


def test_arms_without_memory_are_named_and_the_rest_compared(folder):
    path = folder / "step_times.json"
    record = json.loads(path.read_text())
    large, two = (replace(MOE, label=f"{n} experts", changes=(("experts", f"{n}"),)) for n in (64, 2))
    record["arms"][slug(two, {})] = record["arms"]["moe_s"]
    record["errors"] = {"dense_m": "out of memory before the first step", slug(large, {}): "out of memory", "moe_s": ""}
    del record["arms"]["dense_m"]
    path.write_text(json.dumps(record))
    wide = Series(name="experts", arms=(MOE, large), expected=STUDY.ablations[0].expected)
    ladder = (replace(STUDY.ladder[0], sparse=(MOE, large)), replace(STUDY.ladder[1], sparse=(two,)))
    results = assemble("made_up", replace(STUDY, ladder=ladder, ablations=(*STUDY.ablations, wide)), {}, folder)
    assert results.not_run[:4] == (
        "64 experts at s: out of memory",
        "dense m: out of memory before the first step",
        "rung m: there is no dense model to compare with",
        "ablation of the experts, 64 experts: out of memory",
    )
    assert {row.facts.arm.label for row in results.rows} == {"dense s", "8 experts"}
    assert len(results.findings) == 3


def test_documents_that_training_gives_away_are_named(folder):
    path = next(iter(sorted(folder.glob("cells/dense_s/*/cell.json"))))
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "given_away": ["b"]}))
    (line,) = [text for text in assemble("made_up", STUDY, {}, folder).not_run if "give away" in text]
    assert line.endswith("give away: b")


def test_a_report_without_training_goes_by_the_flags_of_the_last_start(tmp_path, capsys):
    known = {"dense_28k": facts("dense_s", 1e6, 27_864), "moe_28k": facts("moe_s", 1e6, 30_000)}
    known = {name: {**one, "tokens": 2048} for name, one in known.items()}
    (tmp_path / "step_times.json").write_text(json.dumps({"device": "made up", "arms": known}))
    flags = {"study": {"tokens_per_parameter": "5"}, "experiment": {}, "rungs": "28k", "no_ablations": True}
    start = {"command": "c", "device": "d", "versions": {}, "git_commit": None, "time": "t", "flags": flags}
    (tmp_path / "study.json").write_text(json.dumps({"study": "moe_vs_dense", "starts": [start]}))
    for seed in (0, 1, 2):
        path = tmp_path / f"cells/dense_28k/steps68_seed{seed}/cell.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(cell(2.5, seed)))
    assert main(["moe_vs_dense", f"--workdir={tmp_path}", "--report"]) == 0
    text = (tmp_path / "study.md").read_text()
    assert "| 28k | dense 28k | equal wall clock, equal tokens, equal FLOPs | 68 |" in text
    assert "5 tokens per dense parameter outside the embedding" in text
    assert "50k" not in text.split("## Forecasts")[0]
    assert main(["moe_vs_dense", f"--workdir={tmp_path}", "--report", "--study.tokens_per_parameter=10"]) == 0
    assert "| 136 |" in (tmp_path / "study.md").read_text()
    assert capsys.readouterr().out.count("the report is") == 2
