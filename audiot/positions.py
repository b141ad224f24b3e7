"""Positions: how a model learns where in the sequence a frame is.

They enter in one of three ways. `forward` adds them to the encoder's input. Inside each attention layer, `rotate` turns queries
and keys, or `bias` is added to their scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from audiot.base.tracing import first, for_sine, is_recording


class Positions(nn.Module):
    """Base of all positions: adds nothing and turns nothing.

    Args:
        embed_dim: Width d of the model.
        num_heads: Number of heads H.
        max_frames: Longest sequence that the model has to support.
    """

    no_weight_decay: frozenset[str] = frozenset()
    """Names of own parameters that the optimiser must not decay."""

    has_bias = False
    """Whether `bias` adds anything to the scores."""

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("max_frames", max_frames)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}: set it to a whole number of 1 or more")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.max_frames = max_frames

    def forward(self, hidden: Tensor) -> Tensor:
        """Add positions to the encoder's input: (B, T, d) → (B, T, d)."""
        return hidden

    def layer_part(self) -> Positions | None:
        """What one attention layer keeps of the positions; None where they act on the encoder's input alone."""
        return None

    def rotate(self, heads: Tensor) -> Tensor:
        """Turn queries or keys: (B, H, T, D) → (B, H, T, D)."""
        return heads

    def bias(self, offset: Tensor) -> Tensor:
        """What is added to the scores of queries with keys that lie `offset` frames after them.

        Args:
            offset: Integers (…, I, J), or (…, H or 1, I, J) where there are more than two dimensions.

        Returns:
            (…, H, I, J).
        """
        raise NotImplementedError(f"{type(self).__name__} has no bias")


class NoPositions(Positions):
    """No positions at all: attention that compares frames then sees a set, not a sequence.

    The arguments are those of `Positions`.
    """


