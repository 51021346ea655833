"""The report of a study says what the results say, and no more."""

import csv
import errno
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from axrepro.study import figures, report
from axrepro.study.bootstrap import Estimate
from axrepro.study.results import SCORES, Facts, Finding, Predicted, Results, Row
from axrepro.study.study import RULES, Arm, Expectation, Series
from axrepro.study.wording import GAIN_FORMS, PERCENT, SCORE_FORMS, Form, clock, count, duration, placed, without

LESS, MORE, EITHER = -0.03, 0.03, 0.001  # bits per byte less the dense model's; intervals reach 0.01 to either side
SLICES = ("v5p-256", "v6e-256")
PARTS = {"attention": 0.24, "feed-forward": 0.3, "head": 0.2, "embedding": 0.04, "norms": 0.06, "optimizer": 0.12}


def around(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half)


def facts(arm: Arm, seconds: float, parts: dict[str, float], total: int = 2_345_678) -> Facts:
    return Facts(
        arm=arm,
        total=total,
        active=total // 2,
        outside=total // 3,
        tokens=4096,
        flops=6.0 * 4096 * total / 2,
        seconds=around(seconds, 0.02 * seconds),
        rounds=tuple(seconds * (1 + 0.01 * math.sin(k)) for k in range(12)),
        parts=parts,
        memory=300 << 20,
    )


def parts(seconds: float, routing: float = 0.0) -> dict[str, float]:
    """Of a step of which so many seconds go to routing and experts."""
    found = {name: share * (seconds - routing) for name, share in PARTS.items()}
    return found | ({"experts": 0.6 * routing, "dispatch": 0.3 * routing, "router": 0.1 * routing} if routing else {})


def curve(end: float, hours: float, seed: int) -> tuple[tuple[float, float], ...]:
    wobble = lambda t: 0.01 * math.sin(9 * t + 2 * seed) + 0.008 * seed
    return tuple((hours * t, end + 0.7 * (t**-0.35 - 1) + wobble(t)) for t in np.linspace(0.05, 1, 24).tolist())


def row(scale: int, rung: str, place: int, label: str, rule: str, difference: float, seeds: tuple[int, ...]) -> Row:
    """An arm of a rung; the one at place 0 is the dense one."""
    arm = Arm(label=label, experiment="moe_dense:tiny", changes=(("scale", rung), ("arm", label)))
    increase, base, steps = (0.0, 0.18, 0.31)[place], 0.021 * 3.1**scale, 900 * 2**scale
    seconds = base * (1 + increase)
    steps = round(steps * {"wall_clock": 1 / (1 + increase), "step_time": 1 + increase}.get(rule, 1))
    hours = steps * seconds / 3600
    difference *= place and 1 + 0.3 * (place - 1)
    bits = 2.4 - 0.16 * scale + difference
    scores = {"bits_per_byte": around(bits, 0.012), "accuracy": around(0.42 + 0.03 * scale + 0.006 * place, 0.004)}
    scores["choice"] = around(0.5 + 0.06 * scale + 0.01 * place, 0.03)
    gain = {"bits_per_byte": around(difference, 0.01), "accuracy": around(0.006 * place, 0.002)}
    gain["choice"] = around(0.01 * place, 0.025)
    command = "python -m axrepro.launch --experiment=moe_dense:tiny --experiment.steps={} --seed={}"
    return Row(
        rung=rung,
        facts=facts(arm, seconds, parts(seconds, (seconds - base) * 1.4), 1_234_567 * 3**scale),
        dense=not place,
        rule=rule,
        steps=steps,
        tokens=steps * 4096.0,
        flops=steps * 1.5e12,
        hours=hours,
        increase=around(increase, 0.02) if place else None,
        scores=scores,
        gain=gain if place else {},
        by_seed={name: tuple(score.value + 0.01 * seed for seed in seeds) for name, score in scores.items()},
        seeds=seeds,
        missing=(),
        commands=tuple(command.format(steps, seed) for seed in seeds),
        curves=tuple(curve(bits * 0.69, hours, seed) for seed in seeds),
        loads=tuple(load(8 * 4 ** (place - 1), 0.3 + 0.3 * k) for k in range(4)) if place else (),
        dropped=0.03 * place if place else None,
    )


