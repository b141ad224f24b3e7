"""Early stopping: a training ends once validations get no better."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping as LightningEarlyStopping


class EarlyStopping(LightningEarlyStopping):
    """Lightning's early stopping, after validations, by the figure that tells the best checkpoint.

    A run that goes on has its own patience, not the checkpoint's.

    Args:
        monitor: The figure; None: the module's ``monitor``.
        mode: ``min`` if lower is better, ``max`` if higher is.
        patience: Number of validations in a row without a better one that ends the training.
        min_delta: Difference that a better figure must exceed.

    Raises:
        ValueError: ``patience`` or ``min_delta`` is too small.
    """

    def __init__(
        self, monitor: str | None, mode: Literal["min", "max"] = "min", patience: int = 5, min_delta: float = 0.0
    ) -> None:
        if patience < 1:
            raise ValueError(f"callbacks.early_stopping.patience must be at least 1, found {patience}")
        if min_delta < 0:
            raise ValueError(f"callbacks.early_stopping.min_delta must be at least 0, found {min_delta}")
        # A figure that is not finite is no better one. That training has diverged is told elsewhere.
        super().__init__(monitor or "", min_delta, patience, mode=mode, check_finite=False, check_on_train_epoch_end=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the module's figure, if none is named."""
        self.monitor = self.monitor or str(pl_module.monitor)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best figure and the number of validations since."""
        super().load_state_dict(state_dict | {"patience": self.patience})


def stopped_early(trainer: pl.Trainer) -> dict[str, int]:
    """``stopped_patience``, the number of validations after which a training was stopped before its last step; else nothing."""
    stopping = (each for each in trainer.callbacks if isinstance(each, EarlyStopping))  # type: ignore[attr-defined]
    stopped = [each.patience for each in stopping if each.wait_count >= each.patience and trainer.global_step < trainer.max_steps]
    return {"stopped_patience": stopped[0]} if stopped else {}
