"""Units to compare: of a ZeroSpeech item file, of an alignment tier, or whole recordings."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path

from lhotse.cut import Cut

from audiot.data.labels import SILENCE, field_of, tier_of, values_of
from audiot.data.text import lines
from audiot.measures.abx import Unit

ONE = "the only one"
COLUMNS = ("#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker")


def item_units(path: str | Path, silences: Collection[str] = ()) -> list[Unit]:
    """Units of an item file as the ZeroSpeech challenges have it: a header that names `COLUMNS`, then a line per unit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or a line is no unit. The message has the line's number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no item file at {path}: lines of {' '.join(COLUMNS)} are expected there")
    found: list[Unit] = []
    header: list[str] = []
    for number, line in lines(path):
        cells = line.split()
        if not header:
            header = cells
            if missing := [name for name in COLUMNS if name not in header]:
                raise ValueError(f"{path}:{number}: the header lacks {' '.join(missing)}: {' '.join(COLUMNS)} are expected")
            continue
        if len(cells) != len(header):
            raise ValueError(f"{path}:{number}: {len(header)} values were expected, as the header has, found {len(cells)}")
        row = dict(zip(header, cells, strict=True))
        phone, before, after = row["#phone"], row["prev-phone"], row["next-phone"]
        try:
            onset, offset = float(row["onset"]), float(row["offset"])
        except ValueError:
            onset = offset = math.nan
        if not 0 <= onset < offset < math.inf:
            times = f"{row['onset']} {row['offset']}"
            raise ValueError(f"{path}:{number}: onset and offset must be seconds, the offset the later one, found {times}")
        found.append(Unit(row["#file"], onset, offset, phone, before, after, row["speaker"], phone in silences))
    if not found:
        raise ValueError(f"{path} has no unit: lines of {' '.join(COLUMNS)} are expected")
    return found


def tier_units(cuts: Iterable[Cut], tier: str, silences: Collection[str]) -> list[Unit]:
    """Units of an alignment tier with their neighbours. Before the first and after the last one there is a silence.

    Args:
        cuts: Whole recordings with an alignment, and a speaker unless all are of one.
        tier: Name of the tier: ``phone``, ``word``, …
        silences: Symbols of silences. All of them are one neighbour, and in no triple.

    Raises:
        ValueError: a cut has no such tier, or not one speaker where others have one.
    """
    found = []
    for cut, speaker in with_speakers(cuts):
        intervals = tier_of(cut, tier)
        names = [SILENCE if symbol in silences else symbol for _, _, symbol in intervals]
        around = [SILENCE, *names, SILENCE]
        for place, (start, end, _) in enumerate(intervals):
            phone = names[place]
            begin, finish = start - cut.start, end - cut.start
            found.append(Unit(cut.id, begin, finish, phone, around[place], around[place + 2], speaker, phone == SILENCE))
    return found


def recording_units(cuts: Iterable[Cut], field: str) -> list[Unit]:
    """Whole recordings as units, by a label that each has: the word of a keyword, the digit. They have no context.

    Raises:
        ValueError: a cut has no such label, or not one speaker where others have one.
    """
    return [Unit(cut.id, 0.0, cut.duration, field_of(cut, field), "", "", speaker) for cut, speaker in with_speakers(cuts)]


def with_speakers(cuts: Iterable[Cut]) -> list[tuple[Cut, str]]:
    """Cuts with their speakers. A corpus that names none is one of a single speaker, such as a voice of Festival's.

    Raises:
        ValueError: some cuts have a speaker and others have not, or a cut has several.
    """
    cuts = list(cuts)
    if not any(values_of(cut, "speaker") for cut in cuts):
        return [(cut, ONE) for cut in cuts]
    return [(cut, field_of(cut, "speaker")) for cut in cuts]
