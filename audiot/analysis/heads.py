"""Pictures of heads: what each attends to in every layer, and what is lost without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from audiot.analysis.plots import BLUE, GREY, ORANGE, _save

PANELS = {
    "distance_s": "attention distance, s",
    "diagonality": "diagonality",
    "entropy_share": "entropy, share of an even spread",
}


def plot_heads(trained: Sequence[Mapping[str, Any]], untrained: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Distance, diagonality and entropy of every head by layer, trained and untrained, with lines through the layers' means.

    Args:
        trained, untrained: Rows with ``layer``, ``head`` and the figures of `PANELS`.
        path: Path of the PNG.
    """
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for rows, colour, shift, words in ((untrained, GREY, -0.1, "untrained"), (trained, BLUE, 0.1, "trained")):
            layers = sorted({row["layer"] for row in rows})
            means = []
            for layer in layers:
                values = [row[name] for row in rows if row["layer"] == layer]
                means.append(sum(values) / len(values))
                axis.plot([layer + shift] * len(values), values, "o", color=colour, markersize=3, alpha=0.5, markeredgewidth=0)
            axis.plot([layer + shift for layer in layers], means, color=colour, linewidth=1.4, label=words)
        axis.set(xlabel="layer", title=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].legend()
    _save(figure, path)


def plot_pruning(pruning: Mapping[str, Any], label: str, path: str | Path) -> None:
    """Validation loss without more and more heads, and without each alone.

    Args:
        pruning: ``alone``, rows with ``layer``, ``head`` and ``loss``; ``order``, pairs of layer and head; ``removed``, losses
            without the first 0, 1, … heads of the order.
        label: The loss in words.
        path: Path of the PNG.
    """
    alone = {(row["layer"], row["head"]): row["loss"] for row in pruning["alone"]}
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    curve, bars = figure.subplots(1, 2)
    curve.plot(range(len(pruning["removed"])), pruning["removed"], color=BLUE, marker="o", markersize=3)
    curve.set(
        xlabel="heads removed, the least important first", ylabel=f"validation {label}", title="Without more and more heads"
    )
    curve.xaxis.set_major_locator(MaxNLocator(integer=True))
    order = [tuple(head) for head in pruning["order"]]
    bars.bar(range(len(order)), [alone[head] - pruning["removed"][0] for head in order], color=ORANGE)
    small = max(4, min(8, 220 / len(order)))
    bars.set_xticks(range(len(order)), [f"{layer}.{head}" for layer, head in order], rotation=90, fontsize=small)
    bars.set(xlabel="layer.head", ylabel="increase of the loss", title="Without one head alone")
    _save(figure, path)
