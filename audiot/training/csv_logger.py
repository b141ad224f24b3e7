"""A run's `metrics.csv`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from audiot.base.console import say
from audiot.base.files import replacing_text

LONGEST = 2**20  # bytes of a line: a row has some hundred


class RunCSVLogger(Logger):
    """Appends rows of figures to ``metrics.csv`` in the run's folder, and never shortens what stands there.

    A row is the operating system's as soon as it is logged, so a killed run loses none. The columns are sorted. A new one
    writes the file anew beside the old one. A resumed run goes on in the file: its first row takes the rows away that lie
    behind it, and a figure that is logged again for a step replaces the earlier one.

    Args:
        save_dir: Folder of the run.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] | None = None  # None: the file has not been opened
        self._resumed: int | None = None
        self._earlier = -1  # the last step of the rows that were there before
        self._unsaved = False

    @property
    def name(self) -> str:
        """No name: the run's folder is its own."""
        return ""

    @property
    def version(self) -> str:
        """No version, for the same reason."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return str(self.path.parent)

    def go_on(self, step: int) -> None:
        """Say that the run goes on from a checkpoint: rows of later steps go away with the first row that is logged.

        Without it, the step of that row counts instead.

        Args:
            step: The checkpoint's.
        """
        self._resumed = step

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:  # type: ignore[override]
        """Log a row.

        Raises:
            ValueError: it has no step.
            OSError: the disk is full, say. What was logged before is whole.
        """
        if step is None:
            raise ValueError(f"a row of {self.path} needs a step, found none: pass step to log_metrics")
        if self._columns is None:
            self._columns = self._open(step if self._resumed is None else self._resumed)
        figures = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        row = {"step": str(step)} | {name: str(value) for name, value in figures.items()}
        columns = sorted({*self._columns, *row})
        self._unsaved = True
        if columns == self._columns and step > self._earlier and self.path.is_file():
            self._append(row)
        else:
            self._rewrite(columns, chain(self._without(row), [row]))

    @rank_zero_only
    def save(self) -> None:
        """Wait until the rows are on the disk."""
        if self._unsaved and self.path.is_file():
            with self._disk_named(), self.path.open("rb") as stream:
                os.fsync(stream.fileno())
        self._unsaved = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait until the rows are on the disk."""
        self.save()

    def _open(self, last: int) -> list[str]:
        """Mend a file that is there, and take its rows after the step ``last`` away; the columns it has."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return []
        with self.path.open("rb") as stream:
            columns = _fields(stream.readline(LONGEST))
        if "step" not in columns or len(set(columns)) < len(columns):
            aside = self.path.with_name("metrics.damaged.csv")
            os.replace(self.path, aside)
            say(f"{self.path} has no readable header: it is called {aside.name} now, and a new one begins")
            return []
        damaged = later = 0
        for row in self._lines():
            step = -1 if row is None else int(row["step"])
            damaged += row is None
            later += step > last
            self._earlier = max(self._earlier, min(step, last))
        if damaged:
            lines = "1 damaged line, which is" if damaged == 1 else f"{damaged:,} damaged lines, which are"
            say(f"{self.path} had {lines} left out now")
        if damaged or later:
            self._rewrite(columns, (row for row in self._rows() if int(row["step"]) <= last))
        return columns

    def _lines(self) -> Iterator[dict[str, str] | None]:
        """The rows of the file, none where it is missing. None stands for a damaged line."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as stream:
            names = _fields(stream.readline(LONGEST))
            while line := stream.readline(LONGEST):
                fields = _fields(line)
                row = dict(zip(names, fields, strict=True)) if len(fields) == len(names) else {}
                yield row if row.get("step", "").isdecimal() else None

    def _rows(self) -> Iterator[dict[str, str]]:
        return (row for row in self._lines() if row is not None)

    def _without(self, new: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """The rows of the file without the figures that ``new`` has for a step from before the resume."""
        for row in self._rows():
            if row["step"] == new["step"] and int(row["step"]) <= self._earlier:
                row = {name: value for name, value in row.items() if name == "step" or name not in new}
                if not any(value for name, value in row.items() if name != "step"):
                    continue
            yield row

    def _rewrite(self, columns: list[str], rows: Iterable[Mapping[str, str]]) -> None:
        """Put rows, which may come from the file itself, in its place."""
        with self._disk_named(), replacing_text(self.path) as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
            stream.flush()
            os.fsync(stream.fileno())
        self._columns = columns

    def _append(self, row: Mapping[str, str]) -> None:
        """Add a row at the end; where the disk takes but a part of it, nothing."""
        assert self._columns is not None
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerow(row)
        left = text.getvalue().encode()
        with self._disk_named(), self.path.open("ab", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[stream.write(left) :]
            except OSError:
                stream.truncate(size)
                raise

    @contextmanager
    def _disk_named(self) -> Iterator[None]:
        """Name the file and its disk where writing fails."""
        try:
            yield
        except OSError as error:
            disk = next(folder for folder in self.path.absolute().parents if os.path.ismount(folder))
            raise OSError(
                f"can't write {self.path} on the disk at {disk}: {error.strerror}; its earlier rows are kept: "
                "make room, then resume"
            ) from error


def _fields(line: bytes) -> list[str]:
    """The fields of a whole line, none of a damaged one."""
    if b"\0" in line or not line.endswith(b"\n"):
        return []
    try:
        return next(csv.reader([line.decode()]))
    except (UnicodeDecodeError, csv.Error):
        return []
