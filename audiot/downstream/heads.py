"""Heads of the downstream tasks: hidden states → class scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrameClassifier(nn.Module):
    """Linear probe of every spectrogram frame; a state of ``stack`` frames gives as many predictions.

    Args:
        input_dim: d.
        num_classes: Classes.
        stack: Spectrogram frames behind one hidden state.
    """

    def __init__(self, input_dim: int, num_classes: int, stack: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.linear = nn.Linear(input_dim, stack * num_classes)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, d) → (B, T · stack, classes)."""
        return self.linear(hidden).unflatten(-1, (-1, self.num_classes)).flatten(1, 2)


class UtteranceClassifier(nn.Module):
    """Pool over an utterance's own frames, then a linear layer.

    Args:
        input_dim: d.
        num_classes: Classes.
        stack: Not used: every head takes the same arguments.
        pooling: ``mean``, or ``statistics``: mean and standard deviation.
    """

    def __init__(self, input_dim: int, num_classes: int, stack: int, pooling: str = "mean") -> None:
        super().__init__()
        if pooling not in ("mean", "statistics"):
            raise ValueError(f"downstream.head.pooling must be mean or statistics, found {pooling!r}")
        self.pooling = pooling
        self.linear = nn.Linear(input_dim * (2 if pooling == "statistics" else 1), num_classes)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, d) → (B, classes); frames beyond ``lengths`` are not counted."""
        lengths = lengths.to(hidden.device, non_blocking=True)[:, None]
        weight = (torch.arange(hidden.shape[1], device=hidden.device) < lengths)[..., None] / lengths[..., None]
        mean = (hidden * weight).sum(1)
        if self.pooling == "mean":
            return self.linear(mean)
        variance = ((hidden - mean[:, None]).square() * weight).sum(1)
        return self.linear(torch.cat([mean, (variance + 1e-6).sqrt()], dim=-1))


class LayerSelection(nn.Module):
    """One sequence of hidden states out of all layers': the last, or SUPERB's learned weighted sum (Yang et al. 2021).

    Args:
        layers: ``last`` or ``weighted_sum``.
        num_states: Hidden states of the upstream: layers + 1.
    """

    def __init__(self, layers: str, num_states: int) -> None:
        super().__init__()
        if layers not in ("last", "weighted_sum"):
            raise ValueError(f"downstream.layers must be last or weighted_sum, found {layers!r}")
        self.logits = nn.Parameter(torch.zeros(num_states)) if layers == "weighted_sum" else None

    def weights(self) -> Tensor | None:
        """Share of each layer (layers + 1,), or None for the last alone."""
        return None if self.logits is None else self.logits.softmax(0)

    def forward(self, hidden: Tensor) -> Tensor:
        """(layers + 1, B, T, d) → (B, T, d)."""
        weights = self.weights()
        return hidden[-1] if weights is None else torch.einsum("l,lbtd->btd", weights, hidden.to(weights.dtype))
