"""Sorting that `torch.compile` leaves to PyTorch's own kernels."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("audiot::stable_sort", mutates_args=())
def stable_sort(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N,) in ascending order, equal ones in the order in which they came, and the place that each had before.

    Inductor would write code of its own for a short `Tensor.sort`, and Triton takes minutes to compile it.
    """
    ordered, places = values.sort(stable=True)
    return ordered, places


@stable_sort.register_fake
def _(values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(values, dtype=torch.int64)
