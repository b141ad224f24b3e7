"""Mixture of the Random Synthesizer with attention that depends on the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention.mechanism import (
    AttentionMechanism,
    at_least_one,
    check_type,
    fused_attention,
    key_mask,
    masked_softmax,
    position_bias,
    query_key_scores,
)
from audiot.attention.query_key import QueryKey
from audiot.attention.synthesizer_dense import SynthesizerDense, common_size, widen
from audiot.attention.synthesizer_random import SynthesizerRandom
from audiot.positions import NO_POSITIONS, Positions

PARTNERS = ("dense", "query_key")
MIXTURES = ("logits", "weights")
NEVER = -3e4  # a score whose exponential is zero beside any real one's; float16 can hold it


class SynthesizerMixture(AttentionMechanism):
    """Mixture of synthesizers, softmax(α₁R + α₂S)V (Tay et al. 2020, arXiv:2005.00743, "Mixture of Synthesizers").

    R is the table of a Random Synthesizer, S the scores of a Dense Synthesizer (`partner: dense`, the paper's R + D) or
    QKᵀ/√D (`partner: query_key`, its R + V). The α of each head are the softmax of two trained numbers, equal at first.

    `mixture_of: logits` is fused attention of the partner's queries and keys with α₁R as a mask that is added; a further
    element of queries and keys keeps padded frames out. A position bias is added to the mixed logits. `mixture_of: weights`
    is (α₁·softmax(R) + α₂·softmax(S))V, where a position bias belongs to S.

    Cost: `logits`: O(T²d) time, O(HT²) memory, times the number of sequences in training, because the kernel leaves the
    gradient of the mask to be summed over the batch. `weights`: the two mechanisms one after the other. HL² + 2H parameters
    beside the partner's, for L = `max_frames`.

    Differs from the paper: it mixes logits only. There, R starts twice as large, so that α₁R is what a Random Synthesizer
    starts from: halved logits would all but erase the handcrafted patterns.

    Args:
        embed_dim: See `AttentionMechanism`.
        num_heads: See `AttentionMechanism`.
        max_frames: Longest sequence supported, L.
        dropout: See `AttentionMechanism`; with `mixture_of: weights`, each of the two drops its own.
        partner: `dense` or `query_key`.
        mixture_of: `logits` or `weights`.
        init: Of R; see `SynthesizerRandom`, whose form is `full` and whose anchor is `max_frames`.
        init_floor: Of R; see `SynthesizerRandom`.
        bottleneck_dim: Of the partner `dense`; see `SynthesizerDense`.
        share_query_key: Use the queries as keys; takes the partner `query_key`.

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
        for name, choice, choices in (("partner", partner, PARTNERS), ("mixture_of", mixture_of, MIXTURES)):
            if choice not in choices:
                raise ValueError(f"{name} is {choice!r}: set it to one of {', '.join(choices)}")
        if share_query_key and partner != "query_key":
            raise ValueError(f"share_query_key needs partner=query_key, but partner is {partner}: set share_query_key=false")
        self.max_frames = max_frames
        self.mixture_of = mixture_of
        sizes = (embed_dim, num_heads, max_frames, dropout)
        self.random = SynthesizerRandom(*sizes, init=init, init_floor=init_floor)
        self.partner: SynthesizerDense | QueryKey = (
            SynthesizerDense(*sizes, bottleneck_dim=bottleneck_dim)
            if partner == "dense"
            else QueryKey(*sizes, share_query_key=share_query_key)
        )
        self.inputs = self.partner.inputs
        self.no_bias = self.partner.no_bias
        self.balance = nn.Parameter(torch.empty(2, num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set α and the table to their initial values; the partner sets its own."""
        nn.init.zeros_(self.balance)
        self.random.reset_parameters()
        if self.mixture_of == "logits":
            self.random.logits.mul_(2)  # α₁ = ½

    def attend(self, value: Tensor, valid: Tensor | None, **inputs: Any) -> Tensor:
        """Attend; `inputs` are what the partner needs beside the values."""
        if self.mixture_of == "logits":
            return self._attend_by_logits(value, valid, inputs)
        first, second = self._alpha().to(value.dtype)
        return first * self.random.attend(value, valid) + second * self.partner.attend(value=value, valid=valid, **inputs)

    def _attend_by_logits(self, value: Tensor, valid: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        num_sequences, _, num_frames, _ = value.shape
        first, second = self._alpha()
        query, key, bias = self._compared(inputs)
        key = second.to(key.dtype) * key
        table = self.random.scores(num_frames)
        # Rows whose maximum is 0: bfloat16 then is most precise where the weights are large.
        mask = first * (table - table.detach().amax(dim=-1, keepdim=True))
        if bias is not None:
            mask = mask + bias
        width = query.shape[-1]
        size = common_size(self.head_dim, width if valid is None else width + 1)
        if valid is not None:
            # The keys' further element meets a 1 of the queries.
            shape = (num_sequences, self.num_heads, num_frames, -1)
            padded = (~valid).to(key.dtype)[:, None, :, None] * NEVER  # B, 1, T, 1
            key = torch.cat([key.expand(shape), padded.expand(shape)], dim=-1)
        if size > width:  # ones beyond that meet zeros
            query = F.pad(query, (0, size - width), value=1.0)
        key = widen(key, size).expand(num_sequences, -1, -1, -1)
        context = fused_attention(query, key, widen(value, size), dropout=self.dropout_now, scale=1.0, bias=mask)
        if valid is not None:
            context = context.masked_fill(~valid.any(dim=-1)[:, None, None, None], 0)
        return context[..., : self.head_dim]

    def dense_weights(self, valid: Tensor | None, **inputs: Any) -> Tensor:
        """softmax(α₁R + α₂S), or α₁·softmax(R) + α₂·softmax(S), (B, H, T, T)."""
        first, second = self._alpha()
        scores, bias = self._partner_scores(inputs)
        table = self.random.scores(scores.shape[-1])[None]
        mask = key_mask(valid)
        if self.mixture_of == "weights":
            return first * masked_softmax(table, mask) + second * masked_softmax(scores + bias, mask)
        return masked_softmax(first * table + second * scores + bias, mask)

    def _alpha(self) -> Tensor:
        """α₁ and α₂ of each head, (2, H, 1, 1)."""
        return self.balance.softmax(dim=0)[:, :, None, None]

    def _compared(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys whose products are S, (B, H, T, …) and (B or 1, H, T, …), and the bias of the positions."""
        if isinstance(self.partner, SynthesizerDense):
            middle = self.partner.middle(inputs["hidden"])
            keys = self.partner.last_layer(middle.shape[2]).to(middle.dtype)
            return F.pad(middle, (0, 1), value=1.0), keys[None], None
        query, key = inputs["query"], inputs["key"]
        return query, key * self.head_dim**-0.5, position_bias(inputs["positions"], query.shape[2], query.device)

    def _partner_scores(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | float]:
        """S, (B, H, T, T), and the bias of the positions."""
        if isinstance(self.partner, SynthesizerDense):
            return self.partner.scores(inputs["hidden"]), 0.0
        query, key = inputs["query"], inputs["key"]
        bias = position_bias(inputs["positions"], query.shape[2], query.device)
        return query_key_scores(query, key, NO_POSITIONS), 0.0 if bias is None else bias

    def _arguments(
        self, names: frozenset[str], given: dict[str, Tensor | None], valid: Tensor | None, positions: Positions | None
    ) -> dict[str, Any]:
        super()._arguments(names, given, valid, positions)  # what is missing or too long, in this mechanism's name
        return self.partner._arguments(names, given, valid, positions)
