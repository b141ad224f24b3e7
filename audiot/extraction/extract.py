"""Encoding a corpus: hidden states of utterances, written in shards of limited size (see `audiot.extraction.states`)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from audiot.base.devices import attention_of_any_shape, to_host
from audiot.base.files import write_csv
from audiot.data.audio import AudioFile, BadAudioError, read_audio, resample, resample_checked
from audiot.data.batches import Piece, shared
from audiot.data.datamodule import useful_workers, warn_of_many
from audiot.data.loaders import WatchedLoader
from audiot.data.prepare import read_cut
from audiot.data.shared_memory import check_room
from audiot.downstream.classifier import by_length, collate, compute_with_fallback
from audiot.downstream.upstream import Upstream
from audiot.extraction.states import Failures, shard_path, stored, write_shard

AHEAD = 2  # batches that a process reads in advance
REMEDY = "--workers {workers} or a smaller --batch-s"
ALONE_S = 600  # seconds of audio; less than this is read before worker processes have started


class Utterance(NamedTuple):
    """One utterance to encode: a whole audio file of any format, a Lhotse cut, or audio in a shard."""

    id: str
    source: str | Cut | Piece
    num_samples: int
    sample_rate: int  # Hz
    prepared: bool = False  # whether preparation has checked the audio already

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.num_samples / self.sample_rate

    def read(self, sample_rate: int) -> np.ndarray:
        """Samples (N,) in float32 at ``sample_rate``, averaged over the channels.

        Raises:
            BadAudioError: the audio cannot be used. The message is the reason.
        """
        if isinstance(self.source, Piece):
            return resample(self.source.floats(), self.sample_rate, sample_rate)
        if not isinstance(self.source, str):
            return resample_checked(read_cut(self.source), self.sample_rate, sample_rate)
        if not self.prepared:
            return read_audio(self.source, sample_rate)
        with AudioFile(self.source) as file:
            return resample(file.read_mono(), file.sample_rate, sample_rate)


def total_seconds(shard: Sequence[Utterance]) -> float:
    """Seconds of audio in all utterances."""
    return sum(utterance.seconds for utterance in shard)


def num_frames(utterance: Utterance, features: Any) -> int:
    """Number of hidden states of an utterance, estimated without decoding it."""
    return features.num_tokens(round(utterance.seconds * features.sample_rate))


def too_short(seconds: float) -> str:
    """The reason why an utterance gives no frame."""
    return f"too short: {seconds:.3f} s do not fill a frame of the model"


def usable(utterances: Sequence[Utterance], features: Any, failures: Failures) -> list[Utterance]:
    """Utterances with at least one frame. The others are added to ``failures``."""
    long_enough = []
    for utterance in utterances:
        if num_frames(utterance, features) < 1:
            failures[utterance.id] = too_short(utterance.seconds)
        else:
            long_enough.append(utterance)
    return long_enough


def plan(utterances: Sequence[Utterance], features: Any, frame_bytes: int, shard_bytes: float) -> list[list[Utterance]]:
    """Cut a sequence of utterances into shards of at most ``shard_bytes``. A longer utterance gets its own shard."""
    shards: list[list[Utterance]] = []
    size = 0
    for utterance in utterances:
        own = num_frames(utterance, features) * frame_bytes
        if not shards or size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(utterance)
        size += own
    return shards


def data_digest(utterances: Sequence[Utterance]) -> str:
    """Digest of the data: ids and lengths of the utterances in order. Paths do not count."""
    lines = (json.dumps([one.id, one.num_samples, one.sample_rate]) for one in utterances)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def write_index(folder: Path, shards: Sequence[Sequence[Utterance]]) -> None:
    """Write ``index.csv`` of complete shards, in the order of the data."""
    rows = []
    for number, shard in enumerate(shards):
        frames = dict(stored(shard_path(folder, number)))
        rows += [
            {"utterance": one.id, "shard": number, "frames": frames[one.id], "seconds": round(one.seconds, 4)}
            for one in shard
            if one.id in frames
        ]
    write_csv(folder / "index.csv", rows)


class Waveforms(NamedTuple):
    """A batch of audio: the readable utterances, zero-padded (B, N), their lengths (B,), and the failures of the others."""

    shard: int
    seconds: float
    ids: list[str]
    waveforms: Tensor
    lengths: Tensor
    failures: Failures


def _place(batch: Waveforms) -> str:
    return f"the batch with {[*batch.ids, *batch.failures][-1]}"


class _Reader(Dataset[Waveforms]):
    """Reads the audio of a batch, given as (shard number, utterances)."""

    def __init__(self, sample_rate: int, shortest: int) -> None:
        self.sample_rate = sample_rate
        self.shortest = shortest

    def __getitem__(self, batch: tuple[int, list[Utterance]]) -> Waveforms:
        shard, utterances = batch
        read: dict[str, Tensor] = {}
        failures: Failures = {}
        for utterance in utterances:
            try:
                samples = torch.from_numpy(utterance.read(self.sample_rate))
                if len(samples) < self.shortest:
                    raise BadAudioError(too_short(len(samples) / self.sample_rate))
                read[utterance.id] = samples
            except BadAudioError as reason:
                failures[utterance.id] = str(reason)
        waveforms, lengths = collate(list(read.values())) if read else (torch.empty(0, 0), torch.empty(0, dtype=torch.long))
        waveforms, lengths = shared(waveforms, REMEDY), shared(lengths, REMEDY)
        return Waveforms(shard, total_seconds(utterances), list(read), waveforms, lengths, failures)


class _Encoded:
    """Hidden states of a batch during their copy to the CPU: rows (N, d), which rows are finite, and rows per utterance."""

    def __init__(self, states: Tensor, finite: Tensor, sizes: list[int], arrived: torch.cuda.Event | None) -> None:
        self._states = states
        self._finite = finite
        self._sizes = sizes
        self._arrived = arrived

    @cached_property
    def utterances(self) -> list[Tensor | None]:
        """The rows of each utterance; None where some are not finite. It waits for the copy to arrive.

        All utterances are copied at once. The page-locked memory is needed for the next batch, and one copy per utterance would
        often wait for the GIL while other threads read and write.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
            self._states = self._states.clone()
        starts = np.cumsum([0, *self._sizes[:-1]])
        whole = np.logical_and.reduceat(self._finite.numpy(), starts).tolist()
        return [own if good else None for own, good in zip(self._states.split(self._sizes), whole, strict=True)]


