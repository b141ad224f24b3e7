"""Queries, keys and values of one projection, turned by rotary positions in place; the backward pass is one Triton kernel.

The backward pass turns two of three gradients back and joins all of them. Inductor makes this one kernel over the joint
projection, whose index arithmetic takes five times as long as its memory traffic. Here a program takes a row and reads each
piece in order. It adds the piece to the bias's gradient while it is at hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from audiot.kernels.registration import operator
from audiot.kernels.residual import MAX_DIM as MAX_DIM
from audiot.kernels.residual import PROGRAMS, programs, row_shape


@triton.jit
def _turned(frames, place, cos, sin, inside, BLOCK: tl.constexpr):
    """A row of heads, float32, turned by the angles of its frame."""
    own = tl.load(frames + place, mask=inside, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(own, [BLOCK // 2, 2]))
    return own * cos + tl.reshape(tl.join(second, first), [BLOCK]) * sin


@triton.jit
def _turn_kernel(
    query, key, table, num_rows, num_frames, sine, WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        place = row * WIDTH + column
        angle = table + (row % num_frames) * SIZE + column % SIZE
        cos = tl.load(angle, mask=inside, other=0.0)
        sin = tl.load(angle + sine, mask=inside, other=0.0)
        tl.store(query + place, _turned(query, place, cos, sin, inside, BLOCK).to(query.dtype.element_ty), mask=inside)
        tl.store(key + place, _turned(key, place, cos, sin, inside, BLOCK).to(key.dtype.element_ty), mask=inside)


@triton.jit
def _merge_kernel(
    query, key, value, table, merged, sums, num_rows, num_frames, sine,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    query_sum = tl.zeros([BLOCK], tl.float32)
    key_sum = tl.zeros([BLOCK], tl.float32)
    value_sum = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        place = row * WIDTH + column
        angle = table + (row % num_frames) * SIZE + column % SIZE
        cos = tl.load(angle, mask=inside, other=0.0)
        sin = -tl.load(angle + sine, mask=inside, other=0.0)  # backwards
        turned_query = _turned(query, place, cos, sin, inside, BLOCK)
        turned_key = _turned(key, place, cos, sin, inside, BLOCK)
        plain = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
        query_sum += turned_query
        key_sum += turned_key
        value_sum += plain
        place = merged + row * (3 * WIDTH) + column
        tl.store(place, turned_query.to(merged.dtype.element_ty), mask=inside)
        tl.store(place + WIDTH, turned_key.to(merged.dtype.element_ty), mask=inside)
        tl.store(place + 2 * WIDTH, plain.to(merged.dtype.element_ty), mask=inside)
    place = sums + tl.program_id(0).to(tl.int64) * (3 * WIDTH) + column
    tl.store(place, query_sum, mask=inside)
    tl.store(place + WIDTH, key_sum, mask=inside)
    tl.store(place + 2 * WIDTH, value_sum, mask=inside)


@operator("project_and_turn")
def project_and_turn(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of frames (B, T, d), each (B, T, H·D). The first two are turned where they lie.

    There is a product for each of the three: values would have to be copied out of a joint one.
    """
    biases = [None] * 3 if bias is None else bias.chunk(3)
    query, key, value = (F.linear(hidden, part, own) for part, own in zip(weight.chunk(3), biases, strict=True))
    num_sequences, num_frames, width = query.shape
    rows = num_sequences * num_frames
    if rows:
        _turn_kernel[programs(rows, hidden.device, 2 * PROGRAMS)](
            query, key, table, rows, num_frames, table.stride(0), WIDTH=width, SIZE=head_dim, **row_shape(width)
        )
    return query, key, value


@project_and_turn.register_fake  # type: ignore[attr-defined]
def _(hidden, weight, bias, table, head_dim):
    query, key, value = (hidden.new_empty(*hidden.shape[:-1], len(weight) // 3) for _ in range(3))
    return query, key, value


@operator("merge_gradients")
def merge_gradients(query: Tensor, key: Tensor, value: Tensor, table: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Merge the gradients of turned queries, turned keys and values, each (B, T, H·D), into that of their joint projection.

    Returns:
        The gradient (B·T, 3·H·D), and its sum over rows, float32 (3·H·D,).
    """
    query, key, value = (grad.contiguous() for grad in (query, key, value))
    num_sequences, num_frames, width = query.shape
    rows = num_sequences * num_frames
    merged = query.new_empty(rows, 3 * width)
    grid = programs(rows, query.device)
    sums = torch.empty(grid[0], 3 * width, dtype=torch.float32, device=query.device)
    if not rows:
        sums.zero_()
    else:
        _merge_kernel[grid](
            query, key, value, table, merged, sums, rows, num_frames, table.stride(0),
            WIDTH=width, SIZE=head_dim, **row_shape(width),
        )  # fmt: skip
    return merged, sums.sum(dim=0)


@merge_gradients.register_fake  # type: ignore[attr-defined]
def _(query, key, value, table, head_dim):
    num_sequences, num_frames, width = query.shape
    return query.new_empty(num_sequences * num_frames, 3 * width), table.new_empty(3 * width)


class ProjectAndTurn(torch.autograd.Function):
    """Frames (B, T, d) → turned queries and keys, and values, (B, T, H·D) each, in the precision of the frames.

    The results are not yet split into heads: Dynamo (PyTorch 2.11) loses the gradients of results that are views.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, head_dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project and turn.

        Args:
            ctx: What the backward pass needs.
            hidden: (B, T, d).
            weight: Weights of the projections to queries, keys and values (3·H·D, d), in any precision.
            bias: (3·H·D,), or None.
            table: Factors of `audiot.positions.Rotary`, float32 (2, at least T, D).
            head_dim: Size D of a head.
        """
        used = weight.to(hidden.dtype)
        ctx.save_for_backward(hidden, used, table)
        ctx.head_dim, ctx.weight_dtype, ctx.bias_dtype = head_dim, weight.dtype, None if bias is None else bias.dtype
        return project_and_turn(hidden, used, None if bias is None else bias.to(hidden.dtype), table, head_dim)

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Turn back and merge."""
        hidden, weight, table = ctx.saved_tensors
        merged, summed = merge_gradients(query, key, value, table, ctx.head_dim)
        grad_weight = merged.T @ hidden.flatten(0, 1)
        grad_bias = None if ctx.bias_dtype is None else summed.to(ctx.bias_dtype)
        return (merged @ weight).view_as(hidden), grad_weight.to(ctx.weight_dtype), grad_bias, None, None
