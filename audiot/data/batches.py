"""Batches of waveforms. Their cuts, order and crops depend only on seed, epoch and cut."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import soundfile
import torch
from lhotse import CutSet
from lhotse.audio.utils import AudioLoadingError
from lhotse.cut import Cut, MonoCut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets
from lhotse.utils import compute_num_samples
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from audiot.base.files import name_bytes
from audiot.base.private import shared_storage
from audiot.base.streams import bits, key
from audiot.data.audio import reason
from audiot.data.labels import Labels, speaker_of
from audiot.data.loaders import WatchedLoader
from audiot.data.shards import decode_member, member_size, read_members
from audiot.data.shared_memory import REMEDY, shared_memory_errors
from audiot.features import Features

WINDOW = 20_000  # cuts that are shuffled together when a manifest is streamed from disk
AHEAD = 4  # batches that a loader process makes in advance
BUCKETED = 10_000  # cuts from whose durations the bucket limits are computed
SCALE = 2.0**-15  # factor from 16-bit samples to floats, as in soundfile

Batch = dict[str, Any]


class Piece(NamedTuple):
    """Samples [begin, begin + num_samples) of a mono file. A loader without labels needs no more of a cut."""

    id: str
    path: str
    begin: int
    num_samples: int
    sampling_rate: int
    cut: Cut | None = None  # a cut that only Lhotse can read; ``begin`` counts from its start
    in_shard: bool = False  # whether ``path`` is a place in a shard (see `audiot.data.shards`)

    @property
    def duration(self) -> float:
        """Duration in seconds."""
        return self.num_samples / self.sampling_rate

    @classmethod
    def of(cls, cut: Cut | Piece) -> Piece:
        """The piece that covers a whole cut."""
        if isinstance(cut, Piece):
            return cut
        recording = cut.recording if isinstance(cut, MonoCut) and cut.has_recording else None
        if recording is not None and len(recording.sources) == 1 and not recording.transforms:
            (source,) = recording.sources
            if source.type == "file" and source.channels == [cut.channel] and source.source.lower().endswith((".wav", ".flac")):
                begin = compute_num_samples(cut.start, cut.sampling_rate)
                return cls(cut.id, source.source, begin, cut.num_samples, cut.sampling_rate)
            if source.type == "shar":
                begin = compute_num_samples(cut.start, cut.sampling_rate)
                return cls(cut.id, source.source, begin, cut.num_samples, cut.sampling_rate, in_shard=True)
            if source.type not in (
                "file",
                "memory",
            ):  # a manifest's sources are checked when it is read, a prepared folder's here
                raise ValueError(f"the cut {cut.id} has a source of the kind {source.type!r}: no corpus that audiot prepared has")
        return cls(cut.id, "", 0, cut.num_samples, cut.sampling_rate, cut)

    def read(self, out: np.ndarray, data: bytes | None = None) -> np.ndarray:
        """Samples (num_samples,). A 16-bit file is read into ``out`` (int16), any other kind into a new float32 array.

        Args:
            out: Room for samples (num_samples,).
            data: Content of the file, of a piece in a shard.

        Raises:
            AudioLoadingError: the file is gone or has changed.
            StorageError: audio in a shard can't be read, or is damaged.
        """
        if self.in_shard:
            (data,) = [data] if data is not None else read_members([self.path])
            return decode_member(self.path, data, self.begin, self.num_samples, self.sampling_rate, out)
        if self.cut is not None:
            cut, rate = self.cut, self.sampling_rate
            if self.num_samples < cut.num_samples:
                cut = cut.truncate(offset=self.begin / rate, duration=self.num_samples / rate)
            return cut.load_audio()[0]
        try:
            with soundfile.SoundFile(name_bytes(self.path)) as file:
                if (file.channels, file.samplerate) != (1, self.sampling_rate):
                    found = f"found {file.channels} channels at {file.samplerate} Hz, expected one at {self.sampling_rate} Hz"
                    raise self._failed(found)
                if self.begin:
                    file.seek(self.begin)
                if file.subtype == "PCM_16":
                    samples, count = out, file.buffer_read_into(out, "int16")
                else:
                    samples = file.read(self.num_samples, dtype="float32")
                    count = len(samples)
        except (soundfile.SoundFileError, OSError) as error:
            raise self._failed(reason(error)) from error
        if count < self.num_samples:
            raise self._failed(f"found {self.begin + count} samples, expected {self.begin + self.num_samples}")
        return samples

    def floats(self) -> np.ndarray:
        """Samples (num_samples,) in float32. Errors are those of `read`."""
        samples = self.read(np.empty(self.num_samples, np.int16))
        return samples * np.float32(SCALE) if samples.dtype == np.int16 else samples

    def _failed(self, details: str) -> AudioLoadingError:
        return AudioLoadingError(f"Reading audio from '{self.path}' failed. Details: {details}")


Item = tuple[tuple[int, int], Sequence[Piece] | CutSet]


@runtime_checkable
class Shuffled(Protocol):
    """What is streamed from shards in a random order of the shards."""

    def shuffled(self, seed: int) -> Iterable[Any]:
        """The same, in the order that a seed gives."""


def crop_lengths(features: Features, crop_s: float | None, num_lengths: int | None) -> list[int] | None:
    """The few lengths that pre-training crops to, in samples: about k/num_lengths of ``crop_s`` for k = 1, …, num_lengths.

    Each gives a number of tokens that is efficient in matrix products: a multiple of 64 from 512 on, else of 8 from 8 on.

    Args:
        features: Front end of the model.
        crop_s: Longest piece in seconds; None takes whole utterances and returns None.
        num_lengths: Most lengths; None returns None, and crops have ``crop_s`` or are whole shorter utterances.

    Raises:
        ValueError: an argument is not positive, or a crop holds no token.
    """
    if crop_s is None or num_lengths is None:
        return None
    if num_lengths < 1:
        raise ValueError(f"data.num_lengths must be at least 1 or null, found {num_lengths}")
    if crop_s <= 0:
        raise ValueError(f"data.crop_s must be a positive number of seconds, found {crop_s}")
    longest = features.num_tokens(round(crop_s * features.sample_rate))
    if longest < 1:
        needed = features.num_samples(1) / features.sample_rate
        raise ValueError(f"data.crop_s={crop_s:g} is too short: one token needs {needed:.4g} s")
    tokens = [longest * k // num_lengths for k in range(1, num_lengths + 1)]
    tokens = [count // 64 * 64 if count >= 512 else count // 8 * 8 if count >= 8 else count for count in tokens]
    return [features.num_samples(count) for count in sorted({*tokens} - {0})]


class Crop:
    """Crop longer cuts to ``crop_s`` seconds at a position drawn from (seed, epoch, cut id), or at the start without a seed."""

    def __init__(self, crop_s: float, seed: int | None, epoch: int) -> None:
        self.crop_s = crop_s
        self.seed = seed
        self.epoch = epoch

    def __call__(self, cut: Cut) -> Cut:
        """A piece of the cut under the same id, or the cut itself if it is short enough."""
        spare = cut.num_samples - round(self.crop_s * cut.sampling_rate)
        if spare <= 0:
            return cut
        offset = 0 if self.seed is None else key("crop", self.seed, self.epoch, cut.id) % (spare + 1)
        return cut.truncate(offset=offset / cut.sampling_rate, duration=self.crop_s, preserve_id=True)


class BatchStream(Sampler[Item]):
    """Batches within a budget of seconds, with cuts of similar duration (Lhotse's ``DynamicBucketingSampler``) or of one length.

    With ``lengths``, training crops each cut to the longest of the lengths that fits, at a position drawn from (seed, epoch, cut
    id). A batch holds cuts of one length, so nothing is padded. The part of a cut that is left out changes from epoch to epoch.
    Cuts shorter than all lengths stay whole and share batches. Each epoch ends with the incomplete batches.

    One sampler makes the batches of all ranks, and rank r of N takes batches r, r + N, … of one sequence through all epochs. So N
    ranks take the steps of one rank that adds up N batches per step. Yields ((epoch, batch), cuts).

    Args:
        cuts: Cuts of one split, held in memory or streamed by an iterable. Without labels they may be pieces.
        batch_s: Seconds of audio per batch, without padding.
        max_utterances: Most utterances per batch; None means as many as the seconds allow.
        num_buckets: Number of buckets of similar duration, used without ``lengths``.
        seed: Seed of the order and the crops.
        training: Whether to shuffle, crop at random, and go on for endless epochs. Otherwise there is one ordered pass over the
            first ``crop_s`` seconds of every cut, in batches small enough that every rank has one and shares the work.
        crop_s: Longest piece of a cut in seconds; None takes whole cuts.
        lengths: Increasing lengths in samples to which training crops; None crops to ``crop_s``.
        start: Epoch, and number of batches to leave out from its start, over all ranks. They may be more than the epoch has.

    Raises:
        ValueError: on iteration, if there is nothing to train on, or fewer cuts than ranks to validate on.
    """

    def __init__(
        self,
        cuts: CutSet | Iterable[Piece],
        batch_s: float,
        *,
        training: bool,
        num_buckets: int = 10,
        seed: int = 0,
        crop_s: float | None = None,
        lengths: Sequence[int] | None = None,
        max_utterances: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.cuts = cuts
        self.max_utterances = max_utterances
        self.batch_s = batch_s
        self.training = training
        self.num_buckets = num_buckets
        self.seed = seed
        self.crop_s = crop_s
        self.lengths = lengths if training else None
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def _similar_durations(self, epoch: int) -> Iterator[CutSet]:
        cuts = self._in_order(epoch)
        assert isinstance(cuts, CutSet)
        held = not cuts.is_lazy
        num_buckets = min(self.num_buckets, len(cuts)) if held else self.num_buckets  # at most one bucket per cut
        if self.crop_s is not None:
            cuts = cuts.map(Crop(self.crop_s, self.seed if self.training else None, epoch))
        bins = None
        if held:  # Lhotse needs a limit between buckets and finds none among a few cuts of one length
            found = estimate_duration_buckets(islice(cuts, BUCKETED), num_buckets) if num_buckets > 1 else []
            bins = found or [self.batch_s]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using DynamicBucketingSampler with an eagerly read")
            sampler = DynamicBucketingSampler(
                cuts,
                max_duration=self.batch_s,
                max_cuts=self._most_cuts(cuts),
                num_buckets=num_buckets,
                duration_bins=bins,
                num_cuts_for_bins_estimate=BUCKETED,
                shuffle=self.training,
                seed=self.seed,
                world_size=1,
                rank=0,
            )
        sampler.set_epoch(epoch)
        for batch in sampler:
            yield from self._within_seconds(batch)

    def _in_order(self, epoch: int) -> CutSet | Iterable[Piece]:
        """The cuts of an epoch. Those in shards come shard by shard, in training in another order of the shards each epoch."""
        source = self.cuts.data if isinstance(self.cuts, CutSet) else self.cuts
        if not self.training or not isinstance(source, Shuffled):
            return self.cuts
        shuffled = source.shuffled(key("shards", self.seed, epoch))
        return CutSet(shuffled) if isinstance(self.cuts, CutSet) else shuffled

    def _within_seconds(self, batch: CutSet) -> Iterator[CutSet]:
        """The batch, or two if it has too many seconds: Lhotse takes the last cut as no longer than those before it."""
        seconds = [cut.duration for cut in batch]
        if len(seconds) == 1 or sum(seconds) <= self.batch_s:
            yield batch
            return
        first = min(range(1, len(seconds)), key=lambda count: max(sum(seconds[:count]), sum(seconds[count:])))
        cuts = list(batch)
        yield from (CutSet.from_cuts(cuts[:first]), CutSet.from_cuts(cuts[first:]))

    def _most_cuts(self, cuts: CutSet) -> int | None:
        if self.training or self.world_size == 1:
            return self.max_utterances
        count = sum(1 for _ in cuts)
        if count < self.world_size:
            raise ValueError(
                f"there are {count} utterances to validate or test on and {self.world_size} processes, each of which needs one: "
                "lower trainer.devices or bring more"
            )
        return min(count // self.world_size, self.max_utterances or count)

    def _equal_lengths(self, lengths: Sequence[int], epoch: int) -> Iterator[list[Cut | Piece]]:
        """Uncropped cuts, in batches that get one length. The caller crops them.

        A manifest in memory is shuffled as a whole. A streamed one is shuffled within windows: for each cut taken from a window,
        one cut of the next window is read.
        """
        source = iter(self._in_order(epoch))
        held = isinstance(self.cuts, Sequence) or (isinstance(self.cuts, CutSet) and not self.cuts.is_lazy)
        size = len(self.cuts) if held else WINDOW  # type: ignore[arg-type]
        window, number = list(islice(source, size)), 0
        rate = window[0].sampling_rate if window else 1
        most = [max(1, round(self.batch_s * rate) // length) for length in (lengths[0], *lengths)]
        most = [min(count, self.max_utterances or count) for count in most]
        buckets: list[list[Cut | Piece]] = [[] for _ in most]
        while window:
            following: list[Cut | Piece] = []
            seed = torch.tensor([key("order", self.seed, epoch, number)])
            for place in bits(seed, len(window))[0].argsort().tolist():
                cut = window[place]
                bucket = bisect_right(lengths, cut.num_samples)
                buckets[bucket].append(cut)
                if len(buckets[bucket]) == most[bucket]:
                    following += islice(source, most[bucket])
                    yield buckets[bucket]
                    buckets[bucket] = []
            following += islice(source, max(0, size - len(following)))
            window, number = following, number + 1
        yield from filter(None, buckets)

    def _cropped(self, lengths: Sequence[int], epoch: int, cut: Cut | Piece) -> Piece:
        piece = Piece.of(cut)
        place = bisect_right(lengths, piece.num_samples)
        if place == 0:
            return piece
        length = lengths[place - 1]
        offset = key("crop", self.seed, epoch, piece.id) % (piece.num_samples - length + 1)
        return piece._replace(begin=piece.begin + offset, num_samples=length)

    def _item(self, epoch: int, number: int, cuts: Sequence[Cut | Piece] | CutSet) -> Item:
        lengths = self.lengths
        return (epoch, number), cuts if lengths is None else [self._cropped(lengths, epoch, cut) for cut in cuts]

    def __iter__(self) -> Iterator[Item]:
        epoch, left_out = self.start
        place = -left_out  # in the sequence of all ranks
        while True:
            begin = place
            batches = self._similar_durations(epoch) if self.lengths is None else self._equal_lengths(self.lengths, epoch)
            for number, cuts in enumerate(batches):
                if place >= 0 and place % self.world_size == self.rank:
                    yield self._item(epoch, number, cuts)
                place += 1
            if not self.training:
                return
            if place == begin:
                raise ValueError("the training split has no utterance: bring more audio")
            epoch += 1


class SpeechDataset(Dataset[Batch]):
    """Load and collate the cuts of a batch.

    A batch is a dict: ``waveforms`` (B, N), zero-padded, int16 if all files have 16 bits, else float32 (`to_device` makes equal
    floats of both); ``lengths`` (B,) in samples; ``keys`` (B,) of the utterances' random numbers; ``ids``; ``position`` (epoch,
    batch); ``bytes_read`` where audio comes from shards. With labels also ``labels`` (B,) or (B, …) padded with ``IGNORED``, and
    ``speakers`` (None where a cut has not one).

    Args:
        seed: Seed of the random keys; None derives keys from the cut alone (validation).
        labels: Labels of the task.
        index: Label name → class index.
    """

    def __init__(self, seed: int | None, labels: Labels | None = None, index: dict[str, int] | None = None) -> None:
        self.seed = seed
        self.labels = labels
        self.index = index or {}

    def _key(self, name: str, epoch: int) -> int:
        return key("validation", name) if self.seed is None else key("corruption", self.seed, epoch, name)

    def __getitem__(self, item: Item) -> Batch:
        position, cuts = item
        pieces = [Piece.of(cut) for cut in cuts]
        batch: Batch = {
            "waveforms": load(pieces),
            "lengths": _small_tensor([piece.num_samples for piece in pieces]),
            "keys": _small_tensor([self._key(piece.id, position[0]) for piece in pieces]),
            "ids": [piece.id for piece in pieces],
            "position": position,
        }
        if any(piece.in_shard for piece in pieces):
            batch["bytes_read"] = sum(member_size(piece.path) for piece in pieces if piece.in_shard)
        if self.labels is not None:
            assert isinstance(cuts, CutSet)
            batch["labels"] = shared(self.labels.collate([self.labels.encode(cut, self.index) for cut in cuts]))
            batch["speakers"] = [speaker_of(cut) for cut in cuts]
        return batch


def load(pieces: Sequence[Piece]) -> Tensor:
    """Waveforms (B, N) of pieces, zero-padded: int16 if all files have 16 bits, else float32.

    Raises:
        AudioLoadingError: a file is gone or has changed.
        StorageError: audio in a shard can't be read, or is damaged.
    """
    waveforms = _shared(len(pieces), max(piece.num_samples for piece in pieces))
    floats: dict[int, np.ndarray] = {}
    contents = iter(read_members([piece.path for piece in pieces if piece.in_shard]))
    for row, piece in enumerate(pieces):
        out = waveforms[row, : piece.num_samples].numpy()
        samples = piece.read(out, next(contents) if piece.in_shard else None)
        if samples is not out:
            floats[row] = samples
        waveforms[row, piece.num_samples :] = 0
    if not floats:
        return waveforms
    waveforms = waveforms.float().mul_(SCALE)
    for row, samples in floats.items():
        waveforms[row, : len(samples)] = torch.from_numpy(samples)
    return shared(waveforms)


def _shared(num_rows: int, num_columns: int) -> Tensor:
    """An empty int16 tensor. In a worker it lies in shared memory, so it reaches the main process without a copy."""
    if get_worker_info() is None:
        return torch.empty(num_rows, num_columns, dtype=torch.int16)
    size = 2 * num_rows * num_columns
    with shared_memory_errors(size):
        storage = shared_storage(size)
    return torch.empty(0, dtype=torch.int16).set_(storage, 0, (num_rows, num_columns))  # type: ignore[call-overload]


def shared(tensor: Tensor, remedy: str = REMEDY) -> Tensor:
    """The tensor, moved to shared memory in a worker. A lack of room is reported here, which the sending thread cannot do."""
    if get_worker_info() is None:
        return tensor
    with shared_memory_errors(tensor.nbytes, remedy):
        return tensor.share_memory_()


class _SmallTensor:
    """Small tensor sent as numbers in the message, which is faster than the file descriptor that PyTorch sends."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.tensor, (self.numbers,)


