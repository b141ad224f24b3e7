"""What a study runs: mechanisms under objectives over seeds, and the tasks of every encoder, each as a command of audiot."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from audiot.base.config import compose_command
from audiot.base.groups import nearest, options
from audiot.base.quoting import override
from audiot.benchmark.entries import Entry, check_labels
from audiot.study.findings import BUDGETS, Factor, Level, Measure
from audiot.study.records import Record

# Keys of a config that no figure depends on.
ASIDE = ("run_dir", "data_dir", "logger", "callbacks", "debug", "plots", "probe_jobs", "resume", "trusted")
CHANGING = ("average", "early_stopping")  # callbacks that change figures
UNTRAINED, FEATURES = "untrained", "features"
CONTROLS = (UNTRAINED, FEATURES)
# Where something is and who reads it, not what it is.
_PLACE = re.compile(r"(data\.(root|num_workers|prepare\.num_jobs)|upstream\.path)=")


@cache
def fingerprint(command: str, overrides: tuple[str, ...]) -> str:
    """Digest of the config that a command composes, so that what changes a default changes it too."""
    overrides = tuple(each for each in overrides if not _PLACE.match(each))
    config = OmegaConf.to_container(compose_command(command, [*overrides, "run_dir=run", "data_dir=data"]))
    assert isinstance(config, dict)
    chosen = {name: value for name, value in config["callbacks"].items() if name in CHANGING} if "callbacks" in config else {}
    return _digest({name: value for name, value in config.items() if name not in ASIDE} | chosen)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """A run of a study.

    Args:
        name: What it is, in words that slashes part.
        command: Command of audiot.
        shared: Overrides that many runs have, in Hydra's grammar.
        own: Overrides of this run.
        encoder: The pre-training whose encoder it takes; None where it takes none.
        task: Name of the task that it measures; empty for pre-training and for what was learned.
        alone: Whether it has its device to itself, because it measures what the device does in a time.
        heard: Digest of an encoder from elsewhere; empty where `encoder` says which it takes, or it takes none.
    """

    name: str
    command: str
    shared: tuple[str, ...]
    own: tuple[str, ...]
    encoder: Job | None = None
    task: str = ""
    alone: bool = False
    heard: str = ""

    @cached_property
    def key(self) -> str:
        """Digest of all that its figures depend on."""
        heard = (self.heard or None) if self.encoder is None else self.encoder.key
        return _digest([self.command, fingerprint(self.command, self.shared), self.own, heard])[:16]

    @property
    def folder(self) -> str:
        """Folder of its run in the study's."""
        return f"runs/{re.sub(r'[^0-9A-Za-z_.=-]+', '-', self.name)}-{self.key[:8]}"

    def arguments(self, study: Path) -> list[str]:
        """Overrides of its command line, without the place of its run."""
        if self.encoder is None:
            return [*self.shared, *self.own]
        run = study / self.encoder.folder
        heard = override("run", run) if self.command == "analyze" else override("upstream.path", str(run / "encoder"))
        return [*self.shared, *self.own, heard]


@dataclass(frozen=True)
class Task:
    """What is measured of every encoder.

    Args:
        measure: Its figure.
        command: ``finetune`` or ``abx``.
        overrides: Overrides of the command.
        features: Overrides in place of these where the features themselves are measured; None: they are not.
        figure: Name of the figure in ``metrics.json``; ``abx`` has the error of its best layer.
    """

    measure: Measure
    command: str
    overrides: tuple[str, ...]
    features: tuple[str, ...] | None
    figure: str

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any]) -> Task:
        """A task of the config."""
        known = ["command", "overrides", "features", "figure", "title", "higher_is_better", "margin"]
        if unknown := [key for key in given if key not in known]:
            raise ValueError(f"study.tasks.{name}: no key {unknown[0]!r}{nearest(unknown[0], known)}; keys: {', '.join(known)}")
        command = given.get("command", "finetune")
        if command not in ("finetune", "abx"):
            raise ValueError(f"study.tasks.{name}.command is {command!r}: expected finetune or abx")
        features = given.get("features")
        measure = Measure(name, given.get("title", name), given.get("higher_is_better", command != "abx"), given.get("margin"))
        overrides = tuple(given.get("overrides", ()))
        figure = "abx" if command == "abx" else given.get("figure", "test/accuracy")
        return cls(measure, command, overrides, None if features is None else tuple(features), figure)


