"""The contract of an attention mechanism, and the three computations that most mechanisms share.

Shape legend: B sequences, T frames, d = `embed_dim`, H heads, D = d / H.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionMechanism(nn.Module, ABC):
    """How the frames of a sequence exchange information inside one attention layer.

    `SelfAttention` computes what `inputs` names, nothing else, and hands it to `forward`. A padded frame never
    influences a real one; the rows of padded frames are finite; a sequence without any real frame gives zeros.

    Args:
        embed_dim: Width d of the model.
        num_heads: Number of heads H, a divisor of `embed_dim`.
        max_frames: Longest sequence that the model has to support; mechanisms without a table of frames ignore it.
        dropout: Probability of dropping an attention weight while training.

    Raises:
        ValueError: a size is not positive, `num_heads` does not divide `embed_dim`, or `dropout` is outside [0, 1).
    """

    inputs: frozenset[str]
    """What `forward` needs, of {"hidden", "query", "key", "value"}; an instance may need less than its class."""

    no_weight_decay: frozenset[str] = frozenset()
    """Names of own parameters that the optimiser must not decay."""

    max_frames: int | None = None
    """Hard limit on the number of frames; None where there is none."""

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int, dropout: float = 0.0) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("max_frames", max_frames)):
            if size < 1:
                raise ValueError(f"{name} is {size}: set it to 1 or more")
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}: change one of them, "
                f"for example embed_dim={embed_dim - embed_dim % num_heads + num_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"attention dropout is {dropout}: set it to at least 0 and less than 1")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout

    @abstractmethod
    def forward(
        self,
        *,
        hidden: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden: Input of the layer (B, T, d).
            query: Queries (B, H, T, D).
            key: Keys (B, H, T, D).
            value: Values (B, H, T, D).
            valid: bool (B, T), True = real frame; None when nothing is padded, the fast path.

        Returns:
            The context (B, H, T, D).
        """

    @abstractmethod
    def weights(
        self,
        *,
        hidden: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The plain dense computation of the attention weights (B, H, T, T), without dropout.

        What plots show, and what `forward` must agree with. Arguments as in `forward`.
        """

    @property
    def dropout_now(self) -> float:
        """The dropout probability that applies in the current mode."""
        return self.dropout if self.training else 0.0

    def check_length(self, num_frames: int) -> None:
        """Raise ValueError if the mechanism has a limit and `num_frames` is beyond it."""
        if self.max_frames is not None and num_frames > self.max_frames:
            raise ValueError(
                f"sequence has {num_frames} frames but max_frames is {self.max_frames} ({type(self).__name__}): "
                "raise max_frames or take shorter audio (data.crop_s in pre-training, data.prepare.max_duration_s everywhere)"
            )

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        limit = "" if self.max_frames is None else f", max_frames={self.max_frames}"
        return f"{self.embed_dim}, num_heads={self.num_heads}{limit}, dropout={self.dropout}"

    def given(self, name: str, tensor: Tensor | None) -> Tensor:
        """Return `tensor`; raise ValueError if the caller left out the input `name`."""
        if tensor is None:
            names = ", ".join(sorted(self.inputs))
            raise ValueError(f"{type(self).__name__} needs {name} but got None: pass {names}")
        return tensor


class QueryKeyMechanism(AttentionMechanism):
    """Base of the mechanisms that compare queries with keys.

    Args:
        embed_dim: See `AttentionMechanism`.
        num_heads: See `AttentionMechanism`.
        max_frames: See `AttentionMechanism`.
        dropout: See `AttentionMechanism`.
        share_query_key: Use the queries as keys. No key projection is then built, and `key` need not be passed.
    """

    inputs = frozenset({"query", "key", "value"})

    def __init__(
        self, embed_dim: int, num_heads: int, max_frames: int, dropout: float = 0.0, share_query_key: bool = False
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout)
        self.share_query_key = share_query_key
        if share_query_key:
            self.inputs = self.inputs - {"key"}

    def pair(self, query: Tensor | None, key: Tensor | None) -> tuple[Tensor, Tensor]:
        """The queries and keys to compare: the queries twice if they are shared."""
        query = self.given("query", query)
        return query, query if self.share_query_key else self.given("key", key)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(QKᵀ·scale)V over the real keys by PyTorch's fused kernels; zeros where a sequence has no real frame.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        valid: bool (B, S), True = real key, or None.
        dropout: Probability of dropping a weight.
        scale: Factor of the scores; None = 1/√D.

    Returns:
        (B, H, T, D).
    """
    if valid is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
    some = valid.any(dim=-1)[:, None, None, None]
    # A softmax over no key at all is NaN in some kernels: such a sequence attends everywhere and is then blanked.
    mask = valid[:, None, None, :] | ~some  # B, 1, 1, S
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    return context.masked_fill(~some, 0)


def masked_softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax over the real keys; rows of zeros, also in the gradients, where a sequence has no real frame.

    Args:
        scores: (B or 1, H, T, S).
        valid: bool (B, S), True = real key, or None.

    Returns:
        (B, H, T, S).
    """
    if valid is None:
        return scores.softmax(dim=-1)
    padded = ~valid[:, None, None, :]  # B, 1, 1, S
    # The lowest finite number, not -inf: a row that is -inf throughout would be NaN, and so would its gradient.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(padded, lowest).softmax(dim=-1).masked_fill(padded, 0)
