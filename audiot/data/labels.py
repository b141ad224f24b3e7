"""Labels of a cut: one per utterance, one per slot, one per frame, or a sequence of tokens."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from lhotse import SupervisionSegment
from lhotse.cut import Cut
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiot.data.text import as_label, as_text, lines

PUNCTUATION = '.,;:?!"()'
IGNORED = -100  # label of padding and of frames outside the alignment; losses and metrics leave it out
SILENCE = "SIL"  # symbol of intervals whose symbol is blank, as aligners write silences
SPACE = "|"  # token for the space between words, as in torchaudio
BLANK_TOKEN = "<blank>"  # blank of CTC
NOTHING = "(none)"  # "no token" in tables
RESERVED = (SPACE, BLANK_TOKEN, NOTHING)
PROBABILITY = re.compile(r"[0-9]*\.[0-9]+")  # probability of a pronunciation; a bare digit is a phone of X-SAMPA


class Framing(Protocol):
    """How an upstream divides audio into frames, as far as labels need it. Every front end of audiot has these methods."""

    sample_rate: int
    hop_length: int
    stack: int

    def num_frames(self, num_samples: int) -> int:
        """Number of frames, before stacking, for a number of samples."""

    def num_tokens(self, num_samples: int) -> int:
        """Number of hidden states for a number of samples: frames // stack."""

    def frame_centers(self, num_frames: int) -> Tensor:
        """Middle of each frame in samples (num_frames,)."""


class Labels(ABC):
    """How the labels of a task are read from a cut.

    Args:
        features: How the upstream divides audio into frames.
    """

    open_set = False  # whether other splits may have labels that training lacks
    alphabet: Sequence[str] | None = None  # all label names, if they are known beforehand

    def __init__(self, features: Framing | None = None) -> None:
        self._features = features

    @property
    def features(self) -> Framing:
        """Front end whose frames are labelled."""
        if self._features is None:
            raise ValueError(f"{type(self).__name__} needs `features`, the front end whose frames it labels")
        return self._features

    @abstractmethod
    def names(self, cut: Cut) -> Sequence[str]:
        """All label names of the cut.

        Raises:
            ValueError: the cut has no label, or none that can be used.
        """

    @abstractmethod
    def encode(self, cut: Cut, index: Mapping[str, int]) -> Tensor:
        """Class indices: a scalar for an utterance, else (slots,), (frames,) or (tokens,)."""

    def check(self, cut: Cut) -> None:  # noqa: B027 (most labels have nothing to check)
        """Refuse a cut whose labels do not fit its audio."""

    def collate(self, labels: Sequence[Tensor]) -> Tensor:
        """Labels of a batch: stacked, or padded at the end with ``IGNORED``."""
        return torch.stack(list(labels)) if labels[0].ndim == 0 else pad_sequence(list(labels), True, IGNORED)


def in_time(cut: Cut) -> list[SupervisionSegment]:
    """The supervisions of a cut, ordered by time."""
    return sorted(cut.supervisions, key=lambda supervision: (supervision.start, supervision.end))


def values_of(cut: Cut, field: str) -> list[str]:
    """The different values of a label in the cut's supervisions, ordered by time. Null and blank values are left out.

    Args:
        cut: Any cut.
        field: ``speaker`` or the name of a custom field.

    Raises:
        ValueError: a value is neither text nor a whole number.
    """
    found = [
        as_label(
            supervision.speaker if field == "speaker" else (supervision.custom or {}).get(field),
            f"label {field!r} of utterance {cut.id}",
        )
        for supervision in in_time(cut)
    ]
    return list(dict.fromkeys(value for value in found if value is not None))


def speaker_of(cut: Cut) -> str | None:
    """The speaker of a cut, None if it has none or several."""
    names = values_of(cut, "speaker")
    return names[0] if len(names) == 1 else None


def field_of(cut: Cut, field: str) -> str:
    """The single value of a label of the cut: its speaker, or a custom field of its supervisions (``keyword``, …).

    Raises:
        ValueError: the cut has no such label, or several values of it.
    """
    values = values_of(cut, field)
    if not values:
        names = {"speaker"}.union(*(supervision.custom or {} for supervision in cut.supervisions))
        known = ", ".join(sorted(names)) if cut.supervisions else "none, it has no supervision"
        raise ValueError(f"utterance {cut.id} has no label {field!r} (its labels: {known}); choose another task or data")
    if len(values) > 1:
        raise ValueError(
            f"utterance {cut.id} has the labels {values[0]!r} and {values[1]!r} for {field!r}, of different supervisions: make a "
            "cut of each with Lhotse's CutSet.trim_to_supervisions(keep_overlapping=False), or leave the utterance out"
        )
    return values[0]


