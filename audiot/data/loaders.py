"""Loaders whose processes are watched: one that ends, is stopped or hangs is told in one line, and nobody waits for it."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.util import Finalize
from threading import Event, Thread, current_thread, main_thread
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from audiot.base.private import worker_processes

STOPS = (signal.SIGINT, signal.SIGTERM)  # reach all processes of a job
LOOK_S = 5  # seconds between two looks at the processes
PATIENCE_S = 50  # seconds without a batch after which a loader gives up

T = TypeVar("T")


class LoaderStoppedError(OSError):
    """A loader process was killed, or gives no batches any more."""


class WatchedLoader(DataLoader[T]):
    """DataLoader that tells in one line which of its processes died or went silent, after which batch.

    Its processes ignore Ctrl-C and SIGTERM: the main process, which needs them until it has saved, ends them itself.

    Args:
        dataset: The dataset.
        place: Function that gives words for a batch that has come.
        remedy: What to lower where memory is short.
        options: Further arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Any, place: Callable[[T], str], remedy: str, **options: Any) -> None:
        own: dict[str, Any] = {"worker_init_fn": ignore_signals, "timeout": LOOK_S} if options.get("num_workers") else {}
        super().__init__(dataset, **own | options)
        self.place, self.remedy = place, remedy

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        """The batches. Its processes start at once.

        Raises:
            LoaderStoppedError: a process died, or none has given a batch for 50 seconds.
        """
        with _signals_later():  # workers inherit it, until they ignore them
            batches = super().__iter__()
        _leave_dead_workers_alone()
        _end_with_this_process(worker_processes(batches))
        return self._watched(batches)

    def _watched(self, batches: Iterator[T]) -> Iterator[T]:
        workers, last = worker_processes(batches), "the start"
        silence = _Silence(workers)
        if workers:
            silence.start()
        try:
            while True:
                silence.asked = silence.answered + 1
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    if silence.is_over or any(map(_is_dead, workers)):
                        why = _told(workers, silence.is_over, self.remedy)
                        raise LoaderStoppedError(f"the loader of data stopped after {last}: {why}") from error
                    if str(error).startswith("DataLoader timed out"):  # which is an occasion to look, and no more
                        continue
                    raise  # what a process told of itself
                silence.answered = silence.asked
                last = self.place(batch)
                yield batch
        except Exception:
            for worker in workers:  # else nobody ends them: they ignore the SIGTERM that PyTorch sends in the end
                worker.kill()
            raise
        finally:
            silence.is_closed.set()


class _Silence(Thread):
    """Kills the processes of a loader that is asked for a batch and gives nothing.

    The main process may wait for the batch itself, or amid it for its memory, whose file descriptor it asks the process for:
    PyTorch's timeout knows only the former, and one that is stopped answers neither. Looks are counted, not time: a training
    that is stopped as a whole (Ctrl-Z) goes on as if nothing had happened.

    Args:
        workers: The processes.

    Attributes:
        asked, answered: Batches so far. The main process alone counts them.
        is_over: Whether the processes were killed.
        is_closed: Set when no more batches are asked for.
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        super().__init__(name="loader", daemon=True)
        self.workers = workers
        self.asked = self.answered = 0
        self.is_over = False
        self.is_closed = Event()

    def run(self) -> None:
        """Look until the loader is closed or silent for too long."""
        looks, seen = 0, 0
        while not self.is_closed.wait(LOOK_S):
            asked = self.asked
            looks = looks + 1 if asked == seen != self.answered else 0
            seen = asked
            if looks * LOOK_S >= PATIENCE_S:
                self.is_over = True
                for worker in self.workers:
                    worker.kill()
                return


def ignore_signals(worker: int) -> None:
    """Start of a loader's process: ignore Ctrl-C and SIGTERM."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for this process and those that it starts; what has come takes effect afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_this_process(workers: Iterable[Any]) -> None:
    """Kill workers before Python waits for them at its end: they ignore the SIGTERM that it sends, so it would wait for ever.

    That is so where an error ends a run whose loader nobody has closed.
    """
    alive = weakref.WeakSet(workers)
    Finalize(None, lambda: [worker.kill() for worker in alive], exitpriority=10)


def _leave_dead_workers_alone() -> None:
    """Undo PyTorch's handler of SIGCHLD, which raises an error wherever the main process is, within a step perhaps."""
    handler = signal.getsignal(signal.SIGCHLD)
    if str(getattr(handler, "__module__", "")).startswith("torch.utils.data") and current_thread() is main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _is_dead(worker: Any) -> bool:
    worker.join(0.1)  # one that was killed amid a batch breaks its connection first
    return not worker.is_alive()


def _told(workers: Sequence[Any], is_silent: bool, remedy: str) -> str:
    """What became of a loader's processes."""
    if is_silent:
        names = ", ".join(str(worker.pid) for worker in workers)
        return f"process {names} gave nothing for {PATIENCE_S} seconds: was it stopped, or does the disk of the audio hang?"
    dead = [f"{worker.pid} ({_end(worker.exitcode)})" for worker in workers if not worker.is_alive()]
    return f"process {', '.join(dead)} ended; for want of memory perhaps: lower {remedy}"


def _end(code: int | None) -> str:
    try:
        return signal.Signals(-(code or 0)).name
    except ValueError:
        return f"exit status {code}"
