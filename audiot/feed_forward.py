"""The feed-forward network of a transformer layer (Vaswani et al. 2017, arXiv:1706.03762, section 3.3), with GELU."""

from __future__ import annotations

from torch import Tensor, nn

from audiot.devices import autocast_dtype, in_half_precision

try:
    from audiot import feed_forward_kernels
except ImportError:  # no Triton
    feed_forward_kernels = None  # type: ignore[assignment]


class FeedForward(nn.Sequential):
    """Linear → GELU → Linear, (…, d) → (…, d).

    In half precision on a CUDA device a kernel computes the gradient of GELU and all that is read off it in one pass.

    Args:
        embed_dim: d.
        ffn_dim: Width in between.
    """

    def __init__(self, embed_dim: int, ffn_dim: int) -> None:
        super().__init__(nn.Linear(embed_dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, embed_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map each frame of (…, d) by itself."""
        if not self.has_kernel(hidden):
            return super().forward(hidden)
        assert feed_forward_kernels is not None
        rows = hidden.to(autocast_dtype(hidden)).flatten(0, -2)
        first, _, second = self
        function = feed_forward_kernels.FeedForwardFunction
        return function.apply(rows, first.weight, first.bias, second.weight, second.bias).view_as(hidden)

    def has_kernel(self, hidden: Tensor) -> bool:
        """Whether a kernel computes the gradients for this input."""
        plain = type(self[0]) is nn.Linear and type(self[1]) is nn.GELU and type(self[2]) is nn.Linear  # not an adapter, say
        return plain and feed_forward_kernels is not None and in_half_precision(hidden)