class UtteranceLabel(Labels):
    """One label per utterance: its speaker, or a custom field (``keyword``, …).

    Args:
        field: ``speaker`` or the name of a custom field of the supervision.
        features: Front end, not used here.
        open_set: Whether other splits may have labels that training lacks. They are encoded as ``IGNORED``.
    """

    def __init__(self, field: str, features: Framing | None = None, open_set: bool = False) -> None:
        super().__init__(features)
        self.field = field
        self.open_set = open_set

    def names(self, cut: Cut) -> list[str]:
        """The label, as a list with one element."""
        return [field_of(cut, self.field)]

    def encode(self, cut: Cut, index: Mapping[str, int]) -> Tensor:
        """Class index, a scalar."""
        name = field_of(cut, self.field)
        return torch.tensor(index.get(name, IGNORED) if self.open_set else index[name])


class SlotLabels(Labels):
    """Several labels per utterance, such as the action, object and location of an intent. Their names are ``slot=value``.

    Args:
        fields: Names of the slots: ``speaker`` or custom fields.
        features: Front end, not used here.
    """

    def __init__(self, fields: Sequence[str], features: Framing | None = None) -> None:
        super().__init__(features)
        self.fields = list(fields)
        if not self.fields or len(set(self.fields)) < len(self.fields) or any("=" in field for field in self.fields):
            raise ValueError(f"downstream.labels.fields must be one or more different names without '=', found {self.fields}")

    def names(self, cut: Cut) -> list[str]:
        """``slot=value`` of each slot in order."""
        return [f"{field}={field_of(cut, field)}" for field in self.fields]

    def encode(self, cut: Cut, index: Mapping[str, int]) -> Tensor:
        """Class index of each slot's value, (slots,), in the vocabulary of all slots."""
        return torch.tensor([index[name] for name in self.names(cut)])


class FrameLabels(Labels):
    """One label per frame: the alignment interval that contains the frame's centre.

    Args:
        tier: Name of the alignment tier (``phone``).
        features: Front end whose frames are labelled.
        tolerance_s: Seconds by which the ends of the alignment may differ from those of the audio; None for no limit. Frames
            outside all intervals are ignored.
    """

    def __init__(self, tier: str, features: Framing | None = None, tolerance_s: float | None = 0.1) -> None:
        super().__init__(features)
        self.tier = tier
        self.tolerance_s = tolerance_s
        self._read: tuple[Cut, list[tuple[float, float, str]]] | None = None  # the latest cut, which is asked for more than once

    def _intervals(self, cut: Cut) -> list[tuple[float, float, str]]:
        if self._read is None or self._read[0] is not cut:
            self._read = cut, tier_of(cut, self.tier)
        return self._read[1]

    def names(self, cut: Cut) -> list[str]:
        """Every symbol of the tier."""
        return [symbol for _, _, symbol in self._intervals(cut)]

    def check(self, cut: Cut) -> None:
        """Refuse an alignment that does not match the ends of the audio.

        Raises:
            ValueError: the difference is above the tolerance.
        """
        intervals = self._intervals(cut)
        begin, end = intervals[0][0], max(end for _, end, _ in intervals)
        # When a cut is cropped, Lhotse shifts its supervisions but not their alignments, which count from the recording's start.
        late, missing, excess = begin - cut.start, cut.end - end, end - cut.end
        if self.tolerance_s is not None and max(late, missing, excess) > self.tolerance_s:
            raise ValueError(
                f"the {self.tier} alignment of utterance {cut.id} goes from {begin:.3f} to {end:.3f} s, its audio from "
                f"{cut.start:.3f} to {cut.end:.3f} s: the alignment of another file? Correct it, leave it out, or raise "
                f"downstream.labels.tolerance_s={self.tolerance_s}"
            )

    def encode(self, cut: Cut, index: Mapping[str, int]) -> Tensor:
        """Class index of each frame (frames,). Frames whose centre lies in no interval get ``IGNORED``."""
        intervals = self._intervals(cut)
        num_frames = self.features.num_frames(cut.num_samples)
        rate = self.features.sample_rate
        centers = (self.features.frame_centers(num_frames).numpy() + round(cut.start * rate)) / rate
        starts = np.array([start for start, _, _ in intervals])
        ends = np.array([end for _, end, _ in intervals])
        classes = np.array([index[symbol] for _, _, symbol in intervals])
        at = np.searchsorted(starts, centers, side="right") - 1
        covered = (at >= 0) & (centers < ends[at.clip(0)])
        return torch.from_numpy(np.where(covered, classes[at.clip(0)], IGNORED))


