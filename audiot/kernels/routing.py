"""Triton kernels of `audiot.attention.routing` that give every centroid its frames."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from audiot.kernels.registration import operator

MAX_FRAMES = 32768  # a program holds a row of scores


@triton.jit
def _scores_kernel(
    frames, centroids, steps, nearest, frames_b, frames_h, frames_t, num_heads, num_frames, num_clusters,
    RESOLUTION: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = t < num_frames
    place = frames + b * frames_b + h * frames_h + t.to(tl.int64)[None, :] * frames_t + d[:, None]
    x = tl.load(place, mask=inside[None, :] & (d < D)[:, None], other=0.0)  # D, T
    best = tl.full([BLOCK_T], float("-inf"), tl.float32)
    which = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, num_clusters, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        exists = c < num_clusters
        rows = centroids + (h * num_clusters + c)[:, None] * D + d[None, :]
        exact = tl.load(rows, mask=exists[:, None] & (d < D)[None, :], other=0.0)
        # Two half-precision numbers hold the float32 centroids closely enough; the frames are in half precision anyway.
        high = exact.to(x.dtype)
        low = (exact - high.to(tl.float32)).to(x.dtype)
        score = tl.dot(high, x) + tl.dot(low, x)  # C, T
        step = tl.minimum(tl.maximum(tl.floor(score * RESOLUTION), -LIMIT), LIMIT).to(tl.int16)
        out = steps + (head * num_clusters + c)[:, None] * num_frames + t[None, :]
        tl.store(out, step, mask=exists[:, None] & inside[None, :])
        score = tl.where(exists[:, None], score, float("-inf"))
        top = tl.max(score, 0)
        which = tl.where(top > best, start + tl.argmax(score, 0), which)
        best = tl.maximum(top, best)
    tl.store(nearest + head * num_frames + t, which, mask=inside)


@operator("centroid_scores")
def centroid_scores(frames: Tensor, centroids: Tensor, resolution: int, limit: int) -> tuple[Tensor, Tensor]:
    """Products of centroids with frames, counted in steps, and each frame's nearest centroid.

    Args:
        frames: (B, H, T, D), bfloat16 or float16.
        centroids: (H, C, D), float32.
        resolution: Steps per unit.
        limit: Largest absolute number of steps.

    Returns:
        ⌊product·`resolution`⌋ within ±`limit`, int16 (B, H, C, T), and numbers of centroids, int32 (B, H, T).
    """
    frames = frames if frames.stride(-1) == 1 else frames.contiguous()
    centroids = centroids.float().contiguous()
    num_sequences, num_heads, num_frames, head_dim = frames.shape
    num_clusters = centroids.shape[1]
    steps = torch.empty((num_sequences, num_heads, num_clusters, num_frames), dtype=torch.int16, device=frames.device)
    nearest = torch.empty((num_sequences, num_heads, num_frames), dtype=torch.int32, device=frames.device)
    _scores_kernel[(triton.cdiv(num_frames, 128), num_sequences * num_heads)](
        frames, centroids, steps, nearest, *frames.stride()[:3], num_heads, num_frames, num_clusters,
        RESOLUTION=resolution, LIMIT=limit, D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_T=128, BLOCK_C=32, num_warps=4,
    )  # fmt: skip
    return steps, nearest


@centroid_scores.register_fake  # type: ignore[attr-defined]
def _(frames, centroids, resolution, limit):
    num_sequences, num_heads, num_frames, _ = frames.shape
    steps = frames.new_empty((num_sequences, num_heads, centroids.shape[1], num_frames), dtype=torch.int16)
    return steps, frames.new_empty((num_sequences, num_heads, num_frames), dtype=torch.int32)


@triton.jit
def _largest_kernel(
    steps, valid, chosen, num_frames, size, rows_per_sequence,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    real = t < num_frames
    score = tl.load(steps + row * num_frames + t, mask=real, other=0).to(tl.int32) + LIMIT  # 15 bits
    if HAS_VALID:
        real = real & (tl.load(valid + (row // rows_per_sequence) * num_frames + t, mask=real, other=0) != 0)
    # The highest score that `size` frames reach, digit by digit to the base of 4: three bars are tried at a time, and one
    # sum counts the frames that reach each of them.
    bar = 0
    for place in tl.static_range(8):
        digit = 4 ** (7 - place)
        reach = (score >= bar + digit).to(tl.int64) + ((score >= bar + 2 * digit).to(tl.int64) << 20)
        reach = tl.sum(tl.where(real, reach + ((score >= bar + 3 * digit).to(tl.int64) << 40), 0), 0)
        once, twice, thrice = reach & 0xFFFFF, (reach >> 20) & 0xFFFFF, reach >> 40
        bar += digit * ((once >= size).to(tl.int32) + (twice >= size).to(tl.int32) + (thrice >= size).to(tl.int32))
    room = size - tl.sum((real & (score > bar)).to(tl.int32), 0)
    higher = real & (score > bar)
    level = real & (score == bar)
    # One running sum counts both: frames above the bar, and in the upper 16 bits those level with it.
    running = tl.cumsum(higher.to(tl.uint32) + (level.to(tl.uint32) << 16), 0)
    num_level = (running >> 16).to(tl.int32)
    taken = higher | (level & (num_level <= room))
    place = (running & 65535).to(tl.int32) + tl.minimum(num_level, room) - 1
    tl.store(chosen + row * size + place, t, mask=taken)


@operator("largest")
def largest(steps: Tensor, valid: Tensor | None, size: int, limit: int) -> Tensor:
    """The `size` real frames with the largest scores in each row. Of equal ones, the earlier is taken.

    Args:
        steps: Scores, int16 (B, H, C, T), T up to `MAX_FRAMES`.
        valid: bool (B, T), True = real frame; None: all.
        size: Number of frames to take per row, at most T.
        limit: Largest absolute score, below 2¹⁴.

    Returns:
        Numbers of frames, int32 (B, H, C, size), in their order; −1 where there are fewer real frames.
    """
    steps = steps.contiguous()
    num_sequences, num_heads, num_rows, num_frames = steps.shape
    chosen = torch.full((*steps.shape[:3], size), -1, dtype=torch.int32, device=steps.device)
    block = triton.next_power_of_2(num_frames)
    _largest_kernel[(num_sequences * num_heads * num_rows,)](
        steps, steps if valid is None else valid.contiguous(), chosen, num_frames, size, num_heads * num_rows,
        LIMIT=limit, BLOCK=block, HAS_VALID=valid is not None, num_warps=min(32, max(4, block // 1024)),
    )  # fmt: skip
    return chosen


@largest.register_fake  # type: ignore[attr-defined]
def _(steps, valid, size, limit):
    return steps.new_empty((*steps.shape[:3], size), dtype=torch.int32)
