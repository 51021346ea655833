"""The figures of a report: PNG files in memory, each from nothing but the results."""

import io
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from axrepro.study.bootstrap import Estimate
from axrepro.study.measured import step_ratio
from axrepro.study.results import SCORES, Facts, Results, Row
from axrepro.study.wording import (
    MEASURE_WORDS,
    RULE_WORDS,
    SCORE_FORMS,
    SCORE_WORDS,
    Form,
    clock,
    measured,
    placed,
    without,
)

_DENSE = "#000000"
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#332288", "#8C6D31"]
"""The first seven are of Okabe and Ito, for the colour-blind."""
_OTHER = "#B4B4B4"
_LINES = {"wall_clock": "-", "step_time": "-.", "tokens": "--", "flops": ":"}
_VERDICTS = {"held": "#00684C", "did not hold": "#A34700", "open": "#444444"}
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "legend.fontsize": 9.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # labels are the user's
}


def draw(results: Results) -> dict[str, bytes]:
    """By name of the file; those that would be empty are left out."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        drawn = {name: figure(results) for name, figure in FIGURES.items()}
        return {name: _png(figure) for name, figure in drawn.items() if figure is not None}


def _png(figure) -> bytes:
    """The figure in 256 colours, a third of the size."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    Image.open(drawn).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return small.getvalue()


def _grid(rows: int, columns: int, width: float, height: float, **how):
    """A figure and its axes [rows, columns] of so many inches; without pyplot, which would choose a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def _wrapped(number: int, columns: int, width: float, height: float):
    """A figure with so many panels, row by row."""
    columns = min(columns, number)
    figure, grid = _grid(-(-number // columns), columns, width if columns > 1 else 1.5 * width, height)
    for axes in grid.flat[number:]:
        axes.axis("off")
    return figure, list(grid.flat[:number])


def _legend(figure, axes: Iterable) -> None:
    """One legend below all panels, for which the figure grows."""
    handles: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    longest = max(map(len, handles), default=0)
    columns = max(1, min(4, int(figure.get_figwidth() / (0.7 + 0.078 * longest))))  # inches, at this size of letters
    figure.set_figheight(figure.get_figheight() + 0.15 + 0.22 * -(-len(handles) // columns))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)


def _bars(estimates: Sequence[Estimate], scale: float = 1.0) -> np.ndarray:
    """[2, N] lengths of the bars of intervals; 0 where they are unknown."""
    sides = np.array([(e.value - e.low, e.high - e.value) for e in estimates]).T
    return np.where(np.isfinite(sides), np.maximum(sides, 0), 0) * scale


def _label(row: Row) -> str:
    """Of lines and marks: the same at all rungs, where labels differ in the rung alone."""
    return "dense" if row.dense else without(row.rung, row.facts.arm.label)


def _colours(results: Results) -> dict[str, str]:
    """By label."""
    labels = dict.fromkeys(_label(row) for row in results.rows if not row.dense)
    return {"dense": _DENSE} | {label: _COLOURS[place % len(_COLOURS)] for place, label in enumerate(labels)}


def _runs(rows: Iterable[Row]) -> list[Row]:
    """The rows, dense ones once: these are the same under every rule."""
    return list({(row.rung, row.dense or (row.facts.arm.label, row.rule)): row for row in rows}.values())


def _speed_accuracy(results: Results):
    """Scores against step time: a row per rule, a column per score."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in results.rows if row.scores]
    rules = [rule for rule in RULE_WORDS if any(row.rule == rule for row in rows)]
    scores = [score for score in SCORES if any(score in row.scores for row in rows)]
    if not scores:
        return None
    colours = _colours(results)
    times = [row.facts.seconds.value for row in rows]
    unit = clock(min(times))
    spread = max(max(times) / min(times), 1.5)
    left = min(times) / spread ** (0.05 + 0.03 * max(len(row.rung) for row in rows))  # room for the names of rungs
    figure, grid = _grid(len(rules), len(scores), 4.2, 2.7, sharex=True, sharey="col")
    for (down, rule), (across, score) in product(enumerate(rules), enumerate(scores)):
        axes, form, less = grid[down, across], SCORE_FORMS[score], score == "bits_per_byte"
        lines: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if row.rule == rule and score in row.scores:
                lines[_label(row)].append(row)
        for label, members in lines.items():
            x = [row.facts.seconds.value * unit.scale for row in members]
            y = [row.scores[score].value * form.scale for row in members]
            style = {"fmt": "o", "color": colours[label], "markersize": 6, "capsize": 3, "zorder": 3}
            if members[0].dense:
                style |= {"fmt": "D-", "markersize": 5, "zorder": 2}
                for place, row in zip(zip(x, y, strict=True), members, strict=True):
                    side = {"xytext": (-6, -6 if less else 6), "ha": "right", "va": "top" if less else "bottom"}
                    axes.annotate(row.rung, place, textcoords="offset points", **side)
            axes.errorbar(x, y, _bars([row.scores[score] for row in members], form.scale), label=label, **style)
        axes.set_xscale("log")
        axes.set_xlim(left * unit.scale, max(times) * spread**0.1 * unit.scale)
        axes.margins(y=0.12)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{RULE_WORDS[rule]} ({'less' if less else 'more'} is better)")
        axes.set_ylabel(_with_unit(SCORE_WORDS[score], form))
        if down == len(rules) - 1:
            axes.set_xlabel(f"measured step time ({unit.unit})")
    _legend(figure, grid.flat)
    return figure


