"""Training that watches itself: steps that are not finite, and batches that memory has no room for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from audiot.base.devices import to_host
from audiot.base.files import replacing
from audiot.data.batches import Batch
from audiot.training.accumulation import WeightedSteps
from audiot.training.fsdp import full_tensor

LATE = 2  # steps after which a GPU's flag is read: it has arrived by then, and the GPU still has two steps to do
NAMED = 3  # utterances of a batch that a line names
NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a primitive",  # of oneDNN, which says no more
)  # in RuntimeErrors of PyTorch


def weights_are_finite(module: nn.Module) -> bool:
    """Whether no parameter has an infinite or undefined element. It waits for the device. All processes must call it."""
    with torch.no_grad():
        # The norm is the largest element, so that large weights don't overflow.
        norm = get_total_norm([parameter.detach() for parameter in module.parameters()], norm_type=float("inf"))
        return bool(full_tensor(norm).isfinite())


class Running(NamedTuple):
    """The batch that is in its training, validation or test step.

    Args:
        place: Where in the training that is, in words that follow "out of memory".
        batch: The batch.
    """

    place: str
    batch: Batch


class Unread(NamedTuple):
    """A step whose flag may still be on its way from the device.

    Args:
        step: Number of the step, counted from 1.
        skipped: Whether it was skipped, bool (), on the CPU.
        arrived: The event after which ``skipped`` has its value; None: it has.
        batches: This process's batches, each with its loss.
    """

    step: int
    skipped: Tensor
    arrived: torch.cuda.Event | None
    batches: list[tuple[Batch, Tensor]]


class Bad(NamedTuple):
    """The batch because of which a step was skipped.

    Args:
        step: Number of the step, counted from 1.
        ids: Its utterances.
        content: What is written about it; None in the processes that had other batches.
    """

    step: int
    ids: list[str]
    content: dict[str, Any] | None


class FiniteSteps(Callback):
    """Count the steps whose loss or gradient was not finite and which were skipped, and end a training that has diverged.

    `WeightedSteps` skips them, which leaves the weights as they are. So a few bad recordings do no harm. If the weights are too
    large, one step after the other fails: many skipped steps in a row are a training that has diverged.

    The first skipped step gives a warning. Its batch is written to ``nonfinite.pt`` for
    ``torch.load(path, weights_only=True)``: a dict with ``step``, ``seed``, the batch's ``loss``, and all that the batch had,
    such as ``waveforms``, ``lengths``, ``keys``, ``ids`` and ``position``. Of several batches per step, it is the first one whose
    own loss is not finite, or the first one if there is none. When training ends so, the file has the first step of those in a
    row. ``skipped_steps`` is logged once it is above 0.

    On a GPU, nothing waits: flags are read two steps later, after the same step in every process.

    Args:
        folder: Folder for ``nonfinite.pt``.
        limit: Number of skipped steps in a row that ends the training.

    Raises:
        ValueError: ``limit`` is not positive; or, while training, it is reached.
    """

    def __init__(self, folder: str, limit: int = 10) -> None:
        if limit < 1:
            raise ValueError(f"callbacks.watch.limit must be at least 1, found {limit}")
        self.path = Path(folder) / "nonfinite.pt"
        self.limit = limit
        self.skipped = 0  # steps of the whole run
        self.running: Running | None = None
        self._in_a_row = 0
        self._first: Bad | None = None  # of those in a row
        self._batches: list[tuple[Batch, Tensor]] = []  # of the current step
        self._unread: deque[Unread] = deque()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Note the batch."""
        self.running = Running(f"at step {trainer.global_step + 1}", batch)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: WeightedSteps, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Take note of a step after its last batch, and read the flags that are due."""
        self.running = None
        self._batches.append((batch, outputs["loss"]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert pl_module.latest_skipped is not None
        (skipped,), arrived = to_host(pl_module.latest_skipped)
        self._unread.append(Unread(trainer.global_step, skipped, arrived, self._batches))
        self._batches = []
        self._read(trainer, pl_module, 0 if arrived is None else LATE)
        if self.skipped and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("skipped_steps", float(self.skipped))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the last flags."""
        self._read(trainer, pl_module, 0)

    def _read(self, trainer: pl.Trainer, module: pl.LightningModule, late: int) -> None:
        """Read the flags of all steps but the latest ``late``. Reading what has arrived would differ between processes."""
        while len(self._unread) > late:
            step = self._unread.popleft()
            if step.arrived is not None:
                step.arrived.synchronize()
            if not step.skipped:
                self._in_a_row = 0
                continue
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row == 1:
                self._first = _bad(step, module, trainer)
            if self.skipped == 1:
                self._write(trainer)
                rank_zero_warn(f"the loss or gradient of {self._first_step()} is not finite: it is skipped; see {self.path}")
            if self._in_a_row == self.limit:
                self._write(trainer)
                raise ValueError(
                    f"training diverged: loss or gradient was not finite in {self.limit} steps in a row, all skipped, "
                    f"the first {self._first_step()}: lower optimizer.lr, or look at its batch, {self.path}"
                )

    def _write(self, trainer: pl.Trainer) -> None:
        assert self._first is not None
        if self._first.content is not None:
            with replacing(self.path) as temporary:
                torch.save(self._first.content, temporary)
        trainer.strategy.barrier()  # whoever is told of the file finds it

    def _first_step(self) -> str:
        assert self._first is not None
        return f"step {self._first.step} ({utterances(self._first.ids)})"

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the batch."""
        self.running = Running(f"in the validation after step {trainer.global_step}", batch)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Forget the batch."""
        self.running = None

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the batch."""
        self.running = Running("in the test", batch)

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Forget the batch."""
        self.running = None

    def state_dict(self) -> dict[str, int]:
        """The number of skipped steps, which a resumed run continues."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of the earlier part of the run."""
        self.skipped = state_dict["skipped"]


