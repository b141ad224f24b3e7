"""Triton kernels of `audiot.layers.residual_norm` and `norm_dropout` for CUDA devices, in bfloat16 and float16.

A program walks over rows. It keeps what all rows share (weight, bias, sums of their gradients) in registers and touches each row
once. Dropout is a function of seed, row and column, so that the backward pass draws it again instead of reading a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 8192  # a row has to fit into the registers of a program
PROGRAMS = 8  # programs per multiprocessor; where sums are kept in registers, more of them would leave more to add up in the end


@triton.jit
def _kept(seed, row, threshold, BLOCK: tl.constexpr):
    """Which elements of a row are kept, bool (BLOCK,). A call of Philox gives four random numbers, and all of them are used."""
    quarter: tl.constexpr = BLOCK // 4
    a, b, c, d = tl.randint4x(seed, row * quarter + tl.arange(0, quarter))
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [BLOCK])
    return bits.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit
def _factor(seed, row, threshold, scale, BLOCK: tl.constexpr, DROP: tl.constexpr):
    """What dropout multiplies the elements of a row by, float32 (BLOCK,)."""
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if DROP:
        factor = tl.where(_kept(seed, row, threshold, BLOCK), scale, 0.0)
    return factor


@triton.jit
def _normalised(residual, update, place, inside, factor, RESIDUAL: tl.constexpr):
    """The row that is normalised, float32 (BLOCK,): residual + dropout(update), or the update as it is."""
    total = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32) + total * factor
    return total


@triton.jit
def _forward_kernel(
    residual, update, weight, bias, seed, output, mean, rstd, num_rows, eps, threshold, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, DROP: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < D
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    stream = tl.load(seed)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        place = row * D + column
        factor = _factor(stream, row, threshold, scale, BLOCK, DROP)
        total = _normalised(residual, update, place, inside, factor, RESIDUAL)
        centre = tl.sum(total) / D
        centred = tl.where(inside, total - centre, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred) / D + eps)
        result = centred * inverse * gain + shift
        if not RESIDUAL:
            result = result * factor
        tl.store(output + place, result.to(output.dtype.element_ty), mask=inside)
        tl.store(mean + row, centre)
        tl.store(rstd + row, inverse)


@triton.jit
def _backward_kernel(
    grad, residual, update, weight, seed, mean, rstd, grad_total, grad_update, grad_weight, grad_bias,
    num_rows, threshold, scale, D: tl.constexpr, BLOCK: tl.constexpr, DROP: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < D
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    stream = tl.load(seed)
    gain_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        place = row * D + column
        factor = _factor(stream, row, threshold, scale, BLOCK, DROP)
        total = _normalised(residual, update, place, inside, factor, RESIDUAL)
        inverse = tl.load(rstd + row)
        normal = tl.where(inside, (total - tl.load(mean + row)) * inverse, 0.0)
        outer = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if not RESIDUAL:
            outer = outer * factor
        gain_sum += outer * normal
        shift_sum += outer
        inner = outer * gain
        along = tl.sum(inner * normal) / D
        level = tl.sum(inner) / D
        result = (inner - normal * along - level) * inverse
        tl.store(grad_total + place, result.to(grad_total.dtype.element_ty), mask=inside)
        if DROP and RESIDUAL:
            tl.store(grad_update + place, (result * factor).to(grad_update.dtype.element_ty), mask=inside)
    row = tl.program_id(0).to(tl.int64) * D + column
    tl.store(grad_weight + row, gain_sum, mask=inside)
    tl.store(grad_bias + row, shift_sum, mask=inside)


def normalise(residual: Tensor | None, update: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float) -> Tensor:
    """`audiot.layers.residual_norm` by the kernels; without a residual, `audiot.layers.norm_dropout`."""
    # Drawn on the device: reading it back would make the host wait.
    seed = torch.randint(2**62, (1,), device=update.device) if dropout else update.new_zeros(1, dtype=torch.long)
    function = _norm_in_a_graph if torch.compiler.is_compiling() else _Norm.apply
    return function(residual, update, weight, bias, seed, eps, dropout)[0]


def _forward(
    residual: Tensor | None, update: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, eps: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and mean and inverse deviation of each row."""
    update = update.contiguous()
    output = torch.empty_like(update)
    mean, rstd = (torch.empty(update.shape[:-1], dtype=torch.float32, device=update.device) for _ in range(2))
    if mean.numel():
        _forward_kernel[programs(mean.numel(), mean.device, 2 * PROGRAMS)](
            update if residual is None else residual.contiguous(), update, weight, bias, seed, output, mean, rstd,
            mean.numel(), eps, *_dropping(dropout), **_constants(residual, update, dropout, per_thread=32),
        )  # fmt: skip
    return output, mean, rstd


