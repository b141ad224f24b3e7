"""LightningDataModule over a prepared corpus."""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lhotse import CutSet
from torch.utils.data import DataLoader

from audiot.data.batches import Batch, BatchStream, SpeechDataset, make_loader, to_device
from audiot.data.labels import Labels, survey
from audiot.data.prepare import PreparedCorpus
from audiot.random import key

EAGER_CUTS = 50_000  # a manifest of up to so many cuts is held in memory; a larger one is read from disk as it goes


@lru_cache(maxsize=8)
def open_cuts(directory: Path, split: str) -> CutSet:
    """Cuts of a prepared split; one that is held in memory is read once a process, whatever number of tasks use it."""
    corpus = PreparedCorpus.load(directory)
    cuts = corpus.cuts(split)
    return cuts.to_eager() if corpus.counts[split] <= EAGER_CUTS else cuts


class SpeechDataModule(pl.LightningDataModule):
    """Batches of a prepared corpus for one task.

    The training loader never ends; it goes on after the batches consumed, which the checkpoint records, so that a resumed run
    sees what the unbroken one would have seen.

    Args:
        corpus: A prepared corpus.
        task: ``pretrain`` or the task whose splits are wanted.
        batch_s: Seconds of audio in a batch.
        crop_s: Longest piece of an utterance, seconds: at random in training, else the first; None: whole utterances.
        num_buckets: Buckets of similar duration.
        num_workers: Loader processes.
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
        num_buckets: int = 10,
        num_workers: int = 1,
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
        self.corpus = corpus
        self.task = task
        self.batch_s = batch_s
        self.crop_s = crop_s
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
        """Cuts of the split that the task uses as ``train``, ``valid`` or ``test``."""
        return open_cuts(self.corpus.directory, self.corpus.split_for(self.task, role))

    def training_cuts(self) -> CutSet:
        """Training cuts after ``label_fraction``."""
        cuts = self.cuts("train")
        if self.label_fraction == 1:
            return cuts
        ranked = sorted(cuts, key=lambda cut: key("label_fraction", self.seed, cut.id))
        return CutSet.from_cuts(ranked[: ceil(self.label_fraction * len(ranked))])

    def _loader(self, cuts: CutSet, training: bool) -> DataLoader[Batch]:
        trainer = self.trainer
        stream = BatchStream(
            cuts,
            self.batch_s,
            training=training,
            num_buckets=self.num_buckets,
            seed=self.seed,
            crop_s=self.crop_s,
            max_utterances=self.max_utterances,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            start=self.next_batch if training else (0, 0),
        )
        dataset = SpeechDataset(self.seed if training else None, self.labels, self.index)
        return make_loader(dataset, stream, self.num_workers, pin_memory=torch.cuda.is_available())

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless shuffled batches, from ``next_batch`` on."""
        return self._loader(self.training_cuts(), training=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation split, in order."""
        return self._loader(self.cuts("valid"), training=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test split, in order."""
        return self._loader(self.cuts("test"), training=False)

    def ordered_loader(self, role: str) -> DataLoader[Batch]:
        """One pass in order over a role's cuts (``train`` after ``label_fraction``)."""
        return self._loader(self.training_cuts() if role == "train" else self.cuts(role), training=False)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Tensors to the device, lengths excepted."""
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
