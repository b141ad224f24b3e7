"""Phone labels from an external alignment: one integer per frame, or the Montreal Forced Aligner's TextGrids."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from math import isfinite
from pathlib import Path
from sys import intern
from typing import NamedTuple

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.lazy import LazyMapper
from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy
from tqdm import tqdm

from audiot.data.labels import SILENCE
from audiot.data.sources import files_below
from audiot.data.text import lines, read_text

FRAMES_APART = 5  # S3PRL's alignments differ from its features by a few frames
SECONDS_APART = 0.05  # allowed difference between the ends of a TextGrid and the audio
ROUNDING_S = 0.001  # error of times with three digits


@dataclass(frozen=True)
class Tier:
    """An alignment tier without gaps. It needs a tenth of the memory of Lhotse's items, for corpora with millions of phones.

    Args:
        symbols: Symbol of each interval.
        edges: Edges of the intervals in seconds, one more than symbols: interval i goes from edge i to edge i + 1.
    """

    symbols: tuple[str, ...]
    edges: array[float]

    def items(self) -> list[AlignmentItem]:
        """The intervals as Lhotse items."""
        spans = zip(self.symbols, pairwise(self.edges), strict=True)
        return [AlignmentItem(symbol, start, round(end - start, 8)) for symbol, (start, end) in spans]


def aligned(cut: Cut, tiers: Mapping[str, Mapping[str, Tier]]) -> Cut:
    """The cut with its alignment, or unchanged if it has none.

    Args:
        cut: Cut with one supervision, from the start of its recording.
        tiers: Tiers of each utterance by name.
    """
    if cut.id not in tiers:
        return cut
    alignment = {name: tier.items() for name, tier in tiers[cut.id].items()}
    return fastcopy(cut, supervisions=[fastcopy(cut.supervisions[0], alignment=alignment)])


def aligned_cuts(cuts: list[Cut], tiers: Mapping[str, Mapping[str, Tier]]) -> CutSet:
    """The cuts, with alignments that are added during iteration, because Lhotse's items for all would fill gigabytes."""
    if any(cut.id in tiers for cut in cuts):
        return CutSet(LazyMapper(cuts, partial(aligned, tiers=tiers)))
    return CutSet(cuts)


def read_phone_labels(
    path: str | Path, cuts: Iterable[Cut], strip_stress: bool = False, progress: bool = False
) -> dict[str, dict[str, Tier]]:
    """Alignment tiers of the cuts that have labels: utterance → ``phone`` (and ``word``) → intervals.

    Args:
        path: File of frame labels, see :func:`read_frame_labels`, or folder of TextGrids, see :func:`read_textgrids`.
        cuts: Whole recordings. Labels are searched by id and checked against the duration.
        strip_stress: Whether to remove stress marks of TextGrids, see :func:`phone_symbol`.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: labels are broken or belong to other audio.
    """
    path = Path(path)
    audio = {cut.id: (cut.num_samples, cut.sampling_rate) for cut in cuts}
    if path.is_dir():
        return read_textgrids(path, audio, strip_stress, progress)
    if not path.is_file():
        raise FileNotFoundError(
            f"no phone labels at {path}: expected a file of lines UTTERANCE PHONE PHONE …, such as converted_aligned_phones.txt "
            "(in data/cpc_phone of github.com/s3prl/s3prl, zipped), or a folder of UTTERANCE.TextGrid files"
        )
    if strip_stress:
        raise ValueError(f"data.strip_stress is for TextGrids, but {path} has one integer per frame: leave it out")
    return read_frame_labels(path, audio, progress)


def phone_label_files(path: str | Path) -> list[str]:
    """The files that `read_phone_labels` reads: the file of frame labels, or the TextGrids below the folder."""
    return files_below(path, ".TextGrid", ".textgrid", ".TEXTGRID") if os.path.isdir(path) else [str(path)]


