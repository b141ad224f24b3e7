"""Space in /dev/shm, where loader processes pass batches to training. Containers have 64 MB of it by default."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path

PLACE = Path("/dev/shm")
REMEDY = "data.num_workers={workers} or a smaller data.batch_s"
HELD = 2  # batches held by the main process: one in use, one on its way to the device


def free_bytes() -> int | None:
    """Free bytes in /dev/shm; None where the system has none."""
    if not PLACE.is_dir():
        return None
    status = os.statvfs(PLACE)
    return status.f_bavail * status.f_frsize


def check_room(workers: int, batches: int, batch_bytes: float, training_processes: int = 1, remedy: str = REMEDY) -> None:
    """Refuse loader processes whose batches would not fit into /dev/shm.

    Args:
        workers: Loader processes of each training process.
        batches: Batches that each process makes in advance.
        batch_bytes: Size of a batch in bytes.
        training_processes: Training processes on this machine.
        remedy: Advice, with ``{workers}`` for the number of loader processes that fit.

    Raises:
        ValueError: there is too little space. The message has the free and the needed size, and the remedy.
    """
    free = free_bytes()
    wanted = training_processes * (workers * batches + HELD) * batch_bytes
    if not workers or free is None or wanted <= free:
        return
    most = max(0, int(free / training_processes / batch_bytes - HELD) // batches)
    many = f"{training_processes} × {workers}" if training_processes > 1 else str(workers)
    raise ValueError(
        f"/dev/shm has {_mb(free)} free, but {many} loader processes need about {_mb(wanted)} of it ({batches} batches of "
        f"{_mb(batch_bytes)} each): {_remedy(wanted, remedy, most)}"
    )


@contextmanager
def shared_memory_errors(batch_bytes: float, remedy: str = REMEDY) -> Iterator[None]:
    """Explain PyTorch's error about missing space for a batch.

    Raises:
        ValueError: raised instead of PyTorch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        free = free_bytes()
        has = "there is no shared memory" if free is None else f"/dev/shm has {_mb(free)} free"
        words = f"{has}, but a loader process needs {_mb(batch_bytes)} of it for a batch: {_remedy(batch_bytes, remedy, 0)}"
        raise ValueError(words) from error


def _remedy(wanted: float, remedy: str, workers: int) -> str:
    gigabytes = max(1, ceil(2 * wanted / 2**30))
    return f"docker run --shm-size={gigabytes}g makes it larger, else set {remedy.format(workers=workers)}"


def _mb(size: float) -> str:
    return f"{size / 2**20:.3g} MB" if size < 1000 * 2**20 else f"{size / 2**20:,.0f} MB"