def _bad(step: Unread, module: pl.LightningModule, trainer: pl.Trainer) -> Bad:
    """The batch because of which a step was skipped. All processes must call it."""
    batch, loss = next(((batch, loss) for batch, loss in step.batches if not loss.isfinite()), step.batches[0])
    own = (bool(loss.isfinite()), batch["ids"])
    told: list[Any] = [own]
    if trainer.world_size > 1:
        told = [None] * trainer.world_size
        dist.all_gather_object(told, own)
    rank = min(range(len(told)), key=lambda rank: told[rank][0])  # the first one whose loss is not finite, or else the first
    content = None
    if rank == trainer.global_rank:
        host = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}
        content = {"step": step.step, "seed": module.hparams["seed"], "loss": float(loss), **host}
    return Bad(step.step, told[rank][1], content)


def utterances(ids: list[str]) -> str:
    """How many utterances, and the names of the first ones."""
    more = ", …" if len(ids) > NAMED else ""
    return f"{_number(ids)}: {', '.join(ids[:NAMED])}{more}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in NO_MEMORY)


@contextmanager
def batches_that_fit(trainer: pl.Trainer) -> Iterator[None]:
    """Tell in one line which batch memory had no room for.

    Args:
        trainer: The trainer that runs inside the block.

    Raises:
        ValueError: there was not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        module = trainer.lightning_module
        assert isinstance(module, WeightedSteps)
        watches = [each for each in trainer.callbacks if isinstance(each, FiniteSteps)]  # type: ignore[attr-defined]
        running = watches[0].running if watches else None
        place, keys = f"after step {trainer.global_step}", module.SIZES  # between two batches
        if running is not None:
            place, keys = f"{running.place}, with {_size(running.batch, module.sample_rate)}", _keys(running.batch, module)
        words = ". ".join(str(error).split("\n")[0].split(". ")[:2]) or type(error).__name__
        raise ValueError(f"out of memory {place}: lower {' or '.join(keys)} ({words})") from error


def _size(batch: Batch, sample_rate: int) -> str:
    longest = int(batch["lengths"].max())
    length = f"{longest} states" if "hidden" in batch else f"{longest / sample_rate:.4g} s"
    return f"{_number(batch['ids'])}, the longest of {length}"


def _keys(batch: Batch, module: WeightedSteps) -> tuple[str, ...]:
    return ("downstream.batch_size",) if "hidden" in batch else module.SIZES  # of cached states


def _number(ids: list[str]) -> str:
    return f"{len(ids)} utterance{'s' if len(ids) > 1 else ''}"
