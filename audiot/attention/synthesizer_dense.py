"""Dense Synthesizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention.mechanism import AttentionMechanism, at_least_one, fused_attention, key_mask, masked_softmax


class SynthesizerDense(AttentionMechanism):
    """Dense Synthesizer, softmax(W₂ReLU(W₁x + b₁) + b₂)V (Tay et al. 2020, arXiv:2005.00743, equations 1 and 2).

    Each frame predicts its own row of attention from itself alone; no frame is compared with another. Computed as fused
    attention of the queries [ReLU(W₁x + b₁), 1] and the keys [W₂, b₂], which the whole batch shares: the same exactly.

    Differs from the paper: rows are cropped to the current length, and the two layers have the narrow middle
    `bottleneck_dim`.

    Args:
        embed_dim: See `AttentionMechanism`.
        num_heads: See `AttentionMechanism`.
        max_frames: Longest sequence supported: the width of the rows.
        dropout: See `AttentionMechanism`.
        bottleneck_dim: Width b of the middle layer.
        per_head: True: every head has its own two layers over the whole frame. False: all heads share two layers, and
            each sees its own slice of the frame, as in the code that accompanies arXiv:2006.05174.

    Raises:
        ValueError: `bottleneck_dim` is not positive.
    """

    inputs = frozenset({"hidden", "value"})
    no_weight_decay = frozenset({"b1", "b2"})
    max_frames: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        bottleneck_dim: int = 16,
        per_head: bool = True,
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout)
        at_least_one(bottleneck_dim=bottleneck_dim)
        self.max_frames = max_frames
        self.bottleneck_dim = bottleneck_dim
        self.per_head = per_head
        networks, width = (num_heads, embed_dim) if per_head else (1, self.head_dim)
        self.w1 = nn.Parameter(torch.empty(networks, width, bottleneck_dim))
        self.b1 = nn.Parameter(torch.empty(networks, bottleneck_dim))
        self.w2 = nn.Parameter(torch.empty(networks, bottleneck_dim, max_frames))
        self.b2 = nn.Parameter(torch.empty(networks, max_frames))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as nn.Linear does: uniform within ±1/√fan_in."""
        for parameter, fan_in in (
            (self.w1, self.w1.shape[1]),
            (self.b1, self.w1.shape[1]),
            (self.w2, self.bottleneck_dim),
            (self.b2, self.bottleneck_dim),
        ):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def attend(self, hidden: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Attend with PyTorch's fused attention."""
        num_sequences, num_frames, _ = hidden.shape
        # Kernels are fused only where queries, keys and values have one size, and fast where it is a multiple of 8:
        # zeros fill the three up, which leaves scores and context as they are.
        needed = self.bottleneck_dim + 1
        size = max(self.head_dim, -(-needed // 8) * 8)
        query = F.pad(F.pad(self._middle(hidden), (0, 1), value=1.0), (0, size - needed))  # B, H, T, size
        key = torch.cat([self.w2[:, :, :num_frames].transpose(1, 2), self.b2[:, :num_frames, None]], dim=-1)
        key = F.pad(key, (0, size - needed)).expand(num_sequences, self.num_heads, -1, -1)  # B, H, T, size
        value = F.pad(value, (0, size - self.head_dim))
        context = fused_attention(query, key, value, key_mask(valid), self.dropout_now, scale=1.0)
        return context[..., : self.head_dim]

    def dense_weights(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """softmax(W₂ReLU(W₁x + b₁) + b₂), (B, H, T, T)."""
        frames = hidden[:, None]  # B, 1, T, d
        if not self.per_head:
            frames = frames.unflatten(-1, (self.num_heads, self.head_dim)).squeeze(1).transpose(1, 2)  # B, H, T, D
        num_frames = frames.shape[2]
        middle = (frames @ self.w1 + self.b1[:, None]).relu()  # B, H, T, b
        return masked_softmax(middle @ self.w2[:, :, :num_frames] + self.b2[:, None, :num_frames], key_mask(valid))

    def _middle(self, hidden: Tensor) -> Tensor:
        """ReLU(W₁x + b₁) as one matrix product: (B, T, d) → (B, H, T, b)."""
        if self.per_head:
            middle = F.linear(hidden, self.w1.transpose(1, 2).flatten(0, 1), self.b1.flatten())
            middle = middle.unflatten(-1, (self.num_heads, self.bottleneck_dim))
        else:
            middle = F.linear(hidden.unflatten(-1, (self.num_heads, self.head_dim)), self.w1[0].T, self.b1[0])
        return middle.transpose(1, 2).relu()
