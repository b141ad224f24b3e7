"""Plots of runs, each written as a PNG."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator
from torch import Tensor

from audiot.analysis.spectrogram import draw_spectrogram, span_edges
from audiot.base.files import replacing
from audiot.base.framing import SpectrogramScale

BLUE, ORANGE, GREY, GREEN = "#2266aa", "#dd7722", "#888888", "#338855"
LINE_COLOURS = (BLUE, ORANGE, GREEN, "#aa3377", "#66bbdd", "#bbaa22", "#884400", "#7755bb")


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def plot_reconstruction(view: Mapping[str, Tensor], scale: SpectrogramScale, title: str, path: str | Path) -> None:
    """Plot an utterance four times: true frames, corrupted frames, the encoder's reconstruction and the interpolation.

    Args:
        view: One utterance as the objective's ``view`` returns it. Reconstructions are shown in the masked frames,
            true frames elsewhere.
        scale: Where frames and channels lie.
        title: Title of the figure.
        path: Path of the PNG.
    """
    length = int(view["lengths"][0])
    masked = view["masked"][0, :length].cpu().numpy()
    target = view["target"][0, :length].float().cpu().numpy()
    rows = {"target": target, "corrupted: what the encoder sees": view["corrupted"][0, :length].float().cpu().numpy()}
    for name, label in (("prediction", "encoder"), ("interpolation", "interpolation")):
        guess = view[name][0, :length].float().cpu().numpy()
        error = np.abs(guess - target)[masked].mean() if masked.any() else float("nan")
        rows[f"{label}, L1 {error:.3f} in the masked frames"] = np.where(masked[:, None], guess, target)
    low, high = np.percentile(target, [2, 99.5])
    figure = Figure(figsize=(10, 8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), 1, sharex=True)
    for axis, (label, frames) in zip(axes, rows.items(), strict=True):
        draw_spectrogram(axis, frames, scale, (low, high))
        for edge in span_edges(masked, scale):
            axis.axvline(edge, color="cyan", linewidth=0.8)
        axis.set_title(label, fontsize=10, loc="left")
    axes[-1].set_xlabel("seconds (masked spans between cyan lines)")
    _save(figure, path)


class Loss(Protocol):
    """What an objective says of its loss."""

    figure: ClassVar[str]
    label: ClassVar[str]
    baselines: ClassVar[Mapping[str, str]]


def plot_codes(view: Mapping[str, Tensor], scale: SpectrogramScale, title: str, path: str | Path) -> None:
    """Plot an utterance's spectrogram, the codes of the first codebook and what was predicted at masked tokens.

    Args:
        view: One utterance as the objective's ``view`` returns it: ``target``, ``masked``, ``lengths``, ``codes``, ``predicted``.
        scale: Where frames and channels lie.
        title: Title of the figure.
        path: Path of the PNG.
    """
    length = int(view["lengths"][0])
    codes, predicted = (view[name][0, :, 0].cpu().numpy() for name in ("codes", "predicted"))
    stack = scale.stack
    num_tokens = length // stack
    codes, predicted = codes[:num_tokens], predicted[:num_tokens]
    masked = view["masked"][0, :length:stack].cpu().numpy()
    right = masked & (codes == predicted)
    # Neighbouring numbers mean nothing, so they get distant colours.
    colours = np.stack([np.modf(codes * 0.618034)[0], np.modf(predicted * 0.618034)[0]])
    shown = hsv_to_rgb(np.stack([colours, np.full_like(colours, 0.65), np.full_like(colours, 0.9)], axis=-1))
    shown[1, ~masked] = 1.0
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    figure.suptitle(title)
    spectrogram, true, guess = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    draw_spectrogram(spectrogram, view["target"][0, : num_tokens * stack].float().cpu().numpy(), scale)
    spectrogram.set_title("features; the encoder does not see what lies between cyan lines", fontsize=10, loc="left")
    for edge in span_edges(masked.repeat(stack), scale):
        spectrogram.axvline(edge, color="cyan", linewidth=0.8)
    share = f"{right.sum() / max(1, masked.sum()):.0%} of {masked.sum()} masked tokens right"
    edges = scale.token_edges(num_tokens)
    for axis, row, label in ((true, 0, "codes"), (guess, 1, f"predicted where masked, {share}; dots: right")):
        axis.imshow(shown[row][None], aspect="auto", interpolation="nearest", extent=(edges[0], edges[-1], 0, 1))
        axis.set_yticks([])
        axis.set_title(label, fontsize=10, loc="left")
    guess.plot((edges[:-1] + edges[1:])[right] / 2, np.full(right.sum(), 0.5), "k.", markersize=3)
    guess.set_xlabel("seconds")
    _save(figure, path)


def read_metrics(path: str | Path) -> list[dict[str, str]]:
    """Rows of ``metrics.csv``."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curve_of(rows: Sequence[Mapping[str, str]], name: str, path: str | Path) -> tuple[list[int], list[float]]:
    """Steps and values of a column of ``metrics.csv``.

    Raises:
        ValueError: a row has no step, or no number.
    """
    try:
        found = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: a row of {name} has no step or no number: {error}") from error
    return [step for step, _ in found], [value for _, value in found]


