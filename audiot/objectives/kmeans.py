"""k-means on the device of the points, in bounded memory and the same for every number of chunks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from audiot.base.streams import key, uniform

CHUNK = 2**24  # distances held at a time
TRIALS = 4  # candidates for each first centre, of which the best is taken
FIRST = 32  # points per cluster that first centres are chosen from


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Number of the nearest centre: (…, D) and (K, D) → (…), int64. Of equally near ones, the first.

    The distance is computed as ‖c‖² − 2 p·c, in float32 or better, whatever autocast says.
    """
    with torch.autocast(points.device.type, enabled=False):
        points = points.to(centres.dtype)
        return torch.addmm(
            centres.square().sum(1), points.flatten(0, -2), centres.T, alpha=-2
        ).argmin(-1).view(points.shape[:-1])  # fmt: skip


def kmeans(points: Tensor, num_clusters: int, seed: int, iterations: int = 30) -> Tensor:
    """Centres of k-means: k-means++ with several candidates (Arthur and Vassilvitskii 2007), then Lloyd's iterations.

    A centre that loses all its points is moved to the point that is farthest from its centre. It ends early when no point
    changes its cluster.

    Args:
        points: (N, D), floating point.
        num_clusters: Number of centres K.
        seed: Seed of the first centres.
        iterations: Most iterations.

    Returns:
        Centres (K, D).

    Raises:
        ValueError: there are fewer points than clusters.
    """
    if len(points) < num_clusters:
        raise ValueError(
            f"objective.num_clusters={num_clusters} needs as many frames to fit on, found {len(points)}: lower it, or raise "
            "objective.sample_s"
        )
    return lloyd(points, first_centres(points, num_clusters, seed), iterations)


def first_centres(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Draw centres among the points, each with a probability in proportion to its squared distance from those before it.

    Of many points, 32 per cluster at equal intervals are drawn from, on the CPU.
    """
    device, points = points.device, points[:: max(1, len(points) // (FIRST * num_clusters))].cpu()
    draws = uniform(torch.tensor([key("k-means", seed)]), num_clusters * TRIALS).view(num_clusters, TRIALS).tolist()
    norms = points.square().sum(1)
    chosen = [int(draws[0][0] * len(points))]
    closest = _distances(points, norms, points[chosen])[:, 0]
    for row in draws[1:]:
        reached = closest.double().cumsum(0)
        wanted = torch.tensor(row, dtype=torch.float64) * reached[-1]
        candidates = torch.searchsorted(reached, wanted, right=True).clamp(max=len(points) - 1)
        within = torch.minimum(closest[:, None], _distances(points, norms, points[candidates]))
        best = int(within.double().sum(0).argmin())
        chosen.append(int(candidates[best]))
        closest = within[:, best]
    return points[chosen].to(device)


def lloyd(points: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Lloyd's iterations from given centres (K, D): each centre becomes the mean of the points that it is nearest to."""
    rows = max(1, CHUNK // len(centres))
    previous = None
    norms = points.square().sum(1)
    for _ in range(iterations):
        owner, distance = _assign(points, norms, centres, rows)
        if previous is not None and bool((owner == previous).all()):
            break
        previous = owner
        counts = owner.bincount(minlength=len(centres))
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            far = distance.topk(len(empty)).indices
            owner = owner.scatter(0, far, empty)
            counts = owner.bincount(minlength=len(centres))
        sums = torch.zeros_like(centres)
        for begin in range(0, len(points), rows):  # products: sums by index have no order on a GPU
            member = nn.functional.one_hot(owner[begin : begin + rows], len(centres)).to(points.dtype)
            sums += member.T @ points[begin : begin + rows]
        filled = counts > 0
        centres = torch.where(filled[:, None], sums / counts.clamp(min=1)[:, None], centres)
    return centres


def _assign(points: Tensor, norms: Tensor, centres: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point, and its squared distance."""
    owners, distances = [], []
    for begin in range(0, len(points), rows):
        found = _distances(points[begin : begin + rows], norms[begin : begin + rows], centres).min(1)
        owners.append(found.indices)
        distances.append(found.values)
    return torch.cat(owners), torch.cat(distances)


def _distances(points: Tensor, norms: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (N, K)."""
    return (norms[:, None] - 2 * points @ centres.T + centres.square().sum(1)).clamp_(min=0)


def normalised_mutual_information(first: Tensor, second: Tensor) -> float:
    """Mutual information of two labellings (N,) over the mean of their entropies; 1 where they say the same."""
    joint = torch.zeros(int(first.max()) + 1, int(second.max()) + 1, dtype=torch.float64)
    joint.index_put_((first.cpu(), second.cpu()), torch.ones(len(first), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()

    def entropy(share: Tensor) -> Tensor:
        return -torch.special.xlogy(share, share).sum()

    one, other, both = entropy(joint.sum(1)), entropy(joint.sum(0)), entropy(joint)
    mean = (one + other) / 2
    return float((one + other - both) / mean) if mean > 0 else 1.0
