"""What an objective of pre-training is: corruption, targets, prediction head, loss, measures and pictures in one class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from audiot.checkpoint import AudioEncoder
from audiot.objectives.mixing import Mixing
from audiot.training.accumulation import Mean

View = dict[str, Tensor]
Sample = Callable[[float], Iterable[tuple[Tensor, Tensor]]]
"""Function from seconds to so much training audio, as batches of waveforms (B, N) and lengths (B,), the same in every process."""


class Objective(nn.Module, ABC):
    """Base class of the objectives of pre-training. A YAML file of the group ``objective`` names one and its parameters.

    The module calls, in this order: `fit` once before training; in each step `source`, outside of the compiled graph, and `loss`
    inside; `discard` before and `after_step` after each step of the optimiser. For validation and pictures it calls `view`, and
    hands the result to `measures` and `draw`. An objective keeps all that it fitted or learned in its state dict. So a resumed
    run continues to the byte, and an exported encoder can be trained on.

    Randomness of an utterance comes from its key alone (see `audiot.base.streams`).

    Shapes: B utterances, T tokens, C channels of a token.

    Args:
        model: The model to train, for its sizes.
        mix: Parameters of `Mixing`, without the sample rate, or with probability 0: utterances are left as they are.

    Attributes:
        scale: Where the frames and channels of the front end's spectrogram lie, for pictures.
    """

    def __init__(self, model: AudioEncoder, mix: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.scale = model.features.scale
        mix = mix or {"probability": 0.0}
        self.mixing = Mixing(**mix, sample_rate=model.features.sample_rate) if mix["probability"] else None

    figure: ClassVar[str]
    """Name of the loss: ``train_…`` and ``val_…`` are logged."""

    label: ClassVar[str]
    """The loss in words, for reports and pictures."""

    baselines: ClassVar[Mapping[str, str]] = {}
    """Validation metrics of trivial predictions of the same loss → what they predict, in words."""

    extras: ClassVar[Mapping[str, str]] = {}
    """Other validation metrics → what they are, in words."""

    deciding: ClassVar[tuple[str, ...]] = ()
    """Parameters that decide on targets and head. What was learned for other values of these is of no use."""

    picture: ClassVar[str]
    """Name of the file that `draw` makes."""

    @property
    def metrics(self) -> list[str]:
        """Names of the validation metrics, the loss first."""
        return [f"val_{self.figure}", *self.baselines, *self.extras]

    def fit(self, model: AudioEncoder, sample: Sample, seed: int) -> dict[str, Any]:
        """Fit what the targets need. Every process calls it with the same audio.

        Args:
            model: The untrained model, on the device where fitting should run.
            sample: Gives audio to fit on.
            seed: Seed of every random choice.

        Returns:
            Figures for the run's summary.
        """
        return {}

    def compile_source(self) -> None:
        """Compile what `source` computes with. Called where the training step is compiled."""

    @torch.no_grad()
    def source(self, model: AudioEncoder, waveforms: Tensor, lengths: Tensor, tokens: Tensor | None) -> Tensor | None:
        """What the targets are made of, (B, T, …), computed before the compiled part of a step.

        Args:
            model: The model in training.
            waveforms: Samples (B, N) of the clean utterances.
            lengths: Samples of each utterance (B,), on the CPU.
            tokens: Tokens of the same waveforms (B, T, C), if the encoder hears just them; None if it hears a mixture.

        Returns:
            None stands for the tokens that the encoder's input is made of.
        """
        return None if tokens is not None else model.features(waveforms, lengths)[0].contiguous()

    def targets(self, model: AudioEncoder, source: Tensor, lengths: Tensor, valid: Tensor | None) -> Tensor:
        """Of each token, what is to be predicted (B, T, …). Arguments are those of `loss`."""
        return source

    @abstractmethod
    def predicted(self, num_frames: int) -> int:
        """Tokens of an utterance of ``num_frames`` tokens that the head predicts, at most."""

    @abstractmethod
    def corrupt(self, embedded: Tensor, lengths: Tensor, keys: Tensor) -> tuple[Any, ...]:
        """The encoder's input from the front end's output (B, T, C), and which tokens were altered."""

    @abstractmethod
    def loss(
        self, model: AudioEncoder, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor
    ) -> Mean:
        """Corrupt a batch, encode it and score the prediction.

        Args:
            model: The model in training.
            tokens: Features of what the encoder hears (B, T, C).
            lengths: Valid tokens of each utterance (B,), on the tokens' device.
            keys: Random keys (B,), on the tokens' device.
            valid: Mask, bool (B, T); None where nothing is padded.
            source: What `source` gave, or the tokens.
        """

    @abstractmethod
    def view(
        self, model: AudioEncoder, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor
    ) -> View:
        """Targets and predictions of a validation batch, whose every masked span is hidden. Arguments are those of `loss`."""

    @abstractmethod
    def measures(self, view: View) -> dict[str, Mean]:
        """The validation metrics of a view. A mean over no elements may be any finite number."""

    @abstractmethod
    def draw(self, view: View, title: str, path: Path) -> None:
        """Draw a view of one utterance."""

    def begin(self) -> None:
        """Begin a new training with the state of an earlier one."""

    def after_step(self, model: AudioEncoder) -> None:
        """Update what learns without gradients. Called on every process after each step of the optimiser."""

    def discard(self, skipped: Tensor) -> None:
        """Forget what the batches of a step have left for `after_step`, where that step is skipped.

        Then `after_step` must change nothing. Called on every process before each step of the optimiser.

        Args:
            skipped: Whether the step is skipped, bool (), on the model's device. Don't wait for it.
        """


def masked_first(frames: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the masked frames, in order of time and then of others.

    Their maximal number follows from the shape, so nothing waits for the device.

    Args:
        frames: Masked frames, bool (B, T).
        count: Number of indices per utterance, at least the number of masked frames.

    Returns:
        Indices (B, count), and whether each is of a masked frame, bool (B, count).
    """
    num_frames = frames.shape[1]
    # topk over distinct ranks replaces a sort: Inductor's code for a sort is slow.
    rank = frames.int() * num_frames - torch.arange(num_frames, device=frames.device, dtype=torch.int32)
    index = rank.topk(count, dim=1, sorted=True).indices
    return index, frames.gather(1, index)


def at_frames(values: Tensor, index: Tensor) -> Tensor:
    """Rows of ``values`` (B, T, …) at the frames ``index`` (B, count): (B, count, …)."""
    shape = index.shape + (1,) * (values.ndim - 2)
    return values.gather(1, index.view(shape).expand(*index.shape, *values.shape[2:]))
