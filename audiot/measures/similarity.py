"""How alike two layers' states are, whatever their axes: linear CKA (Kornblith et al. 2019, arXiv:1905.00414)."""

from __future__ import annotations

import torch
from torch import Tensor


def cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of states of the same frames, ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) of centred X and Y.

    It is that of Kornblith et al. 2019, arXiv:1905.00414, with linear kernels: 1 for states that differ by a rotation, a
    factor and a shift, 0 for states that share no direction of variance.

    Args:
        one: States (N, d) of N frames.
        other: States (N, e) of the same frames.

    Returns:
        A number from 0 to 1; NaN where the states of one do not vary.

    Raises:
        ValueError: the numbers of frames differ.
    """
    if len(one) != len(other):
        raise ValueError(f"CKA compares states of the same frames, found {len(one)} and {len(other)}")
    x, y = (_centred(states) for states in (one, other))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def principal(states: Tensor, size: int) -> Tensor:
    """States (N, d) in their first `size` principal axes, (N, min(N, d, `size`)), scaled to at most 1.

    CKA does not change with axes, and what is left out counts by the square of its variance. So it is nearly that of the states.
    """
    left, values, _ = torch.linalg.svd(_centred(states), full_matrices=False)
    scores = (left * values)[:, :size]
    return scores / scores.abs().max().clamp(min=torch.finfo(scores.dtype).tiny)


def _centred(states: Tensor) -> Tensor:
    states = states.double()
    return states - states.mean(0)
