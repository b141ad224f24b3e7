"""What the commands share: the corpus, the trainer, plain configs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from audiot.data.prepare import PreparedCorpus, prepare

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
    corpus = prepare(
        lambda: instantiate(cfg.data.corpus).manifests(), folder, settings=settings, num_jobs=num_jobs, **options
    )
    say(f"corpus  {folder}: {sum(corpus.counts.values())} utterances, {sum(corpus.hours.values()):.2f} h")
    return corpus


def make_trainer(cfg: DictConfig, **options: Any) -> pl.Trainer:
    """Lightning's Trainer with the callbacks and loggers of the config."""
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False, **options)


def data_options(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of a data module that stand in ``cfg.data``."""
    return {name: cfg.data[name] for name in ("batch_s", "num_buckets", "num_workers")} | {"seed": cfg.seed}


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run's latest step, or None."""
    found = list((run / "checkpoints").glob("step=*.ckpt"))
    return max(found, key=lambda path: int(path.stem.split("=")[1]), default=None)


def table(rows: Mapping[str, str]) -> str:
    """Lines of names and values, aligned."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
