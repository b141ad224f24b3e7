"""LightningDataModule over a prepared corpus."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cache, lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lhotse import AudioSource, CutSet, Recording
from lhotse.cut import Cut, MonoCut
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from audiot.base.streams import bits, key
from audiot.data.batches import AHEAD, Batch, BatchStream, Piece, SpeechDataset, first_batches, make_loader, to_device
from audiot.data.labels import Labels, survey
from audiot.data.prepare import PreparedCorpus, usable_cores
from audiot.data.shards import Index, Shards, is_sharded, open_shards
from audiot.data.shared_memory import check_room

log = logging.getLogger("audiot")
EAGER_CUTS = 50_000  # manifests with at most so many cuts are held in memory; larger ones are streamed from disk
MOST_WORKERS = 8  # per training process; one loads some 10,000 times real time, a small model on an H100 takes 23,000


@lru_cache(maxsize=8)
def open_cuts(directory: Path, split: str, supervisions: bool = True, content: str | None = None) -> CutSet:
    """Cuts of a prepared split. A split that is held in memory is read once per process, for all tasks.

    Args:
        directory: Prepared folder.
        split: Name of the split.
        supervisions: Whether to keep the labels.
        content: Digest of the corpus, its ``content``. With another digest the folder is read again.
    """
    corpus = PreparedCorpus.load(directory)
    from_index = is_sharded(directory) and not supervisions
    cuts = CutSet(ShardCuts(ShardPieces(directory, split))) if from_index else corpus.cuts(split)
    if not supervisions:  # crops would copy them, and workers would be sent them
        cuts = cuts.drop_supervisions()
    return cuts.to_eager() if corpus.counts[split] <= EAGER_CUTS else cuts


class PreparedPieces:
    """Whole cuts of a prepared split as pieces. They are streamed from disk without making Lhotse objects."""

    def __init__(self, directory: Path, split: str) -> None:
        self.directory = directory.absolute()
        self.split = split

    def __iter__(self) -> Iterator[Piece]:
        if is_sharded(self.directory):
            yield from ShardPieces(self.directory, self.split)
            return
        with gzip.open(self.directory / f"{self.split}.jsonl.gz", "rb") as stream:
            for line in stream:
                recording = json.loads(line)["recording"]  # a prepared cut is its whole recording
                path = os.path.join(self.directory, recording["sources"][0]["source"])  # absolute paths are kept
                yield Piece(recording["id"], path, 0, recording["num_samples"], recording["sampling_rate"])


class ShardPieces:
    """Utterances of a split that lie in shards, as pieces, shard by shard.

    Args:
        directory: Folder of the opened corpus.
        split: Name of the split.
        seed: Seed of the order of the shards; None keeps theirs.
    """

    def __init__(self, directory: Path, split: str, seed: int | None = None) -> None:
        self.shards = open_shards(directory.absolute())
        self.index = open_index(directory.absolute(), self.shards)
        self.split = split
        self.seed = seed

    def shuffled(self, seed: int) -> ShardPieces:
        """The same pieces with the shards in another order."""
        found = copy(self)
        found.seed = seed
        return found

    def __iter__(self) -> Iterator[Piece]:
        numbers, bounds = self.index.splits[self.split], self.index.shards(self.split)
        paths = [f"{self.shards.folder}/{file.name}" for file in self.shards.recordings]
        order = torch.arange(len(bounds) - 1)
        if self.seed is not None:
            order = bits(torch.tensor([self.seed]), len(order))[0].argsort()
        for place in order.tolist():
            for name, path, num_samples in self.index.rows(numbers[bounds[place] : bounds[place + 1]], paths):
                yield Piece(name, path, 0, num_samples, self.shards.sample_rate, in_shard=True)


class ShardCuts:
    """Pieces as Lhotse cuts without labels.

    Args:
        pieces: Pieces that cover whole utterances.
    """

    def __init__(self, pieces: ShardPieces) -> None:
        self.pieces = pieces

    def shuffled(self, seed: int) -> ShardCuts:
        """The same cuts with the shards in another order."""
        return ShardCuts(self.pieces.shuffled(seed))

    def __iter__(self) -> Iterator[Cut]:
        return map(as_cut, self.pieces)


def as_cut(piece: Cut | Piece) -> Cut:
    """A whole utterance in a shard as a Lhotse cut without labels; a cut as it is."""
    if not isinstance(piece, Piece):
        return piece
    source = AudioSource("shar", [0], piece.path)
    recording = Recording(piece.id, [source], piece.sampling_rate, piece.num_samples, piece.duration, channel_ids=[0])
    return MonoCut(piece.id, 0.0, piece.duration, 0, recording=recording)


@lru_cache(maxsize=2)
def open_index(directory: Path, shards: Shards) -> Index:
    """The index of an opened corpus, read once in a process."""
    return shards.index()


@lru_cache(maxsize=8)
def open_pieces(directory: Path, split: str, content: str | None = None) -> Iterable[Piece]:
    """Like `open_cuts`, without labels."""
    if is_sharded(directory):
        return ShardPieces(directory, split)
    pieces = PreparedPieces(directory, split)
    return list(pieces) if PreparedCorpus.load(directory).counts[split] <= EAGER_CUTS else pieces


def useful_workers(processes: int, on_gpu: bool) -> int:
    """Useful number of loader processes for each training process on this machine, for ``data.num_workers: auto``.

    A training process keeps one core. Without a GPU, one worker loads more than training takes, and more would take its cores.
    """
    return max(1, min(usable_cores() // processes - 1, MOST_WORKERS)) if on_gpu else 1


@cache
@rank_zero_only
def warn_of_many(option: str, workers: int, remedy: str) -> None:
    """Warn once if there are more loader processes than cores. PyTorch's warning is longer and comes with every loader."""
    cores = usable_cores()
    if workers > cores:
        log.warning(f"{option}{workers}: more loader processes than cores ({cores} here); {remedy}")


