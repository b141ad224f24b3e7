"""What to run next: commands that run as they are printed, on the corpus of a run and for labels that it has."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from audiot.base.config import compose_command, flat
from audiot.base.quoting import Value, argument, path, quoted
from audiot.data.labels import survey
from audiot.data.opening import corpus_folder
from audiot.data.prepare import ROLES, PreparedCorpus
from audiot.runs import CONFIG, run_config, run_overrides

CARRIED = re.compile(r"[+~]*(data[=.]|data_dir=|hydra\.searchpath=)")
RATE = 16000  # Hz, what a corpus is prepared for unless it is told another rate
SLOTS = ("action", "object", "location")  # of downstream=intent
Task = list[tuple[str, Value]]
DEMO_TASK: Task = [("downstream", "phone_linear")]


def finetune_command(run: Path, encoder: Path | None = None, upstream: str = "checkpoint") -> str:
    """What to run on the encoder of a pre-training run: the task that fits its corpus, or without labels the extraction.

    Args:
        run: Folder of the run.
        encoder: Where the encoder lies now, unless in the run.
        upstream: Its kind, the option of ``upstream``.
    """
    encoder = encoder or run / "encoder"
    settings = _settings(run)
    trust = trusting(settings) if upstream == "checkpoint" else []
    if OmegaConf.select(settings, "data.name") in (None, "demo"):  # which is made when it is needed
        return _finetune(DEMO_TASK, encoder, upstream, [*trust, *same_data(run)])
    folder, _, _ = corpus_folder(settings)
    if not (folder / "corpus.json").is_file():  # its labels are not known
        return " ".join(["audiot prepare", *same_data(run)])
    task = fitting_task(PreparedCorpus.load(folder), settings)
    if task is None:
        kind = [] if upstream == "checkpoint" else [f"--upstream {upstream}"]
        flags = [*kind, *(f"--trust {name}" for name in packages(settings)[1:] if trust)]
        return " ".join([f"audiot extract {path(folder)} {path(run / 'states')} --encoder {path(encoder)}", *flags])
    return _finetune(task, encoder, upstream, [*trust, *same_data(run)])


def packages(settings: DictConfig) -> list[str]:
    """The packages whose classes are in a run's encoder, audiot first: what those who load it have to trust."""
    parts = ("model.", "features.", "attention.", "positions.")
    targets = {str(value) for key, value in flat(settings).items() if key.startswith(parts) and key.endswith("._target_")}
    return ["audiot", *sorted({target.split(".")[0] for target in targets} - {"audiot"})]


def trusting(settings: DictConfig) -> list[str]:
    """The argument of ``audiot finetune`` with which a run's encoder can be loaded; none where all in it is audiot's."""
    trusted = packages(settings)
    return [argument("upstream.trusted", trusted)] if len(trusted) > 1 else []


def demo_command(encoder: Path, sample_rate: int, upstream: str = "checkpoint") -> str:
    """What to run on an encoder of whose corpus nothing is known: a task of the demo corpus."""
    rate = [] if sample_rate == RATE else [argument("data.prepare.sample_rate", sample_rate)]
    return _finetune(DEMO_TASK, encoder, upstream, rate)


def _finetune(task: Task, encoder: Path, upstream: str, data: Sequence[str]) -> str:
    kind: Task = [] if upstream == "checkpoint" else [("upstream", upstream)]
    arguments = [argument(name, value) for name, value in [*task, *kind, ("upstream.path", encoder)]]
    return " ".join(["audiot finetune", *arguments, *data])


def same_data(run: Path) -> list[str]:
    """The data settings that a run was started with, as arguments for another command to open the same corpus.

    They are what was given on the command line, then what an experiment changed, and the sampling rate where it is not the usual
    one. Relative paths count from the folder where the run was started.
    """
    given = [override for override in run_overrides(run) if CARRIED.match(override)]
    settings, chosen = _settings(run), _choice(run, "data")
    if chosen not in (None, "demo") and not any(override.startswith("data=") for override in given):
        given.insert(0, f"data={chosen}")
    arguments = [quoted(override) for override in given]
    try:
        composed = compose_command("finetune", given)
    except (HydraException, OmegaConfBaseException):  # a run of another version, whose keys are not today's
        return arguments
    written = flat(settings)
    for name, raw in flat(composed).items():
        follows = str(raw).startswith("${data") and written.get(name) == raw  # another key of the data
        if not name.startswith("data.") or isinstance(raw, dict) or isinstance(written.get(name, {}), dict):
            continue
        if name.split(".")[1] not in _loading() and not follows:
            before, after = _plain(composed, name), _plain(settings, name)
            if before != after:
                arguments.append(argument(name, after))
    return arguments


