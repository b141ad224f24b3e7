"""Tables and pictures of the training benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from audiot.analysis.plots import plot_lengths, plot_roofline, plot_step_parts
from audiot.base.tables import markdown
from audiot.benchmark.entries import BASELINE
from audiot.benchmark.results import milliseconds
from audiot.benchmark.roofline import Ceilings
from audiot.benchmark.training_results import PARTS, Row

HOW = """\
The encoder sees T frames per sequence and B sequences per batch, and nothing is padded. dropout: of the hidden states / of the \
attention weights. frames/s count real spectrogram frames, of which `features.stack` make one frame of the encoder.

- inference: waveforms that lie on the device become the hidden states of all layers, by the encoder that \
`audiot.load_encoder` gives, with weights in the precision of the run. There are no masks and no head.
- encoder: forward and backward of the encoder on features that lie on the device. The loss is the mean magnitude of its output.
- step: features, masking, targets, encoder, head, loss, backward, clipping and optimiser, on waveforms that lie on the device.
- program: prepared audio through the Trainer, with callbacks, loggers, a validation and a checkpoint. frames/s leave out the \
validation, as the program's own figure does. wall includes both the validation and the checkpoint, which come far more often \
here than in a recipe.

ms: the median step. A GPU is timed by its own events, without waiting for it in between. MiB: the peak of the memory of \
tensors in a step. It includes parameters and optimiser, and leaves out the validation. first call: the first step, with its \
compilation.

Where the step goes: the time between the device's own marks. Masking and targets are computed inside the loss. So they are \
timed alone and subtracted from forward, and what is fused there shows as too much masking or targets and too little forward. \
A teacher that hears the audio before the loss counts as features, and the moving average of self-distillation as targets. \
data: the device waits for a batch. other: everything else between two steps.

FLOPs: three times those of the matrix products in a forward pass, since a backward pass has two products for each. Inference \
has no backward pass. Counted by shape are the products of the encoder, with fused attention as QKᵀ and AV, and in step and \
program those of the head on the frames that it may have to predict. Left out are softmax, norms, features, and what a backward \
pass computes again. For width d, width f in the feed-forward networks and c input channels, a frame of the encoder takes \
6·(layers·(4·d² + 2·d·f) + c·d) + 12·T·d·layers with `query_key`, and 6·(layers·(2·d² + 2·d·f) + c·d) + 6·T·d·layers with \
`synthesizer_random`. Inference takes a third of that.

FLOPs per byte (roofline): FLOPs over the bytes that these products must move at least. Each product reads its operands and \
writes its result once, in the precision of the run, and fused attention is one product. The true traffic is larger, so the \
true place of a point is further to the left. The distance from a point up to the roof is the time of norms, dropout, GELU, \
softmax and everything else between the products, and what the products themselves lose."""


def markdown_report(rows: Sequence[Row], ceilings: Ceilings, introduction: Sequence[str]) -> str:
    """All tables as Markdown, with an account of how they were measured."""
    parts = [
        "# Pre-training",
        *introduction,
        f"Ceilings, measured in this run: {ceilings}, bytes read and written.",
        markdown(grid(rows)),
        "\n".join(f"- {row.label}: {row.note}" for row in rows if row.note),
        "## Where the step goes",
        markdown(shares_grid(rows)),
        "## How",
        HOW,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def told(row: Row) -> str:
    """A result in a few words."""
    if row.median_ms is None or row.frames_per_s is None:
        return row.note
    words = [f"{milliseconds(row.median_ms)} ms", f"{row.frames_per_s:,} frames/s"]
    words += [f"{row.tflops:.3g} TFLOP/s ({row.share_of_peak:.0%} of the peak)"] if row.tflops and row.share_of_peak else []
    words += [f"{row.peak_mib:,} MiB"] if row.peak_mib is not None else []
    words += [f"first call {row.compile_s:.1f} s"] if row.compile_s is not None else []
    return ", ".join(words)


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of the main table."""
    measured = ["ms", "frames/s", "wall", f"× {BASELINE}", "TFLOP/s", "of peak", "MiB", "first call, s"]
    lines = [["model", "attention", "B × T", "dropout", "scope", *measured]]
    for row in rows:
        where = [f"{row.batch} × {row.frames:,}", f"{row.dropout:g}/{row.attention_dropout:g}", row.scope]
        figures: list[tuple[float | None, str]] = [
            (row.frames_per_s, ","),
            (row.wall_frames_per_s, ","),
            (row.speedup, ".2f"),
            (row.tflops, ".3g"),
            (row.share_of_peak, ".1%"),
            (row.peak_mib, ","),
            (row.compile_s, ".1f"),
        ]
        time_ms = row.note.split(":")[0] if row.median_ms is None else milliseconds(row.median_ms)
        told = ["" if value is None else f"{value:{form}}" for value, form in figures]
        lines.append([row.model, row.attention, *where, time_ms, *told])
    return lines


def shares_grid(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of the table of the step's parts. The header alone where no step was measured."""
    lines = [["", *PARTS]]
    for row in rows:
        if row.shares:
            lines.append([row.label, *(f"{row.shares[part]:.1%}" if part in row.shares else "" for part in PARTS)])
    return lines


def by_length(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Panel → mechanism → (T, value): ms and MiB per 1,000 frames, where they were measured at three lengths or more."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in sorted(rows, key=lambda row: row.frames):
        if row.frames_per_s is None:
            continue
        where = f"{row.model}, dropout {row.dropout:g}/{row.attention_dropout:g}, {row.scope}"
        values = {"ms": 1e6 / row.frames_per_s}
        values |= {"peak memory, MiB": 1000 * row.peak_mib / (row.batch * row.frames)} if row.peak_mib else {}
        for unit, value in values.items():
            panel = panels.setdefault(f"{where}: {unit} per 1,000 frames", {})
            panel.setdefault(row.attention, []).append((row.frames, value))
    return {
        title: lines for title, lines in panels.items() if len({length for line in lines.values() for length, _ in line}) >= 3
    }


def draw(rows: Sequence[Row], ceilings: Ceilings, title: str, folder: Path) -> list[str]:
    """Draw every picture that has values. Returns the names of the pictures."""
    drawn = []
    bars = {
        row.label: {part: 1e7 / row.frames_per_s * share for part, share in row.shares.items()}
        for row in rows
        if row.shares and row.frames_per_s
    }
    if bars:
        plot_step_parts(bars, PARTS, title, folder / "steps.png")
        drawn.append("steps.png")
    points = [
        (row.label, row.attention, row.scope, row.flops_per_byte, row.tflops)
        for row in rows
        if row.scope != "program" and row.flops_per_byte and row.tflops
    ]
    if points:
        plot_roofline(points, ceilings.flops_per_s / 1e12, ceilings.bytes_per_s / 1e12, title, folder / "roofline.png")
        drawn.append("roofline.png")
    lines = by_length(rows)
    if lines:
        plot_lengths(lines, BASELINE, title, folder / "lengths.png")
        drawn.append("lengths.png")
    return drawn