class TokenLabels(Labels):
    """Sequence of tokens without times, for CTC. It must fit the frames, with blanks between equal ones (Graves et al. 2006)."""

    def check(self, cut: Cut) -> None:
        """Refuse a sequence that needs more frames than there are.

        Raises:
            ValueError: it does not fit. The message has both lengths.
        """
        tokens = self.names(cut)
        repeats = sum(one == other for one, other in pairwise(tokens))
        frames = self.features.num_tokens(cut.num_samples) * self.features.stack
        if len(tokens) + repeats > frames:
            blanks = f" and {repeats} blanks between equal ones" if repeats else ""
            raise ValueError(
                f"the target of utterance {cut.id} is longer than its input: {len(tokens)} tokens{blanks}, {frames} frames "
                f"({cut.duration:.2f} s): the transcript of another file? Correct it or leave the utterance out"
            )

    def encode(self, cut: Cut, index: Mapping[str, int]) -> Tensor:
        """Class index of each token (tokens,)."""
        return torch.tensor([index[name] for name in self.names(cut)])


class CharacterLabels(TokenLabels):
    """Characters of the transcript, with a token for the space between words.

    Args:
        features: Front end whose frames must hold the characters.
        case: Conversion of the text: ``upper``, ``lower``, or null for none.
        remove: Characters to leave out, such as punctuation.
        alphabet: All characters that may occur; None takes those of the training transcripts. It must not contain ``|``, the
            token for the space between words.
    """

    def __init__(
        self, features: Framing | None = None, case: str | None = "upper", remove: str = "", alphabet: str | None = None
    ) -> None:
        super().__init__(features)
        self.alphabet = None if alphabet is None else sorted(set(alphabet))
        if SPACE in (alphabet or ""):
            raise ValueError(f"downstream.labels.alphabet has {SPACE!r}, which stands for the space between words: leave it out")
        if case not in ("upper", "lower", None):
            raise ValueError(f"downstream.labels.case must be upper, lower or null, found {case!r}")
        self.case = case
        self.remove = str.maketrans("", "", remove)

    def names(self, cut: Cut) -> list[str]:
        """The characters, as tokens."""
        return list(" ".join(self.words(cut)))

    def words(self, cut: Cut) -> list[str]:
        """The words of the transcript.

        Raises:
            ValueError: there are no words, or a word contains ``|``.
        """
        text = transcript(cut).translate(self.remove)
        text = text.upper() if self.case == "upper" else text.lower() if self.case == "lower" else text
        if not text.split():
            raise ValueError(
                f"the transcript of utterance {cut.id} is empty ({transcript(cut)!r}): correct it or leave the utterance out"
            )
        if SPACE in text:
            raise ValueError(
                f"the transcript of utterance {cut.id} has {SPACE!r}, which stands for the space between words: correct it, or "
                "leave it out by downstream.labels.remove"
            )
        return text.split()


class PhoneSequence(TokenLabels):
    """Phones of an utterance in order, from its alignment tier, or from its transcript and a pronunciation lexicon.

    Args:
        features: Front end whose frames must hold the phones.
        tier: Alignment tier, used without a lexicon.
        lexicon: File with lines ``WORD PHONE PHONE …``. Probabilities (``0.98``) before the phones are skipped. The first
            pronunciation of a word is used. Case and punctuation around a word are ignored.
        silences: Symbols that are not phones: by default those of the Montreal Forced Aligner, of Festival and of TIMIT.
        strip_stress: Whether to remove stress marks (AH0 → AH).
    """

    def __init__(
        self,
        features: Framing | None = None,
        tier: str = "phone",
        lexicon: str | Path | None = None,
        silences: Sequence[str] = ("SIL", "sil", "sp", "spn", "SPN", "pau", "ssil", "#", "h#", ""),
        strip_stress: bool = False,
    ) -> None:
        super().__init__(features)
        self.tier = tier
        self.lexicon = None if lexicon is None else read_lexicon(lexicon)
        self.path = lexicon
        self.silences = frozenset(silences)
        self.strip_stress = strip_stress

    def names(self, cut: Cut) -> list[str]:
        """The phones, as tokens."""
        if self.lexicon is None:
            phones = [symbol for _, _, symbol in tier_of(cut, self.tier)]
        else:
            phones = [phone for word in transcript(cut).split() for phone in self._pronounce(word, cut)]
        phones = [phone.rstrip("012") if self.strip_stress else phone for phone in phones if phone not in self.silences]
        if not phones:
            raise ValueError(f"utterance {cut.id} has no phone: correct its transcript or alignment, or leave the utterance out")
        for phone in phones:
            check_phone(phone, f"utterance {cut.id}")
        return phones

    def _pronounce(self, word: str, cut: Cut) -> tuple[str, ...]:
        assert self.lexicon is not None
        bare = word.strip(PUNCTUATION)
        if not bare:
            return ()
        for form in (word, bare, bare.upper(), bare.lower()):
            if form in self.lexicon:
                return self.lexicon[form]
        raise ValueError(f"the word {word!r} of utterance {cut.id} is not in the lexicon {self.path}: add it")


