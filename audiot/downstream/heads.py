"""Heads of the downstream tasks: modules from hidden states to the outputs of an objective.

Every head takes ``input_dim`` (d), ``num_outputs`` (C) and ``stack`` (spectrogram frames per hidden state). Its input is hidden
states (B, T, d) and lengths (B,), best on the CPU. Padding does not affect an utterance's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from audiot.base.devices import autocast_dtype
from audiot.base.tracing import is_recording
from audiot.model import length_mask


class FrameClassifier(nn.Module):
    """Classifier of every spectrogram frame. A state of ``stack`` frames gives ``stack`` outputs.

    Args:
        input_dim, num_outputs, stack: Sizes, see the module.
        hidden_dim: Width of a hidden layer with ReLU; None for a linear probe.
        context: Number of neighbouring states to concatenate, centred on each state, with zeros outside the utterance.
    """

    def __init__(self, input_dim: int, num_outputs: int, stack: int, hidden_dim: int | None = None, context: int = 1) -> None:
        super().__init__()
        if context < 1 or context % 2 == 0:
            raise ValueError(f"downstream.head.context must be an odd number of states, found {context}")
        self.stack = stack
        self.context = context
        self.hidden = _hidden_layer(input_dim * context, hidden_dim)
        self.linear = nn.Linear(hidden_dim or input_dim * context, stack * num_outputs)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T · stack, C)."""
        if self.context > 1:
            hidden = _zero_padding(hidden, lengths)
            side = self.context // 2
            hidden = nn.functional.pad(hidden, (0, 0, side, side)).unfold(1, self.context, 1).transpose(2, 3).flatten(2)
        return _unstacked(self.linear(self.hidden(hidden)), self.stack)


class RecurrentClassifier(nn.Module):
    """Bidirectional LSTM and a linear layer for every frame: SUPERB's head for speech recognition (Yang et al. 2021).

    Args:
        input_dim, num_outputs, stack: Sizes, see the module.
        hidden_dim: Width of each direction.
        num_layers: Number of LSTM layers.
        dropout: Dropout probability between and behind the layers.
        projector_dim: Width of a linear layer before the LSTM; None for none.
    """

    def __init__(
        self,
        input_dim: int,
        num_outputs: int,
        stack: int,
        hidden_dim: int = 1024,
        num_layers: int = 2,
        dropout: float = 0.2,
        projector_dim: int | None = 1024,
    ) -> None:
        super().__init__()
        self.stack = stack
        self.projector = nn.Linear(input_dim, projector_dim) if projector_dim else nn.Identity()
        between = dropout if num_layers > 1 else 0.0
        width = projector_dim or input_dim
        self.lstm = nn.LSTM(width, hidden_dim, num_layers, batch_first=True, bidirectional=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * hidden_dim, stack * num_outputs)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T · stack, C)."""
        if is_recording():
            raise ValueError(f"{type(self).__name__} packs the frames of a batch by their lengths, which a graph can't")
        packed = pack_padded_sequence(self.projector(hidden), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=hidden.shape[1])
        return _unstacked(self.linear(self.dropout(states)), self.stack)


class UtteranceClassifier(nn.Module):
    """Pooling over an utterance's own frames, then a linear layer.

    Args:
        input_dim, num_outputs: Sizes, see the module.
        stack: Ignored.
        pooling: ``mean``; ``statistics``: mean and standard deviation (Snyder et al. 2018); or ``attentive``: both, weighted by a
            learned attention over time (Okabe et al. 2018, arXiv:1803.10963).
        projector_dim: Width of a linear layer before pooling (SUPERB: 256); None for none.
        hidden_dim: Width of a hidden layer with ReLU after pooling; None for none.
    """

    def __init__(
        self,
        input_dim: int,
        num_outputs: int,
        stack: int,
        pooling: str = "mean",
        projector_dim: int | None = None,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.projector = nn.Linear(input_dim, projector_dim) if projector_dim else nn.Identity()
        self.pooling = Pooling(projector_dim or input_dim, pooling)
        self.hidden = _hidden_layer(self.pooling.output_dim, hidden_dim)
        self.linear = nn.Linear(hidden_dim or self.pooling.output_dim, num_outputs)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, T, d) to (B, C)."""
        return self.linear(self.hidden(self.pooling(self.projector(hidden), lengths)))


