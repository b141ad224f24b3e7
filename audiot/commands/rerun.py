"""``audiot rerun RUN``: repeat a run in another folder, and compare the two."""

from __future__ import annotations

import argparse
import csv
import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from audiot.base.console import say
from audiot.base.files import read_json
from audiot.base.lock import is_first_process, owned
from audiot.base.tables import aligned
from audiot.commands import finetune, pretrain
from audiot.commands.environment import differences, environment, input_digests, read_environment
from audiot.commands.launch import log_to, no_failed_start
from audiot.commands.probing import probe_configs
from audiot.data.opening import open_corpus
from audiot.runs import (
    ENVIRONMENT,
    changes_on_the_way,
    checkpoint_path,
    has_config,
    newest_checkpoint,
    record_repeat,
    repeated_config,
    resume_command,
    whole_run,
)
from audiot.training.saved import read_checkpoint

# Figures of how it went, not of what came out.
SPEED = ("frames_per_s", "data_wait", "first_step_s", "train_s", "wall_s", "peak_gib", "energy_wh", "read_gb", "resumed_step")
NAMED = 6  # differences that a line names


@dataclass(frozen=True)
class Apart:
    """Where two runs differ.

    Args:
        place: In words that follow "differs".
        largest: The largest difference, as `distance` measures it; infinite where one of them has no such value.
    """

    place: str
    largest: float


def main(options: argparse.Namespace) -> None:
    """Repeat the run, or with ``options.compare`` only compare; print what differs. The exit code is 1 if anything does.

    Raises:
        ValueError: the run is not finished, its data are not what they were, or the other folder is in use.
    """
    run, folder = Path(options.run), Path(os.path.abspath(options.output or f"{os.path.normpath(options.run)}-rerun"))
    cfg = repeated_config(run, folder, options.trust)
    check_steps(options.steps, results(run, cfg), cfg)
    if options.compare:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    else:
        repeat(run, folder, cfg, options.trust, options.steps)
    if not is_first_process():  # the first one compares
        return
    if not has_config(folder):
        raise FileNotFoundError(f"--compare: {folder} holds no run to compare with")
    apart = compare(run, folder, cfg, options.steps)
    largest = max((each.largest for each in apart), default=0.0)
    if not apart:
        say("repeated exactly")
    elif largest <= options.tolerance:
        say(f"repeated within {options.tolerance:g}: the largest difference is {largest:.3g}")
    else:
        first = next(each for each in apart if each.largest > options.tolerance)
        say(f"differs, {first.place}")
        sys.exit(1)


def check_steps(steps: int | None, figures: Mapping[str, Any], cfg: DictConfig) -> None:
    """Refuse a number of first steps that a run doesn't have."""
    if steps is None:
        return
    if "downstream" in cfg or cfg.objective.get("rounds", 1) > 1:
        raise ValueError(f"--steps {steps} is for pre-training in one round: drop it, and the whole run is repeated")
    if not isinstance(figures.get("steps"), int) or not 1 <= steps <= figures["steps"]:
        raise ValueError(f"--steps must be from 1 to the run's {figures.get('steps')}, found {steps}")


def results(run: Path, cfg: DictConfig) -> dict[str, Any]:
    """The figures of a run.

    Raises:
        ValueError: it is not finished.
    """
    path = run / ("metrics.json" if "downstream" in cfg else "summary.json")
    if not path.is_file():
        raise ValueError(f"{run} is not finished, {path.name} is missing: {resume_command(whole_run(run))} goes on with it")
    return read_json(path, "results of a run")


