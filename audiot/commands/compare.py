"""``audiot compare RUN RUN …``: the results of several runs in one table."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiot.base.files import replacing_text, write_text
from audiot.base.tables import aligned, markdown
from audiot.runs import read_results, run_overrides

ERRORS = ("per", "cer", "wer", "eer")
RATES = ("accuracy", "macro_f1", *ERRORS)  # shown in per cent


def main(options: argparse.Namespace) -> None:
    """Print the table, and write it as CSV and Markdown."""
    runs = [run for name in options.runs for run in _runs(Path(name))]
    settings = {run: _setting(run) for run in runs}
    shared = set.intersection(*map(set, settings.values()))
    results = {}
    for run in runs:
        apart = [override for override in settings[run] if override not in shared]
        results[str(run)] = _results(run) | {"setting": " ".join(apart)}
    print(write_comparison(results, Path(options.output)))


def _runs(folder: Path) -> list[Path]:
    """The folder itself where it is a run's, else the runs of a sweep."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no run at {folder}: there is no such folder")
    if _file(folder):
        return [folder]
    runs = sorted(
        (path for path in folder.iterdir() if path.is_dir() and _file(path)), key=lambda path: (len(path.name), path.name)
    )
    if not runs:
        raise FileNotFoundError(f"no run at {folder}: it has neither metrics.json nor summary.json, nor has a folder in it")
    return runs


def _file(run: Path) -> Path | None:
    return next((run / name for name in ("metrics.json", "summary.json") if (run / name).is_file()), None)


def _results(run: Path) -> dict[str, Any]:
    path = _file(run)
    assert path is not None
    return read_results(path)


def _setting(run: Path) -> list[str]:
    """The overrides of a run, but for where it went and which encoder it heard."""
    return [override for override in run_overrides(run) if not override.startswith(("hydra.", "upstream.path="))]


def comparison(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, a line a run: what it is, and its test metrics or pre-training figures."""
    kinds = ("setting", "task", "upstream", "layers", "fine_tuned", "train_utterances")
    about = [name for name in kinds if _apart(results, name)]
    figures = list(
        dict.fromkeys(
            name for run in results.values() for name in run if name.startswith(("test/", "pretrain/", "probe/", "finetune/"))
        )
    )
    bounded = {name for run in results.values() for name in run.get("intervals", {})}
    header = ["run", *(name.replace("_", " ") for name in about)]
    for name in figures:
        header += [_title(name, end) for end in (("", " low", " high") if name in bounded else ("",))]
    lines = []
    for run, result in results.items():
        line = [run, *(str(result.get(name, "")) for name in about)]
        for name in figures:
            ends = result.get("intervals", {}).get(name, (None, None)) if name in bounded else ()
            line += [cell(name, value) for value in (result.get(name), *ends)]
        lines.append(line)
    return header, lines


def _apart(results: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    return len({str(run.get(name)) for run in results.values()}) > 1


def is_rate(name: str) -> bool:
    """Whether a figure is a rate, shown in per cent."""
    return name.startswith(("probe/", "finetune/")) or name.removeprefix("test/").startswith(RATES)


def higher_is_better(name: str) -> bool:
    """Whether more of a figure is better: accuracies and F1, but not losses, error rates and costs."""
    return is_rate(name) and not name.removeprefix("test/").startswith(ERRORS)


def _title(name: str, end: str) -> str:
    return name.removeprefix("test/") + end + (", %" if is_rate(name) else "")


def cell(name: str, value: float | None) -> str:
    """A figure in a table, rates in per cent; empty for None."""
    return "" if value is None else f"{100 * value:.1f}" if is_rate(name) else f"{value:.3f}"


def bracket(name: str, results: Mapping[str, Any]) -> str:
    """The interval of a figure as it stands after it, `` (61.2–65.0)``; empty if there is none."""
    ends = results.get("intervals", {}).get(name)
    return f" ({'–'.join(cell(name, end) for end in ends)})" if ends else ""


def write_comparison(results: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Write ``comparison.csv`` and ``comparison.md``; the table as text.

    Args:
        results: Name of a run → what its ``metrics.json`` or ``summary.json`` holds.
        folder: Where the files go.
    """
    header, lines = comparison(results)
    with replacing_text(folder / "comparison.csv") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *lines])
    write_text(folder / "comparison.md", markdown([header, *lines]) + "\n")
    return f"{aligned([header, *lines])}\nwrote   {folder / 'comparison.csv'}, {folder / 'comparison.md'}"
