"""Sparse Transformer attention: half of the heads see nearby frames, the other half see a regular sample of all frames."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from audiot.attention.grouped import grouped_attention, has_kernel, mark_empty
from audiot.attention.local import banded_attention
from audiot.attention.mechanism import QueryKeyMechanism, among_real, at_least_one, fused_attention, key_mask, offsets
from audiot.positions import Positions

GROUP = 1024
"""Queries that a kernel treats together where all attend to the same keys."""

Bias = Callable[[Tensor], Tensor] | None
"""Integer offsets key − query (I, J) → what is added to the scores of some heads (H, I, J)."""


class SparseMechanism(QueryKeyMechanism):
    """Base: half of the heads are local, the other half global; each head sees a fixed pattern of frames.

    The paper combines two patterns in three ways; this is the one by heads (Child et al. 2019, arXiv:1904.10509, section 5.1).
    The first half of the heads, rounded up, is local. A frame none of whose keys is real gets zeros.

    A single head is local.

    The other arguments are those of `QueryKeyMechanism`.

    Args:
        block_size: Frames l of a block, the unit of the patterns.
    """

    subquadratic = True

    def __init__(
        self, embed_dim: int, num_heads: int, max_frames: int, dropout: float, block_size: int, share_query_key: bool
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout, share_query_key)
        self.block_size = block_size
        self.num_local_heads = (num_heads + 1) // 2

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """Attend in blocks of frames (B, T/l, l, H, D), which are views: projections write frames before heads."""
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        num_frames = query.shape[1]
        num_blocks = (num_frames + self.block_size - 1) // self.block_size
        missing = num_blocks * self.block_size - num_frames
        if missing:
            query, key, value = (F.pad(frames, (0, 0, 0, 0, 0, missing)) for frames in (query, key, value))
            valid = torch.ones(1, num_frames, dtype=torch.bool, device=query.device) if valid is None else valid
            valid = F.pad(valid, (0, missing), value=False)
        shape = (-1, self.block_size)
        real = None if valid is None else valid.expand(len(query), -1).unflatten(1, shape)

        sizes = [self.num_local_heads, self.num_heads - self.num_local_heads]
        (q1, q2), (k1, k2), (v1, v2) = (frames.unflatten(1, shape).split(sizes, dim=3) for frames in (query, key, value))
        context = self.attend_near(q1, k1, v1, real, _bias_of_heads(positions, slice(self.num_local_heads)))
        if self.num_heads > self.num_local_heads:
            far = self.attend_far(q2, k2, v2, real, _bias_of_heads(positions, slice(self.num_local_heads, None)))
            context = torch.cat([context, far], dim=3)
        return context.flatten(1, 2)[:, :num_frames].transpose(1, 2)

    def dense_choice(self, query: Tensor, key: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """The real frames of each head's pattern, bool (B, H, T, T)."""
        position = torch.arange(query.shape[2], device=query.device)
        near, far = self.patterns(position[:, None], position)
        local = (torch.arange(self.num_heads, device=query.device) < self.num_local_heads)[:, None, None]
        choice = (near & local | far & ~local).expand(query.shape[0], -1, -1, -1)
        return among_real(choice, valid)

    @abstractmethod
    def patterns(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Whether local, and whether global heads let frame `i` see frame `j`, bool, of integers (T, 1) and (T)."""

    @abstractmethod
    def attend_near(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, bias: Bias) -> Tensor:
        """The context of local heads.

        Args:
            query: (B, T/l, l, H, D).
            key: (B, T/l, l, H, D).
            value: (B, T/l, l, H, D).
            real: bool (B, T/l, l), True = real frame; None: all.
            bias: Function of integer offsets to what is added to the scores; None: nothing.

        Returns:
            (B, T/l, l, H, D).
        """

    @abstractmethod
    def attend_far(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, bias: Bias) -> Tensor:
        """The context of global heads; arguments and result as in `attend_near`."""

    def _in_groups(self, query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor | None = None) -> Tensor:
        """Attention of blocks (B, T/l, l, H, D) inside groups of frames, by kernels.

        `queries` and `keys` are the lists of `grouped_attention`. Without `keys`, each group attends to itself.
        """
        query, key, value = (blocks.flatten(1, 2).transpose(1, 2) for blocks in (query, key, value))
        by_key = (queries, queries) if keys is None else None
        keys = queries if keys is None else keys
        context = grouped_attention(query, key, value, queries, keys, partition=True, transposed=by_key, dropout=self.dropout_now)
        return context.transpose(1, 2).unflatten(1, (-1, self.block_size))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, bias: Tensor | None) -> Tensor:
        """Fused attention in N groups of frames: (N, I, H, D) to the real ones of (N, J, H, D).

        Args:
            query: (N, I, H, D).
            key: (N, J, H, D).
            value: (N, J, H, D).
            real: bool (N, J); None: all.
            bias: Added to the scores, (H, I, J).

        Returns:
            (N, I, H, D).
        """
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return fused_attention(query, key, value, key_mask(real), self.dropout_now, bias=bias).transpose(1, 2)


class SparseStrided(SparseMechanism):
    """Strided sparse attention (Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4.3).

    Local heads see the frames with |i − j| ≤ l. Global heads see the frames that are a multiple of l away, (i − j) mod l = 0.

    Works at any length: `max_frames` is ignored. Where T ≤ l, a global head sees the frame itself alone.

    Differs from the paper: attention goes in both directions. The stride does not follow the length, so that padding changes
    nothing.

    Cost: O(T·(l + T/l)·d) time and O(T·d + T·l) memory. A position bias that differs from head to head adds
    O(T·(l + T/l)·H) to both. There are no parameters beside the projections.

    The other arguments are those of `QueryKeyMechanism`.

    Args:
        stride: Stride l in frames.

    Raises:
        ValueError: `stride` is not positive.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        stride: int = 64,
        share_query_key: bool = False,
    ) -> None:
        at_least_one(stride=stride)
        super().__init__(embed_dim, num_heads, max_frames, dropout, stride, share_query_key)

    def patterns(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """|i − j| ≤ l, and (i − j) mod l = 0."""
        return (i - j).abs() <= self.block_size, (i - j) % self.block_size == 0

    def attend_near(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, bias: Bias) -> Tensor:
        """Attention within a band."""
        query, key, value = (blocks.flatten(1, 2) for blocks in (query, key, value))  # B, T, H, D
        valid = None if real is None else real.flatten(1)
        context = banded_attention(query, key, value, self.block_size, valid, self.dropout_now, bias)
        return context.unflatten(1, (-1, self.block_size))

    def attend_far(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, bias: Bias) -> Tensor:
        """Frames at the same place of their blocks attend to each other: l independent full attentions."""
        num_sequences, num_blocks = query.shape[:2]
        if bias is None and has_kernel(query):
            return self._in_groups(query, key, value, _numbers(query, real).transpose(-2, -1))  # l groups of T/l frames
        query, key, value = (blocks.transpose(1, 2).flatten(0, 1) for blocks in (query, key, value))  # B·l, T/l, H, D
        real = None if real is None else real.transpose(1, 2).flatten(0, 1)
        scores = None if bias is None else bias(self.block_size * offsets(num_blocks, query.device))
        context = self._attention(query, key, value, real, scores)
        return context.unflatten(0, (num_sequences, self.block_size)).transpose(1, 2)


class SparseFixed(SparseMechanism):
    """Fixed sparse attention (Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4.3).

    Local heads see the frames of their own block of l frames, ⌊i/l⌋ = ⌊j/l⌋. Global heads see the summary frames, which are the
    last c frames of every block, j mod l ≥ l − c. Where none of them is real, as in sequences of at most l − c frames, the global
    heads give zeros.

    Works at any length: `max_frames` is ignored.

    Differs from the paper: attention goes in both directions. The block size does not follow the length, so that padding changes
    nothing. All heads share their summary frames.

    Cost: O(T·(l + T·c/l)·d) time and O(T·d) memory. A position bias that differs from head to head adds O(T·(l + T·c/l)·H) to
    both. There are no parameters beside the projections.

    The other arguments are those of `QueryKeyMechanism`.

    Args:
        block_size: Frames l of a block.
        num_summary: Summary frames c of a block.

    Raises:
        ValueError: `block_size` or `num_summary` is not positive, or a block has fewer frames than `num_summary`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        block_size: int = 64,
        num_summary: int = 1,
        share_query_key: bool = False,
    ) -> None:
        at_least_one(block_size=block_size, num_summary=num_summary)
        if num_summary > block_size:
            raise ValueError(
                f"num_summary is {num_summary} but a block has block_size = {block_size} frames: "
                f"set num_summary to {block_size} or less, or raise block_size"
            )
        super().__init__(embed_dim, num_heads, max_frames, dropout, block_size, share_query_key)
        self.num_summary = num_summary

    def patterns(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """⌊i/l⌋ = ⌊j/l⌋, and j mod l ≥ l − c."""
        return i // self.block_size == j // self.block_size, j % self.block_size >= self.block_size - self.num_summary

    def attend_near(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, bias: Bias) -> Tensor:
        """Each block attends to itself."""
        num_sequences = len(query)
        if bias is None and has_kernel(query):
            return self._in_groups(query, key, value, _numbers(query, real))
        query, key, value = (blocks.flatten(0, 1) for blocks in (query, key, value))  # B·T/l, l, H, D
        real = None if real is None else real.flatten(0, 1)
        scores = None if bias is None else bias(offsets(self.block_size, query.device))
        return self._attention(query, key, value, real, scores).unflatten(0, (num_sequences, -1))

    def attend_far(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, bias: Bias) -> Tensor:
        """All frames attend to the summary frames."""
        num_blocks = query.shape[1]
        num_frames = num_blocks * self.block_size
        summary_real = None if real is None else self._summary(real)
        if bias is None and has_kernel(query):
            # In groups of some queries and all summary frames, enough work is independent in the backward pass too.
            first = torch.arange(0, num_frames, GROUP, device=query.device)[:, None]
            numbers = first + torch.arange(GROUP, device=query.device)
            queries = mark_empty(numbers, None if real is None else real.flatten(1), num_frames)
            num_keys = num_blocks * self.num_summary
            keys = mark_empty(torch.arange(num_keys, device=query.device)[None], summary_real, num_keys)
            key, value = (blocks[:, :, self.block_size - self.num_summary :] for blocks in (key, value))
            return self._in_groups(query, key, value, queries, keys.expand(-1, -1, len(numbers), -1))
        scores = None
        if bias is not None:
            position = torch.arange(num_frames, device=query.device)
            summary = self._summary(position.view(1, num_blocks, self.block_size))
            scores = bias(summary - position[:, None])  # H, T, T·c/l
        key, value = self._summary(key), self._summary(value)  # B, T·c/l, H, D
        context = self._attention(query.flatten(1, 2), key, value, summary_real, scores)
        return context.unflatten(1, (-1, self.block_size))

    def _summary(self, blocks: Tensor) -> Tensor:
        """The last c frames of every block: (B, T/l, l, …) → (B, T·c/l, …)."""
        return blocks[:, :, self.block_size - self.num_summary :].flatten(1, 2)


def _numbers(blocks: Tensor, real: Tensor | None) -> Tensor:
    """Numbers of the frames in blocks (B, T/l, l, H, D), as a list for `grouped_attention`: (B or 1, 1, T/l, l)."""
    num_blocks, block_size = blocks.shape[1:3]
    numbers = torch.arange(num_blocks * block_size, device=blocks.device).view(num_blocks, block_size)
    return mark_empty(numbers, None if real is None else real.flatten(1), numbers.numel())


def _bias_of_heads(positions: Positions, heads: slice) -> Bias:
    """The part of the position bias that concerns `heads`; None where the positions have none."""
    return (lambda offset: positions.bias(offset)[heads]) if positions.has_bias else None
