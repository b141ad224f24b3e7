"""Parts of steps, timed."""

from __future__ import annotations

import torch

import audiot.benchmark.stopwatch
from audiot.benchmark.stopwatch import Stopwatch


class Clock:
    def __init__(self, *times):
        self.times = iter(times)

    def perf_counter(self):
        return next(self.times)


def test_parts_of_a_name_add_up_and_what_lies_before_a_beginning_is_left_out(monkeypatch):
    watch = Stopwatch(torch.device("cpu"), "optimiser")
    monkeypatch.setattr(audiot.benchmark.stopwatch, "time", Clock(0, 1, 3, 6, 100, 104, 109, 110, 111, 120))
    watch.mark("early")  # not begun
    watch.begin()
    for part in ("forward", "backward", "optimiser"):
        watch.mark(part)
    watch.stop()
    watch.mark("between turns")
    watch.begin()
    for part in ("forward", "optimiser", "between", "between", "optimiser"):
        watch.mark(part)
    assert watch.steps() == [
        {"forward": 1, "backward": 2, "optimiser": 3},
        {"forward": 4, "optimiser": 5},
        {"between": 2, "optimiser": 9},
    ]