def _with_unit(words: str, form: Form) -> str:
    return f"{words} ({form.unit})" if form.unit else words


def _band(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Hours [N] and losses [seeds, N], as far as all seeds have come."""
    found = [np.array(curve, float).T for curve in curves]
    hours = found[0][0]
    hours = hours[(hours >= max(x[0] for x, _ in found)) & (hours <= min(x[-1] for x, _ in found))]
    return hours, np.stack([np.interp(hours, x, y) for x, y in found])


def _loss_wall_clock(results: Results):
    """Training loss against hours."""
    rows = [row for row in _runs(results.rows) if row.curves and all(row.curves)]
    rungs = list(dict.fromkeys(row.rung for row in rows))
    if not rungs:
        return None
    colours = _colours(results)
    figure, panels = _wrapped(len(rungs), 3, 4.4, 4.8)
    for axes, rung in zip(panels, rungs, strict=True):
        lines = [(row, *_band(row.curves)) for row in rows if row.rung == rung]
        longest = max(hours[-1] for _, hours, _ in lines)
        unit = clock(3600 * longest)
        shown = []
        for row, hours, losses in lines:
            x, mean = hours * 3600 * unit.scale, losses.mean(0)
            colour = colours[_label(row)]
            label = _label(row) if row.dense else f"{_label(row)}, {RULE_WORDS[row.rule]}"
            style, width = ("-", 2.2) if row.dense else (_LINES[row.rule], 1.6)
            axes.plot(x, mean, style, color=colour, linewidth=width, label=label)
            axes.fill_between(x, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
            shown.append((losses.min(), np.interp(0.15 * longest, hours, mean)))
        low, high = min(low for low, _ in shown), max(high for _, high in shown)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        axes.set(xlabel=f"{unit.unit} at the measured step time", ylabel="training loss of text (nats)", title=rung)
    _legend(figure, panels)
    return figure


def _shown_parts(all_parts: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """Colours of the parts that take most time."""
    sums: dict[str, float] = defaultdict(float)
    for parts in all_parts:
        whole = sum(parts.values()) or 1.0
        for part, seconds in parts.items():
            sums[part] += seconds / whole
    kept = sorted((part for part in sums if part != "other"), key=lambda part: -sums[part])
    return dict(zip(kept, _COLOURS, strict=False))


def _stack(axes, bars: Sequence[tuple[str, Mapping[str, float], float]], colours: Mapping[str, str]) -> None:
    """Bars of (label, parts, seconds of the whole) from the top; the whole is marked."""
    longest = max(max(sum(parts.values()), whole) for _, parts, whole in bars)
    unit = clock(longest)
    for place, (_, parts, whole) in enumerate(bars):
        left = 0.0
        lengths = {part: parts.get(part, 0.0) for part in colours}
        lengths["other"] = sum(parts.values()) - sum(lengths.values())
        for part, seconds in lengths.items():
            if seconds > 1e-9 * whole:
                colour = colours.get(part, _OTHER)
                axes.barh(place, seconds * unit.scale, left=left, color=colour, height=0.7, label=part, linewidth=0)
                left += seconds * unit.scale
        if whole:
            ends = [place - 0.42, place + 0.42]
            axes.plot([whole * unit.scale] * 2, ends, color=_DENSE, linewidth=2, label="whole step")
        else:
            axes.text(0, place, " no forecast", va="center")
    axes.set_yticks(range(len(bars)), [textwrap.fill(label, 24) for label, _, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.03 * longest * unit.scale or 1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{unit.unit} per step")


def _step_time_breakdown(results: Results):
    """What measured steps spend their time on."""
    groups: dict[str, dict[str, Facts]] = defaultdict(dict)
    for row in results.rows:
        groups[row.rung].setdefault(row.facts.arm.label, row.facts)
    if not groups:
        groups[""] = {facts.arm.label: facts for facts in results.facts}
    bars = {
        name: [(label, facts.parts, facts.seconds.value) for label, facts in arms.items() if facts.parts]
        for name, arms in groups.items()
    }
    return _breakdown([[(name, found)] for name, found in bars.items() if found])


def _forecast_breakdown(results: Results):
    """What forecast steps of the ladder spend their time on: a row per rung, a column per slice. Collectives of a kind
    are taken together, over whichever axes they are.
    """
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    slices = dict.fromkeys(one.slice for one in results.predicted)
    for one in (one for one in results.predicted if one.rung):
        parts: dict[str, float] = defaultdict(float)
        for part, seconds in one.parts.items():
            parts[part.split(" over ")[0]] += seconds
        found[one.where][one.slice].append((one.arm.label, parts, one.seconds))
    return _breakdown(
        [[(f"{where}, forecast for {name}", bars[name]) for name in slices] for where, bars in found.items()]
    )


def _breakdown(panels: Sequence[Sequence[tuple[str, Sequence[tuple[str, Mapping[str, float], float]]]]]):
    """Rows of panels, each a title and its bars."""
    colours = _shown_parts(parts for row in panels for _, bars in row for _, parts, _ in bars)
    if not colours:
        return None
    highest = [max(len(bars) for _, bars in row) for row in panels]
    each = 1.0 + 0.42 * sum(highest) / len(highest)
    figure, grid = _grid(
        len(panels), len(panels[0]), 8.2 if len(panels[0]) == 1 else 5.6, each, gridspec_kw={"height_ratios": highest}
    )
    for axes, (title, bars) in zip(grid.flat, (panel for row in panels for panel in row), strict=True):
        if bars:
            axes.set_title(title)
            _stack(axes, bars, colours)
        else:
            axes.axis("off")
    _legend(figure, grid.flat)
    return figure


def _increase_over_dense(results: Results):
    """Increase of the step time along each series, measured and forecast."""
    facts = {one.arm.key: one for one in results.facts}
    lines: dict[str, dict[str, list[tuple[float, Estimate]]]] = defaultdict(lambda: defaultdict(list))
    for series in dict.fromkeys(finding.series for finding in results.findings):
        dense = facts.get(series.dense.key) if series.dense else None
        for arm in series.arms:
            found = facts.get(arm.key)
            if dense and found and arm.x is not None:
                ratio = step_ratio(found, dense)
                increase = Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1)
                lines[series.name]["measured here"].append((arm.x, increase))
    for one in results.predicted:
        if one.arm.x is not None and one.increase is not None and not one.error:
            increase = Estimate(one.increase, one.increase, one.increase)
            lines[one.where][f"forecast for {one.slice}"].append((one.arm.x, increase))
    if not lines:
        return None
    names = sorted({name for panel in lines.values() for name in panel if name != "measured here"})
    colours = {name: _COLOURS[1 + place % (len(_COLOURS) - 1)] for place, name in enumerate(names)}
    figure, panels = _wrapped(len(lines), 3, 4.2, 3.7)
    for axes, (series, panel) in zip(panels, lines.items(), strict=True):
        for name, points in panel.items():
            x, values = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            y = [100 * value.value for value in values]
            if name in colours:
                style = {"fmt": "s--", "color": colours[name], "markerfacecolor": "white"}
                axes.errorbar(x, y, label=name, markersize=6, linewidth=1.4, **style)
            else:
                axes.errorbar(x, y, _bars(values, 100), fmt="o-", color=_COLOURS[0], capsize=3, linewidth=2, label=name)
        ticks = sorted({x for points in panel.values() for x, _ in points})
        if ticks[0] > 0 and ticks[-1] / ticks[0] >= 4:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.08)
        axes.axhline(0, color=_DENSE, linewidth=1)
        axes.set(xlabel=series, ylabel="step time over dense (%)")
    _legend(figure, panels)
    return figure


def _expert_load(results: Results):
    """Sorted shares of choices over an equal share."""
    rows = list({(row.rung, row.facts.arm.label): row for row in reversed(results.rows) if row.loads}.values())[::-1]
    if not rows:
        return None
    import matplotlib

    arms = max(Counter(row.rung for row in rows).values())
    figure, panels = _wrapped(len(rows), arms if 1 < arms < 5 else 3, 4.0, 3.2)
    for axes, row in zip(panels, rows, strict=True):
        for layer, shares in enumerate(row.loads):
            colour = matplotlib.colormaps["viridis"](0.9 * layer / max(1, len(row.loads) - 1))
            relative = np.sort(shares)[::-1] * len(shares)
            style = {"marker": "o", "markersize": 4} if len(shares) <= 32 else {}
            axes.plot(range(1, len(shares) + 1), relative, color=colour, label=f"routed layer {layer + 1}", **style)
        axes.axhline(1, color="black", linewidth=1, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="expert, most chosen first", ylabel="choices / equal share")
        axes.set_title(placed(row.rung, row.facts.arm.label))
    _legend(figure, panels)
    return figure


def _ablations(results: Results):
    """What was expected of each series, and what was found."""
    if not results.findings:
        return None
    figure, panels = _wrapped(len(results.findings), 3, 4.2, 3.5)
    for axes, finding in zip(panels, results.findings, strict=True):
        measure, arms = finding.expectation.measure, finding.series.arms
        form = measured(measure, finding.values[0].value)
        places = range(len(arms))
        colour = _VERDICTS[finding.verdict]
        values = [value.value * form.scale for value in finding.values]
        axes.errorbar(places, values, _bars(finding.values, form.scale), fmt="o-", color=colour, capsize=4)
        names = [arm.label if arm.x is None else f"{arm.x:g}" for arm in arms]
        axes.set_xticks(places, [textwrap.fill(name, max(8, 36 // len(arms))) for name in names])
        axes.margins(x=0.1, y=0.15)
        axes.ticklabel_format(axis="y", useOffset=False)
        title = f"expected: {finding.expectation.direction}; {finding.verdict}"
        axes.set_title(f"{_with_unit(MEASURE_WORDS[measure], form)}\n{title}", color=colour)
        axes.set_xlabel(finding.series.name)
    return figure


FIGURES: Mapping[str, Callable[[Results], Any]] = {
    "speed_accuracy.png": _speed_accuracy,
    "loss_wall_clock.png": _loss_wall_clock,
    "step_time_breakdown.png": _step_time_breakdown,
    "expert_load.png": _expert_load,
    "ablations.png": _ablations,
    "increase_over_dense.png": _increase_over_dense,
    "forecast_breakdown.png": _forecast_breakdown,
}
"""All that there can be, in the order of the report."""
