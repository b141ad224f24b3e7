"""Comparing the results of a benchmark with those of an earlier run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from audiot.base.files import read_json
from audiot.base.tables import markdown
from audiot.data.text import rows

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")


class Results(NamedTuple):
    """A ``results.csv``: its lines by what they measured, and the column that is compared."""

    path: Path
    key: tuple[str, ...]
    figure: str
    lines: dict[tuple[str, ...], dict[str, str]]


def read_results(path: Path, key: Sequence[str], figure: str) -> Results:
    """Read a ``results.csv``.

    Args:
        path: File to read.
        key: Columns that say what was measured.
        figure: Column that is compared.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has other columns, or the figures are no numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results of a benchmark at {path}: expected the results.csv of an earlier run")
    lines = {}
    for number, line in rows(path, [*key, figure]):
        if line[figure] and not NUMBER.fullmatch(line[figure]):
            raise ValueError(f"{path}:{number}: {figure} must be a number, or nothing, found {line[figure][:40]!r}")
        lines[tuple(line[name] for name in key)] = line
    return Results(path, tuple(key), figure, lines)


def comparison(before: Results, now: Results) -> str:
    """Markdown with the figure of each measurement before and now, their ratio, and the measurements that only one run has.

    Columns of the key that are the same everywhere stand above the table.
    """
    wheres = list(dict.fromkeys([*now.lines, *before.lines]))
    places = range(len(now.key))
    varied = [place for place in places if len({where[place] for where in wheres}) > 1]
    table = [[*(now.key[place] for place in varied), "before", "now", "now / before"]]
    missing: dict[str, list[str]] = {"Only before": [], "Only now": []}
    for where in wheres:
        names = [where[place] for place in varied]
        lines = [results.lines.get(where) for results in (before, now)]
        if None in lines:
            missing["Only before" if lines[0] else "Only now"].append(", ".join(names))
            continue
        one, other = (line[now.figure] for line in lines if line)
        told = [line[now.figure] or line.get("note", "") for line in lines if line]
        table.append([*names, *told, f"{float(other) / float(one):.3f}" if one and other and float(one) else ""])
    alike = [f"{now.key[place]} {wheres[0][place]}" for place in places if wheres and place not in varied]
    parts = [
        f"# {now.figure} beside an earlier run",
        f"- before: {before.path}{_device_of(before.path)}\n- now: {now.path}{_device_of(now.path)}",
        *(["In all: " + ", ".join(alike)] if alike else []),
        markdown(table) if len(table) > 1 else "No measurement is in both.",
        *(f"{title}:\n\n" + "\n".join(f"- {each}" for each in told) for title, told in missing.items() if told),
    ]
    return "\n\n".join(parts) + "\n"


def _device_of(results: Path) -> str:
    machine = results.with_name("machine.json")
    return f" ({read_json(machine, 'description of a machine')['device']})" if machine.is_file() else ""
