"""Distances of frames, and dynamic time warping of many pairs of units at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

DISTANCES = ("angular", "cosine", "euclidean", "kl")
KL_FLOOR = 1e-6  # added inside the logarithm, so that a probability of zero has one
SIZES = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024])
CELLS = {"cpu": 2**17}  # matrix entries of one step on a device, so that those of a CPU stay in its cache
CELLS_ELSEWHERE = 2**23


def size_class(counts: np.ndarray) -> np.ndarray:
    """A size that holds each count, out of a few, so that units of about the same length are computed together."""
    place = np.searchsorted(SIZES, counts)
    return np.where(place < len(SIZES), SIZES[np.minimum(place, len(SIZES) - 1)], counts)


class Distance:
    """A distance of frames, made ready for frames that are compared many times.

    ``angular`` is the angle over π, so from 0 to 1, and ``cosine`` 1 − cos. A frame of zeros has no angle; it stands for
    (1, …, 1)/√d. ``kl`` is half the sum of both Kullback–Leibler divergences of two rows of probabilities p, q:
    ½ Σ (p − q)·(log(p + 1e-6) − log(q + 1e-6)). These are the definitions of fastabx (Poli et al. 2025, arXiv:2505.02692), except
    that its ``cosine`` is another name of ``angular``.

    Args:
        name: One of `DISTANCES`.

    Raises:
        ValueError: there is no such distance.
    """

    def __init__(self, name: str) -> None:
        if name not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, found {name!r}")
        self.name = name

    def prepared(self, frames: Tensor) -> Tensor:
        """Frames (F, d) as `between` takes them.

        Raises:
            ValueError: a number is not finite, or the rows are no probabilities though the distance needs them.
        """
        frames = frames.float()
        if not bool(frames.isfinite().all()):
            raise ValueError("hidden states are not finite: distances of them mean nothing; take another upstream or layers")
        if self.name in ("angular", "cosine"):
            norms = frames.norm(dim=1, keepdim=True)
            return torch.where(norms > 0, frames / norms, 1 / math.sqrt(frames.shape[1]))
        if self.name == "kl":
            if len(frames) and (float(frames.min()) < 0 or float((frames.sum(1) - 1).abs().max()) > 1e-3):
                raise ValueError("distance=kl compares probabilities: rows of numbers from 0 on that sum to 1 were expected")
            if frames.device.type != "mps":  # which lacks float64; sums that nearly cancel need it
                frames = frames.double()
            return torch.cat([frames, (frames + KL_FLOOR).log()], dim=1)
        return frames - frames.mean(dim=0)  # distances stay, and lose fewer digits

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance of each frame of one set to each of another: (F, ·), (G, ·) → (F, G)."""
        if self.name == "euclidean":
            return torch.cdist(first, second)
        if self.name == "kl":
            dim = first.shape[1] // 2
            own, other = ((rows[:, :dim] * rows[:, dim:]).sum(1) for rows in (first, second))
            across = first @ torch.cat([second[:, dim:], second[:, :dim]], dim=1).T
            return ((own[:, None] + other[None] - across) / 2).float()
        cosines = (first @ second.T).clamp_(-1, 1)
        return cosines.acos_().div_(math.pi) if self.name == "angular" else 1 - cosines


def warp(costs: Tensor, starts: np.ndarray, widths: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Dynamic time warping (Sakoe and Chiba 1978) of many pairs, each normalised by the length of its own path.

    A step goes one frame further in one unit or in both, and every pair of frames on the path counts once. Of steps that cost
    the same, the one in both units is taken, else the one in the second. So the result is the mean cost on the cheapest path.

    Args:
        costs: Costs of pairs of frames, flat: matrices with any number of rows and columns, one after the other.
        starts: Place in `costs` of the first pair of frames of each pair of units (P,).
        widths: Places from one row to the next in the matrix of each pair (P,).
        rows: Frames of the first unit of each pair (P,).
        columns: Frames of its second unit (P,).

    Returns:
        Normalised costs (P,).
    """
    device = costs.device
    result = torch.empty(len(starts), dtype=costs.dtype, device=device)
    single = np.flatnonzero((rows == 1) & (columns == 1))
    result[_on(device, single)] = costs[_on(device, starts[single])]
    several = np.flatnonzero((rows > 1) | (columns > 1))
    kinds = size_class(rows[several]) * (1 << 32) + size_class(columns[several])
    order = np.argsort(kinds, kind="stable")
    several, kinds = several[order], kinds[order]
    for pairs in np.split(several, np.flatnonzero(np.diff(kinds)) + 1) if len(several) else []:
        step = max(1, CELLS.get(device.type, CELLS_ELSEWHERE) // int(min(rows[pairs].max(), columns[pairs].max())))
        for first in range(0, len(pairs), step):
            some = pairs[first : first + step]
            result[_on(device, some)] = _warp_alike(costs, *(values[some] for values in (starts, widths, rows, columns)))
    return result


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _warp_alike(costs: Tensor, starts: np.ndarray, widths: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """`warp` of pairs of similar lengths, one anti-diagonal after the other: its cells depend on the two before it alone.

    Cells beyond a pair's own lengths are computed too, and never read.
    """
    most_rows, most_columns = int(rows.max()), int(columns.max())
    first_end = int((rows + columns).min()) - 2
    device, pairs = costs.device, len(starts)
    start, width, own_rows, ends = (_on(device, values) for values in (starts, widths, rows, rows + columns - 2))
    place = torch.arange(most_rows, device=device)[:, None] * (width - 1) + start  # of row i in column −i
    last = len(costs) - 1
    # Row i of a diagonal is row i + 1 here; row 0 and rows that a diagonal does not have are infinitely far.
    cost = [torch.full((most_rows + 1, pairs), math.inf, dtype=costs.dtype, device=device) for _ in range(3)]
    length = [torch.zeros_like(cost[0]) for _ in range(3)]
    result = torch.empty(pairs, dtype=costs.dtype, device=device)
    for diagonal in range(most_rows + most_columns - 1):
        low, high = max(0, diagonal - most_columns + 1), min(most_rows, diagonal + 1)
        now, before, before_that = ((diagonal - back) % 3 for back in range(3))
        own = costs[(place[low:high] + diagonal).clamp_(max=last)]
        here = slice(low + 1, high + 1)
        if diagonal == 0:
            cost[now][here], length[now][here] = own, 1
        else:
            above = slice(low, high)
            up, left, both = cost[before][above], cost[before][here], cost[before_that][above]
            sides = torch.minimum(up, left)
            torch.add(torch.minimum(sides, both), own, out=cost[now][here])
            longer = torch.where(left <= up, length[before][here], length[before][above])
            torch.add(torch.where(both <= sides, length[before_that][above], longer), 1, out=length[now][here])
        if diagonal >= first_end:
            mean = cost[now].gather(0, own_rows[None]) / length[now].gather(0, own_rows[None])
            result = torch.where(ends == diagonal, mean[0], result)
    return result
