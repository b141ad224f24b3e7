"""ABX discrimination of phones (Schatz et al. 2013; Schatz 2016): is X, another case of phone A, nearer to A than to B?

Three units make a triple: A and X are of one phone, B of another. `within` takes all three from one speaker, `across` X from
another speaker than A and B. An error is a triple where X is nearer to B; a tie counts half. Triples with the same phones,
speakers and (unless any will do) context make a cell, whose error is the share of its triples that are errors. Means are taken
over the cells of two phones and a speaker (of A and B), then over speakers, then over pairs of phones. So count the ZeroSpeech
challenges and fastabx (Poli et al. 2025, arXiv:2505.02692). Chance is 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from audiot.base.streams import bits, key
from audiot.measures.warping import Distance, size_class, warp

SPEAKERS = ("within", "across")
CONTEXTS = ("within", "any")
ROWS = 10_000_000  # candidate cells that are looked at together
BUDGET = {"cpu": 2**24}  # distances of frames that are held together on a device
BUDGET_ELSEWHERE = 2**28


@dataclass(frozen=True)
class Unit:
    """A stretch of speech with a label: a phone with its neighbours, a word, or a whole recording.

    Attributes:
        utterance: Id of the utterance.
        onset: Its begin in seconds.
        offset: Its end in seconds.
        phone: Its label.
        before: Label before it, part of its context.
        after: Label after it, part of its context.
        speaker: Who says it.
        silent: Whether it is a silence, which is in no triple.
    """

    utterance: str
    onset: float
    offset: float
    phone: str
    before: str
    after: str
    speaker: str
    silent: bool = False


@dataclass(frozen=True)
class Cells:
    """The triples to compare. Units of one phone, context and speaker make a group; a cell is three groups.

    Attributes:
        members: Numbers of units, group after group.
        sizes: Units of each group (G,).
        a: Group of A in each cell (C,).
        b: Group of B in each cell (C,).
        x: Group of X in each cell (C,). It is the group of A in triples of one speaker.
        phones: Phone of each group, as a number (G,).
        contexts: Context of each group (G,).
        speakers: Speaker of each group (G,).
    """

    members: np.ndarray
    sizes: np.ndarray
    a: np.ndarray
    b: np.ndarray
    x: np.ndarray
    phones: np.ndarray
    contexts: np.ndarray
    speakers: np.ndarray

    def num_triples(self) -> int:
        """Number of triples in all cells."""
        others = np.where(self.a == self.x, self.sizes[self.x] - 1, self.sizes[self.x])
        return int((self.sizes[self.a] * self.sizes[self.b] * others).sum())


def make_cells(
    units: Sequence[Unit],
    speaker: str,
    context: str,
    max_units: int | None = None,
    max_speakers: int | None = None,
    seed: int = 0,
) -> Cells:
    """The cells of a comparison.

    Args:
        units: Units that have frames.
        speaker: ``within`` or ``across``.
        context: ``within``: A, B and X have the same neighbours; ``any``: neighbours don't count.
        max_units: Most units of a group, which a hash of seed and unit chooses; None takes all.
        max_speakers: Most speakers of X for each A and B, which a hash chooses too; None takes all.
        seed: Seed of both choices.

    Raises:
        ValueError: an unknown choice, or a limit below its least.
    """
    _check(speaker, context, max_units, max_speakers)
    spoken = np.array([number for number, unit in enumerate(units) if not unit.silent], dtype=np.int64)
    names = [(units[number].phone, units[number].speaker) for number in spoken]
    around = [(units[number].before, units[number].after) if context == "within" else ("", "") for number in spoken]
    ids = [(units[number].utterance, round(units[number].onset * 1e6), units[number].phone) for number in spoken]
    phones, speakers, contexts = (_numbered(values) for values in ([p for p, _ in names], [s for _, s in names], around))
    luck = np.array([key("abx unit", seed, *one) for one in ids], dtype=np.int64)
    order = np.lexsort((luck, speakers, phones, contexts))
    kinds = np.stack([contexts, phones, speakers], 1)[order]
    begins = np.flatnonzero(np.r_[True, (np.diff(kinds, axis=0) != 0).any(1)][: len(kinds)])
    sizes = np.diff(np.r_[begins, len(kinds)])
    place = np.arange(len(kinds)) - np.repeat(begins, sizes)
    kept = place < (len(kinds) if max_units is None else max_units)
    kinds, members = kinds[begins], spoken[order][kept]
    sizes = sizes if max_units is None else np.minimum(sizes, max_units)
    contexts, phones, speakers = kinds.T
    where = _numbered(list(zip(contexts.tolist(), speakers.tolist(), strict=True)))
    a, b = _equal(where, where)
    a, b = (groups[phones[a] != phones[b]] for groups in (a, b))
    if speaker == "within":
        a, b = (groups[sizes[a] > 1] for groups in (a, b))
        x = a
    else:
        labels = [(*around[n], *names[n]) for n in order[begins]]
        lots = np.array([key("abx speaker", seed, *label) for label in labels], dtype=np.int64)
        a, b, x = _with_other_speakers(a, b, phones, contexts, speakers, lots, max_speakers)
    # Cells that share distances stand together, so that these are computed once.
    pairs = [np.sort(np.stack(two), 0) for two in ((speakers[a], speakers[x]), (phones[a], phones[b]))]
    together = np.lexsort((*pairs[1][::-1], *pairs[0][::-1], contexts[a]))
    return Cells(members, sizes, a[together], b[together], x[together], phones, contexts, speakers)


def _check(speaker: str, context: str, max_units: int | None, max_speakers: int | None) -> None:
    for name, value, known in (("speaker", speaker, SPEAKERS), ("context", context, CONTEXTS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, found {value!r}")
    for name, limit, least in (("max_units", max_units, 2), ("max_speakers", max_speakers, 1)):
        if limit is not None and limit < least:
            raise ValueError(f"{name} must be at least {least}, or null for no limit, found {limit}")


def _numbered(values: Sequence) -> np.ndarray:
    """A number for each value, in the values' order: equal ones get the same."""
    index = {value: number for number, value in enumerate(sorted(set(values)))}
    return np.array([index[value] for value in values], dtype=np.int64)


