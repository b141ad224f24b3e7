"""How hashed attention finds a query's keys: by ranking all of them, or by sorting queries and keys into chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention.grouped import gather, grouped_attention, pair_bias
from audiot.attention.mechanism import among_real, at_least_one, fused_attention, key_mask, masked_softmax, position_bias
from audiot.base.tracing import is_recording
from audiot.kernels.sorting import stable_sort
from audiot.positions import Positions

NUM_CELLS = 4096
"""Upper limit of the cells that a chunked search sorts frames into. It is low enough to number the cells of 250,000 heads, of all
sequences and rounds, in 32 bits."""


class Hasher(Protocol):
    """What a search asks of the mechanism that hashes."""

    def distances(self, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
        """Hash distances of queries and keys (B, H, T, D): int32 (B, H, T, T)."""

    def all_cells(self, query: Tensor, key: Tensor, valid: Tensor | None, num_rounds: int) -> Tensor:
        """Cells of queries and keys in R rounds, `NUM_CELLS` for padded frames: int32 (2, R, B, H, T)."""


class Search(nn.Module, ABC):
    """Base: how a mechanism with hashes finds a query's keys. It has no state, so that several mechanisms may have the same."""

    @abstractmethod
    def num_projections(self, num_bits: int, num_sorting: int) -> int:
        """Number of random projections per head.

        Args:
            num_bits: Projections asked for.
            num_sorting: Projections that the hash can make cells of.
        """

    @abstractmethod
    def attend(
        self,
        hasher: Hasher,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        positions: Positions,
        dropout: float,
    ) -> Tensor:
        """The context (B, H, T, D) of queries that attend to the keys found."""

    @abstractmethod
    def choice(self, hasher: Hasher, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
        """The keys found, bool (B, H, T, T)."""


class TopK(Search):
    """The definition: each query attends to the keys at the smallest hash distance, to all where there are fewer.

    Of keys at equal distances the earlier come first.

    Cost: O(T²) time and memory, more than full attention, since it ranks the distances of all frames with all frames.

    Args:
        attended_keys: Keys that a query attends to.

    Raises:
        ValueError: `attended_keys` is not positive.
    """

    def __init__(self, attended_keys: int = 32) -> None:
        super().__init__()
        at_least_one(attended_keys=attended_keys)
        self.attended_keys = attended_keys

    def num_projections(self, num_bits: int, num_sorting: int) -> int:
        """All that are asked for."""
        return num_bits

    def attend(
        self,
        hasher: Hasher,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        positions: Positions,
        dropout: float,
    ) -> Tensor:
        """Fused attention to all keys under a mask: gathering 32 keys per query takes longer, its gradient longer still."""
        bias = position_bias(positions, query.shape[-2], query.device)
        return fused_attention(query, key, value, self.choice(hasher, query, key, valid), dropout, bias=bias)

    @torch.no_grad()
    def choice(self, hasher: Hasher, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
        """The `attended_keys` real keys at the smallest hash distance, bool (B, H, T, T)."""
        distance = hasher.distances(query, key, valid)
        num_frames = key.shape[-2]
        # One integer ranks by distance, then by frame: sorting may order equal distances in any way.
        rank = distance * num_frames + torch.arange(num_frames, device=key.device, dtype=torch.int32)
        real = key_mask(valid)
        if real is not None:
            rank = rank.masked_fill(~real, torch.iinfo(torch.int32).max)
        last = rank.topk(min(self.attended_keys, num_frames), dim=-1, largest=False, sorted=False).values.amax(-1, keepdim=True)
        return among_real(rank <= last, valid)

    def extra_repr(self) -> str:
        """The argument, shown by `print(model)`."""
        return f"attended_keys={self.attended_keys}"


class Windows(NamedTuple):
    """The chunk of each query and the keys that each chunk sees, in R rounds, of C chunks."""

    query_order: Tensor  # R, B, H, T: frames by cell, padded ones last
    key_order: Tensor  # R, B, H, T: likewise
    start: Tensor  # R, B, H, C: place in `key_order` of the first key that a chunk sees
    size: int  # keys that a chunk sees, S
    chunk_size: int  # L
    num_real: Tensor | int  # B, 1, 1, or the number of frames of every sequence

    def queries(self, number: int) -> Tensor:
        """Frames of each chunk in one round, −1 beyond the real ones: (B, H, C, L)."""
        order = self.query_order[number]
        place = torch.arange(self.start.shape[-1] * self.chunk_size, device=order.device)
        frames = order[..., place.clamp_max(order.shape[-1] - 1)].masked_fill(place >= self.num_real, -1)
        return frames.unflatten(-1, (-1, self.chunk_size))

    def keys(self, number: int) -> Tensor:
        """Frames that each chunk sees in one round, −1 beyond the real ones: (B, H, C, S)."""
        start = self.start[number][..., None]
        place = (start + torch.arange(self.size, device=start.device)).flatten(2)
        frames = self.key_order[number].gather(-1, place).masked_fill(place >= self.num_real, -1)
        return frames.unflatten(-1, (-1, self.size))

    def query_place(self) -> Tensor:
        """Place of each frame in `query_order`, (R, B, H, T)."""
        return _inverse(self.query_order)

    def key_place(self) -> Tensor:
        """Place of each frame in `key_order`, (R, B, H, T)."""
        return _inverse(self.key_order)

    def first(self) -> Tensor:
        """Place in `key_order` of the first key that each query sees, (R, B, H, T)."""
        return self.start.gather(-1, self.query_place() // self.chunk_size)


class Chunked(Search):
    """The fast form: queries and keys are sorted by cell, and consecutive queries attend to the keys around their cell.

    A cell is a coarse hash. Each chunk of L = `chunk_size` consecutive queries attends to the 3L consecutive keys around the cell
    of its median query. With more rounds, each with its own projections, a query attends to all keys that any round finds, as one
    softmax. Cells are made of the first few projections, so that their number is the same at all lengths. They are numbered such
    that neighbours are similar.

    Cost: O(T·L) time and memory per round, beside the sort.

    Args:
        chunk_size: Queries L of a chunk.
        num_rounds: Independent hashes R.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, chunk_size: int = 64, num_rounds: int = 1) -> None:
        super().__init__()
        at_least_one(chunk_size=chunk_size, num_rounds=num_rounds)
        self.chunk_size = chunk_size
        self.num_rounds = num_rounds

    def num_projections(self, num_bits: int, num_sorting: int) -> int:
        """Those that make cells, for every round."""
        return self.num_rounds * min(num_bits, num_sorting)

    def attend(
        self,
        hasher: Hasher,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        positions: Positions,
        dropout: float,
    ) -> Tensor:
        """Attention inside each chunk. With rounds, each drops weights by itself."""
        windows = self.windows(hasher, query, key, valid)
        if self.num_rounds == 1:
            groups = windows.queries(0), windows.keys(0)
            return grouped_attention(query, key, value, *groups, partition=True, dropout=dropout, positions=positions)
        return self._attend_in_rounds(query, key, value, windows, positions, dropout)

    def choice(self, hasher: Hasher, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
        """The keys that the query's chunk sees, bool (B, H, T, T)."""
        windows = self.windows(hasher, query, key, valid)
        place = windows.key_place()[..., None, :] - windows.first()[..., :, None]  # R, B, H, T, T
        chosen = ((place >= 0) & (place < windows.size)).any(dim=0)
        return among_real(chosen, valid)

    @torch.no_grad()
    def windows(self, hasher: Hasher, query: Tensor, key: Tensor, valid: Tensor | None) -> Windows:
        """Sort queries and keys by cell, cut the queries into chunks, and find each chunk's keys."""
        if is_recording():
            raise ValueError(
                "attention/search=chunked sorts a known number of frames, which a graph has not: attention/search=topk"
            )
        cell = hasher.all_cells(query, key, valid, self.num_rounds)  # 2, R, B, H, T
        shape, num_frames = cell.shape, cell.shape[-1]
        # Numbers that tell the rows apart as well: one sort of all frames is much faster on a GPU than one per row.
        num_rows = shape[1] * shape[2] * shape[3]
        row = torch.arange(2 * num_rows, device=cell.device, dtype=torch.int32).view(*shape[:-1], 1)
        cell, order = stable_sort((row * (NUM_CELLS + 1) + cell).flatten())
        query_order, key_order = (order % num_frames).view(shape)

        # Each chunk's median, of its real queries only, and the middle of the keys of the same cell.
        num_real = num_frames if valid is None else valid.sum(dim=-1)[:, None, None]
        chunk = torch.arange(0, num_frames, self.chunk_size, device=cell.device)
        median = (chunk + ((num_real - chunk).clamp(1, self.chunk_size) - 1) // 2).expand(*shape[1:-1], -1)  # R, B, H, C
        wanted = cell.view(shape)[0].gather(-1, median) + num_rows * (NUM_CELLS + 1)  # its number among the keys
        middle = (torch.searchsorted(cell, wanted) + torch.searchsorted(cell, wanted, right=True)) // 2
        middle = middle - row[1] * num_frames

        size = min(3 * self.chunk_size, num_frames)
        start = (middle - size // 2).clamp_max(num_real - size).clamp_min(0)
        return Windows(query_order, key_order, start, size, self.chunk_size, num_real)

    def _attend_in_rounds(
        self, query: Tensor, key: Tensor, value: Tensor, windows: Windows, positions: Positions, dropout: float
    ) -> Tensor:
        """One softmax over the keys of all rounds: a key that a query finds n times counts 1/n each time."""
        query_place, key_place, first = windows.query_place(), windows.key_place(), windows.first()
        contexts, logs = [], []
        for number in range(self.num_rounds):
            queries, keys = windows.queries(number), windows.keys(number)  # B, H, C, L and B, H, C, S
            scores = gather(query, queries) @ gather(key, keys).transpose(-2, -1) * query.shape[-1] ** -0.5  # B, H, C, L, S
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            if positions.has_bias:
                scores = scores + pair_bias(positions, queries, keys)
            found = torch.zeros(scores.shape, dtype=scores.dtype, device=scores.device)
            for other in range(self.num_rounds):
                place = _at(key_place[other], keys)[..., None, :] - _at(first[other], queries)[..., :, None]
                found = found + ((place >= 0) & (place < windows.size))
            scores = scores - found.clamp_min(1).log()
            mask = (keys >= 0)[..., None, :]
            weights = F.dropout(masked_softmax(scores, mask), dropout).to(value.dtype)
            log = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).logsumexp(dim=-1, keepdim=True)
            by_place = query_place[number][..., None]  # B, H, T, 1
            contexts.append((weights @ gather(value, keys)).flatten(2, 3).gather(2, by_place.expand_as(query)))
            logs.append(log.flatten(2, 3).gather(2, by_place))
        shares = torch.stack(logs).softmax(dim=0).to(value.dtype)
        return (shares * torch.stack(contexts)).sum(dim=0)

    def extra_repr(self) -> str:
        """The arguments, shown by `print(model)`."""
        return f"chunk_size={self.chunk_size}, num_rounds={self.num_rounds}"


def _inverse(order: Tensor) -> Tensor:
    """Place of each number in permutations (…, T)."""
    return torch.empty_like(order).scatter(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))


def _at(frames: Tensor, index: Tensor) -> Tensor:
    """Values of frames (B, H, T) at their numbers (B, H, C, N); number −1 gives frame 0."""
    return frames.gather(-1, index.clamp_min(0).flatten(2)).unflatten(-1, index.shape[2:])
