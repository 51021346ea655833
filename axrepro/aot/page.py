"""A forecast as a page to look at: one HTML file that needs nothing else."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from string import Template
from typing import Any

from axrepro.aot import report
from axrepro.aot.forecast import Forecast
from axrepro.aot.step_time import CORE, Event, StepTime
from axrepro.aot.work import RECOMPUTED
from axrepro.core.taps import scopes
from axrepro.train.describe import readable

STILL = "core stands still"
_ELSE = "#9aa0a8"
COLOURS = {
    "matrix products": "#3f76b5",
    "attention": "#8a63b8",
    "other compute": "#7f8896",
    "all-gather": "#d5812a",
    "reduce-scatter": "#b99a17",
    "all-reduce": "#c64b3a",
    "all-to-all": "#2f9186",
    "ragged-all-to-all": "#2f9186",
    "collective-permute": "#5b9a45",
    "collective-broadcast": "#5b9a45",
    "host memory": "#b3508f",
    "copies": "#9c7a5b",
    STILL: _ELSE,
}
"""By what is done, whether it runs, is waited for or slows."""
_LOOP = "loop"
_HELD = {
    "arguments": "matrix products",
    "outputs": "all-to-all",
    "constants": "other compute",
    "temporaries": "all-gather",
}
"""Kinds of memory, and in whose colours they are drawn."""

_SHARE = 0.05  # of the step; loops that take less are not drawn
_LEFT, _PLOT, _RIGHT = 72, 1000, 18  # pixels
_CORE, _BESIDE, _GAP = 22, 12, 3  # heights of rows, and between them
_LETTER, _SEEN, _NARROW = 5.8, 6, 0.5  # pixels


@dataclass(frozen=True)
class Block:
    """A stretch of a row.

    Attributes:
      start, seconds: within the pass.   parts: what the time goes to; of a loop, all that its passes do.
      events: none where the core stands still, several where each is too short to be seen.
    """

    start: float
    seconds: float
    parts: Mapping[str, float]
    events: tuple[Event, ...] = field(repr=False)

    @property
    def end(self) -> float:
        """Within the pass."""
        return self.start + self.seconds

    @property
    def part(self) -> str:
        """What most of the time goes to."""
        return max(self.parts, key=lambda part: self.parts[part], default=STILL)

    @property
    def longest(self) -> Event:
        """Of the events."""
        return max(self.events, key=lambda event: event.seconds)


@dataclass(frozen=True)
class Chart:
    """One pass of a computation.

    Attributes:
      title: what it is.   seconds: of the pass.   passes: in a step.   body: the name of the computation.
      rows: blocks by the lanes that they take; those of the core leave nothing out.
    """

    title: str
    body: str
    seconds: float
    passes: int
    rows: Mapping[str, tuple[Block, ...]]


def charts(time: StepTime) -> list[Chart]:
    """The step, and one pass of every loop that takes a good part of it."""
    passes = {time.entry: 1}
    for body, times in _loops(time, time.entry, 1):
        passes[body] = passes.get(body, 0) + times
    found = []
    for body, times in passes.items():
        one = time.passes[body]
        if one.seconds * times < _SHARE * time.seconds:
            continue
        lanes: dict[str, list[Block]] = defaultdict(list)
        for event in sorted(one.events, key=lambda event: event.start):
            lanes[event.lane].append(Block(event.start, event.seconds, _parts(time, event), (event,)))
        lanes[CORE] = list(_with_gaps(lanes[CORE], one.seconds))
        rows = {lane: tuple(_merged(blocks, _NARROW / _PLOT * one.seconds)) for lane, blocks in lanes.items()}
        title = "the step" if body == time.entry else _loop(time, body)
        found.append(Chart(title, body, one.seconds, times, rows))
    return found


def html(name: str, forecast: Forecast) -> str:
    """The page of a forecast with times: its figures, what the step's time goes to, and what happens when."""
    if forecast.time is None:
        raise ValueError("a forecast for CPUs tells no times")
    figures, drawn = report.summary(forecast), charts(forecast.time)
    colours = (*COLOURS.values(), _ELSE)
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1) or "one device"
    kinds = sorted({*map(_kind, figures["breakdown"]), *_drawn(drawn)}, key=lambda kind: (_rank(kind), kind))
    return _PAGE.substitute(
        name=escape(name),
        about=escape(f"{figures['hardware']}: {forecast.devices} devices, mesh {mesh}"),
        style=" ".join(f".c{number} {{ fill: {colour} }}" for number, colour in enumerate(colours)),
        patterns="".join(_pattern(number, colour) for number, colour in enumerate(colours)),
        cards="".join(map(_card, _headline(figures, forecast))),
        memory=_memory(figures["memory"]),
        breakdown=_breakdown(figures["breakdown"], forecast.time.seconds),
        legend="".join(f"<span>{_swatch(kind)} {escape(kind)}</span>" for kind in kinds),
        charts="".join(_figure(chart, forecast.time) for chart in drawn),
        collectives=_collectives(figures["collectives"]),
    )


