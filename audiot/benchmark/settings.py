"""Checks of settings that several benchmarks have. What means nothing is refused in one line that begins with its key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from audiot.attention.mechanism import check_type
from audiot.base import devices
from audiot.base.groups import nearest


def find_device(name: str) -> torch.device:
    """The device called `name`. ``auto`` is a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    return devices.find_device(name, f"benchmark.device={name} is not here")


def check_counts(**counts: int) -> None:
    """Raise ValueError if a number, given under its key, is not a whole number of at least 1."""
    for key, count in counts.items():
        check_type(int, **{f"benchmark.{key}": count})
        if count < 1:
            raise ValueError(f"benchmark.{key} must be at least 1, found {count}")


def check_seconds(seconds: float) -> None:
    """Raise ValueError if ``benchmark.seconds`` is not a duration."""
    check_type(float, **{"benchmark.seconds": seconds})
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"benchmark.seconds is {seconds}: set it to 0 or more, and finite")


def check_choices(key: str, given: Sequence[Any], known: Sequence[Any]) -> None:
    """Raise ValueError if the list ``benchmark.KEY`` is empty or has an unknown value."""
    if not given:
        raise ValueError(f"benchmark.{key} is empty: nothing to measure")
    check_known(key, given, known)


def check_known(key: str, given: Sequence[Any], known: Sequence[Any]) -> None:
    """Raise ValueError if the list ``benchmark.KEY`` has an unknown value."""
    for value in given:
        if value not in known:
            near = nearest(str(value), list(map(str, known)))
            raise ValueError(f"benchmark.{key}: no {value!r}{near}; there are {', '.join(map(str, known))}")
