"""Reconstruction of corrupted frames: the objective, its head, its loss and a trivial baseline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from audiot.analysis.plots import plot_reconstruction
from audiot.base.devices import at_least_float32
from audiot.checkpoint import AudioEncoder
from audiot.layers import LAYER_NORM_EPS
from audiot.model import initialise_linear
from audiot.objectives.corruption import Corrupted, Corruption
from audiot.objectives.objective import Objective, View, at_frames, masked_first
from audiot.training.accumulation import Mean


class Reconstruction(Objective):
    """Reconstruct corrupted frames under an L1 loss (Mockingjay, arXiv:1910.12638; TERA, arXiv:2007.06028).

    With a trained front end, its output is corrupted and the fixed features under it are reconstructed.

    Args:
        model: The model to train, for its sizes.
        mask_proportion, span: Share and length of masked spans; `Corruption` says more of all these.
        zero_probability, replace_probability: Probabilities of what stands in them.
        band_width, noise_std, noise_probability: Size and probability of what TERA adds.
        mix: Parameters of `Mixing`, see `Objective`.

    Raises:
        ValueError: a band of channels is to be masked in the output of a trained front end, which has no such channels; or the
            features are samples, of which an L1 loss would learn the phase.
    """

    figure = "l1"
    label = "L1 of masked frames"
    baselines: ClassVar[Mapping[str, str]] = {"zero_l1": "zeros", "interpolation_l1": "interpolation"}
    picture = "reconstruction.png"

    def __init__(
        self,
        model: AudioEncoder,
        mask_proportion: float = 0.15,
        span: int = 7,
        zero_probability: float = 0.8,
        replace_probability: float = 0.1,
        band_width: int = 0,
        noise_std: float = 0.2,
        noise_probability: float = 0.0,
        mix: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, mix)
        if model.features.spectra is not None:
            raise ValueError(
                f"this objective reconstructs features, but those of {type(model.features).__name__} are samples of the "
                "waveform: choose objective=clusters or objective=best_rq, whose targets are made of a spectrogram"
            )
        self.corruption = Corruption(
            mask_proportion, span, zero_probability, replace_probability, band_width, noise_std, noise_probability
        )
        self.stack = model.features.stack
        if self.corruption.band_width and model.features.is_trained:
            raise ValueError("objective.band_width must be 0 where features are trained, since they have no bands of frequencies")
        self.head = ReconstructionHead(model.encoder.embed_dim, model.features.output_dim)

    def predicted(self, num_frames: int) -> int:
        """Tokens that the head predicts: masked ones, or all where a band of channels is masked."""
        return num_frames if self.corruption.band_width else self.corruption.max_masked(num_frames)

    def corrupt(self, embedded: Tensor, lengths: Tensor, keys: Tensor) -> Corrupted:
        """Alter a batch for training."""
        return self.corruption(embedded, lengths, keys, self.stack)

    def loss(
        self, model: AudioEncoder, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor
    ) -> Mean:
        """L1 of the reconstruction on the corrupted elements."""
        corrupted = self.corrupt(model.features.embed(tokens, valid), lengths, keys)
        hidden = model.encoder(corrupted.features, valid)[-1]
        if corrupted.elements is not None:
            return masked_l1(self.head(hidden), source, corrupted.elements)
        index, chosen = masked_first(corrupted.frames, self.predicted(tokens.shape[1]))
        return masked_l1(self.head(at_frames(hidden, index)), at_frames(source, index), chosen[..., None])

    def view(
        self, model: AudioEncoder, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor
    ) -> View:
        """Reconstruction of a batch with every span zeroed.

        Returns:
            ``target``, ``corrupted``, ``prediction``, ``interpolation``: (B, T · stack, channels);
            ``masked``: bool (B, T · stack); ``lengths``: (B,) in spectrogram frames.
        """
        corrupted = self.corruption.zero_out(model.features.embed(tokens, valid), lengths, keys)
        prediction = self.head(model.encoder(corrupted.features, valid)[-1]).float()
        unstack = model.features.unstack
        masked = corrupted.frames.repeat_interleave(self.stack, dim=1)
        target = unstack(source)
        return {
            "target": target,
            "corrupted": target.masked_fill(masked[..., None], 0),
            "prediction": unstack(prediction),
            "interpolation": interpolate_masked(target, masked, lengths * self.stack),
            "masked": masked,
            "lengths": lengths * self.stack,
        }

    def measures(self, view: View) -> dict[str, Mean]:
        """L1 on masked frames of the model and of two trivial reconstructions: zeros and linear interpolation."""
        guesses = {
            "val_l1": view["prediction"],
            "zero_l1": torch.zeros_like(view["target"]),
            "interpolation_l1": view["interpolation"],
        }
        masked = view["masked"]
        return {
            name: Mean(masked_l1(guess, view["target"], masked[..., None]).value, masked.sum()) for name, guess in guesses.items()
        }

    def draw(self, view: View, title: str, path: Path) -> None:
        """Draw true frames, corrupted frames, the reconstruction and the interpolation."""
        plot_reconstruction(view, self.scale, title, path)


class ReconstructionHead(nn.Module):
    """Mockingjay's prediction head: Linear → GELU → LayerNorm → Linear, (…, d) → (…, C)."""

    def __init__(self, embed_dim: int, output_dim: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.output = nn.Linear(embed_dim, output_dim)
        initialise_linear(self, init_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """Predict feature frames (…, C) from hidden states (…, d)."""
        return self.output(self.norm(nn.functional.gelu(self.dense(hidden))))


def masked_l1(prediction: Tensor, target: Tensor, weight: Tensor) -> Mean:
    """Mean absolute error over the scored elements. ``weight`` is 0 or 1 and broadcasts to the shape of the others."""
    weight = weight.expand_as(target)
    count = weight.sum()
    error = (at_least_float32(prediction) - at_least_float32(target)).abs()
    return Mean((error * weight).sum() / count.clamp(min=1), count)


def interpolate_masked(features: Tensor, masked: Tensor, lengths: Tensor) -> Tensor:
    """Linear interpolation across each masked span, the trivial baseline.

    It interpolates between the nearest visible frames on both sides. At the edge of an utterance, the one visible neighbour is
    repeated. An utterance without visible frames becomes zero.

    Args:
        features: Features before corruption (B, T, C).
        masked: Masked frames, bool (B, T).
        lengths: Valid frames of each utterance (B,).

    Returns:
        (B, T, C). Visible frames are unchanged.
    """
    num_frames = features.shape[1]
    position = torch.arange(num_frames, device=features.device).expand_as(masked)
    visible = ~masked & (position < lengths[:, None])
    before = position.masked_fill(~visible, -1).cummax(1).values
    after = position.masked_fill(~visible, num_frames).flip(1).cummin(1).values.flip(1)
    left = torch.where(before >= 0, before, after).clamp(max=num_frames - 1)
    right = torch.where(after < num_frames, after, left)
    share = (position - left).to(features.dtype) / (right - left).clamp(min=1)

    def gather(index: Tensor) -> Tensor:
        return features.gather(1, index[..., None].expand_as(features))

    filled = torch.lerp(gather(left), gather(right), share.clamp(0, 1)[..., None])
    filled = filled.masked_fill(~visible.any(1)[:, None, None], 0)
    return torch.where(masked[..., None], filled, features)
