"""The corpus of a config: where it is prepared, and whether it is still what a run was trained on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from audiot.base.config import plain
from audiot.base.console import say
from audiot.base.files import read_json, write_json
from audiot.data.prepare import PreparedCorpus, prepare
from audiot.data.sources import Sources, file_digest, places


def open_corpus(cfg: DictConfig, run: Path | None = None) -> PreparedCorpus:
    """The corpus of ``cfg.data``, prepared on first use; its folder is named after a digest of its settings and places.

    Args:
        cfg: ``data`` and ``data_dir`` of a command's config.
        run: Folder of a run that was started before, on the same config: the corpus must still be the one that it had, and
            is not updated.

    Raises:
        FileNotFoundError: the corpus, or the sources of a prepared one, are missing.
        ValueError: sources have changed where they must not, or the corpus is not the run's.
    """
    folder, settings, options = corpus_folder(cfg)
    when = cfg.data.prepare.get("when", "update")  # runs of earlier versions have none
    former = _prepared_folder(cfg, plain(cfg.data.corpus), options)
    if _is_left_over(former, folder):
        say(
            f"corpus  {former} is of an earlier audiot, which noted neither place nor state of its sources: prepared anew in "
            f"{folder.name}; delete the former when no run needs it"
        )
    if not (folder / "corpus.json").is_file():
        instantiate(cfg.data.corpus)  # what is wrong with it is told before there is a folder
    corpus = prepare(
        lambda: instantiate(cfg.data.corpus).manifests(),
        folder,
        sources=lambda: _sources(cfg),
        settings=settings,
        num_jobs=cfg.data.prepare.num_jobs,
        when="check" if run is not None and when == "update" else when,
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
    """Where the corpus of ``cfg.data`` is prepared, with the settings of the corpus and of its preparation."""
    written, options = plain(cfg.data.corpus), plain(cfg.data.prepare)
    for name in ("num_jobs", "when"):  # how many workers prepare it, and when, changes nothing
        options.pop(name, None)
    here = places(get_object(written["_target_"]), written)
    folder, former = (_prepared_folder(cfg, settings, options) for settings in (written | here, written))
    absolute = all(_is_absolute(written[name]) for name in here.keys() & written.keys())  # else it may be of another project
    if absolute and cfg.data.prepare.get("when") == "keep" and _is_left_over(former, folder):
        return former, written, options
    return folder, written | here, options


def _is_absolute(place: Any) -> bool:
    """Whether a place, or each of several, is the same from any folder; null, which stands for the current one, is not."""
    return all(map(_is_absolute, place)) if isinstance(place, list) else isinstance(place, str) and os.path.isabs(place)


def _is_left_over(former: Path, folder: Path) -> bool:
    """Whether a corpus was prepared by an earlier version alone, which named its folder otherwise."""
    return former != folder and (former / "corpus.json").is_file() and not (folder / "corpus.json").is_file()


def _sources(cfg: DictConfig) -> Sources:
    corpus = instantiate(cfg.data.corpus)
    if not hasattr(corpus, "sources"):
        raise ValueError(f"{type(corpus).__name__} has no method sources: see audiot.data.sources.Corpus for what a corpus has")
    return corpus.sources()


def _prepared_folder(cfg: DictConfig, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps([settings, options], sort_keys=True).encode()).hexdigest()[:8]
    return Path(cfg.data_dir) / "prepared" / f"{cfg.data.name}-{digest}"


@rank_zero_only
def note_data(cfg: DictConfig, corpus: PreparedCorpus) -> None:
    """Note in a new run's folder, ``cfg.run_dir``, what it is trained on: the corpus, and files of its task such as a lexicon."""
    noted = {"prepared": str(corpus.directory.absolute()), "content": corpus.content, "files": _task_files(cfg)}
    write_json(Path(cfg.run_dir) / "data.json", noted)


def _task_files(cfg: DictConfig) -> dict[str, str]:
    """Config key of each file that labels and objective of a task are given → the digest of its content."""
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
    for name, digest in noted["files"].items():
        if files.get(name) != digest:
            raise ValueError(
                f"run={run}: {OmegaConf.select(cfg, name)} ({name}) is not what the run was trained with: figures would not "
                "compare; bring it back as it was, or train anew"
            )
    if noted["content"] != corpus.content:
        what = f"is the corpus in {noted['prepared']}"
        if noted["prepared"] == str(corpus.directory.absolute()):
            what = "was updated since"
        raise ValueError(
            f"run={run}: {corpus.directory} has other utterances, labels or audio than the run was trained on, which {what}: "
            "figures would not compare; bring its sources back as they were and run audiot prepare, or train anew"
        )


def data_options(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of a data module that stand in ``cfg.data``."""
    return {name: cfg.data[name] for name in ("batch_s", "max_utterances", "num_buckets", "num_workers")} | {"seed": cfg.seed}
