"""The picture of served audio: its spectrogram in seconds and Hz, and the labels of its segments below."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from audiot.analysis.inline import STYLE, inline
from audiot.analysis.spectrogram import draw_spectrogram
from audiot.downstream.objectives import Row
from audiot.features import LogMel

PX_PER_INCH = 96  # of a page
PX_PER_S = 300  # with segments: room for the names of phones
WIDEST_PX = 6000
MOST_COLUMNS = 3000  # of the spectrogram; more would not be seen
LETTER_PX, SMALL = 7.0, 8.0  # room for a letter, and its size in points


class Painter:
    """Draws log mel spectrograms of waveforms.

    Args:
        sample_rate: Sample rate of the waveforms in Hz.
    """

    def __init__(self, sample_rate: int) -> None:
        window, hop = round(0.025 * sample_rate), round(0.01 * sample_rate)
        points = max(1024, 2 ** math.ceil(math.log2(window)))  # fine enough for 80 filters
        self.features = LogMel(sample_rate=sample_rate, win_length=window, hop_length=hop, n_fft=points, cmvn="none")

    def svg(self, samples: Tensor, segments: Sequence[Row], width: int) -> str:
        """An element of a page.

        Args:
            samples: Waveform (N,) of at least 25 ms.
            segments: Segments that cover it, with ``label``, ``start`` and ``end`` in seconds; none: no strip below.
            width: Width in CSS pixels. With segments it is larger where their names need more room.
        """
        duration_s = len(samples) / self.features.sample_rate
        frames, scale = self.features(samples[None])[0][0], self.features.scale
        joined = math.ceil(len(frames) / MOST_COLUMNS)
        frames = frames[: len(frames) // joined * joined].view(-1, joined, frames.shape[1]).mean(1)
        step_s = joined * scale.step_s
        scale = scale._replace(first_s=scale.first_s + (step_s - scale.step_s) / 2, step_s=step_s)
        if segments:
            width = min(WIDEST_PX, max(width, round(PX_PER_S * duration_s)))
        words = f"Log mel spectrogram of {duration_s:.2f} seconds, 0 to {self.features.sample_rate / 2:,.0f} Hz."
        with rc_context(STYLE):
            figure = Figure(figsize=(width / PX_PER_INCH, 2.4 + 0.4 * bool(segments)), layout="constrained", dpi=150)
            heights = [6, 1] if segments else [1]
            above, *below = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
            draw_spectrogram(above, frames.numpy(), scale)
            for axis in below:
                _strip(axis, segments, width / duration_s)
                words += " Below are the labels, which the table lists."
            lowest = below[0] if below else above
            lowest.set_xlabel("seconds")
            lowest.set_xlim(0, duration_s)
            return inline(figure, "spectrogram", ("Spectrogram", words))


def _strip(axis: Axes, segments: Sequence[Row], px_per_s: float) -> None:
    """Draw segments as boxes, a colour a label, with the names that fit."""
    labels = sorted({segment["label"] for segment in segments})
    colours = {label: colorsys.hsv_to_rgb(0.618034 * place % 1, 0.35, 0.95) for place, label in enumerate(labels)}
    spans = [(segment["start"], segment["end"] - segment["start"]) for segment in segments]
    axis.broken_barh(spans, (0, 1), facecolors=[colours[segment["label"]] for segment in segments], linewidth=0)
    for segment, (start, length) in zip(segments, spans, strict=True):
        if len(segment["label"]) * LETTER_PX < length * px_per_s:
            axis.text(start + length / 2, 0.5, segment["label"], fontsize=SMALL, color="#1b1d20", ha="center", va="center")
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
