"""What the results of every benchmark have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

from audiot.benchmark.measure import Failed


class Row(Protocol):
    """One measurement, a dataclass: what was measured where, and the result, or in `note` why there is none."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def label(self) -> str:
        """What was measured where, in words."""

    @property
    def median_ms(self) -> float | None:
        """Milliseconds; None where there is no result."""

    @property
    def note(self) -> str:
        """Why there is no result, or what else is to be said."""


def cells(row: Row) -> dict[str, Any]:
    """A line of ``results.csv``: six digits of each number, and nothing where there is no value."""
    values = asdict(row).items()
    return {name: "" if value is None else f"{value:.6g}" if isinstance(value, float) else value for name, value in values}


def refuse_broken(rows: Sequence[Row], table: Path) -> None:
    """Raise ValueError if something is wrong with a measurement.

    Args:
        rows: All measurements.
        table: Where they are told.
    """
    broken = [row for row in rows if row.median_ms is None and Failed(row.note).broken]
    if broken:
        first = f"{broken[0].label}: {broken[0].note}"
        raise ValueError(f"{len(broken)} of {len(rows)} measurements failed, see {table}; the first: {first}")


def milliseconds(value: float) -> str:
    """A time with three digits."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"
