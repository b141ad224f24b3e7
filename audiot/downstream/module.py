"""Probing and fine-tuning as a LightningModule: upstream → layer selection → head → cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from audiot.data.batches import Batch
from audiot.data.labels import IGNORED
from audiot.downstream.heads import LayerSelection
from audiot.downstream.upstream import rebuild
from audiot.optimization import configure
from audiot.random import key


class DownstreamModule(pl.LightningModule):
    """A classifier over an upstream's hidden states.

    Args:
        upstream: ``config`` of an upstream (see :mod:`audiot.downstream.upstream`); load its weights into ``self.upstream``.
        head: Config of the head; ``input_dim``, ``num_classes`` and ``stack`` are given to it here.
        classes: Label names.
        layers: ``last`` or ``weighted_sum``.
        train_encoder: Fine-tune the upstream; else it is frozen and in evaluation mode.
        optimizer, scheduler: Configs, as plain dicts.
        seed: Of dropout.
    """

    def __init__(
        self,
        upstream: Mapping[str, Any],
        head: Mapping[str, Any],
        classes: list[str],
        layers: str,
        train_encoder: bool,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.upstream = rebuild(upstream)
        self.train_encoder = train_encoder
        self.stack = self.upstream.stack
        self.layers = LayerSelection(layers, self.upstream.num_states)
        self.head: nn.Module = instantiate(head, input_dim=self.upstream.state_dim, num_classes=len(classes), stack=self.stack)
        self.upstream.requires_grad_(train_encoder)
        self.train()  # Lightning's fit doesn't call it
        count = len(classes)
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro", ignore_index=IGNORED),
                "macro_f1": MulticlassF1Score(count, average="macro", ignore_index=IGNORED),
            }
        )
        self.valid_metrics = metrics.clone(prefix="valid/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.confusion = MulticlassConfusionMatrix(count, ignore_index=IGNORED)

    def train(self, mode: bool = True) -> DownstreamModule:
        """Training mode, which leaves a frozen upstream in evaluation mode."""
        super().train(mode)
        self.upstream.train(mode and self.train_encoder)
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout of a batch is drawn from the seed and the batch alone."""
        torch.manual_seed(key("dropout", self.hparams["seed"], *batch["position"]))

    def hidden_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states (layers + 1, B, T, d) and lengths (B,): those kept from before, or the upstream's."""
        if "hidden" in batch:
            return batch["hidden"], batch["lengths"]
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            return self.upstream(batch["waveforms"], batch["lengths"])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores (B, frames, classes) or (B, classes), and lengths (B,) in hidden states."""
        hidden, lengths = self.hidden_states(batch)
        return self.head(self.layers(hidden), lengths), lengths

    def _scores_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores (items, classes) in float32 and labels (items,)."""
        scores, lengths = self(batch)
        labels = batch["labels"]
        if labels.ndim == 2:
            num_frames = scores.shape[1]
            labels = nn.functional.pad(labels, (0, max(0, num_frames - labels.shape[1])), value=IGNORED)[:, :num_frames]
            # Frames left over when frames are stacked have no hidden state of their own.
            ends = (lengths * self.stack).to(labels.device, non_blocking=True)[:, None]
            labels = labels.masked_fill(torch.arange(num_frames, device=labels.device) >= ends, IGNORED)
        return scores.flatten(0, -2).float(), labels.flatten()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy over labelled frames or utterances."""
        loss = nn.functional.cross_entropy(*self._scores_and_labels(batch), ignore_index=IGNORED)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and macro F1."""
        self.valid_metrics.update(*self._scores_and_labels(batch))

    def on_validation_epoch_end(self) -> None:
        """Log and reset the metrics."""
        values = self.valid_metrics.compute()
        self.log_dict(values)
        self.log("valid_accuracy", values["valid/accuracy"], prog_bar=True, logger=False)
        self.valid_metrics.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy, macro F1 and the confusion matrix."""
        scores, labels = self._scores_and_labels(batch)
        self.test_metrics.update(scores, labels)
        self.confusion.update(scores, labels)

    def on_test_epoch_end(self) -> None:
        """Log the metrics; the confusion matrix stays for the caller."""
        self.log_dict(self.test_metrics.compute())
        self.test_metrics.reset()

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule over ``trainer.max_steps``."""
        return configure(
            self,
            instantiate(self.hparams["optimizer"]),
            instantiate(self.hparams["scheduler"]),
            self.hparams["optimizer"].get("weight_decay", 0.0),
            self.trainer.estimated_stepping_batches,
        )
