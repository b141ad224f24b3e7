"""Kaldi's log mel filter bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from audiot.base.framing import samples_in
from audiot.base.pairing import torchaudio
from audiot.base.tracing import is_recording
from audiot.features.base import MOST_CHANNELS, Features, check_band, check_size, power_spectrum


class Kaldi(Features):
    """Common part of Kaldi's compute-fbank-feats and compute-mfcc-feats: a batch of log mel filter banks.

    Kaldi's defaults without dither: mean removed from each frame, pre-emphasis 0.97 within the frame, Povey window,
    Fourier transform of the next power of two, no energy channel, snip_edges. Waveforms stay in [-1, 1] as in torchaudio.
    Kaldi's own programs read 16-bit integers, which adds 2·ln(32768) to every log channel.
    """

    PRE_EMPHASIS = 0.97
    FLOOR = torch.finfo(torch.float32).eps  # same as Kaldi

    def __init__(
        self,
        *,
        num_mel_bins: int,
        frame_length_ms: float,
        frame_shift_ms: float,
        low_freq: float,
        high_freq: float,
        sample_rate: int = 16000,
        **options: Any,
    ) -> None:
        check_size("num_mel_bins", num_mel_bins, MOST_CHANNELS)
        win_length, hop_length = (samples_in(duration_ms, sample_rate) for duration_ms in (frame_length_ms, frame_shift_ms))
        super().__init__(win_length=win_length, hop_length=hop_length, sample_rate=sample_rate, **options)
        high_freq = high_freq if high_freq > 0 else sample_rate / 2 + high_freq
        check_band("low_freq", low_freq, "high_freq", high_freq, sample_rate)
        self.band = (low_freq, high_freq)
        self.n_fft = 1 << (win_length - 1).bit_length()
        self.window: Tensor
        self.filters: Tensor
        window = torch.hann_window(win_length, periodic=False).pow(0.85)
        # The filters are triangles on the mel scale. The bin at half the sample rate belongs to none of them.
        filters, _ = torchaudio("compliance.kaldi").get_mel_banks(
            num_mel_bins, self.n_fft, sample_rate, low_freq, high_freq, 100.0, -500.0, 1.0
        )
        filters = nn.functional.pad(filters, (0, 1)).T.contiguous()
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)  # n_fft / 2 + 1, num_mel_bins

    def log_mel(self, waveforms: Tensor) -> Tensor:
        """Log mel filter banks: (B, N) → (B, F, num_mel_bins)."""
        if waveforms.device.type != "cpu" or is_recording():
            return self._log_mel_of(waveforms)
        rows = max(1, 2**19 // waveforms.shape[1])  # a CPU's cache holds some 30 s of audio
        return torch.cat([self._log_mel_of(part) for part in waveforms.split(rows)])

    def _log_mel_of(self, waveforms: Tensor) -> Tensor:
        # Same steps in the same order as torchaudio. Weak bins beside strong ones are mostly rounding, which then agrees.
        frames = self._framed(waveforms)
        frames = frames - frames.mean(-1, keepdim=True)
        # The first sample of a frame has no previous one. It does not matter, because the Povey window begins with a zero.
        frames[..., 1:].sub_(self.PRE_EMPHASIS * frames[..., :-1])
        power = power_spectrum(frames.mul_(self.window), self.n_fft)
        return (power @ self.filters.to(power.dtype)).clamp_(min=self.FLOOR).log_()


class KaldiFbank(Kaldi):
    """Kaldi's log mel filter bank (compute-fbank-feats without dither), with deltas: 240 channels by default.

    It computes a whole batch at once and equals torchaudio.compliance.kaldi.fbank, which takes one utterance. With the
    default deltas and CMVN it gives the features of S3PRL's Mockingjay. Waveforms are in [-1, 1].

    Args:
        num_mel_bins: Number of mel filters.
        frame_length_ms: Length of a frame in ms, rounded down to samples.
        frame_shift_ms: Time from one frame to the next in ms, rounded down to samples.
        low_freq: Lowest frequency of the filters in Hz.
        high_freq: Highest frequency in Hz. Zero or less counts from half the sample rate.
        delta_order: Order of deltas.
        options: Options of every front end (see `Features`): ``sample_rate``, ``cmvn``, ``stack``, …
    """

    spacing = "mel"

    def __init__(
        self,
        *,
        num_mel_bins: int = 80,
        frame_length_ms: float = 25.0,
        frame_shift_ms: float = 10.0,
        low_freq: float = 20.0,
        high_freq: float = 0.0,
        delta_order: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(
            frame_channels=num_mel_bins,
            num_mel_bins=num_mel_bins,
            frame_length_ms=frame_length_ms,
            frame_shift_ms=frame_shift_ms,
            low_freq=low_freq,
            high_freq=high_freq,
            delta_order=delta_order,
            **options,
        )

    def channel_hertz(self) -> tuple[float, ...]:
        """Peak of each filter, in Hz."""
        from librosa import mel_frequencies  # slow import: it loads Numba

        low, high = self.band
        return tuple(mel_frequencies(self.frame_channels + 2, fmin=low, fmax=high, htk=True)[1:-1].tolist())

    def frames(self, waveforms: Tensor) -> Tensor:
        """Log mel filter banks: (B, N) → (B, F, num_mel_bins)."""
        return self.log_mel(waveforms)
