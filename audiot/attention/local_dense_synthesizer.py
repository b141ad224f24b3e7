"""Local Dense Synthesizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention.mechanism import AttentionMechanism, among_real, at_least_one, masked_softmax, offsets
from audiot.attention.synthesizer_dense import draw_layer, middle_of_heads

CHUNK = 64
"""Frames whose windows are summed in one matrix product."""


class LocalDenseSynthesizer(AttentionMechanism):
    """Local Dense Synthesizer attention (Xu et al. 2020, arXiv:2010.12155).

    Each frame predicts, from itself alone, its attention to the c = `context_width` frames around it, with itself in the middle.
    In every head the weights are softmax(W₂ReLU(W₁x + b₁) + b₂).

    Works at any length: `max_frames` is ignored.

    Fast form: the windows of a chunk of frames are the bands of one matrix of chunk × (chunk + c − 1), which multiplies the
    frames that the chunk sees. There is no matrix of all frames by all frames.

    Cost: O(T(c + 64)d + THdb) time and O(TH(c + 64)) memory, for b = `bottleneck_dim`. There are H(d + c + 1)b + Hc parameters,
    and no query and key projections.

    Differs from the authors' code: the middle layer of a head has the narrow width b; theirs has the width d for all heads
    together. The layers have biases. Padded frames, and frames before the start and after the end, get no weight; theirs gets
    weight, and zeros as values.

    The other arguments are those of `AttentionMechanism`.

    Args:
        context_width: Frames c that a frame attends to; odd.
        bottleneck_dim: Width b of the middle layer.

    Raises:
        ValueError: a size is not positive, or `context_width` is even.
    """

    inputs = frozenset({"hidden", "value"})
    subquadratic = True
    no_weight_decay = frozenset({"b1", "b2"})

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        context_width: int = 31,
        bottleneck_dim: int = 16,
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout)
        at_least_one(context_width=context_width, bottleneck_dim=bottleneck_dim)
        if context_width % 2 == 0:
            raise ValueError(f"context_width is {context_width}, but a window around a frame is odd: set {context_width + 1}")
        self.context_width = context_width
        self.w1 = nn.Parameter(torch.empty(num_heads, embed_dim, bottleneck_dim))
        self.b1 = nn.Parameter(torch.empty(num_heads, bottleneck_dim))
        self.w2 = nn.Parameter(torch.empty(num_heads, bottleneck_dim, context_width))
        self.b2 = nn.Parameter(torch.empty(num_heads, context_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as nn.Linear does: uniform within ±1/√fan_in."""
        draw_layer(self.w1, self.b1)
        draw_layer(self.w2, self.b2)

    def attend(self, hidden: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Attend in chunks."""
        num_frames = hidden.shape[1]
        side = self.context_width // 2
        scores = middle_of_heads(hidden, self.w1, self.b1) @ self.w2 + self.b2[:, None]  # B, H, T, c
        inside = torch.ones_like(hidden[:1, :, 0], dtype=torch.bool) if valid is None else valid  # B or 1, T
        seen = F.pad(inside, (side, side)).unfold(1, self.context_width, 1)  # B or 1, T, c
        weights = F.dropout(masked_softmax(scores, seen[:, None]), self.dropout_now).to(value.dtype)

        # Kernels are fast where the sizes of matrices are multiples of 8.
        width = -(-(CHUNK + self.context_width - 1) // 8) * 8
        missing = -num_frames % CHUNK
        # The bands: rows are filled up to width + 1 and read as rows of `width`, so that each begins one further right.
        filled = F.pad(weights, (0, width + 1 - self.context_width, 0, missing)).unflatten(2, (-1, CHUNK)).flatten(3)
        bands = filled[..., : CHUNK * width].unflatten(-1, (CHUNK, width))  # B, H, N, chunk, width
        reached = F.pad(value, (0, 0, side, missing + width - CHUNK - side)).unfold(2, width, CHUNK)  # B, H, N, D, width
        context = bands @ reached.transpose(-2, -1)  # B, H, N, chunk, D
        return context.flatten(2, 3)[:, :, :num_frames]

    def dense_weights(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """softmax(W₂ReLU(W₁x + b₁) + b₂), spread over all frames, (B, H, T, T)."""
        middle = (hidden[:, None] @ self.w1 + self.b1[:, None]).relu()  # B, H, T, b
        scores = middle @ self.w2 + self.b2[:, None]  # B, H, T, c
        side = self.context_width // 2
        offset = offsets(hidden.shape[1], hidden.device)  # T, T
        index = (offset.clamp(-side, side) + side).expand(*scores.shape[:2], -1, -1)
        return masked_softmax(scores.gather(-1, index), self.dense_choice(hidden, valid))

    def dense_choice(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """The real frames of the window, bool (B, H, T, T)."""
        near = offsets(hidden.shape[1], hidden.device).abs() <= self.context_width // 2
        return among_real(near.expand(hidden.shape[0], self.num_heads, -1, -1), valid)
