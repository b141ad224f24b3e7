"""A run's `metrics.csv`."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from audiot.base.private import has_opened_file


class RunCSVLogger(CSVLogger):
    """Writes ``metrics.csv`` directly into the run's folder. A resumed run keeps its rows.

    Args:
        save_dir: Folder of the run.
    """

    def __init__(self, save_dir: str) -> None:
        path = Path(save_dir) / "metrics.csv"
        self._kept = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=100)

    def _restore(self, before: int | None) -> None:
        """Write earlier rows again up to step ``before``, because Lightning's writer deletes the file."""
        kept, self._kept = self._kept, []
        for row in kept:
            step = int(row["step"])
            if before is None or step < before:
                values: dict[str, Any] = {name: value for name, value in row.items() if value and name != "step"}
                super().log_metrics(values, step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:  # type: ignore[override]
        """Log a row. Rows from before a resume are kept up to its step."""
        self._restore(step)
        super().log_metrics(dict(metrics), step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the remaining rows."""
        if has_opened_file(self):
            self._restore(None)
        super().finalize(status)
