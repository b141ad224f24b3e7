"""LayerNorm with residual sums and dropout before and behind it: the part of a transformer that only moves memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.devices import HALF

try:
    from audiot import residual_kernels
except ImportError:  # no Triton
    residual_kernels = None  # type: ignore[assignment]


def residual_norm(residual: Tensor, update: Tensor, norm: nn.LayerNorm, dropout: float = 0.0) -> Tensor:
    """LayerNorm(residual + dropout(update)), the sum in float32 or better.

    In half precision on a CUDA device one kernel does it all, forward and backward, and keeps no mask: what is dropped is drawn
    again from its seed. Everywhere else it is what it says.

    Args:
        residual: (…, d).
        update: (…, d), what a block adds to it.
        norm: LayerNorm over d, with weight and bias.
        dropout: Probability of dropping an element of ``update``.

    Returns:
        (…, d) in the dtype of ``update``.
    """
    if has_kernel(update, norm):
        assert residual_kernels is not None
        return residual_kernels.normalise(residual, update, norm.weight, norm.bias, norm.eps, dropout)
    exact = torch.promote_types(update.dtype, torch.float32)
    total = residual.to(exact) + (F.dropout(update, dropout) if dropout else update)
    return _norm(total, norm).to(update.dtype)


def norm_dropout(states: Tensor, norm: nn.LayerNorm, dropout: float = 0.0) -> Tensor:
    """dropout(LayerNorm(states)), the norm in float32 or better; with a kernel as `residual_norm` has it.

    Args:
        states: (…, d).
        norm: LayerNorm over d, with weight and bias.
        dropout: Probability of dropping an element of what comes out.

    Returns:
        (…, d) in the dtype of ``states``.
    """
    if has_kernel(states, norm):
        assert residual_kernels is not None
        return residual_kernels.normalise(None, states, norm.weight, norm.bias, norm.eps, dropout)
    normal = _norm(states.to(torch.promote_types(states.dtype, torch.float32)), norm).to(states.dtype)
    return F.dropout(normal, dropout) if dropout else normal


def _norm(states: Tensor, norm: nn.LayerNorm) -> Tensor:
    weight, bias = norm.weight.to(states.dtype), norm.bias.to(states.dtype)
    return F.layer_norm(states, norm.normalized_shape, weight, bias, norm.eps)


def has_kernel(update: Tensor, norm: nn.LayerNorm) -> bool:
    """Whether a kernel would be taken for these states."""
    if residual_kernels is None or not update.is_cuda or norm.weight is None or norm.bias is None:
        return False
    return update.dtype in HALF and update.shape[-1] <= residual_kernels.MAX_DIM
