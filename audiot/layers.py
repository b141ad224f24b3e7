"""A transformer layer: attention and a feed-forward network, each with a residual sum, LayerNorm and dropout.

In half precision on a CUDA device, kernels compute the parts that only move memory in one pass each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention import SelfAttention
from audiot.attention.self_attention import Product
from audiot.base.devices import HALF, autocast_dtype, in_half_precision

try:
    from audiot.kernels import feed_forward as feed_forward_kernels
    from audiot.kernels import residual as residual_kernels
except ImportError:  # no Triton
    feed_forward_kernels = residual_kernels = None  # type: ignore[assignment]

LAYER_NORM_EPS = 1e-12  # as in BERT and Mockingjay


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection.

    Args:
        attention: Self-attention module, (B, T, d) → (B, T, d).
        embed_dim: Size d of a frame.
        ffn_dim: Hidden width of the feed-forward network.
        dropout: Dropout probability on the output of both blocks.
        norm: ``post`` normalises after the residual sum (Vaswani et al. 2017), ``pre`` before the block (Xiong et al. 2020).
        norm_eps: Constant added to the variance in the LayerNorms.
    """

    compiled: Callable[[Tensor, Tensor | None], Tensor] | None = None  # `compute`, for training

    def __init__(
        self,
        attention: SelfAttention,
        embed_dim: int,
        ffn_dim: int,
        dropout: float,
        norm: str,
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.ffn = FeedForward(embed_dim, ffn_dim)
        self.ffn_norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = norm == "pre"

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """Map (B, T, d) to (B, T, d). ``valid`` is bool (B, T), or None where nothing is padded."""
        compute = self.compiled if self.training and self.compiled is not None else self.compute
        return compute(hidden, valid)

    def compute(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """`forward`, which may be compiled in training."""
        if self.pre_norm:
            hidden = hidden + self.dropout(self.attention(self.attention_input(hidden), valid))
            return hidden + self.dropout(self.ffn(self.ffn_norm(hidden)))
        dropout = self.dropout.p if self.training else 0.0
        # Flatten to rows (B·T, d) so that `SumsInPlace` can fuse a product and its addition to the residual's gradient.
        rows = hidden.flatten(0, 1)
        attended = self.attention(rows.view(hidden.shape), valid)
        rows = residual_norm(rows, attended.flatten(0, 1), self.attention_norm, dropout)
        return residual_norm(rows, self.ffn(rows), self.ffn_norm, dropout).view(hidden.shape)

    def attention_input(self, hidden: Tensor) -> Tensor:
        """The input of the attention, from the layer's input (B, T, d)."""
        return self.attention_norm(hidden) if self.pre_norm else hidden


class FeedForward(nn.Sequential):
    """Feed-forward network (Vaswani et al. 2017, arXiv:1706.03762, section 3.3) with GELU, (…, d) → (…, d).

    In half precision on a CUDA device, one kernel pass computes the gradient of GELU and everything derived from it.

    Args:
        embed_dim: Size d of a frame.
        ffn_dim: Hidden width.
    """

    product: Product | None = None  # in place of `F.linear`, where a training computes in another precision

    def __init__(self, embed_dim: int, ffn_dim: int) -> None:
        super().__init__(nn.Linear(embed_dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, embed_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map each frame of (…, d) independently."""
        if self.product is not None:
            first, gelu, second = self
            assert isinstance(first, nn.Linear)
            assert isinstance(second, nn.Linear)
            return self.product(gelu(self.product(hidden, first.weight, first.bias)), second.weight, second.bias)
        if not self.has_kernel(hidden):
            return super().forward(hidden)
        assert feed_forward_kernels is not None
        rows = hidden.to(autocast_dtype(hidden)).flatten(0, -2)
        first, _, second = self
        function = feed_forward_kernels.FeedForwardFunction
        return function.apply(rows, first.weight, first.bias, second.weight, second.bias).view_as(hidden)

    def has_kernel(self, hidden: Tensor) -> bool:
        """Whether a kernel computes the gradients for this input."""
        plain = type(self[0]) is nn.Linear and type(self[1]) is nn.GELU and type(self[2]) is nn.Linear  # false for adapters
        return plain and feed_forward_kernels is not None and in_half_precision(hidden)


def residual_norm(residual: Tensor, update: Tensor, norm: nn.LayerNorm, dropout: float = 0.0) -> Tensor:
    """LayerNorm(residual + dropout(update)). The sum is computed in float32 or better.

    In half precision on a CUDA device, one kernel computes all of it, forward and backward. The kernel stores no dropout mask but
    draws it again from its seed. Elsewhere plain PyTorch computes it.

    Args:
        residual: Residual stream (…, d).
        update: Output of a block (…, d), which is added to the residual.
        norm: LayerNorm over d, with weight and bias.
        dropout: Probability of dropping an element of ``update``.

    Returns:
        (…, d) in the dtype of ``update``.
    """
    if has_norm_kernel(update, norm):
        assert residual_kernels is not None
        return residual_kernels.normalise(residual, update, norm.weight, norm.bias, norm.eps, dropout)
    exact = torch.promote_types(update.dtype, torch.float32)
    total = residual.to(exact) + (F.dropout(update, dropout) if dropout else update)
    return _norm(total, norm).to(update.dtype)


def norm_dropout(states: Tensor, norm: nn.LayerNorm, dropout: float = 0.0) -> Tensor:
    """dropout(LayerNorm(states)). The norm is computed in float32 or better, by a kernel where `residual_norm` has one.

    Args:
        states: Frames (…, d).
        norm: LayerNorm over d, with weight and bias.
        dropout: Probability of dropping an element of the result.

    Returns:
        (…, d) in the dtype of ``states``.
    """
    if has_norm_kernel(states, norm):
        assert residual_kernels is not None
        return residual_kernels.normalise(None, states, norm.weight, norm.bias, norm.eps, dropout)
    normal = _norm(states.to(torch.promote_types(states.dtype, torch.float32)), norm).to(states.dtype)
    return F.dropout(normal, dropout) if dropout else normal


def _norm(states: Tensor, norm: nn.LayerNorm) -> Tensor:
    weight, bias = norm.weight.to(states.dtype), norm.bias.to(states.dtype)
    return F.layer_norm(states, norm.normalized_shape, weight, bias, norm.eps)


def has_norm_kernel(update: Tensor, norm: nn.LayerNorm) -> bool:
    """Whether a kernel is used for these states."""
    if residual_kernels is None or not update.is_cuda or norm.weight is None or norm.bias is None:
        return False
    return update.dtype in HALF and update.shape[-1] <= residual_kernels.MAX_DIM
