"""The gradient of the feed-forward network on CUDA devices, in bfloat16 and float16; GELU's part of it is one Triton kernel.

The backward pass needs three results from GELU's input: the gradient of GELU, the output of GELU (for the gradient of the
second product), and the sum of the first bias's gradient. Inductor makes two passes over the widest tensors of a layer for
these. Here each of their elements is read once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from audiot.kernels.registration import operator
from audiot.kernels.residual import programs

COLUMNS = 1024  # columns per program


@triton.jit
def _gelu_kernel(
    grad, inner, grad_inner, active, sums, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        place = row * WIDTH + column
        x = tl.load(inner + place, mask=inside, other=0.0).to(tl.float32)
        outer = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)  # Φ(x)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # φ(x)
        result = outer * (below + x * density)
        total += result
        tl.store(grad_inner + place, result.to(grad_inner.dtype.element_ty), mask=inside)
        tl.store(active + place, (x * below).to(active.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * WIDTH + column, total, mask=inside)


@operator("gelu_gradients")
def gelu_gradients(grad: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass needs of ``gelu(inner)``.

    Args:
        grad: Gradient of GELU's output (rows, f).
        inner: GELU's input (rows, f).

    Returns:
        The gradient of ``inner`` (rows, f), GELU's output (rows, f), and that gradient's sum over rows, float32 (f,).
    """
    grad, inner = grad.contiguous(), inner.contiguous()
    rows, width = inner.shape
    grad_inner, active = torch.empty_like(inner), torch.empty_like(inner)
    blocks = triton.cdiv(width, COLUMNS)
    walkers = triton.cdiv(programs(rows, inner.device)[0], blocks)
    sums = torch.empty(walkers, width, dtype=torch.float32, device=inner.device)
    if not rows:
        sums.zero_()
    else:
        _gelu_kernel[(walkers, blocks)](
            grad,
            inner,
            grad_inner,
            active,
            sums,
            rows,
            WIDTH=width,
            BLOCK=min(COLUMNS, triton.next_power_of_2(width)),
            num_warps=4,
        )
    return grad_inner, active, sums.sum(dim=0)


@gelu_gradients.register_fake  # type: ignore[attr-defined]
def _(grad, inner):
    return inner.new_empty(inner.shape), inner.new_empty(inner.shape), inner.new_empty(inner.shape[1], dtype=torch.float32)


class FeedForwardFunction(torch.autograd.Function):
    """(rows, d) → Linear → GELU → Linear → (rows, d), in the precision of the input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
        """Weights (f, d) and (d, f), biases (f,) and (d,), in any precision."""
        first, second = weight.to(hidden.dtype), out_weight.to(hidden.dtype)
        inner = F.linear(hidden, first, bias.to(hidden.dtype))
        ctx.save_for_backward(hidden, inner, first, second)
        ctx.dtypes = [parameter.dtype for parameter in (weight, bias, out_weight, out_bias)]
        return F.linear(F.gelu(inner), second, out_bias.to(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Differentiate. Of GELU only the input was kept; its output is computed again with its gradient."""
        hidden, inner, first, second = ctx.saved_tensors
        grad_inner, active, grad_bias = gelu_gradients(grad @ second, inner)
        found = (grad_inner.T @ hidden, grad_bias, grad.T @ active, grad.sum(dim=0, dtype=torch.float32))
        return grad_inner @ first, *(one.to(dtype) for one, dtype in zip(found, ctx.dtypes, strict=True))