def _loops(time: StepTime, body: str, times: int) -> Iterator[tuple[str, int]]:
    """The loops of a body, and theirs, with how often they run in a step."""
    for event in time.passes[body].events:
        if event.part == _LOOP:
            yield event.name, times * event.trips
            yield from _loops(time, event.name, times * event.trips)


def _parts(time: StepTime, event: Event) -> Mapping[str, float]:
    if event.part != _LOOP:
        return {event.part: event.seconds}
    inner = time.passes[event.name].parts
    return {part: seconds * event.trips for part, seconds in inner.items() if seconds > 0}


def _with_gaps(blocks: Iterable[Block], end: float) -> Iterator[Block]:
    """The blocks, and others where there are none."""
    now = 0.0
    for block in (*blocks, Block(end, 0.0, {}, ())):
        if block.start - now > 1e-9 * end:  # more than what rounding leaves
            yield Block(now, block.start - now, {STILL: block.start - now}, ())
        if block.events:
            yield block
        now = max(now, block.end)


def _merged(blocks: Iterable[Block], narrow: float) -> Iterator[Block]:
    """Takes neighbours together that are too narrow to be told apart."""
    group: list[Block] = []
    for block in blocks:
        if group:
            seen = group[-1].end - group[0].start < narrow
            thin = max(block.seconds, group[-1].seconds, block.start - group[-1].end) < narrow
            if not (thin and (seen or block.part == group[0].part)):
                yield _together(group)
                group = []
        group.append(block)
    if group:
        yield _together(group)


def _together(group: Sequence[Block]) -> Block:
    parts: dict[str, float] = defaultdict(float)
    for block in group:
        for part, seconds in block.parts.items():
            parts[part] += seconds
    start = group[0].start
    return Block(start, group[-1].end - start, dict(parts), tuple(event for block in group for event in block.events))


def _loop(time: StepTime, body: str) -> str:
    """What a loop is about: the scope in which it spends most, and whether it goes backward."""
    spent: dict[str, float] = defaultdict(float)
    backward = 0.0
    for event in time.passes[body].events:
        if event.lane == CORE and event.part != _LOOP and event.op_name:
            spent[scopes(event.op_name).split("/")[0]] += event.seconds
            backward += event.seconds * _is_backward(event.op_name)
    inner = [_loop(time, event.name) for event in time.passes[body].events if event.part == _LOOP]
    scope = max(spent, key=lambda key: spent[key], default="") or next(iter(inner), "a loop")
    return f"{scope}, backward" if backward > sum(spent.values()) / 4 else scope


def _is_backward(op_name: str) -> bool:
    return "transpose(" in op_name


def _kind(part: str) -> str:
    """ "waiting: all-gather over fsdp" is an all-gather."""
    return part.removeprefix("waiting: ").removeprefix("slowed by: ").split(" over ")[0]


