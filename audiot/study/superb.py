"""SUPERB's tasks on one encoder (Yang et al. 2021, arXiv:2105.01051): what is run, and the table of what came of it.

The encoder is frozen, and a light head learns a task from a weighted sum of its layers. Of all settings the learning rate alone
may be tuned, on validation, as SUPERB's rules have it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from audiot.base.config import compose_command
from audiot.base.groups import nearest
from audiot.study.comparison import estimate
from audiot.study.design import Job, Task
from audiot.study.findings import Sample
from audiot.study.records import Record

TASKS = {  # name → figure in metrics.json, what it is called
    "pr": ("test/per", "phone error rate"),
    "asr": ("test/wer", "word error rate"),
    "ks": ("test/accuracy", "accuracy"),
    "ic": ("test/accuracy", "accuracy"),
    "sid": ("test/accuracy", "accuracy"),
    "asv": ("test/eer", "equal error rate"),
}
TITLES = {
    "pr": "phone recognition",
    "asr": "speech recognition",
    "ks": "keyword spotting",
    "ic": "intent classification",
    "sid": "speaker identification",
    "asv": "speaker verification",
}
CORPORA = {
    "pr": "librispeech",
    "asr": "librispeech",
    "ks": "speech_commands",
    "ic": "fluent_speech_commands",
    "sid": "voxceleb1",
    "asv": "voxceleb1",
}
HEADER = ("task", "figure", "learning_rate", "validation", "test", "low", "high", "seeds")


@dataclass(frozen=True)
class Preset:
    """What a task's config says of its search.

    Args:
        shared: Overrides of its runs.
        rates: Learning rates that are tried.
        higher_is_better: Whether more of its validation's figure is better.
        short: Overrides of the runs that are only for the choice.
    """

    shared: tuple[str, ...]
    rates: tuple[float, ...]
    higher_is_better: bool
    short: tuple[str, ...]


class Superb:
    """The runs of SUPERB's tasks: each task with each learning rate on the first seed, then with the best of them on every seed.

    Args:
        tasks: Name of a task → overrides of its runs.
        encoder: Digest of the encoder.
        factors: Learning rates that are tried, in that of the preset.
        steps: Steps of the runs that are only for the choice; None: as many as those of the result have.
        seeds: Seeds of the runs.
        failed: Keys of runs that have failed: a rate whose run fails is not chosen.

    Raises:
        ValueError: a task or a setting is none.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[str]],
        encoder: str,
        factors: Sequence[float],
        steps: int | None,
        seeds: Sequence[int],
        failed: Container[str] = (),
    ) -> None:
        self.encoder, self.seeds, self.failed = encoder, list(seeds), failed
        for name in tasks:
            if name not in TASKS:
                raise ValueError(f"tasks: no {name!r}{nearest(name, [*TASKS])}; there are {', '.join(TASKS)}")
        for what, several in (("tasks", [*tasks]), ("search.factors", factors), ("seeds", seeds)):
            if not several or len(set(several)) < len(several):
                raise ValueError(f"{what} is {[*several]}: expected one or more, each once")
        if min(factors) <= 0:
            raise ValueError(f"search.factors is {[*factors]}: expected positive numbers")
        if steps is not None and steps < 1:
            raise ValueError(f"search.steps is {steps}: expected a number of steps, or null for as many as the result's")
        self.presets = {name: _preset(overrides, factors, steps) for name, overrides in tasks.items()}
        self.tasks = {
            name: Task.of(name, {"overrides": preset.shared, "figure": TASKS[name][0]}) for name, preset in self.presets.items()
        }

    def jobs(self, records: Mapping[str, Record]) -> Iterator[Job]:
        """All runs that are known by now: those of the searches, and those of the results whose learning rate is chosen."""
        for name in self.tasks:
            yield from self.searched(name)
            yield from self.results(name, records)

    def searched(self, name: str) -> list[Job]:
        """The runs of which validation chooses the learning rate."""
        preset = self.presets[name]
        return [self._job(name, rate, self.seeds[0], preset.short) for rate in preset.rates]

    def learning_rate(self, name: str, records: Mapping[str, Record]) -> float | None:
        """The learning rate of a task; None until all runs of its search have ended, or where all have failed."""
        preset, found = self.presets[name], {}
        for rate, job in zip(preset.rates, self.searched(name), strict=True):
            if job.key in records:
                found[rate] = records[job.key].figure("validation")
            elif job.key not in self.failed:
                return None
        best = max if preset.higher_is_better else min
        return best(found, key=lambda rate: found[rate]) if found else None

    def results(self, name: str, records: Mapping[str, Record]) -> list[Job]:
        """The runs that a task's result is the mean of; none until its learning rate is chosen."""
        rate = self.learning_rate(name, records)
        return [] if rate is None else [self._job(name, rate, seed) for seed in self.seeds]

    def rows(self, records: Mapping[str, Record], resamples: int) -> list[dict[str, str | float | int]]:
        """A row of the table for each task whose runs are finished: means over seeds, and the test's 95% interval."""
        rows: list[dict[str, str | float | int]] = []
        for name in self.tasks:
            jobs = self.results(name, records)
            if not jobs or any(job.key not in records for job in jobs):
                continue
            found = [records[job.key] for job in jobs]
            rate = self.learning_rate(name, records)
            assert rate is not None
            draws = [np.array(record.draws["value"]) if "value" in record.draws else None for record in found]
            samples = [
                Sample(seed, record.figure("value"), drawn, record.run)
                for seed, record, drawn in zip(self.seeds, found, draws, strict=True)
            ]
            value = estimate(samples, resamples)
            validation = float(np.mean([record.figure("validation") for record in found]))
            ends = ("", "") if value.low is None or value.high is None else (value.low, value.high)
            cells = (name, TASKS[name][1], rate, validation, value.mean, *ends, len(found))
            rows.append(dict(zip(HEADER, cells, strict=True)))
        return rows

    def trials(self, records: Mapping[str, Record]) -> list[dict[str, str | float | int]]:
        """A row for each run that is finished. Tests of rates that were not chosen are no results, and are left out."""
        rows: list[dict[str, str | float | int]] = []
        for name in self.tasks:
            kept = {job.key for job in self.results(name, records)}
            for key, job in {job.key: job for job in (*self.searched(name), *self.results(name, records))}.items():
                if key in records:
                    record = records[key]
                    test = record.figure("value") if key in kept else ""
                    rows.append({"task": name, "run": record.run, "validation": record.figure("validation"), "test": test})
                elif key in self.failed:
                    rows.append({"task": name, "run": job.folder, "validation": "failed", "test": ""})
        return rows

    def _job(self, name: str, rate: float, seed: int, own: Sequence[str] = ()) -> Job:
        shared = (*self.presets[name].shared, "plots=false", "logger=none", "downstream.bootstrap.keep=true")
        shared += (f"downstream.bootstrap.seed={self.seeds[0]}",)
        named = f"superb_{name}/lr={rate:g}/seed={seed}" + ("/search" if own else "")
        overrides = (f"optimizer.lr={rate!r}", f"seed={seed}", *own)
        return Job(named, "finetune", shared, overrides, task=name, heard=self.encoder)


def _preset(overrides: Sequence[str], factors: Sequence[float], steps: int | None) -> Preset:
    """What the config that the overrides compose says of a search."""
    cfg = compose_command("finetune", [*overrides, "run_dir=run", "data_dir=data"])
    rates = tuple(float(f"{factor * cfg.optimizer.lr:.6g}") for factor in factors)
    short: tuple[str, ...] = ()
    if steps is not None and steps < cfg.trainer.max_steps:
        every = min(cfg.trainer.val_check_interval, steps * cfg.trainer.accumulate_grad_batches)
        short = (f"trainer.max_steps={steps}", f"trainer.val_check_interval={every}")
    return Preset(tuple(overrides), rates, cfg.downstream.mode == "max", short)
