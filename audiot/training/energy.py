"""The energy that a GPU has used, by its own counter (NVIDIA's management library, NVML)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """The counter of a device: a function that tells how many joules it has used, whatever ran on it.

    Args:
        device: The device.

    Returns:
        The counter; None where there is none: on all but NVIDIA GPUs since Volta, and without nvidia-ml-py (``audiot[study]``).
    """
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        # By its identity: its number is another one where CUDA_VISIBLE_DEVICES hides devices.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None  # the device or its driver has no counter
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
