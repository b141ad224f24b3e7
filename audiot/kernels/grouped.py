"""Triton kernels of `grouped_attention` for CUDA devices, in bfloat16 and float16.

This is tiled attention with a running softmax (Dao et al. 2022, arXiv:2205.14135) over lists of frames. A program takes one
tile of one group's queries and walks over the group's keys. It reads frames where they lie. The backward pass has two
kernels. One walks over keys for the gradient of a tile of queries, the other walks over queries for the gradient of a tile of
keys and values.

Symbols: B sequences, H heads, G groups, N queries and M keys per group, D = head size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HEAD_DIM = 128
MAX_HEADS = 65535  # heads of all sequences together: CUDA's limit for the second dimension of a grid
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _rows(pointer, index, stride, columns, width: tl.constexpr):
    """Rows `index` of a matrix; zeros for rows below 0 and columns beyond its width."""
    mask = (index >= 0)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + index.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _put_rows(pointer, index, stride, columns, rows, width: tl.constexpr, add: tl.constexpr):
    """Write rows, or add them to what other programs add, where `index` is 0 or more."""
    mask = (index >= 0)[:, None] & (columns < width)[None, :]
    place = pointer + index.to(tl.int64)[:, None] * stride + columns[None, :]
    if add:
        tl.atomic_add(place, rows, mask=mask, sem="relaxed")
    else:
        tl.store(place, rows.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _allowed(query_index, key_index, radius, has_radius: tl.constexpr):
    """Which pairs of a tile attend: real frames, no further apart than the radius."""
    allowed = (query_index >= 0)[:, None] & (key_index >= 0)[None, :]
    if has_radius:
        allowed = allowed & (tl.abs(query_index[:, None] - key_index[None, :]) <= radius)
    return allowed


@triton.jit
def _kept(query_index, key_index, num_frames, seed, dropout):
    """Factor of each weight in a tile: 0 where it is dropped. It is a function of the pair of frames alone."""
    pair = query_index[:, None] * num_frames + key_index[None, :]
    return tl.where(tl.rand(seed, pair) < dropout, 0.0, 1.0 / (1.0 - dropout))


@triton.jit
def _row(i, g, n, N, partition: tl.constexpr):
    """Where a query's results are kept: by frame where it is a query once, else by its place in the groups' lists."""
    if partition:
        return i
    return tl.where(i >= 0, g * N + n, -1)


@triton.jit
def _score_gradients(
    q, k, v, do, i, j, lse, inner, num_frames, scale, stream, dropout, radius, HAS_RADIUS: tl.constexpr, HAS_DROPOUT: tl.constexpr
):
    """The weights of a tile of pairs after dropout, and the gradient of its scores: dS = P·(dP − δ), `inner` = δ."""
    score = tl.dot(q, tl.trans(k)) * scale
    weight = tl.where(_allowed(i, j, radius, HAS_RADIUS), tl.exp2(score - lse[:, None]), 0.0)
    dp = tl.dot(do, tl.trans(v))
    kept = weight
    if HAS_DROPOUT:
        factor = _kept(i, j, num_frames, stream, dropout)
        kept = weight * factor
        dp = dp * factor
    return kept, weight * (dp - inner[:, None])


@triton.jit
def _forward_kernel(
    query, key, value, queries, keys, share, context, rows, logsum, seed,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, context_b, context_h, context_t,
    queries_b, queries_h, queries_g, keys_b, keys_h, keys_g,
    num_heads, num_frames, num_rows, N, M, scale, dropout, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_RADIUS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PARTITION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_N)
    g, tile, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    d = tl.arange(0, BLOCK_D)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.load(queries + b * queries_b + h * queries_h + g * queries_g + n, mask=n < N, other=-1)
    q = _rows(query + b * query_b + h * query_h, i, query_t, d, D)
    keys += b * keys_b + h * keys_h + g * keys_g
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    if HAS_DROPOUT:
        stream = tl.load(seed) + head
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    result = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        j = tl.load(keys + m, mask=m < M, other=-1)
        k = _rows(key, j, key_t, d, D)
        v = _rows(value, j, value_t, d, D)
        score = tl.where(_allowed(i, j, radius, HAS_RADIUS), tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - finite[:, None])
        shrink = tl.exp2(peak - finite)
        total = total * shrink + tl.sum(weight, 1)
        if HAS_DROPOUT:
            weight = weight * _kept(i, j, num_frames, stream, dropout)
        result = result * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        peak = higher
    some = total > 0
    result = result / tl.where(some, total, 1.0)[:, None]
    row = _row(i, g, n, N, PARTITION)
    tl.store(logsum + head * num_rows + row, tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), 0.0), mask=i >= 0)
    if not PARTITION:
        _put_rows(rows + head * num_rows * D, row, D, d, result, D, False)
        result = result * tl.load(share + head * num_frames + i, mask=i >= 0, other=0.0)[:, None]
    _put_rows(context + b * context_b + h * context_h, i, context_t, d, result, D, not PARTITION)


@triton.jit
def _query_gradient_kernel(
    query, key, value, queries, keys, share, grad, rows, logsum, seed, grad_query, grad_key, grad_value, delta,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, grad_b, grad_h, grad_t,
    rows_b, rows_h, rows_t, out_b, out_h, out_t, by_key_b, by_key_h, by_key_t,
    queries_b, queries_h, queries_g, keys_b, keys_h, keys_g,
    num_heads, num_frames, num_rows, N, M, scale, dropout, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_RADIUS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PARTITION: tl.constexpr, WITH_KEYS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_N)
    g, tile, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    d = tl.arange(0, BLOCK_D)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.load(queries + b * queries_b + h * queries_h + g * queries_g + n, mask=n < N, other=-1)
    q = _rows(query + b * query_b + h * query_h, i, query_t, d, D)
    do = _rows(grad + b * grad_b + h * grad_h, i, grad_t, d, D)
    row = _row(i, g, n, N, PARTITION)
    # δ = Σ_j P·dP is the context's product with its gradient.
    context = _rows(rows + b * rows_b + h * rows_h, row, rows_t, d, D)
    if not PARTITION:
        do = (do * tl.load(share + head * num_frames + i, mask=i >= 0, other=0.0)[:, None]).to(q.dtype)
    inner = tl.sum(do.to(tl.float32) * context.to(tl.float32), 1)
    lse = tl.load(logsum + head * num_rows + row, mask=i >= 0, other=0.0)
    keys += b * keys_b + h * keys_h + g * keys_g
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    stream = head
    if HAS_DROPOUT:
        stream += tl.load(seed)
    result = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        j = tl.load(keys + m, mask=m < M, other=-1)
        k = _rows(key, j, key_t, d, D)
        v = _rows(value, j, value_t, d, D)
        kept, ds = _score_gradients(
            q, k, v, do, i, j, lse, inner, num_frames, scale, stream, dropout, radius, HAS_RADIUS, HAS_DROPOUT
        )
        ds = ds.to(k.dtype)
        result += tl.dot(ds, k)
        if WITH_KEYS:
            dv = tl.dot(tl.trans(kept.to(do.dtype)), do)
            dk = tl.dot(tl.trans(ds), q) * (scale * LN_2)
            _put_rows(grad_value + b * by_key_b + h * by_key_h, j, by_key_t, d, dv, D, True)
            _put_rows(grad_key + b * by_key_b + h * by_key_h, j, by_key_t, d, dk, D, True)
    if not WITH_KEYS:
        tl.store(delta + head * num_rows + row, inner, mask=i >= 0)
    result = result * (scale * LN_2)
    _put_rows(grad_query + b * out_b + h * out_h, i, out_t, d, result, D, not PARTITION)


@triton.jit
def _key_gradient_kernel(
    query, key, value, queries, keys, share, grad, logsum, seed, grad_key, grad_value, delta,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, grad_b, grad_h, grad_t,
    out_b, out_h, out_t, queries_b, queries_h, queries_g, keys_b, keys_h, keys_g,
    num_heads, num_frames, num_rows, N, M, scale, dropout, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_RADIUS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PARTITION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M)
    g, tile, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    d = tl.arange(0, BLOCK_D)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.load(keys + b * keys_b + h * keys_h + g * keys_g + m, mask=m < M, other=-1)
    k = _rows(key + b * key_b + h * key_h, j, key_t, d, D)
    v = _rows(value + b * value_b + h * value_h, j, value_t, d, D)
    queries += b * queries_b + h * queries_h + g * queries_g
    query += b * query_b + h * query_h
    grad += b * grad_b + h * grad_h
    stream = head
    if HAS_DROPOUT:
        stream += tl.load(seed)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        i = tl.load(queries + n, mask=n < N, other=-1)
        q = _rows(query, i, query_t, d, D)
        do = _rows(grad, i, grad_t, d, D)
        row = _row(i, g, n, N, PARTITION)
        if not PARTITION:
            do = (do * tl.load(share + head * num_frames + i, mask=i >= 0, other=0.0)[:, None]).to(q.dtype)
        lse = tl.load(logsum + head * num_rows + row, mask=i >= 0, other=0.0)
        inner = tl.load(delta + head * num_rows + row, mask=i >= 0, other=0.0)
        kept, ds = _score_gradients(
            q, k, v, do, i, j, lse, inner, num_frames, scale, stream, dropout, radius, HAS_RADIUS, HAS_DROPOUT
        )
        dv += tl.dot(tl.trans(kept.to(do.dtype)), do)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q)
    dk = dk * (scale * LN_2)
    _put_rows(grad_key + b * out_b + h * out_h, j, out_t, d, dk, D, ADD)
    _put_rows(grad_value + b * out_b + h * out_h, j, out_t, d, dv, D, ADD)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    radius: int | None,
    partition: bool,
    transposed: tuple[Tensor, Tensor] | None,
    dropout: float,
) -> Tensor:
    """`grouped_attention` by the kernels; arguments and result are those of `audiot.attention.grouped`."""
    num_sequences, num_heads, num_frames, _ = query.shape
    queries, keys = (_rows_in_one_piece(index.int()) for index in (queries, keys))
    if partition:
        share = query.new_empty(0, dtype=torch.float32)
    else:
        number = queries.expand(num_sequences, num_heads, -1, -1).flatten(2).long()
        count = torch.zeros(num_sequences, num_heads, num_frames, device=query.device)
        count = count.scatter_add(2, number.clamp_min(0), (number >= 0).float())
        share = 1 / count.clamp_min(1)
    # Drawn on the device: reading it back would make the host wait.
    seed = torch.randint(2**62, (1,), device=query.device) if dropout else queries
    by_key = [None, None] if transposed is None else [_rows_in_one_piece(index.int()) for index in transposed]
    arguments = (query, key, value, queries, keys, *by_key, share, seed, -1 if radius is None else radius, partition, dropout)
    if torch.compiler.is_compiling():
        return _attend_in_a_graph(*arguments)[0]
    return _Attend.apply(*arguments)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor,
    queries_by_key: Tensor | None, keys_by_key: Tensor | None, share: Tensor, seed: Tensor,
    radius: int, partition: bool, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The context, and what the backward pass needs: results by group (empty if they are by frame), and logs of the sums."""
    query, key, value = (_rows_in_one_piece(tensor) for tensor in (query, key, value))
    context, rows, logsum = _outputs(query, queries, partition)
    tile, grid = _tiles(queries, query)
    _forward_kernel[grid](
        query, key, value, queries, keys, share, context, rows, logsum, seed,
        *_strides(query, key, value, context, queries, keys),
        *_sizes(query, queries, keys, partition, dropout, radius),
        BLOCK_N=tile, BLOCK_M=_tile(keys), **_constants(query, dropout, radius, partition),
    )  # fmt: skip
    return context.to(query.dtype), rows, logsum


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor,
    queries_by_key: Tensor | None, keys_by_key: Tensor | None, share: Tensor, seed: Tensor,
    context: Tensor, rows: Tensor, logsum: Tensor, radius: int, partition: bool, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    query, key, value, grad = (_rows_in_one_piece(tensor) for tensor in (query, key, value, grad))
    rows = context if partition else rows
    by_key = queries_by_key is not None and keys_by_key is not None
    grad_query = _frames_like(query, query.dtype if partition else torch.float32)
    grad_key, grad_value = (_frames_like(key, key.dtype if by_key else torch.float32) for _ in range(2))
    delta = torch.empty_like(logsum)
    tile, grid = _tiles(queries, query)
    together = not by_key and tile >= queries.shape[-1]  # one tile sees all queries of its keys in this group
    _query_gradient_kernel[grid](
        query, key, value, queries, keys, share, grad, rows, logsum, seed, grad_query, grad_key, grad_value, delta,
        *_strides(query, key, value, grad, rows, grad_query, grad_key, queries, keys),
        *_sizes(query, queries, keys, partition, dropout, radius),
        BLOCK_N=tile, BLOCK_M=_tile(keys), WITH_KEYS=together, **_constants(query, dropout, radius, partition),
    )  # fmt: skip
    if not together:
        if queries_by_key is not None and keys_by_key is not None:
            queries, keys = queries_by_key, keys_by_key
        tile, grid = _tiles(keys, query)
        _key_gradient_kernel[grid](
            query, key, value, queries, keys, share, grad, logsum, seed, grad_key, grad_value, delta,
            *_strides(query, key, value, grad, grad_key, queries, keys),
            *_sizes(query, queries, keys, partition, dropout, radius),
            BLOCK_N=_tile(queries), BLOCK_M=tile, ADD=not by_key,
            **_constants(query, dropout, radius, partition),
        )  # fmt: skip
    return grad_query.to(query.dtype), grad_key.to(query.dtype), grad_value.to(query.dtype)


