"""Attention within a window."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from audiot.attention.grouped import grouped_attention, has_kernel, mark_empty
from audiot.attention.mechanism import QueryKeyMechanism, among_real, at_least_one, offsets
from audiot.positions import Positions

CHUNK = 64
"""Number of queries that share their keys where the window is small: the tile of PyTorch's fused kernels."""


class Local(QueryKeyMechanism):
    """Softmax attention to the frames at most `window` away, on both sides (Longformer, Beltagy et al. 2020,
    arXiv:2004.05150, section 3.1).

    Works at any length: `max_frames` is ignored.

    Differs from the paper: all layers have one window, and there are no dilation and no global frames. `window` counts the frames
    on one side; Longformer's counts both.

    Cost: O(T·window·d) time and O(T·d + T·window) memory. A position bias that differs from head to head makes the second term
    O(T·window·H). There are no parameters beside the projections.

    The other arguments are those of `QueryKeyMechanism`.

    Args:
        window: Largest distance |i − j| at which frames i and j see each other.

    Raises:
        ValueError: `window` is not positive.
    """

    subquadratic = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        window: int = 64,
        share_query_key: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout, share_query_key)
        at_least_one(window=window)
        self.window = window

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """Attend in chunks of queries, with the keys that lie in the window of any of them."""
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        bias = positions.bias if positions.has_bias else None
        return banded_attention(query, key, value, self.window, valid, self.dropout_now, bias).transpose(1, 2)

    def dense_choice(self, query: Tensor, key: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """The real frames with |i − j| ≤ `window`, bool (B, H, T, T)."""
        near = offsets(query.shape[2], query.device).abs() <= self.window
        return among_real(near.expand(*query.shape[:2], -1, -1), valid)


def banded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    radius: int,
    valid: Tensor | None = None,
    dropout: float = 0.0,
    bias: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Softmax attention of every frame to the real frames at most `radius` away.

    Each chunk of queries attends to its own frames and to a halo of `radius` frames on both sides, under a mask. Frames come
    before heads, which is the order in which projections write them. Chunks are then views. Frames that see no real frame give
    zeros.

    Args:
        query: (B, T, H, D).
        key: (B, T, H, D).
        value: (B, T, H, D).
        radius: Largest distance |i − j|, 1 or more.
        valid: bool (B or 1, T), True = real frame; None: all.
        dropout: Probability of dropping a weight.
        bias: Function of integer offsets key − query (I, J) to what is added to the scores, (H, I, J); None: nothing.

    Returns:
        (B, T, H, D).
    """
    num_sequences, num_frames = query.shape[:2]
    if bias is None and has_kernel(query):
        return _banded_groups(query, key, value, radius, valid, dropout)
    if valid is not None:
        value = value * valid[:, :, None, None]
    halo = -(-radius // 8) * 8  # fused kernels copy masks whose columns are no multiple of 8
    chunk = CHUNK if 2 * halo <= CHUNK else halo
    if num_frames <= chunk + 2 * halo:  # all frames are no more than the keys of one chunk
        chunk, halo = num_frames, 0
    num_chunks = (num_frames + chunk - 1) // chunk
    missing = num_chunks * chunk - num_frames
    if missing:
        query, key, value = (F.pad(frames, (0, 0, 0, 0, 0, missing)) for frames in (query, key, value))

    place = torch.arange(
        -halo, chunk + halo, device=query.device
    )  # places of S = chunk + 2·halo keys; 0 is the chunk's first frame
    offset = place - torch.arange(chunk, device=query.device)[:, None]  # chunk, S
    scores = torch.zeros_like(offset, dtype=query.dtype) if bias is None else bias(offset).to(query.dtype)
    scores = scores.masked_fill(offset.abs() > radius, -torch.inf)  # chunk, S or H, chunk, S
    frame = chunk * torch.arange(num_chunks, device=query.device)[:, None] + place  # chunks, S
    real = (frame >= 0) & (frame < num_frames)
    if valid is not None:
        real = real & valid[:, frame.clamp(0, num_frames - 1)]  # B or 1, chunks, S
    # A padded frame sees itself, whose value is zero: a softmax over no key at all would be NaN.
    seen = real[..., None, None, :] | (offset == 0)  # (B or 1,) chunks, 1, chunk, S
    mask = torch.where(seen.expand(num_sequences, -1, -1, -1, -1), scores, -torch.inf).flatten(0, 1)

    query, key, value = (frames.unflatten(1, (-1, chunk)).flatten(0, 1) for frames in (query, key, value))
    key, value = _with_halo(key, halo), _with_halo(value, halo)  # B·chunks, S, H, D
    context = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, dropout_p=dropout
    )
    return context.transpose(1, 2).unflatten(0, (num_sequences, -1)).flatten(1, 2)[:, :num_frames]


def _banded_groups(query: Tensor, key: Tensor, value: Tensor, radius: int, valid: Tensor | None, dropout: float) -> Tensor:
    """`banded_attention` by kernels: the queries of a group are a chunk, its keys are these frames and those around them."""
    num_frames = query.shape[1]
    first = torch.arange(0, num_frames, CHUNK, device=query.device)[:, None]
    queries = mark_empty(first + torch.arange(CHUNK, device=query.device), valid, num_frames)
    keys = mark_empty(first + torch.arange(-radius, CHUNK + radius, device=query.device), valid, num_frames)
    # Nearness is mutual: if queries and keys change roles, every frame is a key of one group.
    query, key, value = (frames.transpose(1, 2) for frames in (query, key, value))
    context = grouped_attention(
        query,
        key,
        value,
        queries,
        keys,
        radius=radius,
        partition=True,
        transposed=(keys, queries),
        dropout=dropout,
    )
    return context.transpose(1, 2)


def _with_halo(chunks: Tensor, halo: int) -> Tensor:
    """Put chunks between the frames before and after them: (N, C, H, D) → (N, C + 2·halo, H, D).

    The N chunks of the batch are treated as one ring. So frames of other sequences come before the first and after the last
    chunk of a sequence; the caller must mask them. C is `halo`, or 2·`halo` and more.
    """
    if not halo:
        return chunks
    length = chunks.shape[1]
    # The parts are disjoint: the gradient of a split is one concatenation, that of overlapping slices is several sums with zeros.
    parts = (chunks,) if length == halo else chunks.split([halo, length - 2 * halo, halo], dim=1)
    return torch.cat([parts[-1].roll(1, 0), *parts, parts[0].roll(-1, 0)], dim=1)
