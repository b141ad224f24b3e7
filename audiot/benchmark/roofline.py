"""The roofline: what a device reaches, and how close to it the matrix products of a step come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from audiot.benchmark.measure import time_of
from audiot.benchmark.products import Work


class Ceilings(NamedTuple):
    """What a device reaches: operations per second in a large matrix product, bytes per second in a large copy.

    Args:
        flops_per_s: Floating-point operations per second.
        bytes_per_s: Bytes read and written per second.
        size: Rows and columns of the matrices.
    """

    flops_per_s: float
    bytes_per_s: float
    size: int

    def __str__(self) -> str:
        return f"{self.flops_per_s / 1e12:.4g} TFLOP/s ({self.size}³ matrix product), {self.bytes_per_s / 1e9:.4g} GB/s (copy)"


def measure_ceilings(noise: Callable[..., Tensor], dtype: torch.dtype) -> Ceilings:
    """Measure a device's ceilings on random numbers.

    Args:
        noise: Function of a shape for random numbers on the device.
        dtype: Precision of the matrix product.
    """
    device = noise(1).device
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    one, other = noise(2, size, size).to(dtype)
    source = noise(2**28 if on_gpu else 2**25)
    target = torch.empty_like(source)
    product = _seconds_of(lambda: one @ other, device)
    copy = _seconds_of(lambda: target.copy_(source), device)
    return Ceilings(2 * size**3 / product, 2 * source.nbytes / copy, size)


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call that nothing disturbs: the least of ten times, since a ceiling is measured."""
    count = max(1, round(0.05 / max(1e-6, time_of(call, 3, device))))
    return min(time_of(call, count, device) for _ in range(10))


def rates(forward: Work, passes: int, seconds: float, dtype: torch.dtype, ceilings: Ceilings) -> dict[str, Any]:
    """Fields of a row: how fast a step computes its matrix products.

    Args:
        forward: Work of a forward pass.
        passes: Passes of as much work in a step: 1 without a backward pass, which computes and moves twice as much, else 3.
        seconds: Duration of a step.
        dtype: Precision of the products.
        ceilings: Ceilings of the device.
    """
    rate = passes * forward.flops / seconds
    intensity = forward.flops / (forward.elements * torch.finfo(dtype).bits / 8)
    return {"tflops": rate / 1e12, "share_of_peak": rate / ceilings.flops_per_s, "flops_per_byte": intensity}