class _Attend(torch.autograd.Function):
    """The kernels in eager mode."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.radius, ctx.partition, ctx.dropout = arguments
        results = _forward(*arguments)
        ctx.save_for_backward(*tensors, *results)
        return results[0]

    @staticmethod
    def backward(ctx, grad):
        gradients = _backward(grad, *ctx.saved_tensors, ctx.radius, ctx.partition, ctx.dropout)  # type: ignore[call-arg]
        return *gradients, *[None] * 9


# As operators they need no tracing in a compiled graph, at the price of a slower call in eager mode.
_attend_in_a_graph = torch.library.custom_op("audiot::grouped_attention", _forward, mutates_args=())
_backward_in_a_graph = torch.library.custom_op("audiot::grouped_attention_backward", _backward, mutates_args=())


@_attend_in_a_graph.register_fake
def _(query, key, value, queries, keys, queries_by_key, keys_by_key, share, seed, radius, partition, dropout):
    context, rows, logsum = _outputs(query, queries, partition)
    return context.to(query.dtype), rows, logsum


@_backward_in_a_graph.register_fake
def _(grad, query, key, value, *others):
    return tuple(_frames_like(frames, query.dtype) for frames in (query, key, value))


def _save(ctx, inputs, output):
    *tensors, ctx.radius, ctx.partition, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad, *_):
    return *_backward_in_a_graph(grad, *ctx.saved_tensors, ctx.radius, ctx.partition, ctx.dropout), *[None] * 9


_attend_in_a_graph.register_autograd(_differentiate, setup_context=_save)


def _outputs(query: Tensor, queries: Tensor, partition: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for the context, summed in float32 where several groups add to a frame; space for results and logs of sums."""
    head_dim = query.shape[-1]
    num_rows = _num_rows(query, queries, partition)
    rows = query.new_empty((*query.shape[:2], 0 if partition else num_rows, head_dim))
    logsum = torch.empty((*query.shape[:2], num_rows), dtype=torch.float32, device=query.device)
    return _frames_like(query, query.dtype if partition else torch.float32), rows, logsum


