"""When each token of a transcript is spoken, by a CTC model: forced alignment, and intervals that cover the utterance.

T frames, C outputs of the model (the blank first), L tokens.
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
from audiot.downstream.classifier import Classifier, by_length, collate, frame_edges, together
from audiot.downstream.ctc import BLANK

SILENCES = ("", "<eps>", SILENCE)  # what aligners write where nobody speaks
NEAR_S = 0.02  # what the field counts as a boundary found


class Span(NamedTuple):
    """The frames of a token on the best path: first, first after it, and their mean probability."""

    start: int
    end: int
    score: float


def align(log_probabilities: Tensor, tokens: Sequence[int]) -> tuple[list[Span], float]:
    """The most probable path of CTC (Graves et al. 2006) that spells ``tokens``.

    Args:
        log_probabilities: (T, C), on the CPU.
        tokens: L classes; class k is output k + 1.

    Returns:
        L spans in the order of time, and the mean probability of the path's frames, blanks included.

    Raises:
        ValueError: there are no tokens, or more of them, with a blank between equal ones, than frames.
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

    CTC gives a token a spike of one or a few frames and calls the rest blank. A run of at most ``min_silence`` blanks between
    two tokens is divided in its middle, the odd frame going to the later token. Of a longer one each token takes
    ``min_silence // 2`` frames, and what is left is a silence; so too before the first token and behind the last, where
    ``min_silence // 2`` blanks or fewer are theirs.

    Args:
        spans: Of `align`.
        num_frames: T.
        min_silence: Frames.

    Returns:
        (first frame, first frame after it, number of the span or None for a silence), in order, without a gap.
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
    """Alignment tier of tokens, `SILENCE` between them, each with its score.

    Args:
        names: Of the tokens.
        spans: Of the tokens.
        edges: Of `frame_edges`.
        min_silence: See `intervals`.
        offset_s: Where the audio begins in its recording.
    """
    return [
        _item(SILENCE, start, end, edges, offset_s, None)
        if number is None
        else _item(names[number], start, end, edges, offset_s, spans[number].score)
        for start, end, number in intervals(spans, len(edges) - 1, min_silence)
    ]


def _item(symbol: str, start: int, end: int, edges: Sequence[float], offset_s: float, score: float | None) -> AlignmentItem:
    begin, finish = (round(edges[frame] + offset_s, 8) for frame in (start, end))  # as Lhotse rounds the end of an item
    return AlignmentItem(symbol, begin, round(finish - begin, 8), None if score is None else round(score, 4))


def word_tiers(
    text: str, spans: Sequence[Span], edges: Sequence[float], min_silence: int, offset_s: float = 0.0
) -> dict[str, list[AlignmentItem]]:
    """Tiers ``character`` and ``word`` of characters, one span each, with spaces between words.

    A space is not spoken: its frames count as blanks. A word lasts from its first character to its last one.
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
    """How alignments agree with a reference.

    Attributes:
        frames: Compared.
        same: Of them, with the same symbol.
        boundaries: Starts and ends of the tokens that both have.
        near: Of them, at most `NEAR_S` off.
        error_s: Sum of their distances.
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
            found: The alignment.
            reference: Of the corpus; frames that it does not cover are not compared.
            centers_s: Middles of the frames, seconds.
            symbol: What a symbol of the reference is called in the alignment, `SILENCE` for silences.
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
        """In words."""
        frames = f"{100 * self.same / max(1, self.frames):.1f}% of frames"
        if not self.boundaries:
            return f"{frames}, no token in common"
        error_ms, near = 1000 * self.error_s / self.boundaries, 100 * self.near / self.boundaries
        return f"{frames}, boundaries {error_ms:.0f} ms off on average, {near:.0f}% within {1000 * NEAR_S:.0f} ms"


def _symbols_at(items: Sequence[AlignmentItem], times_s: Sequence[float]) -> list[str | None]:
    """Symbol at each time, None where there is no item."""
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
        cut: With the new tiers.
        names: Of the tokens.
        spans: Of the tokens, in frames.
        confidence: Mean probability of a frame of the path.
        frames: Their number.
    """

    cut: Cut
    names: Sequence[str]
    spans: Sequence[Span]
    confidence: float
    frames: int


class Aligner:
    """Puts times to the transcripts of cuts.

    Args:
        classifier: A model trained by CTC.
        labels: How the tokens that it knows are read off a cut.
        min_silence_s: See `intervals`, in seconds.
        batch_s: Seconds of audio, padded, that are computed at a time.

    Attributes:
        agreement: Tier → how its alignment agrees with the one that the cuts had before, of the tiers that they had.
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
        """Each cut with its tiers, or the reason why it can't be aligned."""
        found: list[Aligned | str] = [""] * len(cuts)
        names: dict[int, list[str]] = {}
        for number, cut in enumerate(cuts):
            try:
                names[number] = self._names(cut)
            except ValueError as reason:
                found[number] = str(reason)
        for batch in by_length({number: cuts[number].duration for number in names}, self.batch_s):
            answers = together([(cuts[number], names[number]) for number in batch], self._align)
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
        """What the labels call a symbol of the corpus's own tier."""
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
    """The cut with alignment tiers, in place of those of the same names, on its first supervision."""
    supervisions = []
    for number, supervision in enumerate(cut.supervisions):
        kept = {name: items for name, items in (supervision.alignment or {}).items() if name not in tiers}
        alignment = {**kept, **tiers} if number == 0 else kept
        supervisions.append(fastcopy(supervision, alignment=alignment or None))
    return fastcopy(cut, supervisions=supervisions)
