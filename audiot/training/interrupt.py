"""Stopping a training so that it can be resumed: signals, in one process or many."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from audiot.base.devices import to_host
from audiot.base.private import skip_sigterm_broadcast
from audiot.data.batches import Batch
from audiot.runs import Interrupted


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
    """On Ctrl-C or SIGTERM, finish the step, save a checkpoint and stop. A second Ctrl-C stops at once.

    Several GPUs run one more step, in which they agree to stop.

    Args:
        folder: Folder for the checkpoint; None saves none.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.requested = False
        self._anywhere = AnyProcess()
        self._previous: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers."""
        skip_sigterm_broadcast(trainer)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)

    def _release(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save and stop if asked to, after the last batch of an optimiser step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not self._anywhere.ask(self.requested, trainer):
            return
        path = None
        if self.folder is not None:
            path = Path(self.folder) / f"step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
        raise Interrupted(trainer.global_step, path)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._release()
