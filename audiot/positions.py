"""Positions: how a model learns where in the sequence a frame is.

Two ways in: `forward` adds them to the encoder's input, `rotate` turns queries and keys inside each attention layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Positions(nn.Module):
    """Base of all positions: adds nothing and turns nothing.

    Args:
        embed_dim: Width d of the model.
        num_heads: Number of heads H.
        max_frames: Longest sequence that the model has to support.
    """

    no_weight_decay: frozenset[str] = frozenset()
    """Names of own parameters that the optimiser must not decay."""

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.max_frames = max_frames

    def forward(self, hidden: Tensor) -> Tensor:
        """Add positions to the encoder's input: (B, T, d) → (B, T, d)."""
        return hidden

    def rotate(self, heads: Tensor) -> Tensor:
        """Turn queries or keys: (B, H, T, D) → (B, H, T, D)."""
        return heads


class NoPositions(Positions):
    """No positions at all: attention that compares frames then sees a set, not a sequence."""


class Sinusoid(Positions):
    """Sinusoids of geometrically spaced wavelengths, any length (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

    Args:
        embed_dim: See `Positions`; even.
        num_heads: See `Positions`.
        max_frames: See `Positions`; only sizes the stored table, longer sequences work.
        scale: Factor of the table.

    Raises:
        ValueError: `embed_dim` is odd.
    """

    table: Tensor

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int, scale: float = 1.0) -> None:
        super().__init__(embed_dim, num_heads, max_frames)
        if embed_dim % 2:
            raise ValueError(f"sinusoid positions need an even embed_dim but it is {embed_dim}: set it to {embed_dim + 1}")
        self.scale = scale
        self.register_buffer("table", self._table(max_frames), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Add the sinusoids: (B, T, d) → (B, T, d)."""
        num_frames = hidden.shape[1]
        table = self.table if num_frames <= len(self.table) else self._table(num_frames).to(hidden.device)
        return hidden + table[:num_frames].to(hidden.dtype)

    def _table(self, num_frames: int) -> Tensor:
        """scale·(sin, cos, sin, cos, …) of position / 10000^(2i/d), float32 (T, d)."""
        position = torch.arange(num_frames, dtype=torch.float64)[:, None]
        rate = 10000.0 ** -(torch.arange(0, self.embed_dim, 2, dtype=torch.float64) / self.embed_dim)
        angle = position * rate  # T, d/2
        return (self.scale * torch.stack([angle.sin(), angle.cos()], dim=-1)).flatten(1).float()


class Learned(Positions):
    """One trained vector a position (Gehring et al. 2017, arXiv:1705.03122), from N(0, 0.02²)."""

    no_weight_decay = frozenset({"table"})

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int) -> None:
        super().__init__(embed_dim, num_heads, max_frames)
        self.table = nn.Parameter(torch.empty(max_frames, embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.table, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        """Add the trained vectors: (B, T, d) → (B, T, d).

        Raises:
            ValueError: the sequence is longer than `max_frames`.
        """
        num_frames = hidden.shape[1]
        if num_frames > self.max_frames:
            raise ValueError(
                f"sequence has {num_frames} frames but max_frames is {self.max_frames} (learned positions): "
                "raise max_frames, shorten the sequences (data.crop_s) or set positions=sinusoid"
            )
        return hidden + self.table[:num_frames].to(hidden.dtype)


class Rotary(Positions):
    """Rotary positions (RoFormer, Su et al. 2021, arXiv:2104.09864, section 3.2), of any length.

    Elements 2i and 2i + 1 of a query or key at position t turn by the angle t·base^(−2i/D), so that a score depends on
    the offset between two frames only.

    Args:
        embed_dim: See `Positions`.
        num_heads: See `Positions`.
        max_frames: Ignored.
        base: Base of the wavelengths.

    Raises:
        ValueError: the head size embed_dim / num_heads is odd.
    """

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int, base: float = 10000.0) -> None:
        super().__init__(embed_dim, num_heads, max_frames)
        if embed_dim % (2 * num_heads):
            raise ValueError(
                f"rotary positions need an even head size but embed_dim {embed_dim} / num_heads {num_heads} is "
                f"{embed_dim / num_heads:g}: set embed_dim to a multiple of {2 * num_heads}, or positions=sinusoid"
            )
        self.head_dim = embed_dim // num_heads
        self.base = base

    def rotate(self, heads: Tensor) -> Tensor:
        """Turn queries or keys by their positions: (B, H, T, D) → (B, H, T, D)."""
        # Angles from integers, in float32 at least: a bfloat16 model would otherwise confuse positions beyond 256.
        dtype = torch.promote_types(heads.dtype, torch.float32)
        position = torch.arange(heads.shape[2], device=heads.device, dtype=dtype)
        index = torch.arange(0, self.head_dim, 2, device=heads.device, dtype=dtype)
        angle = position[:, None] * self.base ** -(index / self.head_dim)  # T, D/2
        cos, sin = angle.cos(), angle.sin()
        even, odd = heads.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(heads.dtype)
