"""Results of the training benchmark: a row for each measurement, with the shares of a step's parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from audiot.benchmark.entries import BASELINE

SCOPES = ("inference", "encoder", "step", "program")
PARTS = ("data", "features", "masking", "targets", "forward", "backward", "optimiser", "other")


@dataclass(frozen=True)
class Row:
    """One measurement: what was measured where, and its result. Where there is none, `note` says why."""

    model: str
    attention: str
    positions: str
    frames: int
    batch: int
    dropout: float
    attention_dropout: float
    scope: str
    compiled: bool
    precision: str
    median_ms: float | None = None
    q25_ms: float | None = None
    q75_ms: float | None = None
    frames_per_s: int | None = None
    wall_frames_per_s: int | None = None
    speedup: float | None = None
    tflops: float | None = None
    share_of_peak: float | None = None
    flops_per_byte: float | None = None
    peak_mib: int | None = None
    compile_s: float | None = None
    validation_s: float | None = None
    steps: int | None = None
    share_data: float | None = None
    share_features: float | None = None
    share_masking: float | None = None
    share_targets: float | None = None
    share_forward: float | None = None
    share_backward: float | None = None
    share_optimiser: float | None = None
    share_other: float | None = None
    note: str = ""

    @property
    def place(self) -> tuple[Any, ...]:
        """Everything that rows share which are compared with each other."""
        return (self.model, self.frames, self.batch, self.dropout, self.attention_dropout, self.scope)

    @property
    def label(self) -> str:
        """`base query_key 32 × 1,472, dropout 0.1/0, step`."""
        size = f"{self.batch} × {self.frames:,}"
        return f"{self.model} {self.attention} {size}, dropout {self.dropout:g}/{self.attention_dropout:g}, {self.scope}"

    @property
    def shares(self) -> dict[str, float]:
        """Share of each part of the step. Empty where the parts were not timed."""
        found = {part: getattr(self, f"share_{part}") for part in PARTS}
        return {part: share for part, share in found.items() if share is not None}


def shares_of(
    steps: Sequence[Mapping[str, float]], inside: Mapping[str, float], data_wait: float | None = None
) -> dict[str, Any]:
    """Fields of a row: the share of the steps' time that each part takes.

    Args:
        steps: Seconds of ``features``, ``forward``, ``backward`` and ``optimiser`` in each step, in the program of ``between``
            too.
        inside: Seconds of ``masking`` and ``targets`` per step, parts of ``forward``.
        data_wait: Share of the time in which the device waits for data, a part of ``between``.
    """
    seconds = {part: fmean(step.get(part, 0.0) for step in steps) for part in {part for step in steps for part in step}}
    total = sum(seconds.values())
    shares = {part: seconds[part] / total for part in ("features", "backward", "optimiser")}
    known = min(sum(inside.values()), seconds["forward"])
    shares |= {part: known * taken / sum(inside.values()) / total for part, taken in inside.items() if taken}
    shares["forward"] = (seconds["forward"] - known) / total
    if data_wait is not None:
        between = seconds.get("between", 0.0) / total
        shares |= {"data": min(data_wait, between), "other": max(0.0, between - data_wait)}
    return {f"share_{part}": share for part, share in shares.items()}


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed-ups: frames per second over those of ``query_key`` in the same place."""
    base = {row.place: row.frames_per_s for row in rows if row.attention == BASELINE and row.frames_per_s}
    return [
        replace(row, speedup=row.frames_per_s / base[row.place]) if row.frames_per_s and row.place in base else row
        for row in rows
    ]
