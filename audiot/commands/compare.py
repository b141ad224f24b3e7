"""``audiot compare RUN RUN …``: the results of several runs in one table."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from audiot.base.files import replacing_text, write_text
from audiot.base.tables import aligned, markdown
from audiot.runs import ERRORS, has_overrides, is_number, read_results, run_overrides

if TYPE_CHECKING:
    from audiot.study.findings import Sample

FIGURES = ("test/", "pretrain/", "probe/", "finetune/")  # beginnings of their names
COSTS = {"frames_per_s": 0, "train_s": 1, "peak_gib": 2, "energy_wh": 2, "parameters": 0}  # with the digits that are shown
RATES = ("accuracy", "macro_f1", *ERRORS)  # shown in per cent


class Run(NamedTuple):
    """A run that is compared.

    Args:
        path: Its folder.
        same: What it has in common with runs that differ by the seed alone; None where its command line is not known.
        seeds: Its seed and that of its encoder, as far as they are known.
        results: Its ``metrics.json`` or ``summary.json``.
        draws: Name of a figure → its values on resampled tests; empty where it kept none.
    """

    path: Path
    same: tuple[Any, ...] | None
    seeds: tuple[str, ...]
    results: dict[str, Any]
    draws: dict[str, list[float]]

    @property
    def tests(self) -> tuple[str, ...] | None:
        """What runs agree in that have drawn the same tests; None where it is not known."""
        how = self.results.get("bootstrap")
        if not isinstance(how, dict) or "test" not in how:
            return None
        return tuple(str(how.get(name)) for name in ("unit", "samples", "seed", "test"))


def main(options: argparse.Namespace) -> None:
    """Print the tables, and write them as CSV and Markdown."""
    paths = [run for name in options.runs for run in _runs(Path(name))]
    settings = {path: _setting(path) for path in paths}
    shared = set.intersection(*map(set, settings.values()))
    groups = averaged([_run(path) for path in paths])
    results = {}
    for name, runs in groups.items():
        apart = [override for override in settings[runs[0].path] if override not in shared]
        if len(runs) > 1:
            apart = [override for override in apart if not override.startswith("seed=")]
        results[name] = _mean(runs) | {"setting": " ".join(apart), "seeds": str(len(runs))}
    folder = Path(options.output)
    print(write_comparison(results, folder))
    lines = differences(groups)
    if lines:
        with replacing_text(folder / "differences.csv") as stream:
            csv.writer(stream, lineterminator="\n").writerows(lines)
        print(f"\n{aligned(lines)}\nwrote   {folder / 'differences.csv'}")
    else:
        (folder / "differences.csv").unlink(missing_ok=True)  # of other runs


def averaged(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Name of a line of the table → its runs: one, or those that differ by the seed alone."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.path if run.same is None else run.same, []).append(run)
    found = {}
    for members in groups.values():
        repeated = len({run.seeds for run in members}) < len(members)  # one seed twice is no new sample
        for line in [[run] for run in members] if repeated else [members]:
            parents = {run.path.parent for run in line}
            if len(line) > 1 and len(parents) == 1:
                found[f"{parents.pop() / ','.join(run.path.name for run in line)}"] = line
            else:
                found[", ".join(str(run.path) for run in line)] = line
    return found


def _run(path: Path) -> Run:
    from audiot.downstream.bootstrap import read_draws  # heavy: every command imports this module

    same, seeds = _seedless(path)
    draws = read_draws(path / "draws.csv") if (path / "draws.csv").is_file() else {}
    return Run(path, same, seeds, _results(path), draws)


def _seedless(path: Path) -> tuple[tuple[Any, ...] | None, tuple[str, ...]]:
    """What a run was started with but for its seed, and its seeds. Its encoder's run is part of it."""
    if not has_overrides(path):
        return None, ()
    same: list[Any] = [file.name if (file := _file(path)) else ""]
    seeds = ["0"]  # the default
    encoder: tuple[str, ...] = ()
    for override in run_overrides(path):
        name, _, value = override.lstrip("+").partition("=")
        if name == "seed":
            seeds = [value]
        elif name == "upstream.path" and has_overrides(Path(value).parent):
            before, encoder = _seedless(Path(value).parent)
            same.append(("upstream.path", before))
        elif not name.startswith("hydra."):
            same.append(override)
    return (same[0], *sorted(same[1:], key=str)), (*seeds, *encoder)


