"""Reconstruction of corrupted frames: the head, the loss and a trivial baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from audiot.base.devices import at_least_float32
from audiot.layers import LAYER_NORM_EPS
from audiot.model import initialise_linear
from audiot.training.accumulation import Mean


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
