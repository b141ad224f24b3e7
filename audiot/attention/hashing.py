"""Hashing for maximum inner product search: transforms of queries and keys, and the hashes that follow them.

A transform turns large inner products into small angles (for sign random projections) or small distances (for the L2 hash).
It scales a vector and appends a few numbers, so that every transform is a `Transformed`. Queries are written q, keys x. M is
the largest norm of a key among the real frames of one sequence and head. Papers:

- Charikar 2002, "Similarity estimation techniques from rounding algorithms": sign random projections (SRP).
- Datar et al. 2004, "Locality-sensitive hashing scheme based on p-stable distributions": the L2 hash.
- Bachrach et al. 2014, "Speeding up the Xbox recommender system using a Euclidean transformation for inner-product spaces".
- Neyshabur and Srebro 2015, arXiv:1410.5518: SimpleLSH and SimpleALSH.
- Shrivastava and Li 2015, arXiv:1410.5410: Sign-ALSH.
- Huang et al. 2015, "Query-aware locality-sensitive hashing for approximate nearest neighbor search" (QALSH).
- Huang et al. 2018, "Accurate and fast asymmetric locality-sensitive hashing scheme for maximum inner product search":
  query normalisation (QNF), and QALSH after the XBOX transform (H2-ALSH).

Shape legend: B sequences, H heads, T frames, D = head size, E appended numbers, K projections.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from audiot.base.tracing import is_recording

EPSILON = 1e-12


class Transformed(NamedTuple):
    """The vectors [scale·v; extra]. Kept in parts: joining them would copy all frames."""

    vectors: Tensor  # B, H, T, D
    scale: Tensor | float  # B, H, T or 1, 1
    extra: Tensor  # B, H, T, E


def norm(vectors: Tensor) -> Tensor:
    """‖v‖, at least ε: (B, H, T, D) → (B, H, T, 1)."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(EPSILON)


def largest_norm(vectors: Tensor, valid: Tensor | None) -> Tensor:
    """The largest ‖v‖ among the real frames of each sequence and head, at least ε: (B, H, T, D) → (B, H, 1, 1)."""
    norms = norm(vectors)
    if valid is not None:
        norms = norms.masked_fill(~valid[:, None, :, None], EPSILON)
    return norms.amax(dim=2, keepdim=True)


def simple_lsh_query(query: Tensor) -> Transformed:
    """SimpleLSH: [q/‖q‖; 0]."""
    length = norm(query)
    return Transformed(query, 1 / length, torch.zeros_like(length))


def simple_lsh_key(key: Tensor, largest: Tensor) -> Transformed:
    """SimpleLSH: [x/M; √(1 − ‖x/M‖²)]."""
    return Transformed(key, 1 / largest, _rest(key, largest))


def simple_alsh_query(query: Tensor, largest: Tensor) -> Transformed:
    """SimpleALSH: [q/M_q; √(1 − ‖q/M_q‖²); 0], M_q = `largest` norm of a query."""
    rest = _rest(query, largest)
    return Transformed(query, 1 / largest, torch.cat([rest, torch.zeros_like(rest)], dim=-1))


def simple_alsh_key(key: Tensor, largest: Tensor) -> Transformed:
    """SimpleALSH: [x/M; 0; √(1 − ‖x/M‖²)]."""
    rest = _rest(key, largest)
    return Transformed(key, 1 / largest, torch.cat([torch.zeros_like(rest), rest], dim=-1))


def xbox_query(query: Tensor) -> Transformed:
    """XBOX: [q; 0]."""
    return Transformed(query, 1.0, torch.zeros_like(query[..., :1]))


def xbox_qnf_query(query: Tensor, largest: Tensor) -> Transformed:
    """XBOX with query normalisation: [λq; 0], λ = M/‖q‖."""
    length = norm(query)
    return Transformed(query, largest / length, torch.zeros_like(length))


def xbox_key(key: Tensor, largest: Tensor) -> Transformed:
    """XBOX: [x; √(M² − ‖x‖²)]."""
    return Transformed(key, 1.0, (largest.square() - norm(key).square()).clamp_min(0).sqrt())


def sign_alsh_query(query: Tensor, num_terms: int) -> Transformed:
    """Sign-ALSH: [q/‖q‖; 0; …; 0], `num_terms` zeros."""
    length = norm(query)
    return Transformed(query, 1 / length, torch.zeros_like(length).expand(-1, -1, -1, num_terms))


def sign_alsh_key(key: Tensor, largest: Tensor, num_terms: int, max_norm: float) -> Transformed:
    """Sign-ALSH: [Ux/M; ½ − ‖Ux/M‖²; ½ − ‖Ux/M‖⁴; …; ½ − ‖Ux/M‖^(2^m)], m = `num_terms`, U = `max_norm`."""
    scale = max_norm / largest
    power = (norm(key) * scale).clamp_max(max_norm).square()  # padded keys may be longer than M, and powers explode
    terms = []
    for _ in range(num_terms):
        terms.append(0.5 - power)
        power = power.square()
    return Transformed(key, scale, torch.cat(terms, dim=-1))


