"""Opening the corpus of a config, and checking that it is still the one a run was trained on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from audiot.base.config import plain
from audiot.base.console import say
from audiot.base.files import read_json, write_json
from audiot.data.prepare import PreparedCorpus, prepare
from audiot.data.sources import Sources, file_digest, places

NO_RESULT = ("num_jobs", "when", "format", "shard_hours")  # settings of a preparation that do not change the prepared folder


def open_corpus(cfg: DictConfig, run: Path | None = None) -> PreparedCorpus:
    """The corpus of ``cfg.data``, prepared on first use. Its folder is named after a digest of its settings and places.

    Args:
        cfg: Command config, of which ``data`` and ``data_dir`` are used.
        run: Folder of an earlier run with the same config. The corpus must still be the run's and is not updated.

    Raises:
        FileNotFoundError: the corpus, or the sources of a prepared one, are missing.
        ValueError: sources have changed although they must not, or the corpus is not the run's.
    """
    folder, settings, options = corpus_folder(cfg)
    when = cfg.data.prepare.get("when", "update")  # runs of earlier versions lack the key
    former = _prepared_folder(cfg, plain(cfg.data.corpus), options)
    if _is_left_over(former, folder):
        say(
            f"corpus  {former} was prepared by an earlier audiot, which recorded no sources: preparing it again in "
            f"{folder.name}; delete the old folder when no run needs it"
        )
    careful = "check" if run is not None and when == "update" else when
    if hasattr(get_object(cfg.data.corpus._target_), "open"):  # it is streamed, and needs no preparation
        corpus = instantiate(cfg.data.corpus).open(folder, settings, careful)
    else:
        if not (folder / "corpus.json").is_file():
            instantiate(cfg.data.corpus)  # raises errors of the settings before a folder is made
        corpus = prepare(
            lambda: instantiate(cfg.data.corpus).manifests(),
            folder,
            sources=lambda: _sources(cfg),
            settings=settings,
            num_jobs=cfg.data.prepare.num_jobs,
            when=careful,
            **options,
        )
    kept = ", kept as it was" if when == "keep" else ""
    count, hours = corpus.utterances, corpus.total_hours
    if count is None or hours is None:
        count, hours = sum(corpus.counts.values()), sum(corpus.hours.values())
    say(f"corpus  {folder}: {count} utterances, {hours:.2f} h{kept}")
    if run is not None:
        _check_data(run, cfg, corpus)
    return corpus


def corpus_folder(cfg: DictConfig) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Folder of the prepared ``cfg.data``, with the settings of the corpus and of its preparation."""
    written, options = plain(cfg.data.corpus), plain(cfg.data.prepare)
    for name in NO_RESULT:
        options.pop(name, None)
    here = places(get_object(written["_target_"]), written)
    folder, former = (_prepared_folder(cfg, settings, options) for settings in (written | here, written))
    absolute = all(_is_absolute(written[name]) for name in here.keys() & written.keys())  # else it may belong to another project
    if absolute and cfg.data.prepare.get("when") == "keep" and _is_left_over(former, folder):
        return former, written, options
    return folder, written | here, options


def _is_absolute(place: Any) -> bool:
    """Whether a place (or each of several) is an absolute path. Null, which stands for the current folder, is not."""
    return all(map(_is_absolute, place)) if isinstance(place, list) else isinstance(place, str) and os.path.isabs(place)


def _is_left_over(former: Path, folder: Path) -> bool:
    """Whether the only prepared corpus is one of an earlier version, whose folder had another name."""
    return former != folder and (former / "corpus.json").is_file() and not (folder / "corpus.json").is_file()


def _sources(cfg: DictConfig) -> Sources:
    corpus = instantiate(cfg.data.corpus)
    if not hasattr(corpus, "sources"):
        raise ValueError(f"{type(corpus).__name__} has no method sources: add it as in audiot.data.sources.Corpus")
    return corpus.sources()


def _prepared_folder(cfg: DictConfig, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps([settings, options], sort_keys=True).encode()).hexdigest()[:8]
    return Path(cfg.data_dir) / "prepared" / f"{cfg.data.name}-{digest}"


@rank_zero_only
def note_data(cfg: DictConfig, corpus: PreparedCorpus) -> None:
    """Record in a new run's folder, ``cfg.run_dir``, its data: the corpus, and files of its task such as a lexicon."""
    noted = {"prepared": str(corpus.directory.absolute()), "content": corpus.content, "files": _task_files(cfg)}
    write_json(Path(cfg.run_dir) / "data.json", noted)


def _task_files(cfg: DictConfig) -> dict[str, str]:
    """Digest of each file that the labels and the objective of a task use, by config key."""
    found = {}
    for part in ("labels", "objective") if "downstream" in cfg else ():
        arguments = plain(cfg.downstream[part])
        for name, path in places(get_object(arguments["_target_"]), arguments).items():
            if os.path.isfile(path):
                found[f"downstream.{part}.{name}"] = file_digest(path)
    return found


def _check_data(run: Path, cfg: DictConfig, corpus: PreparedCorpus) -> None:
    if not (run / "data.json").is_file():  # a run of an earlier version
        return
    noted = read_json(run / "data.json", "note of a run's data")
    files = _task_files(cfg)
    kinds: dict[str, type | tuple[type, ...]] = {"prepared": str, "content": (str, NoneType), "files": dict}
    for name, kind in kinds.items():
        if not isinstance(noted.get(name), kind):
            found = str(noted.get(name))[:80]
            raise ValueError(f"{run / 'data.json'}: {name} is {found!r}, which no run notes of its data: the file was changed")
    for name, digest in noted["files"].items():
        if files.get(name) != digest:
            raise ValueError(
                f"run={run}: {OmegaConf.select(cfg, name)} ({name}) is not what the run was trained with, so results would not "
                "compare; restore the file, or train again"
            )
    if noted["content"] != corpus.content:
        what = f"is the corpus in {noted['prepared']}"
        if noted["prepared"] == str(corpus.directory.absolute()):
            what = "was updated since"
        raise ValueError(
            f"run={run}: {corpus.directory} has other utterances, labels or audio than the run was trained on, which {what}: "
            "results would not compare; restore its sources and run audiot prepare, or train again"
        )


def data_options(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of a data module from ``cfg.data``."""
    settings = {name: cfg.data[name] for name in ("batch_s", "max_utterances", "num_buckets", "num_workers")}
    return settings | {"seed": cfg.seed, "global_batch_s": cfg.data.get("global_batch_s")}  # earlier runs have none