class XVector(nn.Module):
    """x-vector (Snyder et al. 2018), SUPERB's head for verification: time-delay network, statistics pooling, two layers.

    Args:
        input_dim, num_outputs: Sizes, see the module. The outputs are the embedding.
        stack: Ignored.
        projector_dim: Width of the first layer, which reads the hidden states.
        channels: Width of the last layer before pooling. The others are as wide as the embedding.
        contexts: Kernel size and dilation of each convolution. Utterances are padded with zeros, so any length works.
    """

    def __init__(
        self,
        input_dim: int,
        num_outputs: int,
        stack: int,
        projector_dim: int = 512,
        channels: int = 1500,
        contexts: Sequence[Sequence[int]] = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1)),
    ) -> None:
        super().__init__()
        self.projector = nn.Linear(input_dim, projector_dim)
        widths = [projector_dim, *[num_outputs] * (len(contexts) - 1), channels]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, kernel, dilation=dilation, padding="same")
            for before, after, (kernel, dilation) in zip(widths, widths[1:], contexts, strict=False)
        )
        self.pooling = Pooling(channels, "statistics")
        self.embedding = nn.Sequential(nn.Linear(2 * channels, num_outputs), nn.ReLU(), nn.Linear(num_outputs, num_outputs))

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, T, d) to (B, C)."""
        states = self.projector(hidden)
        for convolution in self.convolutions:
            states = convolution(_zero_padding(states, lengths).transpose(1, 2)).transpose(1, 2).relu()
        return self.embedding(self.pooling(states, lengths))


class Pooling(nn.Module):
    """Pooling over an utterance's own frames (see `UtteranceClassifier`)."""

    def __init__(self, input_dim: int, kind: str) -> None:
        super().__init__()
        if kind not in ("mean", "statistics", "attentive"):
            raise ValueError(f"downstream.head.pooling must be mean, statistics or attentive, found {kind!r}")
        self.kind = kind
        self.output_dim = input_dim if kind == "mean" else 2 * input_dim
        if kind == "attentive":
            self.score = nn.Sequential(nn.Linear(input_dim, input_dim), nn.Tanh(), nn.Linear(input_dim, 1))

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, T, d) to (B, output_dim)."""
        valid = length_mask(lengths, hidden.shape[1], hidden.device)
        hidden = _zero_padding(hidden, lengths)
        if self.kind == "attentive":
            scores = self.score(hidden)
            weight = (scores if valid is None else scores.masked_fill(~valid[..., None], -torch.inf)).softmax(1)
        else:
            weight = hidden.new_ones(*hidden.shape[:2], 1) if valid is None else valid[..., None].to(hidden.dtype)
            weight = weight / weight.sum(1, keepdim=True)
        mean = (hidden * weight).sum(1)
        if self.kind == "mean":
            return mean
        variance = ((hidden - mean[:, None]).square() * weight).sum(1)
        return torch.cat([mean, (variance + 1e-6).sqrt()], dim=-1)


class LayerSelection(nn.Module):
    """Selection or weighted sum of the hidden states of all layers.

    Args:
        layers: ``last``; ``weighted_sum``: SUPERB's learned weighted sum of all (Yang et al. 2021); or a list of indices, where
            0 is the input of the first layer and −1 the last state. One index selects, several make a learned weighted sum.
        num_states: Number of hidden states of the upstream, layers + 1.
    """

    def __init__(self, layers: str | int | Sequence[int], num_states: int) -> None:
        super().__init__()
        if layers == "last":
            chosen = [-1]
        elif layers == "weighted_sum":
            chosen = list(range(num_states))
        elif isinstance(layers, str) or not (chosen := [layers] if isinstance(layers, int) else list(layers)):
            raise ValueError(f"downstream.layers must be last, weighted_sum or a list of numbers, found {layers!r}")
        for number in chosen:
            if isinstance(number, bool) or not isinstance(number, int) or not -num_states <= number < num_states:
                raise ValueError(f"downstream.layers={layers}: the upstream has the hidden states 0 to {num_states - 1}")
        self.chosen = sorted(number % num_states for number in chosen)
        if len(set(self.chosen)) < len(self.chosen):
            raise ValueError(f"downstream.layers={layers} names a hidden state twice")
        self.logits = nn.Parameter(torch.zeros(len(chosen))) if layers == "weighted_sum" or len(chosen) > 1 else None

    def weights(self) -> Tensor | None:
        """Weight of each chosen state; None for a single one."""
        return None if self.logits is None else self.logits.softmax(0)

    def pick(self, hidden: Tensor) -> Tensor:
        """Select the chosen states: (layers + 1, B, T, d) → (chosen, B, T, d)."""
        return hidden if len(self.chosen) == len(hidden) else hidden[self.chosen]

    def forward(self, picked: Tensor) -> Tensor:
        """Weighted sum of the chosen states: (chosen, B, T, d) → (B, T, d)."""
        weights = self.weights()
        if weights is None:
            return picked[0]
        precision = autocast_dtype(weights)
        return torch.einsum("l,lbtd->btd", weights.to(precision), picked.to(precision))


def _hidden_layer(input_dim: int, hidden_dim: int | None) -> nn.Module:
    return nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU()) if hidden_dim else nn.Identity()


def _unstacked(outputs: Tensor, stack: int) -> Tensor:
    """Separate stacked frames: (B, T, stack · C) → (B, T · stack, C)."""
    return outputs.unflatten(-1, (stack, -1)).flatten(1, 2)


def _zero_padding(hidden: Tensor, lengths: Tensor) -> Tensor:
    valid = length_mask(lengths, hidden.shape[1], hidden.device)
    return hidden if valid is None else hidden.masked_fill(~valid[..., None], 0.0)