def ladder(
    differences: dict[str, float], *, rungs=("xs", "s", "m"), labels=("8 experts", "32 experts"), seeds=(0, 1, 2)
) -> tuple[Row, ...]:
    """Rows with the difference in bits per byte of every sparse arm by rule; the steps of those of the last rung take
    longer than those of all dense models."""
    return tuple(
        row(scale, rung, place, label, rule, difference, seeds)
        for scale, rung in enumerate(rungs)
        for rule, difference in differences.items()
        for place, label in enumerate(("dense", *labels))
        if not (place and rule == "step_time" and scale == len(rungs) - 1)
    )


def load(number: int, slope: float) -> tuple[float, ...]:
    weights = [math.exp(-slope * k / number) for k in range(number)]
    return tuple(weight / sum(weights) for weight in weights)


def series(name: str, values: tuple[float, ...], *expected: Expectation) -> Series:
    arms = tuple(Arm(label=f"{name} {x:g}", experiment="tiny_moe", changes=((name, f"{x}"),), x=x) for x in values)
    return Series(name=name, arms=arms, dense=Arm(label="dense", experiment="tiny"), expected=expected)


ABLATIONS = (
    series("experts", (4, 8, 16), Expectation(measure="step_time", direction="stays")),
    series("capacity factor", (1, 1.25, 2), Expectation(measure="dropped", direction="falls")),
    series("every k-th layer", (1, 2, 4), Expectation(measure="step_time", direction="falls")),
    series("balance weight", (0, 0.01), Expectation(measure="busiest", direction="falls")),
    series("z-loss weight", (0, 0.001), Expectation(measure="router_logits", direction="falls")),
    series("experts chosen", (1, 2, 4), Expectation(measure="bits_per_byte", direction="falls")),
)
ABOUT = {"step_time": 0.031, "dropped": 0.12, "busiest": 2.3, "router_logits": 1.4, "bits_per_byte": 2.31}


def findings() -> list[Finding]:
    found = []
    for place, one in enumerate(ABLATIONS):
        for expectation in one.expected:
            about, end = ABOUT[expectation.measure], (0.04, -0.5, -0.3, -0.4, 0.001, 0.02)[place]
            last = len(one.arms) - 1
            values = tuple(around(about * (1 + end * k / last), 0.03 * about) for k in range(last + 1))
            relative = expectation.measure == "step_time"
            change = around(end if relative else values[-1].value - values[0].value, 0.05 * (1 if relative else about))
            verdict = ("held", "held", "held", "held", "open", "did not hold")[place]
            found.append(Finding(series=one, expectation=expectation, values=values, change=change, verdict=verdict))
    return found


def forecast(where: str, name: str, arm: Arm, seconds: float, increase: float | None, error: str = "") -> Predicted:
    shares = {"matrix products": 0.55, "attention": 0.12, "other compute": 0.08, "waiting: all-gather over fsdp": 0.1}
    shares |= {"waiting: reduce-scatter over fsdp": 0.05, "slowed by: all-gather over fsdp": 0.04, "copies": 0.02}
    shares |= {"waiting: all-to-all over expert": 0.03, "host memory": 0.005, "core stands still": 0.005}
    size = 0 if error else 1
    return Predicted(
        slice=name,
        where=where,
        rung=where.endswith("B"),
        arm=arm,
        dense=increase is None,
        seconds=seconds * size,
        parts={} if error else {part: seconds * share for part, share in shares.items()},
        mfu=0.512 * size,
        flops=1e18 * size,
        tokens=4_194_304 * size,
        total=27_000_000_000 * size,
        active=6_400_000_000 * size,
        outside=6_000_000_000 * size,
        memory=(61 << 30) * size,
        capacity=(95 << 30) * size,
        fits=not error,
        increase=None if error else increase,
        training_tokens={} if error else {"wall_clock": 1.1e11, "tokens": 1.28e11, "flops": 9.1e10},
        mesh={} if error else {"data": 4, "fsdp": 16, "expert": 4},
        error=error,
    )


