"""Suggestions for the next command. They run as printed, on the run's corpus and for labels that it has."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from audiot.base.config import compose_command, flat
from audiot.base.groups import read_option
from audiot.base.parts import foreign, is_plain
from audiot.base.quoting import Value, argument, path, quoted
from audiot.data.labels import survey
from audiot.data.opening import corpus_folder
from audiot.data.prepare import ROLES, PreparedCorpus
from audiot.data.shards import manifest_of
from audiot.runs import choices, has_config, run_config, run_overrides, written_config

CARRIED = re.compile(r"[+~]*(data[=.]|data_dir=|hydra\.searchpath=)")
RATE = 16000  # Hz, the default sample rate of a prepared corpus
SLOTS = ("action", "object", "location")  # of downstream=intent
Task = list[tuple[str, Value]]
MOST_LOOKED_AT = 100_000  # utterances in shards whose labels are read to suggest a task
DEMO_TASK: Task = [("downstream", "phone_linear")]


def finetune_command(run: Path, encoder: Path | None = None, upstream: str = "checkpoint") -> str:
    """The next command after pre-training: a task whose labels the corpus has, else the extraction of hidden states.

    Args:
        run: Folder of the run.
        encoder: Current path of the encoder, if it is not in the run.
        upstream: Option of the ``upstream`` group for this kind of encoder.
    """
    encoder = encoder or run / "encoder"
    settings = _settings(run)
    trust = trusting(settings) if upstream == "checkpoint" else []
    if OmegaConf.select(settings, "data.name") in (None, "demo"):  # the demo corpus is made when it is needed
        return _finetune(DEMO_TASK, encoder, upstream, [*trust, *same_data(run)])
    known = "_target_" in settings.data.corpus  # else it is of a package from outside audiot
    folder = corpus_folder(settings)[0] if known else None
    if folder is None or not (folder / "corpus.json").is_file():  # its labels are not known
        return " ".join(["audiot prepare", *same_data(run)])
    task = fitting_task(PreparedCorpus.load(folder), settings)
    if task is None:
        kind = [] if upstream == "checkpoint" else [f"--upstream {upstream}"]
        flags = [*kind, *(f"--trust {name}" for name in foreign_packages(settings) if trust)]
        return " ".join([f"audiot extract {path(folder)} {path(run / 'states')} --encoder {path(encoder)}", *flags])
    return _finetune(task, encoder, upstream, [*trust, *same_data(run)])


def foreign_packages(settings: DictConfig) -> list[str]:
    """Packages from outside audiot whose classes are in a run's encoder: those who load it have to trust them."""
    parts = OmegaConf.to_container(settings)
    assert isinstance(parts, dict)
    return foreign([parts.get(name) for name in ("features", "model", "attention", "positions")])


def trusting(settings: DictConfig) -> list[str]:
    """The argument of ``audiot finetune`` with which a run's encoder can be loaded; none if all in it is audiot's."""
    trusted = foreign_packages(settings)
    return [argument("upstream.trusted", trusted)] if trusted else []


def demo_command(encoder: Path, sample_rate: int, upstream: str = "checkpoint") -> str:
    """A command for an encoder whose corpus is unknown: a task of the demo corpus."""
    rate = [] if sample_rate == RATE else [argument("data.prepare.sample_rate", sample_rate)]
    return _finetune(DEMO_TASK, encoder, upstream, rate)


def _finetune(task: Task, encoder: Path, upstream: str, data: Sequence[str]) -> str:
    kind: Task = [] if upstream == "checkpoint" else [("upstream", upstream)]
    arguments = [argument(name, value) for name, value in [*task, *kind, ("upstream.path", encoder)]]
    return " ".join(["audiot finetune", *arguments, *data])


def same_data(run: Path) -> list[str]:
    """The data settings of a run, as arguments with which another command opens the same corpus.

    They are the overrides of the command line, then the changes of an experiment, and a sample rate other than the default.
    Relative paths start at the folder where the run was started.
    """
    given = [override for override in run_overrides(run) if CARRIED.match(override)]
    settings, chosen = _settings(run), choices(run).get("data")
    if chosen not in (None, "demo") and not any(override.startswith("data=") for override in given):
        given.insert(0, f"data={chosen}")
    arguments = [quoted(override) for override in given]
    try:
        composed = compose_command("finetune", [override for override in given if is_plain(override)])
    except (HydraException, OmegaConfBaseException):  # a run of another version, whose keys are not today's
        return arguments
    written = flat(written_config(run, trusted=None)) if has_config(run) else {}
    for name, raw in flat(composed).items():
        follows = str(raw).startswith("${data") and written.get(name) == raw  # interpolates another data key
        if not name.startswith("data.") or isinstance(raw, dict) or isinstance(written.get(name, {}), dict):
            continue
        if name.split(".")[1] not in _loading() and not follows:
            before, after = _plain(composed, name), _plain(settings, name)
            if before != after:
                arguments.append(argument(name, after))
    return arguments


