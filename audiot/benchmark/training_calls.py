"""Calls that the training benchmark times: hidden states, the encoder, a whole step, and masking and targets alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from audiot.base.streams import key
from audiot.benchmark.stopwatch import Stopwatch
from audiot.benchmark.training_config import Place
from audiot.data.batches import Batch
from audiot.features import Features
from audiot.pretraining import MaskedAcousticModel
from audiot.training.float8 import FP8, Float8
from audiot.training.optimization import configure_from

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, FP8: torch.bfloat16}
LAST_PART = {"inference": "forward", "encoder": "backward", "step": "optimiser"}


class Calls:
    """Maker of calls. Each computes one step, on inputs that lie on the device, and tells a stopwatch where its parts end.

    Args:
        device: Device on which they compute.
        precision: The Trainer's precision, a key of `PRECISIONS`.
        compiled: Whether they are compiled.
        seed: Seed of the inputs.
    """

    def __init__(self, device: torch.device, precision: str, compiled: bool, seed: int) -> None:
        self.device = device
        self.precision = precision
        self.dtype = PRECISIONS[precision]
        self.compiled = compiled
        self.seed = seed

    def inference(self, module: MaskedAcousticModel, place: Place, watch: Stopwatch) -> Callable[[], Tensor]:
        """From waveforms to the hidden states of all layers, as an exported encoder computes them."""
        model = module.model.eval().to(self.dtype)
        batch = self._batch(model.features, place)
        if self.compiled:
            model.compile()

        def call() -> Tensor:
            with torch.no_grad():
                hidden, _ = model(batch["waveforms"], batch["lengths"])
            watch.mark("forward")
            return hidden[-1, :, 0].float().abs().mean()

        return call

    def encoder(self, module: MaskedAcousticModel, place: Place, watch: Stopwatch) -> Callable[[], Tensor]:
        """Forward and backward of the encoder on features."""
        encoder = module.model.encoder
        self._begin_float8(module)
        tokens = self.noise(place.batch, place.frames, module.model.features.embed_dim)

        def forward(tokens: Tensor) -> Tensor:
            return encoder(tokens)[-1].float().abs().mean()

        compiled = torch.compile(forward) if self.compiled else forward

        def call() -> Tensor:
            with self._autocast():
                loss = compiled(tokens)
            watch.mark("forward")
            encoder.zero_grad(set_to_none=True)
            loss.backward()
            watch.mark("backward")
            return loss.detach()

        return call

    def step(self, module: MaskedAcousticModel, place: Place, watch: Stopwatch, trainer: DictConfig) -> Callable[[], Tensor]:
        """A whole training step on waveforms, with the steps and the clipping of a Trainer's config."""
        configured = configure_from(module, module.hparams, trainer.max_steps)
        optimiser, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        batch = self._batch(module.model.features, place)
        self._begin_float8(module)
        if self.compiled:
            module.compile_step(graphs=self.device.type == "cuda")

        def call() -> Tensor:
            module.on_train_batch_start(batch, 0)
            with self._autocast():
                given = module.inputs(batch)
                watch.mark("features")
                loss = module.step_loss(*given).value
            watch.mark("forward")
            optimiser.zero_grad()
            loss.backward()
            watch.mark("backward")
            if trainer.gradient_clip_val:
                nn.utils.clip_grad_norm_(module.parameters(), trainer.gradient_clip_val)
            optimiser.step()
            scheduler.step()
            watch.mark("optimiser")
            return loss.detach()

        return call

    def masking(self, module: MaskedAcousticModel, place: Place) -> Callable[[], object]:
        """The corruption alone. It is compiled as inside the loss of a step."""
        features = module.model.features
        batch = self._batch(features, place)
        tokens = self.noise(place.batch, place.frames, features.embed_dim)
        lengths = torch.full((place.batch,), place.frames, device=self.device)
        corrupt = torch.compile(module.objective.corrupt) if self.compiled else module.objective.corrupt

        def call() -> object:
            with torch.no_grad(), self._autocast():
                return corrupt(tokens, lengths, batch["keys"])

        return call

    def targets(self, module: MaskedAcousticModel, place: Place) -> Callable[[], object]:
        """The targets alone, from the tokens or from what a teacher heard. They are compiled as inside the loss of a step."""
        tokens, lengths, _, valid, source = module.inputs(self._batch(module.model.features, place))
        given = tokens if source is None else source
        make = torch.compile(module.objective.targets) if self.compiled else module.objective.targets

        def call() -> object:
            with torch.no_grad(), self._autocast():
                return make(module.model, given, lengths, valid)

        return call

    def noise(self, *shape: int) -> Tensor:
        """Random numbers on the device, the same for each call of one shape."""
        return torch.randn(*shape, generator=torch.Generator(self.device).manual_seed(self.seed), device=self.device)

    def _batch(self, features: Features, place: Place) -> Batch:
        """Noise, in the form that the data module gives."""
        num_samples = features.num_samples(place.frames)
        return {
            "waveforms": 0.1 * self.noise(place.batch, num_samples),
            "lengths": torch.full((place.batch,), num_samples),
            "keys": torch.tensor([key("benchmark", self.seed, number) for number in range(place.batch)], device=self.device),
            "ids": [str(number) for number in range(place.batch)],
            "position": (0, 0),
        }

    def _begin_float8(self, module: MaskedAcousticModel) -> None:
        if self.precision == FP8:
            Float8().begin(module)

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.precision == "32-true" else torch.autocast(self.device.type, self.dtype)
