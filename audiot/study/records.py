"""What is kept of a finished run: a small file, which may travel without the run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan, nan
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from audiot.base.console import say
from audiot.base.files import finished, read_json, replacing, write_json
from audiot.benchmark.products import products
from audiot.checkpoint import load_encoder
from audiot.downstream.bootstrap import read_draws
from audiot.measures.abx import SPEAKERS
from audiot.measures.measure import abx_error
from audiot.measures.similarity import principal
from audiot.runs import read_results

FORMAT = 1
AXES = 32  # principal axes of the states that travel; see `principal`
FROM_SUMMARY = ("frames_per_s", "data_wait", "parameters", "steps", "train_s", "peak_gib", "energy_wh")


@dataclass(frozen=True)
class Record:
    """Figures of a run.

    Args:
        name: What it is.
        run: Folder of the run in the study's.
        arguments: Its command line.
        figures: Its figures.
        draws: Name of a figure → its values on resampled tests, NaN where it has none.
        environment: Versions and machine.
        path: The file that it was read from.
    """

    name: str
    run: str
    arguments: tuple[str, ...]
    figures: dict[str, float]
    draws: dict[str, list[float]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    path: Path | None = field(default=None, compare=False)

    def figure(self, name: str) -> float:
        """A figure that the study can't do without.

        Raises:
            ValueError: the record lacks it, or it is not finite. Records come from elsewhere too.
        """
        value = self.figures.get(name)
        if value is None or not isfinite(value):
            found = "lacks" if value is None else f"has {value} for"
            where = self.path or self.name
            raise ValueError(f"{where} {found} the figure {name} of {self.name}: delete that file to run it again")
        return value


@dataclass(frozen=True)
class Arrays:
    """What an encoder has learned, beside its figures.

    Args:
        tensors: ``states`` (layers + 1, N, d), and ``tables`` (layers + 1, H, cells, cells) where the mechanism has tables: an
            untrained one's first.
        frames: Digest of which frames the states are of.
    """

    tensors: dict[str, Tensor]
    frames: str


def read_arrays(path: Path) -> Arrays:
    """Read the arrays beside an analysis or a record.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            frames = (file.metadata() or {}).get("frames", "")
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable file of arrays ({error}): delete it with its record to run it again") from error
    shapes = {name: value.ndim for name, value in tensors.items()}
    if shapes not in ({"states": 3}, {"states": 3, "tables": 4}):
        raise ValueError(f"{path} holds no states and tables of an analysis: delete it with its record to run it again")
    return Arrays(tensors, frames)


class Records:
    """The finished runs of a study, a file each.

    Args:
        folder: Folder of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Record] = {}

    def load(self) -> Mapping[str, Record]:
        """Key of each finished run → its record. Files that are there already are not read again.

        Raises:
            ValueError: a file is no record.
        """
        for path in finished(self.folder / "results", "*.json"):
            if path.stem not in self._known:
                self._known[path.stem] = _read(path)
        return self._known

    def arrays(self, key: str) -> Arrays | None:
        """What the run with a key has learned beside its figures; None where its record came without.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._arrays(key)
        return read_arrays(path) if path.is_file() else None

    def write(self, key: str, record: Record, arrays: Arrays | None = None) -> None:
        """Keep the record of the run with a key, and beside it its arrays."""
        if arrays is not None:  # first: who finds the record finds them
            with replacing(self._arrays(key)) as temporary:
                save_file(arrays.tensors, temporary, {"frames": arrays.frames})
        content = {name: getattr(record, name) for name in Record.__dataclass_fields__ if name != "path"}
        content["draws"] = {name: [None if isnan(value) else value for value in values] for name, values in record.draws.items()}
        write_json(self.folder / "results" / f"{key}.json", {"format": FORMAT, **content})

    def _arrays(self, key: str) -> Path:
        return self.folder / "results" / f"{key}.safetensors"


