"""Pictures of a sweep: learning curves of all runs, and quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from audiot.analysis.plots import GREY, LINE_COLOURS, _save

MARKERS = "os^vDPX*"
ROWS_OF_LEGEND = 24  # settings that a legend names

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""


class Point(NamedTuple):
    """A setting in a plane of cost and quality, of which each may be of several runs.

    Args:
        setting: What sets it apart.
        cost, quality: Means over its runs.
        costs, qualities: Those of each run.
    """

    setting: str
    cost: float
    quality: float
    costs: Sequence[float]
    qualities: Sequence[float]


def plot_learning_curves(panels: Mapping[str, Sequence[tuple[str, Curve]]], title: str, path: str | Path) -> None:
    """Plot a curve of every run, in one colour for the runs of a setting.

    Args:
        panels: Name of a figure → setting and curve of each run that has it.
        title: Title of the figure.
        path: Path of the PNG.
    """
    looks = _looks([setting for runs in panels.values() for setting, _ in runs])
    figure = Figure(figsize=(5.2 * len(panels), 4.2 + 0.1 * len(looks)), layout="constrained")
    figure.suptitle(title)
    for axis, (name, runs) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for setting, (steps, values) in runs:
            axis.plot(steps, values, linewidth=1.2, markersize=3, alpha=0.8, **looks[setting])
        axis.set(xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
    _name_settings(figure, looks)
    _save(figure, path)


def plot_pareto(panels: Mapping[tuple[str, str, bool], Sequence[Point]], title: str, path: str | Path) -> None:
    """Plot quality against cost, a point for each setting and a thin one for each of its runs.

    A dashed line joins the settings that none beats at the same or a lower cost (the Pareto front).

    Args:
        panels: Name of the cost, name of the quality, whether more of it is better → the settings.
        title: Title of the figure.
        path: Path of the PNG.
    """
    looks = _looks([point.setting for points in panels.values() for point in points])
    columns = len({cost for cost, _, _ in panels})
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * rows + 0.1 * len(looks)), layout="constrained")
    figure.suptitle(f"{title}; dashed: what none beats at its cost")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, ((cost, quality, higher_is_better), points) in zip(axes, panels.items(), strict=False):
        front = pareto_front(points, higher_is_better)
        axis.plot([point.cost for point in front], [point.quality for point in front], "--", color=GREY, linewidth=1)
        for point in points:
            look = looks[point.setting]
            axis.plot(
                point.costs, point.qualities, color=look["color"], marker=look["marker"], markersize=3, linestyle="", alpha=0.5
            )
            axis.plot(point.cost, point.quality, color=look["color"], marker=look["marker"], markersize=8)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set(xlabel=cost, ylabel=f"{quality} ({'higher' if higher_is_better else 'lower'} is better)")
        axis.grid(alpha=0.3)
    for axis in figure.axes[len(panels) :]:  # a quality that some runs lack differs in fewer costs
        axis.set_visible(False)
    _name_settings(figure, looks)
    _save(figure, path)


def pareto_front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The settings that none beats at the same or a lower cost, from the cheapest on."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -sign * point.quality)):
        if not front or sign * point.quality > sign * front[-1].quality:
            front.append(point)
    return front


def _looks(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Setting → its colour and marker."""
    number = len(LINE_COLOURS)
    return {
        setting: {"color": LINE_COLOURS[place % number], "marker": MARKERS[place // number % len(MARKERS)]}
        for place, setting in enumerate(dict.fromkeys(settings))
    }


def _name_settings(figure: Figure, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """A legend below the panels."""
    named = list(looks)[:ROWS_OF_LEGEND]
    axis = figure.axes[0]
    handles = [axis.plot([], [], **looks[setting])[0] for setting in named]
    if len(looks) > len(named):
        handles.append(axis.plot([], [], linestyle="")[0])
        named.append(f"and {len(looks) - len(named)} more, see runs.csv")
    longest = max(map(len, named))
    columns = max(1, int(figure.get_figwidth() * 13 // (longest + 8)))
    figure.legend(handles, named, loc="outside lower center", ncols=min(columns, len(named)), fontsize=8, frameon=False)
