"""Attention inside groups of frames: what windowed, strided, hashed and routed attention have in common.

A mechanism lists the numbers of the frames that are the queries of a group, and of those that are its keys. `grouped_attention`
computes softmax attention inside each group. The plain form gathers the frames of every group. On CUDA devices, in half
precision, kernels read them in place (`audiot.kernels.grouped`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from audiot.attention.mechanism import fused_attention
from audiot.base.devices import HALF
from audiot.positions import NO_POSITIONS, Positions

try:
    from audiot.kernels import grouped as grouped_kernels
except ImportError:  # Triton comes with PyTorch's builds for CUDA only
    grouped_kernels = None  # type: ignore[assignment]


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    radius: int | None = None,
    partition: bool = False,
    transposed: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    positions: Positions = NO_POSITIONS,
) -> Tensor:
    """softmax(QKᵀ/√D)V inside each of G groups of frames.

    A query in several groups gets the mean of its results. A query in no group, or only in groups without keys, gets zeros.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        queries: Numbers of the frames that are the groups' queries, (B or 1, H or 1, G, N); −1 = an empty place.
        keys: Numbers of the frames that are the groups' keys, (B or 1, H or 1, G, M); −1 = an empty place. A key is in a group
            once.
        radius: Largest difference between the numbers of a query and a key that it sees; None: no limit.
        partition: Whether every frame is a query of one group at most.
        transposed: `queries` and `keys` in another grouping of the same pairs, where every frame is a key of one group
            at most; the kernels then need no atomic sums. Takes `partition`.
        dropout: Probability of dropping a weight.
        positions: Positions whose bias, if any, is added to the scores.

    Returns:
        (B, H, T, D).
    """
    if has_kernel(query) and not positions.has_bias:
        return grouped_kernels.attend(query, key, value, queries, keys, radius, partition, transposed, dropout)
    places = queries.shape[-2:]
    shape = (*query.shape[:2], *places)
    scattered = queries.expand(shape).flatten(2)  # B, H, G·N
    context = _groups_attend(query, key, value, queries, keys, radius, dropout, positions)
    number = scattered.clamp_min(0)[..., None].expand(-1, -1, -1, query.shape[-1])
    real = (scattered >= 0)[..., None]
    total = torch.zeros_like(query).scatter_add(2, number, (context.flatten(2, 3) * real).to(query.dtype))
    if partition:
        return total
    count = torch.zeros_like(query[..., :1]).scatter_add(2, number[..., :1], real.to(query.dtype))
    return total / count.clamp_min(1)


def _groups_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    radius: int | None,
    dropout: float,
    positions: Positions,
) -> Tensor:
    """Each group's context, (B, H, G, N, D)."""
    mask = (keys >= 0)[..., None, :]  # B, H, G, 1, M
    if radius is not None:
        mask = mask & (_pair_offsets(queries, keys).abs() <= radius)
    bias = pair_bias(positions, queries, keys) if positions.has_bias else None
    num_sequences, num_heads, _, head_dim = query.shape
    num_groups = queries.shape[2]
    by_group = (num_sequences * num_heads, num_groups)

    def batched(tensor: Tensor) -> Tensor:  # B or 1, H or 1, G, …, … → B·H, G, …, …
        return tensor.expand(num_sequences, num_heads, -1, -1, -1).flatten(0, 1)

    context = fused_attention(
        gather(query, queries).flatten(0, 1),
        gather(key, keys).flatten(0, 1),
        gather(value, keys).flatten(0, 1),
        mask=batched(mask),
        dropout=dropout,
        bias=None if bias is None else batched(bias),
    )
    return context.view(*by_group, -1, head_dim).unflatten(0, (num_sequences, num_heads))


def pair_bias(positions: Positions, queries: Tensor, keys: Tensor) -> Tensor:
    """Bias of the scores inside groups, (B or 1, H, G, N, M), of the groups' lists as in `grouped_attention`."""
    # The bias wants the head third from last.
    return positions.bias(_pair_offsets(queries, keys).transpose(1, 2)).transpose(1, 2)


def _pair_offsets(queries: Tensor, keys: Tensor) -> Tensor:
    """Number of the key less that of the query: (…, N) and (…, M) → (…, N, M)."""
    return keys[..., None, :] - queries[..., :, None]


def gather(frames: Tensor, index: Tensor) -> Tensor:
    """Frames (B, H, T, D) by their numbers (B or 1, H or 1, G, N) → (B, H, G, N, D); number −1 gives frame 0."""
    shape = (*frames.shape[:2], *index.shape[-2:])
    number = index.clamp_min(0).expand(shape).flatten(2)[..., None].expand(-1, -1, -1, frames.shape[-1])
    return frames.gather(2, number).unflatten(2, index.shape[-2:])


def mark_empty(numbers: Tensor, valid: Tensor | None, num_frames: int) -> Tensor:
    """A list of groups for `grouped_attention` of numbers (G, N), where those outside a sequence and padded frames are −1.

    Args:
        numbers: Integers (G, N), the same for all sequences and heads.
        valid: bool (B, T), True = real frame; None: all.
        num_frames: T.

    Returns:
        int32 (B or 1, 1, G, N).
    """
    inside = (numbers >= 0) & (numbers < num_frames)
    if valid is None:
        return numbers.masked_fill(~inside, -1).to(torch.int32)[None, None]
    real = valid[:, numbers.clamp(0, num_frames - 1)] & inside  # B, G, N
    return torch.where(real, numbers, -1).to(torch.int32)[:, None]


def has_kernel(query: Tensor) -> bool:
    """Whether `grouped_attention` would take its kernels."""
    if grouped_kernels is None or not query.is_cuda or query.shape[0] * query.shape[1] > grouped_kernels.MAX_HEADS:
        return False
    return query.dtype in HALF and query.shape[-1] <= grouped_kernels.MAX_HEAD_DIM
