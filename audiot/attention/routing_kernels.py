"""A Triton kernel that gives every centroid its frames; see `audiot.attention.routing`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FRAMES = 32768  # a program holds a row of scores


@triton.jit
def _largest_kernel(
    steps, valid, chosen, num_frames, size, rows_a_sequence,
    LOWEST: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    inside = t < num_frames
    score = tl.load(steps + row * num_frames + t, mask=inside, other=0).to(tl.int32)
    if HAS_VALID:
        inside = inside & (tl.load(valid + (row // rows_a_sequence) * num_frames + t, mask=inside, other=0) != 0)
    score = tl.where(inside, score, LOWEST - 1)
    # The highest bar that leaves at least `size` frames, by bisection; `LOWEST` where there are fewer.
    low = LOWEST
    high = LOWEST + (1 << BITS) - 1
    for _ in range(BITS):
        middle = low + (high - low + 1) // 2
        enough = tl.sum((score >= middle).to(tl.int32), 0) >= size
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = (score > low).to(tl.int32)
    level = (score == low).to(tl.int32)
    room = size - tl.sum(above, 0)
    taken = (above != 0) | ((level != 0) & (tl.cumsum(level, 0) <= room))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(chosen + row * size + place, t, mask=taken)


@torch.library.custom_op("audiot::largest", mutates_args=())
def largest(steps: Tensor, valid: Tensor | None, size: int, lowest: int) -> Tensor:
    """The `size` real frames with the largest scores of each row; of equal ones the earlier.

    Args:
        steps: Scores, int16 (B, H, C, T), T up to `MAX_FRAMES`.
        valid: bool (B, T), True = real frame; None: all.
        size: At most T.
        lowest: No score is below this.

    Returns:
        Numbers of frames, int32 (B, H, C, size), in their order; −1 where there are fewer real frames.
    """
    steps = steps.contiguous()
    num_sequences, num_heads, num_rows, num_frames = steps.shape
    chosen = torch.full((*steps.shape[:3], size), -1, dtype=torch.int32, device=steps.device)
    block = triton.next_power_of_2(num_frames)
    _largest_kernel[(num_sequences * num_heads * num_rows,)](
        steps, steps if valid is None else valid.contiguous(), chosen, num_frames, size, num_heads * num_rows,
        LOWEST=lowest, BITS=16, BLOCK=block, HAS_VALID=valid is not None, num_warps=min(32, max(4, block // 1024)),
    )  # fmt: skip
    return chosen


@largest.register_fake
def _(steps, valid, size, lowest):
    return steps.new_empty((*steps.shape[:3], size), dtype=torch.int32)