def repeat(run: Path, folder: Path, cfg: DictConfig, trusted: list[str], steps: int | None = None) -> None:
    """Train again, if all that the run was trained on is what it was; all or the first ``steps`` of its steps."""
    if is_first_process() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there already: --output FOLDER repeats the run elsewhere, --compare compares with it")
    with owned(folder), no_failed_start(folder, "rerun"):
        log_to(folder)
        say(f"repeats {run} in {folder}")
        for change in changes_on_the_way(run):
            say(f"changed {change}: the repeat has that from its start")
        check_inputs(run, cfg)
        open_corpus(cfg, run)
        if then := read_environment(run):
            now, _ = environment(cfg)
            if other := differences(then, now):
                names = [*list(other)[:NAMED], *(["…"] if len(other) > NAMED else [])]
                say(f"other   {', '.join(names)}: not what the run was made with")
        if is_first_process():
            record_repeat(run, folder)
        if "downstream" in cfg:
            finetune.main(cfg)
        else:
            cfg.probe = cfg.probe and steps is None
            if cfg.probe:
                probe_configs(cfg, folder, trusted)  # refuses overrides of the file that are more than data
            pretrain.main(cfg, steps=steps)


def check_inputs(run: Path, cfg: DictConfig) -> None:
    """Refuse to begin where what the run started from is gone or has changed.

    Raises:
        ValueError: an encoder is another one than it was.
    """
    now = input_digests(cfg)
    for name, digest in (read_environment(run).get("inputs") or {}).items():
        if now.get(name) != digest:
            what = "is gone" if name not in now else "has changed"
            path = OmegaConf.select(cfg, name)
            raise ValueError(f"{run} started from {name}={path}, which {what} since: restore it, or train anew")


def compare(run: Path, folder: Path, cfg: DictConfig, steps: int | None = None) -> list[Apart]:
    """Print what two runs were made with, their figures, and how far curves and weights are apart.

    Args:
        run: A run.
        folder: Its repeat.
        cfg: Their config.
        steps: The number of steps that were repeated; None: all of them, with what follows them.

    Returns:
        Where they differ, the curve first.
    """
    then, now = (read_environment(each) for each in (run, folder))
    if then and now:
        rows = [[name, *values] for name, values in (_data(run, folder) | differences(then, now)).items()]
        say("\n" + (aligned([["made with", "run", "rerun"], *rows]) if rows else "made with the same program, machine and data"))
    else:
        say(f"\n{run if not then else folder} has no {ENVIRONMENT}: it was made by an earlier audiot")
    apart = compare_figures(results(run, cfg), results(folder, cfg)) if steps is None else []
    curve, told = compare_curves(run / "metrics.csv", folder / "metrics.csv", steps)
    say(f"\ncurve   {told}")
    weights, told = compare_weights(*(_weights(each, cfg, steps) for each in (run, folder)))
    say(f"weights {told}")
    return [*curve, *weights, *apart]


def compare_figures(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Apart]:
    """Print the figures of two runs, with words and intervals that differ; where they do."""
    a, b = flat_figures(first), flat_figures(second)
    rows, apart = [], []
    for name in dict.fromkeys([*a, *b]):
        far = distance(a.get(name), b.get(name))
        if far:
            apart.append(Apart(f"in {name}", far))
        if far or (isinstance(a.get(name), float) and not name.startswith(("intervals/", "bootstrap/"))):
            rows.append([name, *map(_text, (a.get(name), b.get(name), _minus(b.get(name), a.get(name))))])
    say("\n" + aligned([["figure", "run", "rerun", "difference"], *rows]))
    return apart


