"""What a sweep adds to its runs: one that fails lets the others go on, and a table closes it, a line a setting over its seeds."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from audiot.base.files import replacing
from audiot.commands.compare import is_rate
from audiot.runs import read_results, run_overrides

RESULTS = {
    "summary.json": ("pretrain/val_l1", "pretrain/val_cross_entropy", "probe/", "finetune/", "frames_per_s"),
    "metrics.json": ("test/",),
    "evaluation.json": ("pretrain/val_l1", "pretrain/val_cross_entropy", "test/"),
}


@contextmanager
def failure_noted() -> Iterator[None]:
    """Around one run of a sweep: its error goes to ``error.txt`` in its folder and the others go on; Ctrl-C ends them all."""
    job = HydraConfig.get()
    note = Path(job.runtime.output_dir) / "error.txt"
    note.unlink(missing_ok=True)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        note.write_text(f"{stop.code}\n", encoding="utf-8")
        sys.stderr.write(f"run {job.job.num} of the sweep failed: {stop.code.removeprefix('audiot: error: ')}\n")


def collect(sweep: Path) -> list[dict[str, Any]]:
    """Every run of a sweep: what sets it apart with its seed (``run``) and without (``setting``), ``failed``, its figures."""
    rows: list[dict[str, Any]] = []
    for folder in sorted((path for path in sweep.iterdir() if path.is_dir()), key=lambda path: (len(path.name), path.name)):
        if not (folder / ".hydra" / "overrides.yaml").is_file():
            continue
        overrides = run_overrides(folder)
        figures = {
            name: float(value)
            for file, wanted in RESULTS.items()
            if (folder / file).is_file()
            for name, value in read_results(folder / file).items()
            if name.startswith(wanted)
        }
        rows.append({"setting": overrides, "run": folder.name, "failed": (folder / "error.txt").is_file(), **figures})
    shared = set.intersection(*(set(row["setting"]) for row in rows)) if len(rows) > 1 else set()
    for row in rows:
        apart = [override for override in row["setting"] if override not in shared]
        row["setting"] = " ".join(override for override in apart if not override.startswith("seed=")) or "all runs"
        row["run"] = f"{row['run']} ({' '.join(apart)})" if apart else row["run"]
    return rows


def summarise(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, one line a setting. The spread is the standard deviation over runs."""
    figures = list(dict.fromkeys(name for row in rows for name in row if name not in ("setting", "run", "failed")))
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    lines = []
    for setting in settings:
        runs = [row for row in rows if row["setting"] == setting]
        cells = [setting, str(len(runs))]
        for name in figures:
            values = [row[name] for row in runs if name in row]
            scale, digits = (100, 1) if is_rate(name) else (1, 0 if "_per_s" in name else 3)
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
        header, lines = summarise([row for row in rows if not row["failed"]])
        if len(header) > 2:  # there are figures
            with replacing(sweep / "sweep.csv") as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows([header, *lines])
            widths = [max(map(len, line)) + 4 for line in lines]
            print("\nsweep, mean ± standard deviation over runs (accuracies and error rates in %)")
            for name, *values in zip(header, *lines, strict=True):
                print(f"  {name:<26}" + "".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True)))
            print(f"wrote   {sweep / 'sweep.csv'}")
        failed = [row["run"] for row in rows if row["failed"]]
        if failed:
            sys.exit(f"audiot: error: {len(failed)} of {len(rows)} runs failed: {', '.join(failed)}; see {sweep}/*/error.txt")
