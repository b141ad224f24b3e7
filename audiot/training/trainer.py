"""Lightning's Trainer for a config, and whether to compile its steps."""

from __future__ import annotations

import io
import sys
from math import ceil
from typing import Any

import pytorch_lightning as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from audiot.base.console import say
from audiot.base.devices import fast_precision
from audiot.base.private import requeue_by_hand, watch_processes_with
from audiot.training.ddp import warn_of_slow_strategy
from audiot.training.exhibits import ShowConfig
from audiot.training.float8 import AROUND, FP8, Float8, check_float8
from audiot.training.fsdp import ShardedStrategy
from audiot.training.ranks import watch_children
from audiot.training.store import WholeFiles

# Steps of a run from which compiling pays. On a GPU it saves some 8 ms per step (3 layers of 192 or 768) and takes 45 s for the
# first two shapes.
LONG_RUN = 5000


def make_trainer(cfg: DictConfig, **options: Any) -> pl.Trainer:
    """Lightning's Trainer with the callbacks and loggers of the config.

    Raises:
        ValueError: the requested devices do not exist, or a setting of the trainer is wrong.
    """
    asked = f"trainer.accelerator={cfg.trainer.accelerator} trainer.devices={cfg.trainer.devices}"
    for name in ("val_check_interval", "log_every_n_steps"):
        if not isinstance(cfg.trainer[name], int | float) or cfg.trainer[name] < 1:
            raise ValueError(f"trainer.{name} must be at least 1, found {cfg.trainer[name]}")
    count = cfg.trainer.get("overfit_batches", 0)  # runs of earlier versions have no such key
    if not isinstance(count, int | float) or count != int(count):
        raise ValueError(
            f"trainer.overfit_batches must be a number of batches, found {count}: training is endless, so a share has no meaning"
        )
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
        if cfg.trainer.get(name) == 0:
            raise ValueError(f"trainer.{name}=0 leaves nothing to measure: set at least 1, or null for all")
    if cfg.trainer.get("barebones"):
        raise ValueError("trainer.barebones=true switches off metrics and checkpoints: audiot benchmark measures instead")
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    if not loggers:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]  # it needs a logger
    if loggers:
        callbacks.append(ShowConfig(OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]  # a dict
    for name, kind in (("enable_progress_bar", ProgressBar), ("enable_checkpointing", Checkpoint)):
        if cfg.trainer.get(name) is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            start_wandb(logger)
    precision = known_precision(cfg.trainer.precision, cfg.trainer.accelerator)
    plugins = [instantiate(each) if isinstance(each, DictConfig) else each for each in cfg.trainer.get("plugins") or []]
    options = {"precision": precision, "plugins": [*plugins, WholeFiles()]} | options
    try:
        trainer: pl.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False, **options)
    except InstantiationException as error:
        if isinstance(error.__cause__, MisconfigurationException):
            raise ValueError(f"{asked}: {error.__cause__}") from error
        raise
    if cfg.trainer.accelerator == "auto" and trainer.num_devices > 1 and trainer.strategy.root_device.type == "cpu":
        raise ValueError(f"{asked}, but no GPU is here: trainer.accelerator=cpu runs {trainer.num_devices} processes on the CPU")
    if cfg.trainer.precision == FP8:
        check_float8(trainer.strategy.root_device)
        trainer.callbacks.append(Float8())  # type: ignore[attr-defined]
    share_step(cfg, trainer)
    warn_of_slow_strategy(trainer.strategy)
    watch_processes_with(watch_children)
    requeue_by_hand(trainer)
    return trainer


def share_step(cfg: DictConfig, trainer: pl.Trainer) -> None:
    """Share out the audio of a step (``data.global_batch_s``) among the processes: in batches of at most ``data.batch_s`` each.

    Raises:
        ValueError: the config says how many batches a step has, too.
    """
    total = cfg.data.get("global_batch_s")
    if total is None:
        return
    if not isinstance(total, int | float) or total <= 0:
        raise ValueError(f"data.global_batch_s must be a positive number of seconds or null, found {total}")
    if cfg.trainer.accumulate_grad_batches != 1:
        raise ValueError("data.global_batch_s chooses how many batches a step has: drop trainer.accumulate_grad_batches")
    processes = trainer.num_devices * trainer.num_nodes
    batches = ceil(total / processes / cfg.data.batch_s)
    trainer.accumulate_grad_batches = batches
    trainer.val_check_interval *= batches  # Lightning counts batches there
    share = f"{batches} batches of {total / processes / batches:g} s" if batches > 1 else "one batch"
    say(f"step    {total:g} s of audio: {processes} process{'es' if processes > 1 else ''}, {share} each")


def known_precision(precision: Any, accelerator: str) -> Any:
    """Lightning's name for a precision: of ``auto``, the fast one on this machine; of ``fp8``, that of all but the products."""
    if precision == FP8:
        return AROUND
    return fast_precision(accelerator) if precision == "auto" else precision


def float8_of(trainer: pl.Trainer) -> Float8 | None:
    """What lets a training use float8; None: it does not."""
    return next((each for each in trainer.callbacks if isinstance(each, Float8)), None)  # type: ignore[attr-defined]


def precision_of(trainer: pl.Trainer) -> str:
    """The precision that a training has, as ``trainer.precision`` names it."""
    return str(trainer.precision) if float8_of(trainer) is None else FP8


def start_wandb(logger: WandbLogger) -> None:
    """Start a W&B run before any computation. It never asks for a key, because in a batch job nobody would answer.

    Raises:
        ValueError: W&B refuses, usually because nobody has logged in.
    """
    from wandb.errors import Error

    terminal, sys.stdin = sys.stdin, io.StringIO()
    try:
        _ = logger.experiment
    except Error as error:
        raise ValueError(f"logger=wandb: {error} WANDB_MODE=offline keeps the run on this machine.") from error
    finally:
        sys.stdin = terminal


def wants_compile(cfg: DictConfig, trainer: pl.Trainer) -> bool:
    """Whether to compile the training step, from the config's ``compile``.

    Raises:
        ValueError: it is not auto, true or false.
    """
    if cfg.compile not in ("auto", True, False):
        raise ValueError(f"compile must be auto, true or false, found {cfg.compile}")
    if cfg.compile != "auto":
        return bool(cfg.compile)
    sharded = isinstance(trainer.strategy, ShardedStrategy)
    return not is_short(trainer) and trainer.strategy.root_device.type == "cuda" and not cfg.debug and not sharded


def is_short(trainer: pl.Trainer) -> bool:
    """Whether a run has too few steps for compiling to pay."""
    return 0 <= trainer.max_steps < LONG_RUN  # negative: no limit of steps


def wants_graphs(trainer: pl.Trainer) -> bool:
    """Whether a compiled step may be a CUDA graph: on one GPU or with DDP, and without gradient accumulation."""
    on_gpu = trainer.strategy.root_device.type == "cuda"
    return on_gpu and trainer.accumulate_grad_batches == 1 and isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
