"""Choosing a device, and what depends on its kind."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = (torch.bfloat16, torch.float16)


def find_device(name: str, complaint: str) -> torch.device:
    """The device with a name. ``auto`` takes a GPU if there is one, else the CPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, …
        complaint: Beginning of the error when the device does not exist. PyTorch's reason follows it.

    Raises:
        ValueError: no device has that name.
    """
    if name == "auto":
        name = _kind_at_hand()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without this kind of device
        raise ValueError(f"{complaint}: {str(error).splitlines()[0]}") from error


def _kind_at_hand() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def is_cuda(accelerator: str) -> bool:
    """Whether Lightning will compute on a CUDA GPU.

    Args:
        accelerator: Lightning's ``accelerator``: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps``, …
    """
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def fast_precision(accelerator: str) -> str:
    """Lightning's name for the fastest precision on the device that Lightning will choose.

    Args:
        accelerator: Lightning's ``accelerator``: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps``, …

    Returns:
        ``bf16-mixed`` where the device has instructions for bfloat16 matrix products, else ``32-true``.
    """
    kind = _kind_at_hand() if accelerator == "auto" else accelerator
    fast = False
    if is_cuda(kind):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        known = torch.cpu.get_capabilities()
        fast = any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if fast else "32-true"


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory() -> None:
    """Give unused GPU memory back to the driver."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def attention_of_any_shape() -> AbstractContextManager:
    """Context without cuDNN's fused attention, for batches whose shapes rarely repeat.

    CuDNN makes a plan for each new shape, and planning takes longer than computing.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with this tensor is computed."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it is in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_half_precision(tensor: Tensor) -> bool:
    """Whether matrix products with this tensor run in half precision on a CUDA device, where our own kernels may be used."""
    return tensor.is_cuda and autocast_dtype(tensor) in HALF


def to_host(*tensors: Tensor) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Copy tensors of one device to the CPU without waiting.

    Returns:
        The copies, and the event that marks their arrival. The event is None when they are there already. Who waits for it
        sleeps, and leaves the core to the processes that load data.
    """
    if tensors[0].device.type != "cuda":
        return [tensor.cpu() for tensor in tensors], None
    copies = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True) for tensor in tensors
    ]
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()
    return copies, arrived
