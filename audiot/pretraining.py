"""Masked acoustic modelling as a LightningModule: corrupt, encode, reconstruct."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor
from torchmetrics import MeanMetric

from audiot.base.config import plain
from audiot.base.console import say
from audiot.base.devices import attention_of_any_shape
from audiot.base.parts import make, named
from audiot.base.private import compile_ddp_whole
from audiot.base.streams import key, seed_torch
from audiot.checkpoint import AudioEncoder, load_encoder
from audiot.data.batches import Batch, crop_lengths
from audiot.data.datamodule import SpeechDataModule
from audiot.data.opening import data_options
from audiot.data.prepare import PreparedCorpus
from audiot.model import length_mask
from audiot.objectives.corruption import Corruption
from audiot.objectives.reconstruction import ReconstructionHead, interpolate_masked, masked_l1
from audiot.training.accumulation import Mean, WeightedSteps
from audiot.training.fsdp import full_tensor, gather, is_sharded, release, shard
from audiot.training.optimization import configure_from
from audiot.training.saved import Saved


class MaskedAcousticModel(WeightedSteps, Saved):
    """Pre-train an encoder by reconstructing what was corrupted (Mockingjay, TERA, AudioALBERT).

    Args:
        features, model, objective, optimizer, scheduler: Configs, as plain dicts.
        seed: Seed of the dropout. The seed of the masks comes with the batches.
    """

    SETTINGS = ("features", "model", "objective")
    COMMAND = "pretrain"

    def __init__(
        self,
        features: Mapping[str, Any],
        model: Mapping[str, Any],
        objective: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AudioEncoder(features, model)
        self.head = ReconstructionHead(self.model.encoder.embed_dim, self.model.features.output_dim)
        self.objective: Corruption = make(objective)
        self.stack = self.model.features.stack
        self.trained_steps = 0  # optimiser steps of a loaded checkpoint
        self._graphs = False
        self._loss: Callable[[Tensor, Tensor, Tensor, Tensor | None], Mean] = self.loss
        names = ("val_l1", "zero_l1", "interpolation_l1")
        # MeanMetric would skip a NaN loss. With nan_strategy=nan the mean becomes NaN. ("disable" would ignore the weights.)
        self.validation_metrics = torch.nn.ModuleDict({name: MeanMetric(nan_strategy=float("nan")) for name in names})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how far the checkpoint was trained.

        Raises:
            ValueError: the checkpoint has another model.
        """
        self.trained_steps = checkpoint["global_step"]
        if not checkpoint.get("MixedPrecision", True):  # bfloat16 saves no loss scale; float16 starts with a new one
            del checkpoint["MixedPrecision"]
        theirs, ours = checkpoint.get("state_dict"), self.state_dict()  # None: `ShardedStrategy` has loaded it
        if theirs is None or {name: value.shape for name, value in theirs.items()} == {n: v.shape for n, v in ours.items()}:
            return
        saved, ours_named = checkpoint.get("hyper_parameters", {}), named(dict(self.hparams))
        apart = [
            f"{part}.{name}={value} (the checkpoint has {saved[part].get(name)})"
            for part in ("features", "model")
            for name, value in ours_named[part].items()
            if part in saved and saved[part].get(name) != value
        ]
        raise ValueError(f"the checkpoint is of another model: {', '.join(apart) or 'its parameters have other names or shapes'}")

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of every layer, as `AudioEncoder` returns them."""
        return self.model(waveforms, lengths)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout from the seed and the batch's position alone, so that a resumed run repeats it."""
        seed_torch(key("dropout", self.hparams["seed"], *batch["position"]), self.device)

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens, num_tokens = self.model.features(batch["waveforms"], batch["lengths"])
        valid = length_mask(num_tokens, tokens.shape[1], tokens.device)
        # Stacked frames that were cropped have unusual strides, and each new layout of strides would be compiled again.
        return tokens.contiguous(), num_tokens.to(tokens.device, non_blocking=True), valid

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """L1 loss of the reconstruction on the corrupted elements."""
        tokens, lengths, valid = self._features(batch)
        return self.weighted(self.step_loss(tokens, lengths, batch["keys"], valid), batch_idx)

    def log_loss(self, loss: Tensor) -> None:
        """Log the L1 over all batches of a step."""
        self.log("pretrain/train_l1", loss)

    def loss(self, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None) -> Mean:
        """Corrupt a batch and score its reconstruction. `compile_step` compiles this method.

        Args:
            tokens: Features (B, T, C).
            lengths: Valid frames of each utterance (B,), on the features' device.
            keys: Random keys (B,), on the features' device.
            valid: Mask, bool (B, T); None where nothing is padded.
        """
        corrupted = self.objective(tokens, lengths, keys, self.stack)
        hidden = self.model.encoder(corrupted.features, valid)[-1]
        if corrupted.elements is None:
            prediction, target, weight = self._masked_frames(hidden, tokens, corrupted.frames)
        else:
            prediction, target, weight = self.head(hidden), tokens, corrupted.elements
        return masked_l1(prediction, target, weight)

    def step_loss(self, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None) -> Mean:
        """`loss`, compiled if `compile_step` was called."""
        if not self._graphs:
            return self._loss(tokens, lengths, keys, valid)
        torch.compiler.cudagraph_mark_step_begin()
        value, count = self._loss(tokens, lengths, keys, valid)
        return Mean(value.clone(), count.clone())  # copies, because the next step overwrites the graph's memory

    def compile_step(self, graphs: bool = False) -> None:
        """Compile `loss` with `torch.compile` for training. Validation is not compiled.

        The first shape gets its own graph. The second shape gets a graph for any batch size and length. Mechanisms whose graph
        depends on the length get one graph per length, of which there are few (`data.num_lengths`).

        Args:
            graphs: Whether to replay each shape as a CUDA graph, which leaves the host almost nothing to do. Gradients then lie
                in the graph's memory and cannot be accumulated over batches.
        """
        self._graphs = graphs
        compile_ddp_whole()
        from audiot.training.compilation import compiled  # imports the compiler

        self._loss = compiled(self.loss, graphs)

    def _masked_frames(self, hidden: Tensor, tokens: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predict masked frames only. Their maximal number follows from the shape, so no device synchronisation is needed."""
        num_frames = tokens.shape[1]
        count = self.objective.max_masked(num_frames)
        # Masked frames first, in order of time. topk over distinct ranks replaces a sort: Inductor's code for a sort is slow.
        rank = frames.int() * num_frames - torch.arange(num_frames, device=frames.device, dtype=torch.int32)
        index = rank.topk(count, dim=1, sorted=True).indices
        chosen = frames.gather(1, index)[..., None]
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        target = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
        return self.head(hidden), target, chosen

    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruct a validation batch with every span zeroed.

        Returns:
            ``target``, ``corrupted``, ``prediction``, ``interpolation``: (B, T · stack, channels);
            ``masked``: bool (B, T · stack); ``lengths``: (B,) in spectrogram frames.
        """
        tokens, lengths, valid = self._features(batch)
        corrupted = self.objective.zero_out(tokens, lengths, batch["keys"])
        with attention_of_any_shape():  # whole utterances
            prediction = self.head(self.model.encoder(corrupted.features, valid)[-1]).float()
        masked = corrupted.frames.repeat_interleave(self.stack, dim=1)
        target = self.model.features.unstack(tokens)
        return {
            "target": target,
            "corrupted": self.model.features.unstack(corrupted.features),
            "prediction": self.model.features.unstack(prediction),
            "interpolation": interpolate_masked(target, masked, lengths * self.stack),
            "masked": masked,
            "lengths": lengths * self.stack,
        }

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the L1 on masked frames of the model and of two trivial reconstructions: zeros and linear interpolation."""
        view = self.reconstruct(batch)
        masked = view["masked"]
        guesses = {
            "val_l1": view["prediction"],
            "zero_l1": torch.zeros_like(view["target"]),
            "interpolation_l1": view["interpolation"],
        }
        for name, guess in guesses.items():
            metric = self.validation_metrics[name]
            assert isinstance(metric, MeanMetric)
            metric.update(masked_l1(guess, view["target"], masked[..., None]).value, weight=masked.sum())

    def on_validation_epoch_end(self) -> None:
        """Log means over all processes. Every process must take part, even one without batches."""
        for name, metric in self.validation_metrics.items():
            assert isinstance(metric, MeanMetric)
            self.log(f"pretrain/{name}", metric, prog_bar=name == "val_l1")

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the trainer says. Log the norm before clipping every ``log_every_n_steps``."""
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            self.log("pretrain/gradient_norm", full_tensor(torch.nn.utils.get_total_norm(gradients)))
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    def configure_model(self) -> None:
        """Shard the parameters among the processes under `audiot.training.fsdp.ShardedStrategy`."""
        if self.device_mesh is not None and not is_sharded(self):
            shard(self.model.encoder, self.head, self.device_mesh["data_parallel"])

    def on_validation_start(self) -> None:
        """Gather all parameters. Processes may have different numbers of batches, and only one draws pictures."""
        gather(self)

    def on_validation_end(self) -> None:
        """Shard the parameters again for training."""
        release(self)

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule over ``trainer.max_steps``."""
        return configure_from(self, self.hparams, self.trainer.estimated_stepping_batches)


def build(cfg: DictConfig) -> MaskedAcousticModel:
    """The module for a config: new, or started from the exported encoder ``cfg.init`` with its features and model."""
    options = {name: plain(cfg[name]) for name in ("objective", "optimizer", "scheduler")} | {"seed": cfg.seed}
    if not cfg.init:
        return MaskedAcousticModel(plain(cfg.features), plain(cfg.model), **options)
    start = load_encoder(cfg.init)
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for override in given:
        if re.match("(features|model|attention|positions)[.=]", override):
            raise ValueError(f"{override} has no effect: init={cfg.init} brings its own features and model; drop one of them")
    module = MaskedAcousticModel(start.config["features"], start.config["model"], **options)
    start = load_encoder(cfg.init, head=module.head)
    module.model.load_state_dict(start.state_dict())
    say(f"init    {cfg.init}, with its features and model")
    return module


def open_data(cfg: DictConfig, module: MaskedAcousticModel, corpus: PreparedCorpus) -> SpeechDataModule:
    """Open the batches for pre-training. Fit the global statistics of the features if they have none yet."""
    features = module.model.features
    lengths = crop_lengths(features, cfg.data.crop_s, cfg.data.num_lengths)
    data = SpeechDataModule(corpus, "pretrain", crop_s=cfg.data.crop_s, lengths=lengths, **data_options(cfg))
    if features.cmvn == "global" and not cfg.init:
        features.fit((batch["waveforms"], batch["lengths"]) for batch in data.ordered_loader("train"))
    return data