def read_frame_labels(
    path: str | Path, audio: Mapping[str, tuple[int, int]], progress: bool = False
) -> dict[str, dict[str, Tier]]:
    """Read one integer phone per 10 ms, from lines ``UTTERANCE p0 p1 …`` (Rivière et al. 2020, arXiv:2002.02848; S3PRL).

    Label t belongs to the 25 ms frame that begins at 10·t ms, as Kaldi and S3PRL cut frames. It covers the 10 ms around the
    frame's centre, 12.5 + 10·t ms. The first label begins and the last ends with the audio. The file is read line by line.

    Args:
        path: Path of the file.
        audio: Samples and sample rate of each utterance. Lines of other utterances are skipped.
        progress: Whether to show a progress bar.

    Returns:
        Intervals by utterance and tier ``phone``. Their symbols are the integers as decimal text.

    Raises:
        ValueError: a line is broken, an utterance is repeated, or the numbers of labels and frames differ by more than
            ``FRAMES_APART``.
    """
    tiers: dict[str, dict[str, Tier]] = {}
    symbols: dict[str, str] = {}
    for number, line in tqdm(lines(path), desc="read phone labels", unit="utt", disable=not progress):
        utterance, *labels = line.split()
        if utterance not in audio:
            continue
        for label in set(labels) - symbols.keys():
            if not re.fullmatch("[0-9]+", label):
                raise ValueError(f"{path}:{number}: expected UTTERANCE and one integer phone per frame, found {label[:40]!r}")
            symbols[label] = intern(str(int(label)))
        if utterance in tiers:
            raise ValueError(f"{path}:{number}: utterance {utterance} occurs a second time")
        num_samples, rate = audio[utterance]
        length, hop = rate * 25 // 1000, rate // 100
        frames = max(1 + (num_samples - length) // hop, 0)
        if not labels or abs(len(labels) - frames) > FRAMES_APART:
            raise ValueError(
                f"{path}:{number}: utterance {utterance} has {len(labels):,} labels and {frames:,} frames of 10 ms "
                f"({num_samples:,} samples at {rate:,} Hz), which may differ by {FRAMES_APART}: labels of another file?"
            )
        runs, edges, first = [], array("d"), 0
        for label, run in groupby(labels[: max(frames, 1)]):
            runs.append(symbols[label])
            edges.append((first * hop + (length - hop) / 2) / rate if first else 0.0)
            first += len(list(run))
        edges.append(num_samples / rate)
        tiers[utterance] = {"phone": Tier(tuple(runs), edges)}
    return tiers


def read_textgrids(
    root: str | Path, audio: Mapping[str, tuple[int, int]], strip_stress: bool = False, progress: bool = False
) -> dict[str, dict[str, Tier]]:
    """Read TextGrids of the Montreal Forced Aligner (McAuliffe et al. 2017), ``UTTERANCE.TextGrid`` anywhere below a folder.

    The tiers ``phones`` and optionally ``words`` (also ``SPEAKER - phones``) become ``phone`` and ``word``. Phones are named by
    :func:`phone_symbol`. An empty word and time outside all intervals are ``SIL``.

    Args:
        root: Folder of the TextGrids.
        audio: Samples and sample rate of each utterance. Other TextGrids are skipped.
        strip_stress: Whether to remove stress marks, see :func:`phone_symbol`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: an utterance has two TextGrids, or a TextGrid is broken, has overlapping intervals, lacks a tier of phones, or
            ends more than ``SECONDS_APART`` before or after the audio.
    """
    paths: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            utterance, suffix = os.path.splitext(name)
            if suffix.lower() == ".textgrid" and utterance in audio:
                path = Path(folder, name)
                if utterance in paths:
                    raise ValueError(f"utterance {utterance} has two TextGrids, {paths[utterance]} and {path}: move one away")
                paths[utterance] = path

    def read(utterance: str) -> dict[str, Tier]:
        num_samples, rate = audio[utterance]
        return _textgrid_tiers(paths[utterance], num_samples / rate, strip_stress)

    with ThreadPoolExecutor(16) as pool:  # reading small files mostly waits for disks
        bar = tqdm(pool.map(read, paths), total=len(paths), desc="read TextGrids", unit="utt", disable=not progress)
        return dict(zip(paths, bar, strict=True))


def _textgrid_tiers(path: Path, duration_s: float, strip_stress: bool) -> dict[str, Tier]:
    grid = read_textgrid(path)
    ends = [tier[-1].end for tier in grid.tiers.values() if tier]
    if abs(grid.end - duration_s) > SECONDS_APART or any(end > duration_s + SECONDS_APART for end in ends):
        raise ValueError(
            f"{path} ends at {max([grid.end, *ends]):.3f} s, the audio of {path.stem} at {duration_s:.3f} s, which may be "
            f"{SECONDS_APART * 1000:.0f} ms apart: the TextGrid of another file?"
        )
    tiers = {}
    for name, plural in (("phone", "phones"), ("word", "words")):
        found = [title for title in grid.tiers if title.lower() == plural or title.lower().endswith(f" - {plural}")]
        if len(found) > 1 or (name == "phone" and not found):
            there = ", ".join(map(repr, grid.tiers)) or "none"
            raise ValueError(f"{path}: expected one tier 'phones' and at most one 'words', of one speaker; its tiers: {there}")
        for title in found:
            if not grid.tiers[title]:
                raise ValueError(f"{path}: the tier {title!r} has no intervals")
            tiers[name] = _without_gaps(grid.tiers[title], duration_s, name == "phone", strip_stress)
    return tiers


def _without_gaps(intervals: Iterable[Interval], duration_s: float, phones: bool, strip_stress: bool) -> Tier:
    symbols: list[str] = []
    edges = array("d", [0.0])
    for start, end, text in intervals:
        if start >= duration_s or end <= edges[-1]:
            continue
        if start > edges[-1] + ROUNDING_S:
            symbols.append(SILENCE)
            edges.append(start)
        symbols.append(intern(phone_symbol(text, strip_stress) if phones else text.strip() or SILENCE))
        edges.append(min(end, duration_s))
    if duration_s > edges[-1] + ROUNDING_S:
        if symbols and symbols[-1] == SILENCE:
            edges.pop()
        else:
            symbols.append(SILENCE)
        edges.append(duration_s)
    return Tier(tuple(symbols), edges)


def phone_symbol(text: str, strip_stress: bool = False) -> str:
    """audiot's name for a phone of the Montreal Forced Aligner.

    An empty interval, ``sil`` and ``<eps>`` become ``SIL``. ``sp`` (a short pause), ``spn`` (spoken noise) and the phones keep
    their names. English ARPAbet then has 72 classes: 24 consonants, 15 vowels with three degrees of stress, SIL, sp and spn.
    ``strip_stress`` merges the degrees of stress (AH0 → AH), sp with SIL, and writes SPN for spn: 41 classes.
    """
    text = text.strip()
    if text.lower() in ("", "sil", "<eps>"):
        return SILENCE
    if strip_stress:
        return {"sp": SILENCE, "spn": "SPN"}.get(text) or re.sub(r"(?<=[A-Z])[012]$", "", text)
    return text


class Interval(NamedTuple):
    """An interval of a TextGrid's tier, in seconds."""

    start: float
    end: float
    text: str


class TextGrid(NamedTuple):
    """Content of a TextGrid: its end in seconds, and the intervals of each tier."""

    end: float
    tiers: dict[str, list[Interval]]


def read_textgrid(path: str | Path) -> TextGrid:
    """Read Praat's TextGrid in text format, long or short, in UTF-8 or UTF-16. Tiers of points are left out.

    In both formats, Praat reads only texts in quotes, free-standing numbers and flags. The rest is for human readers.
    (Own code, because praatio and textgrid do not report the place of an error and are slower, and tgt accepts some truncated
    files.)

    Raises:
        ValueError: the file is not such a TextGrid, is truncated, or has overlapping or negative intervals. The message has the
            line.
    """
    tokens = _Tokens(Path(path))
    kinds = (tokens.text("ooTextFile"), tokens.text("TextGrid"))
    if not kinds[0].startswith("ooTextFile") or kinds[1] != "TextGrid":
        raise tokens.error(f"expected a TextGrid in text format, found {' '.join(kinds)[:40]!r}")
    tokens.number("the start")
    end = tokens.number("the end")
    tiers: dict[str, list[Interval]] = {}
    for _ in range(tokens.count("tiers") if tokens.flag() else 0):
        kind = tokens.text("the kind of a tier")
        if kind not in ("IntervalTier", "TextTier"):
            raise tokens.error(f"expected IntervalTier or TextTier, found {kind[:40]!r}")
        name = tokens.text("the name of a tier")
        if name in tiers:
            raise tokens.error(f"there are two tiers {name!r}")
        tokens.number("the start of a tier")
        tokens.number("the end of a tier")
        count = tokens.count("intervals")
        if kind == "TextTier":
            for _ in range(count):
                tokens.number("the time of a point")
                tokens.text("the text of a point")
            continue
        intervals = tiers[name] = []
        last = 0.0
        for index in range(1, count + 1):
            start, stop = tokens.number("the start of an interval"), tokens.number("the end of an interval")
            if start < last - ROUNDING_S:
                raise tokens.error(f"interval {index} of {name!r} begins at {start:g} s, the one before it ends at {last:g} s")
            if stop <= start:
                raise tokens.error(f"interval {index} of {name!r} goes from {start:g} to {stop:g} s")
            intervals.append(Interval(start, stop, tokens.text("the text of an interval")))
            last = stop
    tokens.end()
    return TextGrid(end, tiers)


class _Tokens:
    """Successive texts, numbers and flags of a file in Praat's text format."""

    # Ignored words (skipped here, which is twice as fast as matching each), then one of: a text in quotes, with inner quotes
    # doubled; a free-standing number or flag; a comment; another word; an unclosed quote.
    PATTERN = re.compile(
        r'\s*(?:[^\s"!0-9<+-][^\s"]*\s+)*'
        r'(?:"([^"]*(?:""[^"]*)*)"|([+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|<[a-z]+>)(?!\S)|!.*|[^\s"]+|("))'
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = read_text(path, utf_16=True)
        matches = (match for match in self.PATTERN.finditer(self.content) if match.lastindex)
        self.found = [(match.lastindex, match[match.lastindex or 0], match.start(match.lastindex or 0)) for match in matches]
        self.at = 0

    def error(self, message: str) -> ValueError:
        """Error with the line of the last token."""
        return self._error(message, self.found[self.at - 1][2] if self.at else 0)

    def _error(self, message: str, position: int) -> ValueError:
        return ValueError(f"{self.path}:{self.content.count(chr(10), 0, position) + 1}: {message}")

    def _next(self, wanted: int, what: str, kind: str) -> str:
        if self.at == len(self.found):
            raise self._error(f"the file ends where {what} is expected: is it cut off?", len(self.content))
        group, value, _ = self.found[self.at]
        self.at += 1
        if group == 3:
            raise self.error("the text in quotes that begins here does not end: is the file cut off?")
        if group != wanted:
            raise self.error(f"expected {what}, {kind}, found {value[:40]!r}")
        return value

    def text(self, what: str) -> str:
        return self._next(1, what, "a text in quotes").replace('""', '"')

    def number(self, what: str) -> float:
        word = self._next(2, what, "a number")
        if word[0] == "<":
            raise self.error(f"expected {what}, a number, found {word!r}")
        if not isfinite(float(word)):
            raise self.error(f"expected {what}, a number, found {word[:40]}, which is too large")
        return float(word)

    def count(self, what: str) -> int:
        number = self.number(f"the number of {what}")
        if number < 0 or number != int(number):
            raise self.error(f"expected the number of {what}, found {number:g}")
        return int(number)

    def flag(self) -> bool:
        """Whether the flag says that there are tiers."""
        word = self._next(2, "<exists> or <absent>", "a flag")
        if word not in ("<exists>", "<absent>"):
            raise self.error(f"expected <exists> or <absent>, found {word!r}")
        return word == "<exists>"

    def end(self) -> None:
        if self.at < len(self.found):
            self.at += 1
            raise self.error(f"expected the end of the file, found {self.found[self.at - 1][1][:40]!r}")
