"""All measures of the layers of an upstream on one set of utterances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from audiot.base.console import say
from audiot.base.devices import attention_of_any_shape
from audiot.base.framing import middles
from audiot.data.audio import BadAudioError
from audiot.downstream.bootstrap import Bootstrap, checked
from audiot.downstream.classifier import by_length, collate
from audiot.downstream.upstream import FeaturesUpstream, Upstream
from audiot.extraction.extract import Utterance, num_frames
from audiot.measures.abx import SPEAKERS, Cells, Unit, errors, make_cells
from audiot.measures.averages import DEFAULTS, Average, Errors, choose_unit
from audiot.measures.codes import code_quality
from audiot.measures.warping import Distance

NEAR = 1e-6  # seconds: a centre so near to a bound lies on it, whatever the rounding of both


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        speaker: ``within``, ``across``, or ``both``.
        context: ``within`` or ``any``.
        distance: Distance of frames.
        max_units: Most units of a phone, context and speaker; None takes all.
        max_speakers: Most speakers of X for each A and B; None takes all.
        codes: Number of k-means codes; None measures none.
        bootstrap: ``samples``, ``seed`` and ``keep`` of the intervals, as in `audiot.downstream.bootstrap`.
        seed: Seed of all choices.
        batch_s: Seconds of audio per batch, padding included.
        memory_gb: Hidden states that are held at once; more layers than fit take another pass over the audio.

    Raises:
        ValueError: a value that cannot be.
    """

    speaker: str = "both"
    context: str = "within"
    distance: str = "angular"
    max_units: int | None = 10
    max_speakers: int | None = 5
    codes: int | None = 100
    bootstrap: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_s: float = 60.0
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        if self.speaker not in (*SPEAKERS, "both"):
            raise ValueError(f"speaker must be within, across or both, found {self.speaker!r}")
        Distance(self.distance)
        checked(self.bootstrap, "bootstrap", DEFAULTS)
        if self.codes is not None and self.codes < 1:
            raise ValueError(f"codes must be at least 1, found {self.codes}")
        for name, size in (("data.batch_s", self.batch_s), ("memory_gb", self.memory_gb)):
            if size <= 0:
                raise ValueError(f"{name} must be above 0, found {size:g}")
        make_cells([], "within", self.context, self.max_units, self.max_speakers)  # refuses what cannot be

    @property
    def speakers(self) -> tuple[str, ...]:
        """The comparisons to make."""
        return SPEAKERS if self.speaker == "both" else (self.speaker,)


@dataclass(frozen=True)
class Spans:
    """Where the units lie among the frames of all utterances, one utterance after the other.

    Attributes:
        firsts: First frame of each unit.
        counts: Its frames: those whose centre lies between its onset and its offset, both included, as fastabx has it.
        labels: Label of each frame as a number, −1 outside units: that of the unit whose onset is the last one up to its centre.
    """

    firsts: np.ndarray
    counts: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Measures:
    """What was measured.

    Attributes:
        layers: Figures of each layer. ``within`` and ``across`` have the bounds of their 95% intervals, None where there is none.
        compared: How much was compared.
        bootstrap: How the intervals were computed, as in ``metrics.json``; empty without any.
        draws: With ``bootstrap.keep``: ``LAYER/within`` and ``LAYER/across`` → the errors of all resampled tests, (samples,).
    """

    layers: list[dict[str, Any]]
    compared: dict[str, Any]
    bootstrap: dict[str, Any]
    draws: dict[str, Tensor]