def _samples(runs: Sequence[Run], name: str, with_draws: bool) -> list[Sample]:
    """A figure of runs, for the statistics. Equal seeds have equal numbers."""
    import numpy as np

    from audiot.base.streams import key
    from audiot.study.findings import Sample

    return [
        Sample(key("compare", *run.seeds), run.results[name], np.array(run.draws[name]) if with_draws else None, str(run.path))
        for run in runs
    ]


def _mean(runs: Sequence[Run]) -> dict[str, Any]:
    """Results of a line: those of its run, or means over its runs, whose intervals are over seeds, and over tests if kept."""
    from audiot.study.comparison import estimate

    results = dict(runs[0].results)
    if len(runs) == 1:
        return results
    intervals = {}
    same_tests = len({run.tests for run in runs}) == 1 and runs[0].tests is not None
    for name, first in runs[0].results.items():
        values = [run.results[name] for run in runs if name in run.results]
        if not is_number(first) or len(values) < len(runs):
            continue
        results[name] = fmean(values)
        if name.startswith(FIGURES) and len(set(values)) > 1:
            found = estimate(_samples(runs, name, same_tests and all(name in run.draws for run in runs)))
            if found.low is not None:
                intervals[name] = [found.low, found.high]
    return results | {"intervals": intervals}


def differences(groups: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """Header and cells: each line of the table less the first, by the paired bootstrap; empty without draws of the same tests.

    Lines are paired by seed. A run is paired with a run of another seed where each line has one alone: then only tests vary.
    """
    from audiot.study.comparison import difference

    baseline, *others = groups
    lines = []
    for other in others:
        one, two = groups[other], groups[baseline]
        if len({run.tests for run in (*one, *two)}) > 1 or one[0].tests is None:
            continue
        kept = [name for name in two[0].draws if all(name in run.draws and name in run.results for run in (*one, *two))]
        for name in kept:
            first, second = (_samples(runs, name, True) for runs in (one, two))
            if len(one) == len(two) == 1:
                first, second = ([replace(runs[0], seed=0)] for runs in (first, second))
            if not {sample.seed for sample in first} & {sample.seed for sample in second}:
                continue
            found = difference(first, second)
            if found.low is None or found.high is None:
                continue
            verdict = "differs" if found.low > 0 or found.high < 0 else "can't be told apart"
            pairs = str(len(found.samples))
            cells = [cell(name, value) for value in (found.mean, found.low, found.high)]
            lines.append([other, baseline, _title(name, ""), *cells, pairs, verdict])
    return [["run", "less", "figure", "difference", "low", "high", "pairs", "verdict"], *lines] if lines else []


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
    """Header and cells, a line a run or mean over seeds: what it is, test metrics or pre-training figures, and costs."""
    kinds = ("setting", "seeds", "task", "upstream", "layers", "fine_tuned", "train_utterances")
    about = [name for name in kinds if _apart(results, name)]
    if "seeds" not in about and any(run.get("seeds", "1") != "1" for run in results.values()):
        about.insert("setting" in about, "seeds")
    figures = list(dict.fromkeys(name for run in results.values() for name in run if name.startswith(FIGURES)))
    figures += [name for name in COSTS if any(name in run for run in results.values())]
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
    return "" if value is None else f"{100 * value:.1f}" if is_rate(name) else f"{value:.{COSTS.get(name, 3)}f}"


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
