"""What the commands share: the corpus, the trainer, plain configs."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from audiot.data.prepare import PreparedCorpus, prepare
from audiot.devices import fast_precision
from audiot.replication import warn_of_slow_strategy
from audiot.runs import run_overrides

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


def open_corpus(cfg: DictConfig) -> PreparedCorpus:
    """The corpus of ``cfg.data``, prepared on first use; its folder is named after a digest of its settings."""
    settings = plain(cfg.data.corpus)
    options = plain(cfg.data.prepare)
    num_jobs = options.pop("num_jobs")  # how many workers prepare it changes nothing
    digest = hashlib.sha256(json.dumps([settings, options], sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(cfg.data_dir) / "prepared" / f"{cfg.data.name}-{digest}"
    corpus = prepare(lambda: instantiate(cfg.data.corpus).manifests(), folder, settings=settings, num_jobs=num_jobs, **options)
    say(f"corpus  {folder}: {sum(corpus.counts.values())} utterances, {sum(corpus.hours.values()):.2f} h")
    return corpus


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
        if cfg.trainer[name] < 1:
            raise ValueError(f"trainer.{name} must be at least 1, found {cfg.trainer[name]}")
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    if not loggers:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]  # it insists on one
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


def same_data(run: Path) -> str:
    """The data settings of a run, as arguments of a next command."""
    return "".join(
        f" {shlex.quote(override)}" for override in run_overrides(run) if override.startswith(("data=", "data.", "data_dir="))
    )


def finetune_command(run: Path) -> str:
    """What to run after a pre-training run."""
    return f"audiot finetune downstream=phone_linear upstream.path={run / 'encoder'}{same_data(run)}"


def table(rows: Mapping[str, str]) -> str:
    """Lines of names and values, aligned."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