class EndlessData(pl.LightningDataModule):
    """Batches of an endless training, which continues after those that its checkpoint records as used.

    So a resumed run gets the same batches as an unbroken one.
    """

    next_batch = (0, 0)  # epoch at which training continues, and batches to leave out from its start
    bytes_read = 0  # from shards, for the batches that this process has used

    def consumed(self, batch: Batch) -> None:
        """Note that training has used ``batch`` and the other ranks have used the batches of the same turn.

        The turn may end in the next epoch: then ``next_batch`` counts on from the epoch of this batch.
        """
        epoch, number = batch["position"]
        self.bytes_read += batch.get("bytes_read", 0)
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self.next_batch = (epoch, number - rank + ranks)

    def state_dict(self) -> dict[str, Any]:
        """Position at which training continues."""
        return {"next_batch": self.next_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position at which training continues."""
        epoch, number = state_dict["next_batch"]
        self.next_batch = (epoch, number)


class SpeechDataModule(EndlessData):
    """Batches of a prepared corpus for one task.

    Args:
        corpus: Prepared corpus.
        task: Task whose splits are used; ``pretrain`` for pre-training.
        batch_s: Seconds of audio per batch.
        global_batch_s: Seconds of audio per training step, of all batches of all processes together (see
            `audiot.training.trainer.share_step`); None: a training batch has ``batch_s``.
        crop_s: Longest piece of an utterance in seconds, at random in training, else from the start; None takes whole utterances.
        lengths: Lengths in samples to which training crops instead (see `crop_lengths`). They exclude labels.
        num_buckets: Number of buckets of similar duration, used without ``lengths``.
        num_workers: Loader processes; ``auto`` chooses a useful number for this machine.
        seed: Seed of order, crops and corruption.
        labels: Labels of the task; None for no labels.
        max_utterances: Most utterances per batch; None means as many as ``batch_s`` allows.
        new_speakers: Whether other splits must have other speakers than training.
        label_fraction: Share of the training utterances to use, chosen by a hash of seed and utterance.
    """

    def __init__(
        self,
        corpus: PreparedCorpus,
        task: str,
        *,
        batch_s: float,
        global_batch_s: float | None = None,
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
        if global_batch_s is not None and max_utterances is not None:
            raise ValueError("data.global_batch_s and data.max_utterances both say how large a batch is: set one to null")
        if crop_s is not None and crop_s <= 0:
            raise ValueError(f"data.crop_s must be a positive number of seconds, found {crop_s}")
        if num_buckets < 1:
            raise ValueError(f"data.num_buckets must be at least 1, found {num_buckets}")
        if max_utterances is not None and max_utterances < 1:
            raise ValueError(f"data.max_utterances must be at least 1 or null, found {max_utterances}")
        if num_workers != "auto" and not (isinstance(num_workers, int) and num_workers >= 0):
            raise ValueError(f"data.num_workers must be auto, 0 or more, found {num_workers!r}")
        if lengths is not None and labels is not None:
            raise ValueError("data.num_lengths excludes labels, which belong to whole utterances: use it in pre-training")
        if num_workers != "auto":
            warn_of_many("data.num_workers=", int(num_workers), "data.num_workers=auto chooses a useful number")
        self.corpus = corpus
        self.task = task
        self.batch_s = batch_s
        self.global_batch_s = global_batch_s
        self.crop_s = crop_s
        self.lengths = lengths
        self.num_buckets = num_buckets
        self.max_utterances = max_utterances
        self.num_workers = num_workers
        self.seed = seed
        self.labels = labels
        self.label_fraction = label_fraction
        self.classes: list[str] = []
        if labels is not None:
            self.classes = survey({role: self.cuts(role) for role in ("train", "valid", "test")}, labels, new_speakers)

    @property
    def index(self) -> dict[str, int]:
        """Label name → class."""
        return {name: number for number, name in enumerate(self.classes)}

    def cuts(self, role: str) -> CutSet:
        """Cuts of the task's ``train``, ``valid`` or ``test`` split. Without labels they hold only audio."""
        corpus = self.corpus
        return open_cuts(corpus.directory, corpus.split_for(self.task, role), self.labels is not None, corpus.content)

    def _whole(self, role: str) -> Iterable[Cut | Piece]:
        """The cuts of a role. Of millions in shards without labels, pieces, which are made ten times as fast."""
        if self.labels is None and self.corpus.is_sharded:
            return open_pieces(self.corpus.directory, self.corpus.split_for(self.task, role), self.corpus.content)
        return self.cuts(role)

    def training_cuts(self) -> CutSet:
        """Training cuts that ``label_fraction`` keeps."""
        cuts = self.cuts("train")
        if self.label_fraction == 1:
            return cuts
        ranked = sorted(cuts, key=lambda cut: key("label_fraction", self.seed, cut.id))
        return CutSet.from_cuts(ranked[: ceil(self.label_fraction * len(ranked))])

    @property
    def _batches_per_step(self) -> int:
        """Batches that a training step takes, of all processes."""
        return self.trainer.world_size * self.trainer.accumulate_grad_batches if self.trainer else 1

    @property
    def training_batch_s(self) -> float:
        """Seconds of audio per training batch.

        Raises:
            ValueError: so many processes share a step that none has room for one crop.
        """
        if self.global_batch_s is None:
            return self.batch_s
        share = self.global_batch_s / self._batches_per_step
        if self.crop_s is not None and share < self.crop_s:
            raise ValueError(
                f"data.global_batch_s={self.global_batch_s:g} leaves each of {self._batches_per_step} batches {share:g} s, less "
                f"than a crop of data.crop_s={self.crop_s:g}: raise it, use fewer processes, or lower data.crop_s"
            )
        return share

    def state_dict(self) -> dict[str, Any]:
        """Position at which training continues, and in what batches it counts."""
        return super().state_dict() | {"batch_s": self.training_batch_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position at which training continues: to the step where other processes share steps than before."""
        super().load_state_dict(state_dict)
        before, now = state_dict.get("batch_s"), self.training_batch_s
        if self.global_batch_s is not None and before not in (None, now):
            epoch, number = self.next_batch
            self.next_batch = (epoch, round(number * before / now / self._batches_per_step) * self._batches_per_step)

    @property
    def loader_processes(self) -> int:
        """``num_workers``, with ``auto`` resolved."""
        return self._useful_workers if self.num_workers == "auto" else int(self.num_workers)

    @property
    def _useful_workers(self) -> int:
        if self.trainer is None:
            return useful_workers(1, torch.cuda.is_available())
        return useful_workers(self.trainer.num_devices, self.trainer.strategy.root_device.type != "cpu")

    def faster_loading(self) -> str:
        """Advice for a training that waits for data."""
        if self.loader_processes < self._useful_workers:
            return f"set data.num_workers={self._useful_workers} (now {self.loader_processes})"
        why = "audiot benchmark benchmark=data shows what is slow"
        return f"this machine has cores for {self.loader_processes} loader processes: {why}; a faster disk may help"

    def _loader(self, cuts: CutSet | Iterable[Piece], training: bool) -> DataLoader[Batch]:
        trainer = self.trainer
        batch_s = self.training_batch_s if training else self.batch_s
        stream = BatchStream(
            cuts,
            batch_s,
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
            workers = min(workers, ceil(batches / AHEAD))  # starting a process takes as long as making a few batches
        seconds = min(batch_s, 3600 * max(self.corpus.hours.values()))  # seconds of 16-bit samples
        check_room(workers, AHEAD, 2 * seconds * self.corpus.sample_rate, trainer.num_devices if trainer else 1)
        dataset = SpeechDataset(self.seed if training else None, self.labels, self.index)
        return make_loader(dataset, stream, workers, pin_memory=torch.cuda.is_available())

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless shuffled batches, starting at ``next_batch``."""
        if self.lengths is None or self.label_fraction < 1:
            return first_batches(self._loader(self.training_cuts(), training=True), self.trainer)
        pieces = open_pieces(self.corpus.directory, self.corpus.split_for(self.task, "train"), self.corpus.content)
        return first_batches(self._loader(pieces, training=True), self.trainer)

    def val_dataloader(self) -> Iterable[Batch]:
        """The validation split in order."""
        return first_batches(self._loader(self.cuts("valid"), training=False), self.trainer)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test split in order."""
        return self._loader(self.cuts("test"), training=False)

    def ordered_loader(self, role: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """One ordered pass over the cuts of a role (``train`` after ``label_fraction``), on a device."""
        cuts = self.training_cuts() if role == "train" else self.cuts(role)
        for batch in self._loader(cuts, training=False):
            yield to_device(batch, torch.device(device))

    def sample(self, seconds: float, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Batches of training utterances drawn by the seed until they have so many seconds, the same in every process."""
        chosen, left = set(), seconds
        whole = self._whole("train")
        for _, number, duration in sorted(
            (key("sample", self.seed, cut.id), number, cut.duration) for number, cut in enumerate(whole)
        ):
            if left <= 0:
                break
            chosen.add(number)
            left -= duration if self.crop_s is None else min(duration, self.crop_s)
        cuts = CutSet.from_cuts(as_cut(cut) for number, cut in enumerate(whole) if number in chosen)
        for batch in self._loader(cuts, training=False):
            yield to_device(batch, torch.device(device))

    def some(self, role: str, count: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Batches of so many utterances of a role, the same ones whatever the seed; of all where there are fewer."""
        cuts = self._whole(role)
        chosen = {name for _, name in sorted((key("some", cut.id), cut.id) for cut in cuts)[:count]}
        for batch in self._loader(CutSet.from_cuts(as_cut(cut) for cut in cuts if cut.id in chosen), training=False):
            yield to_device(batch, torch.device(device))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move tensors except lengths to the device, where waveforms become floats."""
        return to_device(batch, device)