def measure(
    upstream: Upstream,
    utterances: Sequence[Utterance],
    units: Sequence[Unit],
    layers: Sequence[int],
    settings: Settings,
    device: torch.device,
) -> Measures:
    """Measure layers.

    Args:
        upstream: Any upstream.
        utterances: The utterances of the units.
        units: Units of these utterances.
        layers: Numbers of hidden states.
        settings: What to measure.
        device: Device that computes.

    Raises:
        ValueError: there is no triple, an utterance cannot be read, or hidden states are not finite.
    """
    upstream = upstream.to(device).eval()
    if isinstance(upstream, FeaturesUpstream):
        upstream.fit(_batches(upstream, utterances, settings.batch_s))
    frames = sum(num_frames(utterance, upstream.features) for utterance in utterances)
    room = int(settings.memory_gb * 1e9 / max(1, 4 * frames * upstream.state_dim))
    step = max(1, room)
    spans: Spans | None = None
    cells: dict[str, tuple[Cells, Average]] = {}
    rows: list[dict[str, Any]] = []
    kind, why = choose_unit(units, settings.context)
    found: dict[str, tuple[Average, np.ndarray]] = {}
    with tqdm(total=len(layers), desc="layers", leave=False) as bar:
        for first in range(0, len(layers), step):
            some = layers[first : first + step]
            states = encode(upstream, utterances, some, settings.batch_s, device)
            if spans is None:
                spans = find_spans(upstream, utterances, units, [len(one[0]) for one in states])
                cells = {name: (own, Average(own, units, kind)) for name, own in _cells(units, spans, settings).items()}
            for place, layer in enumerate(some):
                own = torch.cat([one[place] for one in states]).to(device)
                figures, errors_of_cells = _of_layer(own, spans, cells, settings)
                rows.append({"layer": layer, **figures})
                found |= {f"{layer}/{name}": (cells[name][1], errors_of_cells[name]) for name in cells}
                bar.update()
    assert spans is not None
    spoken = np.array([not unit.silent for unit in units])
    compared = {
        "utterances": len(utterances),
        "frames": len(spans.labels),
        "units": int(spoken.sum()),
        "units_without_frames": int((spans.counts[spoken] == 0).sum()),
    }
    resampled = _resampled(found, units, kind, why, settings)
    for row in rows:
        for name in cells:
            ends = resampled.get("intervals", {}).get(f"{row['layer']}/{name}", (None, None))
            row[name] |= zip(("low", "high"), ends, strict=True)
    return Measures(rows, compared, resampled.get("bootstrap", {}), resampled.get("draws", {}))


def _resampled(
    found: Mapping[str, tuple[Average, np.ndarray]], units: Sequence[Unit], kind: str | None, why: str, settings: Settings
) -> dict[str, Any]:
    """Intervals of errors by name, and the rest that `Bootstrap.intervals` gives."""
    given = checked(settings.bootstrap, "bootstrap", DEFAULTS)
    if kind is None:
        return {"bootstrap": {"without": dict.fromkeys(found, why)}} if given["samples"] else {}
    seed = settings.seed if given["seed"] is None else given["seed"]
    speakers = {unit.speaker: unit.speaker for unit in units}  # a unit of the bootstrap is a speaker already
    resampling = Bootstrap(kind, why, given["samples"], seed, speakers, given["keep"])
    resampled = resampling.intervals(Errors(found), dict.fromkeys(f"test/{name}" for name in found))
    for part in (resampled, resampled.get("bootstrap", {})):
        for key in part.keys() & {"intervals", "draws", "without"}:
            part[key] = {name.removeprefix("test/"): value for name, value in part[key].items()}
    return resampled


def abx_error(row: Mapping[str, Any]) -> float:
    """The mean of a layer's ABX errors."""
    errors = [row[speaker]["error"] for speaker in SPEAKERS if speaker in row]
    return sum(errors) / len(errors)


