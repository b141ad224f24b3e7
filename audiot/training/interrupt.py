"""Stopping a training so that it can be resumed: signals, in one process or many."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from audiot.base.devices import to_host
from audiot.base.private import skip_sigterm_broadcast
from audiot.data.batches import Batch
from audiot.data.loaders import LoaderStoppedError
from audiot.runs import Interrupted, checkpoint_path, checkpoints
from audiot.training.store import store_of


class AnyProcess:
    """Whether a flag is set in any process.

    On GPUs the answer arrives with the next call, over a separate stream. If the host or the training's stream waited for it,
    the GPUs would be idle between two steps.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, list[Tensor], torch.cuda.Event | None] | None = None
        self._stream: torch.cuda.Stream | None = None

    def ask(self, flag: bool, trainer: pl.Trainer) -> bool:
        """Ask whether any process has set its flag. All processes must call it and get the same answer."""
        device = trainer.strategy.root_device
        if trainer.world_size == 1 or device.type != "cuda":
            return trainer.strategy.reduce_boolean_decision(flag, all=False)
        before = False
        if self._asked is not None:
            _, (answer,), arrived = self._asked
            assert arrived is not None
            arrived.synchronize()
            before = bool(answer)
        question = torch.full((), int(flag), dtype=torch.int32, device=device)
        work = torch.distributed.all_reduce(question, op=torch.distributed.ReduceOp.MAX, async_op=True)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            work.wait()
            self._asked = (question, *to_host(question))  # kept alive, as the training's stream could reuse its memory
        return before


class GracefulInterrupt(Callback):
    """On Ctrl-C, SIGTERM or SIGUSR1, finish the step, save a checkpoint and stop. A second Ctrl-C stops at once.

    In a validation or test, one process stops after the batch, with the checkpoint that was saved before. Several processes stop
    after the validation, and several GPUs run one more step, in which they agree to stop. Where the loader of data stops, a
    checkpoint is saved too.

    Args:
        folder: Folder for the checkpoint; None saves none.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.requested = self.is_warning = False
        self._stop: Interrupted | None = None  # what is raised once Lightning has logged the step
        self._anywhere = AnyProcess()
        self._previous: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.is_warning = self.is_warning or number == signal.SIGUSR1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers."""
        skip_sigterm_broadcast(trainer)
        self._install()

    def _install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._request)

    def _release(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save if asked to stop, after the last batch of an optimiser step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not self._anywhere.ask(self.requested, trainer):
            return
        self._stop = Interrupted(trainer.global_step, self._save(trainer, pl_module), is_warning=self.is_warning)

    def _end(self) -> None:
        if self._stop is not None:
            raise self._stop

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Stop before the next step."""
        self._end()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before a validation of training. Install the signal handlers for one after it."""
        self._end()
        if trainer.state.fn == TrainerFn.VALIDATING and trainer.world_size == 1:
            self._install()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers."""
        if trainer.world_size == 1:
            self._install()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after the last step."""
        self._end()

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Stop within a validation, if the step before it is saved. It takes place again when the run goes on."""
        self._stop_within("validation", trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Stop within a test in the same way."""
        self._stop_within("test", trainer)

    def _stop_within(self, what: str, trainer: pl.Trainer) -> None:
        if not self.requested or trainer.world_size > 1 or self.folder is None:
            return
        path = self._path(trainer)
        if path.is_file():
            raise Interrupted(trainer.global_step, path, f"in the {what} ", self.is_warning)

    def _path(self, trainer: pl.Trainer) -> Path:
        return checkpoint_path(Path(self.folder or ""), trainer.global_step)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Path | None:
        """Save the latest step, unless its weights are not finite. The checkpoint from which the run can go on."""
        if self.folder is None:
            return None
        store = store_of(trainer)
        if store is None:
            trainer.save_checkpoint(self._path(trainer))
        elif store.save(trainer, pl_module) is None:
            return next(iter(checkpoints(Path(self.folder))), None)
        return self._path(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers. Save the latest step where the next batch doesn't come."""
        self._release()
        whole = (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0
        alone = trainer.world_size == 1  # others would have to save with it
        if isinstance(exception, LoaderStoppedError) and trainer.training and whole and alone:
            self._save(trainer, pl_module)
