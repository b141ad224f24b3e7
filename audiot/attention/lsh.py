"""Attention to keys that locality-sensitive hashing finds: one base class, six ways to hash."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from audiot.attention import hashing
from audiot.attention.hashing import Transformed
from audiot.attention.mechanism import QueryKeyMechanism, at_least_one, check_type
from audiot.attention.search import NUM_CELLS, Search, TopK
from audiot.positions import NO_POSITIONS, Positions


class LSHAttention(QueryKeyMechanism):
    """Base: softmax(QKᵀ/√D)V over few keys, those whose hash is close to the query's.

    This is maximum inner product search by hashing. A transform of queries and one of keys turn large products into small angles
    or distances. Random projections turn these into equal hash values (`audiot.attention.hashing`). All is done within one head
    of one sequence, over its real frames, on detached float32 (or better) vectors. Projections are drawn once and belong to the
    state dict. With rotary positions the hash sees rotated vectors, as the score does. A position bias is added to the scores of
    the chosen keys and plays no part in the choice.

    The `search` says how the keys are found (`audiot.attention.search`): `TopK` ranks all of them, `Chunked` sorts frames into
    cells.

    Before cells are made, the numbers that a transform appends lose their mean over the sequence. No inner product changes
    thereby, but the keys' cells are no longer shifted against the queries'. (With SimpleLSH and 2048 clustered frames, 43% of the
    32 best keys are found, and 31% without.)

    Works at any length: `max_frames` is ignored. There are no parameters beside the projections of the layer.

    The other arguments are those of `QueryKeyMechanism`. With `share_query_key`, the two transforms still differ.

    Args:
        num_bits: Random projections K per head (and round).
        search: Way to find the keys; None = `TopK()`.

    Raises:
        ValueError: `num_bits` is not positive, or `search` is no search.
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
        num_bits: int = 64,
        search: Search | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout, share_query_key)
        at_least_one(num_bits=num_bits)
        self.search = TopK() if search is None else search
        if not isinstance(self.search, Search):
            raise ValueError(f"search is {search!r}: pass an object of audiot.attention.search, such as TopK() or Chunked()")
        columns = self.search.num_projections(num_bits, self.num_sorting)
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
        return self.search.attend(self, query, key, value, valid, positions, self.dropout_now)

    def dense_choice(self, query: Tensor, key: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """The keys that the search finds, bool (B, H, T, T)."""
        return self.search.choice(self, query, key, valid)

    def distances(self, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
        """Hash distances of queries and keys (B, H, T, D): int32 (B, H, T, T)."""
        with torch.autocast(query.device.type, enabled=False):
            queries, keys, largest = self._transformed(query, key, valid)
            projections = self.projections.to(largest.dtype)
            return self.distance(hashing.project(queries, projections), hashing.project(keys, projections), largest)

    def all_cells(self, query: Tensor, key: Tensor, valid: Tensor | None, num_rounds: int) -> Tensor:
        """Cells of queries and keys in R rounds, `NUM_CELLS` for padded frames: int32 (2, R, B, H, T)."""
        with torch.autocast(query.device.type, enabled=False):
            *sides, largest = self._transformed(query, key, valid)
            projections = self.projections.to(largest.dtype)
            projected = torch.stack([hashing.project(hashing.centred(side, valid), projections) for side in sides])
            rounds = projected.unflatten(-1, (num_rounds, -1)).movedim(-2, 1)  # 2, R, B, H, T, K
            cell = self.cells(rounds, largest)
        return cell if valid is None else cell.masked_fill(~valid[:, None], NUM_CELLS)

    def _transformed(self, query: Tensor, key: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed, Tensor]:
        """Transformed queries and keys, in float32 at least, and M (B, H, 1, 1)."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(dtype), key.to(dtype)
        largest = hashing.largest_norm(key, valid)
        return *self.transforms(query, key, largest, valid), largest


def recall(mechanism: LSHAttention, query: Tensor, key: Tensor, num_keys: int = 32) -> Tensor:
    """Share of the `num_keys` keys with the largest product with a query that the search finds, a mean over all queries.

    Chance finds `attended_keys`/T of them with the search `TopK`, 3·`chunk_size`/T with `Chunked`.

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
    order of a Gray code.
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

    Queries become [q/‖q‖; 0], keys [x/M; √(1 − ‖x/M‖²)], hashed by signs of random projections.
    """

    num_extra = 1

    def transforms(self, query: Tensor, key: Tensor, largest: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed]:
        """[q/‖q‖; 0] and [x/M; √(1 − ‖x/M‖²)]."""
        return hashing.simple_lsh_query(query), hashing.simple_lsh_key(key, largest)


class SimpleALSH(SRPAttention):
    """Attention to the keys that SimpleALSH finds (Neyshabur and Srebro 2015, arXiv:1410.5518, section 5).

    Queries are not normalised: with M_q the largest norm of a query they become [q/M_q; √(1 − ‖q/M_q‖²); 0], and keys
    [x/M; 0; √(1 − ‖x/M‖²)], hashed by signs of random projections. Through M_q a query can change the keys of all others.
    """

    num_extra = 2

    def transforms(self, query: Tensor, key: Tensor, largest: Tensor, valid: Tensor | None) -> tuple[Transformed, Transformed]:
        """[q/M_q; √(1 − ‖q/M_q‖²); 0] and [x/M; 0; √(1 − ‖x/M‖²)]."""
        largest_query = hashing.largest_norm(query, valid)
        return hashing.simple_alsh_query(query, largest_query), hashing.simple_alsh_key(key, largest)


class SignALSH(SRPAttention):
    """Attention to the keys that Sign-ALSH finds (Shrivastava and Li 2015, arXiv:1410.5410, section 4).

    Queries become [q/‖q‖; 0; …; 0], keys [Ux/M; ½ − ‖Ux/M‖²; ½ − ‖Ux/M‖⁴; …] with m appended terms. Both are hashed by the
    signs of random projections.

    The other arguments are those of `LSHAttention`.

    Args:
        num_terms: Number m of appended terms.
        max_norm: Norm U that the longest key is scaled to.

    Raises:
        ValueError: `num_terms` is not positive, or `max_norm` is outside (0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        share_query_key: bool = False,
        num_bits: int = 64,
        search: Search | None = None,
        num_terms: int = 2,
        max_norm: float = 0.75,
    ) -> None:
        at_least_one(num_terms=num_terms)
        check_type(float, max_norm=max_norm)
        if not 0 < max_norm < 1:
            raise ValueError(f"max_norm is {max_norm}: set it to more than 0 and less than 1")
        self.num_extra = num_terms
        super().__init__(embed_dim, num_heads, max_frames, dropout, share_query_key, num_bits, search)
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
    projections would give the codes of SimpleLSH: the two transforms differ by positive factors.)

    Cells of a chunked search: ⌊a_k·v/w⌋ (Datar et al. 2004) of 6 projections, in the order of a Gray code of base four.

    Cost: that of the search. `TopK` passes over a T×T matrix for each of the `num_bits` projections.

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
