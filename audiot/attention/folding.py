"""Attention by weights that all sequences share: the batch becomes the columns of one matrix product per head.

The same product is exact with padding. Let m be 1 on real frames and 0 on padded ones: the weights times the columns [V·m | m]
give the numerators and the denominators.

Shape legend: B sequences, H heads, T frames, D = head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from audiot.attention.patterns import NAMES

LEFT, RIGHT, START = (NAMES.index(name) for name in ("left", "right", "start"))
LOWEST = -80.0  # exp(-80) is still a normal number in float32 and bfloat16


def attend(scores: Tensor, value: Tensor, valid: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(scores)V over the real frames of each sequence.

    Args:
        scores: Table of logits (H, T, T).
        value: (B, H, T, D), not in float16.
        valid: bool (B, T), or None.
        dropout: Probability of dropping a weight; one mask serves all sequences.

    Returns:
        (B, H, T, D).
    """
    columns = value.permute(1, 2, 0, 3)  # H, T, B, D
    if valid is None:
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        context = _dropped(weights, dropout) @ columns.flatten(2)  # H, T, B·D
        return context.unflatten(-1, columns.shape[2:]).permute(2, 0, 1, 3)
    whole = _exponentials(scores, value.dtype)
    columns = columns.masked_fill(~valid.T[:, :, None], 0)
    mass = valid.T.to(value.dtype).expand(len(columns), -1, -1)
    numerator, denominator = _products(_dropped(whole, dropout), whole, columns, mass)
    return _divide(numerator, denominator).permute(2, 0, 1, 3)


def attend_by_length(scores: Tensor, value: Tensor, valid: Tensor | None, rho: float, dropout: float = 0.0) -> Tensor:
    """Attention to the handcrafted patterns of each sequence's own length, changed by a table that all sequences share.

    The weights of sequence b are proportional to E·((1 − ρ)P_b + ρ/T_b), where P_b are the patterns of its length T_b and
    E = exp(scores). Three parts of them are computed apart:

    - The floor and the patterns `start` and `end` depend on b and j alone, as their rows are all alike. They scale the columns.
    - `left` and `right` are triangular, and their rows differ in their sum only. These two heads take one more product.
    - The other patterns (the frame itself and its neighbours) have one entry per row.

    Args:
        scores: Table of changes Δ (H, T, T).
        value: (B, H, T, D), not in float16.
        valid: bool (B, T), real frames first, or None.
        rho: Floor ρ.
        dropout: Probability of dropping a weight; one mask serves all sequences.

    Returns:
        (B, H, T, D), zero on padded frames.
    """
    num_sequences, num_heads, num_frames, _ = value.shape
    whole = _exponentials(scores, value.dtype)
    kept = _dropped(whole, dropout)
    exact = torch.promote_types(value.dtype, torch.float32)  # precision of the patterns
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
        kept: Weights (H, T, T) after dropout.
        whole: Weights before dropout, rows of any sum; the same object if nothing is dropped, which takes one product.
        columns: Values (H, T, B, D), zero on padded frames.
        mass: Weights of the frames (H, T, B), zero on padded frames.
        scale: Whether to multiply the values by `mass`; needless where it is 1 on real frames.

    Returns:
        (H, T, B, D) and (H, T, B).
    """
    num_sequences, head_dim = columns.shape[2:]
    if scale:
        columns = columns * mass[..., None]
    if kept is not whole:
        return (kept @ columns.flatten(2)).unflatten(-1, (num_sequences, head_dim)), whole @ mass
    # The masses join the columns as if they were the values of more sequences: this takes one copy and one product.
    more = F.pad(mass, (0, -num_sequences % head_dim)).unflatten(-1, (-1, head_dim))  # H, T, ⌈B/D⌉, D
    product = (whole @ torch.cat([columns, more], dim=2).flatten(2)).unflatten(-1, (-1, head_dim))
    numerator, denominator = product.split([num_sequences, more.shape[2]], dim=2)
    return numerator, denominator.flatten(2)[..., :num_sequences]


def _exponentials(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(scores − row maximum), at least exp(−80): computed in float32 or better, returned in `dtype`."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # The maximum cancels between numerator and denominator, hence has no gradient.
    below = scores - scores.detach().amax(dim=-1, keepdim=True)
    return below.clamp_min(LOWEST).exp_().to(dtype)


def _dropped(weights: Tensor, dropout: float) -> Tensor:
    return F.dropout(weights, dropout) if dropout else weights


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