def _rank(kind: str) -> int:
    return list(COLOURS).index(kind) if kind in COLOURS else len(COLOURS)


def _drawn(drawn: Iterable[Chart]) -> Iterator[str]:
    for chart in drawn:
        for blocks in chart.rows.values():
            yield from (_kind(part) for block in blocks for part in block.parts)


def _class(part: str) -> str:
    """The fill of a part: plain, or hatched where the core waits or is slowed."""
    style = "w" if part == STILL or part.startswith("waiting: ") else "s" if part.startswith("slowed by: ") else "c"
    return f"{style}{_rank(_kind(part))}"


def _pattern(number: int, colour: str) -> str:
    lines = '<path d="M{0} 0V6" stroke="{1}" stroke-width="{2}"/>'
    both = (("w", 45, lines.format(3, colour, 3)), ("s", -45, lines.format(3, colour, 4.4)))
    return "".join(
        f'<pattern id="{style}{number}" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate({turn})"><rect width="6" height="6" fill="{colour}" fill-opacity=".25"/>{line}'
        f"</pattern>"
        for style, turn, line in both
    )


def _duration(seconds: float, digits: int = 3) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:  # what would be rounded to 1000 of the next
            return f"{seconds / size:.{digits}g} {unit}" if seconds < 999 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e9:.{digits}g} ns"


def _rect(x: float, y: float, width: float, height: float, style: str, inside: str = "") -> str:
    fill = f'fill="url(#{style})"' if style[0] in "ws" else f'class="{style}"'
    shape = f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" {fill}'
    return f"{shape}>{inside}</rect>" if inside else f"{shape}/>"


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>'


def _svg(height: float, inside: str, label: str) -> str:
    width = _LEFT + _PLOT + _RIGHT
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">{inside}</svg>'


def _figure(chart: Chart, time: StepTime) -> str:
    """A chart under its title."""
    share = chart.seconds * chart.passes / time.seconds
    title = chart.title
    if chart.body != time.entry:
        title = f"one pass of {title}: {_duration(chart.seconds)}, {chart.passes} times a step, {share:.0%} of it"
    picture = _svg(*_picture(chart, time), title)
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>"


def _picture(chart: Chart, time: StepTime) -> tuple[float, str]:
    """A row per lane over an axis of time: its height, and what is drawn."""
    lanes = sorted({lane for row in chart.rows for lane in row.split(" + ")}, key=lambda lane: (lane != CORE, lane))
    place = lambda seconds: round(_LEFT + seconds / chart.seconds * _PLOT, 2)
    spans = list(_scopes(chart.rows[CORE], _SEEN * chart.seconds / _PLOT))
    tops, bottom = {}, _CORE if spans else 0
    for lane in lanes:
        tops[lane] = bottom
        bottom += _height(lane) + _GAP
    drawn = [_axis(chart.seconds, place, bottom)]
    drawn += [_text(_LEFT - 8, top + _height(lane) / 2 + 3.5, _lane(lane), "lane") for lane, top in tops.items()]
    drawn += [_span(place(start), place(end), scope) for scope, start, end in spans]
    for row, blocks in chart.rows.items():
        for first, height in _stretches(lanes, row.split(" + ")):
            for block in blocks:
                x = place(block.start)
                drawn.append(_block(block, x, round(place(block.end) - x, 2), tops[first], height, time))
    return bottom + 20, "".join(drawn)


def _lane(name: str) -> str:
    """ "axis 0+" is one of the torus, not of the mesh: links to the next chip along it."""
    return name.replace("axis ", "links ") or "on the chip"


def _scopes(blocks: Iterable[Block], seen: float) -> Iterator[tuple[str, float, float]]:
    """(scope, start, end) of the stretches in which the core works at one part of the model, if they can be seen."""
    known = ((_scope(block), block) for block in blocks)
    for scope, stretch in groupby(((scope, block) for scope, block in known if scope), lambda item: item[0]):
        inside = [block for _, block in stretch]
        if scope != _LOOP and inside[-1].end - inside[0].start > seen:
            yield scope, inside[0].start, inside[-1].end


