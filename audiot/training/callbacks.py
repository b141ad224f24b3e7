"""Lightning callbacks: progress, throughput, consumed data and pictures."""

from __future__ import annotations

import gc
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from audiot.base.devices import synchronise, to_host
from audiot.base.failures import Failures
from audiot.base.files import replacing
from audiot.data.batches import Batch, to_device
from audiot.training.accumulation import WeightedSteps
from audiot.training.energy import energy_counter
from audiot.training.exhibits import show_audio, show_picture

MAX_WAIT = 0.05  # share of the time that a GPU may wait for data without a warning
IN_FILES_S = 30.0  # seconds between two drawings of a progress bar that is no terminal's
PATIENCE = 50  # steps before the first warning


class Latest:
    """Latest value of a number on the device. It is read when it has arrived, without waiting."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def put(self, value: Tensor) -> None:
        """Start the copy of a value. While an earlier copy is on its way, the new value is dropped."""
        if not value.is_cuda:
            self.value = float(value)
        elif self._copy is None:
            (self._copy,), self._arrived = to_host(value.detach())

    def get(self) -> float | None:
        """The latest value that has arrived."""
        if self._copy is not None and self._arrived is not None and self._arrived.query():
            self.value, self._copy = float(self._copy), None
        return self.value


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar over all ``max_steps``, for training in one endless epoch.

    Loss and throughput are shown when they have arrived. Lightning's ``log(prog_bar=True)`` would wait for the device. A file
    keeps everything that is drawn, and so gets a line every half minute.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self.loss = Latest()
        self._drawn = -IN_FILES_S

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Store the loss and redraw."""
        assert isinstance(pl_module, WeightedSteps)
        if pl_module.latest_loss is not None:  # None until all batches of the first step are done
            self.loss.put(pl_module.latest_loss)
        number = batch_idx + 1
        if self.is_enabled and number % self.refresh_rate == 0:
            now = time.monotonic()
            if now - self._drawn < IN_FILES_S and number != self.total_train_batches and not sys.stdout.isatty():
                return
            self._drawn = now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """Metrics to show, under their short names."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        rates = [each.rate for each in trainer.callbacks if isinstance(each, Throughput)]  # type: ignore[attr-defined]
        latest = {"loss": self.loss.get(), "frames_per_s": next(iter(rates), None)}
        shown = {name: value for name, value in latest.items() if value is not None}
        return shown | {name.split("/")[-1]: value for name, value in metrics.items()}

    @property
    def total_train_batches(self) -> int | float:
        """Batches of the whole training."""
        steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return steps if steps > 0 else super().total_train_batches


class Throughput(Callback):
    """Log real (unpadded) spectrogram frames per second over all processes, and the share of the time spent waiting for data.

    Validation and the first step of a process, which compiles, are not counted. Waiting means that the device is idle when a
    batch arrives. On a GPU, CUDA events measure it, and their times are read once they are there. The energy of a single device
    is counted over the same time, where it tells.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.waited_s = 0.0
        self.total_frames = 0
        self.total_s = 0.0
        self.total_waited_s = 0.0
        self.first_step_s = 0.0
        self.rate: float | None = None  # the latest logged rate
        self.since = self.last = 0.0
        self.warned = False
        self.joules: float | None = 0.0  # None: it has not been counted from the beginning
        self._counter: Callable[[], float] | None = None
        self._joules_before: float | None = None
        self._ended: torch.cuda.Event | float | None = None
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._counter = energy_counter(pl_module.device) if trainer.world_size == 1 else None
        if self._counter is None:
            self.joules = None
        if pl_module.device.type == "cuda":  # an earlier run of this process may have needed more
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start()

    def _start(self) -> None:
        self.frames, self.waited_s, self.since = 0, 0.0, time.monotonic()
        self.last = self.since
        self._ended, self._gaps = None, []

    def _now(self, pl_module: pl.LightningModule) -> torch.cuda.Event | float:
        if pl_module.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Measure how long the device was idle."""
        begun, ended = self._now(pl_module), self._ended
        if isinstance(begun, float) and isinstance(ended, float):
            self.waited_s += begun - ended
        elif isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
            self._gaps.append((ended, begun))
        while self._gaps and self._gaps[0][1].query():
            first, second = self._gaps.pop(0)
            self.waited_s += first.elapsed_time(second) / 1000

    def _count(self, until: float | None = None) -> tuple[float, float]:
        """Frames per second and the share of waiting since the last count."""
        elapsed = max((time.monotonic() if until is None else until) - self.since, 1e-9)
        rate, share = self.frames / elapsed, self.waited_s / elapsed
        self.total_frames += self.frames
        self.total_s += elapsed
        self.total_waited_s += self.waited_s
        self.frames, self.waited_s, self.since = 0, 0.0, time.monotonic()
        return rate, share

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch's frames; log the rate at the logging interval."""
        if not self.first_step_s:
            synchronise(pl_module.device)
            self.first_step_s = time.monotonic() - self.since
            self._start()
            self._start_energy()
            return
        assert isinstance(pl_module, WeightedSteps)
        self.frames += pl_module.frames(batch) * trainer.world_size
        self._ended, self.last = self._now(pl_module), time.monotonic()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            rate, waited = self._count()
            self.rate = rate
            pl_module.log("frames_per_s", rate)
            pl_module.log("data_wait", waited)
            self._warn(trainer, waited)

    def _warn(self, trainer: pl.Trainer, waited: float) -> None:
        """Warn once that data slows training down. On a GPU only, and after the first batches, while which the loaders start."""
        if (
            waited > MAX_WAIT
            and not self.warned
            and trainer.global_step >= PATIENCE
            and trainer.strategy.root_device.type == "cuda"
        ):
            self.warned = True
            remedy = trainer.datamodule.faster_loading()  # type: ignore[attr-defined]
            rank_zero_warn(f"the GPU waits for data {waited:.0%} of the time: {remedy}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock at the end of the last batch. Starting the validation loaders is not training."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._count(self.last)
            self._count_energy()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock again."""
        self._start()
        if trainer.state.fn == TrainerFn.FITTING:
            self._start_energy()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the last batches."""
        self._count()
        self._count_energy()

    def _start_energy(self) -> None:
        self._joules_before = None if self._counter is None else self._counter()

    def _count_energy(self) -> None:
        if self._counter is not None and self._joules_before is not None and self.joules is not None:
            self.joules += self._counter() - self._joules_before
            self._joules_before = None

    def state_dict(self) -> dict[str, float | None]:
        """Totals, which a resumed run continues."""
        return {"frames": self.total_frames, "seconds": self.total_s, "waited": self.total_waited_s, "joules": self.joules}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the totals of the earlier part of the run."""
        self.total_frames, self.total_s = int(state_dict["frames"]), state_dict["seconds"]
        self.total_waited_s = state_dict.get("waited", 0.0)
        self.joules = state_dict.get("joules")

    @property
    def average(self) -> float:
        """Frames per second over the whole training."""
        return self.total_frames / max(self.total_s, 1e-9)

    @property
    def energy_wh(self) -> float | None:
        """Energy of the whole training in watt-hours; None where it was not counted."""
        return None if self.joules is None else self.joules / 3600

    def costs(self, device: torch.device) -> dict[str, float]:
        """What the whole training has cost: speed, time, and on a GPU its peak of memory, and its energy where it tells."""
        costs: dict[str, float] = {
            "frames_per_s": round(self.average),
            "data_wait": round(self.data_wait, 4),
            "first_step_s": round(self.first_step_s, 1),
            "train_s": round(self.total_s, 1),
        }
        if device.type == "cuda":
            costs["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        if self.energy_wh is not None:
            costs["energy_wh"] = round(self.energy_wh, 3)
        return costs

    @property
    def data_wait(self) -> float:
        """Share of the whole training spent waiting for data."""
        return self.total_waited_s / max(self.total_s, 1e-9)


class ConsumedBatches(Callback):
    """Tell the data module which batches training has used. It must run before checkpoint callbacks, which come last."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Report the batch."""
        trainer.datamodule.consumed(batch)  # type: ignore[attr-defined]


class StopAfter(Callback):
    """Stop training early. The learning rates stay those of all its steps.

    Args:
        steps: Number of steps after which it stops.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop after the last batch of the step."""
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


class ObjectivePictures(Callback):
    """Draw the targets and predictions of one validation utterance after every validation; loggers get the picture and the sound.

    Args:
        folder: Folder for the objective's picture (``reconstruction.png``, say) and one of each validation.
        enabled: Whether to draw at all.
    """

    def __init__(self, folder: str, enabled: bool = True) -> None:
        self.folder, self.enabled = Path(folder), enabled
        self.batch: Batch | None = None
        self.heard = False  # whether loggers have an utterance to listen to
        self.failures = Failures()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first batch."""
        if batch_idx == 0 and self.enabled:
            self.batch = batch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw its longest utterance, under the figure of the whole validation."""
        objective: Any = pl_module.objective
        latest = self.folder / objective.picture
        path = latest.with_stem(f"{latest.stem}-step{trainer.global_step:06d}")
        if not trainer.is_global_zero or self.batch is None or trainer.sanity_checking or path.is_file():
            return
        with self.failures.noted(latest.name):
            number = int(self.batch["lengths"].argmax())
            one = {name: value[number : number + 1] if isinstance(value, Tensor) else value for name, value in self.batch.items()}
            one = to_device(one, pl_module.device)
            view = pl_module.view(one)  # type: ignore[operator]
            overall = f"{objective.label} {float(trainer.callback_metrics[pl_module.monitor]):.3f} in validation"  # type: ignore[index]
            objective.draw(view, f"{self.batch['ids'][number]}, step {trainer.global_step}; {overall}", path)
            with replacing(latest) as temporary:
                shutil.copyfile(path, temporary)
            show_picture(trainer.loggers, path, trainer.global_step)
            if not self.heard:
                length, self.heard = int(one["lengths"][0]), True
                waveform = one["waveforms"][0, :length].float().cpu().numpy()
                rate = int(pl_module.model.features.sample_rate)  # type: ignore[union-attr, arg-type]
                show_audio(trainer.loggers, waveform, rate, self.batch["ids"][number], trainer.global_step)
        self.batch = None
        # The parts of a figure refer to each other. Python would look for such parts after some twenty figures of 4 MB or more.
        gc.collect()
