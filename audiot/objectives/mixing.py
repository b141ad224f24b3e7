"""Utterances mixed with others or with noise, on the device (WavLM: Chen et al. 2022, arXiv:2110.13900, section III-B)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from audiot.base import streams
from audiot.data.audio import BadAudioError, audio_files, read_audio

_MIX = 7  # sub-stream of an utterance's key, beside those of the corruptions
POOL_S = 3600.0  # most seconds of noise that are held
SHORTEST_S = 0.1  # of noise that is of use


class Mixing(nn.Module):
    """Add a piece of another utterance of the batch, or of noise, to a part of some utterances.

    The piece is at most `longest` of the utterance, so the main speaker keeps the greater part. Its place, its source and the
    ratio of the utterance's mean power to that of the whole other utterance, or of the piece of noise, are uniform draws from the
    utterance's key. Targets are those of the clean utterance, so the model learns to denoise and to tell the main speaker.

    Args:
        probability: Probability that an utterance is mixed.
        noise: File or folder of noise; None: only other utterances are mixed in. An hour of it at most is held, in the order of
            the names.
        noise_probability: Share of the mixed utterances that get noise instead of another utterance; 0 without noise.
        ratio_db: Lowest and highest ratio of energies for utterances, in dB.
        noise_ratio_db: The same for noise.
        longest: Longest piece as a share of the utterance, in (0, 1].
        sample_rate: Sample rate of the utterances in Hz.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(
        self,
        probability: float,
        noise: str | None = None,
        noise_probability: float = 0.5,
        ratio_db: Sequence[float] = (-5.0, 5.0),
        noise_ratio_db: Sequence[float] = (-5.0, 20.0),
        longest: float = 0.5,
        sample_rate: int = 16000,
    ) -> None:
        super().__init__()
        for name, value in {"probability": probability, "noise_probability": noise_probability}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"objective.mix.{name} must be in [0, 1], found {value}")
        if not 0 < longest <= 1:
            raise ValueError(f"objective.mix.longest must be in (0, 1], found {longest}")
        for name, pair in {"ratio_db": ratio_db, "noise_ratio_db": noise_ratio_db}.items():
            if len(pair) != 2 or not -100 <= pair[0] <= pair[1] <= 100:
                raise ValueError(f"objective.mix.{name} must be a low and a high number of dB, found {list(pair)}")
        self.probability = probability
        self.noise_probability = noise_probability if noise is not None else 0.0
        self.ratio_db, self.noise_ratio_db, self.longest = tuple(ratio_db), tuple(noise_ratio_db), longest
        self.noise, self.sample_rate = noise, sample_rate
        self._pool: Tensor | None = None  # no buffer: it is neither trained nor saved

    def open(self) -> None:
        """Read the noise, which nothing but training needs.

        Raises:
            ValueError: there is none that can be read.
        """
        if self.noise is not None and self._pool is None:
            self._pool = torch.from_numpy(read_noise(self.noise, self.sample_rate))

    @torch.no_grad()
    def forward(self, waveforms: Tensor, lengths: Tensor, keys: Tensor) -> Tensor:
        """Mixed waveforms (B, N). Nothing waits for the device.

        Args:
            waveforms: Samples (B, N).
            lengths: Samples of each utterance (B,), integers on any device.
            keys: Random keys (B,), on the device of the waveforms.
        """
        num_utterances, num_samples = waveforms.shape
        lengths = lengths.to(waveforms.device, non_blocking=True)
        draws = streams.uniform(keys, 7, _MIX).unbind(1)
        mixed, noisy = draws[0] < self.probability, draws[1] < self.noise_probability
        if num_utterances == 1:  # no other utterance is there
            mixed = mixed & noisy
        piece = (draws[2] * self.longest * lengths).long().clamp(min=1)
        begin = (draws[3] * (lengths - piece + 1)).long()
        at = torch.arange(num_samples, device=waveforms.device)
        into = at - begin[:, None]
        inside = (into >= 0) & (into < piece[:, None])
        steps = 1 + (draws[4] * (num_utterances - 1)).long().clamp(max=max(0, num_utterances - 2))
        other = (torch.arange(num_utterances, device=keys.device) + steps) % num_utterances
        source = self._piece(waveforms[other], lengths[other], into, draws[5])
        own = at < lengths[:, None]
        first = _power(waveforms, own)
        second = first[other]
        low, high = self.ratio_db
        ratio = low + draws[6] * (high - low)
        if self.noise is not None:
            self.open()
            assert self._pool is not None
            self._pool = pool = self._pool.to(waveforms.device)
            start = (draws[5] * len(pool)).long()[:, None]
            noise = pool[(start + into) % len(pool)].to(waveforms.dtype)
            source = torch.where(noisy[:, None], noise, source)
            second = torch.where(noisy, _power(noise, inside), second)
            low, high = self.noise_ratio_db
            ratio = torch.where(noisy, low + draws[6] * (high - low), ratio)
        scale = (first / second.clamp(min=1e-12) * torch.exp(-ratio * (math.log(10) / 10))).sqrt().to(waveforms.dtype)
        return waveforms + torch.where(inside & mixed[:, None], scale[:, None] * source, 0.0)

    @staticmethod
    def _piece(waveforms: Tensor, lengths: Tensor, into: Tensor, draw: Tensor) -> Tensor:
        """Samples of each utterance from a random place on; after its end it starts again."""
        start = (draw * lengths).long()[:, None]
        return waveforms.gather(1, (start + into) % lengths[:, None].clamp(min=1))


def _power(waveforms: Tensor, inside: Tensor) -> Tensor:
    """Mean square of the samples inside (B, N) of each row: (B,), in float32 or better."""
    exact = waveforms.to(torch.promote_types(waveforms.dtype, torch.float32))
    return exact.square().masked_fill(~inside, 0.0).sum(1) / inside.sum(1).clamp(min=1)


def read_noise(path: str, sample_rate: int) -> np.ndarray:
    """Samples of an audio file, or of all in a folder in the order of their names, one after the other: at most an hour.

    Raises:
        ValueError: nothing of them can be read.
    """
    pieces: list[np.ndarray] = []
    left, first = round(POOL_S * sample_rate), ""
    for file in audio_files(path):
        if left <= 0:
            break
        try:
            samples = read_audio(file, sample_rate)[:left]
        except BadAudioError as error:
            first = first or f"{file}: {error}"
            continue
        pieces.append(samples.astype(np.float32))
        left -= len(samples)
    found = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if len(found) < SHORTEST_S * sample_rate:
        raise ValueError(
            f"objective.mix.noise={path} has no audio of {SHORTEST_S:g} s or more that can be read{f': {first}' if first else ''}"
        )
    return found
