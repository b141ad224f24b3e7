"""What the commands share: the corpus, the trainer, plain configs."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from audiot.data.prepare import PreparedCorpus, prepare
from audiot.data.sources import Sources, file_digest, places
from audiot.devices import fast_precision
from audiot.files import read_json, write_json
from audiot.replication import warn_of_slow_strategy

log = logging.getLogger("audiot")


@rank_zero_only
def say(message: str = "") -> None:
    """Print a line and keep it in the run's log."""
    log.info(message)


def plain(cfg: Any) -> dict[str, Any]:
    """A config as plain dicts and lists, interpolations resolved."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


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


def compose_command(command: str, overrides: Sequence[str]) -> DictConfig:
    """The config of a command, also inside another one."""
    if GlobalHydra.instance().is_initialized():
        return compose(command, list(overrides))
    with initialize_config_module("audiot.conf", version_base="1.3"):  # a tool, or a resumed run
        return compose(command, list(overrides))


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


def known_precision(precision: Any, accelerator: str) -> Any:
    """What Lightning calls a precision; ``auto``: the one that is fast on this machine."""
    return fast_precision(accelerator) if precision == "auto" else precision


def make_trainer(cfg: DictConfig, **options: Any) -> pl.Trainer:
    """Lightning's Trainer with the callbacks and loggers of the config.

    Raises:
        ValueError: the devices asked for are not there.
    """
    asked = f"trainer.accelerator={cfg.trainer.accelerator} trainer.devices={cfg.trainer.devices}"
    for name in ("val_check_interval", "log_every_n_steps"):
        if not isinstance(cfg.trainer[name], int | float) or cfg.trainer[name] < 1:
            raise ValueError(f"trainer.{name} must be at least 1, found {cfg.trainer[name]}")
    count = cfg.trainer.get("overfit_batches", 0)  # runs of earlier versions have no such key
    if not isinstance(count, int | float) or count != int(count):
        raise ValueError(f"trainer.overfit_batches must be a number of batches, found {count}: training has no end for a share")
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
        if cfg.trainer.get(name) == 0:
            raise ValueError(f"trainer.{name}=0 leaves nothing to measure: set at least 1, or null for all")
    if cfg.trainer.get("barebones"):
        raise ValueError("trainer.barebones=true switches off metrics and checkpoints: audiot benchmark measures instead")
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    if not loggers:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]  # it insists on one
    for name, kind in (("enable_progress_bar", ProgressBar), ("enable_checkpointing", Checkpoint)):
        if cfg.trainer.get(name) is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            start_wandb(logger)
    options = {"precision": known_precision(cfg.trainer.precision, cfg.trainer.accelerator)} | options
    try:
        trainer: pl.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False, **options)
    except InstantiationException as error:
        if isinstance(error.__cause__, MisconfigurationException):
            raise ValueError(f"{asked}: {error.__cause__}") from error
        raise
    if cfg.trainer.accelerator == "auto" and trainer.num_devices > 1 and trainer.strategy.root_device.type == "cpu":
        raise ValueError(f"{asked}, but no GPU is here: trainer.accelerator=cpu runs {trainer.num_devices} processes on the CPU")
    warn_of_slow_strategy(trainer.strategy)
    return trainer


def start_wandb(logger: WandbLogger) -> None:
    """Start a W&B run before anything is computed, and without asking for a key: in a batch job nobody answers.

    Raises:
        ValueError: W&B refuses, most often because nobody has logged in.
    """
    from wandb.errors import Error

    terminal, sys.stdin = sys.stdin, io.StringIO()
    try:
        _ = logger.experiment
    except Error as error:
        raise ValueError(f"logger=wandb: {error} WANDB_MODE=offline keeps the run on this machine.") from error
    finally:
        sys.stdin = terminal


def data_options(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of a data module that stand in ``cfg.data``."""
    return {name: cfg.data[name] for name in ("batch_s", "max_utterances", "num_buckets", "num_workers")} | {"seed": cfg.seed}


def table(rows: Mapping[str, str]) -> str:
    """Lines of names and values, aligned."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
