"""Times of the tokens of a transcript, from a CTC model: forced alignment, and intervals that cover the utterance.

Shapes: T frames, C outputs of the model (the blank first), L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, islice, pairwise
from typing import NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy
from torch import Tensor

from audiot.base.pairing import torchaudio
from audiot.data.labels import SILENCE, CharacterLabels, PhoneSequence, TokenLabels
from audiot.downstream.classifier import Classifier, by_length, collate, compute_with_fallback, frame_edges
from audiot.downstream.ctc import BLANK

SILENCES = ("", "<eps>", SILENCE)  # symbols of silence that aligners write
NEAR_S = 0.02  # usual tolerance, in seconds, for a boundary to count as found


class Span(NamedTuple):
    """Frames of a token on the best path: the first frame, the one after the last, and the mean probability."""

    start: int
    end: int
    score: float


def align(log_probabilities: Tensor, tokens: Sequence[int]) -> tuple[list[Span], float]:
    """Find the most probable CTC path (Graves et al. 2006) that spells ``tokens``.

    Args:
        log_probabilities: Log-probabilities (T, C) on the CPU.
        tokens: Classes of the L tokens. Class k is output k + 1.

    Returns:
        L spans in order of time, and the mean probability of all frames of the path, with blanks.

    Raises:
        ValueError: there are no tokens, or they (with a blank between equal ones) need more than T frames.
    """
    repeats = sum(one == other for one, other in pairwise(tokens))
    if not tokens or len(tokens) + repeats > len(log_probabilities):
        raise ValueError(
            f"{len(tokens)} tokens and {repeats} blanks between equal ones do not fit {len(log_probabilities)} frames"
        )
    targets = torch.tensor([tokens]) + 1
    path, scores = torchaudio("functional").forced_align(log_probabilities.float().contiguous()[None], targets, blank=BLANK)
    outputs, probabilities = path[0].tolist(), scores[0].exp().tolist()
    spans, at = [], 0
    for output, stretch in groupby(outputs):
        end = at + len(list(stretch))
        if output != BLANK:
            spans.append(Span(at, end, float(np.mean(probabilities[at:end]))))
        at = end
    return spans, float(np.mean(probabilities))


def intervals(spans: Sequence[Span], num_frames: int, min_silence: int) -> list[tuple[int, int, int | None]]:
    """Cut ``[0, num_frames)`` into intervals of tokens and silences.

    CTC gives a token a spike of one or a few frames, and the other frames are blank. A run of at most ``min_silence`` blanks
    between two tokens is split in the middle, and an odd frame goes to the later token. Of a longer run, each token takes
    ``min_silence // 2`` frames and the rest is a silence. Before the first and behind the last token, up to
    ``min_silence // 2`` blanks belong to the token, and the rest is a silence.

    Args:
        spans: Spans from `align`.
        num_frames: Number of frames T.
        min_silence: Frames of the shortest silence.

    Returns:
        Triples without gaps, in order: first frame, frame after the last, index of the span or None for a silence.
    """
    reach = min_silence // 2
    found: list[tuple[int, int, int | None]] = []
    begin = max(0, spans[0].start - reach)
    if begin:
        found.append((0, begin, None))
    for number, span in enumerate(spans):
        follower = spans[number + 1].start if number + 1 < len(spans) else None
        if follower is None:
            end = next_begin = min(num_frames, span.end + reach)
        elif follower - span.end <= min_silence:
            end = next_begin = (span.end + follower) // 2
        else:
            end, next_begin = span.end + reach, follower - reach
        found.append((begin, end, number))
        if next_begin > end:
            found.append((end, next_begin, None))
        begin = next_begin
    if begin < num_frames:
        found.append((begin, num_frames, None))
    return found


def token_tier(
    names: Sequence[str], spans: Sequence[Span], edges: Sequence[float], min_silence: int, offset_s: float = 0.0
) -> list[AlignmentItem]:
    """Alignment tier of tokens with `SILENCE` between them. Each token has its score.

    Args:
        names: Names of the tokens.
        spans: Spans of the tokens.
        edges: Edges of the frames from `frame_edges`.
        min_silence: Frames of the shortest silence, see `intervals`.
        offset_s: Start of the audio in its recording, in seconds.
    """
    return [
        _item(SILENCE, start, end, edges, offset_s, None)
        if number is None
        else _item(names[number], start, end, edges, offset_s, spans[number].score)
        for start, end, number in intervals(spans, len(edges) - 1, min_silence)
    ]


def _item(symbol: str, start: int, end: int, edges: Sequence[float], offset_s: float, score: float | None) -> AlignmentItem:
    begin, finish = (round(edges[frame] + offset_s, 8) for frame in (start, end))  # same rounding as Lhotse's
    return AlignmentItem(symbol, begin, round(finish - begin, 8), None if score is None else round(score, 4))


def word_tiers(
    text: str, spans: Sequence[Span], edges: Sequence[float], min_silence: int, offset_s: float = 0.0
) -> dict[str, list[AlignmentItem]]:
    """Tiers ``character`` and ``word``, from characters with one span each and spaces between words.

    Spaces are not spoken, so their frames count as blanks. A word lasts from its first to its last character.
    """
    letters = [number for number, character in enumerate(text) if character != " "]
    spoken_spans = [spans[number] for number in letters]
    characters = token_tier([text[number] for number in letters], spoken_spans, edges, min_silence, offset_s)
    spoken = iter(item for item in characters if item.symbol != SILENCE)
    words = []
    for word in text.split():
        parts = list(islice(spoken, len(word)))
        start, score = parts[0].start, float(np.mean([part.score for part in parts]))
        words.append(AlignmentItem(word, start, round(parts[-1].end - start, 8), round(score, 4)))
    pauses = [
        item for item in characters if item.symbol == SILENCE and not any(word.start < item.start < word.end for word in words)
    ]
    return {"character": characters, "word": sorted([*words, *pauses], key=lambda item: item.start)}


@dataclass
class Agreement:
    """Agreement of alignments with a reference.

    Attributes:
        frames: Number of compared frames.
        same: Number of frames with the same symbol.
        boundaries: Number of compared token boundaries, starts and ends.
        near: Number of boundaries that differ by at most `NEAR_S`.
        error_s: Sum of the boundaries' differences in seconds.
    """

    frames: int = 0
    same: int = 0
    boundaries: int = 0
    near: int = 0
    error_s: float = 0.0

    def add(
        self,
        found: Sequence[AlignmentItem],
        reference: Sequence[AlignmentItem],
        centers_s: Sequence[float],
        symbol: Callable[[str], str] = str,
    ) -> None:
        """Compare the tiers of an utterance.

        Args:
            found: Alignment to judge.
            reference: Alignment of the corpus. Frames that it does not cover are not compared.
            centers_s: Centres of the frames in seconds.
            symbol: Function from a symbol of the reference to that of the alignment (`SILENCE` for silences).
        """
        reference = sorted((item._replace(symbol=symbol(item.symbol)) for item in reference), key=lambda item: item.start)
        symbols = zip(_symbols_at(found, centers_s), _symbols_at(reference, centers_s), strict=True)
        pairs = [(ours, theirs) for ours, theirs in symbols if theirs is not None]
        self.frames += len(pairs)
        self.same += sum(ours == theirs for ours, theirs in pairs)
        spoken = [[item for item in items if item.symbol != SILENCE] for items in (found, reference)]
        ours_said, theirs_said = ([item.symbol for item in items] for items in spoken)
        for first, second, count in SequenceMatcher(None, ours_said, theirs_said, autojunk=False).get_matching_blocks():
            for ours, theirs in zip(spoken[0][first : first + count], spoken[1][second : second + count], strict=True):
                errors = [abs(ours.start - theirs.start), abs(ours.end - theirs.end)]
                self.boundaries += 2
                self.near += sum(error <= NEAR_S for error in errors)
                self.error_s += sum(errors)

    def __str__(self) -> str:
        """Summary in words."""
        frames = f"{100 * self.same / max(1, self.frames):.1f}% of frames"
        if not self.boundaries:
            return f"{frames}, no token in common"
        error_ms, near = 1000 * self.error_s / self.boundaries, 100 * self.near / self.boundaries
        return f"{frames}, boundaries {error_ms:.0f} ms off on average, {near:.0f}% within {1000 * NEAR_S:.0f} ms"


def _symbols_at(items: Sequence[AlignmentItem], times_s: Sequence[float]) -> list[str | None]:
    """Symbol at each time; None outside all items."""
    found: list[str | None] = []
    at = 0
    for time in times_s:
        while at < len(items) and items[at].end <= time:
            at += 1
        found.append(items[at].symbol if at < len(items) and items[at].start <= time else None)
    return found


@dataclass(frozen=True)
class Aligned:
    """An aligned utterance.

    Attributes:
        cut: Cut with the new tiers.
        names: Names of the tokens.
        spans: Spans of the tokens in frames.
        confidence: Mean probability of the frames on the path.
        frames: Number of frames.
    """

    cut: Cut
    names: Sequence[str]
    spans: Sequence[Span]
    confidence: float
    frames: int


class Aligner:
    """Aligns the transcripts of cuts.

    Args:
        classifier: Model trained with CTC.
        labels: Labels that read the model's tokens from a cut.
        min_silence_s: Shortest silence in seconds, see `intervals`.
        batch_s: Seconds of padded audio per batch.

    Attributes:
        agreement: Agreement by tier, for tiers that the cuts had before.
    """

    def __init__(self, classifier: Classifier, labels: TokenLabels, min_silence_s: float, batch_s: float) -> None:
        self.classifier = classifier
        self.features = classifier.features
        self.labels = labels
        self.min_silence = round(min_silence_s * self.features.sample_rate / self.features.hop_length)
        self.batch_s = batch_s
        self.index = {name: number for number, name in enumerate(classifier.classes)}
        self.agreement: dict[str, Agreement] = {}

    def __call__(self, cuts: Sequence[Cut]) -> list[Aligned | str]:
        """Each cut with its tiers, or the reason why it cannot be aligned."""
        found: list[Aligned | str] = [""] * len(cuts)
        names: dict[int, list[str]] = {}
        for number, cut in enumerate(cuts):
            try:
                names[number] = self._names(cut)
            except ValueError as reason:
                found[number] = str(reason)
        for batch in by_length({number: cuts[number].duration for number in names}, self.batch_s):
            answers = compute_with_fallback([(cuts[number], names[number]) for number in batch], self._align)
            for number, answer in zip(batch, answers, strict=True):
                found[number] = answer
        return found

    def _names(self, cut: Cut) -> list[str]:
        self.labels.check(cut)
        names = list(self.labels.names(cut))
        if unknown := sorted(set(names) - self.index.keys()):
            raise ValueError(f"{unknown[0]!r} of utterance {cut.id} is not one of the {len(self.index)} tokens of the model")
        return names

    def _align(self, items: Sequence[tuple[Cut, list[str]]]) -> list[Aligned]:
        waveforms, lengths = collate([torch.from_numpy(cut.load_audio()[0]) for cut, _ in items])
        outputs, num_frames = self.classifier.outputs(waveforms, lengths)
        log_probabilities = outputs.float().log_softmax(-1).cpu()
        found = []
        for (cut, names), row, frames in zip(items, log_probabilities, num_frames.tolist(), strict=True):
            spans, confidence = align(row[:frames], [self.index[name] for name in names])
            edges = frame_edges(self.features, frames, cut.num_samples)
            if isinstance(self.labels, CharacterLabels):
                tiers = word_tiers("".join(names), spans, edges, self.min_silence, cut.start)
            else:
                tiers = {"phone": token_tier(names, spans, edges, self.min_silence, cut.start)}
            self._compare(cut, tiers, frames)
            found.append(Aligned(with_tiers(cut, tiers), names, spans, confidence, frames))
        return found

    def _compare(self, cut: Cut, tiers: Mapping[str, list[AlignmentItem]], frames: int) -> None:
        centers = (self.features.frame_centers(frames) / self.features.sample_rate + cut.start).tolist()
        for name, items in tiers.items():
            source = self.labels.tier if isinstance(self.labels, PhoneSequence) else name
            alignments = [supervision.alignment or {} for supervision in cut.supervisions]
            if reference := [item for alignment in alignments for item in alignment.get(source, [])]:
                self.agreement.setdefault(name, Agreement()).add(items, reference, centers, self._symbol)

    def _symbol(self, symbol: str) -> str:
        """Symbol of the labels for a symbol of the corpus's own tier."""
        labels = self.labels
        if symbol in SILENCES:
            return SILENCE
        if isinstance(labels, PhoneSequence):
            silent = symbol in labels.silences
            return SILENCE if silent else symbol.rstrip("012") if labels.strip_stress else symbol
        if isinstance(labels, CharacterLabels):
            symbol = symbol.translate(labels.remove)
            return symbol.upper() if labels.case == "upper" else symbol.lower() if labels.case == "lower" else symbol
        return symbol


def with_tiers(cut: Cut, tiers: Mapping[str, list[AlignmentItem]]) -> Cut:
    """The cut with alignment tiers on its first supervision. Tiers of the same names are replaced."""
    supervisions = []
    for number, supervision in enumerate(cut.supervisions):
        kept = {name: items for name, items in (supervision.alignment or {}).items() if name not in tiers}
        alignment = {**kept, **tiers} if number == 0 else kept
        supervisions.append(fastcopy(supervision, alignment=alignment or None))
    return fastcopy(cut, supervisions=supervisions)
