"""Phones of the demo corpus: a map from eSpeak NG's IPA names in five English accents to 39 ARPAbet phones and SIL.

The table follows sound, not spelling: Caribbean "the" starts with D, Lancashire "cup" has UH.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from audiot.data.phones import PHONE_CLASSES

# Phone → eSpeak's names for it, without stress marks.
_NAMES = {
    "AA": "ɑː ɒ ɑə aː a: aa",
    "AE": "æ a",
    "AH": "ə ʌ ɐ ɜ",
    "AO": "ɔː ɔ ɔə o oə",
    "AW": "aʊ æʊ ʌʉ",
    "AY": "aɪ",
    "B": "b",
    "CH": "tʃ",
    "D": "d",
    "DH": "ð",
    "EH": "ɛ eə",
    "ER": "ɜː ɚ əɹ ʌɹ",
    "EY": "eɪ eː e",
    "F": "f",
    "G": "ɡ",
    "HH": "h",
    "IH": "ɪ ᵻ",
    "IY": "iː i",
    "JH": "dʒ",
    "K": "k",
    "L": "l",
    "M": "m",
    "N": "n n̩",
    "NG": "ŋ",
    "OW": "oʊ oː əʊ",
    "OY": "ɔɪ",
    "P": "p",
    "R": "ɹ r",
    "S": "s",
    "SH": "ʃ",
    "T": "t ɾ ʔ t̪",
    "TH": "θ",
    "UH": "ʊ",
    "UW": "uː ʉ ʉː",
    "V": "v",
    "W": "w ʍ",
    "Y": "j ʲ",
    "Z": "z",
    "ZH": "ʒ",
}
# Names of two successive phones. Each gets half of the time.
_PAIRS = {
    "əl": ("AH", "L"),
    "aɪə": ("AY", "AH"),
    "aɪɚ": ("AY", "ER"),
    "iə": ("IY", "AH"),
    "ʊə": ("UH", "AH"),
    "ɑːɹ": ("AA", "R"),
    "ɔːɹ": ("AO", "R"),
    "ɛɹ": ("EH", "R"),
    "ɪɹ": ("IH", "R"),
    "ʊɹ": ("UH", "R"),
    "ʉɹ": ("UW", "R"),
}
SILENCE = "SIL"
PHONES = (SILENCE, *_NAMES)
_PHONES_OF: dict[str, tuple[str, ...]] = {
    "": (SILENCE,),
    **{name: (phone,) for phone, names in _NAMES.items() for name in names.split()},
    **_PAIRS,
}

_VOWELS = set(PHONE_CLASSES["vowels"])
_STOPS = {*PHONE_CLASSES["stops"], *PHONE_CLASSES["affricates"]}  # an affricate begins with a closure too
_CODA_LIQUID = 0.4  # liquid's share of vowel and liquid, measured at the largest spectral change in 80 words


class Span(NamedTuple):
    """A phone from sample ``start`` up to sample ``end``."""

    phone: str
    start: int
    end: int


def phone_spans(events: Sequence[tuple[str, int]], samples: np.ndarray, sample_rate: int) -> list[Span]:
    """Phones that cover `samples` (N,) without gap or overlap, from eSpeak's events (IPA name, start sample).

    eSpeak's events are corrected in three places:

    - A liquid that closes a syllable ("ball") sounds within its vowel, and its event comes too late. It gets the last 40% of the
      vowel.
    - The closure of a stop is counted to the phone before. The quiet end of that phone is given to the stop, as in corpora that
      were aligned by hand.
    - The glide between "the" and "apple" has no name, like a pause. It becomes a Y.

    Raises:
        ValueError: the table lacks a name.
    """
    names = [name.lstrip("ˈˌ") for name, _ in events]
    for name in names:
        if name not in _PHONES_OF:
            raise ValueError(f"eSpeak's phone {name!r} is not in the phone table of the demo corpus: add it there")
    phones_of = [_PHONES_OF[name] for name in names]
    starts = [start for _, start in events] + [len(samples)]

    hop = sample_rate // 200  # 5 ms
    spans: list[tuple[tuple[str, ...], int]] = [((SILENCE,), 0)]
    for i, phones in enumerate(phones_of):
        start, end = starts[i], starts[i + 1]
        previous, previous_start = spans[-1]
        before_vowel = i + 1 < len(phones_of) and phones_of[i + 1][0] in _VOWELS
        if phones == (SILENCE,):
            if previous[-1] in ("IH", "IY") and before_vowel:
                phones = ("Y",)
            elif start == end or previous == phones:
                continue
        elif phones[0] in ("L", "R") and previous[-1] in _VOWELS and not before_vowel:
            if _quiet_end(samples[previous_start:end], hop) >= end - start - 2 * hop:
                start -= round(_CODA_LIQUID * (start - previous_start))
        elif phones[0] in _STOPS and previous != (SILENCE,):
            start -= _quiet_end(samples[previous_start:start], hop)
        spans.append((phones, start))

    pieces = []
    for (phones, start), end in zip(spans, [start for _, start in spans[1:]] + [len(samples)], strict=True):
        edges = np.linspace(start, end, len(phones) + 1).round().astype(int).tolist()
        pieces += [Span(*piece) for piece in zip(phones, edges[:-1], edges[1:], strict=True)]
    return [piece for piece in pieces if piece.end > piece.start]


def _quiet_end(samples: np.ndarray, hop: int) -> int:
    """Number of samples at the end of a phone whose level is below a tenth of its peak, at most 60% of the phone."""
    hops = samples[len(samples) % hop :].astype(np.float32).reshape(-1, hop)
    levels = np.sqrt((hops**2).mean(axis=1))
    loud = np.flatnonzero(levels >= 0.1 * levels.max(initial=0.0))
    quiet = len(levels) - 1 - int(loud[-1]) if len(loud) else 0
    return min(quiet * hop, int(0.6 * len(samples)))
