"""Probing and fine-tuning as a LightningModule: upstream → layer selection → head → objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from audiot.base.devices import attention_of_any_shape
from audiot.base.parts import make
from audiot.base.streams import key, seed_torch
from audiot.data.batches import Batch
from audiot.downstream.heads import LayerSelection
from audiot.downstream.objectives import Objective
from audiot.downstream.upstream import rebuild
from audiot.training.accumulation import WeightedSteps
from audiot.training.optimization import configure_from
from audiot.training.saved import Saved


class DownstreamModule(WeightedSteps, Saved):
    """A model of a speech task over an upstream's hidden states.

    Args:
        upstream: ``config`` of an upstream (see :mod:`audiot.downstream.upstream`). Load its weights into ``self.upstream``.
        head: Config of the head without ``input_dim``, ``num_outputs`` and ``stack``, which are added here.
        objective: Config of the objective without ``classes``, which is added here.
        classes: Label names.
        layers: Hidden states that the head reads, as `LayerSelection` takes them.
        train_encoder: Whether to fine-tune the upstream. Otherwise it is frozen and in evaluation mode.
        top_layers: Number of upper layers to fine-tune; None means all layers.
        optimizer, scheduler: Configs, as plain dicts.
        seed: Seed of the dropout.
    """

    SETTINGS = ("upstream", "head", "objective", "classes")
    COMMAND = "finetune"
    SIZES = ("data.batch_s", "data.max_utterances")

    def __init__(
        self,
        upstream: Mapping[str, Any],
        head: Mapping[str, Any],
        objective: Mapping[str, Any],
        classes: list[str],
        layers: str | int | Sequence[int],
        train_encoder: bool,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        top_layers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.upstream = rebuild(upstream)
        self.stack = self.upstream.stack
        self.layers = LayerSelection(layers, self.upstream.num_states)
        self.objective: Objective = make(objective, classes=classes)
        width, outputs = self.upstream.state_dim, self.objective.num_outputs
        self.head: nn.Module = make(head, input_dim=width, num_outputs=outputs, stack=self.stack)
        self.objective.begin(self.head)
        self.trained = self._trained(train_encoder, top_layers)
        self.upstream.requires_grad_(False)
        for part in self.trained:
            part.requires_grad_(True)
        self.train()  # Lightning's fit does not call it

    @property
    def sample_rate(self) -> int:
        """Samples per second of the waveforms."""
        return int(self.upstream.features.sample_rate)

    def _trained(self, train_encoder: bool, top_layers: int | None) -> list[nn.Module]:
        """Parts of the upstream that are fine-tuned."""
        if top_layers is None:
            return [self.upstream] if train_encoder else []
        if not train_encoder:
            raise ValueError(f"downstream.top_layers={top_layers} says what to fine-tune: set downstream.train_encoder=true")
        return self.upstream.top(top_layers)

    def train(self, mode: bool = True) -> DownstreamModule:
        """Set training mode. Frozen parts of the upstream stay in evaluation mode."""
        super().train(mode)
        self.upstream.eval()
        for part in self.trained:
            part.train(mode)
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout from the seed and the batch's position alone."""
        seed_torch(key("dropout", self.hparams["seed"], *batch["position"]), self.device)

    def picked_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The chosen hidden states (chosen, B, T, d) and lengths (B,), from the batch if cached, else from the upstream."""
        if "hidden" in batch:
            return batch["hidden"], batch["lengths"]
        with attention_of_any_shape(), torch.set_grad_enabled(bool(self.trained) and torch.is_grad_enabled()):
            hidden, lengths = self.upstream(batch["waveforms"], batch["lengths"])
        return self.layers.pick(hidden), lengths

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs of the head, (B, frames, C) or (B, C), and lengths (B,) in frames."""
        picked, lengths = self.picked_states(batch)
        return self.head(self.layers(picked), lengths), lengths * self.stack

    def frames(self, batch: Batch) -> int:
        """Number of spectrogram frames in a batch, without padding."""
        lengths = batch["lengths"] if "hidden" in batch else self.upstream.features.num_tokens(batch["lengths"])
        return int(lengths.sum()) * self.stack

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of the objective."""
        outputs, lengths = self(batch)
        return self.weighted(self.objective.loss(outputs, lengths, batch), batch_idx)

    def log_loss(self, loss: Tensor) -> None:
        """Log the objective's loss over all batches of a step."""
        self.log("train/loss", loss, prog_bar=True)

    def on_validation_epoch_start(self) -> None:
        """Reset the objective's measurements."""
        self.objective.reset("valid")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch."""
        outputs, lengths = self(batch)
        self.objective.update(outputs, lengths, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        values = self.objective.compute()
        # Every process has the metrics of all. Without sync_dist=True, Lightning would warn about values of single processes.
        self.log_dict({f"valid/{name}": value for name, value in values.items()}, sync_dist=True)
        first = next(iter(values))
        self.log(f"valid_{first}", values[first], prog_bar=True, logger=False, sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """Reset the objective's measurements."""
        self.objective.reset("test")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch."""
        outputs, lengths = self(batch)
        self.objective.update(outputs, lengths, batch)

    def on_test_epoch_end(self) -> None:
        """Log the metrics. The measurements stay available to the caller."""
        self.log_dict({f"test/{name}": value for name, value in self.objective.compute().items()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule over ``trainer.max_steps``."""
        return configure_from(self, self.hparams, self.trainer.estimated_stepping_batches)
