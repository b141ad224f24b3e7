"""Encoding a corpus: utterances to hidden states, in shards of known size (see `audiot.extraction.states`)."""

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
from audiot.data.audio import AudioFile, BadAudioError, heard, read_audio, resample
from audiot.data.batches import ignore_interrupt, shared
from audiot.data.datamodule import useful_workers, warn_of_many
from audiot.data.prepare import read_cut
from audiot.data.shared_memory import check_room
from audiot.downstream.classifier import by_length, collate, together
from audiot.downstream.upstream import Upstream
from audiot.extraction.states import Failures, shard_path, stored, write_shard

AHEAD = 2  # batches that a process reads before they are wanted
REMEDY = "--workers {workers} or a smaller --batch-s"
ALONE_S = 600  # less audio than that is read sooner than worker processes start


class Utterance(NamedTuple):
    """One utterance to encode: a whole file of any format, or a cut."""

    id: str
    source: str | Cut
    num_samples: int
    sample_rate: int  # Hz
    prepared: bool = False  # then preparation decided what is fit to be heard

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.num_samples / self.sample_rate

    def read(self, sample_rate: int) -> np.ndarray:
        """Samples (N,) in float32, the average of the channels, at ``sample_rate``.

        Raises:
            BadAudioError: they can't be used; the message is the reason.
        """
        if not isinstance(self.source, str):
            return heard(read_cut(self.source), self.sample_rate, sample_rate)
        if not self.prepared:
            return read_audio(self.source, sample_rate)
        with AudioFile(self.source) as file:
            return resample(file.read_mono(), file.sample_rate, sample_rate)


def total_seconds(shard: Sequence[Utterance]) -> float:
    """How much audio there is."""
    return sum(utterance.seconds for utterance in shard)


def num_frames(utterance: Utterance, features: Any) -> int:
    """Hidden states of an utterance, as far as can be told without decoding it."""
    return features.num_tokens(round(utterance.seconds * features.sample_rate))


def too_short(seconds: float) -> str:
    """Why an utterance gives no frame."""
    return f"too short: {seconds:.3f} s do not fill a frame of the model"


def usable(utterances: Sequence[Utterance], features: Any, failures: Failures) -> list[Utterance]:
    """Those that are long enough for a frame; the others go to ``failures``."""
    long_enough = []
    for utterance in utterances:
        if num_frames(utterance, features) < 1:
            failures[utterance.id] = too_short(utterance.seconds)
        else:
            long_enough.append(utterance)
    return long_enough


def plan(utterances: Sequence[Utterance], features: Any, frame_bytes: int, shard_bytes: float) -> list[list[Utterance]]:
    """Cut a sequence of utterances into shards of at most ``shard_bytes``, or of one utterance."""
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
    """Names what is encoded: ids and lengths in their order, not where the files lie."""
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
    """A batch that was read: utterances that could be, their audio zero-padded (B, N), lengths (B,); and failures."""

    shard: int
    seconds: float
    ids: list[str]
    waveforms: Tensor
    lengths: Tensor
    failures: Failures


