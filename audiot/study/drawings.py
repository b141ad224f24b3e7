"""Figures of what was learned, as SVG inside a page, in the style of `audiot.study.figures`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from audiot.analysis.inline import EVEN, INK, MUTED, STYLE, inline
from audiot.reporting.charts import WIDTH, measure_across, short, tick_label
from audiot.study.findings import Estimate, Picture

CELL, GAP, HEADING, MARGIN = 2, 8, 16, 62  # of small tables, in the units of their SVG


@dataclass(frozen=True)
class Layers:
    """A line of a figure by layers: its name, the estimate in each layer, and the same of untrained encoders."""

    name: str
    trained: Sequence[Estimate]
    untrained: Sequence[Estimate]


def by_layer(rows: Sequence[Layers], label: str, prefix: str, texts: tuple[str, str]) -> str:
    """SVG of a figure in every layer of every row: the layer's number at the mean, a line for its interval, a ring if untrained.

    Args:
        rows: Lines in their order.
        label: What the axis shows.
        prefix: Beginning of the ids of this figure, used by no other of the page.
        texts: Title and description for those who can't see it.
    """
    with rc_context(STYLE):
        lines = sum(len(row.trained) + 1 for row in rows)
        figure = Figure(figsize=(WIDTH, max(1.4, 0.62 + 0.125 * lines)), layout="constrained")
        axis = figure.subplots()
        place, middles = 0.0, []
        for row in rows:
            middles.append(place + (len(row.trained) - 1) / 2)
            for layer, estimate in enumerate(row.trained, 1):
                if layer <= len(row.untrained):
                    mean = row.untrained[layer - 1].mean
                    axis.plot([mean], [place], "o", markersize=3, color=MUTED, fillstyle="none", markeredgewidth=0.7)
                if estimate.low is not None and estimate.high is not None:
                    axis.plot([estimate.low, estimate.high], [place, place], color=EVEN, linewidth=3, alpha=0.3)
                axis.text(estimate.mean, place, str(layer), color=EVEN, fontsize=7.5, fontweight="bold", ha="center", va="center")
                place += 1
            place += 1
        axis.set_yticks(middles, [short(row.name) for row in rows])
        axis.set_ylim(place - 1.2, -0.8)
        measure_across(axis, label)
        return inline(figure, prefix, texts)


def curves(
    panels: Sequence[tuple[str, Sequence[Estimate]]], reference: int | None, label: str, prefix: str, texts: tuple[str, str]
) -> str:
    """SVG of small curves, a panel each, beside one that all have in grey.

    Args:
        panels: Name and values of each; the values are evenly spread over what the horizontal axis shows, 0 to 100%.
        reference: Place of the one in all panels; None: there is none.
        label: What the vertical axes show.
        prefix: Beginning of the ids of this figure, used by no other of the page.
        texts: Title and description for those who can't see it.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 1.25 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axis in grid.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (name, values) in zip(grid.flat, panels, strict=False):
            if reference is not None:
                axis.plot(*_spread(panels[reference][1]), color=MUTED, linewidth=1)
            places, means = _spread(values)
            if all(each.low is not None for each in values):
                axis.fill_between(
                    places,
                    [each.low or 0 for each in values],
                    [each.high or 0 for each in values],
                    color=EVEN,
                    alpha=0.2,
                    linewidth=0,
                )
            axis.plot(places, means, color=EVEN, linewidth=1.4)
            axis.set_title(short(name), fontsize=8.5, loc="left", pad=2)
            axis.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
            axis.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
            axis.yaxis.set_major_formatter(tick_label)
            axis.grid()
        figure.supxlabel("heads removed, % (the least important first)", fontsize=8.5, color=INK)
        figure.supylabel(label, fontsize=8.5, color=INK)
        return inline(figure, prefix, texts)


def _spread(values: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    return [100 * place / max(1, len(values) - 1) for place in range(len(values))], [each.mean for each in values]


def small_tables(pictures: Sequence[Picture], prefix: str, texts: tuple[str, str]) -> str:
    """SVG of small tables of attention, a row for each layer and a column for each head: the darker, the more weight.

    Args:
        pictures: The tables, in the order of layers and then of heads.
        prefix: Beginning of the ids of this figure, used by no other of the page.
        texts: Title and description for those who can't see it.
    """
    layers = list(dict.fromkeys(picture.layer for picture in pictures))
    side = CELL * max(len(picture.rows) for picture in pictures)
    columns: dict[int, int] = dict.fromkeys(layers, 0)
    parts = []
    for picture in pictures:
        column = columns[picture.layer]
        columns[picture.layer] += 1
        x, y = MARGIN + column * (side + GAP), HEADING + layers.index(picture.layer) * (side + GAP)
        if picture.layer == layers[0]:
            parts.append(_text(x, HEADING - 5, short(picture.head, 12)))
        parts.append(f'<g transform="translate({x} {y}) scale({CELL})">{_cells(picture.rows)}</g>')
        parts.append(f'<rect x="{x}" y="{y}" width="{side}" height="{side}" style="fill:none;stroke:var(--rule)"></rect>')
    for place, layer in enumerate(layers):
        words = f"layer {layer}" if layer else "untrained"
        parts.append(_text(0, HEADING + place * (side + GAP) + side // 2 + 3, words))
    width, height = MARGIN + max(columns.values()) * (side + GAP), HEADING + len(layers) * (side + GAP)
    title, text = (escape(each) for each in texts)
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" aria-labelledby="{prefix}-title {prefix}-text">'
        f'<title id="{prefix}-title">{title}</title><desc id="{prefix}-text">{text}</desc>{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x}" y="{y}" style="font: 9px sans-serif; fill: var(--ink)">{escape(words)}</text>'


def _cells(rows: Sequence[str]) -> str:
    """Lines through neighbouring cells of one level, those of a level in one path."""
    paths: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        begin = 0
        for place in range(1, len(row) + 1):
            if place == len(row) or row[place] != row[begin]:
                paths.setdefault(row[begin], []).append(f"M{begin} {number + 0.5}h{place - begin}")
                begin = place
    return "".join(
        f'<path d="{"".join(lines)}" style="stroke:var(--ink);stroke-opacity:{int(level, 16) / 15:.2f}"></path>'
        for level, lines in sorted(paths.items())
        if level != "0"
    )