def _small_tensor(numbers: list[int]) -> Tensor | _SmallTensor:
    return torch.tensor(numbers) if get_worker_info() is None else _SmallTensor(numbers)


def _as_it_is(batch: Batch) -> Batch:
    return batch  # PyTorch's default would search every entry for arrays


def _place(batch: Batch) -> str:
    epoch, number = batch["position"]
    return f"batch {number:,} of epoch {epoch:,}"


def make_loader(dataset: SpeechDataset, stream: BatchStream, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Loader of whole batches. The processes of validation are kept for the next validation."""
    return WatchedLoader(
        dataset,
        place=_place,
        remedy="data.num_workers or data.batch_s",
        sampler=stream,
        batch_size=None,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0 and not stream.training,
        prefetch_factor=AHEAD if num_workers else None,
    )


class FirstBatches:
    """The first batches of a loader, equal in every epoch.

    Args:
        loader: Loader of the batches. It is iterated once.
        count: Most batches to keep.
    """

    def __init__(self, loader: Iterable[Batch], count: int) -> None:
        self.batches = list(islice(loader, count))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def first_batches(loader: DataLoader[Batch], trainer: Any) -> Iterable[Batch]:
    """The loader, or its first ``trainer.overfit_batches`` batches. Lightning itself would replace the sampler.

    Args:
        loader: Loader of training or validation batches.
        trainer: Lightning's trainer, or None.
    """
    count = int(trainer.overfit_batches) if trainer else 0
    return FirstBatches(loader, count) if count else loader


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch's tensors to a device, except ``lengths``: on the CPU they tell without synchronisation what is padded.

    16-bit waveforms become floats there, exactly. A GPU copies them in a separate stream while it computes the step before.
    """
    if device.type != "cuda":
        return _moved(batch, device)
    aside, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(aside):
        moved = _moved(batch, device)
    current.wait_stream(aside)
    for value in moved.values():
        if isinstance(value, Tensor) and value.is_cuda:
            value.record_stream(current)  # keeps the memory from being reused before that stream is done
    return moved


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _moved(batch: Batch, device: torch.device) -> Batch:
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "lengths" else value
        for name, value in batch.items()
    }
    waveforms = moved.get("waveforms")
    if waveforms is not None and waveforms.dtype == torch.int16:
        moved["waveforms"] = waveforms.float().mul_(SCALE)
    return moved
