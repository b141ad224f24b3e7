"""Log power spectrum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from audiot.features.base import Features, check_n_fft, log_power, power_spectrum


class Spectrogram(Features):
    """Natural logarithm of the power spectrum under a periodic Hann window: n_fft / 2 + 1 channels.

    Args:
        n_fft: Points of the Fourier transform, at least win_length.
        win_length: Samples in a frame.
        hop_length: Samples from one frame to the next.
        floor: Smallest power before the logarithm.
        add_floor: Whether the floor is added to every power instead of replacing smaller ones.
        options: Options of every front end (see `Features`): ``sample_rate``, ``cmvn``, ``stack``, …
    """

    def __init__(
        self,
        *,
        n_fft: int = 400,
        win_length: int = 400,
        hop_length: int = 160,
        floor: float = 1e-10,
        add_floor: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            frame_channels=n_fft // 2 + 1,
            win_length=win_length,
            hop_length=hop_length,
            **options,
        )
        check_n_fft(n_fft, win_length)
        self.n_fft = n_fft
        self.floor = floor
        self.add_floor = add_floor
        self.window: Tensor
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)

    def channel_hertz(self) -> tuple[float, ...]:
        """Frequency of each bin, in Hz."""
        return tuple(bin_number * self.sample_rate / self.n_fft for bin_number in range(self.frame_channels))

    def frames(self, waveforms: Tensor) -> Tensor:
        """Log power spectrum: (B, N) → (B, F, n_fft / 2 + 1)."""
        return log_power(power_spectrum(self._framed(waveforms) * self.window, self.n_fft), self.floor, self.add_floor)
