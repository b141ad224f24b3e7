"""Random Synthesizer whose table has a low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from audiot.attention.mechanism import at_least_one, fused_attention, key_mask
from audiot.attention.synthesizer_dense import common_size, widen
from audiot.attention.table import TableSynthesizer
from audiot.base.tracing import first


class SynthesizerFactorized(TableSynthesizer):
    """Factorized Random Synthesizer, softmax(R₁R₂ᵀ)V, whatever the input (Tay et al. 2020, arXiv:2005.00743, section 3.2.1).

    The computation is fused attention with the queries R₁ (`left`) and the keys R₂ (`right`), which all sequences share.

    The entries of R₁R₂ᵀ start with variance 1. There are no handcrafted initial values: of the patterns, only `start` and `end`
    have a low rank.

    Cost: time and memory of query-key attention with heads of `rank` elements, without query and key projections. There are
    2HL·`rank` parameters, for L = `max_frames`.

    Differs from the paper: tables are cropped to the current length.

    The other arguments are those of `AttentionMechanism`.

    Args:
        max_frames: Longest sequence supported, L.
        rank: Rank of the table.

    Raises:
        ValueError: `rank` is not positive.
    """

    no_weight_decay = frozenset({"left", "right"})

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int, dropout: float = 0.0, rank: int = 8) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout)
        at_least_one(rank=rank)
        self.max_frames = max_frames
        self.rank = rank
        self.left = nn.Parameter(torch.empty(num_heads, max_frames, rank))
        self.right = nn.Parameter(torch.empty(num_heads, max_frames, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw R₁ and R₂ such that the entries of R₁R₂ᵀ have variance 1."""
        for factor in (self.left, self.right):
            nn.init.normal_(factor, std=self.rank**-0.25)

    def scores(self, num_frames: int) -> Tensor:
        """R₁R₂ᵀ, (H, T, T)."""
        return first(self.left, 1, num_frames) @ first(self.right, 1, num_frames).transpose(1, 2)

    def attend(self, value: Tensor, valid: Tensor | None) -> Tensor:
        """Attend with PyTorch's fused attention."""
        num_sequences, _, num_frames, _ = value.shape
        size = common_size(self.head_dim, self.rank)
        query, key = (
            # Cast before it is expanded to the batch: autocast would make a copy for every sequence.
            widen(factor[:, :num_frames].to(value.dtype), size).expand(num_sequences, -1, -1, -1)
            for factor in (self.left, self.right)
        )
        context = fused_attention(query, key, widen(value, size), key_mask(valid), self.dropout_now, scale=1.0)
        return context[..., : self.head_dim]