def _scope(block: Block) -> str:
    """ "layers/0/ffn" of "layers/0/ffn/experts/dot_general"; "" where the core stands still, or no one knows."""
    if not block.events or block.longest.part == _LOOP:
        return _LOOP if block.events else ""
    names = scopes(block.longest.op_name).split("/")[:-1]
    named = [place for place, name in enumerate(names) if not name.isdigit()]
    return "/".join(names[: named[1] + 1] if len(named) > 1 else names)


def _span(x: float, end: float, scope: str) -> str:
    """A bracket with the scope's name, or as much of it as fits."""
    names = scope.split("/")
    label = _fitting(("/".join(names[first:]) for first in range(len(names))), end - x)
    bracket = f'<path d="M{x:.2f} {_CORE - 3}v-4H{end:.2f}v4" class="scope"/>'
    written = _text((x + end) / 2, _CORE - 11, label, "tick") if label else ""
    return f"<g><title>{escape(scope)}</title>{bracket}{written}</g>"


def _height(lane: str) -> int:
    return _CORE if lane == CORE else _BESIDE


def _stretches(lanes: Sequence[str], taken: Sequence[str]) -> Iterator[tuple[str, float]]:
    """(first lane, height) of each run of rows that lie below each other."""
    for is_taken, run in groupby(lanes, lambda lane: lane in taken):
        heights = {lane: _height(lane) for lane in run}
        if is_taken:
            yield next(iter(heights)), sum(heights.values()) + _GAP * (len(heights) - 1)


def _axis(seconds: float, place: Callable[[float], float], bottom: float) -> str:
    tick = next(
        step * 10.0**power for power in range(-12, 6) for step in (1, 2, 5) if seconds / (step * 10.0**power) < 10
    )
    drawn = []
    for number in range(int(seconds / tick) + 1):
        x = place(number * tick)
        drawn.append(f'<path d="M{x:.2f} 0V{bottom + 2:.0f}" class="grid"/>')
        drawn.append(_text(x, bottom + 15, _duration(number * tick) if number else "0", "tick"))
    return "".join(drawn)


def _block(block: Block, x: float, width: float, y: float, height: float, time: StepTime) -> str:
    title = f"<title>{escape(_tooltip(block, time))}</title>"
    if len(block.events) != 1 or block.longest.part != _LOOP:
        style = _class(block.part)
        if style[0] == "c" and width > 3:
            style += " edge"
        label = _fitting(_labels(block), width)
        found = _rect(x, y, width, height, style, title)
        return found + (_text(x + width / 2, y + height / 2 + 3.5, label, "label") if label else "")
    bands, top = [], y
    for part, seconds in sorted(block.parts.items(), key=lambda item: _rank(_kind(item[0]))):
        bands.append(_rect(x, top, width, height * seconds / block.seconds, _class(part)))
        top += height * seconds / block.seconds
    event = block.longest
    times = f"{event.trips} ×"
    label = _fitting((f"{times} {_loop(time, event.name)}", times), width)
    written = _text(x + width / 2, y + height / 2 + 3.5, label, "label") if label else ""
    return f"<g>{title}{''.join(bands)}{_rect(x, y, width, height, _LOOP)}{written}</g>"


def _tooltip(block: Block, time: StepTime) -> str:
    lasts = _duration(block.seconds)
    if not block.events:
        return f"{STILL} for {lasts}: it waits, or is slowed, by what runs beside it"
    longest = block.longest
    if longest.part == _LOOP:
        each = _duration(longest.seconds / longest.trips)
        what = f"{longest.trips} × {_loop(time, longest.name)} of {each} ({longest.name})"
    else:
        scope = scopes(longest.op_name)
        stage = "recomputed" if RECOMPUTED in longest.op_name else "backward" if _is_backward(longest.op_name) else ""
        what = "\n".join(filter(None, (longest.name, f"{scope} ({stage})" if stage and scope else scope)))
    if len(block.events) == 1:
        return f"{what}\n{longest.part}, {lasts}" if longest.part != _LOOP else f"{what}\n{lasts}"
    return f"{len(block.events)} instructions, {lasts}, the longest {_duration(longest.seconds)}:\n{what}\n{block.part}"