def forecasts() -> list[Predicted]:
    found = []
    for place, name in enumerate(SLICES):
        dense = {rung: Arm(label=f"dense {rung}", experiment=f"dense_{rung}") for rung in ("6.4B", "12.6B", "29.6B")}
        for scale, rung in enumerate(dense):
            seconds = 3.1 * 1.9**scale * (1 + 0.4 * place)
            found.append(forecast(rung, name, dense[rung], seconds, None))
            error = "does not compile: sizes do not divide" if scale == 2 and place else ""
            arm = Arm(label="64 experts in every 4th layer", experiment="m")
            found.append(forecast(rung, name, arm, seconds * 1.17, 0.17, error))
        found.append(forecast("dispatch", name, dense["6.4B"], 3.1, None))
        found.append(forecast("dispatch", name, Arm(label="dropless", experiment="m"), 3.3, 0.06))
        for one in ABLATIONS[:3]:
            for k, arm in enumerate(one.arms):
                found.append(forecast(one.name, name, arm, 3.5 + 0.1 * k, 0.12 + 0.03 * k + 0.05 * place))
    return found


def results(
    wall_clock: float = LESS, tokens: float = LESS, flops: float = EITHER, step_time: float = EITHER, **how
) -> Results:
    rows = ladder(dict(zip(RULES, (wall_clock, step_time, tokens, flops), strict=True)), **how)
    shown = [one.facts for one in rows if one.rule == RULES[0]]
    shown.append(facts(ABLATIONS[0].dense, 0.026, parts(0.026)))
    for one in ABLATIONS[:3]:
        for k, arm in enumerate(one.arms):
            shown.append(facts(arm, 0.031 + 0.002 * k, parts(0.031 + 0.002 * k, 0.006)))
    return Results(
        study="moe_vs_dense",
        conditions={"hardware": "2 cores of a CPU", "jax": "0.10.2", "data": "text | bytes"},
        rows=rows,
        facts=tuple(shown),
        findings=tuple(findings()),
        predicted=tuple(forecasts()),
        not_run=("moe_dense:huge: out of memory",),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Results, Path]:
    """A whole report."""
    folder = tmp_path_factory.mktemp("study")
    with warnings.catch_warnings(action="error"):  # a layout that fails
        report.write(results(), folder)
    return results(), folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[Results, Path]:
    """A report of one dense model of one seed, whose intervals are unknown, over an older file."""
    (one,) = ladder({"tokens": 0.0}, rungs=("xs",), labels=(), seeds=(0,))
    unknown = {score: Estimate(one.scores[score].value, -math.inf, math.inf) for score in SCORES}
    found = Results(study="bare", conditions={}, rows=(replace(one, scores=unknown, missing=(1, 2)),))
    folder = tmp_path_factory.mktemp("bare")
    (folder / "study").mkdir()
    (folder / "study/forecasts.csv").write_text("of an older report")
    (folder / "study/expert_load.png").write_text("of an older report")
    (folder / "study/notes.txt").write_text("not ours")
    with warnings.catch_warnings(action="error"):
        report.write(found, folder)
    return found, folder


