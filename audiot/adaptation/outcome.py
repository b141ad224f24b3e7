"""What came of an adaptation: the figures of its models beside simple baselines, their curves, and what is wrong."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from audiot.adaptation.labelled import TRANSCRIPTION
from audiot.adaptation.survey import Survey
from audiot.analysis.plots import read_metrics
from audiot.downstream.bootstrap import LEVEL, Bootstrap, Metrics, Sums, read_draws
from audiot.runs import read_results

LABEL, PREDICTION = "label", "prediction"


class Figure(NamedTuple):
    """A figure of the test with its 95% interval, whose ends are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Scored:
    """A model, or a baseline.

    Args:
        title: What it is.
        figures: Name of each figure of the test → the figure.
        why: What the intervals are of, in words; empty where it is not known.
    """

    title: str
    figures: Mapping[str, Figure]
    why: str = ""


@dataclass(frozen=True)
class Curves:
    """What a training logged.

    Args:
        title: The training.
        losses: Name → steps and values of the loss.
        scores: The same of the figure by which the checkpoint was chosen.
        score: Name of that figure; empty for pre-training.
        chosen: Step of the checkpoint that was chosen; None: it is not known.
    """

    title: str
    losses: Mapping[str, Sequence[tuple[float, float]]]
    scores: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    score: str = ""
    chosen: float | None = None


@dataclass(frozen=True)
class Outcome:
    """All that the report says.

    Args:
        title: Its title.
        survey: The data.
        tested: The model first, then baselines.
        monitor: Name of the figure that counts.
        difference: The model less features on the same resampled tests; None where it is not known.
        curves: The trainings in their order.
        rows: A row for each test file: ``utterance``, `LABEL`, `PREDICTION`, ``right``, ``score`` (of transcription: the errors).
        chosen: Settings that were chosen, each with the reason.
        commands: Heading → commands that use the model.
        facts: Name → value: the command, how long it took.
    """

    title: str
    survey: Survey
    tested: Sequence[Scored]
    monitor: str
    difference: Figure | None
    curves: Sequence[Curves]
    rows: Sequence[Mapping[str, Any]]
    chosen: Sequence[str]
    commands: Mapping[str, Sequence[str]]
    facts: Mapping[str, str]

    @property
    def wrong(self) -> list[Mapping[str, Any]]:
        """Rows that are wrong, the surest first; of transcription those with most errors."""
        return sorted((row for row in self.rows if not row["right"]), key=lambda row: (-row["score"], row["utterance"]))

    def confusions(self) -> Counter[tuple[str, str]]:
        """Label and prediction → number of test files."""
        return Counter((row[LABEL], row[PREDICTION]) for row in self.rows)


def of_run(title: str, folder: Path) -> Scored:
    """The test of a run.

    Args:
        title: What it is.
        folder: Folder of the run.
    """
    metrics = read_results(folder / "metrics.json", ["monitor"])
    ends = metrics.get("intervals", {})
    how = metrics.get("bootstrap") or {}
    why = f"{how['units']:,} {how['unit']}s resampled {how['samples']:,} times" if "units" in how else ""
    figures = {
        name.removeprefix("test/"): Figure(value, *ends.get(name, (None, None)))
        for name, value in metrics.items()
        if name.startswith("test/")
    }
    return Scored(title, figures, why)


def majority(survey: Survey, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Scored | None:
    """The baseline that always says the most frequent label of training, on the tests that the model drew.

    Args:
        survey: The data.
        rows: A row for each test file.
        metrics: ``metrics.json`` of the model, which knows how it drew.

    Returns:
        None for transcription.
    """
    share = survey.majority()
    if share is None:
        return None
    label = survey.most_frequent
    how = metrics.get("bootstrap") or {}
    ends: Sequence[float | None] = (None, None)
    if how.get("samples") and "seed" in how:
        ordered = sorted(rows, key=lambda row: row["utterance"])
        sums = Sums.of([row["utterance"] for row in ordered], [[1.0, float(row[LABEL] == label)] for row in ordered], _accuracy)
        drawing = Bootstrap(how["unit"], "", how["samples"], how["seed"], survey.speaker_of)
        found = drawing.intervals(sums, {"test/accuracy": share})
        ends = found["intervals"].get("test/accuracy", (None, None))
    return Scored(f"always {label}, the most frequent", {"accuracy": Figure(share, *ends)})


def _accuracy(sums: Tensor) -> Metrics:
    return {"accuracy": sums[:, 1] / sums[:, 0]}


def difference(first: Path, second: Path, name: str) -> Figure | None:
    """A figure of one run less that of another, on the tests that both drew; None where they did not draw or keep them.

    Args:
        first, second: Folders of the runs.
        name: Name of the figure, without ``test/``.
    """
    results = [read_results(folder / "metrics.json", [f"test/{name}"]) for folder in (first, second)]
    drawn = [{key: (each.get("bootstrap") or {}).get(key) for key in ("unit", "samples", "seed", "test")} for each in results]
    if drawn[0] != drawn[1] or not all((folder / "draws.csv").is_file() for folder in (first, second)):
        return None
    one, other = (np.array(read_draws(folder / "draws.csv").get(f"test/{name}", [])) for folder in (first, second))
    if len(one) != len(other) or not len(one):
        return None
    low, high = np.nanquantile(one - other, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = results[0][f"test/{name}"] - results[1][f"test/{name}"]
    return Figure(value, float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def read_rows(folder: Path, task: str) -> list[dict[str, Any]]:
    """A row for each test file of a run (see `Outcome`)."""
    found: list[dict[str, Any]] = []
    with (folder / "per_utterance.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if task == TRANSCRIPTION:
                label, prediction = row["reference"], row["hypothesis"]
                score = float(sum(int(row[kind]) for kind in ("substituted", "deleted", "inserted")))
            else:
                label, prediction, score = row["label"], row["prediction"], float(row["score"])
            right = label == prediction
            found.append({"utterance": row["utterance"], LABEL: label, PREDICTION: prediction, "right": right, "score": score})
    return found


def read_curves(title: str, folder: Path, monitor: str | None, lower: bool = False) -> Curves:
    """The curves of a run's ``metrics.csv``.

    Args:
        title: The training.
        folder: Folder of the run.
        monitor: Figure by which the checkpoint was chosen; None: a pre-training.
        lower: Whether lower values of it are better.
    """
    if not (folder / "metrics.csv").is_file():
        return Curves(title, {})
    logged = read_metrics(folder / "metrics.csv")

    def line(column: str) -> list[tuple[float, float]]:
        found = [(float(row["step"]), float(row[column])) for row in logged if row.get(column) and row.get("step")]
        return [each for each in found if math.isfinite(each[1])]

    columns = logged[0].keys() if logged else ()
    if monitor is None:
        chance = "unigram"
        names = {"training": "pretrain/train_", "validation": "pretrain/val_"}
        own = [name.removeprefix("pretrain/val_") for name in columns if name.startswith("pretrain/val_")]
        kind = next((name for name in own if f"pretrain/train_{name}" in columns), None)
        losses = {} if kind is None else {word: line(f"{prefix}{kind}") for word, prefix in names.items()}
        if kind is not None and f"pretrain/{chance}_{kind}" in columns:
            losses["frequencies alone"] = line(f"pretrain/{chance}_{kind}")
        return Curves(title, {name: points for name, points in losses.items() if points})
    scores = line(f"valid/{monitor}")
    chosen = (min if lower else max)(scores, key=lambda each: each[1])[0] if scores else None
    losses = {"training": line("train/loss")}
    return Curves(title, {name: points for name, points in losses.items() if points}, {"validation": scores}, monitor, chosen)
