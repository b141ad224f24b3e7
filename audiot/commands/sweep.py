"""What a sweep adds to its runs: one that fails lets the others go on, and tables and pictures of all of them close it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from audiot.base.files import replacing, write_csv
from audiot.commands.compare import higher_is_better, is_rate
from audiot.runs import is_number, read_results, run_overrides

if TYPE_CHECKING:
    from audiot.analysis.sweeps import Curve, Point
    from audiot.base.failures import Failures

LOSSES = ("pretrain/val_l1", "pretrain/val_cross_entropy")
RESULTS = {
    "summary.json": (*LOSSES, "probe/", "finetune/", "frames_per_s"),
    "metrics.json": ("test/",),
    "evaluation.json": (*LOSSES, "test/"),
}
VALIDATION = ("pretrain/val_", "valid/")  # beginnings of what curves are drawn of
QUALITIES = ("probe/", "finetune/", "test/")  # of what is drawn against costs; where there is none, the loss is
CONTROLS = ("/random", "/features", "/features_global")
COSTS = {"train_s": "training time, s", "parameters": "parameters", "peak_gib": "peak memory, GiB"}


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
    """Runs of a sweep: ``folder``, what sets it apart with its seed (``run``) and without (``setting``), ``failed``, figures."""
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
        rows.append(
            {
                "setting": overrides,
                "run": folder.name,
                "folder": folder.name,
                "failed": (folder / "error.txt").is_file(),
                **figures,
            }
        )
    shared = set.intersection(*(set(row["setting"]) for row in rows)) if len(rows) > 1 else set()
    for row in rows:
        apart = [override for override in row["setting"] if override not in shared]
        row["setting"] = " ".join(override for override in apart if not override.startswith("seed=")) or "all runs"
        row["run"] = f"{row['run']} ({' '.join(apart)})" if apart else row["run"]
    return rows


def summarise(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, one line a setting. The spread is the standard deviation over runs."""
    figures = list(dict.fromkeys(name for row in rows for name in row if name not in ("setting", "run", "folder", "failed")))
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


def numbers(sweep: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run that did not fail, all with the same columns: its folder, its overrides by their key, and all its numbers."""
    found = []
    for row in rows:
        folder = sweep / row["folder"]
        named = [override.lstrip("+").partition("=") for override in run_overrides(folder)]
        line = {"run": row["folder"]} | {key: value for key, _, value in named if not key.startswith("hydra.")}
        for path in (folder / file for file in RESULTS if (folder / file).is_file()):
            line |= {name: value for name, value in read_results(path).items() if is_number(value)}
        found.append(line)
    columns = dict.fromkeys(name for line in found for name in line)
    # Settings stand before figures, also those that the first run lacks.
    settings = [name for name in columns if any(isinstance(line.get(name), str) for line in found)]
    ordered = [*settings, *(name for name in columns if name not in settings)]
    return [{name: line.get(name, "") for name in ordered} for line in found]


def curves(sweep: Path, rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, Curve]]]:
    """Validation figure → setting and curve of each run whose ``metrics.csv`` has it at two steps or more."""
    from audiot.analysis.plots import curve_of, read_metrics  # heavy: every command imports this module

    found: dict[str, list[tuple[str, Curve]]] = {}
    for row in rows:
        path = sweep / row["folder"] / "metrics.csv"
        if not path.is_file():
            continue
        logged = read_metrics(path)
        for name in dict.fromkeys(name for line in logged for name in line if name.startswith(VALIDATION)):
            curve = curve_of(logged, name, path)
            if len(curve[0]) > 1:
                found.setdefault(name, []).append((row["setting"], curve))
    return found


def planes(sweep: Path, rows: list[dict[str, Any]]) -> dict[tuple[str, str, bool], list[Point]]:
    """Cost, quality, whether more is better → its settings. A cost or quality that all settings share is left out."""
    from audiot.analysis.sweeps import Point

    every = numbers(sweep, rows)
    qualities = [name for line in every for name in line if name.startswith(QUALITIES) and not name.endswith(CONTROLS)]
    if not qualities:
        qualities = [name for line in every for name in line if name in LOSSES]
    found = {}
    for quality in dict.fromkeys(qualities):
        for cost, words in COSTS.items():
            runs: dict[str, list[tuple[float, float]]] = {}
            for row, line in zip(rows, every, strict=True):
                if "" not in (line.get(cost, ""), line[quality]):
                    runs.setdefault(row["setting"], []).append((line[cost], line[quality]))
            points = []
            for setting, pairs in runs.items():
                costs, values = zip(*pairs, strict=True)
                points.append(Point(setting, mean(costs), mean(values), costs, values))
            if len({point.cost for point in points}) > 1:
                found[words, quality, higher_is_better(quality)] = points
    return found


class SweepTable(Callback):
    """Hydra callback: write the tables and pictures when a sweep has ended, and print the table over seeds."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect the runs of the sweep's folder."""
        from audiot.base.failures import Failures

        sweep = Path(config.hydra.sweep.dir)
        rows = collect(sweep)
        ended = [row for row in rows if not row["failed"]]
        header, lines = summarise(ended)
        if len(header) > 2:  # there are figures
            with replacing(sweep / "sweep.csv") as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows([header, *lines])
            write_csv(sweep / "runs.csv", numbers(sweep, ended))
            widths = [max(map(len, line)) + 4 for line in lines]
            print("\nsweep, mean ± standard deviation over runs (accuracies and error rates in %)")
            for name, *values in zip(header, *lines, strict=True):
                print(f"  {name:<26}" + "".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True)))
            failures = Failures()
            drawn = draw(sweep, ended, failures) if config.get("plots", True) else []
            print(f"wrote   {', '.join(str(sweep / name) for name in ('sweep.csv', 'runs.csv', *drawn))}")
            for what, why in failures.reasons.items():
                print(f"{failures.traces[what] if config.get('debug', False) else ''}failed  {what}: {why}")
        failed = [row["run"] for row in rows if row["failed"]]
        if failed:
            sys.exit(f"audiot: error: {len(failed)} of {len(rows)} runs failed: {', '.join(failed)}; see {sweep}/*/error.txt")


def draw(sweep: Path, rows: list[dict[str, Any]], failures: Failures) -> list[str]:
    """Draw the curves, and quality against cost, where runs have them; names of the files."""
    from audiot.analysis.sweeps import plot_learning_curves, plot_pareto

    drawn = []
    with failures.noted("curves.png"):
        if logged := curves(sweep, rows):
            plot_learning_curves(logged, f"Validation of {len(rows)} runs", sweep / "curves.png")
            drawn.append("curves.png")
    with failures.noted("pareto.png"):
        if found := planes(sweep, rows):
            plot_pareto(found, "Quality and cost", sweep / "pareto.png")
            drawn.append("pareto.png")
    return drawn