LEVEL = "{level}"  # stands for the level in a factor's overrides
CHUNKED = ("model.chunk_frames=${model.max_frames}",)  # pre-training overrides of a study with `chunked`


class Study:
    """Mechanisms × objectives × seeds, in pairs: runs of one seed have the same batches and masks.

    A factor crosses them with its levels: each objective is there at each level, and comparisons are within a level.

    Each mechanism's learning rate is the one of the best validation loss, of the same few for all, on the first seed.

    Args:
        name: Its name, that of its folder.
        title: Title of its report.
        rehearsal: Why nothing may be concluded from it; empty where something may.
        baseline: Label of the mechanism that the others are compared with.
        mechanisms: Entries: a name in `conf/attention`, or ``{name, label, overrides, pretrain}``, where ``overrides`` are
            parameters of the mechanism, and ``pretrain`` other overrides of its pre-training; ``all`` stands for all others.
        control_mechanisms: Labels of those that are controls.
        objectives: Names in `conf/objective`, or ``{name, label, overrides}``.
        seeds: Seeds of the runs.
        learning_rates: Learning rates to choose from.
        budgets: ``steps``: all train equally many; ``time``: all but controls train as long as the baseline does for its steps,
            by the time per frame that the runs of costs have measured.
        controls: ``untrained``: the baseline's architecture, at the first level, with random weights; ``features``: what the
            encoder hears.
        data: Name in `conf/data`.
        shared: Overrides of all commands, for the data and the features.
        size: More of them, by which ``size=…`` shrinks a study.
        pretrain: Overrides of all pre-training.
        cost: More overrides of the short pre-training that measures a mechanism's costs, alone on its device.
        finetune: Overrides of all fine-tuning.
        tasks: What is measured of every encoder, by name; None leaves one out.
        factor: ``{title, unit, levels, overrides}``: what is varied for all mechanisms alike. Levels are positive numbers.
            ``overrides`` are those of pre-training alone, where ``{level}`` stands for the level.
        alpha: Probability of a wrong verdict that is accepted, for each measure.
        resamples: Draws of the bootstrap over seeds and test units.
        learned: Whether to measure what every encoder of equal steps has learned (``audiot analyze``).
        chunked: Whether encoders take audio that is longer than their crops in pieces of that length, all mechanisms alike. Some
            have tables of frames and take no longer sequences.

    Raises:
        ValueError: an entry is none, or two have one label.
    """

    def __init__(
        self,
        name: str,
        title: str,
        rehearsal: str,
        baseline: str,
        mechanisms: Sequence[str | Mapping[str, Any]],
        control_mechanisms: Sequence[str],
        objectives: Sequence[str | Mapping[str, Any]],
        seeds: Sequence[int],
        learning_rates: Sequence[float],
        budgets: Sequence[str],
        controls: Sequence[str],
        data: str,
        shared: Sequence[str],
        pretrain: Sequence[str],
        cost: Sequence[str],
        finetune: Sequence[str],
        tasks: Mapping[str, Mapping[str, Any] | None],
        size: Sequence[str] = (),
        factor: Mapping[str, Any] | None = None,
        alpha: float = 0.05,
        resamples: int = 2000,
        learned: bool = True,
        chunked: bool = False,
    ) -> None:
        self.learned = learned
        self.name, self.title, self.rehearsal = name, title, rehearsal
        self.baseline, self.alpha, self.resamples = baseline, alpha, resamples
        self.mechanisms = _mechanisms(mechanisms)
        self.objectives = dict(map(_objective, objectives))
        self.factor = None
        if factor is not None:
            self.factor, self.objectives = _crossed(factor, self.objectives)
        self.seeds, self.learning_rates = list(seeds), list(learning_rates)
        self.budgets, self.controls, self.control_mechanisms = list(budgets), list(controls), list(control_mechanisms)
        self.data = (f"data={data}", *shared, *size)
        self.pretrain, self.cost, self.finetune = (*pretrain, *(CHUNKED if chunked else ())), tuple(cost), tuple(finetune)
        self.tasks = {name: Task.of(name, task) for name, task in tasks.items() if task is not None}
        self._check()

    def _check(self) -> None:
        for what, found, known in (
            ("baseline", [self.baseline], [*self.mechanisms]),
            ("control_mechanisms", self.control_mechanisms, [*self.mechanisms]),
            ("budgets", self.budgets, BUDGETS),
            ("controls", self.controls, CONTROLS),
        ):
            for name in found:
                if name not in known:
                    raise ValueError(f"study.{what}: no {name!r}{nearest(name, [*known])}; there are {', '.join(known)}")
        for what, several in (("seeds", self.seeds), ("learning_rates", self.learning_rates), ("budgets", self.budgets)):
            if not several or len(set(several)) < len(several):
                raise ValueError(f"study.{what} is {several}: expected one or more, each once")
        if not 0 < self.alpha < 1:
            raise ValueError(f"study.alpha is {self.alpha}: expected a probability, such as 0.05")
        if "steps" not in self.budgets:
            raise ValueError("study.budgets lacks steps: the learning rate is chosen by runs of equal steps")

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is compared."""
        return tuple(task.measure for task in self.tasks.values())

    def jobs(self, records: Mapping[str, Record]) -> Iterator[Job]:
        """All runs that are known by now, each after what it needs.

        Args:
            records: Key of each run that is finished → its record. Learning rates and equal times follow from them.
        """
        pairs = [(objective, mechanism) for objective in self.objectives for mechanism in self.mechanisms]
        for objective, mechanism in pairs:
            yield self.costs(objective, mechanism)
        for objective, mechanism in pairs:
            yield from self.searched(objective, mechanism)
        for objective in self.objectives:
            for mechanism in self.mechanisms:
                for seed in self.seeds:
                    for budget in self.budgets:
                        job = self.training(objective, mechanism, seed, budget, records)
                        if job is not None:
                            yield job
                            yield from (self.task(name, job, seed) for name in self.tasks)
                        if job is not None and budget == "steps" and self.learned:
                            yield self.analysis(job)
        for name in self.tasks:
            for seed in self.seeds:
                for control in self.controls:
                    job = self.control(name, control, seed, records)
                    if job is not None:
                        yield job

    def costs(self, objective: str, mechanism: str) -> Job:
        """The run that measures time, memory and energy."""
        job = self._training(objective, mechanism, self.seeds[0], self.learning_rates[0])
        return Job(
            f"{objective}/{mechanism}/cost/seed={self.seeds[0]}", "pretrain", (*job.shared, *self.cost), job.own, alone=True
        )

    def searched(self, objective: str, mechanism: str) -> list[Job]:
        """The runs of which validation chooses the learning rate."""
        return [self._training(objective, mechanism, self.seeds[0], rate) for rate in self.learning_rates]

    def learning_rate(self, objective: str, mechanism: str, records: Mapping[str, Record]) -> float | None:
        """The learning rate of a mechanism; None until all that it is chosen from have run."""
        found = [records.get(job.key) for job in self.searched(objective, mechanism)]
        if any(record is None for record in found):
            return None
        losses = [record.figure("validation") for record in found if record is not None]
        return self.learning_rates[losses.index(min(losses))]

    def training(self, objective: str, mechanism: str, seed: int, budget: str, records: Mapping[str, Record]) -> Job | None:
        """A pre-training; None until what it depends on is known.

        The baseline's is the same for every budget. Controls train equally many steps only.
        """
        rate = self.learning_rate(objective, mechanism, records)
        if rate is None:
            return None
        if budget == "steps" or mechanism == self.baseline:
            return self._training(objective, mechanism, seed, rate)
        if mechanism in self.control_mechanisms:
            return None
        own, reference = (records.get(self.costs(objective, name).key) for name in (mechanism, self.baseline))
        if own is None or reference is None:
            return None
        steps = records[self.searched(objective, mechanism)[0].key].figure("steps")
        steps = round(steps * reference.figure("s_per_mframe") / own.figure("s_per_mframe"))
        return self._training(objective, mechanism, seed, rate, max(1, steps))

    def _training(self, objective: str, mechanism: str, seed: int, rate: float, steps: int | None = None) -> Job:
        apart = (*self.objectives[objective], *self.mechanisms[mechanism], "probe=false")
        shared = (*self.data, "plots=false", *self.pretrain, *apart)
        name = f"{objective}/{mechanism}/lr={rate:g}/seed={seed}"
        own = [f"optimizer.lr={rate}", f"seed={seed}"]
        if steps is not None:
            name += f"/steps={steps}"
            own += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
        return Job(name, "pretrain", shared, tuple(own))

    def task(self, name: str, training: Job, seed: int) -> Job:
        """A task on an encoder."""
        task = self.tasks[name]
        shared = (*self.data, *self._common(task), *task.overrides, "upstream=checkpoint")
        return Job(f"{training.name}/{name}", task.command, shared, (f"seed={seed}",), training, name)

    def analysis(self, training: Job) -> Job:
        """What an encoder has learned, in figures."""
        return Job(f"{training.name}/learned", "analyze", ("plots=false",), (), training)

    def control(self, name: str, control: str, seed: int, records: Mapping[str, Record]) -> Job | None:
        """A task on a control; None until what it depends on is known, or where the task has none."""
        task = self.tasks[name]
        if control == FEATURES:
            if task.features is None:
                return None
            shared = (*self.data, *self._common(task), *task.features, "upstream=features")
            return Job(f"{control}/{name}/seed={seed}", task.command, shared, (f"seed={seed}",), task=name)
        training = self.training(next(iter(self.objectives)), self.baseline, self.seeds[0], "steps", records)
        if training is None:
            return None
        shared = (*self.data, *self._common(task), *task.overrides, "upstream=random")
        return Job(f"{control}/{name}/seed={seed}", task.command, shared, (f"seed={seed}",), training, name)

    def _common(self, task: Task) -> tuple[str, ...]:
        is_abx = task.command == "abx"
        where = "bootstrap" if is_abx else "downstream.bootstrap"
        own = ("compare=false",) if is_abx else (*self.finetune, "logger=none")
        return ("plots=false", *own, f"{where}.seed={self.seeds[0]}", f"{where}.keep=true")


def _mechanisms(entries: Sequence[str | Mapping[str, Any]]) -> dict[str, list[str]]:
    """Label and overrides of each mechanism."""
    own, more = [], {}
    for entry in entries:
        if isinstance(entry, Mapping) and "pretrain" in entry:
            extra = entry["pretrain"]
            entry = {key: entry[key] for key in entry if key != "pretrain"}
            more[Entry.of(entry, "study.mechanisms").label] = extra
        own.append(entry)
    found = Entry.all_of(own, "study.mechanisms")
    check_labels(found, "study.mechanisms")
    return {entry.label: [*entry.arguments, *more.get(entry.label, ())] for entry in found}


def _objective(entry: str | Mapping[str, Any]) -> tuple[str, list[str]]:
    """Label and overrides of an objective."""
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = str(given.get("name"))
    if name not in options("objective"):
        known = options("objective")
        raise ValueError(f"study.objectives: no objective {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    if unknown := set(given) - {"name", "label", "overrides"}:
        raise ValueError(f"study.objectives: no key {min(unknown)!r}; keys: name, label, overrides")
    return str(given.get("label", name)), [f"objective={name}", *given.get("overrides", ())]


def _crossed(given: Mapping[str, Any], objectives: Mapping[str, Sequence[str]]) -> tuple[Factor, dict[str, list[str]]]:
    """A factor of the config, and each objective at each of its levels."""
    known = ["title", "unit", "levels", "overrides"]
    for key in given:
        if key not in known:
            raise ValueError(f"study.factor: no key {key!r}{nearest(key, known)}; keys: {', '.join(known)}")
    if missing := [key for key in known if key not in given]:
        raise ValueError(f"study.factor lacks {missing[0]}; keys: {', '.join(known)}")
    levels, overrides = given["levels"], given["overrides"]
    if not levels or not all(type(level) in (int, float) and 0 < level < inf for level in levels) or len({*levels}) < len(levels):
        raise ValueError(f"study.factor.levels is {levels}: expected positive numbers, each once")
    if not any(LEVEL in override for override in overrides):
        raise ValueError(
            f"study.factor.overrides is {overrides}: write {LEVEL} where the level belongs, as in data.hours={LEVEL}"
        )
    places = {f"{name}, {level} {given['unit']}": Level(name, float(level)) for name in objectives for level in levels}
    crossed = {
        f"{name}, {level} {given['unit']}": [*own, *(override.replace(LEVEL, str(level)) for override in overrides)]
        for name, own in objectives.items()
        for level in levels
    }
    return Factor(given["title"], given["unit"], tuple(overrides), places), crossed
