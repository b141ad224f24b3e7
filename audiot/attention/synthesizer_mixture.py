"""Mixture of the Random Synthesizer with attention that depends on the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention.mechanism import (
    AttentionMechanism,
    at_least_one,
    check_type,
    choose,
    fused_attention,
    key_mask,
    masked_softmax,
)
from audiot.attention.query_key import QueryKey
from audiot.attention.synthesizer_dense import SynthesizerDense, common_size, widen
from audiot.attention.synthesizer_random import SynthesizerRandom
from audiot.positions import Positions

NEVER = -3e4  # a score whose exponential is zero beside any real one's; float16 can hold it


class SynthesizerMixture(AttentionMechanism):
    """Mixture of synthesizers, softmax(α₁R + α₂S)V (Tay et al. 2020, arXiv:2005.00743, "Mixture of Synthesizers").

    R is the table of a Random Synthesizer. S are the scores of a partner: of a Dense Synthesizer (the paper's R + D), or QKᵀ/√D
    (its R + V). The α of each head are the softmax of two trained numbers, equal at first.

    The mixture of logits is fused attention of the partner's queries and keys, with α₁R as a mask that is added. One further
    element of queries and keys keeps padded frames out. A position bias is added to the mixed logits. The mixture of weights is
    (α₁·softmax(R) + α₂·softmax(S))V. There a position bias belongs to S.

    Cost of the mixture of logits: O(T²d) time, O(HT²) memory. In training this memory counts once per sequence, because the
    kernel leaves the gradient of the mask to be summed over the batch. Cost of the mixture of weights: that of the two
    mechanisms, one after the other. There are HL² + 2H parameters beside the partner's, for L = `max_frames`.

    Differs from the paper: it mixes logits only. In the mixture of logits R starts twice as large, so that α₁R is what a Random
    Synthesizer starts from: halved logits would all but erase the handcrafted patterns.

    The other arguments are those of `AttentionMechanism`.

    Args:
        max_frames: Longest sequence supported, L.
        dropout: Probability of dropping an attention weight while training. In the mixture of weights, R and S drop apart.
        partner: Scores S: `dense` (of a `SynthesizerDense`) or `query_key` (of queries and keys).
        mixture_of: Numbers that are mixed: `logits` or `weights`.
        init: Initial values of R, as `SynthesizerRandom` has them with `anchor: max_frames`.
        init_floor: Floor ρ of the handcrafted initial values of R.
        bottleneck_dim: Width of the middle layer of the partner `dense`.
        share_query_key: Whether the queries are the keys too. This takes the partner `query_key`.

    Raises:
        ValueError: an unknown choice, an impossible size, or `share_query_key` without queries and keys.
    """

    no_weight_decay = frozenset({"balance"})
    max_frames: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        partner: str = "dense",
        mixture_of: str = "logits",
        init: str = "handcrafted",
        init_floor: float = 0.1,
        bottleneck_dim: int = 16,
        share_query_key: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout)
        at_least_one(bottleneck_dim=bottleneck_dim)
        check_type(bool, share_query_key=share_query_key)
        make_partner = choose("partner", partner, PARTNERS)
        self.mixture_of = choose("mixture_of", mixture_of, MIXTURES)
        self.max_frames = max_frames
        sizes = (embed_dim, num_heads, max_frames, dropout)
        self.random = SynthesizerRandom(*sizes, init=init, init_floor=init_floor)
        self.partner = make_partner(*sizes, {"bottleneck_dim": bottleneck_dim, "share_query_key": share_query_key})
        self.inputs = self.partner.inputs
        self.no_bias = self.partner.no_bias
        self.balance = nn.Parameter(torch.empty(2, num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set α and the table to their initial values; the partner sets its own."""
        nn.init.zeros_(self.balance)
        self.random.reset_parameters()
        self.random.logits.mul_(self.mixture_of.first_scale)

    def attend(self, value: Tensor, valid: Tensor | None, **inputs: Any) -> Tensor:
        """Attend; `inputs` are what the partner needs beside the values."""
        return self.mixture_of.attend(self, value, valid, inputs)

    def dense_weights(self, valid: Tensor | None, **inputs: Any) -> Tensor:
        """softmax(α₁R + α₂S), or α₁·softmax(R) + α₂·softmax(S), (B, H, T, T)."""
        scores, bias = self.partner.score_parts(**inputs)
        table = self.random.scores(scores.shape[-1])[None]
        return self.mixture_of.weights(self.alpha(), table, scores, 0.0 if bias is None else bias, key_mask(valid))

    def alpha(self) -> Tensor:
        """α₁ and α₂ of each head, (2, H, 1, 1)."""
        return self.balance.softmax(dim=0)[:, :, None, None]

    def _arguments(
        self, names: frozenset[str], given: dict[str, Tensor | None], valid: Tensor | None, positions: Positions | None
    ) -> dict[str, Any]:
        super()._arguments(names, given, valid, positions)  # what is missing or too long, in this mechanism's name
        return self.partner._arguments(names, given, valid, positions)


def _dense(embed_dim: int, num_heads: int, max_frames: int, dropout: float, options: dict[str, Any]) -> SynthesizerDense:
    if options["share_query_key"]:
        raise ValueError("share_query_key needs partner=query_key, but partner is dense: set share_query_key=false")
    return SynthesizerDense(embed_dim, num_heads, max_frames, dropout, bottleneck_dim=options["bottleneck_dim"])


def _query_key(embed_dim: int, num_heads: int, max_frames: int, dropout: float, options: dict[str, Any]) -> QueryKey:
    return QueryKey(embed_dim, num_heads, max_frames, dropout, share_query_key=options["share_query_key"])


PARTNERS: dict[str, Callable[..., SynthesizerDense | QueryKey]] = {"dense": _dense, "query_key": _query_key}


class OfLogits:
    """softmax(α₁R + α₂S)V."""

    first_scale = 2.0  # of R, as α₁ is ½ at first

    @staticmethod
    def attend(mixture: SynthesizerMixture, value: Tensor, valid: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """The context (B, H, T, D)."""
        num_sequences, num_heads, num_frames, head_dim = value.shape
        first, second = mixture.alpha()
        query, key, bias = mixture.partner.factors(**inputs)
        key = second.to(key.dtype) * key
        table = mixture.random.scores(num_frames)
        # Rows whose maximum is 0: bfloat16 then is most precise where the weights are large.
        mask = first * (table - table.detach().amax(dim=-1, keepdim=True))
        if bias is not None:
            mask = mask + bias
        width = query.shape[-1]
        size = common_size(head_dim, width if valid is None else width + 1)
        if valid is not None:
            # The keys' further element meets a 1 of the queries.
            shape = (num_sequences, num_heads, num_frames, -1)
            padded = (~valid).to(key.dtype)[:, None, :, None] * NEVER  # B, 1, T, 1
            key = torch.cat([key.expand(shape), padded.expand(shape)], dim=-1)
        if size > width:  # ones beyond that meet zeros
            query = F.pad(query, (0, size - width), value=1.0)
        key = widen(key, size).expand(num_sequences, -1, -1, -1)
        context = fused_attention(query, key, widen(value, size), dropout=mixture.dropout_now, scale=1.0, bias=mask)
        if valid is not None:
            context = context.masked_fill(~valid.any(dim=-1)[:, None, None, None], 0)
        return context[..., :head_dim]

    @staticmethod
    def weights(alpha: Tensor, table: Tensor, scores: Tensor, bias: Tensor | float, mask: Tensor | None) -> Tensor:
        """The dense weights (B, H, T, T)."""
        first, second = alpha
        return masked_softmax(first * table + second * scores + bias, mask)


class OfWeights:
    """(α₁·softmax(R) + α₂·softmax(S))V."""

    first_scale = 1.0

    @staticmethod
    def attend(mixture: SynthesizerMixture, value: Tensor, valid: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """The context (B, H, T, D)."""
        first, second = mixture.alpha().to(value.dtype)
        context = first * mixture.random.attend(value, valid)
        return context + second * mixture.partner.attend(value=value, valid=valid, **inputs)

    @staticmethod
    def weights(alpha: Tensor, table: Tensor, scores: Tensor, bias: Tensor | float, mask: Tensor | None) -> Tensor:
        """The dense weights (B, H, T, T)."""
        first, second = alpha
        return first * masked_softmax(table, mask) + second * masked_softmax(scores + bias, mask)


MIXTURES: dict[str, type[OfLogits] | type[OfWeights]] = {"logits": OfLogits, "weights": OfWeights}
