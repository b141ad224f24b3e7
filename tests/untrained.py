"""Runs of fine-tuning for tests, of an untrained model: a folder for each kind of task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import random_encoder

HEADS = "audiot.downstream.heads."
CLASSES = ["down", "left", "stop", "up"]
TASKS = {  # head, objective, classes
    "keyword": (
        {"_target_": HEADS + "UtteranceClassifier"},
        {"_target_": "audiot.downstream.objectives.Classification"},
        CLASSES,
    ),
    "phone": ({"_target_": HEADS + "FrameClassifier"}, {"_target_": "audiot.downstream.objectives.Classification"}, CLASSES),
    "asr": ({"_target_": HEADS + "FrameClassifier"}, {"_target_": "audiot.downstream.ctc.CTC", "unit": "phone"}, CLASSES),
    "intent": (
        {"_target_": HEADS + "UtteranceClassifier"},
        {"_target_": "audiot.downstream.objectives.Slots", "fields": ["what", "where"]},
        ["what=lamp", "what=music", "where=bath", "where=hall"],
    ),
    "verification": (
        {"_target_": HEADS + "UtteranceClassifier"},
        {"_target_": "audiot.downstream.verification.Verification", "embedding_dim": 5},
        CLASSES,
    ),
}


def write_runs(tiny: dict[str, Any], folder: Path) -> Path:
    """The folder, with a run of each task in it; ``tiny`` has the configs of the model."""
    upstream = random_encoder(0, features=tiny["features"], model=tiny["model"])
    for number, (task, (head, objective, classes)) in enumerate(TASKS.items()):
        torch.manual_seed(number)
        module = DownstreamModule(
            upstream.config, head, objective, classes, "weighted_sum", False, tiny["optimizer"], tiny["scheduler"]
        )
        module.upstream.load_state_dict(upstream.state_dict())
        nn.init.normal_(module.head.linear.weight)  # spread the guesses
        save(module, folder / task)
    return folder


def save(module: DownstreamModule, run: Path) -> None:
    """The Lightning checkpoint that `audiot finetune` writes for a module."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(run / "checkpoints" / "best.ckpt")
