"""One training as one process that adds up batches, as two processes, and as two with loader processes. As a program: a rank.

Usage: ``python layouts.py FOLDER CORPUS DEVICE RANK``.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from conftest import TINY
from pytorch_lightning.callbacks import Callback
from unequal_batches import STRATEGIES, objective_config, silent_trainer, whole

from audiot.data.batches import crop_lengths
from audiot.data.datamodule import SpeechDataModule
from audiot.data.labels import FrameLabels, PhoneSequence
from audiot.data.prepare import PreparedCorpus
from audiot.downstream.cache import CachedStates
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import random_encoder
from audiot.pretraining import MaskedAcousticModel, fit_statistics
from audiot.training.callbacks import ConsumedBatches

LAYOUTS = {  # processes, loader processes of each
    "one process": (1, 0),
    "two processes": (2, 0),
    "two processes with workers": (2, 2),
}
HEARD = ("waveforms", "hidden")
STEPS = {torch.float64: 1, torch.float32: 32}


def pretraining(objective, corpus, dtype, workers):
    """Module and data of a pre-training."""
    torch.manual_seed(0)
    module = MaskedAcousticModel(**TINY | {"objective": objective_config(objective)}, seed=5)
    lengths = crop_lengths(module.model.features, 2.5, 3)
    loading = {"batch_s": 5.0, "crop_s": 2.5, "lengths": lengths, "num_buckets": 2}
    fit_statistics(module, SpeechDataModule(corpus, "pretrain", num_workers=0, **loading), torch.device("cpu"))
    return module.to(dtype), SpeechDataModule(corpus, "pretrain", num_workers=workers, **loading)


def tuning(task, labels, objective, corpus, dtype, workers, cached=False):
    """Module and data of the fine-tuning of an encoder, or of a probe on its states, whose validation is one batch."""
    upstream = random_encoder(0, features=TINY["features"], model=TINY["model"])
    options = {"labels": labels(features=upstream.features), "batch_s": 10.0, "num_buckets": 2, "num_workers": workers}
    data = SpeechDataModule(corpus, task, **options)
    torch.manual_seed(1)
    module = DownstreamModule(
        upstream=upstream.config,
        head={"_target_": "audiot.downstream.heads.FrameClassifier"},
        objective=objective,
        classes=data.classes,
        layers="weighted_sum",
        train_encoder=not cached,
        seed=5,
        **{name: TINY[name] for name in ("optimizer", "scheduler")},
    )
    module.upstream.load_state_dict(upstream.state_dict())
    if cached:
        states = CachedStates(data, module.upstream, torch.device("cpu"), layers=module.layers, batch_size=6)
        return module.to(dtype), states
    return module.to(dtype), data


PHONES = (partial(FrameLabels, tier="phone"), {"_target_": "audiot.downstream.objectives.Classification"})
KINDS = {
    **{name: partial(pretraining, name) for name in ("mockingjay", "clusters", "best_rq", "self_distillation")},
    "phones of frames": partial(tuning, "phone", *PHONES),
    "phones of frames with cached states": partial(tuning, "phone", *PHONES, cached=True),
    "sequences of phones": partial(
        tuning,
        "phone_recognition",
        partial(PhoneSequence, tier="phone"),
        {"_target_": "audiot.downstream.ctc.CTC", "unit": "phone"},
    ),
}


class Record(Callback):
    """The loss of each step, the size of each batch and the metrics of each validation."""

    def __init__(self):
        self.losses, self.sizes, self.positions, self.validations, self.validated = [], [], [], [], 0
        self.gradients = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sizes.append(next(tuple(batch[name].shape) for name in HEARD if name in batch))
        self.positions.append(tuple(batch["position"]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append(float(pl_module.latest_loss))
            named = pl_module.named_parameters()
            self.gradients = {name: whole(each.grad).cpu().clone() for name, each in named if each.grad is not None}

    def on_validation_batch_end(self, *_, **__):
        self.validated += 1

    def on_validation_end(self, trainer, pl_module):
        names = [name for name in trainer.callback_metrics if name.startswith(("valid/", "pretrain/val", "pretrain/teacher"))]
        self.validations.append({name: float(trainer.callback_metrics[name]) for name in names})


class In(Callback):
    """Batches of a precision."""

    def __init__(self, dtype):
        self.dtype = dtype

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch |= {name: batch[name].to(self.dtype) for name in HEARD if name in batch}

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)


def train(kind, layout, dtype, steps, corpus, device, folder):
    """Losses, validations, parameters, buffers and gradients of a training."""
    processes, workers = LAYOUTS[layout]
    module, data = KINDS[kind](corpus, dtype, workers)
    record, per_step = Record(), 2 // processes
    several = {"devices": processes, "strategy": STRATEGIES["ddp"]()} if processes > 1 else {"devices": 1}
    trainer = silent_trainer(
        accelerator=device,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=per_step,
        val_check_interval=per_step * max(1, steps // 2),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=5.0,
        default_root_dir=folder,
        callbacks=[In(dtype), record, *([ConsumedBatches()] if isinstance(data, SpeechDataModule) else [])],
        **several,
    )
    trainer.fit(module, data)
    return {
        "losses": record.losses,
        "sizes": record.sizes,
        "positions": record.positions,
        "validated": record.validated,
        "validations": record.validations,
        "gradients": record.gradients,
        "state": {name: whole(each).cpu() for name, each in module.state_dict().items()},
    }


def all_of(layout, corpus, device, folder, kinds=KINDS, steps=STEPS):
    return {
        (kind, dtype): train(kind, layout, dtype, count, corpus, device, folder)
        for kind in kinds
        for dtype, count in steps.items()
    }


def main(folder, corpus, device, rank):
    """Train as one of two ranks, in every layout of two, and store what came of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    prepared = PreparedCorpus.load(Path(corpus))
    layouts = [layout for layout, (processes, _) in LAYOUTS.items() if processes == 2]
    torch.save({layout: all_of(layout, prepared, device, folder) for layout in layouts}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