class Sinusoid(Positions):
    """Sinusoids of geometrically spaced wavelengths, for any length (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

    The other arguments are those of `Positions`.

    Args:
        embed_dim: Width d of the model; even.
        max_frames: Length of the stored table. Longer sequences work.
        scale: Factor of the table.

    Raises:
        ValueError: `embed_dim` is odd.
    """

    table: Tensor

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int, scale: float = 1.0) -> None:
        super().__init__(embed_dim, num_heads, max_frames)
        if embed_dim % 2:
            raise ValueError(f"sinusoid positions need an even embed_dim but it is {embed_dim}: set it to {embed_dim + 1}")
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"positions.scale is {scale!r}: set it to a finite number")
        self.scale = scale
        self.register_buffer("table", self._table(max_frames), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Add the sinusoids: (B, T, d) → (B, T, d)."""
        num_frames = hidden.shape[1]
        is_stored = not is_recording() and num_frames <= len(self.table)  # a graph is for all lengths
        table = self.table if is_stored else self._table(num_frames).to(hidden.device)
        return hidden + table[:num_frames].to(hidden.dtype)

    def _table(self, num_frames: int) -> Tensor:
        """scale·(sin, cos, sin, cos, …) of position / 10000^(2i/d), float32 (T, d)."""
        position = torch.arange(num_frames, dtype=torch.float64)[:, None]
        rate = 10000.0 ** -(torch.arange(0, self.embed_dim, 2, dtype=torch.float64) / self.embed_dim)
        angle = for_sine(position * rate)  # T, d/2
        return (self.scale * torch.stack([angle.sin(), angle.cos()], dim=-1)).flatten(1).float()


class Learned(Positions):
    """One trained vector per position (Gehring et al. 2017, arXiv:1705.03122), drawn from N(0, 0.02²).

    The arguments are those of `Positions`.
    """

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
        return hidden + first(self.table, 0, num_frames).to(hidden.dtype)


class Rotary(Positions):
    """Rotary positions (RoFormer, Su et al. 2021, arXiv:2104.09864, section 3.2), for any length.

    Elements 2i and 2i + 1 of a query or key at position t turn by the angle t·base^(−2i/D), so that a score depends on
    the offset between two frames only.

    The other arguments are those of `Positions`.

    Args:
        max_frames: Length of the stored table. Longer sequences work.
        base: Base of the wavelengths.

    Raises:
        ValueError: the head size embed_dim / num_heads is odd.
    """

    table: Tensor

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int, base: float = 10000.0) -> None:
        super().__init__(embed_dim, num_heads, max_frames)
        if embed_dim % (2 * num_heads):
            raise ValueError(
                f"rotary positions need an even head size but embed_dim {embed_dim} / num_heads {num_heads} is "
                f"{embed_dim / num_heads:g}: set embed_dim to a multiple of {2 * num_heads}, or positions=sinusoid"
            )
        if not isinstance(base, (int, float)) or not (0 < base < math.inf):
            raise ValueError(f"positions.base is {base!r}: set it to a number above 0")
        self.head_dim = embed_dim // num_heads
        self.base = base
        self.register_buffer("table", self._table(torch.arange(max_frames, dtype=torch.float64)).float(), persistent=False)

    def layer_part(self) -> Rotary:
        """These positions, which have no trained state."""
        return self

    def rotate(self, heads: Tensor) -> Tensor:
        """Turn queries or keys by their positions: (B, H, T, D) → (B, H, T, D)."""
        return turn(heads, self.factors(heads.shape[2], torch.promote_types(heads.dtype, torch.float32)))

    def factors(self, num_frames: int, dtype: torch.dtype) -> Tensor:
        """What `turn` multiplies by, (2, T, D), for T frames."""
        is_stored = not is_recording() and num_frames <= self.table.shape[1]  # a graph is for all lengths
        if is_stored and dtype == torch.float32:
            return self.table[:, :num_frames]
        return self._table(torch.arange(num_frames, dtype=torch.float64, device=self.table.device)).to(dtype)

    def _table(self, position: Tensor) -> Tensor:
        """What multiplies each element (cos) and the other one of its pair (−sin, sin): (2, T, D) for positions (T,)."""
        index = torch.arange(0, self.head_dim, 2, device=position.device, dtype=position.dtype)
        angle = for_sine(position[:, None] * self.base ** -(index / self.head_dim)).repeat_interleave(2, dim=1)
        sign = torch.tensor([-1.0, 1.0], device=position.device, dtype=angle.dtype).repeat(self.head_dim // 2)
        return torch.stack([angle.cos(), angle.sin() * sign])

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        # In bfloat16 the angles would be off by up to 0.4%: follow the model's device and stay in float32.
        table = self.table
        super()._apply(fn, recurse)
        self.table = table.to(self.table.device)
        return self


def turn(heads: Tensor, factors: Tensor) -> Tensor:
    """Turn the pairs of elements 2i and 2i + 1 of queries or keys.

    Args:
        heads: (B, H, T, D).
        factors: What multiplies each element (cos), and what multiplies the other one of its pair (−sin, sin): (2, T, D),
            float32 or better.

    Returns:
        (B, H, T, D) in the dtype of `heads`.
    """
    cos, sin = factors
    exact = heads.to(factors.dtype)
    # A flip gives the other element. Compiled, that is one pass; to take the pairs apart would be more.
    other = exact.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (exact * cos + other * sin).to(heads.dtype)


class ALiBi(Positions):
    """Attention with linear biases (Press et al. 2022, arXiv:2108.12409, section 3), for any length.

    −m·|j − i| is added to the score of frame i with frame j. The slopes m of the heads fall geometrically, from 2^(−8/H) to
    2^(−8). Where H is no power of two, slopes of the next power of two fill up, as in the paper's code.

    Differs from the paper: the bias goes in both directions, |j − i|; a language model looks back only.

    The arguments are those of `Positions`.
    """

    has_bias = True
    slopes: Tensor

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int) -> None:
        super().__init__(embed_dim, num_heads, max_frames)
        power = 1 << (num_heads.bit_length() - 1)
        exponents = [8 * (head + 1) / power for head in range(power)]
        exponents += [8 * (head + 1) / (2 * power) for head in range(0, 2 * power, 2)]
        self.register_buffer("slopes", 2.0 ** -torch.tensor(exponents[:num_heads]), persistent=False)

    def layer_part(self) -> ALiBi:
        """These positions, which have no trained state."""
        return self

    def bias(self, offset: Tensor) -> Tensor:
        """−m·|offset|; shapes as in `Positions.bias`."""
        return -self.slopes[:, None, None] * offset.abs()


class RelativeBias(Positions):
    """A trained bias per head and offset, in each layer its own (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    b(j − i) is added to the score of frame i with frame j. Offsets beyond ±`max_offset` take the value there, as in Shaw et
    al. 2018 (arXiv:1803.02155). All biases are zero at the start of training.

    Differs from Raffel et al.: there is one value per offset instead of logarithmic buckets, and layers do not share.

    `max_frames` is ignored. The other arguments are those of `Positions`.

    Args:
        max_offset: Largest offset with a value of its own, in frames.

    Raises:
        ValueError: `max_offset` is not positive.
    """

    has_bias = True

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int, max_offset: int = 128) -> None:
        super().__init__(embed_dim, num_heads, max_frames)
        if not isinstance(max_offset, int) or max_offset < 1:
            raise ValueError(f"max_offset is {max_offset!r}: set it to a whole number of 1 or more")
        self.max_offset = max_offset

    def layer_part(self) -> RelativeBiasTable:
        """A new table."""
        return RelativeBiasTable(self.num_heads, self.max_offset)


class RelativeBiasTable(Positions):
    """The trained biases of one layer, made by `RelativeBias`."""

    has_bias = True
    no_weight_decay = frozenset({"table"})

    def __init__(self, num_heads: int, max_offset: int) -> None:
        super().__init__(num_heads, num_heads, max_offset)
        self.max_offset = max_offset
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * max_offset + 1))

    def reset_parameters(self) -> None:
        """Set the biases to zero."""
        nn.init.zeros_(self.table)

    def bias(self, offset: Tensor) -> Tensor:
        """The heads' values at `offset`; shapes as in `Positions.bias`."""
        index = offset.clamp(-self.max_offset, self.max_offset) + self.max_offset
        if index.dim() == 2:
            return self.table[:, index]
        heads = torch.arange(self.num_heads, device=index.device)[:, None, None]
        return self.table[heads, index]


NO_POSITIONS = NoPositions(1, 1, 1)
"""What a layer without positions hands to its mechanism."""
