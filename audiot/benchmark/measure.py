"""Measuring calls side by side: their time, their peak memory, and why a call gave no result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from audiot.base.devices import free_memory, synchronise

MAX_CALLS = 1000  # of a very fast call in one round

Result = TypeVar("Result")


class MismatchError(Exception):
    """A call computes something else than it should, so it is not timed."""


@dataclass(frozen=True)
class Failed:
    """The reason why there is no result: `kind: details`, or the kind alone."""

    reason: str

    @property
    def broken(self) -> bool:
        """Whether something is wrong. A lack of memory, a refusal and a skipped length are results too."""
        return self.reason.startswith(("wrong", "failed"))


@dataclass(frozen=True)
class Measured:
    """Seconds per call in each round, and the bytes that a call allocated at its peak (None where they are not known)."""

    seconds: list[float]
    peak_bytes: int | None


def attempt(call: Callable[[], Result]) -> Result | Failed:
    """Run a call. Returns its result, or why there is none."""
    try:
        return call()
    except torch.OutOfMemoryError:
        failure = Failed("out of memory")
    except ValueError as error:
        failure = Failed(f"refused: {error}")
    except MismatchError as error:
        failure = Failed(f"wrong: {error}")
    except Exception as error:  # the table tells it, and the exit code at the end; the other measurements go on
        if "can't allocate memory" in str(error):  # the CPU's allocator
            failure = Failed("out of memory")
        else:
            failure = Failed(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    free_memory()  # not earlier: the error kept the tensors of its stack frames alive
    return failure


def time_of(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds per call, over `count` calls in a row.

    A GPU is timed by its own events, everything else by a monotonic clock. Calls queue up on a GPU as they do in training: a
    launch costs time only where the GPU would have to wait for it.
    """
    synchronise(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(count):
                call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1000 / count
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / count


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes allocated at the peak of a call, above those allocated before it. None unless the device is a CUDA device."""
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def as_graph(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph, whose kernels follow each other without waiting for the host to launch them."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries initialise at the first calls in a stream
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay


def measure(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    seconds: float,
    progress: Callable[[str, int], None] = lambda name, steps: None,
    graphs: bool = False,
) -> dict[str, Measured | Failed]:
    """Time several calls side by side, in rounds. Whatever slows the machine down for a while affects all of them alike.

    Args:
        calls: Calls by name.
        device: Device on which they compute.
        rounds: Number of rounds. In each round a call runs as many times in a row as fit into `seconds` / `rounds`, at least
            once.
        seconds: Time for each call in all rounds together, without the warm-up.
        progress: Function that is told the name of the next call and the steps done since it was last told. A call has
            `rounds` + 1 steps.
        graphs: Whether CUDA graphs of the calls are timed, see `as_graph`. Memory is always that of the call itself.

    Returns:
        What each call took, or why it did not run.
    """
    counts: dict[str, int] = {}
    timed: dict[str, Callable[[], object]] = {}
    results: dict[str, Measured | Failed] = {}
    for name, call in calls.items():
        progress(name, 0)
        warm = attempt(lambda call=call: _warm_up(call, device, graphs))  # type: ignore[misc]
        if isinstance(warm, Failed):
            results[name] = warm
            progress(name, rounds + 1)
        else:
            timed[name], duration, peak = warm
            counts[name] = min(MAX_CALLS, max(1, int(seconds / rounds / max(duration, 1e-9))))
            results[name] = Measured([], peak)
            progress(name, 1)
    for number in range(rounds):
        for name in list(counts) if number % 2 == 0 else list(reversed(counts)):
            progress(name, 0)
            taken = attempt(lambda name=name: time_of(timed[name], counts[name], device))  # type: ignore[misc]
            result = results[name]
            if isinstance(taken, Failed):
                results[name] = taken
                del counts[name], timed[name]
                progress(name, rounds - number)
            elif isinstance(result, Measured):
                result.seconds.append(taken)
                progress(name, 1)
    return results


def _warm_up(call: Callable[[], object], device: torch.device, graphs: bool) -> tuple[Callable[[], object], float, int | None]:
    """Run a call once, since the first call may compile, tune and allocate. Returns what to time, its seconds and its memory."""
    call()
    peak = peak_memory(call, device)
    timed = as_graph(call, device) if graphs else call
    return timed, time_of(timed, 1, device), peak


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Quantiles at 25%, 50% and 75%, interpolated between the values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