def centred(transformed: Transformed, valid: Tensor | None) -> Transformed:
    """The same vectors, whose appended numbers have lost their mean over the real frames.

    No inner product changes, as the other side of every transform here has zeros in the same places.
    """
    extra = transformed.extra
    if valid is None:
        mean = extra.mean(dim=2, keepdim=True)
    else:
        real = valid[:, None, :, None]
        mean = extra.masked_fill(~real, 0).sum(dim=2, keepdim=True) / real.sum(dim=2, keepdim=True).clamp_min(1)
    return transformed._replace(extra=extra - mean)


def project(transformed: Transformed, projections: Tensor) -> Tensor:
    """a_k·[scale·v; extra] for the K columns a_k of each head's projections (H, D + E, K): (B, H, T, K)."""
    size = transformed.vectors.shape[-1]
    product = _products(transformed.vectors, projections[:, :size])
    return product * transformed.scale + _products(transformed.extra, projections[:, size:])


def _products(vectors: Tensor, columns: Tensor) -> Tensor:
    """(B, H, T, D) times the columns of each head (H, D, K): (B, H, T, K)."""
    if is_recording():  # the other one asks for strides, and the graph would not hold for a single sequence
        return vectors @ columns
    return torch.einsum("bhtd,hdk->bhtk", vectors, columns)


def srp_code(projected: Tensor) -> Tensor:
    """Sign random projections as ±1; the sign of zero is +1."""
    return torch.where(projected >= 0, 1.0, -1.0).to(projected.dtype)


def hamming_distance(query_code: Tensor, key_code: Tensor) -> Tensor:
    """Number of different bits of ±1 codes (…, T, K) and (…, S, K): int32 (…, T, S)."""
    agreeing_less_different = query_code @ key_code.transpose(-2, -1)  # small integers: exact
    return ((query_code.shape[-1] - agreeing_less_different) / 2).to(torch.int32)


def l2_collisions(query: Tensor, key: Tensor, width: Tensor) -> Tensor:
    """Number of projections in which query and key differ by w/2 at most (QALSH at one radius).

    This takes one projection after another, as all differences at once would be T·S·K numbers. Compiled, it is one sum, whose
    terms are not stored. (Inductor would turn the loop into K steps, and Triton takes over a minute to compile their kernel.)

    Args:
        query: Projected queries (…, T, K).
        key: Projected keys (…, S, K).
        width: Width w of a cell, (…, 1, 1).

    Returns:
        int32 (…, T, S).
    """
    if torch.compiler.is_compiling():
        near = (query[..., :, None, :] - key[..., None, :, :]).abs() <= width[..., None] / 2
        return near.sum(dim=-1, dtype=torch.int32)
    count = torch.zeros((), dtype=torch.int32, device=query.device)
    for q, k in zip(query.unbind(-1), key.unbind(-1), strict=True):
        count = count + ((q[..., :, None] - k[..., None, :]).abs() <= width / 2)
    return count


def l2_hash(projected: Tensor, width: Tensor, num_cells: int) -> Tensor:
    """The L2 hash ⌊a·v/w⌋ of projections (…, T, K): int16 (…, T, K), one of the `num_cells` (even) cells around zero.

    Values further out fall into the first or the last cell.
    """
    middle = num_cells // 2
    return ((projected / width).floor().clamp(-middle, middle - 1) + middle).to(torch.int16)


def cross_polytope(projected: Tensor) -> Tensor:
    """Bucket argmax[uA; −uA] of projections uA (…, K), one of 2K (Andoni et al. 2015, arXiv:1509.02897): int32 (…)."""
    largest = projected.abs().argmax(dim=-1, keepdim=True)
    negative = projected.gather(-1, largest) < 0
    return (largest + projected.shape[-1] * negative).squeeze(-1).to(torch.int32)


def gray_rank(digits: Tensor, base: int) -> Tensor:
    """Rank of numbers (…, K) of K digits in the reflected Gray code, where neighbours differ by one in one digit.

    A digit counts backwards where the digits before it add up to an odd number. This takes an even base.
    """
    rank = torch.zeros(digits.shape[:-1], dtype=torch.int32, device=digits.device)
    backwards = torch.zeros(digits.shape[:-1], dtype=torch.bool, device=digits.device)
    for digit in digits.to(torch.int32).unbind(-1):  # a cumulative sum of so few numbers is slow on a GPU
        rank = rank * base + torch.where(backwards, base - 1 - digit, digit)
        backwards = backwards ^ (digit % 2 == 1)
    return rank


def _rest(vectors: Tensor, largest: Tensor) -> Tensor:
    """√(1 − ‖v/M‖²), whose argument rounding makes negative where ‖v‖ is close to M."""
    return (1 - (norm(vectors) / largest).square()).clamp_min(0).sqrt()
