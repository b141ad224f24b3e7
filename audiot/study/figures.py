"""Figures of a study as SVG inside a page (`audiot.analysis.inline`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from audiot.analysis.inline import BAD, BAND, EVEN, GOOD, INK, MUTED, STYLE, inline
from audiot.reporting.charts import WIDTH, measure_across, short, tick_label
from audiot.study.findings import Estimate
from audiot.study.wording import DOWN, EQUAL, OPEN, UP

LOOKS = {"": ("D", INK), UP: ("^", GOOD), DOWN: ("v", BAD), EQUAL: ("s", EVEN), OPEN: ("o", MUTED)}  # marker and colour of a sign
OBJECTIVE_MARKERS = {"o": "circle", "s": "square", "D": "diamond", "p": "pentagon", "h": "hexagon"}
CURVE_MARKERS = "osD^vph"
LEGEND_COLUMNS = 2


@dataclass(frozen=True)
class Row:
    """A line of a figure of intervals: its name, its group, what was estimated and the sign of its verdict."""

    name: str
    group: str
    estimate: Estimate
    sign: str = ""


@dataclass(frozen=True)
class Point:
    """A setting in a figure of quality against cost, with its number in the table beside it."""

    number: int
    name: str
    group: str
    cost: float
    quality: float
    on_front: bool


@dataclass(frozen=True)
class Curve:
    """A line of a figure over the levels of a factor: its name, the number of its looks, what was estimated at each level."""

    name: str
    look: int
    points: tuple[tuple[float, Estimate], ...]


def intervals(
    rows: Sequence[Row],
    label: str,
    scale: float,
    prefix: str,
    texts: tuple[str, str],
    margin: float | None = None,
    zero: bool = False,
) -> str:
    """SVG of estimates below each other: a marker at the mean, a line for the interval, a ring for each seed.

    Args:
        rows: Lines in their order; lines of a group stand together.
        label: What the axis shows.
        scale: Factor of all values before they are drawn.
        prefix: Beginning of the ids of this figure, used by no other of the page.
        texts: Title and description for those who can't see it.
        margin: Half width of the band of equivalence around zero.
        zero: Whether to draw a line at zero.
    """
    groups = list(dict.fromkeys(row.group for row in rows))
    names: list[str] = []
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.62 + 0.235 * (len(rows) + len(groups))), layout="constrained")
        axis = figure.subplots()
        if margin is not None:
            axis.axvspan(-scale * margin, scale * margin, color=BAND, linewidth=0)
        if zero:
            axis.axvline(0, color=INK, linewidth=0.8)
        for group in groups:
            names.append(short(group))
            for row in (row for row in rows if row.group == group):
                _interval(axis, row, len(names), scale)
                names.append(short(row.name))
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.3, -0.6)
        for tick, name in zip(axis.get_yticklabels(), names, strict=True):
            tick.set_fontweight("bold" if name in map(short, groups) else "normal")
        measure_across(axis, label)
        return inline(figure, prefix, texts)


def _interval(axis: Axes, row: Row, place: int, scale: float) -> None:
    marker, colour = LOOKS[row.sign]
    estimate = row.estimate
    seeds = [scale * sample.value for sample in estimate.samples]
    axis.plot(seeds, [place + 0.27] * len(seeds), "o", markersize=2.6, color=MUTED, fillstyle="none", markeredgewidth=0.7)
    if estimate.low is not None and estimate.high is not None:
        axis.plot([scale * estimate.low, scale * estimate.high], [place, place], color=colour, linewidth=1.6)
    axis.plot([scale * estimate.mean], [place], marker, markersize=5.5, color=colour, markeredgewidth=0)


def pareto(points: Sequence[Point], labels: tuple[str, str], prefix: str, texts: tuple[str, str], markers: dict[str, str]) -> str:
    """SVG of quality against cost. Settings on the front are filled, named and joined by a line; others are hollow.

    Args:
        points: The settings.
        labels: What the axes of cost and of quality show.
        prefix: Beginning of the ids of this figure, used by no other of the page.
        texts: Title and description for those who can't see it.
        markers: Marker of each group.
    """
    front = sorted((point for point in points if point.on_front), key=lambda point: (point.cost, point.quality))
    costs = [point.cost for point in points]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.95), dpi=72)
        figure.subplots_adjust(left=0.145, right=0.98, bottom=0.16, top=0.97)
        axis = figure.subplots()
        axis.plot(
            [point.cost for point in front], [point.quality for point in front], color=EVEN, linewidth=1, drawstyle="steps-post"
        )
        for point in points:
            colour, fill = (EVEN, "full") if point.on_front else (MUTED, "none")
            axis.plot([point.cost], [point.quality], markers[point.group], color=colour, fillstyle=fill, markersize=5)
        axis.margins(0.09)
        if min(costs) > 0 and max(costs) > 20 * min(costs):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_locator(NullLocator())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        axis.xaxis.set_major_formatter(tick_label)
        axis.yaxis.set_major_formatter(tick_label)
        axis.grid()
        axis.set(xlabel=labels[0], ylabel=labels[1])
        axis.autoscale_view()
        _label(axis, points, front)
        return inline(figure, prefix, texts)


def curves(
    lines: Sequence[Curve],
    labels: tuple[str, str],
    scale: float,
    prefix: str,
    texts: tuple[str, str],
    margin: float | None = None,
    zero: bool = False,
) -> str:
    """SVG of estimates over the levels of a factor, which are ratios: a line for each name, an upright one for each interval.

    Args:
        lines: The curves. Levels are positive.
        labels: What the axes of levels and of values show.
        scale: Factor of all values before they are drawn.
        prefix: Beginning of the ids of this figure, used by no other of the page.
        texts: Title and description for those who can't see it.
        margin: Half width of the band of equivalence around zero.
        zero: Whether to draw a line at zero.
    """
    levels = sorted({level for line in lines for level, _ in line.points})
    ratio = levels[-1] / levels[0]
    rows = -(-len(lines) // LEGEND_COLUMNS)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6 + 0.17 * rows), layout="constrained")
        axis = figure.subplots()
        if margin is not None:
            axis.axhspan(-scale * margin, scale * margin, color=BAND, linewidth=0)
        if zero:
            axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_xscale("log")
        for place, line in enumerate(lines):
            aside = ratio ** (0.012 * (place - (len(lines) - 1) / 2))  # so that intervals do not cover each other
            colour, dashes = (INK, EVEN, MUTED)[line.look % 3], ("-", "--", ":")[line.look // 3 % 3]
            for level, each in line.points:
                if each.low is not None and each.high is not None:
                    axis.plot([level * aside] * 2, [scale * each.low, scale * each.high], color=colour, linewidth=0.9)
            axis.plot(
                [level * aside for level, _ in line.points],
                [scale * each.mean for _, each in line.points],
                marker=CURVE_MARKERS[line.look % len(CURVE_MARKERS)],
                color=colour,
                linestyle=dashes,
                linewidth=1,
                markersize=4.5,
                label=short(line.name),
            )
        axis.xaxis.set_major_locator(FixedLocator(levels))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(tick_label)
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        axis.yaxis.set_major_formatter(tick_label)
        axis.grid(axis="y")
        axis.set(xlabel=labels[0], ylabel=labels[1])
        figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=8, handlelength=2.6)
        return inline(figure, prefix, texts)


def _label(axis: Axes, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Write names of the front and numbers of the others where they cover nothing; a label without room is left out."""
    places = {point.number: axis.transData.transform((point.cost, point.quality)) for point in points}
    frame = axis.get_window_extent()
    taken = [(x - 3.0, y - 3.0, x + 3.0, y + 3.0) for x, y in places.values()]
    corners = [places[point.number] for point in front]
    for (left, low), (right, high) in pairwise(corners):  # the line of the front
        taken += [(left, low, right, low), (right, min(low, high), right, max(low, high))]
    for point in sorted(points, key=lambda point: (not point.on_front, point.number)):
        x, y = places[point.number]
        for text in [f"{point.number} {short(point.name)}", str(point.number)][not point.on_front :]:
            width = 4.5 * len(text)  # a little more than the text needs
            for side, rise in ((1, 0), (-1, 0), (1, 8), (-1, 8), (1, -8), (-1, -8), (0, 9), (0, -9)):
                middle = x + side * (5 + width / 2)
                box = (middle - width / 2, y + rise - 4, middle + width / 2, y + rise + 4)
                inside = frame.x0 < box[0] and box[2] < frame.x1 + 5 and frame.y0 < box[1] and box[3] < frame.y1
                if inside and not any(_overlap(box, other) for other in taken):
                    break
            else:
                continue
            taken.append(box)
            align: Any = {1: "left", -1: "right", 0: "center"}[side]
            axis.annotate(
                text,
                (x + 5 * side, y + rise),
                xycoords="figure pixels",
                ha=align,
                va="center",
                fontsize=8,
                color=INK if point.on_front else MUTED,
            )
            break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
