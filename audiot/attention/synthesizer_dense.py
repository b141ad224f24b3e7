"""Dense Synthesizer, and what its relatives share with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention.mechanism import AttentionMechanism, at_least_one, check_type, fused_attention, key_mask, masked_softmax
from audiot.base.tracing import first


class SynthesizerDense(AttentionMechanism):
    """Dense Synthesizer, softmax(W₂ReLU(W₁x + b₁) + b₂)V (Tay et al. 2020, arXiv:2005.00743, equations 1 and 2).

    Each frame predicts its own row of attention from itself alone. No frame is compared with another.

    Fast form: fused attention with the queries [ReLU(W₁x + b₁), 1] and the keys [W₂, b₂], which the whole batch shares. The
    scores are exactly the same.

    Cost: O(T²d + THdb) time and O(Td) memory, for b = `bottleneck_dim` and L = `max_frames`. There are H(d + L + 1)b + HL
    parameters ((D + L + 1)b + L with `per_head: false`), and no query and key projections.

    Differs from the paper: rows are cropped to the current length. The layer in the middle has the narrow width `bottleneck_dim`.

    The other arguments are those of `AttentionMechanism`.

    Args:
        max_frames: Longest sequence supported, which is the width of the rows.
        bottleneck_dim: Width b of the middle layer.
        per_head: Whether every head has two layers of its own, over the whole frame. False: all heads share two layers, and each
            head sees its own slice of the frame, as in the code that accompanies arXiv:2006.05174.

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
        check_type(bool, per_head=per_head)
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
        draw_layer(self.w1, self.b1)
        draw_layer(self.w2, self.b2)

    def attend(self, hidden: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Attend with PyTorch's fused attention."""
        needed = self.bottleneck_dim + 1
        size = common_size(self.head_dim, needed)
        # Only the first of these ones counts; the others meet zeros of the keys. Zeros instead would take a second copy.
        query = F.pad(self.middle(hidden), (0, size - self.bottleneck_dim), value=1.0)  # B, H, T, size
        # Cast before it is expanded to the batch: autocast would make a copy for every sequence.
        key = widen(self.last_layer(hidden.shape[1]).to(query.dtype), size).expand(len(hidden), self.num_heads, -1, -1)
        context = fused_attention(query, key, widen(value, size), key_mask(valid), self.dropout_now, scale=1.0)
        return context[..., : self.head_dim]

    def dense_weights(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """softmax(W₂ReLU(W₁x + b₁) + b₂), (B, H, T, T)."""
        return masked_softmax(self.scores(hidden), key_mask(valid))

    def scores(self, hidden: Tensor) -> Tensor:
        """W₂ReLU(W₁x + b₁) + b₂, (B, H, T, T)."""
        frames = hidden[:, None]  # B, 1, T, d
        if not self.per_head:
            frames = frames.unflatten(-1, (self.num_heads, self.head_dim)).squeeze(1).transpose(1, 2)  # B, H, T, D
        num_frames = frames.shape[2]
        middle = (frames @ self.w1 + self.b1[:, None]).relu()  # B, H, T, b
        return middle @ first(self.w2, 2, num_frames) + first(self.b2, 1, num_frames)[:, None]

    def factors(self, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        """Queries (B, H, T, b + 1) and keys (1, H or 1, T, b + 1) whose products are the scores; and no bias."""
        middle = self.middle(hidden)
        keys = self.last_layer(middle.shape[2]).to(middle.dtype)
        return F.pad(middle, (0, 1), value=1.0), keys[None], None

    def score_parts(self, hidden: Tensor) -> tuple[Tensor, None]:
        """The scores (B, H, T, T), and no bias."""
        return self.scores(hidden), None

    def middle(self, hidden: Tensor) -> Tensor:
        """ReLU(W₁x + b₁) as one matrix product: (B, T, d) → (B, H, T, b)."""
        if self.per_head:
            return middle_of_heads(hidden, self.w1, self.b1)
        slices = hidden.unflatten(-1, (self.num_heads, self.head_dim))
        return F.linear(slices, self.w1[0].T, self.b1[0]).relu().transpose(1, 2)

    def last_layer(self, num_frames: int) -> Tensor:
        """[W₂, b₂] of the first frames, (H or 1, T, b + 1)."""
        return torch.cat([self.w2[:, :, :num_frames].transpose(1, 2), self.b2[:, :num_frames, None]], dim=-1)


def middle_of_heads(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU(Wx + b) of every head, as one matrix product.

    Args:
        hidden: x, (B, T, d).
        weight: W, (H, d, b).
        bias: b, (H, b).

    Returns:
        (B, H, T, b).
    """
    middle = F.linear(hidden, weight.transpose(1, 2).flatten(0, 1), bias.flatten()).relu()
    return middle.unflatten(-1, bias.shape).transpose(1, 2)


def draw_layer(weight: Tensor, bias: Tensor) -> None:
    """Draw the layers of all heads, weights (H, fan_in, fan_out), as nn.Linear does: uniform within ±1/√fan_in."""
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)


def common_size(head_dim: int, needed: int) -> int:
    """The common size of queries and keys of `needed` elements and of values of `head_dim` elements.

    Kernels are fused only where the three have the same size, and fast only where it is a multiple of 8. Queries and keys
    that are filled up with zeros keep their scores. Values are cut off again.
    """
    return max(head_dim, -(-needed // 8) * 8)


def widen(tensor: Tensor, size: int) -> Tensor:
    """Fill the last dimension up with zeros."""
    # F.pad by nothing would copy.
    return tensor if tensor.shape[-1] == size else F.pad(tensor, (0, size - tensor.shape[-1]))