def _backward(
    grad: Tensor,
    residual: Tensor | None,
    update: Tensor,
    weight: Tensor,
    seed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum that is normalised, of the update (empty where it is the same), of weight and bias."""
    grad, update = grad.contiguous(), update.contiguous()
    source = update if residual is None else residual.contiguous()
    grad_total = torch.empty_like(source)
    grad_update = torch.empty_like(update) if dropout and residual is not None else update.new_empty(0)
    grid = programs(mean.numel(), mean.device)
    sums = torch.empty(2, grid[0], update.shape[-1], dtype=torch.float32, device=update.device)
    if not mean.numel():
        sums.zero_()
    else:
        _backward_kernel[grid](
            grad, source, update, weight, seed, mean, rstd, grad_total, grad_update, sums[0], sums[1], mean.numel(),
            *_dropping(dropout), **_constants(residual, update, dropout),
        )  # fmt: skip
    grad_weight, grad_bias = sums.sum(dim=1).to(weight.dtype)
    return grad_total, grad_update, grad_weight, grad_bias.clone()  # an operator's results share no memory


def _save(ctx, inputs, output):
    residual, update, weight, _, seed, _, ctx.dropout = inputs
    ctx.save_for_backward(residual, update, weight, seed, *output[1:])
    ctx.set_materialize_grads(False)  # nothing is differentiated by way of mean and deviation


def _differentiate(ctx, grad, backward):
    residual, update, weight, seed, mean, rstd = ctx.saved_tensors
    grad_total, grad_update, grad_weight, grad_bias = backward(grad, residual, update, weight, seed, mean, rstd, ctx.dropout)
    if residual is None:
        return None, grad_total, grad_weight, grad_bias, None, None, None
    return grad_total, grad_update if ctx.dropout else grad_total.to(update.dtype), grad_weight, grad_bias, None, None, None


class _Norm(torch.autograd.Function):
    """The kernels in eager mode, where an operator's way through the dispatcher would take longer than they do."""

    forward = staticmethod(_forward)  # type: ignore[assignment]
    setup_context = staticmethod(_save)  # type: ignore[assignment]

    @staticmethod
    def backward(ctx, grad, *_):
        return _differentiate(ctx, grad, _backward)


_norm_in_a_graph = torch.library.custom_op("audiot::residual_norm", _forward, mutates_args=())
_backward_in_a_graph = torch.library.custom_op("audiot::residual_norm_backward", _backward, mutates_args=())


@_norm_in_a_graph.register_fake
def _(residual, update, weight, bias, seed, eps, dropout):
    rows = update.new_empty(update.shape[:-1], dtype=torch.float32)
    return update.new_empty(update.shape), rows, torch.empty_like(rows)


@_backward_in_a_graph.register_fake
def _(grad, residual, update, weight, seed, mean, rstd, dropout):
    source = update if residual is None else residual
    grad_update = update.new_empty(update.shape if dropout and residual is not None else (0,))
    return source.new_empty(source.shape), grad_update, torch.empty_like(weight), torch.empty_like(weight)


_norm_in_a_graph.register_autograd(lambda ctx, grad, *_: _differentiate(ctx, grad, _backward_in_a_graph), setup_context=_save)


def programs(num_rows: int, device: torch.device, each: int = PROGRAMS) -> tuple[int]:
    """Grid of programs that walk over rows, with `each` of them per multiprocessor."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return (max(1, min(num_rows, each * multiprocessors)),)


def row_shape(width: int, per_thread: int = 8) -> dict[str, int]:
    """How a program holds a row of `width` elements, about `per_thread` of them per thread."""
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // (32 * per_thread)))}


def _dropping(dropout: float) -> tuple[int, float]:
    """The threshold below which a random number of 32 bits drops its element, and the factor of elements that are kept."""
    return round(dropout * 2**32), 1 / (1 - dropout)


def _constants(residual: Tensor | None, update: Tensor, dropout: float, per_thread: int = 8) -> dict[str, int | bool]:
    shape = row_shape(update.shape[-1], per_thread)
    return {"D": update.shape[-1], "DROP": dropout > 0, "RESIDUAL": residual is not None, **shape}
