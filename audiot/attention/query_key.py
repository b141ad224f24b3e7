"""Query-key attention, the baseline of every comparison."""

from __future__ import annotations

from torch import Tensor

from audiot.attention.mechanism import QueryKeyMechanism, fused_attention, masked_softmax


class QueryKey(QueryKeyMechanism):
    """Scaled dot-product attention, softmax(QKᵀ/√D)V (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    Works at any length: `max_frames` is ignored. Differs from the paper on request only: `share_query_key`.
    """

    def forward(
        self,
        *,
        hidden: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Attend with PyTorch's fused attention; see `AttentionMechanism.forward`."""
        query, key = self.pair(query, key)
        return fused_attention(query, key, self.given("value", value), valid, dropout=self.dropout_now)

    def weights(
        self,
        *,
        hidden: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """softmax(QKᵀ/√D), (B, H, T, T)."""
        query, key = self.pair(query, key)
        return masked_softmax(query @ key.transpose(-2, -1) * self.head_dim**-0.5, valid)