def fitting_task(corpus: PreparedCorpus, settings: DictConfig) -> Task | None:
    """A task whose labels every utterance of its splits has; None if there is no such task.

    Args:
        corpus: Prepared corpus.
        settings: Config of a run. Its front end tells how many frames a transcript may use.
    """
    if corpus.is_sharded and sum(corpus.counts.values()) > MOST_LOOKED_AT:  # their labels would be fetched for a suggestion
        return None
    if _has_phones(corpus):
        return [("downstream", "phone_linear")]
    fields = list(_fields(corpus.directory, corpus.split_for("pretrain", "train")))
    for field in sorted(fields, key=lambda name: name != "keyword"):  # keyword first, the rest in order
        if field == "speaker" and _fits(corpus, "speaker", field):
            return [("downstream", "speaker_utterance")]
        if field == SLOTS[0] and all(_fits(corpus, "intent", slot) for slot in SLOTS):
            return [("downstream", "intent")]
        own: Task = [] if field == "keyword" else [("downstream.labels.field", field)]
        if field != "speaker" and _fits(corpus, "keyword", field):
            return [("downstream", "keyword"), *own]
        if field != "speaker" and _fits(corpus, "speaker", field):  # a label of speakers, tested on speakers seen in training
            return [("downstream", "keyword"), *own, ("downstream.task", "speaker")]
    characters: list[Task] = [[("downstream", "asr")], [("downstream", "asr"), ("downstream.labels.alphabet", None)]]
    return next((task for task in characters if _is_transcribed(corpus, settings, task)), None)


def example_files(corpus: PreparedCorpus, task: str, count: int) -> list[Path]:
    """Audio files of the first test utterances."""
    lines = _lines(corpus.directory, corpus.split_for(task, "test"))
    return [corpus.directory / next(lines)["recording"]["sources"][0]["source"] for _ in range(count)]


def _settings(run: Path) -> DictConfig:
    return run_config(run, trusted=None) if has_config(run) else OmegaConf.create({})


@cache
def _loading() -> frozenset[str]:
    """Keys of a corpus's config that say how batches are made of it, and not what it holds."""
    return frozenset(read_option("data", "_loading")) - {"prepare"}


def _plain(cfg: DictConfig, name: str) -> Any:
    value = OmegaConf.select(cfg, name)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _lines(directory: Path, split: str) -> Iterator[dict[str, Any]]:
    """The cuts of a prepared split as plain dicts. Making Lhotse objects of them would take ten times as long."""
    with gzip.open(manifest_of(directory, split), "rb") as stream:
        yield from map(json.loads, stream)


@cache
def _fields(directory: Path, split: str) -> Mapping[str, Counter[str]]:
    """Label fields that every utterance of a split has, each with the counts of its values."""
    found: dict[str, Counter[str]] = {}
    count = 0
    for line in _lines(directory, split):
        count += 1
        supervision = (line.get("supervisions") or [{}])[0]
        labels = {**(supervision.get("custom") or {})}
        if supervision.get("speaker") is not None:
            labels["speaker"] = supervision["speaker"]
        for name, value in labels.items():
            if isinstance(value, (str, int, float)) and name != "text":  # a transcript is not a class
                found.setdefault(name, Counter())[str(value)] += 1
    return {name: values for name, values in found.items() if values.total() == count}


def _fits(corpus: PreparedCorpus, task: str, field: str) -> bool:
    """Whether a field has at least two classes, and training has all of them."""
    try:
        values = [_fields(corpus.directory, corpus.split_for(task, role)).get(field, Counter()) for role in ROLES]
    except ValueError:  # no such split
        return False
    train, *others = values
    return len(train) > 1 and all(other and other.keys() <= train.keys() for other in others)


def _has_phones(corpus: PreparedCorpus) -> bool:
    """Whether the first utterance of each split has phones. Pre-training checks its probes in the same way."""
    try:
        first = [next(_lines(corpus.directory, corpus.split_for("phone", role))) for role in ROLES]
    except ValueError:
        return False
    tiers = [(line.get("supervisions") or [{}])[0].get("alignment") or {} for line in first]
    return all("phone" in found for found in tiers)


def _is_transcribed(corpus: PreparedCorpus, settings: DictConfig, task: Sequence[tuple[str, Value]]) -> bool:
    """Whether every utterance has a transcript that fits into its frames."""
    labels = compose_command("finetune", [f"{name}={'null' if value is None else value}" for name, value in task])
    try:
        read = instantiate(labels.downstream.labels, features=instantiate(settings.features))
        survey({role: corpus.cuts(corpus.split_for("asr", role)) for role in ROLES}, read)
    except ValueError:
        return False
    return True
