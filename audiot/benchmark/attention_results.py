"""Results of the attention benchmark: a row for each measurement, a panel for each table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from audiot.benchmark.measure import Failed, Measured, quartiles


class Panel(NamedTuple):
    """What all rows of one table share."""

    precision: str
    compiled: bool
    scope: str
    direction: str

    @property
    def title(self) -> str:
        """`layer, training, bf16, compiled`."""
        return f"{self.scope}, {self.direction}, {self.precision}" + (", compiled" if self.compiled else "")


@dataclass(frozen=True)
class Row:
    """One measurement: what was measured where, and its result. Where there is none, `note` says why."""

    mechanism: str
    scope: str
    direction: str
    length: int
    batch: int
    precision: str
    compiled: bool
    rounds: int | None = None
    median_ms: float | None = None
    q25_ms: float | None = None
    q75_ms: float | None = None
    speedup: float | None = None
    frames_per_s: float | None = None
    peak_mib: float | None = None
    parameters: int | None = None
    recall: float | None = None
    note: str = ""

    @property
    def panel(self) -> Panel:
        """The table that it belongs to."""
        return Panel(self.precision, self.compiled, self.scope, self.direction)

    @property
    def label(self) -> str:
        """`local, layer, training, bf16, compiled, T = 1,024`."""
        return f"{self.mechanism}, {self.panel.title}, T = {self.length:,}"


def rows_of(
    results: Mapping[str, Measured | Failed],
    baseline: str,
    panel: Panel,
    length: int,
    batch: int,
    real_frames: int,
    facts: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """Rows of what was measured side by side.

    Args:
        results: Results by mechanism.
        baseline: Mechanism that speed-ups compare with.
        panel: Table that the rows belong to.
        length: Frames per sequence.
        batch: Sequences per batch.
        real_frames: Frames of the batch that are not padding.
        facts: More fields of a row, by mechanism.
    """
    rows = []
    base = results[baseline]
    for name, result in results.items():
        where = {"mechanism": name, **panel._asdict(), "length": length, "batch": batch}
        if isinstance(result, Failed):
            rows.append(Row(**where, note=result.reason))
            continue
        low, middle, high = quartiles(result.seconds)
        rows.append(
            Row(
                **where,
                rounds=len(result.seconds),
                median_ms=1000 * middle,
                q25_ms=1000 * low,
                q75_ms=1000 * high,
                speedup=None if isinstance(base, Failed) else quartiles(base.seconds)[1] / middle,
                frames_per_s=real_frames / middle,
                peak_mib=None if result.peak_bytes is None else result.peak_bytes / 2**20,
                **facts.get(name, {}),
            )
        )
    return rows


def panels(rows: Sequence[Row]) -> dict[Panel, list[Row]]:
    """The rows of each table, in the order in which they were measured."""
    found: dict[Panel, list[Row]] = {}
    for row in rows:
        found.setdefault(row.panel, []).append(row)
    return found


def by_mechanism(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each mechanism of one table, from the shortest length to the longest."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.mechanism, []).append(row)
    return {name: sorted(own, key=lambda row: row.length) for name, own in found.items()}
