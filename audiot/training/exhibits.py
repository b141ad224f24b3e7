"""What loggers show beside numbers: pictures, audio and the config, in TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import soundfile
import yaml
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


class ShowConfig(Callback):
    """Show the whole config when training begins.

    Args:
        config: The config, resolved.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand it to the loggers."""
        if trainer.is_global_zero:
            show_config(trainer.loggers, self.config)


def show_config(loggers: Iterable[Logger], config: dict[str, Any]) -> None:
    """Show a config: a text in TensorBoard, the run's config in W&B, parameters in MLflow."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            lines = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).splitlines()
            logger.experiment.add_text("config", "\n".join(f"    {line}" for line in lines))  # code, in Markdown
        elif isinstance(logger, WandbLogger):
            logger.experiment.config.update(config, allow_val_change=True)
        elif isinstance(logger, MLFlowLogger):
            logger.log_hyperparams(config)


def show_picture(loggers: Iterable[Logger], path: Path, step: int) -> None:
    """Show a PNG under its name without the step; MLflow keeps the file."""
    from matplotlib.image import imread

    name = path.stem.partition("-step")[0]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, imread(path), step, dataformats="HWC")
            logger.experiment.flush()  # the last pictures come when the logger is closed, and nothing else would write them
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)])
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), "plots")


def show_audio(loggers: Iterable[Logger], waveform: np.ndarray, sample_rate: int, name: str, step: int) -> None:
    """Make an utterance audible.

    Args:
        loggers: The loggers.
        waveform: Samples (N,), float in [-1, 1].
        sample_rate: Sample rate in Hz.
        name: Id of the utterance.
        step: Step of the training.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_audio(name, waveform[None], step, sample_rate)
        elif isinstance(logger, WandbLogger):
            logger.log_audio("utterance", [waveform], sample_rate=[sample_rate], caption=[name])
        elif isinstance(logger, MLFlowLogger):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "utterance.wav"
                soundfile.write(path, waveform, sample_rate)
                logger.experiment.log_artifact(logger.run_id, str(path), "audio")