def _labels(block: Block) -> Iterator[str]:
    """What could be written on a block, from long to short."""
    if len(block.events) == 1:
        yield from (block.part, _kind(block.part))


def _fitting(labels: Iterable[str], width: float) -> str:
    return next((label for label in labels if label and len(label) * _LETTER + 4 < width), "")


def _headline(figures: Mapping[str, Any], forecast: Forecast) -> Iterator[tuple[str, str, str]]:
    """(what, the figure, what else there is to say)"""
    unit = forecast.effect.unit
    again = figures["flops"]["recomputed"] / (figures["flops"]["executed"] or 1)
    yield "step time", _duration(figures["step_seconds"], 4), f"{again:.0%} of the arithmetic is recomputed"
    yield "MFU", f"{figures['mfu']:.1%}", f"attention as masked; {figures['mfu_full']:.1%} with the whole matrix"
    rate, day = figures[f"{unit}_per_second"], figures[f"{unit}_per_day"]
    yield f"{unit} a second", f"{rate:,.0f}", f"{day / 1e9:,.2f} billion a day"
    usd, chip = figures.get(f"usd_per_billion_{unit}"), forecast.chip
    if usd is not None and chip is not None and chip.price is not None:
        price = chip.price
        yield f"USD per billion {unit}", f"{usd:,.0f}", f"{price.usd} USD a chip-hour, {price.terms}, {price.read}"


def _card(card: tuple[str, str, str]) -> str:
    what, figure, more = map(escape, card)
    return f"<div><span>{what}</span><b>{figure}</b><small>{more}</small></div>"


def _memory(figures: Mapping[str, Any]) -> str:
    """A bar of what a device must hold, as long as its memory is large, and the largest arrays at the peak."""
    held = {kind: figures[kind] for kind in _HELD if figures[kind]}
    scale = (_LEFT + _PLOT + _RIGHT) / max(figures["capacity"], figures["total"])
    drawn, x = [_rect(0, 0, figures["capacity"] * scale, 30, "room")], 0.0
    for kind, size in held.items():
        title = f"<title>{kind}: {readable(size)}</title>"
        drawn.append(_rect(x, 0, size * scale, 30, f"c{_rank(_HELD[kind])}", title))
        x += size * scale
    legend = "".join(f"<span>{_swatch(_HELD[kind])} {kind} {readable(size)}</span>" for kind, size in held.items())
    share = f"{figures['total'] / figures['capacity']:.0%}"
    about = f"{readable(figures['total'])} of {readable(figures['capacity'])}, {share}"
    about += "" if figures["fits"] else ": does not fit"
    about += f"; {readable(figures['host'])} of the host's" if figures["host"] else ""
    rows = "".join(
        f"<tr><td>{readable(row['bytes'])}</td><td>{escape(row['shape'])}</td><td>{escape(row['kind'])}</td>"
        f"<td>{escape(row['scope'])}</td><td>{escape(row['source'])}</td></tr>"
        for row in figures["largest"]
    )
    return (
        f"<h2>Memory of a device: {about}</h2>{_svg(30, ''.join(drawn), 'memory of a device')}"
        f'<div class="legend">{legend}</div><details><summary>the largest arrays at the peak, '
        f"{readable(figures['peak'])} in use</summary><table>{rows}</table></details>"
    )


