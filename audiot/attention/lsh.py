"""Attention to keys that locality-sensitive hashing finds: one base class, six ways to hash."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audiot.attention import hashing
from audiot.attention.grouped import gather, grouped_attention, pair_bias
from audiot.attention.hashing import Transformed
from audiot.attention.mechanism import (
    QueryKeyMechanism,
    among_real,
    at_least_one,
    check_type,
    fused_attention,
    key_mask,
    masked_softmax,
    position_bias,
)
from audiot.kernels.sorting import stable_sort
from audiot.positions import NO_POSITIONS, Positions

SEARCHES = ("topk", "chunked")
NUM_CELLS = 4096
"""Upper limit of the cells that a chunked search sorts frames into. Low enough for 250,000 heads of all sequences and rounds
in 32 bits."""


class Windows(NamedTuple):
    """A chunked search: the chunk of each query and the keys that each chunk sees, in R rounds, of C chunks."""

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


class LSHAttention(QueryKeyMechanism):
    """Base: softmax(QKᵀ/√D)V over few keys, those whose hash is close to the query's.

    Maximum inner product search by hashing: a transform of queries and one of keys turn large products into small angles
    or distances, random projections turn these into equal hash values (`audiot.attention.hashing`). All is done within one
    head of one sequence, over its real frames, on detached float32 (or better) vectors. Projections are drawn once and
    belong to the state dict. With rotary positions the hash sees rotated vectors, as the score does; a position bias is
    added to the scores of the chosen keys and plays no part in the choice.

    `search: topk`, the definition: each query attends to the `attended_keys` keys at the smallest hash distance, the
    earlier key first where distances are equal, and to all where there are fewer. Takes O(T²) time and memory, more than
    full attention, since it ranks the distances of all frames with all frames: it shows what hashing finds.

    `search: chunked`, the fast form: queries and keys are sorted by cell, a coarse hash; each chunk of `chunk_size`
    consecutive queries attends to the 3·`chunk_size` consecutive keys around the cell of its median query. With more
    rounds, each with its own projections, a query attends to all keys found in any round, as one softmax. Takes
    O(T·`chunk_size`) time and memory beside the sort. Cells are made of a few projections, the first of `num_bits`, so that
    their number is the same at all lengths, and numbered such that neighbours are similar. Before they are made, the numbers
    that a transform appends lose their mean over the sequence. No inner product changes thereby, but the keys' cells are
    no longer shifted against the queries' (with SimpleLSH and 2048 clustered frames, 43% instead of 31% of the 32 best keys
    are found).

    Works at any length: `max_frames` is ignored. Parameters: none beside the projections of the layer.

    Args:
        embed_dim: See `AttentionMechanism`.
        num_heads: See `AttentionMechanism`.
        max_frames: Ignored.
        dropout: See `AttentionMechanism`. With rounds, each drops by itself.
        share_query_key: See `QueryKeyMechanism`. The two transforms still differ.
        attended_keys: Keys a query attends to, of `search: topk`.
        num_bits: Random projections K of a head (and round).
        search: `topk` or `chunked`.
        chunk_size: Queries L of a chunk, of `search: chunked`.
        num_rounds: Independent hashes R, of `search: chunked`.

    Raises:
        ValueError: a size is not positive, the search is unknown, or `search: topk` is to have rounds.
    """

    num_extra: int
    """Numbers that the transforms append to a vector."""

    num_sorting: int
    """Projections that a chunked search makes cells of, at most."""

    projections: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        share_query_key: bool = False,
        attended_keys: int = 32,
        num_bits: int = 64,
        search: str = "topk",
        chunk_size: int = 64,
        num_rounds: int = 1,
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout, share_query_key)
        at_least_one(attended_keys=attended_keys, num_bits=num_bits, chunk_size=chunk_size, num_rounds=num_rounds)
        if search not in SEARCHES:
            raise ValueError(f"search is {search!r}: set it to one of {', '.join(SEARCHES)}")
        if search == "topk" and num_rounds > 1:
            raise ValueError(f"num_rounds is {num_rounds} but search: topk has one round: raise num_bits instead")
        self.attended_keys = attended_keys
        self.search = search
        self.chunk_size = chunk_size
        self.num_rounds = num_rounds
        columns = num_bits if search == "topk" else num_rounds * min(num_bits, self.num_sorting)
        self.register_buffer("projections", torch.randn(num_heads, self.head_dim + self.num_extra, columns))

    @abstractmethod
    def transforms(self, query: Tensor, key: Tensor, largest: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed]:
        """The query's and the key's transform; `largest` is M (B, H, 1, 1)."""

    @abstractmethod
    def distance(self, query: Tensor, key: Tensor, largest: Tensor) -> Tensor:
        """Hash distances of projected queries and keys (B, H, T, K): int32 (B, H, T, T)."""

    @abstractmethod
    def cells(self, projected: Tensor, largest: Tensor) -> Tensor:
        """The cell, 0 to `NUM_CELLS` − 1, of projected frames (…, T, K): int32 (…, T)."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """Attend to the chosen keys."""
        if self.search == "topk":
            # Fused attention to all keys under a mask: gathering 32 keys a query takes longer, its gradient longer still.
            bias = position_bias(positions, query.shape[-2], query.device)
            return fused_attention(query, key, value, self._nearest(query, key, valid), self.dropout_now, bias=bias)
        windows = self._windows(query, key, valid)
        if self.num_rounds == 1:
            groups = windows.queries(0), windows.keys(0)
            return grouped_attention(query, key, value, *groups, partition=True, dropout=self.dropout_now, positions=positions)
        return self._attend_in_rounds(query, key, value, windows, positions)

    def dense_choice(self, query: Tensor, key: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """The nearest keys by hash distance, or those that the query's chunk sees: bool (B, H, T, T)."""
        if self.search == "topk":
            return self._nearest(query, key, valid)
        windows = self._windows(query, key, valid)
        place = windows.key_place()[..., None, :] - windows.first()[..., :, None]  # R, B, H, T, T
        chosen = ((place >= 0) & (place < windows.size)).any(dim=0)
        return among_real(chosen, valid)

    @torch.no_grad()
    def _nearest(self, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
        """The `attended_keys` real keys at the smallest hash distance, bool (B, H, T, T)."""
        with torch.autocast(query.device.type, enabled=False):
            queries, keys, largest = self._transformed(query, key, valid)
            projections = self.projections.to(largest.dtype)
            distance = self.distance(hashing.project(queries, projections), hashing.project(keys, projections), largest)
        num_frames = key.shape[-2]
        # One integer ranks by distance, then by frame: sorting may order equal distances in any way.
        rank = distance * num_frames + torch.arange(num_frames, device=key.device, dtype=torch.int32)
        real = key_mask(valid)
        if real is not None:
            rank = rank.masked_fill(~real, torch.iinfo(torch.int32).max)
        last = rank.topk(min(self.attended_keys, num_frames), dim=-1, largest=False, sorted=False).values.amax(-1, keepdim=True)
        return among_real(rank <= last, valid)

    @torch.no_grad()
    def _windows(self, query: Tensor, key: Tensor, valid: Tensor | None) -> Windows:
        """Sort queries and keys by cell, cut the queries into chunks, and find each chunk's keys."""
        cell = self._cells(query, key, valid)  # 2, R, B, H, T
        shape, num_frames = cell.shape, cell.shape[-1]
        # Numbers that tell the rows apart as well: one sort of all frames is much faster on a GPU than one a row.
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

    def _cells(self, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
        """Cells of queries and keys, `NUM_CELLS` for padded frames: int32 (2, R, B, H, T)."""
        with torch.autocast(query.device.type, enabled=False):
            *sides, largest = self._transformed(query, key, valid)
            projections = self.projections.to(largest.dtype)
            projected = torch.stack([hashing.project(hashing.centred(side, valid), projections) for side in sides])
            rounds = projected.unflatten(-1, (self.num_rounds, -1)).movedim(-2, 1)  # 2, R, B, H, T, K
            cell = self.cells(rounds, largest)
        return cell if valid is None else cell.masked_fill(~valid[:, None], NUM_CELLS)

    def _transformed(self, query: Tensor, key: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed, Tensor]:
        """Transformed queries and keys, in float32 at least, and M (B, H, 1, 1)."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(dtype), key.to(dtype)
        largest = hashing.largest_norm(key, valid)
        return *self.transforms(query, key, largest, valid), largest

    def _attend_in_rounds(self, query: Tensor, key: Tensor, value: Tensor, windows: Windows, positions: Positions) -> Tensor:
        """One softmax over the keys of all rounds: a key that a query finds n times counts 1/n each time."""
        query_place, key_place, first = windows.query_place(), windows.key_place(), windows.first()
        contexts, logs = [], []
        for number in range(self.num_rounds):
            queries, keys = windows.queries(number), windows.keys(number)  # B, H, C, L and B, H, C, S
            scores = gather(query, queries) @ gather(key, keys).transpose(-2, -1) * self.head_dim**-0.5  # B, H, C, L, S
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            if positions.has_bias:
                scores = scores + pair_bias(positions, queries, keys)
            found = torch.zeros(scores.shape, dtype=scores.dtype, device=scores.device)
            for other in range(self.num_rounds):
                place = _at(key_place[other], keys)[..., None, :] - _at(first[other], queries)[..., :, None]
                found = found + ((place >= 0) & (place < windows.size))
            scores = scores - found.clamp_min(1).log()
            mask = (keys >= 0)[..., None, :]
            weights = F.dropout(masked_softmax(scores, mask), self.dropout_now).to(value.dtype)
            log = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).logsumexp(dim=-1, keepdim=True)
            by_place = query_place[number][..., None]  # B, H, T, 1
            contexts.append((weights @ gather(value, keys)).flatten(2, 3).gather(2, by_place.expand_as(query)))
            logs.append(log.flatten(2, 3).gather(2, by_place))
        shares = torch.stack(logs).softmax(dim=0).to(value.dtype)
        return (shares * torch.stack(contexts)).sum(dim=0)


def recall(mechanism: LSHAttention, query: Tensor, key: Tensor, num_keys: int = 32) -> Tensor:
    """Share of the `num_keys` keys with the largest product with a query that the search finds, a mean over all queries.

    Chance finds `attended_keys`/T of them with `search: topk`, 3·`chunk_size`/T with `search: chunked`.

    Args:
        mechanism: Any LSH mechanism.
        query: (B, H, T, D); also the keys if the mechanism shares them.
        key: (B, H, T, D).
        num_keys: Number of best keys that are looked for.
    """
    if mechanism.share_query_key:
        key = query
    best = (query @ key.transpose(-2, -1)).topk(num_keys, dim=-1).indices
    found = mechanism.dense_choice(query, key, None, NO_POSITIONS)
    return found.gather(-1, best).float().mean()


class SRPAttention(LSHAttention):
    """Base: sign random projections of the transformed vectors (Charikar 2002), compared by their Hamming distance.

    Cells of a chunked search: the bucket argmax[uA; −uA] of the projections uA, then, inside a bucket, their signs in the
    order of a Gray code. See `LSHAttention` for all else.
    """

    num_sorting = 8  # 16 buckets of 2⁸ cells: `NUM_CELLS`

    def distance(self, query: Tensor, key: Tensor, largest: Tensor) -> Tensor:
        """The number of different bits."""
        return hashing.hamming_distance(hashing.srp_code(query), hashing.srp_code(key))

    def cells(self, projected: Tensor, largest: Tensor) -> Tensor:
        """Bucket, then rank of the signs."""
        num_signs = projected.shape[-1]
        return hashing.cross_polytope(projected) * 2**num_signs + hashing.gray_rank(projected >= 0, base=2)


class SimpleLSH(SRPAttention):
    """Attention to the keys that SimpleLSH finds (Neyshabur and Srebro 2015, arXiv:1410.5518, section 4).

    Queries become [q/‖q‖; 0], keys [x/M; √(1 − ‖x/M‖²)], hashed by signs of random projections. See `LSHAttention`.
    """

    num_extra = 1

    def transforms(self, query: Tensor, key: Tensor, largest: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed]:
        """[q/‖q‖; 0] and [x/M; √(1 − ‖x/M‖²)]."""
        return hashing.simple_lsh_query(query), hashing.simple_lsh_key(key, largest)


class SimpleALSH(SRPAttention):
    """Attention to the keys that SimpleALSH finds (Neyshabur and Srebro 2015, arXiv:1410.5518, section 5).

    Queries are not normalised: with M_q the largest norm of a query they become [q/M_q; √(1 − ‖q/M_q‖²); 0], and keys
    [x/M; 0; √(1 − ‖x/M‖²)], hashed by signs of random projections. Through M_q a query can change the keys of all others.
    See `LSHAttention`.
    """

    num_extra = 2

    def transforms(self, query: Tensor, key: Tensor, largest: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed]:
        """[q/M_q; √(1 − ‖q/M_q‖²); 0] and [x/M; 0; √(1 − ‖x/M‖²)]."""
        largest_query = hashing.largest_norm(query, valid)
        return hashing.simple_alsh_query(query, largest_query), hashing.simple_alsh_key(key, largest)


class SignALSH(SRPAttention):
    """Attention to the keys that Sign-ALSH finds (Shrivastava and Li 2015, arXiv:1410.5410, section 4).

    Queries become [q/‖q‖; 0; …; 0], keys [Ux/M; ½ − ‖Ux/M‖²; ½ − ‖Ux/M‖⁴; …] with m appended terms, hashed by signs of
    random projections. See `LSHAttention`.

    Args:
        embed_dim: See `LSHAttention`.
        num_heads: See `LSHAttention`.
        max_frames: Ignored.
        dropout: See `LSHAttention`.
        share_query_key: See `LSHAttention`.
        attended_keys: See `LSHAttention`.
        num_bits: See `LSHAttention`.
        search: See `LSHAttention`.
        chunk_size: See `LSHAttention`.
        num_rounds: See `LSHAttention`.
        num_terms: m, the number of appended terms.
        max_norm: U, the norm that the longest key is scaled to.

    Raises:
        ValueError: see `LSHAttention`; or `num_terms` is not positive, or `max_norm` is outside (0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        share_query_key: bool = False,
        attended_keys: int = 32,
        num_bits: int = 64,
        search: str = "topk",
        chunk_size: int = 64,
        num_rounds: int = 1,
        num_terms: int = 2,
        max_norm: float = 0.75,
    ) -> None:
        at_least_one(num_terms=num_terms)
        check_type(float, max_norm=max_norm)
        if not 0 < max_norm < 1:
            raise ValueError(f"max_norm is {max_norm}: set it to more than 0 and less than 1")
        self.num_extra = num_terms
        super().__init__(
            embed_dim, num_heads, max_frames, dropout, share_query_key, attended_keys, num_bits, search, chunk_size, num_rounds
        )
        self.num_terms = num_terms
        self.max_norm = max_norm

    def transforms(self, query: Tensor, key: Tensor, largest: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed]:
        """[q/‖q‖; 0; …] and [Ux/M; ½ − ‖Ux/M‖²; …]."""
        return (
            hashing.sign_alsh_query(query, self.num_terms),
            hashing.sign_alsh_key(key, largest, self.num_terms, self.max_norm),
        )


class SignALSHQNF(SignALSH):
    """Sign-ALSH after query normalisation (QNF, Huang et al. 2018): the same computation as `SignALSH`.

    QNF scales a query by λ = M/‖q‖, and Sign-ALSH divides by the norm again: λq/‖λq‖ = q/‖q‖. The scaling is therefore left
    out, so that both choose the same keys to the bit. The name exists because published comparisons list both.
    """


class XBOX(LSHAttention):
    """Attention to the keys that the XBOX transform and the L2 hash find (Bachrach et al. 2014; H2-ALSH, Huang et al. 2018).

    Queries stay [q; 0], keys become [x; √(M² − ‖x‖²)], all of norm M. The L2 hash of QALSH (Huang et al. 2015) counts the
    projections a_k with |a_k·Q(q) − a_k·P(x)| ≤ w/2, w = 2M; distance is what is missing to all of them. (Signs of random
    projections would give the codes of SimpleLSH: the two transforms differ by positive factors.) See `LSHAttention`.

    Cells of a chunked search: ⌊a_k·v/w⌋ (Datar et al. 2004) of 6 projections, in the order of a Gray code of base four.

    Cost: as `LSHAttention`; `search: topk` passes over a T×T matrix for each of the `num_bits` projections.

    Differs from H2-ALSH: one radius only, without virtual rehashing, and no partition of the keys by norm.
    """

    num_extra = 1
    num_sorting = 6  # 4⁶ cells: `NUM_CELLS`

    def transforms(self, query: Tensor, key: Tensor, largest: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed]:
        """[q; 0] and [x; √(M² − ‖x‖²)]."""
        return hashing.xbox_query(query), hashing.xbox_key(key, largest)

    def distance(self, query: Tensor, key: Tensor, largest: Tensor) -> Tensor:
        """The number of projections that differ by more than M."""
        return query.shape[-1] - hashing.l2_collisions(query, key, 2 * largest)

    def cells(self, projected: Tensor, largest: Tensor) -> Tensor:
        """Rank of the hash values."""
        return hashing.gray_rank(hashing.l2_hash(projected, 2 * largest, num_cells=4), base=4)


class XBOXQNF(XBOX):
    """`XBOX` with query normalisation (QNF, Huang et al. 2018): queries become [λq; 0], λ = M/‖q‖, of the keys' norm M."""

    def transforms(self, query: Tensor, key: Tensor, largest: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed]:
        """[λq; 0] and [x; √(M² − ‖x‖²)]."""
        return hashing.xbox_qnf_query(query, largest), hashing.xbox_key(key, largest)


def _inverse(order: Tensor) -> Tensor:
    """Place of each number in permutations (…, T)."""
    return torch.empty_like(order).scatter(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))


def _at(frames: Tensor, index: Tensor) -> Tensor:
    """Values of frames (B, H, T) at their numbers (B, H, C, N); number −1 gives frame 0."""
    return frames.gather(-1, index.clamp_min(0).flatten(2)).unflatten(-1, index.shape[2:])
