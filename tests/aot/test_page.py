"""The page of a forecast: nothing of the step is lost on it, and nothing of the program can break it."""

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import pytest

from axrepro import launch
from axrepro.aot import forecast as forecasts
from axrepro.aot import page, report
from axrepro.aot.step_time import CORE, Event, Pass, StepTime

VOID = ("meta", "link", "br")
MODE = ["--experiment=llama:tiny", "--mode=compile", "--topology=v5e-4"]
COMMAND = [*MODE, "--mesh.data=1", "--mesh.fsdp=4", "--data.batch_size=16"]


class Elements(HTMLParser):
    """(tag, attributes, text directly inside) of all elements. Fails where one is closed that is not open."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[SimpleNamespace] = []
        self.open: list[SimpleNamespace] = []
        self.feed(text)
        self.close()
        assert not self.open, [one.tag for one in self.open]

    def handle_starttag(self, tag, attrs):
        self.found.append(SimpleNamespace(tag=tag, attrs=dict(attrs), text="", inside=[]))
        if self.open:
            self.open[-1].inside.append(self.found[-1])
        if tag not in VOID:
            self.open.append(self.found[-1])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1].text += data

    def all(self, tag: str) -> list[SimpleNamespace]:
        return [one for one in self.found if one.tag == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(what the command wrote, the forecast that it wrote of)"""
    pytest.importorskip("libtpu", reason="programs for TPUs need their compiler: pip install libtpu")
    file, kept, real = tmp_path_factory.mktemp("page") / "step.html", [], forecasts.forecast

    def keeping(*args):
        kept.append(real(*args))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecasts, "forecast", keeping)
        assert launch.main([*COMMAND, f"--html={file}"]) == 0
    assert [path.name for path in file.parent.iterdir()] == ["step.html"]  # nothing is left of writing it
    return file.read_text(encoding="utf-8"), kept[0]


def test_the_command_writes_the_page_which_is_the_same_each_time(made):
    text, forecast = made
    assert text == page.html("llama:tiny", forecast)
    assert text.startswith("<!DOCTYPE html>")
    assert "$" not in text


def test_a_page_needs_nothing_from_elsewhere(made):
    text, _ = made
    assert not re.search(r"https?:|//\w|@import|<script|<link|<img", text)
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    elements = Elements(text)
    ids = {one.attrs["id"] for one in elements.found if "id" in one.attrs}
    assert set(re.findall(r"url\(#(\w+)\)", text)) <= ids
    assert not {name for one in elements.found for name in one.attrs if name in ("src", "href") or name[:2] == "on"}


def test_every_part_of_the_breakdown_is_told_with_its_share(made):
    text, forecast = made
    elements = Elements(text)
    listed = {}
    for row in elements.all("table")[1].inside:
        part, _, share = (cell.text.strip() for cell in row.inside)
        listed[part] = share
    parts = {part: seconds for part, seconds in forecast.time.parts.items() if seconds > 0}
    assert set(listed) == set(parts)
    for part, share in listed.items():
        exact = parts[part] / forecast.time.seconds
        assert share == f"{exact:.1%}" if exact >= 0.0005 else share == "< 0.1%"
    drawn = next(one for one in elements.all("svg") if one.attrs.get("aria-label") == "where the time goes")
    widths = [float(one.attrs["width"]) for one in drawn.inside]
    whole = float(drawn.attrs["viewbox"].split()[2])
    assert widths == pytest.approx([parts[part] / forecast.time.seconds * whole for part in listed], abs=0.011)


def test_the_page_tells_the_figures_of_the_report(made):
    text, forecast = made
    cards = {div.inside[0].text: div.inside[1].text for div in Elements(text).all("div") if len(div.inside) == 3}
    assert cards["MFU"] == f"{forecast.speed['mfu']:.1%}"
    assert cards["tokens a second"] == f"{forecast.speed['tokens_per_second']:,.0f}"
    assert cards["step time"] == f"{forecast.time.seconds * 1e6:.4g} µs"


