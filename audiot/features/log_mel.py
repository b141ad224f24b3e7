"""Log mel spectrogram."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from audiot.features.base import MOST_CHANNELS, Features, check_band, check_n_fft, check_size, log_power, power_spectrum


class LogMel(Features):
    """Natural logarithm of the mel power spectrum under a periodic Hann window, as in librosa and torchaudio.

    Equals librosa's ``log(max(melspectrogram, floor))`` with the same ``center`` (reflecting) and ``power=2``. It equals
    torchaudio's MelSpectrogram where n_fft = win_length. A longer n_fft pads each windowed frame with zeros.

    Args:
        n_mels: Number of mel filters. More than about 100 need a longer n_fft; 160 work with n_fft 1024.
        n_fft: Points of the Fourier transform, at least win_length.
        win_length: Samples in a frame.
        hop_length: Samples from one frame to the next.
        f_min: Lowest frequency of the filters in Hz.
        f_max: Highest frequency in Hz; None is half the sample rate.
        mel_scale: Mel scale, ``"htk"`` or ``"slaney"``.
        norm: Filter norm: None (triangles of height one) or ``"slaney"`` (triangles of area one).
        floor: Smallest power before the logarithm.
        add_floor: Whether the floor is added to every power instead of replacing smaller ones.
        options: Options of every front end (see `Features`): ``sample_rate``, ``cmvn``, ``stack``, …

    Warns:
        UserWarning: some filters lie between two bins of the Fourier transform, so their channels are constant.
    """

    spacing = "mel"

    def __init__(
        self,
        *,
        n_mels: int = 80,
        n_fft: int = 400,
        win_length: int = 400,
        hop_length: int = 160,
        f_min: float = 0.0,
        f_max: float | None = None,
        mel_scale: str = "htk",
        norm: str | None = None,
        floor: float = 1e-10,
        add_floor: bool = False,
        **options: Any,
    ) -> None:
        check_size("n_mels", n_mels, MOST_CHANNELS)
        super().__init__(
            frame_channels=n_mels,
            win_length=win_length,
            hop_length=hop_length,
            **options,
        )
        from librosa import mel_frequencies
        from librosa.filters import mel  # slow import: it loads Numba

        check_n_fft(n_fft, win_length)
        if mel_scale not in ("htk", "slaney"):
            raise ValueError(f"features.mel_scale must be htk or slaney, found {mel_scale!r}")
        if norm not in (None, "slaney"):
            raise ValueError(f"features.norm must be null or slaney, found {norm!r}")
        f_max = self.sample_rate / 2 if f_max is None else f_max
        check_band("f_min", f_min, "f_max", f_max, self.sample_rate)
        self.n_fft = n_fft
        self.floor = floor
        self.add_floor = add_floor
        with warnings.catch_warnings():  # our own warning, below, names the remedy
            warnings.filterwarnings("ignore", message="Empty filters detected")
            triangles = mel(
                sr=self.sample_rate, n_fft=n_fft, n_mels=n_mels, fmin=f_min, fmax=f_max, htk=mel_scale == "htk",
                norm=norm,  # type: ignore[arg-type]  # librosa's word or None
            )  # fmt: skip
        corners = mel_frequencies(n_mels + 2, fmin=f_min, fmax=f_max, htk=mel_scale == "htk")
        self.peaks = tuple(corners[1:-1].tolist())
        filters = torch.from_numpy(triangles.T.copy())
        empty = int((filters.amax(0) == 0).sum())
        if empty:
            warnings.warn(
                f"{empty} of {n_mels} mel filters lie between two bins of n_fft={n_fft} and give constant channels: "
                "raise features.n_fft (win_length may stay) or lower features.n_mels",
                stacklevel=2,
            )
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)
        self.register_buffer("filters", filters, persistent=False)  # n_fft / 2 + 1, n_mels

    def channel_hertz(self) -> tuple[float, ...]:
        """Peak of each filter, in Hz."""
        return self.peaks

    def frames(self, waveforms: Tensor) -> Tensor:
        """Log mel spectrogram: (B, N) → (B, F, n_mels)."""
        power = power_spectrum(self._framed(waveforms) * self.window, self.n_fft)
        return log_power(power @ self.filters.to(power.dtype), self.floor, self.add_floor)
