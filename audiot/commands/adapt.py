"""``audiot adapt``: from a folder of audio and a table of labels to a model and its report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from audiot.adaptation.labelled import SPEAKERS, TRANSCRIPTION, Labelled, look
from audiot.adaptation.outcome import Outcome, difference, majority, of_run, read_curves, read_rows
from audiot.adaptation.plan import Plan, Size, check_settings, plan_data, plan_encoder, plan_pretraining, plan_training
from audiot.adaptation.report import bracket, percent, sentences, title_of, write_report
from audiot.adaptation.survey import Survey, survey
from audiot.base.config import compose_command, folder_name, parse
from audiot.base.console import say
from audiot.base.devices import is_cuda
from audiot.base.files import read_json, write_json
from audiot.base.lock import owned
from audiot.base.quoting import argument, override, path, quoted
from audiot.commands.environment import read_environment
from audiot.commands.estimate import finetuning_s, in_words, pretraining_s
from audiot.commands.finetune import predict_command, trust_flags
from audiot.commands.stages import Stage
from audiot.commands.upstreams import open_upstream
from audiot.data.corpora.folder import FolderCorpus
from audiot.data.opening import open_corpus
from audiot.data.prepare import PreparedCorpus
from audiot.downstream.upstream import Upstream
from audiot.runs import ERRORS, Interrupted, read_results
from audiot.training.float8 import check_tasks_precision

NOTE = "adapt.json"
FEATURES = "a head on features alone"
OWN = ("labels", "init", "adapt", "trusted", "run_dir", "resume")  # keys that are of this command alone
SHARED = ("data", "features", "model", "attention", "positions", "seed", "debug", "data_dir", "plots", "trainer", "logger")
# Settings of the training on labels that are no settings of pre-training.
LABELS_ALONE = ("trainer.max_steps", "trainer.val_check_interval", "data.label_fraction", "optimizer.lr")


class Adaptation:
    """The whole of it, step by step.

    Args:
        cfg: Config of the command.
        given: The overrides of the command line.
        options: Config group → the option that was chosen.
    """

    def __init__(self, cfg: DictConfig, given: list[str], options: dict[str, Any]) -> None:
        self.cfg, self.run = cfg, _as_seen(Path(cfg.run_dir))
        self.command = " ".join(["audiot adapt", *map(quoted, sys.argv[1:])])
        names = {each: parsed.key_or_group for each, parsed in zip(given, parse(given), strict=True)}
        self.mine = [each for each, name in names.items() if name.split(".")[0] not in (*OWN, "hydra") and not _is_auto(each)]
        self.names = {names[each] for each in self.mine}
        self.kind = str(options.get("upstream", "checkpoint"))
        self.has_upstream = "upstream" in self.names or cfg.upstream.get("path") is not None
        if self.kind in ("checkpoint", "hf", "s3prl") and self.has_upstream and cfg.upstream.get("path") is None:
            raise ValueError(f"upstream={self.kind} has no path: set upstream.path=…")
        check_settings(cfg.adapt, cfg.init, self.has_upstream)
        check_tasks_precision(cfg.trainer.precision)
        self.on_gpu = is_cuda(cfg.trainer.accelerator)

    def whole(self) -> None:
        """Look, choose, estimate, train, test, report."""
        begin = time.monotonic()
        folder = self.opened()
        options = self.cfg.adapt
        found = look(folder, options.task, options.label)
        place = self.checked_place(found)
        data = Plan(self.names)
        plan_data(data, found, options.by_speaker)
        if options.baseline and not any(name.startswith("downstream.bootstrap") for name in self.names):
            data.chosen["downstream.bootstrap.keep"] = True  # to tell the model and features apart on the same tests
        encoder = self.encoder(data)
        self.choose_rate(data, encoder)
        corpus = open_corpus(self.composed("finetune", data))
        task = str(self.composed("finetune", data).downstream.task)
        seen = survey(corpus, task, found)
        say("\n" + seen.in_words())
        seen.check()
        stages, plans, timings = self.stages(data, corpus, seen, found, encoder)
        for line in dict.fromkeys(line for plan in plans for line in plan.lines):
            say(f"choose  {line}")
        estimates = self.estimated(stages, corpus, timings)
        write_json(self.run / NOTE, place)
        folders: dict[str, Path] = {}
        trained = time.monotonic()
        for name, stage in stages.items():
            if name == "model" and "pretrain" in folders:
                stage.overrides.append(override("upstream.path", folders["pretrain"] / "encoder"))
                if self.cfg.trusted:
                    stage.overrides.append(override("upstream.trusted", list(self.cfg.trusted)))
            folders[name] = stage.run(self.run, corpus, self.command)
        took = {"estimate": sum(estimates.values()), "training": time.monotonic() - trained, "all": time.monotonic() - begin}
        lines = list(dict.fromkeys(line for plan in plans for line in plan.lines))
        outcome = self.outcome(seen, folders, stages["model"], lines, took)
        self.note(outcome, found, folders, estimates, took)
        options = self.cfg.adapt
        self.close(outcome, write_report(outcome, self.run, options.clips, options.clip_s), took)

    def opened(self) -> FolderCorpus:
        """The folder, unread."""
        labels = self.cfg.labels
        if labels is not None and not Path(labels).is_file():
            inside = Path(self.cfg.data.root) / labels
            there = f"; there is {inside}" if inside.is_file() else ": a CSV with a column path and a column of labels"
            raise FileNotFoundError(f"labels={labels}: there is no such file{there}")
        found = instantiate(self.cfg.data.corpus)
        assert isinstance(found, FolderCorpus)
        return found

    def checked_place(self, found: Labelled) -> dict[str, str]:
        """What the run's folder is about to hold.

        Raises:
            ValueError: it holds the adaptation to other labels, or of other audio.
        """
        now = {"root": str(Path(self.cfg.data.root).resolve()), "task": found.task, "label": found.label}
        if (self.run / NOTE).is_file():
            before = read_json(self.run / NOTE, "note of an adaptation")
            for name, value in now.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"{self.run} holds the adaptation with {name} {before.get(name)}, now it is {value}: choose another "
                        f"folder, {argument('hydra.run.dir', f'{self.run}-{found.label}')}"
                    )
        return now

    def composed(self, command: str, plan: Plan) -> DictConfig:
        """The config of a stage before it has a folder."""
        return compose_command(command, [*self.overrides(command, plan), override("run_dir", self.run)])

    def overrides(self, command: str, plan: Plan, left_out: tuple[str, ...] = ()) -> list[str]:
        """What is chosen and what is given, for a stage."""
        chosen = plan.overrides()
        given = [
            each
            for each in self.mine
            if not (name := each.lstrip("+~").split("=")[0].split("@")[0]).startswith(left_out or ("\0",))
            and (command == "finetune" or (name.split(".")[0] in SHARED and name not in LABELS_ALONE))
        ]
        names = {each.lstrip("+~").split("=")[0] for each in given}
        own = [each for each in chosen if each.lstrip("+").split("=")[0] not in names]
        data = [] if "data" in names else ["data=folder"]
        table = [] if self.cfg.labels is None else [override("data.labels", self.cfg.labels)]
        quiet = [] if "logger" in names else ["logger=csv"]
        return [*data, *table, *own, *given, *quiet]

    def stages(
        self, data: Plan, corpus: PreparedCorpus, seen: Survey, found: Labelled, given: Upstream | None
    ) -> tuple[dict[str, Stage], list[Plan], dict[str, Upstream]]:
        """What to train in which order, the plans that say why, and an upstream like that of each training on labels."""
        cfg, options = self.cfg, self.cfg.adapt
        hours = corpus.hours[corpus.split_for("pretrain", "train")]
        size = Size(3600 * seen.hours["train"], seen.counts["train"], hours, self.on_gpu)
        encoder = Plan(self.names)
        pretrains = plan_encoder(encoder, hours, cfg.init, options.pretrain, options.enough_h, self.has_upstream)
        kind = str(encoder.chosen.pop("upstream", self.kind))
        stages: dict[str, Stage] = {}
        plans = [data, encoder]
        shared = {name: value for name, value in data.chosen.items() if name.lstrip("+").startswith("data")}
        if pretrains:
            first = Plan({*self.names} - {*LABELS_ALONE}, dict(shared))
            plan_pretraining(first, size, options.pretrain_steps)
            extra = ["probe=false", *([] if cfg.init is None else [override("init", cfg.init)])]
            extra += [override("trusted", list(cfg.trusted))] if cfg.trusted else []
            settings = [str(each) for each in options.pretrain_settings]
            own = {each.lstrip("+~").split("=")[0] for each in settings}
            kept = [each for each in self.overrides("pretrain", first) if each.lstrip("+~").split("=")[0] not in own]
            stages["pretrain"] = Stage("pretrain", "pretrain", [*kept, *extra, *settings])
            first.lines = [f"pre-training: {line}" for line in first.lines]
            plans.append(first)
            kind = "checkpoint"
        main = Plan(self.names, dict(data.chosen))
        upstream = given or self.untrained(data)
        parameters = sum(parameter.numel() for parameter in upstream.parameters())
        values = {name: OmegaConf.select(cfg, name) for name in self.names if not OmegaConf.is_missing(cfg, name)}
        plan_training(main, found, size, kind, upstream.state_dim, parameters, values)
        plans.append(main)
        like: dict[str, Upstream] = {"model": upstream}
        if kind == "features":
            stages["model"] = self.features_stage("model", main)
            like["model"] = self.features_upstream(stages["model"])
        else:
            stages["model"] = Stage("model", "finetune", self.overrides("finetune", main))
            if options.baseline:
                plain = Plan(self.names, dict(data.chosen))
                plan_training(plain, found, size, "features", 0, 0, {})
                stages = {"features": self.features_stage("features", plain), **stages}
                like["features"] = self.features_upstream(stages["features"])
        return stages, plans, like

    def encoder(self, data: Plan) -> Upstream | None:
        """The encoder that is given; None without one."""
        if self.cfg.init is not None:
            return open_upstream("checkpoint", self.cfg.init, self.cfg.trusted)
        if not self.has_upstream:
            return None
        composed = self.composed("finetune", data).upstream
        found: Upstream = instantiate(composed, _recursive_=False, _convert_="all")
        return found

    def choose_rate(self, data: Plan, encoder: Upstream | None) -> None:
        """Prepare the audio at the sample rate of an encoder that is given."""
        if encoder is None or encoder.features.sample_rate == self.cfg.features.sample_rate:
            return
        rate = int(encoder.features.sample_rate)
        data.choose("data.prepare.sample_rate", rate, "Hz, the sample rate of the encoder")
        if "features.sample_rate" not in self.names:
            data.chosen["features.sample_rate"] = rate  # of the features to compare with

    def untrained(self, data: Plan) -> Upstream:
        """An encoder of the shape that one would have that is pre-trained here."""
        own = self.overrides("finetune", data, ("upstream",))
        composed = compose_command("finetune", [*own, "upstream=random", override("run_dir", self.run)]).upstream
        found: Upstream = instantiate(composed, _recursive_=False, _convert_="all")
        return found

    def features_stage(self, name: str, plan: Plan) -> Stage:
        """A head on features, with the settings that its task has for them."""
        overrides = self.overrides(
            "finetune", plan, ("upstream", "downstream.train_encoder", "downstream.layers", "downstream.top")
        )
        control = compose_command("finetune", [*overrides, override("run_dir", self.run)]).downstream.features_control
        given = {each.lstrip("+~").split("=")[0] for each in overrides}
        own = [
            "upstream=features",
            override("upstream.context", control.context),
            override("upstream.cmvn", control.cmvn),
            "downstream.cache=false",
            *(override(f"downstream.head.{part}", value) for part, value in control.head.items()),
        ]
        return Stage(name, "finetune", [*overrides, *(each for each in own if each.split("=")[0] not in given)])

    def features_upstream(self, stage: Stage) -> Upstream:
        """The features of a stage."""
        return instantiate(stage.config(self.run).upstream, _recursive_=False, _convert_="all")

    def estimated(self, stages: dict[str, Stage], corpus: PreparedCorpus, like: dict[str, Upstream]) -> dict[str, float]:
        """Say how long each stage will take, from real steps; seconds by stage."""
        steps = self.cfg.adapt.timed_steps
        if steps == 0:
            return {}
        found = {}
        for name, stage in stages.items():
            if (name != "model" or "pretrain" not in stages) and stage.is_finished(self.run, corpus):
                continue
            cfg = stage.config(self.run)
            if stage.command == "pretrain":
                found[name] = pretraining_s(cfg, corpus, steps)
            else:
                found[name] = finetuning_s(cfg, like[name], corpus, steps)
        parts = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in found.items())
        if found:
            say(f"time    about {in_words(sum(found.values()))} by {steps} steps of each: {parts}")
        return found

    def outcome(
        self, seen: Survey, folders: dict[str, Path], stage: Stage, lines: list[str], took: Mapping[str, float]
    ) -> Outcome:
        """What came of it, for the report."""
        found, model = seen.found, folders["model"]
        metrics = read_results(model / "metrics.json", ["monitor"])
        monitor = str(metrics["monitor"])
        rows = read_rows(model, found.task)
        what = FEATURES if metrics["upstream"] == "FeaturesUpstream" else _described(metrics, "pretrain" in folders)
        tested = [of_run(what, model)]
        if "features" in folders:
            tested.append(of_run(FEATURES, folders["features"]))
        if (most := majority(seen, rows, metrics)) is not None:
            tested.append(most)
        curves = []
        for name, title in {"pretrain": "Pre-training", "model": "Training on the labels", "features": "Features alone"}.items():
            if name in folders:
                curves.append(read_curves(title, folders[name], None if name == "pretrain" else monitor, monitor in ERRORS))
        apart = difference(model, folders["features"], monitor) if "features" in folders else None
        kind = {TRANSCRIPTION: "Transcripts", SPEAKERS: "Speakers"}.get(found.task, f"The label {found.label}")
        title = f"{kind} of {folder_name(self.cfg.data.root)}"
        cfg = stage.config(model)
        facts = {
            "Command": self.command,
            "Time": in_words(took["all"]) + (f", training estimated at {in_words(took['estimate'])}" if took["estimate"] else ""),
            "Folder": str(self.run),
            "Task": f"{found.task} ({found.why})",
            "Seed": str(cfg.seed),
            **_versions(model),
        }
        return Outcome(title, seen, tested, monitor, apart, curves, rows, lines, self.commands(folders, cfg), facts)

    def commands(self, folders: dict[str, Path], cfg: DictConfig) -> dict[str, list[str]]:
        """What to do with the model, each to be pasted."""
        model, flags = folders["model"], trust_flags(cfg)
        further = [argument("resume", model), argument("trainer.max_steps", 2 * int(cfg.trainer.max_steps))]
        found = {
            "Predict": [
                predict_command(cfg),
                " ".join(["audiot predict", path(model), path(self.cfg.data.root), "--json", *flags]),
            ],
            "Serve a web page": [" ".join(["audiot serve", path(model), *flags])],
            "Measure it again": [f"audiot evaluate {argument('run', model)}"],
            "Train it further": [" ".join(["audiot finetune", *further])],
        }
        if "features" in folders:
            alone = " ".join(["audiot predict", path(folders["features"]), path(self.cfg.data.root)])
            found["Predict with features alone"] = [alone]
        if "pretrain" in folders:
            encoder = argument("upstream.path", folders["pretrain"] / "encoder")
            found["Use the encoder for other labels"] = [f"audiot adapt data.root=FOLDER labels=TABLE {encoder}"]
        return found

    def note(
        self,
        outcome: Outcome,
        found: Labelled,
        folders: dict[str, Path],
        estimates: dict[str, float],
        took: Mapping[str, float],
    ) -> None:
        """Write what was done to the run's folder."""
        seen = outcome.survey
        tested = {each.title: {name: value._asdict() for name, value in each.figures.items()} for each in outcome.tested}
        content = read_json(self.run / NOTE, "note of an adaptation") | {
            "why": found.why,
            "command": self.command,
            "labels": dict(found.counts),
            "files": dict(seen.counts),
            "hours": {name: round(value, 5) for name, value in seen.hours.items()},
            "rejected": dict(seen.rejected),
            "chosen": list(outcome.chosen),
            "stages": {name: folder.name for name, folder in folders.items()},
            "test": tested,
            "estimated_s": {name: round(value, 1) for name, value in estimates.items()},
            "seconds": {name: round(value, 1) for name, value in took.items()},
        }
        write_json(self.run / NOTE, content)

    def close(self, outcome: Outcome, files: list[Path], took: Mapping[str, float]) -> None:
        """The closing lines."""
        width = max(len(each.title) for each in outcome.tested)
        rows = []
        for each in outcome.tested:
            told = (f"{title_of(name).lower()} {percent(value.value)}% {bracket(value)}" for name, value in each.figures.items())
            rows.append(f"test    {each.title:<{width}}  {', '.join(map(str.rstrip, told))}")
        say("\n" + "\n".join(rows))
        for sentence in sentences(outcome)[1:]:
            if not sentence.startswith("To compare"):
                say(f"        {sentence}")
        guess = f", training {in_words(took['training'])} (estimated {in_words(took['estimate'])})" if took["estimate"] else ""
        say(f"took    {in_words(took['all'])}{guess}")
        say(f"report  {path(files[0])}: {', '.join(file.name for file in files[1:])} beside it")
        say(f"next:   {outcome.commands['Predict'][0]}")


