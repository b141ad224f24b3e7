"""Measuring side by side. Nothing here depends on how long anything takes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import audiot.benchmark.measure
from audiot.benchmark.measure import Failed, Measured, MismatchError, as_graph, measure, peak_memory, time_of

CPU = torch.device("cpu")


class Clock:
    """Stands in for `time`: it moves when told to."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def taking(self, seconds):
        """A call that takes so long."""

        def call():
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(audiot.benchmark.measure, "time", clock)
    return clock


def test_time_of_is_the_mean_of_the_calls(clock):
    durations = iter([1.0, 2.0, 6.0])

    def call():
        clock.now += next(durations)

    assert time_of(call, 3, CPU) == 3.0


def test_calls_take_turns_and_run_as_often_as_the_time_allows(clock):
    order = []

    def named(name, call):
        def noted():
            order.append(name)
            call()

        return noted

    calls = {name: named(name, clock.taking(seconds)) for name, seconds in (("a", 1.0), ("b", 0.4), ("c", 9.0))}
    results = measure(calls, CPU, rounds=3, seconds=3.0)
    assert {name: result.seconds for name, result in results.items()} == {
        "a": pytest.approx([1.0] * 3),
        "b": pytest.approx([0.4] * 3),
        "c": pytest.approx([9.0] * 3),
    }
    assert [result.peak_bytes for result in results.values()] == [None] * 3  # not known on a CPU
    assert (
        "".join(order) == "aabbcc" + "abbc" + "cbba" + "abbc"
    )  # warm-up, then as many calls as fit into a second per round, at least one


def test_what_fails_is_told_with_its_reason_and_the_rest_is_measured(clock):
    raised = {
        "memory": torch.OutOfMemoryError("tried to allocate 3 GiB"),
        "cpu memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "refusal": ValueError("sequence has 9 frames but max_frames is 8"),
        "wrong": MismatchError("off by one"),
        "crash": RuntimeError("size mismatch\nin line 3"),
    }

    def failing(error):
        def call():
            raise error

        return call

    steps = []
    calls = {"before": clock.taking(1), **{name: failing(error) for name, error in raised.items()}, "after": clock.taking(2)}
    results = measure(calls, CPU, 2, 0.0, lambda name, done: steps.append(done))
    assert results["before"] == Measured([1, 1], None)
    assert results["after"] == Measured([2, 2], None)
    assert {name: results[name] for name in raised} == {
        "memory": Failed("out of memory"),
        "cpu memory": Failed("out of memory"),
        "refusal": Failed("refused: sequence has 9 frames but max_frames is 8"),
        "wrong": Failed("wrong: off by one"),
        "crash": Failed("failed: RuntimeError: size mismatch in line 3"),
    }
    assert sum(steps) == len(calls) * (2 + 1)


def test_what_fails_later_loses_its_place_only(clock):
    left = iter(range(3))

    def call():
        if next(left, None) is None:
            raise torch.OutOfMemoryError

    steps = []
    results = measure({"good": clock.taking(1), "bad": call}, CPU, 4, 0.0, lambda name, done: steps.append(done))
    assert results == {"good": Measured([1] * 4, None), "bad": Failed("out of memory")}
    assert sum(steps) == 2 * (4 + 1)


def test_a_gpu_is_timed_by_its_events_and_its_memory_counted_above_what_was_there(clock, monkeypatch):
    gpu = torch.device("cuda", 0)
    allocated = {"now": 100, "peak": 900}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)  # ms

    def call():
        clock.now += 2
        allocated["peak"] = max(allocated["peak"], allocated["now"] + 70)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(peak=allocated["now"]))
    assert time_of(call, 3, gpu) == 2
    assert peak_memory(call, gpu) == 70


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_computes_what_the_call_computes():
    result = torch.zeros(3, device="cuda")
    call = as_graph(lambda: result.add_(1), torch.device("cuda"))
    result.zero_()
    call()
    call()
    assert result.tolist() == [2, 2, 2]