def plot_training(metrics_csv: str | Path, path: str | Path, objective: Loss) -> None:
    """Plot ``metrics.csv``: training and validation loss, trivial predictions, throughput, learning rate and gradient norm."""
    rows = read_metrics(metrics_csv)

    def series(name: str) -> tuple[list[int], list[float]]:
        return curve_of(rows, name, metrics_csv)

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, side = figure.subplots(1, 2, width_ratios=[3, 2])
    loss.plot(*series(f"pretrain/train_{objective.figure}"), color=GREY, linewidth=0.6, alpha=0.7, label="training batch")
    loss.plot(*series(f"pretrain/val_{objective.figure}"), color=BLUE, marker="o", markersize=3, label="validation")
    for (name, label), style in zip(objective.baselines.items(), (":", "--"), strict=False):
        _, values = series(f"pretrain/{name}")
        if values:
            loss.axhline(values[-1], color=ORANGE, linestyle=style, label=f"{label}: {values[-1]:.3f}")
    loss.set(xlabel="step", ylabel=objective.label, title="Pre-training")
    loss.legend()
    side.plot(*series("frames_per_s"), color=GREEN)
    side.set(xlabel="step", title="Throughput")
    side.set_ylabel("frames/s", color=GREEN)
    side.set_ylim(bottom=0)
    norm = side.twinx()
    norm.plot(*series("pretrain/gradient_norm"), color=GREY, linewidth=0.6)
    norm.set_ylabel("gradient norm", color=GREY)
    norm.set_ylim(bottom=0)
    _save(figure, path)


class Size(Protocol):
    """A batch that was tried: seconds of audio, frames per second (None: out of memory), GiB at the peak (None: unknown)."""

    @property
    def batch_s(self) -> float: ...  # noqa: D102

    @property
    def frames_per_s(self) -> float | None: ...  # noqa: D102

    @property
    def peak_gib(self) -> float | None: ...  # noqa: D102


