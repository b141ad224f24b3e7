"""Queries, keys and values of one projection, turned by rotary positions: the backward pass as one Triton kernel.

Compiled, the gradients of three heads' tensors and the turning back of two of them become one kernel over the joint projection
whose index arithmetic takes five times as long as its memory traffic. Here a program takes a row and reads each piece in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from audiot.positions import turn
from audiot.residual_kernels import MAX_DIM as MAX_DIM
from audiot.residual_kernels import programs, row_shape


@triton.jit
def _turned_back(grad, b, t, grad_b, grad_h, grad_t, table, sine, column, inside, SIZE: tl.constexpr):
    """A row of a gradient (B, H, T, D), turned by the negative angles of its frame."""
    place = grad + b * grad_b + (column // SIZE) * grad_h + t * grad_t
    element = column % SIZE
    own = tl.load(place + element, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(place + (element ^ 1), mask=inside, other=0.0).to(tl.float32)
    angle = table + t * SIZE + element
    cos = tl.load(angle, mask=inside, other=0.0)
    sin = tl.load(angle + sine, mask=inside, other=0.0)
    return own * cos - other * sin


@triton.jit
def _merge_kernel(
    query, key, value, table, merged, num_rows, num_frames, sine,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        b, t = row // num_frames, row % num_frames
        place = merged + row * (3 * WIDTH) + column
        turned = _turned_back(query, b, t, query_b, query_h, query_t, table, sine, column, inside, SIZE)
        tl.store(place, turned.to(merged.dtype.element_ty), mask=inside)
        turned = _turned_back(key, b, t, key_b, key_h, key_t, table, sine, column, inside, SIZE)
        tl.store(place + WIDTH, turned.to(merged.dtype.element_ty), mask=inside)
        plain = tl.load(value + b * value_b + (column // SIZE) * value_h + t * value_t + column % SIZE, mask=inside, other=0.0)
        tl.store(place + 2 * WIDTH, plain, mask=inside)


@torch.library.custom_op("audiot::merge_gradients", mutates_args=())
def merge_gradients(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """Gradient of the joint projection (B, T, 3·H·D) of those of turned queries and keys, and of values (B, H, T, D).

    Args:
        query: Gradient of the queries.
        key: Gradient of the keys.
        value: Gradient of the values.
        table: Of `audiot.positions.Rotary`, float32 (2, at least T, D).
    """
    query, key, value = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (query, key, value))
    num_sequences, num_heads, num_frames, size = query.shape
    rows, width = num_sequences * num_frames, num_heads * size
    merged = query.new_empty(num_sequences, num_frames, 3 * width)
    if rows:
        _merge_kernel[programs(rows, query.device)](
            query, key, value, table, merged, rows, num_frames, table.stride(0),
            *(stride for grad in (query, key, value) for stride in grad.stride()[:3]),
            WIDTH=width, SIZE=size, **row_shape(width),
        )  # fmt: skip
    return merged


@merge_gradients.register_fake
def _(query, key, value, table):
    num_sequences, num_heads, num_frames, size = query.shape
    return query.new_empty(num_sequences, num_frames, 3 * num_heads * size)


class SplitAndTurn(torch.autograd.Function):
    """Joint projection (B, T, 3·H·D) → turned queries and keys, and values, (B, H, T, D) each."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, table: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Turn by the angles of `table` (2, at least T, D); see `audiot.positions.turn`."""
        ctx.save_for_backward(table)
        query, key, value = projected.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        frames = table[:, : projected.shape[1]]
        return turn(query, frames), turn(key, frames), value.clone()

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Turn back and merge."""
        return merge_gradients(query, key, value, *ctx.saved_tensors), None, None
