"""Kaldi's cepstral coefficients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from audiot.base.pairing import torchaudio
from audiot.features.kaldi import Kaldi


class MFCC(Kaldi):
    """Kaldi's mel-frequency cepstral coefficients (compute-mfcc-feats without dither and energy).

    The orthonormal cosine transform of Kaldi's log mel filter bank, liftered by 1 + L/2·sin(πi/L). Waveforms are in
    [-1, 1]. Only coefficient 0 differs from Kaldi's because of that.

    Args:
        n_mfcc: Number of coefficients including the zeroth, at most num_mel_bins.
        num_mel_bins: Number of mel filters.
        cepstral_lifter: Liftering parameter L; 0 switches liftering off.
        frame_length_ms: Length of a frame in ms, rounded down to samples.
        frame_shift_ms: Time from one frame to the next in ms, rounded down to samples.
        low_freq: Lowest frequency of the filters in Hz.
        high_freq: Highest frequency in Hz. Zero or less counts from half the sample rate.
        options: Options of every front end (see `Features`): ``sample_rate``, ``cmvn``, ``stack``, …
    """

    def __init__(
        self,
        *,
        n_mfcc: int = 13,
        num_mel_bins: int = 23,
        cepstral_lifter: float = 22.0,
        frame_length_ms: float = 25.0,
        frame_shift_ms: float = 10.0,
        low_freq: float = 20.0,
        high_freq: float = 0.0,
        **options: Any,
    ) -> None:
        if not 1 <= n_mfcc <= num_mel_bins:
            raise ValueError(f"features.n_mfcc must be between 1 and num_mel_bins = {num_mel_bins}, found {n_mfcc}")
        super().__init__(
            frame_channels=n_mfcc,
            num_mel_bins=num_mel_bins,
            frame_length_ms=frame_length_ms,
            frame_shift_ms=frame_shift_ms,
            low_freq=low_freq,
            high_freq=high_freq,
            **options,
        )
        cosines = torchaudio("functional").create_dct(n_mfcc, num_mel_bins, norm="ortho")
        if cepstral_lifter:
            order = torch.arange(n_mfcc)
            cosines = cosines * (1 + cepstral_lifter / 2 * torch.sin(math.pi * order / cepstral_lifter))
        self.cosines: Tensor
        self.register_buffer("cosines", cosines, persistent=False)  # num_mel_bins, n_mfcc

    def frames(self, waveforms: Tensor) -> Tensor:
        """Cepstral coefficients: (B, N) → (B, F, n_mfcc)."""
        log_mel = self.log_mel(waveforms)
        return log_mel @ self.cosines.to(log_mel.dtype)
