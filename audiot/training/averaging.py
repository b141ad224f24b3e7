"""Averages of the weights over the steps of a training, validated, saved and exported in place of the latest weights."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from audiot.data.batches import Batch
from audiot.training.fsdp import ShardedStrategy


class WeightAverage(WeightAveraging):
    """Lightning's averaging of weights, after every step, for runs that are saved and resumed at any step.

    Training goes on from the latest weights, as it would without an average. A validation measures the average. In a checkpoint,
    ``state_dict`` is the average and ``current_model_state`` the latest weights. Buffers, such as codebooks and hash functions,
    are not averaged. A step that was skipped counts with the weights that it left.

    Differs from Lightning's: the average is on the device of the training. After the training the module keeps its latest weights
    until `hand_over_average`, so that the last checkpoint has both. A test of a checkpoint is one of its average.

    Args:
        options: Arguments of `AveragedModel`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(use_buffers=False)
        self.options = options

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the module.

        Raises:
            ValueError: its parameters are to be shared out among processes.
        """
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ShardedStrategy):
            raise ValueError("callbacks=ema and callbacks=swa need whole parameters: set trainer=ddp instead of trainer=fsdp")
        self._average_model = AveragedModel(pl_module, trainer.strategy.root_device, use_buffers=False, **self.options)
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()  # its value is asked for at every step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the latest weights, which the last checkpoint needs."""

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from the latest weights of a checkpoint. A test has loaded its average."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def hand_over(self, module: pl.LightningModule) -> None:
        """Give the module the average, and forget it."""
        if self._average_model is not None:
            self._copy_average_to_current(module)
            self._average_model = None


class ExponentialAverage(WeightAverage):
    """Exponential moving average of the weights (Polyak & Juditsky 1992; Tarvainen & Valpola 2017, arXiv:1703.01780).

    After step t the average is a_t = ``decay`` · a_(t−1) + (1 − ``decay``) · w_t of the weights w_t, with a_1 = w_1.

    Raises:
        ValueError: ``decay`` isn't in [0, 1).
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.average.decay must be in [0, 1), found {decay}")
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))


class StochasticAverage(WeightAverage):
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407): the mean of the weights after each of the last steps.

    Differs from the paper: the schedule of the learning rate is ``scheduler``'s, and weights are taken after every step. Until
    the first of them, the average is the latest weights.

    Args:
        start: Share of all steps after which the average begins.

    Raises:
        ValueError: ``start`` isn't in [0, 1).
    """

    def __init__(self, start: float = 0.75) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"callbacks.average.start must be in [0, 1), found {start}")
        super().__init__()
        self.start = start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add the weights after a step, or begin with them."""
        if trainer.global_step <= round(self.start * trainer.max_steps) + 1:
            assert self._average_model is not None
            self._average_model.n_averaged.zero_()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def hand_over_average(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Give a module that was trained the average of its weights, if the run has one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAverage):
            callback.hand_over(module)