def _breakdown(parts: Mapping[str, float], seconds: float) -> str:
    """A bar, and a line for each part."""
    drawn, now = [], 0.0
    place = lambda share: round(share * (_LEFT + _PLOT + _RIGHT), 2)
    for part, took in parts.items():
        x, end = place(now / seconds), place((now + took) / seconds)
        title = f"<title>{escape(part)}\n{_duration(took)}, {took / seconds:.1%}</title>"
        drawn.append(_rect(x, 0, end - x, 30, _class(part), title))
        now += took
    rows = "".join(
        f"<tr><td>{_swatch(part)} {escape(part)}</td><td>{_duration(took)}</td><td>{_share(took / seconds)}</td></tr>"
        for part, took in parts.items()
    )
    return f"{_svg(30, ''.join(drawn), 'where the time goes')}<table>{rows}</table>"


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "&lt; 0.1%"


def _swatch(part: str) -> str:
    return f'<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true">{_rect(0, 0, 12, 12, _class(part))}</svg>'


def _collectives(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>There are none.</p>"
    lines = "".join(
        f"<tr><td>{_swatch(row['kind'])} {escape(row['kind'])}</td><td>{escape(row['axes'])}</td>"
        f"<td>{readable(int(row['sent']))}</td><td>{row['count']:,}</td><td>{row['overlapped']:.0%}</td></tr>"
        for row in rows
    )
    head = "".join(f"<th>{name}</th>" for name in ("kind", "mesh axes", "sent by a device", "times", "beside work"))
    return f"<table><tr>{head}</tr>{lines}</table>"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name: forecast</title>
<style>
:root { color-scheme: light dark; --back: #fff; --text: #1d2127; --quiet: #626a75; --line: #dfe3e8; --card: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181c; --text: #e6e9ed; --quiet: #9aa3ae; --line: #333a42; --card: #1f242a }
}
body { background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; margin: 0 auto;
  max-width: 1180px; padding: 24px }
h1 { font-size: 22px; margin: 0 } h2 { font-size: 17px; margin: 32px 0 8px } p { color: var(--quiet); margin: 4px 0 }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); margin: 16px 0 }
.cards div { background: var(--card); border-radius: 6px; padding: 12px 14px }
.cards span, .cards small { color: var(--quiet); display: block }
.cards b { font-size: 26px; font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 8px 0 }
td, th { border-bottom: 1px solid var(--line); font-weight: normal; padding: 3px 24px 3px 0; text-align: left }
th { color: var(--quiet) } td:nth-child(n+2), th:nth-child(n+2) { text-align: right }
details td:nth-child(n+2) { text-align: left } summary { color: var(--quiet); margin-top: 8px }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px } .legend span { white-space: nowrap }
figure { margin: 16px 0 } figcaption { margin-bottom: 4px }
svg { display: block; font: 10px system-ui, sans-serif; width: 100% }
svg.swatch { display: inline-block; height: 12px; vertical-align: -1px; width: 12px }
svg.patterns { height: 0; position: absolute; width: 0 }
.lane { fill: var(--text); font-size: 11px; text-anchor: end } .tick { fill: var(--quiet); text-anchor: middle }
.grid { fill: none; stroke: var(--line) } .edge { stroke: var(--back); stroke-width: .5 }
.loop { fill: none; stroke: var(--text); stroke-width: .7 }
.scope { fill: none; stroke: var(--quiet) } .room { fill: var(--line) }
.label { fill: #fff; pointer-events: none; text-anchor: middle }
$style
</style>
</head>
<body>
<svg class="patterns" aria-hidden="true"><defs>$patterns</defs></svg>
<h1>$name</h1>
<p>$about. A forecast from the compiled program; nothing has run.</p>
<div class="cards">$cards</div>
$memory
<h2>Where the step's time goes</h2>
$breakdown
<h2>What happens when</h2>
<p>Rows are a device's core and what works beside it, such as links in both directions of each axis of the torus.
A hatched core stands still: it waits for what runs beside it, or is slowed by it. A framed block is a loop, its bands
what its passes do; one pass of each follows below. Pointing at a block tells its instruction.</p>
<div class="legend">$legend</div>
$charts
<h2>Collectives</h2>
$collectives
</body>
</html>
""")
