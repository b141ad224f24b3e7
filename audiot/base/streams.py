"""Counter-based random numbers: a value depends on what it is about, never on device, rank, worker or batch.

``key("mask", seed, epoch, cut_id)`` names a stream; :func:`bits`, :func:`uniform` and :func:`normal` read numbers from many
streams at once, in integer arithmetic that CPU and GPU do alike. The mixing function is SplitMix64 (Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators").
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
    """64-bit signed key of a random stream, equal on every machine for equal ``about``."""
    digest = hashlib.blake2b("\x1f".join(map(str, about)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def seed_torch(number: int, device: torch.device) -> None:
    """Seed PyTorch's own generators (of dropout, say) that computation on a device draws from.

    `torch.manual_seed` seeds those of all devices that there may be, which takes milliseconds.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _xor_shift(value: Tensor, shift: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes it logical.
    return value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))


def bits(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Random 63-bit integers.

    Args:
        keys: Stream keys (B,), int64.
        count: Numbers from each stream.
        stream: Which of a key's independent sub-streams (masks, bands and noise of one utterance, say).

    Returns:
        Non-negative int64 (B, count).
    """
    # The mask changes nothing, but keeps torch.compile from folding the product into 32-bit index arithmetic.
    counter = torch.arange(1, count + 1, device=keys.device) & ((1 << 63) - 1)
    value = _mix(keys + _signed((stream + 1) * _MIX_2 % (1 << 64)))[:, None] + counter * _signed(_GOLDEN)
    return _mix(value) & ((1 << 63) - 1)


def _mix(value: Tensor) -> Tensor:
    value = _xor_shift(value, 30) * _signed(_MIX_1)
    value = _xor_shift(value, 27) * _signed(_MIX_2)
    return _xor_shift(value, 31)


def uniform(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Float32 numbers in [0, 1), (B, count), multiples of 2⁻²⁴."""
    return (bits(keys, count, stream) >> 39).float() * 2.0**-24


def normal(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Standard normal float32 numbers (B, count), by Box and Muller's transform."""
    first, second = uniform(keys, 2 * count, stream).unflatten(1, (count, 2)).unbind(2)  # a number needs its own pair alone
    return (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)
