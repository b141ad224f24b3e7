"""The whole program of pre-training, timed: prepared audio through the Trainer."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from audiot.base.devices import synchronise
from audiot.benchmark.stopwatch import Stopwatch
from audiot.data.batches import Batch, crop_lengths
from audiot.data.opening import open_corpus
from audiot.pretraining import MaskedAcousticModel, open_data
from audiot.runs import Interrupted
from audiot.training.callbacks import Throughput
from audiot.training.trainer import wants_graphs


class ProgramClock(Callback):
    """Times the parts of `count` training steps after the first `first`.

    It must be the first callback, so that a step ends before the others do their work.

    Args:
        throughput: The program's own meter. It starts again at the first measured step.
        first: Steps before those that are measured.
        count: Steps that are measured.
        device: Device on which they are computed.
    """

    def __init__(self, throughput: Throughput, first: int, count: int, device: torch.device) -> None:
        self.throughput = throughput
        self.first = first
        self.count = count
        self.device = device
        self.watch = Stopwatch(device, "optimiser")
        self.interrupted = False
        self.begun = self.validation_begun = 0.0
        self.frames = 0
        self.wall_s = 0.0
        self.validation_s = 0.0
        self.compile_s = 0.0
        self.peak_bytes = 0

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time the features as a part of their own. Count memory from here on: CUDA graphs take it when they are recorded."""
        assert isinstance(pl_module, MaskedAcousticModel)
        pl_module.model.features.register_forward_pre_hook(lambda *_: self.watch.mark("between"))
        pl_module.model.features.register_forward_hook(lambda *_: self.watch.mark("features"))
        self._reset_peak()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is on its way to the device."""
        if batch_idx in (0, self.first):
            self.begun = self._now()
        if batch_idx == self.first:
            self.throughput.load_state_dict({"frames": 0, "seconds": 0.0})
            self.throughput.on_train_start(trainer, pl_module)
            self.watch.begin()
        self.watch.mark("between")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The loss is known."""
        self.watch.mark("forward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The gradients are known."""
        self.watch.mark("backward")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """The step is done."""
        if batch_idx == 0:
            self.compile_s = self._now() - self.begun
        if not self.watch.running:
            return
        self.watch.mark("optimiser")
        features = pl_module.model.features  # type: ignore[union-attr]
        self.frames += int((features.num_tokens(batch["lengths"]) * features.stack).sum())  # type: ignore[union-attr, operator]
        if batch_idx == self.first + self.count - 1:
            self.wall_s = self._now() - self.begun
            self._note_peak()
            self.watch.stop()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out the time and the memory of validation."""
        self.interrupted = self.watch.running
        if self.interrupted:
            self._note_peak()
        self.watch.stop()
        self.validation_begun = self._now()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on."""
        self.validation_s = self._now() - self.validation_begun
        if self.interrupted:
            self._reset_peak()
            self.watch.begin()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _note_peak(self) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))


def run_program(
    module: MaskedAcousticModel, trainer: pl.Trainer, cfg: DictConfig, num_frames: int, compiled: bool, clock: ProgramClock
) -> None:
    """Pre-train as ``audiot pretrain`` does, beside a clock.

    Args:
        module: Module of the config.
        trainer: Trainer of the config, of whose callbacks the clock becomes the first.
        cfg: Config of ``audiot pretrain``.
        num_frames: Frames of the encoder that every crop must have.
        compiled: Whether the step is compiled.
        clock: Clock that measures it.

    Raises:
        ValueError: the program crops to another number of frames.
    """
    corpus = open_corpus(cfg)
    features = module.model.features
    lengths = crop_lengths(features, cfg.data.crop_s, cfg.data.num_lengths)
    if lengths is not None and lengths[-1] != features.num_samples(num_frames):
        cropped = features.num_tokens(lengths[-1])
        raise ValueError(f"the program crops to {cropped} frames: set that, a multiple of 64 (of 8 below 512)")
    data = open_data(cfg, module, corpus)
    if compiled:
        module.compile_step(graphs=wants_graphs(trainer))
    trainer.callbacks.insert(0, clock)  # type: ignore[attr-defined]
    try:
        trainer.fit(module, data)
    except Interrupted as stop:  # its checkpoint goes away with the folder
        raise KeyboardInterrupt from stop


def meter(trainer: pl.Trainer) -> Throughput:
    """The callback of a Trainer that measures its throughput."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, Throughput))