def _of_layer(
    frames: Tensor, spans: Spans, cells: Mapping[str, tuple[Cells, Average]], settings: Settings
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of a layer, without intervals, and the errors of the cells of each comparison."""
    distance = Distance(settings.distance)
    compared = frames.softmax(1) if settings.distance == "kl" else frames
    figures: dict[str, Any] = {}
    found = {}
    for speaker, (own, average) in cells.items():
        found[speaker] = errors(own, compared, spans.firsts, spans.counts, distance)
        figures[speaker] = {"error": average.whole(found[speaker]), "low": None, "high": None}
        figures[speaker] |= {"cells": len(own.a), "triples": own.num_triples()}
    if settings.codes is not None:
        known = spans.labels >= 0
        labelled = frames[torch.from_numpy(np.flatnonzero(known)).to(frames.device)]
        quality = code_quality(labelled, spans.labels[known], settings.codes, settings.seed)
        figures |= {name: value for name, value in quality._asdict().items() if name != "frames"}
    return figures, found


def _cells(units: Sequence[Unit], spans: Spans, settings: Settings) -> dict[str, Cells]:
    """The cells of each comparison, of units that have frames."""
    there = np.flatnonzero(spans.counts)
    found = {}
    for speaker in settings.speakers:
        limits = settings.max_units, settings.max_speakers, settings.seed
        cells = make_cells([units[number] for number in there.tolist()], speaker, settings.context, *limits)
        if len(cells.a):
            members = there[cells.members]
            found[speaker] = Cells(**{**vars(cells), "members": members})
        elif settings.speaker == speaker or (speaker == settings.speakers[-1] and not found):
            why = "two speakers" if speaker == "across" else "a speaker"
            around = "" if settings.context == "any" else " with the same neighbours"
            raise ValueError(
                f"no triple {speaker} speakers: {why} must say one phone twice and another one{around}; set context=any, or take "
                "more speech"
            )
        else:
            say(f"no triple {speaker} speakers, so that is not measured")
    return found


def find_spans(upstream: Upstream, utterances: Sequence[Utterance], units: Sequence[Unit], lengths: Sequence[int]) -> Spans:
    """Where units lie among frames.

    Args:
        upstream: Upstream, whose front end says where frames are. A state of several frames lies in their middle.
        utterances: The utterances, in order.
        units: Their units.
        lengths: Hidden states of each utterance.
    """
    features = upstream.features
    centres = middles(features, upstream.stack, max(lengths)).numpy() / features.sample_rate
    firsts, counts = np.zeros(len(units), dtype=np.int64), np.zeros(len(units), dtype=np.int64)
    labels = np.full(sum(lengths), -1, dtype=np.int64)
    classes = {phone: number for number, phone in enumerate(sorted({unit.phone for unit in units}))}
    of_utterance: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        of_utterance.setdefault(unit.utterance, []).append(number)
    begin = 0
    for utterance, length in zip(utterances, lengths, strict=True):
        own = np.array(sorted(of_utterance.get(utterance.id, []), key=lambda number: units[number].onset), dtype=np.int64)
        onsets, offsets = (np.array([getattr(units[number], name) for number in own]) for name in ("onset", "offset"))
        here = centres[:length]
        low, high = np.searchsorted(here, onsets - NEAR), np.searchsorted(here, offsets + NEAR, side="right")
        firsts[own], counts[own] = begin + low, np.maximum(high - low, 0)
        for number, first, end in zip(own, low, np.searchsorted(here, offsets - NEAR), strict=True):  # [onset, offset)
            labels[begin + first : begin + max(first, end)] = classes[units[number].phone]
        begin += length
    return Spans(firsts, counts, labels)


@torch.inference_mode()
def encode(
    upstream: Upstream, utterances: Sequence[Utterance], layers: Sequence[int], batch_s: float, device: torch.device
) -> list[Tensor]:
    """Hidden states of each utterance (layers, T, d), on the CPU.

    Raises:
        ValueError: an utterance cannot be read or encoded. The message has its id.
    """
    found: dict[str, Tensor] = {}
    with attention_of_any_shape(), tqdm(total=len(utterances), desc="encode", unit="utt", leave=False) as bar:
        for some, waveforms, lengths in _read(upstream, utterances, batch_s):
            hidden, sizes = upstream(waveforms.to(device), lengths)
            chosen = torch.stack([hidden[layer].float() for layer in layers]).cpu()
            for place, (utterance, size) in enumerate(zip(some, sizes.tolist(), strict=True)):
                found[utterance.id] = chosen[:, place, :size].clone()
            bar.update(len(some))
    return [found[utterance.id] for utterance in utterances]


def _batches(upstream: Upstream, utterances: Sequence[Utterance], batch_s: float) -> Iterator[tuple[Tensor, Tensor]]:
    yield from ((waveforms, lengths) for _, waveforms, lengths in _read(upstream, utterances, batch_s))


def _read(
    upstream: Upstream, utterances: Sequence[Utterance], batch_s: float
) -> Iterator[tuple[list[Utterance], Tensor, Tensor]]:
    """Batches of utterances of similar length: waveforms (B, N) and their lengths (B,)."""
    rate, shortest = upstream.features.sample_rate, upstream.features.num_samples(1)
    for batch in by_length({place: utterance.seconds for place, utterance in enumerate(utterances)}, batch_s):
        some = [utterances[place] for place in batch]
        read = []
        for utterance in some:
            try:
                samples = torch.from_numpy(utterance.read(rate))
            except BadAudioError as reason:
                raise ValueError(f"utterance {utterance.id} cannot be read: {reason}") from reason
            if len(samples) < shortest:
                raise ValueError(f"utterance {utterance.id} is too short: it gives no frame of the upstream; leave it out")
            read.append(samples)
        yield some, *collate(read)
