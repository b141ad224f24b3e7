"""Which device to compute on."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = (torch.bfloat16, torch.float16)


def find_device(name: str, complaint: str) -> torch.device:
    """The device of a name; ``auto``: a GPU if there is one, else the CPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, …
        complaint: What an error says of a device that is not there, before PyTorch's reason.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "auto":
        name = _kind_at_hand()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without it
        raise ValueError(f"{complaint}: {str(error).splitlines()[0]}") from error


def _kind_at_hand() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def fast_precision(accelerator: str) -> str:
    """Lightning's name of the precision to train in where Lightning finds the device.

    Args:
        accelerator: Lightning's: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps``, …

    Returns:
        ``bf16-mixed`` where the device has instructions for products of bfloat16 matrices, else ``32-true``.
    """
    kind = _kind_at_hand() if accelerator == "auto" else accelerator
    fast = False
    if kind in ("gpu", "cuda"):
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        known = torch.cpu.get_capabilities()
        fast = any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if fast else "32-true"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def attention_of_any_shape() -> AbstractContextManager:
    """PyTorch's fused attention without cuDNN's: for batches of which hardly two have the same shape.

    CuDNN plans anew for each shape, which takes longer than to compute it.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The precision that a matrix product with this tensor is computed in."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it is in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_half_precision(tensor: Tensor) -> bool:
    """Whether matrix products with this tensor are in half precision on a CUDA device, where kernels of our own may be used."""
    return tensor.is_cuda and autocast_dtype(tensor) in HALF


def to_host(*tensors: Tensor) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Copies of tensors of one device on the CPU, which the host need not wait for.

    Returns:
        The copies, and the event with which they have arrived; None where they are there already.
    """
    if tensors[0].device.type != "cuda":
        return [tensor.cpu() for tensor in tensors], None
    copies = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True) for tensor in tensors
    ]
    arrived = torch.cuda.Event()
    arrived.record()
    return copies, arrived
