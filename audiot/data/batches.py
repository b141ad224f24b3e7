"""Batches of waveforms: which cuts, in which order, cropped where; a function of seed, epoch and cut alone."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from audiot.data.labels import Labels
from audiot.random import key

Batch = dict[str, Any]
Item = tuple[tuple[int, int], CutSet]


class Crop:
    """Cut a piece of ``crop_s`` seconds out of longer cuts: drawn from (seed, epoch, cut id), or with ``seed`` None the first."""

    def __init__(self, crop_s: float, seed: int | None, epoch: int) -> None:
        self.crop_s = crop_s
        self.seed = seed
        self.epoch = epoch

    def __call__(self, cut: Cut) -> Cut:
        """The cut itself when it is short enough, else a piece of it under the same id."""
        spare = cut.num_samples - round(self.crop_s * cut.sampling_rate)
        if spare <= 0:
            return cut
        offset = 0 if self.seed is None else key("crop", self.seed, self.epoch, cut.id) % (spare + 1)
        return cut.truncate(offset=offset / cut.sampling_rate, duration=self.crop_s, preserve_id=True)


class BatchStream(Sampler[Item]):
    """Batches by similar duration within a budget of seconds, from Lhotse's ``DynamicBucketingSampler``.

    One sampler makes every rank's batches, and rank r of N takes batches r, r + N, …: any number of ranks sees the same ones.
    Yields ((epoch, batch), cuts).

    Args:
        cuts: Of one split.
        batch_s: Seconds of audio in a batch, padding not counted.
        max_utterances: Most utterances in a batch; None: as many as the seconds allow.
        num_buckets: Buckets of similar duration.
        seed: Of the order and the crops.
        training: Shuffle, crop at random, and go on epoch after epoch without end; batches that don't fill a turn of all ranks
            are left out. Otherwise: one pass in order over every cut, of which the first ``crop_s`` seconds are taken.
        crop_s: Longest piece of a cut, seconds; None: whole cuts.
        start: First (epoch, batch), batch being the number within the epoch over all ranks.
    """

    def __init__(
        self,
        cuts: CutSet,
        batch_s: float,
        *,
        training: bool,
        num_buckets: int = 10,
        seed: int = 0,
        crop_s: float | None = None,
        max_utterances: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.cuts = cuts
        self.max_utterances = max_utterances
        self.batch_s = batch_s
        self.training = training
        self.num_buckets = num_buckets if cuts.is_lazy else min(num_buckets, len(cuts))  # no more buckets than cuts
        self.seed = seed
        self.crop_s = crop_s
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def _epoch(self, epoch: int) -> Iterator[CutSet]:
        cuts = self.cuts
        if self.crop_s is not None:
            cuts = cuts.map(Crop(self.crop_s, self.seed if self.training else None, epoch))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using DynamicBucketingSampler with an eagerly read")
            sampler = DynamicBucketingSampler(
                cuts,
                max_duration=self.batch_s,
                max_cuts=self.max_utterances,
                num_buckets=self.num_buckets,
                duration_bins=[self.batch_s] if self.num_buckets == 1 else None,  # Lhotse wants two; longer cuts are alone anyway
                shuffle=self.training,
                seed=self.seed,
                world_size=1,
                rank=0,
            )
        sampler.set_epoch(epoch)
        yield from sampler

    def __iter__(self) -> Iterator[Item]:
        epoch, first = self.start
        while True:
            turn: list[Item] = []
            full_turns = 0
            for number, cuts in enumerate(self._epoch(epoch)):
                if not self.training:
                    if number % self.world_size == self.rank:
                        yield (epoch, number), cuts
                    continue
                turn.append(((epoch, number), cuts))
                if len(turn) == self.world_size:
                    full_turns += 1
                    if turn[0][0][1] >= first:
                        yield turn[self.rank]
                    turn = []
            if not self.training:
                return
            if not full_turns:
                raise ValueError(
                    f"the training audio gives fewer batches of {self.batch_s} s than there are processes ({self.world_size}): "
                    "lower data.batch_s or bring more audio"
                )
            epoch, first = epoch + 1, 0


class SpeechDataset(Dataset[Batch]):
    """Load and collate the cuts of a batch.

    Gives a dict: ``waveforms`` (B, N) float32, zero-padded; ``lengths`` (B,) samples; ``keys`` (B,) of the utterances' random
    numbers; ``ids``; ``position`` (epoch, batch); and with labels, ``labels`` (B,) or (B, …) padded with ``IGNORED``, and
    ``speakers``.

    Args:
        seed: Of the random keys; None: keys that depend on the cut alone (validation).
        labels: Of the task.
        index: Label name → class.
    """

    def __init__(self, seed: int | None, labels: Labels | None = None, index: dict[str, int] | None = None) -> None:
        self.seed = seed
        self.labels = labels
        self.index = index or {}

    def _key(self, cut: Cut, epoch: int) -> int:
        return key("validation", cut.id) if self.seed is None else key("corruption", self.seed, epoch, cut.id)

    def __getitem__(self, item: Item) -> Batch:
        position, cuts = item
        waveforms = [torch.from_numpy(cut.load_audio()[0]) for cut in cuts]
        batch: Batch = {
            "waveforms": pad_sequence(waveforms, batch_first=True),
            "lengths": torch.tensor([len(waveform) for waveform in waveforms]),
            "keys": torch.tensor([self._key(cut, position[0]) for cut in cuts]),
            "ids": [cut.id for cut in cuts],
            "position": position,
        }
        if self.labels is not None:
            batch["labels"] = self.labels.collate([self.labels.encode(cut, self.index) for cut in cuts])
            batch["speakers"] = [cut.supervisions[0].speaker if cut.supervisions else None for cut in cuts]
        return batch


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers itself


def make_loader(dataset: SpeechDataset, stream: BatchStream, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Loader of whole batches, with workers that leave Ctrl-C to the main process."""
    return DataLoader(
        dataset,
        sampler=stream,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        worker_init_fn=_ignore_interrupt,
        prefetch_factor=4 if num_workers else None,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch's tensors, except ``lengths``: on the CPU they tell what is padded without waiting for the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) and name != "lengths" else value
        for name, value in batch.items()
    }