def test_the_blocks_of_the_core_fill_each_pass(made):
    _, forecast = made
    drawn = page.charts(forecast.time)
    assert drawn[0].body == forecast.time.entry
    assert len(drawn) > 1
    for chart in drawn:
        one = forecast.time.passes[chart.body]
        blocks = chart.rows[CORE]
        assert blocks[0].start == 0
        assert all(math.isclose(a.end, b.start, abs_tol=1e-9 * one.seconds) for a, b in pairwise(blocks))
        assert sum(block.seconds for block in blocks) == pytest.approx(one.seconds, rel=1e-6)
        busy = sum(event.seconds for event in one.events if event.lane == CORE)
        still = sum(block.parts.get(page.STILL, 0.0) for block in blocks)
        assert busy + still == pytest.approx(one.seconds, rel=1e-6)
        events = [event for blocks in chart.rows.values() for block in blocks for event in block.events]
        assert sorted(map(id, events)) == sorted(map(id, one.events))


def test_drawn_widths_add_up_to_the_width_of_a_pass(made):
    text, forecast = made
    for chart, figure in zip(page.charts(forecast.time), Elements(text).all("figure"), strict=True):
        picture = figure.inside[1]
        rects = [one for one in picture.inside if one.tag == "rect"]
        rects += [
            one.inside[-1] if one.inside[-1].tag == "rect" else one.inside[-2]
            for one in picture.inside
            if one.tag == "g" and any(each.attrs.get("class") == "loop" for each in one.inside)
        ]
        core = [one for one in rects if one.attrs["height"] == f"{page._CORE:.2f}"]
        assert len(core) == len(chart.rows[CORE])
        assert sum(float(one.attrs["width"]) for one in core) == pytest.approx(page._PLOT, abs=0.01 * len(core))


def step(*events: Event, seconds: float, **loops: Pass) -> StepTime:
    parts: dict[str, float] = {}
    for event in events:
        if event.part != "loop":
            parts[event.part] = parts.get(event.part, 0.0) + event.seconds
    return StepTime(seconds, parts, {"main": Pass(seconds, parts, events), **loops}, "main")


def test_neighbours_too_narrow_to_be_seen_are_drawn_as_one():
    thin = [Event(CORE, 1e-4 * k, 1e-4, "attention", f"a{k}", "") for k in range(5_000)]
    wide = [Event(CORE, 0.5, 0.4, "matrix products", "b", ""), Event(CORE, 0.9, 0.1, "attention", "c", "")]
    (chart,) = page.charts(step(*thin, *wide, seconds=1.0))
    assert [len(block.events) for block in chart.rows[CORE]] == [5_000, 1, 1]
    assert [block.part for block in chart.rows[CORE]] == ["attention", "matrix products", "attention"]


def test_parts_in_turn_that_are_too_narrow_to_be_seen_are_no_more_blocks_than_pixels():
    kinds = ("attention", "attention", "other compute")
    events = [Event(CORE, 1e-4 * k, 1e-4, kinds[k % 3], f"a{k}", "") for k in range(10_000)]
    (chart,) = page.charts(step(*events, seconds=1.0))
    blocks = chart.rows[CORE]
    assert len(blocks) <= 2 * page._PLOT
    assert {block.part for block in blocks} == {"attention"}  # what most of each goes to
    assert sum(block.parts.get("other compute", 0.0) for block in blocks) == pytest.approx(0.3333, abs=1e-6)


def test_a_loop_is_a_block_of_all_its_passes_and_is_drawn_once_if_it_takes_long():
    fast = Event(CORE, 0.0, 0.015, "attention", "f", "jit(f)/jvp(layers)/while/body/attention/dot")
    slow = Event(CORE, 0.0, 0.1, "matrix products", "s", "jit(f)/transpose(jvp(layers))/while/body/ffn/dot")
    body = Pass(0.1, {"matrix products": 0.1}, (slow,))
    brief = Pass(0.015, {"attention": 0.015}, (fast,))
    loops = (Event(CORE, 0.0, 0.8, "loop", "long", "", 8), Event(CORE, 0.8, 0.015, "loop", "short", "", 1))
    time = step(*loops, seconds=1.0, long=body, short=brief)
    entry, one = page.charts(time)
    assert [dict(block.parts) for block in entry.rows[CORE]] == [
        {"matrix products": 0.8},
        {"attention": 0.015},
        {page.STILL: pytest.approx(0.185)},
    ]
    assert (one.body, one.passes, one.seconds, one.title) == ("long", 8, 0.1, "layers, backward")
    assert "8 × layers, backward" in page._figure(entry, time)


