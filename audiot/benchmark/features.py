"""``audiot benchmark benchmark=features``: the speed of each front end, beside torchaudio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from audiot.base.console import say
from audiot.base.files import write_csv, write_text
from audiot.base.groups import options, read_option
from audiot.base.pairing import torchaudio
from audiot.base.streams import key
from audiot.base.tables import aligned, markdown
from audiot.benchmark.measure import time_of
from audiot.benchmark.settings import check_choices, check_counts, find_device
from audiot.features import MFCC, Features, KaldiFbank, LogMel, Spectrogram

TOLERANCE = 2e-3  # largest difference from torchaudio's normalised features
WARM_UP = 2  # calls


class FeatureBenchmark:
    """Time of a batch in each front end, and in torchaudio's functions for one utterance after the other, in the same rounds.

    Both compute normalised features: they add deltas, subtract the mean of each utterance and divide by its deviation. Their
    results are compared first.

    Args:
        features: Names of `conf/features`.
        utterances: Utterances per batch.
        duration_s: Duration of an utterance.
        rounds: Number of rounds. The median is told.
        device: ``auto``, ``cpu``, ``cuda``, …
        seed: Seed of the noise.

    Raises:
        ValueError: an unknown name or an impossible size.
    """

    key = ("features", "channels")
    figure = "audiot_ms"

    def __init__(
        self, features: Sequence[str], utterances: int, duration_s: float, rounds: int, device: str = "auto", seed: int = 0
    ) -> None:
        check_choices("features", features, options("features"))
        check_counts(utterances=utterances, rounds=rounds)
        self.device = find_device(device)
        self.duration_s = duration_s
        self.rounds = rounds
        self.front_ends = {name: instantiate(read_option("features", name)).to(self.device) for name in features}
        num_samples = round(duration_s * 16000)
        for name, front_end in self.front_ends.items():
            if front_end.is_trained:
                raise ValueError(f"benchmark.features={name} is trained, and torchaudio has no such function: leave it out")
            if front_end.num_tokens(num_samples) < 2:
                raise ValueError(f"benchmark.duration_s={duration_s} is shorter than two frames of {name}")
        generator = torch.Generator().manual_seed(key("feature benchmark", seed))
        self.waveforms = 0.1 * torch.randn(utterances, num_samples, generator=generator).to(self.device)

    def report(self, run: Path, machine: dict[str, Any]) -> None:
        """Measure. Write ``results.csv`` and ``table.md``, and print the table.

        Raises:
            ValueError: a front end does not compute what torchaudio does.
        """
        audio_s = self.duration_s * len(self.waveforms)
        rows = []
        for name, front_end in self.front_ends.items():
            self._check(name, front_end)
            ours, theirs = self._times([self._batch(front_end), self._one_by_one(front_end)])
            rows.append(
                {
                    "features": name,
                    "channels": front_end.num_channels,
                    "audiot_ms": round(1000 * ours, 2),
                    "torchaudio_ms": round(1000 * theirs, 2),
                    "ratio": round(theirs / ours, 2),
                    "times_real_time": round(audio_s / ours),
                }
            )
        write_csv(run / "results.csv", rows)
        table = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
        batch = f"{len(self.waveforms)} × {self.duration_s:g} s"
        title = f"{batch}, {machine['device']}, {machine['threads']} threads, median of {self.rounds}"
        write_text(run / "table.md", f"{title}\n\n{markdown(table)}\n")
        say(f"\n{title}\n{aligned(table)}\n\nrun     {run}\nfiles   table.md, results.csv, machine.json")
        say(f"next:   audiot pretrain features={rows[0]['features']}")

    def _batch(self, front_end: Features) -> Callable[[], Tensor]:
        return lambda: front_end(self.waveforms)[0]

    def _one_by_one(self, front_end: Features) -> Callable[[], Tensor]:
        frames = torchaudio_frames(front_end, self.device)
        return lambda: torch.stack([_normalised(frames(waveform[None]), front_end) for waveform in self.waveforms])

    def _check(self, name: str, front_end: Features) -> None:
        error = (self._batch(front_end)() - self._one_by_one(front_end)()).abs().max().item()
        if not error < TOLERANCE:
            raise ValueError(
                f"{name} is off by {error:.1e} from torchaudio, {TOLERANCE:g} was expected at most: report it, please"
            )

    def _times(self, calls: Sequence[Callable[[], Tensor]]) -> list[float]:
        """Median seconds of each call. They take turns, so that whatever slows the machine down affects all of them."""
        for call in calls:
            time_of(call, WARM_UP, self.device)
        taken = [[time_of(call, 1, self.device) for call in calls] for _ in range(self.rounds)]
        return [median(times) for times in zip(*taken, strict=True)]


def torchaudio_frames(front_end: Features, device: torch.device) -> Callable[[Tensor], Tensor]:
    """torchaudio's form of a front end, from one waveform (1, N) to frames (T, channels) before deltas."""
    if isinstance(front_end, (KaldiFbank, MFCC)):
        rate = front_end.sample_rate
        shape = {
            "frame_length": 1000 * front_end.win_length / rate,
            "frame_shift": 1000 * front_end.hop_length / rate,
            "sample_frequency": rate,
            "num_mel_bins": front_end.filters.shape[1],
        }
        if isinstance(front_end, KaldiFbank):
            return lambda waveform: torchaudio("compliance.kaldi").fbank(waveform, **shape)
        return lambda waveform: torchaudio("compliance.kaldi").mfcc(waveform, num_ceps=front_end.num_channels, **shape)
    assert isinstance(front_end, (LogMel, Spectrogram))
    shape = {"n_fft": front_end.n_fft, "win_length": front_end.win_length, "hop_length": front_end.hop_length, "center": False}
    if isinstance(front_end, LogMel):
        transform: torch.nn.Module = torchaudio("transforms").MelSpectrogram(
            front_end.sample_rate, n_mels=front_end.num_channels, **shape
        )
    else:
        transform = torchaudio("transforms").Spectrogram(**shape)
    transform = transform.to(device)
    return lambda waveform: transform(waveform)[0].T.clamp(min=front_end.floor).log()


def _normalised(frames: Tensor, front_end: Features) -> Tensor:
    """Deltas by torchaudio and normalisation of an utterance by PyTorch: (T, channels) → (T, C)."""
    channels = [frames]
    for _ in range(front_end.delta_order):
        channels.append(torchaudio("functional").compute_deltas(channels[-1].T, front_end.delta_window).T)
    joined = torch.cat(channels, dim=-1)
    return (joined - joined.mean(0)) / joined.std(0).clamp(min=front_end.eps)
