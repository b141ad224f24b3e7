"""LightningDataModule over a prepared corpus."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lhotse import CutSet
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from audiot.base.streams import key
from audiot.data.batches import AHEAD, Batch, BatchStream, Piece, SpeechDataset, first_batches, make_loader, to_device
from audiot.data.labels import Labels, survey
from audiot.data.prepare import PreparedCorpus, usable_cores
from audiot.data.shared_memory import check_room

log = logging.getLogger("audiot")
EAGER_CUTS = 50_000  # a manifest of up to so many cuts is held in memory; a larger one is read from disk as it goes
MOST_WORKERS = 8  # a training process; one loads some 10,000 times real time, a small model on an H100 takes 23,000


@lru_cache(maxsize=8)
def open_cuts(directory: Path, split: str, supervisions: bool = True, content: str | None = None) -> CutSet:
    """Cuts of a prepared split; one that is held in memory is read once a process, whatever number of tasks use it.

    Args:
        directory: The prepared folder.
        split: Name of the split.
        supervisions: Keep the labels.
        content: The corpus's ``content``: a folder that was updated is read again.
    """
    corpus = PreparedCorpus.load(directory)
    cuts = corpus.cuts(split)
    if not supervisions:  # which a crop would copy, and a worker be sent
        cuts = cuts.drop_supervisions()
    return cuts.to_eager() if corpus.counts[split] <= EAGER_CUTS else cuts


class PreparedPieces:
    """Whole cuts of a prepared split as pieces, read from disk as they are iterated, without what Lhotse would make of them."""

    def __init__(self, directory: Path, split: str) -> None:
        self.directory = directory.absolute()
        self.split = split

    def __iter__(self) -> Iterator[Piece]:
        with gzip.open(self.directory / f"{self.split}.jsonl.gz", "rb") as stream:
            for line in stream:
                recording = json.loads(line)["recording"]  # a cut is the whole of its own
                path = os.path.join(self.directory, recording["sources"][0]["source"])  # absolute ones stay what they are
                yield Piece(recording["id"], path, 0, recording["num_samples"], recording["sampling_rate"])


@lru_cache(maxsize=8)
def open_pieces(directory: Path, split: str, content: str | None = None) -> Iterable[Piece]:
    """Like `open_cuts`, for those who want audio alone."""
    pieces = PreparedPieces(directory, split)
    return list(pieces) if PreparedCorpus.load(directory).counts[split] <= EAGER_CUTS else pieces


def useful_workers(processes: int, on_gpu: bool) -> int:
    """Loader processes of each of so many training processes on this machine: ``data.num_workers: auto``.

    A training process keeps a core for itself. One worker loads more than CPUs can train on, and takes cores from them.
    """
    return max(1, min(usable_cores() // processes - 1, MOST_WORKERS)) if on_gpu else 1


@cache
@rank_zero_only
def warn_of_many(option: str, workers: int, remedy: str) -> None:
    """Say once that loader processes are more than the cores of this machine; PyTorch says so of every loader, and longer."""
    cores = usable_cores()
    if workers > cores:
        log.warning(f"{option}{workers}: so many loader processes share {cores} core{'s' if cores > 1 else ''}; {remedy}")


class SpeechDataModule(pl.LightningDataModule):
    """Batches of a prepared corpus for one task.

    The training loader never ends; it goes on after the batches consumed, which the checkpoint records, so that a resumed run
    sees what the unbroken one would have seen.

    Args:
        corpus: A prepared corpus.
        task: ``pretrain`` or the task whose splits are wanted.
        batch_s: Seconds of audio in a batch.
        crop_s: Longest piece of an utterance, seconds: at random in training, else the first; None: whole utterances.
        lengths: In training, the lengths in samples that pieces have instead (see `crop_lengths`); not with labels.
        num_buckets: Buckets of similar duration, where there are no ``lengths``.
        num_workers: Loader processes; ``auto``: as many as are of use on this machine.
        seed: Of order, crops and corruption.
        labels: How to read the task's labels; None: none.
        max_utterances: Most utterances in a batch; None: as many as ``batch_s`` allows.
        new_speakers: The task is about speakers that training has not heard; an overlap is refused.
        label_fraction: Share of the training utterances used, chosen by a hash of seed and utterance.
    """

    def __init__(
        self,
        corpus: PreparedCorpus,
        task: str,
        *,
        batch_s: float,
        crop_s: float | None = None,
        lengths: Sequence[int] | None = None,
        num_buckets: int = 10,
        num_workers: int | str = 1,
        seed: int = 0,
        max_utterances: int | None = None,
        labels: Labels | None = None,
        new_speakers: bool = False,
        label_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < label_fraction <= 1:
            raise ValueError(f"data.label_fraction must be in (0, 1], found {label_fraction}")
        if batch_s <= 0:
            raise ValueError(f"data.batch_s must be a positive number of seconds, found {batch_s}")
        if crop_s is not None and crop_s <= 0:
            raise ValueError(f"data.crop_s must be a positive number of seconds, found {crop_s}")
        if num_buckets < 1:
            raise ValueError(f"data.num_buckets must be at least 1, found {num_buckets}")
        if max_utterances is not None and max_utterances < 1:
            raise ValueError(f"data.max_utterances must be at least 1 or null, found {max_utterances}")
        if num_workers != "auto" and not (isinstance(num_workers, int) and num_workers >= 0):
            raise ValueError(f"data.num_workers must be auto, 0 or more, found {num_workers!r}")
        if lengths is not None and labels is not None:
            raise ValueError("crops of few lengths are for pre-training: labels belong to whole utterances")
        if num_workers != "auto":
            warn_of_many("data.num_workers=", int(num_workers), "data.num_workers=auto takes as many as are of use")
        self.corpus = corpus
        self.task = task
        self.batch_s = batch_s
        self.crop_s = crop_s
        self.lengths = lengths
        self.num_buckets = num_buckets
        self.max_utterances = max_utterances
        self.num_workers = num_workers
        self.seed = seed
        self.labels = labels
        self.label_fraction = label_fraction
        self.next_batch = (0, 0)  # (epoch, batch) that training goes on with
        self.classes: list[str] = []
        if labels is not None:
            self.classes = survey({role: self.cuts(role) for role in ("train", "valid", "test")}, labels, new_speakers)

    @property
    def index(self) -> dict[str, int]:
        """Label name → class."""
        return {name: number for number, name in enumerate(self.classes)}

    def cuts(self, role: str) -> CutSet:
        """Cuts of the split that the task uses as ``train``, ``valid`` or ``test``; without labels, audio alone."""
        corpus = self.corpus
        return open_cuts(corpus.directory, corpus.split_for(self.task, role), self.labels is not None, corpus.content)

    def training_cuts(self) -> CutSet:
        """Training cuts after ``label_fraction``."""
        cuts = self.cuts("train")
        if self.label_fraction == 1:
            return cuts
        ranked = sorted(cuts, key=lambda cut: key("label_fraction", self.seed, cut.id))
        return CutSet.from_cuts(ranked[: ceil(self.label_fraction * len(ranked))])

    @property
    def loader_processes(self) -> int:
        """``num_workers``, or what ``auto`` comes to."""
        return self._useful_workers if self.num_workers == "auto" else int(self.num_workers)

    @property
    def _useful_workers(self) -> int:
        if self.trainer is None:
            return useful_workers(1, torch.cuda.is_available())
        return useful_workers(self.trainer.num_devices, self.trainer.strategy.root_device.type != "cpu")

    def faster_loading(self) -> str:
        """What to do when training waits for data: the remedy of a warning."""
        if self.loader_processes < self._useful_workers:
            return f"set data.num_workers={self._useful_workers} (now {self.loader_processes})"
        why = "audiot benchmark benchmark=data says what is slow"
        return f"{self.loader_processes} loader processes are what this machine has cores for: {why}; a faster disk may help"

    def _loader(self, cuts: CutSet | Iterable[Piece], training: bool) -> DataLoader[Batch]:
        trainer = self.trainer
        stream = BatchStream(
            cuts,
            self.batch_s,
            training=training,
            num_buckets=self.num_buckets,
            seed=self.seed,
            crop_s=self.crop_s,
            lengths=self.lengths,
            max_utterances=self.max_utterances,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            start=self.next_batch if training else (0, 0),
        )
        workers = self.loader_processes
        if not training and isinstance(cuts, CutSet) and not cuts.is_lazy:
            batches = min(len(cuts), ceil(sum(cut.duration for cut in cuts) / self.batch_s))
            workers = min(workers, ceil(batches / AHEAD))  # to start a process takes as long as to make a few batches
        seconds = min(self.batch_s, 3600 * max(self.corpus.hours.values()))  # of 16-bit samples
        check_room(workers, AHEAD, 2 * seconds * self.corpus.sample_rate, trainer.num_devices if trainer else 1)
        dataset = SpeechDataset(self.seed if training else None, self.labels, self.index)
        return make_loader(dataset, stream, workers, pin_memory=torch.cuda.is_available())

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless shuffled batches, from ``next_batch`` on."""
        if self.lengths is None or self.label_fraction < 1:
            return first_batches(self._loader(self.training_cuts(), training=True), self.trainer)
        pieces = open_pieces(self.corpus.directory, self.corpus.split_for(self.task, "train"), self.corpus.content)
        return first_batches(self._loader(pieces, training=True), self.trainer)

    def val_dataloader(self) -> Iterable[Batch]:
        """The validation split, in order."""
        return first_batches(self._loader(self.cuts("valid"), training=False), self.trainer)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test split, in order."""
        return self._loader(self.cuts("test"), training=False)

    def ordered_loader(self, role: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """One pass in order over a role's cuts (``train`` after ``label_fraction``), on a device."""
        cuts = self.training_cuts() if role == "train" else self.cuts(role)
        for batch in self._loader(cuts, training=False):
            yield to_device(batch, torch.device(device))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Tensors to the device, lengths excepted; waveforms become floats there."""
        return to_device(batch, device)

    def consumed(self, batch: Batch) -> None:
        """Note that training has used ``batch``, and the other ranks the batches of the same turn."""
        epoch, number = batch["position"]
        ranks = self.trainer.world_size if self.trainer else 1
        self.next_batch = (epoch, (number // ranks + 1) * ranks)

    def state_dict(self) -> dict[str, Any]:
        """Where training goes on."""
        return {"next_batch": self.next_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore where training goes on."""
        epoch, number = state_dict["next_batch"]
        self.next_batch = (epoch, number)
