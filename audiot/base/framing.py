"""Counting the frames of a waveform. Nothing here needs PyTorch, so that a config can count them before a model is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Count = TypeVar("Count", int, "Tensor")


class SpectrogramScale(NamedTuple):
    """Where the frames and channels of a spectrogram lie.

    Args:
        first_s: Middle of the first frame, in seconds.
        step_s: Seconds from one frame to the next.
        stack: Frames per token.
        hertz: Frequency of each channel; None where channels have none, as cepstral coefficients and deltas.
        kind: How channels are spaced, ``mel`` or ``linear``.
    """

    first_s: float
    step_s: float
    stack: int = 1
    hertz: tuple[float, ...] | None = None
    kind: str = "linear"

    def edges(self, count: int) -> np.ndarray:
        """Edges of frames, halfway between the middles of neighbours, in seconds (count,)."""
        return self.first_s + (np.arange(count) - 0.5) * self.step_s

    def token_edges(self, num_tokens: int) -> np.ndarray:
        """Edges of tokens in seconds, one more than tokens."""
        return self.edges(num_tokens * self.stack + 1)[:: self.stack]


def num_frames(num_samples: Count, win_length: int, hop_length: int, num_added: int = 0) -> Count:
    """Number of full frames.

    Args:
        num_samples: Samples of the waveform, or integers (B,) for a batch.
        win_length: Samples in a frame.
        hop_length: Samples from one frame to the next.
        num_added: Samples added at both ends together, by padding or reflection.
    """
    count = (num_samples + num_added - win_length) // hop_length + 1
    return count * (count > 0)


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Samples that an output of stacked convolutions hears, and samples from one output to the next.

    Args:
        kernels: Kernel size of each convolution, the first one on samples.
        strides: Stride of each.
    """
    steps = [math.prod(strides[:index]) for index in range(len(strides) + 1)]
    return 1 + sum((kernel - 1) * step for kernel, step in zip(kernels, steps, strict=False)), steps[-1]


def middles(front_end: Any, stack: int, count: int) -> Tensor:
    """Middle in time of each of ``count`` tokens or states of ``stack`` frames: (count,), float64, in samples."""
    return front_end.frame_centers(count * stack).double().view(count, stack).mean(1)


def samples_in(duration_ms: float, sample_rate: int) -> int:
    """Number of samples in a duration, rounded down as Kaldi does."""
    return int(sample_rate * duration_ms * 0.001)
