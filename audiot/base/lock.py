"""A run's folder has one owner: the process that writes in it, with those that it starts.

The owner holds a lock on ``.lock`` in the folder for its life. The operating system frees it when the process ends, however
that happens. The file's text says who it is: host, process id and start, a line each.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)  # what file systems say that have none
_held: dict[Path, int] = {}  # folders that this process owns → descriptors of their locks


def is_first_process() -> bool:
    """Whether this process is a run's first, which looks after its folder, and not one of the ranks beside it."""
    return not any(int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "RANK", "NODE_RANK", "SLURM_PROCID"))


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder, which is made if it is missing, while the block runs.

    Ranks beside the first process own nothing, and who owns the folder already goes on owning it.

    Raises:
        ValueError: another process owns it.
    """
    folder = Path(os.path.realpath(folder))
    if folder in _held or not is_first_process():
        yield
        return
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        _held[folder] = _acquire(folder)
        try:
            yield
        finally:
            _release(folder)
    finally:
        for made in missing:
            with suppress(OSError):  # something is in it, or it is gone
                made.rmdir()


def _acquire(folder: Path) -> int:
    """The descriptor of the folder's lock file, locked."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # an owner that has just begun writes its text
            owner = _owner(os.read(descriptor, 4096).decode(errors="replace"))
            os.close(descriptor)
            raise ValueError(
                f"{folder} is in use by {owner}: wait for its end, or stop it; another hydra.run.dir starts a run of its own"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                os.close(descriptor)
                raise
            sys.stderr.write(f"audiot: warning: {folder} can't be locked ({error.strerror}): start no second run in it\n")
        if _is_there(folder, descriptor):
            started = datetime.now().astimezone().isoformat(" ", "seconds")
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{socket.gethostname()}\n{os.getpid()}\n{started}\n".encode())
            return descriptor
        os.close(descriptor)


def _is_there(folder: Path, descriptor: int) -> bool:
    """Whether the lock file is still the folder's, which its last owner may just have deleted."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK))
    return False


def _owner(text: str) -> str:
    try:
        host, process, started = text.split("\n")[:3]
    except ValueError:
        return "another process"
    return f"process {process} on {host} since {started}"


def _release(folder: Path) -> None:
    """Delete the lock file, then unlock it: whoever opens it in between finds that it is no longer the folder's."""
    descriptor = _held.pop(folder, None)
    if descriptor is None:  # a forked process has none
        return
    if _is_there(folder, descriptor):
        (folder / LOCK).unlink(missing_ok=True)
    os.close(descriptor)


def _forget() -> None:
    """In a forked process: let go of the locks, which are its parent's and must end with it."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