def fitting_task(corpus: PreparedCorpus, settings: DictConfig) -> Task | None:
    """A task whose labels all utterances of its splits have; None: there is no such task.

    Args:
        corpus: The corpus, prepared.
        settings: A run's config, whose front end says how many frames a transcript may fill.
    """
    if _has_phones(corpus):
        return [("downstream", "phone_linear")]
    fields = list(_fields(corpus.directory, corpus.split_for("pretrain", "train")))
    for field in sorted(fields, key=lambda name: name != "keyword"):  # the rest in their order
        if field == "speaker" and _fits(corpus, "speaker", field):
            return [("downstream", "speaker_utterance")]
        if field == SLOTS[0] and all(_fits(corpus, "intent", slot) for slot in SLOTS):
            return [("downstream", "intent")]
        own: Task = [] if field == "keyword" else [("downstream.labels.field", field)]
        if field != "speaker" and _fits(corpus, "keyword", field):
            return [("downstream", "keyword"), *own]
        if field != "speaker" and _fits(corpus, "speaker", field):  # a label of speakers: on those that training has heard
            return [("downstream", "keyword"), *own, ("downstream.task", "speaker")]
    characters: list[Task] = [[("downstream", "asr")], [("downstream", "asr"), ("downstream.labels.alphabet", None)]]
    return next((task for task in characters if _is_transcribed(corpus, settings, task)), None)


def example_files(corpus: PreparedCorpus, task: str, count: int) -> list[Path]:
    """Audio files of the first test utterances."""
    lines = _lines(corpus.directory, corpus.split_for(task, "test"))
    return [corpus.directory / next(lines)["recording"]["sources"][0]["source"] for _ in range(count)]


def _settings(run: Path) -> DictConfig:
    return run_config(run) if (run / CONFIG).is_file() else OmegaConf.create({})


def _choice(run: Path, group: str) -> str | None:
    """The option of a config group that a run was composed of; None where that is not known."""
    record = run / ".hydra" / "hydra.yaml"
    return OmegaConf.select(OmegaConf.load(record), f"hydra.runtime.choices.{group}") if record.is_file() else None


@cache
def _loading() -> frozenset[str]:
    """Keys of a corpus's config that say how batches are made of it, and not what it holds."""
    with (files("audiot.conf") / "data" / "_loading.yaml").open(encoding="utf-8") as stream:
        return frozenset(map(str, OmegaConf.load(stream))) - {"prepare"}


def _plain(cfg: DictConfig, name: str) -> Any:
    value = OmegaConf.select(cfg, name)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _lines(directory: Path, split: str) -> Iterator[dict[str, Any]]:
    """The cuts of a prepared split as they are written: to make Lhotse's objects of them takes ten times longer."""
    with gzip.open(directory / f"{split}.jsonl.gz", "rb") as stream:
        yield from map(json.loads, stream)


@cache
def _fields(directory: Path, split: str) -> Mapping[str, Counter[str]]:
    """Label fields that every utterance of a split has, with what they hold how often."""
    found: dict[str, Counter[str]] = {}
    count = 0
    for line in _lines(directory, split):
        count += 1
        supervision = (line.get("supervisions") or [{}])[0]
        labels = {**(supervision.get("custom") or {})}
        if supervision.get("speaker") is not None:
            labels["speaker"] = supervision["speaker"]
        for name, value in labels.items():
            if isinstance(value, (str, int, float)) and name != "text":  # a transcript is no class
                found.setdefault(name, Counter())[str(value)] += 1
    return {name: values for name, values in found.items() if values.total() == count}


def _fits(corpus: PreparedCorpus, task: str, field: str) -> bool:
    """Whether a field has two classes or more, all of which training knows."""
    try:
        values = [_fields(corpus.directory, corpus.split_for(task, role)).get(field, Counter()) for role in ROLES]
    except ValueError:  # no such split
        return False
    train, *others = values
    return len(train) > 1 and all(other and other.keys() <= train.keys() for other in others)


def _has_phones(corpus: PreparedCorpus) -> bool:
    """Whether the first utterance of each split has them, as is looked for before pre-training too."""
    try:
        first = [next(_lines(corpus.directory, corpus.split_for("phone", role))) for role in ROLES]
    except ValueError:
        return False
    tiers = [(line.get("supervisions") or [{}])[0].get("alignment") or {} for line in first]
    return all("phone" in found for found in tiers)


def _is_transcribed(corpus: PreparedCorpus, settings: DictConfig, task: Sequence[tuple[str, Value]]) -> bool:
    """Whether every utterance has a transcript that its frames can spell."""
    labels = compose_command("finetune", [f"{name}={'null' if value is None else value}" for name, value in task])
    try:
        read = instantiate(labels.downstream.labels, features=instantiate(settings.features))
        survey({role: corpus.cuts(corpus.split_for("asr", role)) for role in ROLES}, read)
    except ValueError:
        return False
    return True