def plot_tuning(
    sizes: Sequence[Size],
    batch_s: float | None,
    tests: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    suggested: Mapping[str, float],
    lr: float | None,
    path: str | Path,
) -> None:
    """Plot throughput and memory against the batch, and the loss of range tests against the learning rate.

    Args:
        sizes: Batches that were tried; none: no panel.
        batch_s: The batch that is recommended; None: none is.
        tests: Name of a range test → rates, losses, smoothed losses; none: no panel.
        suggested: Name of a range test → the rate that it suggests, if it does.
        lr: The rate that is recommended; None: none is.
        path: Path of the PNG.
    """
    figure = Figure(figsize=(5.6 * (bool(sizes) + bool(tests)), 4.2), layout="constrained")
    axes = iter(figure.subplots(1, bool(sizes) + bool(tests), squeeze=False)[0])
    if sizes:
        axis = next(axes)
        speeds = [(size.batch_s, size.frames_per_s) for size in sizes if size.frames_per_s is not None]
        axis.plot(*zip(*speeds, strict=True), color=GREEN, marker="o", markersize=4)
        axis.set(xlabel="seconds of audio per batch", title="Throughput", xscale="log")
        axis.set_ylabel("frames/s", color=GREEN)
        axis.set_ylim(bottom=0)
        if batch_s is not None:
            axis.axvline(batch_s, color=BLUE, linestyle="--", label=f"data.batch_s={batch_s:g}")
        for number, size in enumerate(size for size in sizes if size.frames_per_s is None):
            axis.axvline(size.batch_s, color=ORANGE, linestyle=":", label=None if number else "out of memory")
        if any(size.peak_gib is not None for size in sizes):
            memory = axis.twinx()
            known = [
                (size.batch_s, size.peak_gib) for size in sizes if size.peak_gib is not None and size.frames_per_s is not None
            ]
            memory.plot(*zip(*known, strict=True), color=GREY, marker="s", markersize=3)
            memory.set_ylabel("GiB at the peak", color=GREY)
            memory.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    if tests:
        axis = next(axes)
        for (name, (rates, losses, smooth)), colour in zip(tests.items(), cycle(LINE_COLOURS)):
            axis.plot(rates, losses, color=colour, linewidth=0.6, alpha=0.35)
            axis.plot(rates[: len(smooth)], smooth, color=colour, linewidth=1.3, label=name)
            if name in suggested:
                at = rates.index(suggested[name])
                axis.plot(rates[at], smooth[at], color=colour, marker="o", markersize=7)
        shown = [value for _, _, smooth in tests.values() for value in smooth]
        low, first = min(shown), max(smooth[0] for _, _, smooth in tests.values())
        axis.set_ylim(low - 0.1 * (first - low), first + 0.5 * (first - low) or None)  # an explosion would hide all else
        axis.set(xlabel="learning rate", ylabel="loss", title="Range test, smoothed; dots: steepest", xscale="log")
        if lr is not None:
            axis.axvline(lr, color="black", linestyle="--", linewidth=1, label=f"optimizer.lr={lr:g}")
        axis.legend(fontsize=8)
    _save(figure, path)


def plot_probes(summary: Mapping[str, Any], path: str | Path) -> None:
    """Bars of test accuracy with 95% intervals, grouped by task.

    Args:
        summary: Accuracies by name, ``probe/TASK/UPSTREAM`` or ``finetune/TASK/UPSTREAM``, among other entries. ``intervals`` has
            low and high end of those that have an interval.
        path: Path of the PNG.
    """
    intervals: dict[str, dict[str, list[float]]] = {}
    groups: dict[str, dict[str, float]] = {}
    for name, value in summary.items():
        if name.startswith(("probe/", "finetune/")):
            kind, task, upstream = name.split("/")
            label = f"{task}\n({'frozen' if kind == 'probe' else 'fine-tuned'})"
            groups.setdefault(label, {})[upstream] = 100 * value
            if name in summary.get("intervals", {}):
                intervals.setdefault(label, {})[upstream] = [100 * end for end in summary["intervals"][name]]
    kinds = {
        "encoder": ("pre-trained encoder", BLUE),
        "random": ("same encoder, untrained", GREY),
        "features": ("features, no encoder", ORANGE),
        "features_global": ("features, not normalised by utterance", GREEN),
    }
    drawn = {upstream: kinds.get(upstream, (upstream, GREEN)) for bars in groups.values() for upstream in bars}
    figure = Figure(figsize=(2 + 2.4 * len(groups), 4), layout="constrained")
    axis = figure.subplots()
    for number, (label, bars) in enumerate(groups.items()):
        for place, (upstream, value) in enumerate(bars.items()):
            at = number + 0.22 * (place - (len(bars) - 1) / 2)
            axis.bar(at, value, 0.2, color=drawn[upstream][1])
            low, high = intervals.get(label, {}).get(upstream, (value, value))
            if low < high:  # drawn around its own middle: the figure need not be inside
                axis.errorbar(at, (low + high) / 2, (high - low) / 2, fmt="none", ecolor="black", elinewidth=1, capsize=3)
            top = (at, max(value, high))
            axis.annotate(f"{value:.1f}", top, (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(groups)), groups)
    axis.set(
        ylabel="test accuracy, %",
        title="Pre-trained encoder beside its controls" + (", 95% intervals" if intervals else ""),
        ylim=(0, 119),
    )
    axis.legend(
        handles=[axis.bar(0, 0, color=colour) for _, colour in drawn.values()],
        labels=[label for label, _ in drawn.values()],
        fontsize=8,
        ncols=2,
        loc="upper center",
    )
    _save(figure, path)