def _data(run: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """The fingerprints of the data of two runs, where they differ."""
    noted = [read_json(each / "data.json", "note of a run's data") for each in (run, folder) if (each / "data.json").is_file()]
    then, now = (str(each.get("content"))[:12] for each in noted) if len(noted) == 2 else ("", "")
    return {"data": (then, now)} if then != now else {}


def distance(a: float | str | None, b: float | str | None) -> float:
    """How far two values are apart: their difference, as a share of the larger where that is above 1."""
    if a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
        return 0.0
    if not isinstance(a, float) or not isinstance(b, float) or not math.isfinite(a - b):
        return math.inf
    return abs(a - b) / max(1.0, abs(a), abs(b))


def flat_figures(content: Mapping[str, Any], prefix: str = "") -> dict[str, float | str | None]:
    """All figures and words of a run's results by name, without those of its speed."""
    found: dict[str, float | str | None] = {}
    for name, value in content.items():
        if name in SPEED:
            continue
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found |= flat_figures({str(key): each for key, each in value.items()}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
        else:
            found[f"{prefix}{name}"] = None if value is None else str(value)
    return found


def _minus(b: float | str | None, a: float | str | None) -> float | None:
    return b - a if isinstance(a, float) and isinstance(b, float) else None


def _text(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.6g}"


def compare_curves(first: Path, second: Path, steps: int | None = None) -> tuple[list[Apart], str]:
    """Where the rows of two ``metrics.csv`` begin to differ, and that in words. Speeds are left out.

    Args:
        first: A file.
        second: The other file.
        steps: The number of steps that both have; the second has another validation after the last of them.
    """
    if not first.is_file() or not second.is_file():
        return [], "not compared: metrics.csv is missing"
    a, b = read_curve(first), read_curve(second)
    logged = [step for step in sorted({*a, *b}) if steps is None or step < steps]
    beginning, largest, count = None, 0.0, 0
    for step in logged:
        here, there = a.get(step, {}), b.get(step, {})
        names = here.keys() & there.keys() if steps is not None and step == steps - 1 else here.keys() | there.keys()
        far = max((distance(here.get(name), there.get(name)) for name in names), default=0.0)
        if far:
            count += 1
            largest = max(largest, far)
            beginning = step if beginning is None else beginning
    if beginning is None:
        return [], f"the same at all {len(logged):,} steps that were logged"
    by = f"by {largest:.3g} at most" if math.isfinite(largest) else "where one has what the other lacks"
    told = f"differs at {count:,} of {len(logged):,} steps that were logged, {by}, first at step {beginning}"
    return [Apart(f"first at step {beginning}", largest)], told


def read_curve(path: Path) -> dict[int, dict[str, float | str | None]]:
    """Figures of a ``metrics.csv`` by step and column, without those of speed.

    Raises:
        ValueError: it is damaged.
    """
    curve: dict[int, dict[str, float | str | None]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream, strict=True):
                here = curve.setdefault(int(row["step"]), {})
                here |= {name: float(text) for name, text in row.items() if text and name not in ("step", *SPEED)}
    except (csv.Error, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, so the curves can't be compared: {error}") from error
    return curve


def _weights(run: Path, cfg: DictConfig, steps: int | None) -> Mapping[str, Tensor] | None:
    """The weights of a run after so many steps, by default those that it ends with; None where it kept none."""
    if "downstream" in cfg:
        path = run / finetune.BEST
    else:
        path = newest_checkpoint(run) if steps is None else checkpoint_path(run / "checkpoints", steps)
    if not path.is_file():
        return None
    weights = read_checkpoint(path)["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"{path}: state_dict holds more than tensors")
    return weights


def compare_weights(first: Mapping[str, Tensor] | None, second: Mapping[str, Tensor] | None) -> tuple[list[Apart], str]:
    """How far weights are apart, and that in words."""
    if first is None or second is None:
        return [], "not compared: one of the runs kept none of that step"
    kinds = [{name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()} for weights in (first, second)]
    if kinds[0] != kinds[1]:
        return [Apart("in the shapes of the weights", math.inf)], "have other names, shapes or types"
    far = [(_furthest(weight, second[name]), name) for name, weight in first.items() if not torch.equal(weight, second[name])]
    far = [each for each in far if each[0]]
    if not far:
        return [], f"equal bit for bit, all {len(first):,} tensors"
    largest, name = max(far)
    return [Apart(f"in the weights, most in {name}", largest)], (
        f"differ in {len(far):,} of {len(first):,} tensors, by {largest:.3g} at most, in {name}"
    )


def _furthest(a: Tensor, b: Tensor) -> float:
    """The largest `distance` of two tensors' elements."""
    a, b = a.double(), b.double()
    scale = torch.maximum(a.abs(), b.abs()).clamp(min=1)
    far = ((a - b).abs() / scale).masked_fill((a == b) | (a.isnan() & b.isnan()), 0)
    return math.inf if not far.isfinite().all() else float(far.max())
