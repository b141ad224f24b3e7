"""k-means on the device of the points, in bounded memory and the same for every number of chunks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from audiot.base.streams import key, uniform

CHUNK = 2**22  # distances held at a time
TRIALS = 4  # candidates for each first centre, of which the best is taken
FIRST = 8  # points per cluster that first centres are chosen from


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Number of the nearest centre: (…, D) and (K, D) → (…), int64. Of equally near ones, the first.

    The distance is computed as ‖c‖² − 2 p·c, whatever autocast says.
    """
    with torch.autocast(points.device.type, enabled=False):
        return _scores(points.to(centres.dtype).flatten(0, -2), centres).argmin(-1).view(points.shape[:-1])


def assigned(points: Tensor, centres: Tensor) -> Tensor:
    """The same in bounded memory: (N, D) and (K, D) → (N)."""
    return _nearest(points, centres)[1]


def _scores(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (N, K) without ‖p‖², which is the same for all centres."""
    return torch.addmm(centres.square().sum(1), points, centres.T, alpha=-2)


def kmeans(points: Tensor, num_clusters: int, seed: int, iterations: int = 20) -> Tensor:
    """Centres of k-means: k-means++ with several candidates (Arthur and Vassilvitskii 2007), then Lloyd's iterations.

    A centre that loses all its points is moved to the point that is farthest from its centre. It ends early when no point
    changes its cluster. Distances are taken about the mean of all points.

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
            "objective.sample_s if there is more audio"
        )
    mean = points.mean(0)  # distances are differences of large numbers where all points are far from zero
    points = points - mean
    return lloyd(points, first_centres(points, num_clusters, seed), iterations) + mean


def first_centres(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Draw centres among the points, each with a probability in proportion to its squared distance from those before it.

    Of many points, 8 per cluster at equal intervals are drawn from, on the CPU.
    """
    device, points = points.device, points[:: max(1, len(points) // (FIRST * num_clusters))].cpu()
    draws = uniform(torch.tensor([key("k-means", seed)]), num_clusters * TRIALS).view(num_clusters, TRIALS).tolist()
    norms = points.square().sum(1, keepdim=True)

    def distances(chosen: Tensor) -> Tensor:
        return (norms + _scores(points, points[chosen])).clamp_(min=0)

    chosen = [int(draws[0][0] * len(points))]
    closest = distances(torch.tensor(chosen))[:, 0]
    for row in draws[1:]:
        reached = closest.double().cumsum(0)
        wanted = torch.tensor(row, dtype=torch.float64) * reached[-1]
        candidates = torch.searchsorted(reached, wanted, right=True).clamp(max=len(points) - 1)
        within = torch.minimum(closest[:, None], distances(candidates))
        best = int(within.double().sum(0).argmin())
        chosen.append(int(candidates[best]))
        closest = within[:, best]
    return points[chosen].to(device)


def lloyd(points: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Lloyd's iterations from given centres (K, D): each centre becomes the mean of the points that it is nearest to."""
    previous = None
    norms = points.square().sum(1)
    for _ in range(iterations):
        scores, owner = _nearest(points, centres)
        if previous is not None and bool((owner == previous).all()):
            break
        previous = owner
        counts = owner.bincount(minlength=len(centres))
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            far = (norms + scores).topk(len(empty)).indices
            owner = owner.scatter(0, far, empty)
            counts = owner.bincount(minlength=len(centres))
        sums = _sums(points, owner, len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Score and number of the nearest centre of each point."""
    rows = max(1, CHUNK // len(centres))
    found = [_scores(part, centres).min(1) for part in points.split(rows)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _sums(points: Tensor, owner: Tensor, num_clusters: int) -> Tensor:
    """Sum of the points of each cluster (K, D)."""
    sums = points.new_zeros(num_clusters, points.shape[1])
    if points.device.type == "cpu":
        return sums.index_add_(0, owner, points)
    rows = max(1, CHUNK // num_clusters)
    for part, number in zip(points.split(rows), owner.split(rows), strict=True):  # sums by index have no order on a GPU
        sums += nn.functional.one_hot(number, num_clusters).to(points.dtype).T @ part
    return sums


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