def _described(metrics: Mapping[str, Any], pretrained: bool) -> str:
    """What a model is, in words."""
    made = "an encoder pre-trained here" if pretrained else "an encoder"
    return f"{made}, fine-tuned" if metrics.get("fine_tuned") else f"{made}, frozen"


def _versions(run: Path) -> dict[str, str]:
    """Versions and the machine that a run has noted."""
    noted = read_environment(run)
    packages = noted.get("packages") or {}
    kept = [f"{name} {packages[name]}" for name in ("torch", "pytorch-lightning", "lhotse") if name in packages]
    machine = noted.get("machine") or {}
    found = {"Versions": ", ".join([f"audiot {version('audiot')}", *kept])}
    if machine:
        found["Machine"] = ", ".join(f"{name} {value}" for name, value in machine.items())
    return found


def _as_seen(folder: Path) -> Path:
    """A folder as it is seen from the current one, if it lies below that."""
    here = Path(os.getcwd())
    return folder.relative_to(here) if folder.is_absolute() and folder.is_relative_to(here) else folder


def _is_auto(given: str) -> bool:
    return given.endswith("=auto") and not given.startswith(("trainer.accelerator", "trainer.devices", "trainer.precision"))


@contextmanager
def going_on(command: str) -> Iterator[None]:
    """Say that the same command goes on, where it is stopped."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"\nresume:  {command}")
        raise
    except Interrupted as stop:
        stop.command = command
        raise


def main(cfg: DictConfig) -> None:
    """Do what is left of it, and write the report.

    Raises:
        ValueError: labels, audio or settings can't be used.
    """
    settings = HydraConfig.get()
    work = Adaptation(cfg, list(settings.overrides.task), dict(settings.runtime.choices))
    with owned(work.run), going_on(work.command):
        work.whole()


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("adapt", sys.argv[1:])
