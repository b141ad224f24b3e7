"""Figures that pages share, as SVG inside a page (`audiot.analysis.inline`), and the names and numbers in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from audiot.analysis.inline import EVEN, INK, MUTED, STYLE, inline
from audiot.reporting.elements import compact

WIDTH = 4.3  # inches
LOOKS = ((EVEN, "-", "o"), (MUTED, "--", "s"), (INK, ":", "D"))  # colour, dashes and marker of each line
MARKED = 30  # values of a line from which on they have no markers


def short(name: str, longest: int = 26) -> str:
    """A name that fits into a figure, without characters that XML can't hold. The tables have all of it."""
    name = "".join(each if each.isprintable() else " " for each in name)
    return name if len(name) <= longest else name[: longest - 1] + "…"


def measure_across(axis: Axes, label: str) -> None:
    """Give an axis of rows below each other what it measures from left to right."""
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axis.xaxis.set_major_formatter(tick_label)
    axis.grid(axis="x")
    axis.set_xlabel(label)


def tick_label(value: float, _: float) -> str:
    """The number at a mark of an axis."""
    return compact(value, ".10g").replace("-", "−")


def matrix(
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    prefix: str,
    texts: tuple[str, str],
    least: float | None = None,
) -> str:
    """SVG of a square matrix of shares: the darker, the higher among them, with two digits each.

    Args:
        names: Names of the rows, which are those of the columns too.
        values: Shares from 0 to 1, row by row; None leaves a cell empty.
        prefix: Beginning of the ids of this figure, used by no other of the page.
        texts: Title and description for those who can't see it.
        least: Share that is lightest; None: the least of them.
    """
    size = len(names)
    if least is None:
        least = min((value for line in values for value in line if value is not None), default=0.0)
    with rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
        axis = figure.subplots()
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value is None:
                    continue
                shade = 0.05 + 0.5 * (value - least) / max(1 - least, 1e-6)
                square = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=EVEN, alpha=min(1.0, shade), linewidth=0)
                axis.add_patch(square)
                digits = f"{value:.2f}".removeprefix("0")
                axis.text(column, row, digits, color=INK, fontsize=min(8, 60 / size), ha="center", va="center")
        axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
        axis.set_xticks(range(size), [short(name, 20) for name in names], rotation=90)
        axis.set_yticks(range(size), [short(name, 20) for name in names])
        axis.tick_params(length=0)
        return inline(figure, prefix, texts)


def over_steps(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    prefix: str,
    texts: tuple[str, str],
    chosen: float | None = None,
) -> str:
    """SVG of figures over the steps of a training.

    Args:
        lines: Name of each line → its steps and values.
        label: What the vertical axis shows.
        prefix: Beginning of the ids of this figure, used by no other of the page.
        texts: Title and description for those who can't see it.
        chosen: Step at which an upright line stands; None: there is none.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4 + (0.2 if len(lines) > 1 else 0)), layout="constrained")
        axis = figure.subplots()
        if chosen is not None:
            axis.axvline(chosen, color=MUTED, linewidth=0.8, linestyle=":")
        for (name, points), (colour, dashes, marker) in zip(lines.items(), LOOKS, strict=False):
            xs, ys = [step for step, _ in points], [value for _, value in points]
            axis.plot(
                xs,
                ys,
                dashes,
                marker=marker if len(xs) < 30 else "",
                markersize=4,
                color=colour,
                linewidth=1.2,
                label=short(name),
            )
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        axis.xaxis.set_major_formatter(tick_label)
        axis.yaxis.set_major_formatter(tick_label)
        axis.grid(axis="y")
        axis.set(xlabel="step", ylabel=label)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=len(lines), frameon=False, fontsize=8, handlelength=2.6)
        return inline(figure, prefix, texts)
