"""Tables and pictures of the attention benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from audiot.analysis.plots import plot_benchmark
from audiot.base.tables import markdown
from audiot.benchmark.attention_results import Panel, Row, by_mechanism, panels
from audiot.benchmark.results import milliseconds
from audiot.benchmark.standing import listed, sentences, standing


def markdown_report(rows: Sequence[Row], baseline: str, introduction: Sequence[str]) -> str:
    """All tables as Markdown, each with the comparisons that follow from it."""
    parts = ["# Benchmark", *introduction]
    for panel, own in panels(rows).items():
        parts += [f"## {panel.title}, ms", markdown(grid(own)), "\n".join(f"- {line}" for line in sentences(own, baseline))]
        parts += ["\n".join(f"- {line}" for line in notes(own))] if notes(own) else []
        memory = memory_grid(own)
        parts += ["Peak memory above parameters and inputs, MiB:", markdown(memory)] if memory else []
    return "\n\n".join(parts) + "\n"


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of a table of times: a line for each mechanism, a column for each length."""
    return _grid(rows, _time_cell)


def memory_grid(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of a table of peak memory. Nothing where memory was not measured."""
    if all(row.peak_mib is None for row in rows):
        return []
    return _grid(rows, lambda row: "" if row.peak_mib is None else f"{row.peak_mib:,.0f}")


def notes(rows: Sequence[Row]) -> list[str]:
    """Why there are no results: each reason once, with its mechanism and its lengths."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.note:
            reasons.setdefault((row.mechanism, row.note), []).append(row.length)
    return [f"{name}, T = {listed(sorted(set(lengths)))}: {note}" for (name, note), lengths in reasons.items()]


def _grid(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[list[str]]:
    lengths = sorted({row.length for row in rows})
    lines = [["mechanism", *(f"T={length:,}" for length in lengths)]]
    for name, own in by_mechanism(rows).items():
        cells = {row.length: cell(row) for row in own}
        lines.append([name, *(cells.get(length, "") for length in lengths)])
    return lines


def _time_cell(row: Row) -> str:
    if row.median_ms is None:
        return row.note.split(":")[0]
    details = [] if row.speedup is None else [f"×{row.speedup:.{2 if row.speedup < 10 else 1}f}"]
    details += [] if row.recall is None else [f"recall {row.recall:.2f}"]
    return milliseconds(row.median_ms) + (f" ({', '.join(details)})" if details else "")


def draw(rows: Sequence[Row], baseline: str, title: str, folder: Path) -> list[str]:
    """Draw time and memory per frame against length: a picture for each precision, compiled and not. Returns their names."""
    pictures: dict[tuple[str, bool], dict[Panel, list[Row]]] = {}
    for panel, own in panels(rows).items():
        pictures.setdefault(panel[:2], {})[panel] = own
    drawn = []
    for number, (kind, tables) in enumerate(pictures.items()):
        name = f"benchmark-{kind[0]}{'-compiled' if kind[1] else ''}.png" if number else "benchmark.png"
        axes = []
        for panel, own in tables.items():
            axes.append((panel.title, "µs per frame", _times(own, baseline)))
            if memory_grid(own):
                axes.append((panel.title, "peak memory, KiB per frame", _peaks(own)))
        axes = [axis for axis in axes if any(line["values"] for line in axis[2].values())]
        if axes:  # there is none where all were refused or out of memory
            plot_benchmark(axes, baseline, title, folder / name)
            drawn.append(name)
    return drawn


def _times(rows: Sequence[Row], baseline: str) -> dict[str, dict[str, Any]]:
    own = by_mechanism(rows)
    lines = {}
    for name, each in own.items():
        values = {row.length: 1e6 / row.frames_per_s for row in each if row.frames_per_s}
        against = standing(each, own[baseline])
        label = name if name == baseline else f"{name}: {against.words()}"
        lines[name] = _curve(values, label, [at for at, _ in against.crossings])
    return lines


def _peaks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    lines = {}
    for name, own in by_mechanism(rows).items():  # a logarithmic axis has no place for 0 MiB
        values = {row.length: 1024 * row.peak_mib / (row.batch * row.length) for row in own if row.peak_mib}
        lines[name] = _curve(values, name, [])
    return lines


def _curve(values: Mapping[int, float], label: str, crossings: Sequence[float]) -> dict[str, Any]:
    """A curve as `plot_benchmark` takes it, of values by length."""
    return {"lengths": list(values), "values": list(values.values()), "crossings": crossings, "label": label}