def _num_rows(query: Tensor, queries: Tensor, partition: bool) -> int:
    return query.shape[2] if partition else queries.shape[-2] * queries.shape[-1]


def _frames_like(query: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros (B, H, T, D) that lie in memory as (B, T, H, D), as the projections want them."""
    num_sequences, num_heads, num_frames, head_dim = query.shape
    return query.new_zeros((num_sequences, num_frames, num_heads, head_dim), dtype=dtype).transpose(1, 2)


def _rows_in_one_piece(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tile(index: Tensor) -> int:
    """Frames of a list that a program treats at a time."""
    places = index.shape[-1]
    return 16 if places <= 16 else 32 if places <= 32 else 64


def _tiles(index: Tensor, query: Tensor) -> tuple[int, tuple[int, int]]:
    """The tile of the list that programs own, and the grid: tiles of all groups × heads of all sequences."""
    tile = _tile(index)
    return tile, (index.shape[2] * -(-index.shape[3] // tile), query.shape[0] * query.shape[1])


def _strides(*tensors: Tensor) -> list[int]:
    """The first three strides of each; those of a dimension that is repeated are 0."""
    return [0 if size == 1 else stride for t in tensors for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)]


def _sizes(query: Tensor, queries: Tensor, keys: Tensor, partition: bool, dropout: float, radius: int) -> list[int | float]:
    _, num_heads, num_frames, head_dim = query.shape
    rows = _num_rows(query, queries, partition)
    return [num_heads, num_frames, rows, queries.shape[-1], keys.shape[-1], head_dim**-0.5 * LOG2_E, dropout, radius]


def _constants(query: Tensor, dropout: float, radius: int, partition: bool) -> dict[str, int | bool]:
    head_dim = query.shape[-1]
    return {
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "HAS_RADIUS": radius >= 0,
        "HAS_DROPOUT": dropout > 0,
        "PARTITION": partition,
        "num_warps": 4,
        "num_stages": 2,
    }
