"""Handcrafted attention patterns (Raganato et al. 2020, arXiv:2002.10260; Wu et al. 2020, arXiv:2006.05174)."""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("current", "previous", "next", "left", "right", "start", "end")
"""The patterns, in the order in which heads take them."""


def patterns(num_frames: int, num_heads: int = len(NAMES)) -> dict[str, Tensor]:
    """The handcrafted patterns of a sequence, one for each of the first heads.

    Row i of a pattern holds the attention of frame i to the frames j:

    - `current`: j = i; `previous`: j = i − 1; `next`: j = i + 1.
    - `left`: ∝ (j + 1)³ for j ≤ i − 2; `right`: its mirror image.
    - `start`: ∝ (T − j)³; `end`: ∝ (j + 1)³.

    A row that allows no frame falls back to `current`.

    Args:
        num_frames: Length T of the sequence.
        num_heads: Number of heads; the first min(`num_heads`, 7) patterns are returned.

    Returns:
        Name → float64 (T, T) whose rows sum to 1, in the order of `NAMES`.
    """
    position = torch.arange(num_frames, dtype=torch.float64)
    offset = position[None, :] - position[:, None]  # T, T: j - i
    rising = ((position + 1) ** 3).expand(num_frames, num_frames)
    left = torch.where(offset <= -2, rising, 0.0)
    mass = {
        "current": (offset == 0).double(),
        "previous": (offset == -1).double(),
        "next": (offset == 1).double(),
        "left": left,
        "right": left.flip(0, 1),
        "start": rising.flip(1),
        "end": rising,
    }
    return {name: _normalised(mass[name], fallback=mass["current"]) for name in NAMES[:num_heads]}


def offset_patterns(num_frames: int) -> dict[str, Tensor]:
    """The handcrafted patterns as functions of the offset j − i; all but `start` and `end`, which are none.

    `current`, `previous` and `next` are those of `patterns` away from the ends of the sequence. `patterns` defines `left` and
    `right` by the position j. Here they decay with the distance: ∝ (T − |j − i|)³ for j ≤ i − 2, or j ≥ i + 2. They equal
    `patterns` in the row that sees most, which is the last row of `left` and the first of `right`.

    Args:
        num_frames: Length T of the sequence.

    Returns:
        Name → float64 (2T − 1,), which sums to 1: entry j − i + T − 1 is the attention of frame i to frame j.
    """
    offset = torch.arange(1 - num_frames, num_frames, dtype=torch.float64)
    decay = (num_frames - offset.abs()) ** 3
    mass = {
        "current": (offset == 0).double(),
        "previous": (offset == -1).double(),
        "next": (offset == 1).double(),
        "left": torch.where(offset <= -2, decay, 0.0),
        "right": torch.where(offset >= 2, decay, 0.0),
    }
    return {name: _normalised(mass[name], fallback=mass["current"]) for name in mass}


def legacy_patterns(num_frames: int) -> Tensor:
    """Initial values of the first seven heads in the code that accompanies arXiv:2006.05174, float64 (7, T, T).

    They serve comparison with published models only. The order is current, next, previous, left, right, end, start. The
    defects are those of that code: `next` and `previous` wrap around, `right` grows with j instead of mirroring `left`, two
    rows of `left` and of `right` are empty, and the first row of `right` has a stray weight on the first frame.
    """
    position = torch.arange(num_frames, dtype=torch.float64)
    offset = position[None, :] - position[:, None]
    rising = ((position + 1) ** 3).expand(num_frames, num_frames)
    identity = torch.eye(num_frames, dtype=torch.float64)
    empty = torch.zeros_like(identity)
    right = torch.where(offset >= 2, rising, 0.0)
    if num_frames > 2:
        right[0, 0] = 1
    mass = (
        identity,
        identity.roll(1, dims=1),
        identity.roll(-1, dims=1),
        torch.where(offset <= -2, rising, 0.0),
        right,
        rising,
        rising.flip(1),
    )
    return torch.stack([_normalised(matrix, fallback=empty) for matrix in mass])


def _normalised(mass: Tensor, fallback: Tensor) -> Tensor:
    """Divide rows by their sums; rows that sum to 0 come from `fallback`."""
    total = mass.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, mass / total.clamp_min(1), fallback)
