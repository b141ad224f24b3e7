"""Going on with a run that was stopped: what changes, its last checkpoint, and what to type after an error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.callbacks import LambdaCallback

from audiot.base.console import say
from audiot.runs import Resumed, check_fresh, checkpoint_path, damage, step_of
from audiot.training.csv_logger import RunCSVLogger
from audiot.training.ddp import lost_a_process
from audiot.training.optimization import Schedule, schedule
from audiot.training.ranks import ranks_of, say_how_to_go_on
from audiot.training.store import store_of
from audiot.training.watch import is_out_of_memory


def check_new(cfg: DictConfig) -> None:
    """Refuse to begin a run that says that it goes on, or in the folder of another one.

    Raises:
        ValueError: it does.
    """
    if cfg.resume:
        raise ValueError("a config can't resume a run: put resume=RUN on the command line, without a + before it")
    check_fresh(Path(cfg.run_dir))


def announce(resumed: Resumed) -> None:
    """Say where a run goes on, with what changes, and its learning rates where they aren't what they would have been.

    Raises:
        ValueError: the rates can't be changed.
    """
    changes = f", with {' '.join(resumed.changes)}" if resumed.changes else ""
    checkpoint = resumed.checkpoint
    assert checkpoint is not None
    say(f"resume  {checkpoint}{changes}")
    before, after = (schedule(cfg) for cfg in (resumed.before, resumed.config))
    step = step_of(checkpoint)
    if isinstance(before, Schedule) and isinstance(after, Schedule):
        if (before.description, before.rate(step + 1)) != (after.description, after.rate(step + 1)):
            rates = f"step {step:,} had {before.rate(step):.3g}" + (
                f", step {step + 1:,} has {after.rate(step + 1):.3g}" if step < resumed.config.trainer.max_steps else ""
            )
            say(f"rates   the learning rate goes {after.description}: {rates}")
        return
    for change in resumed.changes:
        if change.startswith(("trainer.max_steps=", "optimizer.lr=", "scheduler.")):
            kind = resumed.config.scheduler._target_
            raise ValueError(f"{change} can't change on resume: {kind} keeps its rates in the checkpoint; a new run can have it")


def go_on(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, resumed: Resumed) -> None:
    """Train on from a checkpoint. Once it is loaded, the run's changes are its own, and probes of the encoder as it was go away.

    Raises:
        ValueError: the checkpoint can't be loaded.
    """
    accepted, checkpoint = False, resumed.checkpoint
    assert checkpoint is not None

    def accept(*_: Any) -> None:
        nonlocal accepted
        accepted = True
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.go_on(step_of(checkpoint))
        if trainer.is_global_zero:
            resumed.record()
            if step_of(checkpoint) < resumed.config.trainer.max_steps:
                shutil.rmtree(resumed.run / "probes", ignore_errors=True)

    trainer.callbacks.insert(0, LambdaCallback(on_train_start=accept))  # type: ignore[attr-defined]
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that was made to harm may raise anything in Lightning
        if accepted or is_out_of_memory(error):
            raise
        raise ValueError(f"{resumed.run} can't go on from {checkpoint}: {error}") from error
    if not accepted:  # nothing was left to train
        accept()


@contextmanager
def how_to_go_on(trainer: pl.Trainer, run: Path) -> Iterator[None]:
    """Say how a run can go on where an error ends it after a checkpoint.

    Args:
        trainer: The trainer that runs inside the block.
        run: Folder of the run.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        lost = lost_a_process(error)
        if isinstance(error, RuntimeError) and not lost:
            raise
        ranks = ranks_of(trainer)
        words = ranks.told(error) if lost and ranks else str(error)
        if trainer.global_step and (lost or trainer.is_global_zero):
            say_how_to_go_on(run)
        if not lost:
            raise
        raise ConnectionError(words) from error


def save_last(trainer: pl.Trainer, module: pl.LightningModule, run: Path, lr: float) -> None:
    """Save the last step, if that was not due in training.

    Args:
        trainer: The trainer that trained.
        module: What it trained.
        run: Folder of the run.
        lr: Learning rate, for the error.

    Raises:
        ValueError: training diverged.
    """
    last = checkpoint_path(run / "checkpoints", trainer.global_step)
    is_there = last.is_file() and damage(last) is None
    if trainer.fast_dev_run or trainer.strategy.broadcast(is_there):  # type: ignore[attr-defined]
        return
    store = store_of(trainer)
    if store is None:  # trainer.enable_checkpointing=false: what the encoder is exported from is saved all the same
        trainer.save_checkpoint(last)
    elif store.save(trainer, module) is None:
        raise ValueError(f"training diverged: lower optimizer.lr={lr}")
