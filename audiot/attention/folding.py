"""Attention by weights that all sequences share: the batch becomes columns of one matrix product a head.

Padding is exact in the same product. With m = 1 on real frames and 0 on padded ones, the weights times the columns [V·m | m]
give numerators and denominators.

Shape legend: B sequences, H heads, T frames, D = head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from audiot.attention.patterns import NAMES

LEFT, RIGHT, START = (NAMES.index(name) for name in ("left", "right", "start"))


def attend(kept: Tensor, whole: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    """Σ_j kept·V / Σ_j whole over the real frames j of each sequence.

    Args:
        kept: Weights (H, T, T) after dropout.
        whole: Weights before dropout, rows of any sum; the same object if nothing is dropped, which takes one product.
        value: (B, H, T, D).
        valid: bool (B, T), or None.

    Returns:
        (B, H, T, D).
    """
    columns = value.permute(1, 2, 0, 3)  # H, T, B, D
    if valid is None:
        mass = columns.new_ones(columns.shape[1:3])
    else:
        columns = columns.masked_fill(~valid.T[:, :, None], 0)
        mass = valid.T.to(value.dtype)
    numerator, denominator = _products(kept, whole, columns, mass.expand(len(columns), -1, -1))
    return _divide(numerator, denominator).permute(2, 0, 1, 3)


def attend_by_length(kept: Tensor, whole: Tensor, value: Tensor, valid: Tensor | None, rho: float) -> Tensor:
    """Attention to the handcrafted patterns of each sequence's own length, by weights that are shared.

    The weights of sequence b are proportional to E·((1 − ρ)P_b + ρ/T_b), where P_b are the patterns of its length T_b and
    E = `whole`. The floor and the patterns `start` and `end`, whose rows are all alike, depend on b and j alone: they scale
    the columns. `left` and `right` are triangular with rows that differ in their sum only: one more product for these two
    heads. What remains (the frame itself and its neighbours) is one entry a row.

    Args:
        kept: See `attend`.
        whole: See `attend`.
        value: (B, H, T, D).
        valid: bool (B, T), real frames first, or None.
        rho: ρ.

    Returns:
        (B, H, T, D), zero on padded frames.
    """
    num_sequences, num_heads, num_frames, _ = value.shape
    exact = torch.promote_types(value.dtype, torch.float32)  # of the patterns
    device = value.device
    if valid is None:
        valid = torch.ones(num_sequences, num_frames, dtype=torch.bool, device=device)
    real = valid.T  # T, B
    length = real.sum(dim=0).clamp_min(1).to(exact)  # B
    position = torch.arange(num_frames, device=device)[:, None]  # T, 1
    rising = ((position + 1) / length).pow(3)  # T, B: cubes within (0, 1], whose constant cancels
    falling = ((length - position).clamp_min(0) / length).pow(3)
    cubes = length * ((length + 1) / length / 2).square()  # B: the sum of either over the sequence

    # Every frame's weight (H, T, B): for the floor, and for the patterns whose rows are all alike.
    floor = (rho / length).expand(num_frames, -1)
    every = torch.stack([floor] * START + [(1 - rho) * cube / cubes + floor for cube in (falling, rising)])
    extra = max(0, num_heads - len(NAMES))
    every = torch.cat([every, torch.ones_like(floor).expand(extra, -1, -1)])[:num_heads] * real

    columns = value.permute(1, 2, 0, 3).masked_fill(~real[:, :, None], 0)  # H, T, B, D
    numerator, denominator = _products(kept, whole, columns, every.to(value.dtype), scale=True)

    # One frame's weight: frame i itself, i - 1 or i + 1; for left and right only where they allow no frame.
    one = (1 - rho) * real.to(exact)  # T, B
    last = position + 1 >= length
    itself = position.expand(-1, num_sequences)
    targets = (
        itself,
        (itself - 1).clamp_min(0),
        torch.where(last, itself, (itself + 1).clamp_max(num_frames - 1)),
        itself,
        itself,
    )
    factors = (one, one, one, one * (position < 2), one * (position + 2 >= length))
    target = torch.stack(targets[:num_heads])  # up to 5, T, B
    factor = torch.stack(factors[:num_heads]).to(value.dtype)
    single = len(target)
    reached = columns[:single].gather(1, target[..., None].expand(-1, -1, -1, columns.shape[-1]))
    near = (factor * kept[:single].gather(2, target))[..., None] * reached
    near_mass = factor * whole[:single].gather(2, target)

    if num_heads > LEFT:
        # Row i sums the first n cubes, (n(n + 1)/2)², with n frames on its side: i - 1, or length - 2 - i.
        sides = slice(LEFT, min(num_heads, RIGHT + 1))
        count = torch.stack([itself - 1, length - 2 - position])[: num_heads - LEFT].clamp_min(0)
        total = (count * (count + 1) / 2).square() / length.pow(3)
        factor = torch.where((count > 0) & real, (1 - rho) / torch.where(count > 0, total, 1), 0).to(value.dtype)
        cube = (torch.stack([rising, falling])[: num_heads - LEFT] * real).to(value.dtype)
        side_whole = _sides(whole[sides])
        side_kept = side_whole if kept is whole else _sides(kept[sides])
        side, side_mass = _products(side_kept, side_whole, columns[sides], cube, scale=True)
        near = _add_heads(near, LEFT, factor[..., None] * side)
        near_mass = _add_heads(near_mass, LEFT, factor * side_mass)

    context = _divide(_add_heads(numerator, 0, near), _add_heads(denominator, 0, near_mass))
    return context.masked_fill(~real[:, :, None], 0).permute(2, 0, 1, 3)


def _products(kept: Tensor, whole: Tensor, columns: Tensor, mass: Tensor, scale: bool = False) -> tuple[Tensor, Tensor]:
    """Numerators Σ_j kept·mass·V and denominators Σ_j whole·mass.

    Args:
        kept: (H, T, T); see `attend`.
        whole: (H, T, T); see `attend`.
        columns: Values (H, T, B, D), zero on padded frames.
        mass: Weights of the frames (H, T, B), zero on padded frames.
        scale: Multiply the values by `mass`; needless where it is 1 on real frames.

    Returns:
        (H, T, B, D) and (H, T, B).
    """
    num_sequences, head_dim = columns.shape[2:]
    if scale:
        columns = columns * mass[..., None]
    if kept is not whole:
        return (kept @ columns.flatten(2)).unflatten(-1, (num_sequences, head_dim)), whole @ mass
    # The masses ride along as if they were the values of more sequences: one copy and one product.
    more = F.pad(mass, (0, -num_sequences % head_dim)).unflatten(-1, (-1, head_dim))  # H, T, ⌈B/D⌉, D
    product = (whole @ torch.cat([columns, more], dim=2).flatten(2)).unflatten(-1, (-1, head_dim))
    numerator, denominator = product.split([num_sequences, more.shape[2]], dim=2)
    return numerator, denominator.flatten(2)[..., :num_sequences]


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator (H, T, B, D) / denominator (H, T, B); zero, also in the gradients, where no real frame was summed."""
    # No product with a reciprocal, whose gradient squares it: denominators may be as small as exp(−80).
    return numerator / torch.where(denominator > 0, denominator, 1)[..., None]


def _sides(matrices: Tensor) -> Tensor:
    """Keep j ≤ i − 2 of the left-context head's matrix and, if there are two, j ≥ i + 2 of the right-context head's."""
    return torch.stack([matrix.tril(-2) if side == 0 else matrix.triu(2) for side, matrix in enumerate(matrices)])


def _add_heads(total: Tensor, first: int, part: Tensor) -> Tensor:
    """Add `part` to the heads of `total` (H, …) from `first` on."""
    before, heads, after = total.split([first, len(part), len(total) - first - len(part)])
    return torch.cat([before, heads + part, after])
