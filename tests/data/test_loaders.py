"""Loaders whose processes end, are stopped or hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
from faults import tries
from torch.utils.data import Dataset, get_worker_info

from audiot.data import loaders
from audiot.data.batches import _as_it_is, _place, _shared
from audiot.data.loaders import LoaderStoppedError, WatchedLoader, ignore_signals


class Numbers(Dataset):
    def __getitem__(self, index):
        return {"position": (0, index)}

    def __len__(self):
        return 10_000


class Shared(Numbers):
    """Batches whose memory the main process asks for by a message to the worker, as for all waveforms."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"waveforms": _shared(1, 100).fill_(index)}


class Slow(Numbers):
    def __getitem__(self, index):
        time.sleep(0.2)
        return super().__getitem__(index)


def watched(dataset, **options):
    options = {"batch_size": None, "collate_fn": _as_it_is, "num_workers": 1, "prefetch_factor": 4} | options
    return WatchedLoader(dataset, place=_place, remedy="data.num_workers", **options)


@pytest.mark.parametrize("attempt", tries())
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("dataset", [Numbers(), Shared()], ids=lambda dataset: type(dataset).__name__)
def test_a_worker_that_dies_or_stops_is_named(monkeypatch, dataset, number, attempt):
    monkeypatch.setattr(loaders, "PATIENCE_S", 2)
    monkeypatch.setattr(loaders, "LOOK_S", 1)
    others = set(multiprocessing.active_children())  # which earlier tests keep
    stream = iter(watched(dataset, timeout=1))
    handler = signal.getsignal(signal.SIGCHLD)
    assert next(stream)["position"] == (0, 0)
    (worker,) = set(multiprocessing.active_children()) - others
    for ignored in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, ignored)
    time.sleep(0.3)
    assert worker.is_alive()
    os.kill(worker.pid, number)
    what = "(SIGKILL) ended" if number == signal.SIGKILL else "gave nothing for 2 seconds"
    with pytest.raises(LoaderStoppedError) as stop:
        list(stream)
    assert f"process {worker.pid} {what}" in str(stop.value)
    assert "the loader of data stopped after batch " in str(stop.value)
    assert handler in (signal.SIG_DFL, None)
    worker.join(5)
    assert not worker.is_alive()


def test_a_worker_that_is_slow_but_gives_batches_is_left_alone(monkeypatch):
    monkeypatch.setattr(loaders, "PATIENCE_S", 2)
    monkeypatch.setattr(loaders, "LOOK_S", 0.1)
    stream = iter(watched(Slow(), timeout=1))
    assert [next(stream)["position"][1] for _ in range(15)] == [*range(15)]  # in three seconds


def test_time_in_which_no_batch_is_asked_for_does_not_count(monkeypatch):
    monkeypatch.setattr(loaders, "PATIENCE_S", 0.5)
    monkeypatch.setattr(loaders, "LOOK_S", 0.1)
    stream = iter(watched(Numbers(), timeout=1))
    first = next(stream)
    time.sleep(1.5)
    assert (first["position"], next(stream)["position"]) == ((0, 0), (0, 1))


def test_what_a_worker_tells_of_itself_is_raised_as_it_is_and_the_others_end_too():
    class Wrong(Numbers):
        def __getitem__(self, index):
            raise FileNotFoundError(f"no audio {index}")

    others = set(multiprocessing.active_children())
    stream = iter(watched(Wrong(), num_workers=2))
    workers = set(multiprocessing.active_children()) - others
    with pytest.raises(FileNotFoundError, match="no audio 0"):
        next(stream)
    for worker in workers:
        worker.join(5)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2


def noting_signals(worker):
    """Start of a worker that notes which signals it holds back before and after it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    os.kill(os.getpid(), signal.SIGTERM)  # reaches it before it has got so far
    ignore_signals(worker)
    after = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    get_worker_info().dataset.noted = [int(signal.SIGTERM in held) for held in (before, after)]


class Noted(Numbers):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"noted": self.noted}


def test_a_worker_is_not_ended_by_a_signal_that_comes_while_it_starts():
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stream = iter(watched(Noted(), worker_init_fn=noting_signals))
    assert next(stream)["noted"] == [1, 0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == held


KEPT = []


def keep_a_loader_open():
    KEPT.append(iter(watched(Numbers())))
    next(KEPT[-1])


def test_a_process_ends_though_its_loader_is_open():
    """As where an error ends a run. Python sends the workers SIGTERM, which they ignore, and would wait for them."""
    process = multiprocessing.get_context("fork").Process(target=keep_a_loader_open)
    process.start()
    process.join(30)
    ended = process.exitcode
    process.kill()
    assert ended == 0