class _Reader(Dataset[Waveforms]):
    """Reads the audio of a batch, (number of its shard, utterances)."""

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
    """States of a batch on their way to the CPU: rows (N, d) of all utterances, which of them are finite, rows an utterance."""

    def __init__(self, states: Tensor, finite: Tensor, sizes: list[int], arrived: torch.cuda.Event | None) -> None:
        self._states = states
        self._finite = finite
        self._sizes = sizes
        self._arrived = arrived

    @cached_property
    def utterances(self) -> list[Tensor | None]:
        """The rows of each utterance, for which this waits; None where some are not finite.

        A copy for all of them: page-locked memory is wanted for the next batch, and a call for each would often wait for the
        threads that read and write to let Python go.
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
    """What there is of a shard so far."""

    batches: int
    states: dict[str, Tensor] = field(default_factory=dict)
    failures: Failures = field(default_factory=dict)


class Extractor:
    """Writes hidden states of utterances to shards.

    Reading, encoding and writing go on at the same time. Batches are of similar lengths within a shard; an utterance gets what
    it gets alone, up to rounding.

    Args:
        upstream: What encodes, on its device, in evaluation mode.
        layers: Which hidden states are kept.
        dtype: In which they are stored.
        batch_s: Seconds of audio in a batch, padding included.
        num_workers: Processes that read audio; None: what is of use here.
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
            shards: By number.
            folder: Gets them.
            initial: Seconds of audio that were done before, for the bar.

        Returns:
            Seconds of audio a second, code generation and the start of workers not counted; None where there are no shards.
        """
        batches = [
            (number, [shard[place] for place in batch])
            for number, shard in shards.items()
            # The longest first: should the memory be too small, it is told at once.
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
                        writing.result()  # one shard waits in memory at most
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
            warn_of_many("--workers ", workers, "without it, there are as many as are of use")
        seconds = max((total_seconds(utterances) for _, utterances in batches), default=0)
        rate = self.upstream.features.sample_rate
        check_room(workers, AHEAD, 4 * seconds * rate, remedy=REMEDY)
        return DataLoader(
            _Reader(rate, self.upstream.features.num_samples(1)),
            sampler=batches,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_interrupt,
            prefetch_factor=AHEAD if workers else None,
        )

    def _encoded(self, loader: Iterable[Waveforms]) -> Iterator[tuple[Waveforms, list[_Place | str]]]:
        """Batches with what became of their utterances; while one is taken up, the device is at the next."""
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

        return together(range(len(batch.ids)), compute)

    def _launch(self, waveforms: Tensor, lengths: Tensor) -> list[_Place]:
        hidden, num_frames = self.upstream(waveforms.to(self.device, non_blocking=True), lengths)
        chosen = torch.stack([hidden[layer].to(self.dtype) for layer in self.layers], dim=1)  # B, layers, T, d
        # Row r of what is kept lies as many rows further on as there is padding before it. Told from the CPU, where the lengths
        # are, so that the device is not waited for.
        sizes = num_frames.repeat_interleave(len(self.layers))
        padding = (chosen.shape[2] - sizes).cumsum(0) - (chosen.shape[2] - sizes)
        count = int(sizes.sum())
        sizes, padding = (each.to(self.device, non_blocking=True) for each in (sizes, padding))
        rows = torch.arange(count, device=self.device) + padding.repeat_interleave(sizes, output_size=count)
        states = chosen.flatten(0, 2).index_select(0, rows)
        finite = (states * 0).sum(dim=1) == 0  # isfinite of half precision takes 15 times as long on CPUs
        (states, finite), arrived = to_host(states, finite)
        encoded = _Encoded(states, finite, (num_frames * len(self.layers)).tolist(), arrived)
        return [_Place(encoded, number) for number in range(len(num_frames))]

    def _keep(self, part: _Shard, name: str, answer: _Place | str) -> None:
        if isinstance(answer, str):
            part.failures[name] = answer
            return
        own = answer.batch.utterances[answer.number]
        if own is None:
            part.failures[name] = "its hidden states leave the range of the numbers: take another --dtype or --compute-dtype"
            return
        part.states[name] = own if len(self.layers) == 1 else own.view(len(self.layers), -1, own.shape[-1])


class _Clock:
    """Seconds of audio a second: from the end of the first batch on, if there are more, as code is generated during that one."""

    def __init__(self) -> None:
        self.batches = 0
        self.seconds = self.first_s = 0.0
        self.since = time.perf_counter()

    def count(self, seconds: float) -> None:
        """A batch is done."""
        self.batches += 1
        self.seconds += seconds
        if self.batches == 1:
            self.first_s, self.first_end = seconds, time.perf_counter()

    def speed(self) -> float:
        """Until now."""
        since, before = (self.first_end, self.first_s) if self.batches > 1 else (self.since, 0.0)
        return (self.seconds - before) / max(time.perf_counter() - since, 1e-9)
