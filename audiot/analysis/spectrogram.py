"""How a spectrogram is drawn: time in seconds, frequencies in Hz."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from audiot.base.framing import SpectrogramScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_spectrogram(axis: Axes, frames: np.ndarray, scale: SpectrogramScale, limits: tuple[float, float] | None = None) -> None:
    """Draw the frames of an utterance by librosa, without a label of the time axis.

    Args:
        axis: Where it is drawn.
        frames: Frames (F, channels).
        scale: Where frames and channels lie.
        limits: Values of the darkest and the brightest colour; None: the percentiles 2 and 99.5.
    """
    from librosa.display import specshow  # slow import: it loads Numba

    low, high = np.percentile(frames, [2, 99.5]) if limits is None else limits
    edges = scale.edges(len(frames) + 1)
    places, kind = (None, None) if scale.hertz is None else (np.array(scale.hertz), scale.kind)
    middles = (edges[:-1] + edges[1:]) / 2
    specshow(
        frames.T, ax=axis, x_coords=middles, y_coords=places, x_axis="s", y_axis=kind, vmin=low, vmax=high, cmap="magma"
    )  # fmt: skip
    axis.set_xlabel("")
    axis.set_ylabel("channel" if scale.hertz is None else "Hz")
    axis.set_xlim(edges[0], edges[-1])


def span_edges(masked: np.ndarray, scale: SpectrogramScale) -> list[float]:
    """Where masked spans begin and end, in seconds, from bool (F,)."""
    return scale.edges(len(masked) + 1)[np.flatnonzero(np.diff(masked.astype(int), prepend=0, append=0))].tolist()
