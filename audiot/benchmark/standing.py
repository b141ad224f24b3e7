"""Where a mechanism passes the baseline as the sequences grow longer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from audiot.benchmark.attention_results import Row, by_mechanism

MIN_ROUNDS = 3  # for a comparison: with fewer, the quartiles coincide or nearly so


@dataclass(frozen=True)
class Standing:
    """How a mechanism compares with the baseline as the length grows.

    Args:
        crossings: Lengths at which it passes the baseline (True) or falls behind it (False).
        faster: Measured lengths at which it is faster by more than the measurements spread.
        slower: Measured lengths at which it is slower by more than they spread.
        level: Measured lengths at which the difference is within the spread.
        few_rounds: Whether there were fewer than `MIN_ROUNDS` rounds. All lengths are level then.
    """

    crossings: tuple[tuple[float, bool], ...]
    faster: tuple[int, ...]
    slower: tuple[int, ...]
    level: tuple[int, ...]
    few_rounds: bool = False

    def sentence(self, name: str, baseline: str) -> str:
        """The comparison in words."""
        lengths = sorted((*self.faster, *self.slower, *self.level))
        if not lengths:
            return f"{name} was not measured"
        if self.few_rounds:
            return f"{name} and {baseline}: too few rounds to compare (at least {MIN_ROUNDS})"
        if self.crossings:
            words = [
                f"{'passes' if up else 'falls behind'} {baseline} at about T = {two_digits(at)}" for at, up in self.crossings
            ]
            return f"{name} {' and '.join(words)}"
        level = f"; level at T = {listed(self.level)}" if self.level else ""
        if self.faster:
            return f"{name} is faster than {baseline} at T = {listed(self.faster)}{level}"
        if self.slower:
            return f"{name} never passes {baseline} within the lengths measured ({listed(lengths)}){level}"
        return f"{name} and {baseline} are level: they differ by less than the measurements spread"

    def words(self) -> str:
        """The comparison in a few words, for a legend."""
        if self.crossings:
            return ", ".join(f"{'faster' if up else 'slower'} from T ≈ {two_digits(at)}" for at, up in self.crossings)
        if self.faster:
            return "faster" if not self.level else f"faster at T = {listed(self.faster)}"
        if self.few_rounds:
            return "too few rounds to compare"
        return "slower" if self.slower else "level" if self.level else "not measured"


def standing(own: Sequence[Row], baseline: Sequence[Row]) -> Standing:
    """Compare a mechanism's rows with the baseline's rows of the same table.

    A length counts as faster or slower if the ranges between the quartiles do not overlap, and if there were `MIN_ROUNDS` or
    more. Between a faster and a slower length lies a crossing, where the speed-up is 1. It is interpolated linearly on
    logarithmic axes.
    """
    base = {row.length: row for row in baseline if row.median_ms is not None}
    pairs = [(row, base[row.length]) for row in sorted(own, key=lambda row: row.length) if row.median_ms and row.length in base]
    lengths = [row.length for row, _ in pairs]
    speedups = [_given(other.median_ms) / _given(row.median_ms) for row, other in pairs]
    few_rounds = any((each.rounds or 0) < MIN_ROUNDS for pair in pairs for each in pair)
    signs = [
        1 if _given(row.q75_ms) < _given(other.q25_ms) else -1 if _given(row.q25_ms) > _given(other.q75_ms) else 0
        for row, other in pairs
    ]
    if few_rounds:
        signs = [0] * len(signs)
    clear = [place for place, sign in enumerate(signs) if sign]
    return Standing(
        crossings=tuple(
            (crossing(lengths[one : other + 1], speedups[one : other + 1]), signs[other] > 0)
            for one, other in pairwise(clear)
            if signs[one] != signs[other]
        ),
        faster=tuple(lengths[place] for place in clear if signs[place] > 0),
        slower=tuple(lengths[place] for place in clear if signs[place] < 0),
        level=tuple(length for length, sign in zip(lengths, signs, strict=True) if not sign),
        few_rounds=few_rounds,
    )


def crossing(lengths: Sequence[int], speedups: Sequence[float]) -> float:
    """The length at which the speed-up, above 1 at one end and below 1 at the other, first becomes 1."""
    logs = [math.log(speedup) for speedup in speedups]
    for place, (one, other) in enumerate(pairwise(logs)):
        if (one > 0) != (other > 0):
            share = one / (one - other)
            return math.exp(math.log(lengths[place]) * (1 - share) + math.log(lengths[place + 1]) * share)
    raise ValueError(f"speed-ups {list(speedups)} do not pass 1")


def sentences(rows: Sequence[Row], baseline: str) -> Iterator[str]:
    """Say how each mechanism of one table compares with the baseline."""
    own = by_mechanism(rows)
    for name in own:
        if name != baseline:
            yield standing(own[name], own[baseline]).sentence(name, baseline)


def two_digits(length: float) -> str:
    """An estimated length, rounded to two digits."""
    return f"{float(f'{length:.2g}'):,.0f}"


def listed(lengths: Sequence[int]) -> str:
    """Lengths in a sentence: `512, 1,024`."""
    return ", ".join(f"{length:,}" for length in lengths)


def _given(value: float | None) -> float:
    assert value is not None
    return value
