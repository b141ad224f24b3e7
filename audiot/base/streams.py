"""Counter-based random numbers: a value depends on its key alone, never on device, rank, worker or batch.

``key("mask", seed, epoch, cut_id)`` names a stream. :func:`bits`, :func:`uniform` and :func:`normal` read numbers from many
streams at once. They use integer arithmetic, which gives the same results on CPU and GPU. The mixing function is SplitMix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def key(*about: str | int) -> int:
    """64-bit signed key of a random stream. Equal ``about`` gives an equal key on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, about)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def seed_torch(number: int, device: torch.device) -> None:
    """Seed the PyTorch generators that computation on one device draws from, such as those of dropout.

    `torch.manual_seed` seeds the generators of all possible devices, which takes milliseconds.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _xor_shift(value: Tensor, shift: int) -> Tensor:
    # torch shifts int64 arithmetically. The mask makes the shift logical.
    return value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))


def bits(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Random 63-bit integers.

    Args:
        keys: Stream keys (B,), int64.
        count: Numbers to draw from each stream.
        stream: Index of an independent sub-stream of each key (for masks, bands or noise of one utterance).

    Returns:
        Non-negative int64 (B, count).
    """
    # The mask changes no value. It keeps torch.compile from folding the product into 32-bit index arithmetic.
    counter = torch.arange(1, count + 1, device=keys.device) & ((1 << 63) - 1)
    value = _mix(keys + _signed((stream + 1) * _MIX_2 % (1 << 64)))[:, None] + counter * _signed(_GOLDEN)
    return _mix(value) & ((1 << 63) - 1)


def _mix(value: Tensor) -> Tensor:
    value = _xor_shift(value, 30) * _signed(_MIX_1)
    value = _xor_shift(value, 27) * _signed(_MIX_2)
    return _xor_shift(value, 31)


def uniform(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Float32 numbers (B, count) in [0, 1), multiples of 2⁻²⁴."""
    return (bits(keys, count, stream) >> 39).float() * 2.0**-24


def normal(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Standard normal float32 numbers (B, count), by the Box–Muller transform."""
    first, second = uniform(keys, 2 * count, stream).unflatten(1, (count, 2)).unbind(2)  # number i uses pair i only
    return (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)
