"""Query-key attention, the baseline of every comparison, and its form with one projection for both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from audiot.attention.mechanism import (
    QueryKeyMechanism,
    fused_attention,
    key_mask,
    offsets,
    position_bias,
    query_key_scores,
)
from audiot.base.devices import HALF
from audiot.positions import NO_POSITIONS, Positions

SHORT = 256  # frames


class QueryKey(QueryKeyMechanism):
    """Scaled dot-product attention, softmax(QKᵀ/√D)V (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    Works at any length: `max_frames` is ignored. It differs from the paper only with `share_query_key: true`.

    Cost: O(T²d) time and O(Td) memory, or O(T²) with a position bias. There are no parameters beside the projections.

    The arguments are those of `QueryKeyMechanism`.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """Attend with PyTorch's fused attention.

        On CPUs, short sequences in half precision are trained by the plain form of `dense_weights`: there the gradient of the
        fused kernel takes 5 to 15 times as long.
        """
        if _is_slow_fused(query):
            with torch.autocast(query.device.type, enabled=False):  # scores in float32, as the fused kernel has them
                weights = self.dense_weights(query.float(), key.float(), valid, positions)
            return F.dropout(weights, self.dropout_now).to(value.dtype) @ value
        bias = position_bias(positions, query.shape[-2], query.device)
        return fused_attention(query, key, value, key_mask(valid), self.dropout_now, bias=bias)

    def factors(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys whose products are the scores, and the bias (H, T, T) of the positions."""
        return query, key * self.head_dim**-0.5, position_bias(positions, query.shape[2], query.device)

    def score_parts(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor | None]:
        """QKᵀ/√D, (B, H, T, T), and the bias (H, T, T) of the positions."""
        return query_key_scores(query, key, NO_POSITIONS), position_bias(positions, query.shape[2], query.device)


class SharedQueryKey(QueryKeyMechanism):
    """Attention with one projection for queries and keys, as in Reformer (Kitaev et al. 2020, arXiv:2001.04451, section 2).

    The keys are the queries scaled to unit length, k = q/‖q‖. A frame attends to itself only where no other real frame is left:
    its own score is the largest by construction and would drown the rest. Nothing is hashed here; `lsh_simple` does that.

    Works at any length: `max_frames` is ignored.

    Cost: O(T²d) time, and a T×T mask of truth values that the whole batch shares. There is no key projection.

    The arguments are those of `AttentionMechanism`.
    """

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout, share_query_key=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """Attend with PyTorch's fused attention."""
        bias = position_bias(positions, query.shape[-2], query.device)
        mask = self._others_first(query, valid)
        return fused_attention(query, _unit(key), value, mask, self.dropout_now, bias=bias)

    def dense_weights(self, query: Tensor, key: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """softmax(Qk̂ᵀ/√D) without the diagonal, (B, H, T, T)."""
        return super().dense_weights(query, _unit(key), valid, positions)

    def dense_choice(self, query: Tensor, key: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """All real frames but the query's own, bool (B, H, T, T)."""
        return self._others_first(query, valid).expand(query.shape[0], self.num_heads, -1, -1)

    def _others_first(self, query: Tensor, valid: Tensor | None) -> Tensor:
        """Real keys other than the query's own frame; the own one where it is the only real frame: (B or 1, 1, T, T)."""
        own = offsets(query.shape[-2], query.device) == 0  # T, T
        if valid is None:
            return (own if query.shape[-2] == 1 else ~own)[None, None]
        alone = valid.sum(dim=-1)[:, None, None, None] == 1
        return valid[:, None, None, :] & (~own | alone)


def _is_slow_fused(query: Tensor) -> bool:
    """Whether the weights themselves are faster to train than the fused kernel."""
    return query.device.type == "cpu" and query.dtype in HALF and query.shape[-2] <= SHORT and torch.is_grad_enabled()


def _unit(vectors: Tensor) -> Tensor:
    """v/‖v‖; zeros stay zeros, in float16 too, where the guard against a division by zero would vanish."""
    exact = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return F.normalize(exact, dim=-1).to(vectors.dtype)
