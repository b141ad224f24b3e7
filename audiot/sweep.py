"""The table that closes a sweep: every setting's figures over its seeds, mean ± standard deviation."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from audiot.files import read_json, replacing

log = logging.getLogger("audiot")

RESULTS = {"summary.json": ("pretrain/val_l1", "probe/", "finetune/", "frames_per_s"), "metrics.json": ("test/",)}


def collect(sweep: Path) -> list[dict[str, Any]]:
    """Every run of a sweep: its overrides without the seed (``setting``), and its figures."""
    rows = []
    for folder in sorted((path for path in sweep.iterdir() if path.is_dir()), key=lambda path: (len(path.name), path.name)):
        result = next((folder / name for name in RESULTS if (folder / name).is_file()), None)
        overrides_file = folder / ".hydra" / "overrides.yaml"
        if result is None or not overrides_file.is_file():
            continue
        overrides = [str(override) for override in OmegaConf.load(overrides_file)]
        setting = " ".join(override for override in overrides if not override.startswith("seed="))
        figures = {
            name: float(value) for name, value in read_json(result, "results").items() if name.startswith(RESULTS[result.name])
        }
        rows.append({"setting": setting or "(defaults)", "run": folder.name, **figures})
    return rows


def summarise(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, one line a setting. The spread is the standard deviation over runs."""
    figures = list(dict.fromkeys(name for row in rows for name in row if name not in ("setting", "run")))
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    lines = []
    for setting in settings:
        runs = [row for row in rows if row["setting"] == setting]
        cells = [setting, str(len(runs))]
        for name in figures:
            values = [row[name] for row in runs if name in row]
            scale, digits = (100, 1) if name.startswith(("probe/", "finetune/", "test/")) else (1, 0 if "_per_s" in name else 3)
            spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{scale * mean(values):.{digits}f}{spread}" if values else "")
        lines.append(cells)
    return ["setting", "runs", *figures], lines


class SweepTable(Callback):
    """Hydra callback: print and write the table when a sweep has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect the runs of the sweep's folder."""
        sweep = Path(config.hydra.sweep.dir)
        rows = collect(sweep)
        if not rows:
            log.info("no run of the sweep in %s has results", sweep)
            return
        header, lines = summarise(rows)
        with replacing(sweep / "sweep.csv") as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([header, *lines])
        log.info("\nsweep, mean ± standard deviation over runs (accuracies in %%)")
        for name, *values in zip(header, *lines, strict=True):
            log.info("  %-26s%s", name, "".join(f"{value:>34}" for value in values))
        log.info("wrote   %s", sweep / "sweep.csv")
