"""Timing the parts of steps that follow each other."""

from __future__ import annotations

import time
from typing import Any

import torch

from audiot.base.devices import synchronise


class Stopwatch:
    """Stopwatch for the parts of steps. A GPU is timed by its own events, which make nobody wait.

    Args:
        device: Device on which the steps are computed.
        last: Part that a step ends with.
    """

    def __init__(self, device: torch.device, last: str) -> None:
        self.device = device
        self.last = last
        self.marks: list[tuple[str | None, Any]] = []
        self.running = False

    def begin(self) -> None:
        """A step begins here. Marks count from now on."""
        self.running = True
        self._note(None)

    def stop(self) -> None:
        """Marks no longer count."""
        self.running = False

    def mark(self, part: str) -> None:
        """A part ends here. Parts of a step that have the same name add up."""
        if self.running:
            self._note(part)

    def _note(self, part: str | None) -> None:
        if self.device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
        else:
            synchronise(self.device)
            now = time.perf_counter()
        self.marks.append((part, now))

    def steps(self) -> list[dict[str, float]]:
        """Seconds of the parts of each step. Waits for the device."""
        synchronise(self.device)
        done: list[dict[str, float]] = []
        step: dict[str, float] = {}
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            if part is None:
                step = {}
                continue
            seconds = before.elapsed_time(now) / 1000 if self.device.type == "cuda" else now - before
            step[part] = step.get(part, 0.0) + seconds
            if part == self.last:
                done.append(step)
                step = {}
        return done