def tables(text: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(the headings above it, its rows) of every table."""
    headings: dict[int, str] = {}
    for block in text.split("\n\n"):
        if match := re.match(r"(#+) (.*)", block):
            headings = {level: name for level, name in headings.items() if level < len(match[1])}
            headings[len(match[1])] = match[2]
        elif block.startswith("| "):
            header, rule, *rows = (
                [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()
            )
            assert set(rule) == {"---"}
            assert all(len(cells) == len(header) for cells in rows)
            yield "/".join(list(headings.values())[1:]), [dict(zip(header, cells, strict=True)) for cells in rows]


def numbers(cell: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"[+-]?\d[\d,]*\.?\d*", cell)]


def says(cell: str, estimate: Estimate | None, form: Form) -> None:
    """Checks that a cell holds the value and both ends of the interval, to its last digit."""
    if estimate is None:
        assert cell == "–"
        return
    wanted = [value * form.scale for value in (estimate.value, estimate.low, estimate.high)]
    np.testing.assert_allclose(numbers(cell), wanted, atol=0.51 * 10.0**-form.decimals)
    assert form.unit in cell


def lines(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "study" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def spread(line: dict[str, str], name: str) -> Estimate | None:
    values = [line[name], line[f"{name}_low"], line[f"{name}_high"]]
    return Estimate(*map(float, values)) if all(values) else None


def test_the_ladder_in_the_text_says_what_the_rows_say(written):
    found, folder = written
    models, training, gains = (rows for where, rows in tables((folder / "study.md").read_text()) if where == "Ladder")
    first = {(one.rung, one.facts.arm.label): one for one in found.rows}
    assert [(line["rung"], line["arm"]) for line in models] == list(first)
    for line, one in zip(models, first.values(), strict=True):
        says(line["step time"], one.facts.seconds, clock(one.facts.seconds.value))
        says(line["over dense"], one.increase, PERCENT)
        assert line["parameters"] == count(one.facts.total)
        assert line["active"] == count(one.facts.active)
        assert line["outside the embedding"] == count(one.facts.outside)

    by_cell = {(one.rung, one.facts.arm.label, one.rule): one for one in found.rows}
    words = {"wall_clock": "equal wall clock", "tokens": "equal tokens", "flops": "equal FLOPs"}
    words["step_time"] = "equal step time"
    told = [(line["rung"], line["arm"], rule) for line in training for rule in RULES if words[rule] in line["at"]]
    assert Counter(told) == Counter(list(by_cell))
    for line in training:
        one = by_cell[line["rung"], line["arm"], next(rule for rule in RULES if words[rule] in line["at"])]
        assert int(line["steps"].replace(",", "")) == one.steps
        assert line["tokens"] == count(one.tokens)
        assert line["time"] == duration(3600 * one.hours)
        for score, header in zip(SCORES, list(line)[-3:], strict=True):
            says(line[header], one.scores[score], SCORE_FORMS[score])
    wanted = [one for one in found.rows if one.gain]
    assert [(line["rung"], line["arm"], line["at"]) for line in gains] == [
        (one.rung, one.facts.arm.label, words[one.rule]) for one in wanted
    ]
    for line, one in zip(gains, wanted, strict=True):
        for score, header in zip(SCORES, list(line)[-3:], strict=True):
            says(line[header], one.gain[score], GAIN_FORMS[score])


def test_the_csv_files_give_every_number_back_exactly(written):
    found, folder = written
    for line, one in zip(lines(folder, "ladder.csv"), found.rows, strict=True):
        assert (line["rung"], line["arm"], line["rule"]) == (one.rung, one.facts.arm.label, one.rule)
        assert line["dense"] == str(one.dense)
        assert [int(line[name]) for name in ("total", "active", "outside")] == [
            one.facts.total,
            one.facts.active,
            one.facts.outside,
        ]
        assert [float(line[name]) for name in ("steps", "tokens", "flops", "hours")] == [
            one.steps,
            one.tokens,
            one.flops,
            one.hours,
        ]
        assert spread(line, "seconds") == one.facts.seconds
        assert spread(line, "increase") == one.increase
        for score in SCORES:
            assert spread(line, score) == one.scores[score]
            assert tuple(map(float, line[f"{score}_by_seed"].split())) == one.by_seed[score]
            assert spread(line, f"gain_{score}") == one.gain.get(score)
        assert line["seeds"] == "0 1 2"

    wanted = [pair for one in found.rows for curve in one.curves for pair in curve]
    assert [(float(line["hours"]), float(line["loss"])) for line in lines(folder, "curves.csv")] == wanted
    wanted = [share for one in found.rows for shares in one.loads for share in shares]
    assert [float(line["share"]) for line in lines(folder, "loads.csv")] == wanted

    times = lines(folder, "step_times.csv")
    unique = {(one.arm.experiment, one.arm.changes): one for one in found.facts}
    assert [spread(line, "seconds") for line in times if line["kind"] == "step"] == [o.seconds for o in unique.values()]
    for kind, values in (("round", lambda o: o.rounds), ("part", lambda o: o.parts.values())):
        wanted = [value for one in unique.values() for value in values(one)]
        assert [float(line["seconds"]) for line in times if line["kind"] == kind] == wanted

    changes = iter(lines(folder, "ablations.csv"))
    for finding in found.findings:
        for arm, value in zip(finding.series.arms, finding.values, strict=True):
            line = next(changes)
            assert (line["kind"], float(line["x"]), spread(line, "value")) == ("value", arm.x, value)
        line = next(changes)
        assert (line["kind"], spread(line, "value"), line["verdict"]) == ("change", finding.change, finding.verdict)

    forecasts = lines(folder, "forecasts.csv")
    for line, one in zip([line for line in forecasts if line["kind"] == "step"], found.predicted, strict=True):
        assert (line["slice"], line["where"], line["error"]) == (one.slice, one.where, one.error)
        for name in ("seconds", "mfu", "flops", "memory", "capacity", "increase"):
            value = getattr(one, name)
            assert line[name] == ("" if one.error or value is None else str(value))
    wanted = [pair for one in found.predicted for pair in one.parts.items()]
    assert [(line["part"], float(line["seconds"])) for line in forecasts if line["kind"] == "part"] == wanted


def test_step_times_ablations_and_forecasts_in_the_text_say_what_was_found(written):
    found, folder = written
    by_section: dict[str, list] = {}
    for where, rows in tables((folder / "study.md").read_text()):
        by_section.setdefault(where, []).append(rows)
    times, broken_down = by_section["Step times"]
    unique = {(one.arm.experiment, one.arm.changes): one for one in found.facts}.values()
    for line, one in zip(times, unique, strict=True):
        says(line["step time"], one.seconds, clock(one.seconds.value))
    for line, one in zip(broken_down, unique, strict=True):
        cells = {name: cell for name, cell in line.items() if name not in ("where", "arm")}
        assert {name for name, cell in cells.items() if cell != "–"} == one.parts.keys()
        assert all(cells[name] == duration(seconds) for name, seconds in one.parts.items())

    verdicts, values = by_section["Ablations"]
    assert [line["verdict"] for line in verdicts] == [finding.verdict for finding in found.findings]
    says(verdicts[0]["change"], found.findings[0].change, PERCENT)
    says(verdicts[1]["change"], found.findings[1].change, Form(1, "points", 100))
    says(verdicts[5]["change"], found.findings[5].change, SCORE_FORMS["bits_per_byte"])
    assert len(values) == sum(len(finding.values) for finding in found.findings)

    for name in SLICES:
        told = [
            line for where, rows in by_section.items() if where.startswith(f"Forecasts/{name}/") for line in rows[0]
        ]
        wanted = [one for one in found.predicted if one.slice == name]
        assert len(told) == len(wanted)
        for line, one in zip(told, wanted, strict=True):
            if one.error:
                assert line["parameters / active"] == "no forecast: does not compile: sizes do not divide"
                continue
            assert line["arm"] == one.arm.label
            assert line.get("rung", one.where) == one.where
            assert line["step time"] == duration(one.seconds)
            assert line["over dense"] == ("–" if one.dense else f"{100 * one.increase:+.1f} %")
            assert line["memory of a device"] == "61.00 GiB of 95.00 GiB"
            assert line["tokens at equal wall clock"] == "110.0 B"
    assert by_section["Conditions"][0][2] == {"what": "data", "value": "text \\| bytes"}


def test_every_file_is_named_and_every_named_file_is_there(written, bare):
    for _, folder in (written, bare):
        text = (folder / "study.md").read_text()
        shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
        assert sorted(shown) == sorted(f"study/{path.name}" for path in folder.glob("study/*.png"))
        linked = re.findall(r"(?<!!)\[[^]]*\]\(([^)]*)\)", text)
        assert sorted(linked) == sorted(f"study/{path.name}" for path in folder.glob("study/*.csv"))
        assert not list(folder.rglob("*.new"))
    assert {path.name for path in written[1].glob("study/*.png")} == figures.FIGURES.keys()


def test_figures_are_small_pictures_with_something_on_them(written, bare):
    from PIL import Image

    for path in (*written[1].glob("study/*.png"), *bare[1].glob("study/*.png")):
        assert path.stat().st_size < 120_000, path
        pixels = np.asarray(Image.open(path).convert("L"))
        assert 150 < pixels.shape[0] < 1200, path
        assert 500 < pixels.shape[1] < 1300, path
        assert 0.01 < (pixels < 200).mean() < 0.5, path


def test_commands_stand_in_a_block_to_be_copied_once_each(written):
    found, folder = written
    block = re.search(r"## How to repeat a cell\n\n```\n(.*?)\n```", (folder / "study.md").read_text(), re.DOTALL)[1]
    told = [line for line in block.splitlines() if not line.startswith("#")]
    dense = {command: None for one in found.rows if one.dense for command in one.commands}
    sparse = [command for one in found.rows if not one.dense for command in one.commands]
    assert Counter(told) == Counter([*dense, *sparse])


def answer(found: Results) -> str:
    return report.page(found, ()).split("## Answer\n\n")[1].split("\n\n## ")[0]


def test_the_answer_follows_the_intervals():
    said = answer(results(wall_clock=LESS))
    assert said.startswith(
        "**At equal wall clock, mixtures of experts were better than dense models. It is not decided"
    )
    assert "beat dense models at equal step time.**" in said
    assert "as long (read between two rungs), not decided are 8 experts at xs +0.0010 (-0.0090 to +0.0110), 32" in said
    assert "better are 8 experts at xs -0.0300 (-0.0400 to -0.0200), 32 experts at xs -0.0390" in said
    assert "None was better at equal tokens only." in said
    first, same = said.split("At equal step time, so")
    assert "By next-token accuracy: 6 better. By choice among four: 6 not decided." in first
    assert "By next-token accuracy: 4 better. By choice among four: 4 not decided." in same

    said = answer(results(wall_clock=MORE, step_time=LESS))
    assert said.startswith(
        "**At equal wall clock, mixtures of experts were worse than dense models. At equal step time, "
    )
    assert "At equal step time, mixtures of experts were better than dense models.**" in said
    assert "worse are 8 experts at xs +0.0300 (+0.0200 to +0.0400)" in said
    assert "At equal tokens, but not at equal wall clock, better are 8 experts at xs -0.0300" in said

    without = results(wall_clock=EITHER, tokens=MORE)
    said = answer(replace(without, rows=tuple(one for one in without.rows if one.rule != "step_time")))
    assert said.startswith("**It is not decided whether mixtures of experts beat dense models at equal wall clock.**")
    assert "equal step time" not in said.split("\n\n")[0]
    assert "not decided are 8 experts at xs +0.0010 (-0.0090 to +0.0110)" in said
    assert "better are" not in said

    half = results(wall_clock=LESS).rows[:12] + results(wall_clock=MORE).rows[12:]
    said = answer(replace(results(), rows=half))
    assert said.startswith("**It depends on the model whether")
    better, worse = said.split("worse are", 1)
    assert "32 experts at xs" in better
    assert "32 experts at m" in worse


def test_an_interval_that_ends_in_0_decides_nothing():
    rows = results(wall_clock=LESS).rows
    edge = {"bits_per_byte": Estimate(-0.02, -0.04, 0.0)}
    rows = tuple(replace(one, gain=edge) if one.gain else one for one in rows)
    assert answer(replace(results(), rows=rows)).startswith("**It is not decided")


def test_the_breakdown_blames_what_grew_most_or_shrank_most():
    found = results(rungs=("xs",), labels=("8 experts",))
    said = answer(found)
    assert (
        "- 8 experts at xs: +18.0 % (+16.0 to +20.0), experts +3.175 ms, dispatch +1.588 ms, router +529.2 µs" in said
    )

    faster = {"attention": 0.001, "feed-forward": 0.002, "head": 0.0021, "optimizer": 0.0025}
    slower = {"attention": 0.004, "feed-forward": 0.0025, "head": 0.002, "optimizer": 0.0025}
    rows = tuple(
        replace(
            one,
            increase=None if one.dense else around(-0.2, 0.01),
            facts=replace(one.facts, parts=slower if one.dense else faster),
        )
        for one in found.rows
    )
    said = answer(replace(found, rows=rows))
    assert "- 8 experts at xs: -20.0 % (-21.0 to -19.0), attention -3.000 ms, feed-forward -500.0 µs\n" in said


def not_run(found: Results) -> str:
    text = report.page(found, ())
    return text.split("## What was not run\n\n")[1]


def test_what_is_missing_is_said():
    full = results()
    assert not_run(full).splitlines() == [
        "- moe_dense:huge: out of memory",
        "- training at the step time of dense models, of which no two enclose it: 8 experts at m, 32 experts at m",
        "- forecast of 64 experts in every 4th layer (29.6B) on v6e-256: does not compile: sizes do not divide",
    ]
    enclosed = tuple(row for row in full.rows if row.dense or row.rung != "m")
    assert (
        not_run(replace(full, not_run=(), rows=enclosed, predicted=full.predicted[:3])) == "- Nothing was left out.\n"
    )

    empty = report.page(Results(study="x", conditions={}), ())
    assert "Nothing can be said yet about equal wall clock" in empty
    for line in ("the ladder: no run has finished", "step times", "ablations", "forecasts for slices"):
        assert f"- {line}\n" in not_run(Results(study="x", conditions={}))
    assert re.findall("^## (.*)", empty, re.MULTILINE) == ["Answer", "What was not run"]

    late = replace(full.rows[1], seeds=(0,), missing=(1, 2))
    said = not_run(replace(full, rows=(full.rows[0], late, *full.rows[2:])))
    assert "- 8 experts at xs, equal wall clock: seeds 1, 2 are missing\n" in said
    assert "forecasts for slices" in not_run(replace(full, predicted=()))
    assert "there is nothing to compare the dense models with" in not_run(results(labels=()))
    assert "Nothing can be said yet about equal wall clock" in answer(results(labels=()))

    single = results(rungs=("xs",), seeds=(3,))
    assert "- training at equal step time: it takes dense models with shorter and longer steps\n" in not_run(single)
    assert "With one seed they say nothing about how results vary between seeds." in answer(single)

    two = replace(full, rows=tuple(one for one in full.rows if one.rule != "flops"))
    assert "- training at equal FLOPs\n" in not_run(two)
    plain = tuple(replace(one, facts=replace(one.facts, parts={})) for one in full.rows)
    assert "the step times are not taken apart" in not_run(replace(full, rows=plain, facts=()))


def test_a_bare_report_draws_what_it_has_and_takes_away_what_is_no_longer_so(bare):
    _, folder = bare
    drawn = {"speed_accuracy.png", "loss_wall_clock.png", "step_time_breakdown.png"}
    tables = {"ladder.csv", "curves.csv", "step_times.csv"}
    assert {path.name for path in folder.iterdir()} == {"study.md", "study"}
    assert {path.name for path in (folder / "study").iterdir()} == {"notes.txt", *drawn, *tables}
    text = (folder / "study.md").read_text()
    assert "| 2.4000 (interval unknown) | 42.00 % (interval unknown) | 50.00 % (interval unknown) |" in text
    assert "- dense at xs, equal tokens: seeds 1, 2 are missing\n" in text


@pytest.mark.parametrize("fault", ["draw", "write"])
def test_a_report_that_fails_leaves_the_old_one_whole(bare, tmp_path, monkeypatch, fault):
    found, folder = bare
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    held = lambda: {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    before = held()

    def no_space(path, content):
        if path.name.startswith("study.md"):
            raise OSError(errno.ENOSPC, "no space left")
        path.open("wb").write(content)

    def no_glyph(results):
        raise ValueError("cannot be drawn")

    if fault == "draw":
        monkeypatch.setattr(figures, "draw", no_glyph)
    else:
        monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises((OSError, ValueError), match=r"no space left|cannot be drawn"):
        report.write(replace(found, study="another", rows=()), old)
    assert held() == before


def test_labels_tell_the_rung_once():
    rungs = {"50k": "MoE 50k, 8 experts", "s": "8 experts", "6.4B": "dense 6.4B"}
    assert [without(*pair) for pair in rungs.items()] == ["MoE, 8 experts", "8 experts", "dense"]
    assert [placed(*pair) for pair in rungs.items()] == ["MoE 50k, 8 experts", "8 experts at s", "dense 6.4B"]


def test_times_and_counts_are_written_in_a_unit_that_suits_them():
    assert [duration(t) for t in (3.21e-5, 0.012345, 1.5, 90.0, 86400.0)] == [
        "32.10 µs",
        "12.35 ms",
        "1.500 s",
        "1.500 min",
        "24.00 h",
    ]
    assert [count(n) for n in (7, 12345, 6.4e9, 1.28e11)] == ["7", "12.35 k", "6.400 B", "128.0 B"]
    assert duration(Estimate(0.01, 0.009, 0.0112)) == "10.00 ms (9.00 to 11.20)"
    assert PERCENT.text(None) == PERCENT.text(math.nan) == "–"