class _Place(NamedTuple):
    """One utterance of a batch."""

    batch: _Encoded
    number: int


@dataclass
class _Shard:
    """What is known of a shard so far."""

    batches: int
    states: dict[str, Tensor] = field(default_factory=dict)
    failures: Failures = field(default_factory=dict)


class Extractor:
    """Writes hidden states of utterances in shards.

    Reading, encoding and writing run at the same time. A batch holds utterances of similar length from one shard. An utterance
    gets the same states as if it were encoded alone, up to rounding.

    Args:
        upstream: Encoder, on its device and in evaluation mode.
        layers: Indices of the hidden states to keep.
        dtype: Dtype of the stored states.
        batch_s: Seconds of audio per batch, padding included.
        num_workers: Processes that read audio; None chooses a useful number.
    """

    def __init__(
        self, upstream: Upstream, layers: Sequence[int], dtype: torch.dtype, batch_s: float, num_workers: int | None = None
    ) -> None:
        self.upstream = upstream
        self.layers = layers
        self.dtype = dtype
        self.batch_s = batch_s
        self.num_workers = num_workers
        self.device = next(upstream.parameters()).device

    @torch.inference_mode()
    def run(self, shards: Mapping[int, Sequence[Utterance]], folder: Path, initial: float = 0.0) -> float | None:
        """Extract shards.

        Args:
            shards: Utterances by shard number.
            folder: Folder for the shards.
            initial: Seconds of audio done before, for the progress bar.

        Returns:
            Seconds of audio per second; None without shards. Code generation and the start of workers are not counted.
        """
        batches = [
            (number, [shard[place] for place in batch])
            for number, shard in shards.items()
            # The longest first, so that a lack of memory shows at once.
            for batch in by_length({place: utterance.seconds for place, utterance in enumerate(shard)}, self.batch_s)[::-1]
        ]
        parts = {number: _Shard(0) for number in shards}
        for number, _ in batches:
            parts[number].batches += 1
        total = initial + sum(map(total_seconds, shards.values()))
        writing: Future[None] | None = None
        clock = _Clock()
        form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        with (
            attention_of_any_shape(),
            ThreadPoolExecutor(1) as writer,
            tqdm(total=total, initial=initial, desc="extract", bar_format=form, leave=False) as bar,
        ):
            for batch, answers in self._encoded(self._loader(batches)):
                part = parts[batch.shard]
                part.failures |= batch.failures
                for name, answer in zip(batch.ids, answers, strict=True):
                    self._keep(part, name, answer)
                part.batches -= 1
                if not part.batches:
                    if writing is not None:
                        writing.result()  # at most one shard waits in memory
                    del parts[batch.shard]
                    writing = writer.submit(write_shard, folder, batch.shard, part.states, part.failures)
                clock.count(batch.seconds)
                bar.set_postfix_str(f"{clock.speed():,.0f} × real time", refresh=False)
                bar.update(batch.seconds)
            if writing is not None:
                writing.result()
        return clock.speed() if shards else None

    def _loader(self, batches: list[tuple[int, list[Utterance]]]) -> DataLoader[Waveforms]:
        workers = self.num_workers
        if workers is None:
            seconds = sum(total_seconds(utterances) for _, utterances in batches)
            workers = useful_workers(1, self.device.type == "cuda") if seconds > ALONE_S else 0
        else:
            warn_of_many("--workers ", workers, "without it, a useful number is chosen")
        seconds = max((total_seconds(utterances) for _, utterances in batches), default=0)
        rate = self.upstream.features.sample_rate
        check_room(workers, AHEAD, 4 * seconds * rate, remedy=REMEDY)
        return WatchedLoader(
            _Reader(rate, self.upstream.features.num_samples(1)),
            place=_place,
            remedy="--workers or --batch-s",
            sampler=batches,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=AHEAD if workers else None,
        )

    def _encoded(self, loader: Iterable[Waveforms]) -> Iterator[tuple[Waveforms, list[_Place | str]]]:
        """Batches with the result of each utterance. While one batch is handled, the device computes the next one."""
        ahead = ((batch, self._encode(batch)) for batch in loader)
        for encoded, _ in pairwise(chain(ahead, [None])):
            assert encoded is not None
            yield encoded

    def _encode(self, batch: Waveforms) -> list[_Place | str]:
        def compute(rows: Sequence[int]) -> list[_Place]:
            if len(rows) == len(batch.ids):
                return self._launch(batch.waveforms, batch.lengths)
            lengths = batch.lengths[list(rows)]
            return self._launch(batch.waveforms[list(rows), : int(lengths.max())], lengths)

        return compute_with_fallback(range(len(batch.ids)), compute)

    def _launch(self, waveforms: Tensor, lengths: Tensor) -> list[_Place]:
        hidden, num_frames = self.upstream(waveforms.to(self.device, non_blocking=True), lengths)
        chosen = torch.stack([hidden[layer].to(self.dtype) for layer in self.layers], dim=1)  # B, layers, T, d
        # The states of real frames are stored without padding. Row r of them lies at r + (padded rows before it) in `chosen`. The
        # indices are computed on the CPU, where the lengths are, to avoid waiting for the device.
        sizes = num_frames.repeat_interleave(len(self.layers))
        padding = (chosen.shape[2] - sizes).cumsum(0) - (chosen.shape[2] - sizes)
        count = int(sizes.sum())
        sizes, padding = (each.to(self.device, non_blocking=True) for each in (sizes, padding))
        rows = torch.arange(count, device=self.device) + padding.repeat_interleave(sizes, output_size=count)
        states = chosen.flatten(0, 2).index_select(0, rows)
        finite = (states * 0).sum(dim=1) == 0  # on CPUs, isfinite in half precision takes 15 times as long
        (states, finite), arrived = to_host(states, finite)
        encoded = _Encoded(states, finite, (num_frames * len(self.layers)).tolist(), arrived)
        return [_Place(encoded, number) for number in range(len(num_frames))]

    def _keep(self, part: _Shard, name: str, answer: _Place | str) -> None:
        if isinstance(answer, str):
            part.failures[name] = answer
            return
        own = answer.batch.utterances[answer.number]
        if own is None:
            part.failures[name] = "its hidden states overflow: take another --dtype or --compute-dtype"
            return
        part.states[name] = own if len(self.layers) == 1 else own.view(len(self.layers), -1, own.shape[-1])


class _Clock:
    """Speed in seconds of audio per second. The first batch is not counted if there are more, because code is generated in it."""

    def __init__(self) -> None:
        self.batches = 0
        self.seconds = self.first_s = 0.0
        self.since = time.perf_counter()

    def count(self, seconds: float) -> None:
        """Count a finished batch."""
        self.batches += 1
        self.seconds += seconds
        if self.batches == 1:
            self.first_s, self.first_end = seconds, time.perf_counter()

    def speed(self) -> float:
        """Speed so far."""
        since, before = (self.first_end, self.first_s) if self.batches > 1 else (self.since, 0.0)
        return (self.seconds - before) / max(time.perf_counter() - since, 1e-9)