def test_what_takes_several_lanes_is_drawn_over_each_of_them():
    both = Event("axis 0 + axis 2", 0.25, 0.5, "all-gather over fsdp", "g", "")
    alone = Event("axis 1", 0.0, 0.25, "all-to-all over expert", "x", "")
    work = Event(CORE, 0.0, 1.0, "matrix products", "w", "")
    time = step(work, both, alone, seconds=1.0)
    (chart,) = page.charts(time)
    rects = [one.attrs for one in Elements(page._figure(chart, time)).all("rect")]
    gathers = [one for one in rects if one["class"] == page._class("all-gather over fsdp") + " edge"]
    assert [one["width"] for one in gathers] == ["500.00", "500.00"]
    assert len({one["y"] for one in gathers}) == 2
    assert float(gathers[0]["x"]) == page._LEFT + 250


def test_names_from_the_program_are_text(made):
    _, forecast = made
    evil = 'jit(f)/<script>alert("1")</script>&amp;/"x" onload=\'y\'/dot'
    event = Event(CORE, 0.0, 1.0, "matrix products", "<b>fusion", evil)
    gather = Event("axis 0", 0.0, 1.0, "all-gather over <i>", "g", evil)
    time = step(event, gather, seconds=1.0)
    (chart,) = page.charts(time)
    figure = Elements(page._figure(chart, time))
    assert {one.tag for one in figure.found} <= {"figure", "figcaption", "svg", "g", "title", "rect", "path", "text"}
    assert not [one for one in figure.found if "onload" in one.attrs]
    assert any('<script>"1"<' in one.text for one in figure.all("title"))
    assert any(one.text.startswith("<b>fusion") for one in figure.all("title"))
    named = Elements(page.html("<script>$style", forecast))
    assert named.all("h1")[0].text == "<script>$style"
    assert not named.all("script")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (7.54014, "7.54 s"),
        (0.5, "500 ms"),
        (1.5e-3, "1.5 ms"),
        (2e-6, "2 µs"),
        (1.5e-7, "150 ns"),
        (2.5e-10, "0.25 ns"),
        (1234.0, "1,234 s"),
    ],
)
def test_durations_are_told_in_a_unit_that_suits_them(seconds, told):
    assert page._duration(seconds) == told


def test_memory_is_a_bar_against_what_there_is(made):
    text, forecast = made
    bar = next(one for one in Elements(text).all("svg") if one.attrs.get("aria-label") == "memory of a device")
    room, *held = [float(one.attrs["width"]) for one in bar.inside]
    assert sum(held) / room == pytest.approx(forecast.memory.total / forecast.compiled.capacity, abs=1e-4)


def test_memory_that_does_not_fit_reaches_beyond_the_bar(made):
    _, forecast = made
    figures = report.memory(forecast)
    small = {**figures, "capacity": figures["total"] // 2, "fits": False}
    small["largest"] = [{**small["largest"][0], "scope": "<i>", "source": "<b>"}]
    drawn = Elements(page._memory(small))
    room, *held = [float(one.attrs["width"]) for one in drawn.all("svg")[0].inside]
    assert sum(held) == pytest.approx(2 * room, rel=1e-3)
    assert drawn.all("h2")[0].text.endswith("200%: does not fit")
    assert [one.text for one in drawn.all("td")][-2:] == ["<i>", "<b>"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--experiment=llama:tiny", "--html=x.html"], "--html goes with --mode=compile, not --mode=train"),
        ([*MODE, "--html="], "--html= is empty"),
        ([*MODE, "--search", "--html=x.html"], "--html is about one forecast and --search makes many"),
        ([*MODE, "--html"], "--html: expected one argument"),
        ([*MODE, "--html=no/such/x.html"], "cannot write --html=no/such/x.html: No such file or directory"),
        ([*MODE, "--html=."], "--html=. is not a file"),
        ([*MODE, "--html=/dev/null"], "--html=/dev/null is not a file"),
        ([*MODE[:2], "--topology=cpu-2", "--html=x.html"], "--html draws times, which are not told for cpu-2"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_compiled(
    arguments, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecasts, "forecast", lambda *_: pytest.fail("compiled"))
    assert launch.main(arguments) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_a_page_that_was_there_stays_whole_if_the_new_one_cannot_be_made(tmp_path, monkeypatch):
    file = tmp_path / "step.html"
    file.write_text("before")

    def fails(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(forecasts, "forecast", fails)
    with pytest.raises(ZeroDivisionError):
        launch.main([*MODE, f"--html={file}"])
    assert [path.name for path in tmp_path.iterdir()] == ["step.html"]
    assert file.read_text() == "before"
