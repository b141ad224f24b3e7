"""Masked acoustic modelling as a LightningModule: corrupt, encode, predict."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig
from torch import Tensor
from torchmetrics import MeanMetric

from audiot.base.config import plain
from audiot.base.console import say
from audiot.base.devices import attention_of_any_shape
from audiot.base.parts import make, named, parameters
from audiot.base.private import compile_ddp_whole
from audiot.base.streams import key, seed_torch
from audiot.checkpoint import AudioEncoder, check_sizes, check_tensors, load_encoder, load_objective
from audiot.data.batches import Batch, crop_lengths
from audiot.data.datamodule import SpeechDataModule
from audiot.data.opening import data_options
from audiot.data.prepare import PreparedCorpus
from audiot.layers import EncoderLayer
from audiot.model import length_mask
from audiot.objectives.objective import Objective, View
from audiot.training.accumulation import Mean, WeightedSteps
from audiot.training.fsdp import gather, is_sharded, release, shard
from audiot.training.optimization import configure_from
from audiot.training.saved import Saved, read_checkpoint, settings_of


class MaskedAcousticModel(WeightedSteps, Saved):
    """Pre-train an encoder by an objective: predict what is hidden from it.

    Args:
        features, model, objective, optimizer, scheduler: Configs, as plain dicts.
        seed: Seed of the dropout. The seed of the masks comes with the batches.
    """

    SETTINGS = ("features", "model", "objective")
    COMMAND = "pretrain"
    SIZES = ("data.batch_s", "data.crop_s")

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
        self.objective: Objective = make(objective, self.model, inside=False)
        self.objective_fitted = False  # its state was loaded
        self.trained_steps = 0  # optimiser steps of a loaded checkpoint
        self._graphs = False
        self._loss: Callable[..., Mean] = self.loss
        # MeanMetric would skip a NaN loss. With nan_strategy=nan the mean becomes NaN. ("disable" would ignore the weights.)
        self.validation_metrics = torch.nn.ModuleDict(
            {name: MeanMetric(nan_strategy=float("nan")) for name in self.objective.metrics}
        )

    @property
    def sample_rate(self) -> int:
        """Samples per second of the waveforms."""
        return self.model.features.sample_rate

    @property
    def monitor(self) -> str:
        """The validation loss as it is logged."""
        return f"pretrain/val_{self.objective.figure}"

    @classmethod
    def from_encoder(cls, path: Path, seed: int = 0, trusted: Collection[str] = ()) -> MaskedAcousticModel:
        """The module of an exported encoder and the objective beside it, in evaluation mode, on the CPU. It can't be trained on.

        Args:
            path: The encoder's folder (``RUN/encoder``).
            seed: Seed of the run.
            trusted: Packages from outside audiot whose parts its files may name.

        Raises:
            FileNotFoundError: there is no encoder.
            ValueError: its files are damaged, or no objective is beside it.
        """
        encoder = load_encoder(path, trusted)
        objective, state = load_objective(path, trusted)
        if not objective:
            raise ValueError(f"{path} has no objective.json: an encoder that pre-training exported has one")
        check_sizes(
            lambda: make(objective, encoder, inside=False),
            objective,
            {name: tuple(each.shape) for name, each in state.items()},
            path,
        )
        module = cls(encoder.config["features"], encoder.config["model"], objective, {}, {}, seed)
        module.model.load_state_dict(encoder.state_dict())
        module.objective.load_state_dict(state)
        return module.eval()

    @classmethod
    def translated(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with today's names: the reconstruction head once stood beside the corruption."""
        return {f"objective.{name}" if name.startswith("head.") else name: value for name, value in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how far the checkpoint was trained.

        Raises:
            ValueError: the checkpoint has another model.
        """
        steps = checkpoint.get("global_step")
        if type(steps) is not int or steps < 0:
            raise ValueError(f"the checkpoint's global_step is {str(steps)[:80]}: expected a number of steps")
        self.trained_steps = steps
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = self.translated(check_tensors(checkpoint["state_dict"], "the checkpoint"))
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

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Arguments of `loss` for a batch: what is computed before the compiled part of a step."""
        clean, lengths, mixing = batch["waveforms"], batch["lengths"], self.objective.mixing
        heard = mixing(clean, lengths, batch["keys"]) if mixing is not None and self.training else clean
        tokens, num_tokens = self.model.features(heard, lengths)
        valid = length_mask(num_tokens, tokens.shape[1], tokens.device)
        # Stacked frames that were cropped have unusual strides, and each new layout of strides would be compiled again.
        tokens = tokens.contiguous()
        source = self.objective.source(self.model, clean, lengths, tokens if heard is clean else None)
        return tokens, num_tokens.to(tokens.device, non_blocking=True), batch["keys"], valid, source

    def frames(self, batch: Batch) -> int:
        """Number of spectrogram frames in a batch, without padding."""
        features = self.model.features
        return int(features.num_tokens(batch["lengths"]).sum()) * features.stack

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of the objective."""
        return self.weighted(self.step_loss(*self.inputs(batch)), batch_idx)

    def log_loss(self, loss: Tensor) -> None:
        """Log the loss over all batches of a step every ``log_every_n_steps``."""
        if self._is_logged:
            self.log(f"pretrain/train_{self.objective.figure}", loss)

    def loss(self, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor | None = None) -> Mean:
        """Loss of the objective on a batch. `compile_step` compiles this method.

        Args:
            tokens: Features (B, T, C).
            lengths: Valid frames of each utterance (B,), on the features' device.
            keys: Random keys (B,), on the features' device.
            valid: Mask, bool (B, T); None where nothing is padded.
            source: What the targets are made of (B, T, …); None: the tokens.
        """
        return self.objective.loss(self.model, tokens, lengths, keys, valid, tokens if source is None else source)

    def step_loss(
        self, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor | None = None
    ) -> Mean:
        """`loss`, compiled if `compile_step` was called."""
        if not self._graphs:
            return self._loss(tokens, lengths, keys, valid, source)
        torch.compiler.cudagraph_mark_step_begin()
        value, count = self._loss(tokens, lengths, keys, valid, source)
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
        self.objective.compile_source()

    def compile_layers(self) -> None:
        """Compile every layer on its own for training, where processes fetch parameters between the layers.

        Layers that are alike share the compiled code. PyTorch compiles one function eight times at most.
        """
        from audiot.training.compilation import compiled  # imports the compiler

        compute = compiled(EncoderLayer.compute, False)
        encoder = self.model.encoder
        for layer in map(encoder.layer, range(len(encoder.layers))):
            layer.compiled = MethodType(compute, layer)

    def view(self, batch: Batch) -> View:
        """Targets and predictions of a validation batch, whose every masked span is hidden; see the objective's ``view``."""
        tokens, lengths, keys, valid, source = self.inputs(batch)
        with attention_of_any_shape():  # whole utterances
            return self.objective.view(self.model, tokens, lengths, keys, valid, tokens if source is None else source)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the objective's metrics, those of trivial predictions among them."""
        for name, mean in self.objective.measures(self.view(batch)).items():
            metric = self.validation_metrics[name]
            assert isinstance(metric, MeanMetric)
            metric.update(mean.value, weight=mean.scored)

    def on_validation_epoch_end(self) -> None:
        """Log means over all processes. Every process must take part, even one without batches."""
        for name, metric in self.validation_metrics.items():
            assert isinstance(metric, MeanMetric)
            self.log(f"pretrain/{name}", metric, prog_bar=f"pretrain/{name}" == self.monitor)

    def log_norm(self, norm: Tensor) -> None:
        """Log the norm of the gradient before clipping every ``log_every_n_steps``."""
        if self._is_logged:
            self.log("pretrain/gradient_norm", norm)

    @property
    def _is_logged(self) -> bool:
        """Whether the loggers take the figures of this step."""
        trainer = self._trainer
        return trainer is not None and (self.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def discard(self, skipped: Tensor) -> None:
        """Forget what the batches of a skipped step have left to mechanisms and to the objective."""
        super().discard(skipped)
        self.objective.discard(skipped)

    def configure_model(self) -> None:
        """Shard the parameters among the processes under `audiot.training.fsdp.ShardedStrategy`."""
        if self.device_mesh is not None and not is_sharded(self):
            others: list[tuple[torch.nn.Module, tuple[str, ...]]] = [(self.objective, ("loss", "source"))]
            if self.model.features.is_trained:
                others.append((self.model.features, ("embed",)))
            shard(self.model.encoder, others, self.device_mesh["data_parallel"])

    def on_validation_start(self) -> None:
        """Gather all parameters. Processes may have different numbers of batches, and only one draws pictures."""
        super().on_validation_start()
        gather(self)

    def on_validation_end(self) -> None:
        """Shard the parameters again for training."""
        release(self)

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule over ``trainer.max_steps``."""
        configured = configure_from(self, self.hparams, self.trainer.estimated_stepping_batches)
        configured["optimizer"].register_step_post_hook(lambda *_: self.objective.after_step(self.model))
        return configured


def build(cfg: DictConfig, teacher: Mapping[str, Any] | None = None) -> MaskedAcousticModel:
    """The module for a config: new, or started from the exported encoder ``cfg.init`` with its features and model.

    Args:
        cfg: Config of the command.
        teacher: Config of the upstream that the objective learns from, whose weights the caller loads.
    """
    options = {name: plain(cfg[name]) for name in ("objective", "optimizer", "scheduler")} | {"seed": cfg.seed}
    if "teacher" in options["objective"]:
        options["objective"] |= {"teacher": teacher}
    if cfg.init:
        return _started(cfg, options)
    return MaskedAcousticModel(plain(cfg.features), plain(cfg.model), **options)


def saved_teacher(checkpoint: Path, trusted: Collection[str] = ()) -> dict[str, Any] | None:
    """Config of the teacher in a checkpoint, which has its weights too; None: it has none."""
    objective = settings_of(read_checkpoint(checkpoint), checkpoint, trusted).get("objective", {})
    return objective.get("teacher")


def _started(cfg: DictConfig, options: dict[str, Any]) -> MaskedAcousticModel:
    """A module with the weights of ``cfg.init``, and with the state of its objective where that is the same one."""
    start = load_encoder(cfg.init, cfg.trusted)
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for override in given:
        if re.match("(features|model|attention|positions)[.=]", override):
            raise ValueError(f"{override} has no effect: init={cfg.init} brings its own features and model; drop one of them")
    saved, state = load_objective(cfg.init, cfg.trusted)
    ours = options["objective"]
    taken = ours | {"teacher": saved.get("teacher")} if "teacher" in ours and ours["teacher"] is None else ours
    goes_on = ours.get("teacher") is None and _same_targets(taken, saved)  # another teacher is another objective
    if goes_on:
        sizes = {name: tuple(value.shape) for name, value in state.items()}
        check_sizes(lambda: make(taken, start, inside=False), taken, sizes, cfg.init)
        options = options | {"objective": taken}
    module = MaskedAcousticModel(start.config["features"], start.config["model"], **options)
    module.model.load_state_dict(start.state_dict())
    if goes_on:
        module.objective.load_state_dict(state)
        module.objective.begin()
        module.objective_fitted = True
    kept = "its features, model and objective" if goes_on else "its features and model; the objective starts anew"
    say(f"init    {cfg.init}, with {kept}")
    return module


def _same_targets(ours: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether two objectives have the same targets and head: all parameters are equal that decide on them."""
    if saved.get("_target_") != ours["_target_"]:
        return False
    known = parameters(get_object(ours["_target_"])) or {}
    defaults = {name: each.default for name, each in known.items()}
    deciding = getattr(get_object(ours["_target_"]), "deciding", ())
    return all(ours.get(name, defaults.get(name)) == saved.get(name, defaults.get(name)) for name in deciding)


def open_data(cfg: DictConfig, module: MaskedAcousticModel, corpus: PreparedCorpus) -> SpeechDataModule:
    """Open the batches for pre-training."""
    lengths = crop_lengths(module.model.features, cfg.data.crop_s, cfg.data.num_lengths)
    return SpeechDataModule(corpus, "pretrain", crop_s=cfg.data.crop_s, lengths=lengths, **data_options(cfg))


def fit_statistics(module: MaskedAcousticModel, data: SpeechDataModule, device: torch.device) -> dict[str, Any]:
    """Fit what a new run needs before its first step: global statistics of the features, then what the targets are made of.

    Returns:
        Figures of the targets.
    """
    features = module.model.features
    if features.cmvn == "global" and not features.is_fitted:
        features.fit((batch["waveforms"], batch["lengths"]) for batch in data.ordered_loader("train"))
    if module.objective_fitted:
        return {}

    def sample(seconds: float) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data.sample(seconds, device):
            yield batch["waveforms"], batch["lengths"]

    home = module.device
    module.to(device)
    figures = module.eval().objective.fit(module.model, sample, data.seed)
    module.to(home).train()
    return figures