def tier_of(cut: Cut, tier: str) -> list[tuple[float, float, str]]:
    """Intervals (start, end, symbol) of an alignment tier, ordered by time, in seconds of the recording. Blank symbols are
    `SILENCE`.

    Raises:
        ValueError: the cut has no such tier.
    """
    what = f"a symbol of the tier {tier!r} of utterance {cut.id}"  # not for each item: millions are read before a training
    items = [
        (item.start, item.end, as_text(item.symbol, what) or SILENCE)
        for supervision in cut.supervisions
        for item in (supervision.alignment or {}).get(tier, [])
    ]
    if not items:
        raise ValueError(f"utterance {cut.id} has no alignment tier {tier!r}; choose another task or data")
    return sorted(items)


def transcript(cut: Cut) -> str:
    """The text of a cut: the texts of its supervisions, ordered by time.

    Raises:
        ValueError: there is no text, or it is of another type.
    """
    texts = [as_text(supervision.text, f"the text of utterance {cut.id}") for supervision in in_time(cut)]
    if not any(texts):
        raise ValueError(f"utterance {cut.id} has no transcript; choose another task or data")
    return " ".join(text for text in texts if text)


def check_phone(phone: str, where: str) -> None:
    """Refuse a phone that would be confused with a separator or a reserved token.

    Raises:
        ValueError: the phone is one. The message has the phone and its place.
    """
    if phone in RESERVED or len(phone.split()) != 1:
        raise ValueError(
            f"{where} has the phone {phone!r}: a phone must have no space and not be one of {' '.join(RESERVED)}; rename it"
        )


def read_lexicon(path: str | Path) -> dict[str, tuple[str, ...]]:
    """The phones of each word's first pronunciation.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a word has no phones, or a phone is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no lexicon at {path}: lines of WORD PHONE PHONE … are expected there")
    lexicon: dict[str, tuple[str, ...]] = {}
    for number, line in lines(path):
        word, *phones = line.split()
        phones = list(dropwhile(PROBABILITY.fullmatch, phones))
        if not phones:
            raise ValueError(f"{path}:{number}: the word {word!r} has no phones")
        for phone in phones:
            check_phone(phone, f"{path}:{number}")
        lexicon.setdefault(word, tuple(phones))
    return lexicon


def survey(cuts: Mapping[str, Iterable[Cut]], labels: Labels, new_speakers: bool = False) -> list[str]:
    """Check all cuts of a task in one pass, and collect the classes of training.

    Args:
        cuts: Cuts by role, with ``train`` among the roles.
        labels: Labels of the task.
        new_speakers: Whether other splits must have other speakers than training.

    Returns:
        Sorted label names that occur in training, or the alphabet of the labels.

    Raises:
        ValueError: an utterance is in two splits, a label does not occur in training, labels do not fit their audio, or a speaker
            of training is in another split though the task is about new speakers.
    """
    index: dict[str, int] = dict.fromkeys(labels.alphabet or (), 0)
    role_of: dict[str, str] = {}
    speakers: dict[str, str] = {}
    for role in sorted(cuts, key=lambda role: role != "train"):
        for cut in cuts[role]:
            if role_of.setdefault(cut.id, role) != role:
                raise ValueError(
                    f"utterance {cut.id} is in the {role_of[cut.id]} split and in the {role} split: results would be "
                    "meaningless; leave it out of one"
                )
            labels.check(cut)
            names = labels.names(cut)
            if labels.alphabet is not None:
                if unknown := sorted(set(names) - index.keys()):
                    raise ValueError(
                        f"{unknown[0]!r} of utterance {cut.id} ({role} split) is not in downstream.labels.alphabet: "
                        "add it there, or to downstream.labels.remove"
                    )
            elif role == "train":
                index.update(dict.fromkeys(names, 0))
            elif not labels.open_set:
                check_known(cut, names, index, role)
            if new_speakers:
                speaker = field_of(cut, "speaker")
                if role == "train":
                    speakers.setdefault(speaker, cut.id)
                elif speaker in speakers:
                    raise ValueError(
                        f"speaker {speaker} of utterance {cut.id} ({role} split) is in training too ({speakers[speaker]}), and "
                        "this task is about new speakers: leave them out of one, or set downstream.new_speakers=false"
                    )
    return sorted(index)


def check_known(cut: Cut, names: Iterable[str], index: Mapping[str, int], split: str) -> None:
    """Refuse a label that does not occur in training.

    Raises:
        ValueError: the message has the label, its utterance and the split.
    """
    for name in names:
        if name not in index:
            raise ValueError(
                f"label {name!r} of utterance {cut.id} ({split} split) does not occur in training "
                f"({len(index)} labels do): move an utterance with it into training, or leave it out of {split}"
            )
