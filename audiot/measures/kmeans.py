"""Mini-batch k-means on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from audiot.base.streams import bits, key, uniform

SAMPLE = 20_000  # points that the first centres are chosen among
ROWS = 2**14  # points whose distances to all centres are held at once


@torch.inference_mode()
def kmeans(points: Tensor, num_clusters: int, seed: int, iterations: int = 100, batch_size: int = 10_000) -> Tensor:
    """Centres of clusters by mini-batch k-means (Sculley 2010), from a start by k-means++ (Arthur and Vassilvitskii 2007).

    A centre moves to the mean of all points that it was given so far, as far as a batch changes that. Sums are matrix products,
    so that equal input gives equal centres on one device.

    Args:
        points: Points (N, d) on the device that computes.
        num_clusters: Number of clusters k.
        seed: Seed of the start and of the batches.
        iterations: Number of batches.
        batch_size: Points of a batch, drawn with replacement.

    Returns:
        Centres (k, d) in float32.

    Raises:
        ValueError: there are fewer points than clusters, or no cluster.
    """
    if not 1 <= num_clusters <= len(points):
        raise ValueError(f"the number of clusters must be from 1 to that of points, {len(points)}, found {num_clusters}")
    centres = _start(_draw(points, SAMPLE, seed, "start") if len(points) > SAMPLE else points.float(), num_clusters, seed)
    counts = torch.zeros(num_clusters, device=points.device)
    for step in range(iterations):
        batch = _draw(points, batch_size, seed, f"batch {step}") if len(points) > batch_size else points.float()
        member = torch.nn.functional.one_hot(assign(batch, centres), num_clusters).float()  # B, k
        new = member.sum(0)
        counts += new
        centres += (member.T @ batch - new[:, None] * centres) / counts.clamp(min=1)[:, None]
    return centres


def assign(points: Tensor, centres: Tensor) -> Tensor:
    """Number of the nearest centre of each point (N,)."""
    half = centres.square().sum(1) / 2
    return torch.cat([(half - rows.float() @ centres.T).argmin(1) for rows in points.split(ROWS)])


def _draw(points: Tensor, count: int, seed: int, what: str) -> Tensor:
    keys = torch.tensor([key("k-means", what, seed)])
    return points[(bits(keys, count)[0] % len(points)).to(points.device)].float()


def _start(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """First centres: each one a point, the likelier the farther it is from those before (by the square)."""
    luck = uniform(torch.tensor([key("k-means", "centres", seed)]), num_clusters)[0].to(points.device)
    chosen = [(luck[:1] * len(points)).long()]
    nearest = (points - points[chosen[0]]).square().sum(1)
    for draw in luck[1:, None]:
        sums = nearest.double().cumsum(0) if points.device.type != "mps" else nearest.cumsum(0)  # MPS lacks float64
        chosen.append(torch.searchsorted(sums, draw.to(sums.dtype) * sums[-1], right=True).clamp_(max=len(points) - 1))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return points[torch.cat(chosen)].clone()