def plot_attention(
    weights: Mapping[str, Tensor],
    scale: SpectrogramScale,
    title: str,
    path: str | Path,
    frames: Tensor | None = None,
    columns: Sequence[str] | None = None,
    groups: int = 1,
) -> None:
    """Matrices of attending × attended frames, time downwards and to the right. Columns are heads.

    Args:
        weights: Name of a row → its maps (H, T, T): weights, or bool for the keys that may be attended to.
        scale: Where frames and channels lie.
        title: Title of the figure.
        path: Path of the PNG.
        frames: The utterance's frames (F, channels), drawn above each column; None: no utterance.
        columns: Names of the columns; default: head 1, head 2, …
        groups: Number of rows, one below the other, that share the scale of colours of each column: 2 for a layer trained and
            untrained.
    """
    maps = [row.float().cpu().numpy() for row in weights.values()]
    heads, above = len(maps[0]), frames is not None
    begin, *_, end = scale.token_edges(maps[0].shape[-1])
    columns = columns or [f"head {head + 1}" for head in range(heads)]
    heights = [0.55] * above + [1.0] * len(maps)
    figure = Figure(figsize=(1.7 * heads + 0.9, 1.8 * sum(heights) + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(heights), heads, squeeze=False, sharex=True, height_ratios=heights)
    for head in range(heads):
        if frames is not None:
            draw_spectrogram(axes[0][head], frames.float().cpu().numpy(), scale)
        axes[0][head].set_title(columns[head], fontsize=9)
        for number, (name, rows) in enumerate(zip(weights, maps, strict=True)):
            axis, first = axes[number + above][head], number - number % groups
            highest = max(float(other[head].max()) for other in maps[first : first + groups])
            # The square root makes weak weights visible.
            axis.imshow(
                np.sqrt(rows[head]), cmap="viridis", interpolation="nearest", aspect="auto", vmin=0, vmax=np.sqrt(highest),
                extent=(begin, end, end, begin),
            )  # fmt: skip
            if weights[name].dtype != torch.bool:
                box = {"facecolor": "black", "alpha": 0.4, "linewidth": 0, "pad": 1}
                words = {"ha": "right", "va": "top", "fontsize": 7, "color": "white", "transform": axis.transAxes, "bbox": box}
                axis.text(0.97, 0.97, f"0 to {highest:.2g}", **words)
            if head == 0:
                axis.set_ylabel(name, fontsize=9)
    for axis in axes.flat:
        axis.set_xlim(begin, end)
        axis.tick_params(labelsize=7)
        axis.label_outer(remove_inner_ticks=True)
    figure.supxlabel("attended frame, seconds", fontsize=9)
    figure.supylabel("attending frame, seconds", fontsize=9)
    _save(figure, path)


def plot_confusion(
    counts: Tensor, classes: Sequence[str], title: str, path: str | Path, groups: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Confusion matrix. Each row shows the shares of one true class.

    Args:
        counts: Counts (classes, classes). Rows are true, columns predicted.
        classes: Names of the classes.
        title: Title of the figure.
        path: Path of the PNG.
        groups: Name of a group → its classes, in the order of drawing, with lines between groups; empty: in the order given.
    """
    groups = groups or {}
    order = [classes.index(name) for members in groups.values() for name in members] or list(range(len(classes)))
    names = [classes[number] for number in order]
    counts = counts[order][:, order]
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).cpu().numpy()
    size = min(4 + 0.2 * len(classes), 18)
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 120:  # more names would not be legible
        small = max(4, min(9, 300 / len(names)))
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=small)
        axis.set_yticks(range(len(names)), names, fontsize=small)
    begin = 0
    for name, members in groups.items():
        if begin:
            axis.axhline(begin - 0.5, color=GREY, linewidth=0.7)
            axis.axvline(begin - 0.5, color=GREY, linewidth=0.7)
        begin += len(members)
        axis.text(len(names), begin - len(members) / 2 - 0.5, name, va="center", fontsize=8, color=GREY)
    axis.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(image, shrink=0.6, label="share of the true class")
    _save(figure, path)


def plot_scores(kinds: Mapping[str, Sequence[float]], title: str, path: str | Path) -> None:
    """Histograms of the scores of trials, as densities.

    Args:
        kinds: Scores in [−1, 1] by kind of trial.
        title: Title of the figure.
        path: Path of the PNG.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for (name, scores), colour in zip(kinds.items(), (BLUE, ORANGE), strict=False):
        axis.hist(
            scores, bins=np.linspace(-1, 1, 81).tolist(), density=True, alpha=0.6, color=colour, label=f"{name} ({len(scores):,})"
        )
    axis.set(xlabel="cosine", ylabel="density", title=title)
    axis.legend()
    _save(figure, path)


def plot_layer_weights(weights: Sequence[float], names: Sequence[str], title: str, path: str | Path) -> None:
    """Bars of the weights of the hidden states in a learned weighted sum.

    Args:
        weights: Weights, which add up to 1.
        names: Names of the hidden states.
        title: Title of the figure.
        path: Path of the PNG.
    """
    figure = Figure(figsize=(2 + 0.6 * len(weights), 3.5), layout="constrained")
    axis = figure.subplots()
    bars = axis.bar(range(len(weights)), list(weights), color=BLUE)
    axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.axhline(1 / len(weights), color=GREY, linestyle="--", linewidth=1, label="equal shares")
    axis.legend(fontsize=8)
    axis.set_xticks(range(len(weights)), names)
    axis.set(ylabel="share", xlabel="hidden state (0: input of the first layer)", title=title)
    _save(figure, path)


def plot_measures(layers: Sequence[Mapping[str, Any]], features: Mapping[str, Any] | None, title: str, path: str | Path) -> None:
    """Plot ABX errors and, if it was measured, PNMI by layer. Dashed lines are the features without an encoder.

    Args:
        layers: Figures of each layer: ``layer``, ``within`` and ``across`` (``error``, ``low``, ``high``), ``pnmi``. Without an
            interval ``low`` and ``high`` are None.
        features: The same figures of the features.
        title: Title of the figure.
        path: Path of the PNG.
    """
    with_codes = "pnmi" in layers[0]
    figure = Figure(figsize=(10 if with_codes else 5.5, 3.8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 1 + with_codes, squeeze=False)[0]
    numbers = [row["layer"] for row in layers]
    for speaker, colour in (("within", BLUE), ("across", ORANGE)):
        if speaker not in layers[0]:
            continue
        error, low, high = ([row[speaker][part] for row in layers] for part in ("error", "low", "high"))
        axes[0].plot(numbers, [100 * value for value in error], color=colour, marker="o", label=f"{speaker} speakers")
        ends = ([math.nan if value is None else 100 * value for value in bound] for bound in (low, high))
        axes[0].fill_between(numbers, *ends, color=colour, alpha=0.15, linewidth=0)
        if features and speaker in features:
            axes[0].axhline(100 * features[speaker]["error"], color=colour, linestyle="--", label="features")
    axes[0].set(ylabel="ABX error, %", title="Phones told apart (lower is better)")
    if with_codes:
        axes[1].plot(numbers, [row["pnmi"] for row in layers], color=GREEN, marker="o", label="layer")
        if features:
            axes[1].axhline(features["pnmi"], color=GREEN, linestyle="--", label="features")
        axes[1].set(ylabel="PNMI", title="What clusters say of phones (higher is better)")
    for axis in axes:
        axis.set_xlabel("hidden state (0: input of the first layer)")
        axis.set_xticks(numbers)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    _save(figure, path)


def plot_benchmark(
    panels: Sequence[tuple[str, str, Mapping[str, Mapping[str, Any]]]], baseline: str, title: str, path: str | Path
) -> None:
    """Curves over the sequence length, both axes logarithmic. Rings mark where a mechanism crosses the baseline.

    Args:
        panels: One tuple per panel: title, name of the values, and for each mechanism a mapping with ``lengths``, ``values``,
            ``crossings`` with the baseline and ``label`` for the legend.
        baseline: Mechanism drawn in black.
        title: Title of the figure.
        path: Path of the PNG.
    """
    names = list(dict.fromkeys(name for _, _, lines in panels for name in lines if name != baseline))
    styles = {name: (LINE_COLOURS[place % 8], ("-", "--", ":")[place // 8 % 3]) for place, name in enumerate(names)}
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10 * columns, 4.2 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{title}; rings: where a mechanism crosses {baseline}")
    for axis, (name, unit, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        base = lines[baseline]
        ticks = sorted({length for line in lines.values() for length in line["lengths"]})
        # The legend has the order of the curves at the right edge.
        order = sorted(lines, key=lambda mechanism: -lines[mechanism]["values"][-1] if lines[mechanism]["values"] else 0)
        for mechanism in order:
            line = lines[mechanism]
            colour, style = styles.get(mechanism, ("black", "-"))
            front = mechanism == baseline
            look = {"color": colour, "linestyle": style, "linewidth": 2.5 if front else 1.3, "zorder": 5 if front else 3}
            axis.plot(line["lengths"], line["values"], marker="o", markersize=3, label=line["label"], **look)
            for at in line["crossings"]:
                level = np.exp(np.interp(np.log(at), np.log(base["lengths"]), np.log(base["values"])))
                axis.plot(at, level, "o", markersize=10, fillstyle="none", color=colour, markeredgewidth=1.8, zorder=6)
        axis.set(xscale="log", yscale="log", xlabel="frames per sequence", ylabel=unit)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.minorticks_off()
        if base["values"]:  # a mechanism that costs almost nothing would squeeze all other curves
            axis.set_ylim(bottom=max(axis.get_ylim()[0], min(base["values"]) / 50))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)
    for axis in figure.axes[len(panels) :]:
        axis.set_visible(False)
    _save(figure, path)


def plot_step_parts(bars: Mapping[str, Mapping[str, float]], parts: Sequence[str], title: str, path: str | Path) -> None:
    """Stacked bars: where the time of a training step goes, one bar per configuration.

    Args:
        bars: Configuration → part → its milliseconds per 10,000 frames.
        parts: Parts in the order of drawing. Parts without time are left out.
        title: Title of the figure.
        path: Path of the PNG.
    """
    drawn = [part for part in parts if any(bar.get(part) for bar in bars.values())]
    colours = dict(zip(parts, ("#aa3377", "#66bbdd", "#bbaa22", "#997700", BLUE, ORANGE, GREEN, GREY), strict=False))
    height = 1.6 + 0.42 * len(bars)
    figure = Figure(figsize=(12, height), layout="constrained")
    axis = figure.subplots()
    totals = {name: sum(bar.values()) for name, bar in bars.items()}
    longest = max(totals.values())
    for row, (name, bar) in enumerate(bars.items()):
        left = 0.0
        for part in drawn:
            width = bar.get(part, 0.0)
            axis.barh(row, width, 0.72, left=left, color=colours[part], edgecolor="white", linewidth=0.6)
            if width > 0.035 * longest:  # narrower bars have no room for text
                share = f"{100 * width / totals[name]:.0f}%"
                axis.text(left + width / 2, row, share, ha="center", va="center", fontsize=8, color="white")
            left += width
        axis.text(left + 0.008 * longest, row, f"{totals[name]:.3g}", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlim(0, 1.07 * longest)
    axis.set_xlabel("ms per 10,000 frames")
    axis.set_title(title, fontsize=10, loc="left", pad=28)
    handles = [Patch(color=colours[part]) for part in drawn]
    axis.legend(handles, drawn, ncols=len(drawn), fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    _save(figure, path)


def plot_roofline(
    points: Sequence[tuple[str, str, str, float, float]], peak: float, bandwidth: float, title: str, path: str | Path
) -> None:
    """Roofline: the measured speed of configurations below the limits of the device's matrix products and memory.

    Args:
        points: One tuple per point: label, colour group, marker group, FLOPs per byte of memory traffic, and TFLOP/s.
        peak: Measured TFLOP/s of matrix products.
        bandwidth: Measured TB/s of memory.
        title: Title of the figure.
        path: Path of the PNG.
    """
    scale, prefix = (1.0, "T") if peak >= 1 else (1000.0, "G")
    peak, bandwidth = peak * scale, bandwidth * scale
    points = [(*point[:4], point[4] * scale) for point in points]
    figure = Figure(figsize=(12, max(5.0, 1.2 + 0.24 * len(points))), layout="constrained")
    axis = figure.subplots()
    ridge = peak / bandwidth
    left, right = min(ridge, *(point[3] for point in points)) / 4, 2 * max(ridge, *(point[3] for point in points))
    bottom, top = min(bandwidth * left, *(point[4] for point in points)) / 1.5, 1.6 * peak
    axis.plot([left, ridge, right], [bandwidth * left, peak, peak], color="black", linewidth=1.8)
    axis.text(ridge, 1.05 * peak, f"{peak:.3g} {prefix}FLOP/s, measured", fontsize=8)
    middle = (left * ridge) ** 0.5
    axis.text(1.1 * middle, bandwidth * middle, f"{bandwidth:.3g} {prefix}B/s, measured", va="top", fontsize=8)
    groups = list(dict.fromkeys(point[1] for point in points))
    markers = dict(zip(dict.fromkeys(point[2] for point in points), "os^vD", strict=False))
    ordered = sorted(points, key=lambda point: -point[4])
    # Points lie close together, so their labels form a column beside the axes, in the order of the points.
    for row, (label, group, marker, intensity, rate) in enumerate(ordered):
        colour = LINE_COLOURS[groups.index(group) % len(LINE_COLOURS)]
        axis.plot(intensity, rate, markers[marker], color=colour, markersize=7, markeredgecolor="white", zorder=5)
        axis.annotate(
            f"{label}: {rate:.3g} {prefix}FLOP/s, {rate / peak:.0%}",
            (intensity, rate),
            (1.03, (len(ordered) - row - 0.5) / len(ordered)),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5)},
        )
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top), ylabel=f"{prefix}FLOP/s")
    axis.set_xlabel("FLOPs per byte that the matrix products must move")
    signs = dict(zip("os^vD", "●■▲▼◆", strict=True))
    kinds = ", ".join(f"{signs[marker]} {name}" for name, marker in markers.items())
    axis.set_title(f"{title}; {kinds}", fontsize=10, loc="left")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    _save(figure, path)


def plot_lengths(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], baseline: str, title: str, path: str | Path
) -> None:
    """Curves over the sequence length, both axes logarithmic. The legend shows each slope.

    Args:
        panels: Title of a panel → name of a curve → points (frames per sequence, value).
        baseline: Curve drawn in black.
        title: Title of the figure.
        path: Path of the PNG.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines if name != baseline))
    styles = {
        name: (LINE_COLOURS[place % len(LINE_COLOURS)], ("-", "--", ":")[place // len(LINE_COLOURS) % 3])
        for place, name in enumerate(names)
    }
    figure = Figure(figsize=(10, 4.4 * len(panels) + 0.5), layout="constrained")
    figure.suptitle(f"{title}; slope: of the longer half", fontsize=10)
    for axis, (name, lines) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        ticks = sorted({length for line in lines.values() for length, _ in line})
        # The legend has the order of the curves at the right edge.
        for curve in sorted(lines, key=lambda curve: -lines[curve][-1][1]):
            lengths, values = zip(*lines[curve], strict=True)
            slope = log_slope(lengths, values)
            label = curve if slope is None else f"{curve}: slope {slope:+.2f}"
            colour, style = styles.get(curve, ("black", "-"))
            width = 2.5 if curve == baseline else 1.3
            axis.plot(lengths, values, style, color=colour, marker="o", markersize=3, linewidth=width, label=label)
        axis.set(xscale="log", yscale="log", xlabel="frames per sequence")
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)
    _save(figure, path)


def log_slope(lengths: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of the longer half of a curve (at least two points) on logarithmic axes; None if it has fewer points."""
    if len(lengths) < 2:
        return None
    half = max(2, -(-len(lengths) // 2))
    return float(np.polyfit(np.log(lengths[-half:]), np.log(values[-half:]), 1)[0])


def plot_speeds(speeds: Mapping[str, float], title: str, path: str | Path) -> None:
    """Horizontal bars of speeds on a logarithmic axis, one colour per stage.

    Args:
        speeds: Speeds by ``stage, setting``.
        title: Title of the figure.
        path: Path of the PNG.
    """
    stages = list(dict.fromkeys(name.split(", ")[0] for name in speeds))
    figure = Figure(figsize=(10, 1.2 + 0.4 * len(speeds)), layout="constrained")
    axis = figure.subplots()
    for row, (name, speed) in enumerate(speeds.items()):
        colour = LINE_COLOURS[stages.index(name.split(", ")[0]) % len(LINE_COLOURS)]
        bar = axis.barh(row, speed, 0.72, color=colour)
        axis.bar_label(bar, [f"{speed:,.0f}"], fontsize=8, padding=3)
    axis.set_xscale("log")
    axis.set_xlim(min(speeds.values()) / 3, 3 * max(speeds.values()))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_yticks(range(len(speeds)), list(speeds), fontsize=8)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10, loc="left", wrap=True)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    _save(figure, path)