def _read(path: Path) -> Record:
    found = read_json(path, "the record of a run")
    if found.get("format") != FORMAT:
        other = str(found.get("format"))[:40]
        raise ValueError(f"{path}: format {other!r} of a record, expected {FORMAT}: delete it to run it again")
    try:
        record = Record(
            str(found["name"]),
            str(found["run"]),
            tuple(map(str, found["arguments"])),
            {str(name): float(value) for name, value in found["figures"].items()},
            {str(name): [nan if value is None else float(value) for value in values] for name, values in found["draws"].items()},
            {str(name): str(value) for name, value in found["environment"].items()},
            path,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no record of a run ({error}): delete it to run it again") from error
    return record


def collect(command: str, run: Path, figure: str = "", alone: bool = False) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Figures of a finished run and their values on resampled tests.

    Args:
        command: The command that made it.
        run: Its folder.
        figure: Name of the figure of a task in ``metrics.json``.
        alone: Whether it had its device to itself, so that it tells what the training costs.
    """
    if command == "pretrain":
        summary = read_results(run / "summary.json", ["monitor"])
        costs = {name: float(summary[name]) for name in FROM_SUMMARY if name in summary}
        derived = _derived(costs, run) if alone else {}
        return {"validation": float(summary[summary["monitor"]]), **costs, **derived}, {}
    if command == "analyze":
        return flattened(read_json(run / "analysis.json", "analysis")), {}
    if command == "abx":
        best = min(read_json(run / "abx.json", "ABX errors")["layers"], key=abx_error)
        columns = [f"{best['layer']}/{speaker}" for speaker in SPEAKERS if speaker in best]
        return {"value": abx_error(best)}, _draws(run, columns)
    metrics = read_results(run / "metrics.json", [figure, "monitor"])
    validation = float(metrics[f"valid/{metrics['monitor']}"])
    return {"value": float(metrics[figure]), "validation": validation}, _draws(run, [figure])


def _derived(costs: Mapping[str, float], run: Path) -> dict[str, float]:
    """Costs for a number of frames or seconds, which the length of the training does not change."""
    found = {"s_per_mframe": _seconds(run / "metrics.csv")}
    if "energy_wh" in costs:
        found["wh_per_mframe"] = costs["energy_wh"] / (costs["frames_per_s"] * costs["train_s"] / 1e6)
    model = load_encoder(run / "encoder")
    frames = model.encoder.max_frames  # some mechanisms take no longer inputs
    seconds = model.features.num_samples(frames) / model.features.sample_rate
    try:
        work = products(model.encoder, 1, frames, model.features.embed_dim)
    except RuntimeError as error:  # it looks at values to choose its products
        say(f"matrix products not counted: {error}")
        return found
    return found | {"gflops": work.flops / seconds / 1e9}


def _seconds(path: Path) -> float:
    """Seconds of training for a million frames: the median of what was logged in its second half, when nothing is new any more.

    Waiting for data is no cost of attention and left out.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("frames_per_s")]
    if not rows:
        raise ValueError(f"{path} has no speed: study.cost needs at least trainer.log_every_n_steps steps")
    times = [(1 - float(row["data_wait"])) * 1e6 / float(row["frames_per_s"]) for row in rows]
    return median(times[len(times) // 2 :])


def _draws(run: Path, columns: Sequence[str]) -> dict[str, list[float]]:
    """The mean of some columns of ``draws.csv``, as that of a figure; empty where a run has kept none."""
    path = run / "draws.csv"
    kept = read_draws(path) if path.is_file() else {}
    if not set(columns) <= kept.keys():  # a figure without measurements
        return {}
    return {"value": [fmean(values) for values in zip(*(kept[name] for name in columns), strict=True)]}


def flattened(analysis: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an ``analysis.json`` by names with slashes: ``heads/2/7/distance_s`` of layer 2 and head 7,
    ``tables/2/previous/moved`` of the head that began with a pattern, ``pruning/removed/3``."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}/{key}" if name else key, inner)
        elif isinstance(value, list):
            for place, inner in enumerate(value):
                if isinstance(inner, Mapping) and {"layer", "head"} <= inner.keys():
                    row = {key: figure for key, figure in inner.items() if key not in ("layer", "head")}
                    add(f"{name}/{inner['layer']}/{inner.get('pattern') or inner['head']}", row)
                else:
                    add(f"{name}/{place}", inner)
        elif isinstance(value, (int, float)):
            found[name] = float(value)

    add("", analysis)
    return found


def travelling(run: Path) -> Arrays:
    """The arrays of a finished analysis, its states in few enough axes to travel with the record."""
    whole = read_arrays(run / "analysis.safetensors")
    states = torch.stack([principal(layer, AXES) for layer in whole.tensors["states"]]).half()
    return Arrays({**whole.tensors, "states": states}, whole.frames)
