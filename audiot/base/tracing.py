"""What differs while a model is written as a graph for other programs, by torch.export.

The graph must hold for all lengths. Whatever asks for one of them while it is recorded would leave a graph for some lengths only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_recording = False


@contextmanager
def recording() -> Iterator[None]:
    """Around the recording of a graph."""
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


def is_recording() -> bool:
    """Whether a graph is recorded. PyTorch's own answer, `torch.compiler.is_exporting`, is yes under torch.compile too."""
    return _recording


def can_be_read(tensor: Tensor) -> bool:
    """Whether the values of a tensor can decide what is computed: without waiting for a device, and outside such a graph."""
    return tensor.device.type == "cpu" and not is_recording()


def for_sine(angle: Tensor) -> Tensor:
    """An angle in float64, as sine and cosine are computed of it: in a graph within one turn and in float32.

    Not every runtime has sine and cosine of float64, and a large angle in float32 has few digits left.
    """
    return angle.remainder(2 * math.pi).float() if is_recording() else angle


def first(tensor: Tensor, dim: int, count: int) -> Tensor:
    """The first ``count`` entries along a dimension, a view.

    In a graph they are copied: a view would ask whether it is the whole tensor.
    """
    if is_recording():
        return tensor.index_select(dim, torch.arange(count, device=tensor.device))
    return tensor.narrow(dim, 0, count)
