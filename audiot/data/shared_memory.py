"""Room in /dev/shm, through which loader processes hand batches to training; containers have 64 MB of it unless they are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path

PLACE = Path("/dev/shm")
REMEDY = "data.num_workers={workers} or a smaller data.batch_s"
HELD = 2  # batches that the main process has at a time, one in use and one on its way to the device


def free_bytes() -> int | None:
    """What is free in /dev/shm; None where a system has none."""
    if not PLACE.is_dir():
        return None
    status = os.statvfs(PLACE)
    return status.f_bavail * status.f_frsize


def check_room(workers: int, batches: int, batch_bytes: float, training_processes: int = 1, remedy: str = REMEDY) -> None:
    """Refuse loader processes for whose batches there is no room.

    Args:
        workers: Loader processes of each training process.
        batches: How many each of them makes ahead.
        batch_bytes: Size of a batch.
        training_processes: On this machine.
        remedy: What to set instead, with ``{workers}`` for the number of loader processes for which there is room.

    Raises:
        ValueError: with what is free, what is wanted, and what to do.
    """
    free = free_bytes()
    wanted = training_processes * (workers * batches + HELD) * batch_bytes
    if not workers or free is None or wanted <= free:
        return
    most = max(0, int(free / training_processes / batch_bytes - HELD) // batches)
    many = f"{training_processes} × {workers}" if training_processes > 1 else str(workers)
    raise ValueError(
        f"/dev/shm has {_mb(free)} free, and {many} loader processes want about {_mb(wanted)} of it ({batches} batches of "
        f"{_mb(batch_bytes)} each): {_remedy(wanted, remedy, most)}"
    )


@contextmanager
def room_told(batch_bytes: float, remedy: str = REMEDY) -> Iterator[None]:
    """Say what to do where PyTorch finds no room for a batch.

    Raises:
        ValueError: instead of PyTorch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        free = free_bytes()
        has = "there is no shared memory" if free is None else f"/dev/shm has {_mb(free)} free"
        words = f"{has}, and a loader process wants {_mb(batch_bytes)} of it for a batch: {_remedy(batch_bytes, remedy, 0)}"
        raise ValueError(words) from error


def _remedy(wanted: float, remedy: str, workers: int) -> str:
    gigabytes = max(1, ceil(2 * wanted / 2**30))
    return f"docker run --shm-size={gigabytes}g makes it larger, else set {remedy.format(workers=workers)}"


def _mb(size: float) -> str:
    return f"{size / 2**20:.3g} MB" if size < 1000 * 2**20 else f"{size / 2**20:,.0f} MB"
