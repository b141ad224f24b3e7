"""What the heads of attention do: how wide they look, how far, how near to the diagonal, and how far tables moved."""

from __future__ import annotations

import torch
from torch import Tensor

SURVIVES = 0.5  # share of its mass that a head of a table still has where it began


def head_figures(weights: Tensor, lengths: Tensor, token_s: float) -> dict[str, Tensor]:
    """Figures of the heads of a layer for each utterance, means over its rows.

    Globalness and diagonality are those of Yang, Liu and Lee 2020, arXiv:2006.03265: the mean entropy of the rows, and
    −Σ|q − k|·A[q, k] / T² for an utterance of T frames. Diagonality is 0 where all weight is on the diagonal, and −1/3 or so
    where it is spread evenly.

    Args:
        weights: Attention weights (B, H, T, T), zero in the rows and columns of padded frames.
        lengths: Real frames of each utterance (B,).
        token_s: Seconds from one frame to the next.

    Returns:
        ``entropy`` of a row in nats; ``entropy_share``, the same as a share of the logarithm of the number of keys, 0 where there
        is one key; ``distance_s``, the mean distance of what is attended to in seconds; ``diagonality``. (B, H) each, on the CPU.
    """
    weights, count = weights.float(), lengths.to(weights.device).float()[:, None]  # B, 1
    entropy = _entropy(weights).sum(-1) / count
    place = torch.arange(weights.shape[-1], device=weights.device)
    distance = (weights * (place - place[:, None]).abs()).sum((-2, -1)) / count
    found = {
        "entropy": entropy,
        "entropy_share": entropy / count.clamp(min=2).log(),
        "distance_s": distance * token_s,
        "diagonality": -distance / count,
    }
    return {name: values.cpu() for name, values in found.items()}


def table_figures(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """How far the tables of a layer have moved from those that it began with.

    A head survives if its rows still have half of their mass, in the mean, where they began: if ``moved`` is at most 0.5. (One
    less the total variation of two distributions is the mass that they share.)

    Args:
        before, after: Weights of the tables (H, T, T), whose rows sum to 1.

    Returns:
        ``moved``, the total variation between the rows, from 0 to 1, in the mean over rows; ``entropy_before`` and
        ``entropy_after``, means over rows in nats; ``survives``, 1 or 0. (H,) each, on the CPU.
    """
    moved = (after.float() - before.float()).abs().sum(-1).mean(-1) / 2
    found = {
        "moved": moved,
        "entropy_before": _entropy(before.float()).mean(-1),
        "entropy_after": _entropy(after.float()).mean(-1),
        "survives": (moved <= 1 - SURVIVES).float(),
    }
    return {name: values.cpu() for name, values in found.items()}


def _entropy(rows: Tensor) -> Tensor:
    return -torch.xlogy(rows, rows).sum(-1)
