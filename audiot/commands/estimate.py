"""How long a training will take, from a few of its real steps on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, open_dict

from audiot.base.devices import is_cuda, synchronise
from audiot.commands.finetune import new_module, task_data
from audiot.commands.tune import SHORT, begin
from audiot.data.batches import Batch
from audiot.data.datamodule import SpeechDataModule
from audiot.data.prepare import ROLES, PreparedCorpus
from audiot.downstream.cache import CachedStates
from audiot.downstream.upstream import FeaturesUpstream, Upstream
from audiot.training.trainer import make_trainer
from audiot.training.tuning import StepTimes

WARMUP = {False: 2, True: 20}  # steps before those that are timed; on a GPU: True, where the first ones of each shape take long
FORWARD = 1 / 3  # share of a step that validates as much audio
SAMPLED = 64  # utterances whose hidden states are computed to time that


class Some:
    """A few utterances of a data module, in its place where hidden states are computed.

    Args:
        data: The data module.
        count: Number of utterances of each role.
    """

    def __init__(self, data: SpeechDataModule, count: int) -> None:
        self.data, self.count, self.seconds = data, count, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def ordered_loader(self, role: str) -> Iterator[Batch]:
        """Batches of so many utterances."""
        for batch in self.data.some(role, self.count):
            self.seconds += float(batch["lengths"].sum()) / self.data.corpus.sample_rate
            yield batch


def pretraining_s(cfg: DictConfig, corpus: PreparedCorpus, steps: int) -> float:
    """Seconds that a pre-training will take.

    Args:
        cfg: Its config.
        corpus: The corpus.
        steps: Number of steps that are timed.
    """
    started = time.monotonic()
    cfg = _short(cfg)
    trainer = _short_trainer(cfg, steps)
    module, data = begin(cfg, corpus, cfg.seed)
    before = time.monotonic() - started  # which the training will take again
    step_s = _timed(trainer, module, data, steps)
    valid_s = 3600 * corpus.hours[corpus.split_for("pretrain", "valid")]
    return before + _whole(cfg, step_s, valid_s)


def finetuning_s(cfg: DictConfig, upstream: Upstream, corpus: PreparedCorpus, steps: int) -> float:
    """Seconds that a training on labels, with its test, will take.

    Args:
        cfg: Its config.
        upstream: Its upstream, or one of the same shape.
        corpus: The corpus.
        steps: Number of steps that are timed.
    """
    started = time.monotonic()
    cfg = _short(cfg)
    pl.seed_everything(cfg.seed, verbose=False)
    trainer = _short_trainer(cfg, steps)
    data = task_data(cfg, corpus, upstream.features)
    if isinstance(upstream, FeaturesUpstream):
        upstream.fit((batch["waveforms"], batch["lengths"]) for batch in data.ordered_loader("train"))
    module = new_module(cfg, upstream, data.classes)
    before = time.monotonic() - started
    hours = {role: corpus.hours[corpus.split_for(cfg.downstream.task, role)] for role in ROLES}
    task = cfg.downstream
    if not task.cache or task.train_encoder:
        step_s = _timed(trainer, module, data, steps)
        test_s = FORWARD * step_s * 3600 * hours["test"] / cfg.data.batch_s
        return before + _whole(cfg, step_s, 3600 * hours["valid"]) + test_s
    some, device = Some(data, SAMPLED), trainer.strategy.root_device
    started = time.monotonic()
    source = CachedStates(some, module.upstream, device, layers=module.layers, batch_size=task.batch_size)  # type: ignore[arg-type]
    synchronise(device)
    computed_s = (time.monotonic() - started) * 3600 * sum(hours.values()) / max(1e-6, some.seconds)
    return before + computed_s + _whole(cfg, _timed(trainer, module, source, steps), 0.0)


def _short(cfg: DictConfig) -> DictConfig:
    """The config of a training that keeps nothing."""
    changed = cfg.copy()
    with open_dict(changed):
        changed.callbacks, changed.logger = {}, {}
    return changed


def _short_trainer(cfg: DictConfig, steps: int) -> pl.Trainer:
    """A trainer of so many steps after those that are not timed."""
    return make_trainer(cfg, **SHORT, max_steps=WARMUP[is_cuda(cfg.trainer.accelerator)] + steps)


def _timed(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, steps: int) -> float:
    """Seconds of a step."""
    times = StepTimes((trainer.max_steps - steps) * trainer.accumulate_grad_batches)
    trainer.callbacks.append(times)  # type: ignore[attr-defined]
    with torch.enable_grad():
        trainer.fit(module, data)
    data.trainer = None
    return times.seconds / steps


def _whole(cfg: DictConfig, step_s: float, valid_s: float) -> float:
    """Seconds of all steps and validations, of so many seconds of audio each."""
    validations = 1 + cfg.trainer.max_steps // cfg.trainer.val_check_interval
    return step_s * (cfg.trainer.max_steps + validations * FORWARD * valid_s / cfg.data.batch_s)


def in_words(seconds: float) -> str:
    """A time in words, with two digits that count."""
    if seconds < 90:
        return f"{max(1, round(seconds, -1 if seconds > 20 else 0)):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.2g} h"