def _equal(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (i, j) of all equal numbers: left[i] == right[j]."""
    order = np.argsort(right, kind="stable")
    first, end = (np.searchsorted(right[order], left, side) for side in ("left", "right"))
    return np.repeat(np.arange(len(left)), end - first), order[_ranges(first, end - first)]


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, … with so many numbers, for one start after the other."""
    begins = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - begins, counts)


def _with_other_speakers(
    a: np.ndarray,
    b: np.ndarray,
    phones: np.ndarray,
    contexts: np.ndarray,
    speakers: np.ndarray,
    lots: np.ndarray,
    most: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of A, B and X, for every A and B with the groups X of A's phone by other speakers, or so many of them by lot."""
    kinds = _numbered(list(zip(contexts.tolist(), phones.tolist(), strict=True)))
    counts = np.bincount(kinds, minlength=1)[kinds[a]]
    chunks = np.cumsum(counts) // ROWS
    found = []
    for chunk in np.unique(chunks):
        own = np.flatnonzero(chunks == chunk)
        pair, x = _equal(kinds[a[own]], kinds)
        other = speakers[a[own][pair]] != speakers[x]
        pair, x = own[pair[other]], x[other]
        if most is not None:
            keys = torch.from_numpy(lots[a[pair]] * 3 + lots[b[pair]] * 5 + lots[x] * 7)
            order = np.lexsort((bits(keys, 1)[:, 0].numpy(), pair))
            pair, x = pair[order], x[order]
            begins = np.flatnonzero(np.diff(pair, prepend=-1))
            kept = np.arange(len(pair)) - np.repeat(begins, np.diff(np.r_[begins, len(pair)])) < most
            pair, x = pair[kept], x[kept]
        found.append((a[pair], b[pair], x))
    empty = np.empty(0, dtype=np.int64)
    joined = [np.concatenate(parts) for parts in zip(*found, strict=True)] or [empty, empty, empty]
    return joined[0], joined[1], joined[2]


@torch.inference_mode()
def errors(cells: Cells, frames: Tensor, firsts: np.ndarray, counts: np.ndarray, distance: Distance) -> np.ndarray:
    """The error of each cell (C,), in float64.

    Args:
        cells: The cells.
        frames: Frames of all utterances (F, d), on the device that computes.
        firsts: First frame of each unit.
        counts: Frames of each unit, at least one.
        distance: Distance of frames.
    """
    device = frames.device
    firsts, counts = firsts[cells.members], counts[cells.members]  # of units, group after group
    own = torch.from_numpy(_ranges(firsts, counts)).to(device)
    frames = distance.prepared(frames[own])
    first_unit = np.cumsum(cells.sizes) - cells.sizes
    group_of = np.repeat(np.arange(len(cells.sizes)), cells.sizes)
    num_frames = np.bincount(group_of, counts, len(cells.sizes)).astype(np.int64)
    layout = _Layout(frames, distance, cells.sizes, first_unit, num_frames, counts)
    work = num_frames[cells.x] * (num_frames[cells.a] + num_frames[cells.b])
    chunks = np.cumsum(work) // BUDGET.get(device.type, BUDGET_ELSEWHERE)
    found = np.empty(len(work))
    for chunk in np.split(np.arange(len(work)), np.flatnonzero(np.diff(chunks)) + 1) if len(work) else []:
        found[chunk] = layout.errors(cells.a[chunk], cells.b[chunk], cells.x[chunk])
    return found


class _Layout:
    """Frames in the order of groups and units, and what is computed from them.

    Args:
        frames: Prepared frames, unit after unit.
        distance: Distance of frames.
        sizes: Units of each group.
        first_unit: Number of each group's first unit.
        num_frames: Frames of each group.
        lengths: Frames of each unit.
    """

    def __init__(
        self,
        frames: Tensor,
        distance: Distance,
        sizes: np.ndarray,
        first_unit: np.ndarray,
        num_frames: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        self.frames = frames
        self.distance = distance
        self.sizes = sizes
        self.first_unit = first_unit
        self.num_frames = num_frames
        self.first_frame = np.cumsum(num_frames) - num_frames
        self.lengths = lengths
        self.unit_frame = np.cumsum(lengths) - lengths

    def errors(self, a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Errors of some cells: the distances that they need are computed once, whichever cells share them."""
        groups = len(self.sizes)
        wanted = [np.minimum(x, other) * groups + np.maximum(x, other) for other in (a, b)]
        pairs, place = np.unique(np.concatenate(wanted), return_inverse=True)
        low, high = pairs // groups, pairs % groups
        distances, offsets = self._distances(low, high)
        found = np.empty(len(a))
        classes = size_class(self.sizes[a]) * (1 << 32) + size_class(self.sizes[b])
        order = np.argsort(classes, kind="stable")
        to_a, to_b = place[: len(a)], place[len(a) :]
        for some in np.split(order, np.flatnonzero(np.diff(classes[order])) + 1):
            found[some] = self._share(
                distances,
                self._rows(offsets, low, high, to_a[some], x[some]),
                self._rows(offsets, low, high, to_b[some], x[some]),
                self.sizes[a[some]],
                self.sizes[b[some]],
                self.sizes[x[some]],
                a[some] == x[some],
            )
        return found

    def _rows(
        self, offsets: np.ndarray, low: np.ndarray, high: np.ndarray, pairs: np.ndarray, x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the distances of X's units are: place of the first, step to X's next unit, step to the other group's next."""
        wide, turned = self.sizes[high[pairs]], low[pairs] != x
        return offsets[pairs], np.where(turned, 1, wide), np.where(turned, wide, 1)

    def _distances(self, low: np.ndarray, high: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Distances of all units of pairs of groups, ordered by the first group: flat, and the place of each pair's first."""
        begins = np.flatnonzero(np.diff(low, prepend=-1))
        ends = np.r_[begins[1:], len(low)]
        widths = np.add.reduceat(self.num_frames[high], begins)
        areas = self.num_frames[low[begins]] * widths
        starts = np.cumsum(areas) - areas
        costs = torch.empty(int(areas.sum()), device=self.frames.device)
        columns = torch.from_numpy(_ranges(self.first_frame[high], self.num_frames[high])).to(self.frames.device)
        first_column = np.r_[0, np.cumsum(widths)]
        for number, group in enumerate(low[begins]):
            begin, count = self.first_frame[group], self.num_frames[group]
            others = high[begins[number] : ends[number]]
            if len(others) == 1:
                second = self.frames[self.first_frame[others[0]] :][: self.num_frames[others[0]]]
            else:
                second = self.frames[columns[first_column[number] : first_column[number + 1]]]
            matrix = self.distance.between(self.frames[begin : begin + count], second)
            costs[starts[number] : starts[number] + areas[number]] = matrix.flatten()
        block = np.repeat(np.arange(len(begins)), ends - begins)  # matrix of each pair of groups
        before = np.cumsum(self.num_frames[high]) - self.num_frames[high]
        before -= np.repeat(before[begins], ends - begins)  # columns of the matrix before the pair's own
        entries = self.sizes[low] * self.sizes[high]
        pair = np.repeat(np.arange(len(low)), entries)
        within = _ranges(np.zeros(len(low), dtype=np.int64), entries)
        row = self.first_unit[low[pair]] + within // self.sizes[high[pair]]
        column = self.first_unit[high[pair]] + within % self.sizes[high[pair]]
        width = widths[block[pair]]
        place = starts[block[pair]] + before[pair]
        place += (self.unit_frame[row] - self.first_frame[low[pair]]) * width
        place += self.unit_frame[column] - self.first_frame[high[pair]]
        distances = warp(costs, place, width, self.lengths[row], self.lengths[column])
        return distances, np.cumsum(entries) - entries

    def _share(
        self,
        distances: Tensor,
        to_a: tuple[np.ndarray, np.ndarray, np.ndarray],
        to_b: tuple[np.ndarray, np.ndarray, np.ndarray],
        size_a: np.ndarray,
        size_b: np.ndarray,
        size_x: np.ndarray,
        same: np.ndarray,
    ) -> np.ndarray:
        """Share of the triples of each cell where X is nearer to B. Cells have about the same sizes.

        Distances to the units of B are sorted; where a distance to one of A would stand among them is the number of errors.
        """
        device = distances.device
        cell = np.repeat(np.arange(len(size_x)), size_x)  # a row for each X of each cell
        number = _ranges(np.zeros(len(size_x), dtype=np.int64), size_x)
        total = np.zeros(len(size_x))
        most_a, most_b = int(size_a.max()), int(size_b.max())
        step = max(1, (2**20 if device.type == "cpu" else 2**25) // (most_a + most_b))
        for begin in range(0, len(cell), step):
            cells, units = cell[begin : begin + step], number[begin : begin + step]
            near, is_a = _gathered(distances, to_a, size_a, cells, units, most_a)
            far, is_b = _gathered(distances, to_b, size_b, cells, units, most_b)
            itself = torch.from_numpy(np.where(same[cells], units, -1)).to(device)
            is_a &= torch.arange(most_a, device=device) != itself[:, None]
            far = far.masked_fill(~is_b, torch.inf).sort(dim=1).values
            wrong = torch.searchsorted(far, near, right=False) + torch.searchsorted(far, near, right=True)
            share = (wrong * is_a).sum(1).double().cpu().numpy() / 2
            total += np.bincount(cells, share, len(total))
        return total / (size_x * size_b * (size_a - same))


def _gathered(
    distances: Tensor,
    where: tuple[np.ndarray, np.ndarray, np.ndarray],
    sizes: np.ndarray,
    cells: np.ndarray,
    units: np.ndarray,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Distances of rows to the units of a group (R, most), and which of them there are."""
    first, step, other = where
    base, steps, count = (
        torch.from_numpy(values).to(distances.device)
        for values in (first[cells] + units * step[cells], other[cells], sizes[cells])
    )
    place = torch.arange(most, device=distances.device)
    there = place < count[:, None]
    return distances[(base[:, None] + place * steps[:, None]).clamp_(max=len(distances) - 1)].contiguous(), there
