"""A run's checkpoints: each written as a whole or not at all, the latest ones and the best one kept."""

from __future__ import annotations

import os
import shutil
from math import isnan
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn

from audiot.base.console import say
from audiot.base.files import replacing, room
from audiot.base.private import validate_now
from audiot.data.batches import Batch
from audiot.runs import checkpoint_path, checkpoints, step_of
from audiot.training.watch import weights_are_finite


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints under a temporary name beside their target, and renames them once they are on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written, with what is free on which disk. The checkpoints before it stay.
        """
        path = Path(path)
        with replacing(path, durable=True) as temporary:
            try:
                with temporary.open("wb") as stream:
                    torch.save(checkpoint, stream)
            except (OSError, RuntimeError) as error:  # PyTorch's own writer tells of a full disk with a RuntimeError
                kept = ", ".join(each.name for each in checkpoints(path.parent)[:1])
                raise OSError(
                    f"{path} could not be written, {room(path.parent)}: make room there, or lower checkpoint.keep_last"
                    + (f"; {kept} is as it was" if kept else "")
                ) from error


class CheckpointStore(Checkpoint):
    """Saves checkpoints of a run and deletes those that are no longer needed.

    One is saved every `every_n_steps`, and before every validation. The latest ones and the one of the best validation are kept.
    Weights that are not finite are never saved. A validation that was due when a run ended takes place first when the
    run goes on.

    Args:
        folder: Folder of the checkpoints.
        every_n_steps: Steps between two checkpoints.
        keep_last: Number of the latest checkpoints that are kept.
        monitor: Figure that tells which validation is best; None: the module's ``monitor``.
        mode: ``min`` if lower is better, ``max`` if higher is.
        best: File name that the best one has too, in the folder; None: it keeps the name of its step alone.

    Attributes:
        best_step: Step of the best validation.
        best_score: Its figure.
    """

    def __init__(
        self,
        folder: str,
        every_n_steps: int,
        keep_last: int = 2,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        best: str | None = None,
    ) -> None:
        for name, value in {"every_n_steps": every_n_steps, "keep_last": keep_last}.items():
            if value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, found {value}")
        self.folder = Path(folder)
        self.every_n_steps, self.keep_last = every_n_steps, keep_last
        self.monitor, self.mode, self.best = monitor, mode, best
        self.best_step: int | None = None
        self.best_score: float | None = None
        self.pending = False  # whether the loaded checkpoint was saved before a validation that was due
        self._validated = -1  # step of the latest validation
        self._refused = False

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know."""
        return {"best_step": self.best_step, "best_score": self.best_score, "pending": self.pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.best_step, self.best_score = state_dict["best_step"], state_dict["best_score"]
        self.pending = state_dict["pending"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Catch up on the validation that was due."""
        if self.pending:
            validate_now(trainer)
        self.pending = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save after the last batch of a step, if it is time."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.global_step % self.every_n_steps == 0 or is_validation_due(trainer):
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the best checkpoint."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._validated = trainer.global_step
        figure = trainer.callback_metrics.get(self.monitor or pl_module.monitor)  # type: ignore[arg-type, call-overload]
        if figure is not None and self._is_best(float(figure)):
            self.best_step, self.best_score = trainer.global_step, float(figure)
            if self.best is not None and trainer.is_global_zero:
                self._name_best(checkpoint_path(self.folder, trainer.global_step), self.folder / self.best)
        self._prune(trainer)

    def _is_best(self, figure: float) -> bool:
        if self.best_score is None or isnan(self.best_score):
            return True
        return figure < self.best_score if self.mode == "min" else figure > self.best_score

    def _name_best(self, path: Path, best: Path) -> None:
        """Give a checkpoint, if it was saved, a second name in place of the best one so far."""
        if not path.is_file():
            return
        with replacing(best) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)

    @property
    def best_path(self) -> Path | None:
        """The best checkpoint, if there is one."""
        if self.best_step is None:
            return None
        path = checkpoint_path(self.folder, self.best_step) if self.best is None else self.folder / self.best
        return path if path.is_file() else None

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Path | None:
        """Save a checkpoint of the weights as they are, unless they are not finite; its path. All processes must call it."""
        if not weights_are_finite(pl_module):
            if not self._refused and trainer.is_global_zero:
                kept = checkpoints(self.folder)
                stays = f": {kept[0]} stays" if kept else ""
                say(f"the weights after step {trainer.global_step:,} are not finite and are not saved{stays}")
            self._refused = True
            return None
        path = checkpoint_path(self.folder, trainer.global_step)
        self.pending = self._validated != trainer.global_step and is_validation_due(trainer)
        trainer.save_checkpoint(path)
        self.pending = False
        self._prune(trainer)
        return path

    def _prune(self, trainer: pl.Trainer) -> None:
        """Delete what is neither among the latest nor the best. What a later step left, damaged perhaps, is not counted."""
        if not trainer.is_global_zero:
            return
        known = [path for path in checkpoints(self.folder) if step_of(path) <= trainer.global_step]
        for path in known[self.keep_last :]:
            if self.best is not None or step_of(path) != self.best_step:
                path.unlink(missing_ok=True)


def store_of(trainer: pl.Trainer) -> CheckpointStore | None:
    """The store among a trainer's callbacks; None with trainer.enable_checkpointing=false, and in runs of earlier versions."""
    return next((each for each in trainer.callbacks if isinstance(each, CheckpointStore)), None)  # type: ignore[attr-defined]


def is_validation_due(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the latest batch. Intervals count batches, as training is one endless epoch."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None or every == float("inf"):
        return False
    return (trainer.fit_loop.total_batch_idx + 1) % int(every) == 0
