"""Measuring speed and memory side by side, and the tables of what was measured.

What is measured is the affair of the caller (`audiot.benchmark.attention`): here it is a call without arguments.
"""

from __future__ import annotations

import csv
import gc
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from audiot.analysis.plots import plot_benchmark
from audiot.base import devices
from audiot.base.devices import synchronise as synchronise
from audiot.base.files import read_json, replacing
from audiot.base.tables import aligned as aligned
from audiot.base.tables import markdown as markdown
from audiot.data.text import rows as read_rows

MAX_CALLS = 1000  # in a round: of a mechanism that does next to nothing
MIN_ROUNDS = 3  # to compare: of fewer, the quartiles lie too close together or coincide
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")

Result = TypeVar("Result")


# Measuring


class MismatchError(Exception):
    """What is to be timed computes something else than it should."""


@dataclass(frozen=True)
class Failed:
    """Why there is no result: `kind: details`, or the kind alone."""

    reason: str

    @property
    def broken(self) -> bool:
        """Whether something is wrong; running out of memory, a refusal and what is skipped are results too."""
        return self.reason.startswith(("wrong", "failed"))


@dataclass(frozen=True)
class Measured:
    """Seconds a call in each round, and the bytes that a call allocated at its peak (None where that is not known)."""

    seconds: list[float]
    peak_bytes: int | None


def attempt(call: Callable[[], Result]) -> Result | Failed:
    """The result of a call, or why there is none."""
    try:
        return call()
    except torch.OutOfMemoryError:
        failure = Failed("out of memory")
    except ValueError as error:
        failure = Failed(f"refused: {error}")
    except MismatchError as error:
        failure = Failed(f"wrong: {error}")
    except Exception as error:  # told in the table, and at the end by the exit code; the other measurements go on
        if "can't allocate memory" in str(error):  # the CPU's allocator
            failure = Failed("out of memory")
        else:
            failure = Failed(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    free_memory()  # here, where the error no longer holds the tensors of its frames
    return failure


def free_memory() -> None:
    """Give GPU memory that nothing in use refers to back to the driver."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def time_of(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds a call, of `count` calls in a row: on a GPU by its own events, else by a monotonic clock.

    Calls queue up on a GPU as they do in training, so that launching them costs time only where the GPU would have to wait.
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
    """Bytes allocated at the peak of a call, above those allocated before it; None but on a CUDA device."""
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def as_graph(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph: replayed, its kernels follow each other without waiting for the host to launch them."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up at the first calls in a stream
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
    """Time several calls beside each other, in rounds: whatever slows the machine down for a while hits all alike.

    Args:
        calls: By name.
        device: Where they compute.
        rounds: Each call is timed once a round, as many times in a row as fit into `seconds` / `rounds`, at least once.
        seconds: Time for each of the calls in all, warm-up left out.
        progress: Told what comes next, and the steps done since it was last told; there are `rounds` + 1 a call.
        graphs: Time CUDA graphs of the calls, see `as_graph`. Memory is that of the call itself.

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
    """What to time, its seconds and peak memory after it has run: the first call may compile, tune and allocate."""
    call()
    peak = peak_memory(call, device)
    timed = as_graph(call, device) if graphs else call
    return timed, time_of(timed, 1, device), peak


# Results


class Panel(NamedTuple):
    """What the rows of one table share."""

    precision: str
    compiled: bool
    scope: str
    direction: str

    @property
    def title(self) -> str:
        """`layer, training, bf16, compiled`."""
        return f"{self.scope}, {self.direction}, {self.precision}" + (", compiled" if self.compiled else "")


@dataclass(frozen=True)
class Row:
    """One measurement: what was measured where, and the result, or in `note` why there is none."""

    mechanism: str
    scope: str
    direction: str
    length: int
    batch: int
    precision: str
    compiled: bool
    rounds: int | None = None
    median_ms: float | None = None
    q25_ms: float | None = None
    q75_ms: float | None = None
    speedup: float | None = None
    frames_per_s: float | None = None
    peak_mib: float | None = None
    parameters: int | None = None
    recall: float | None = None
    note: str = ""

    @property
    def panel(self) -> Panel:
        """The table that it belongs to."""
        return Panel(self.precision, self.compiled, self.scope, self.direction)


def rows_of(
    results: Mapping[str, Measured | Failed],
    baseline: str,
    panel: Panel,
    length: int,
    batch: int,
    real_frames: int,
    facts: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """Rows of what was measured side by side.

    Args:
        results: By mechanism.
        baseline: The mechanism that speed-ups compare with.
        panel: Where the rows belong.
        length: Frames a sequence.
        batch: Sequences.
        real_frames: Frames of the batch that are not padded.
        facts: More fields of a mechanism's row.
    """
    rows = []
    base = results[baseline]
    for name, result in results.items():
        where = {"mechanism": name, **panel._asdict(), "length": length, "batch": batch}
        if isinstance(result, Failed):
            rows.append(Row(**where, note=result.reason))
            continue
        low, middle, high = quartiles(result.seconds)
        rows.append(
            Row(
                **where,
                rounds=len(result.seconds),
                median_ms=1000 * middle,
                q25_ms=1000 * low,
                q75_ms=1000 * high,
                speedup=None if isinstance(base, Failed) else quartiles(base.seconds)[1] / middle,
                frames_per_s=real_frames / middle,
                peak_mib=None if result.peak_bytes is None else result.peak_bytes / 2**20,
                **facts.get(name, {}),
            )
        )
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25%, 50% and 75% quantiles, interpolated between the values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def find_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    return devices.find_device(name, f"benchmark.device={name} is not here")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _cpu_name() -> str:
    """As the kernel calls it, where it says so: Python knows the architecture only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line a measurement; empty where there is no value."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            values = asdict(row).values()
            writer.writerow(["" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in values])


def panels(rows: Sequence[Row]) -> dict[Panel, list[Row]]:
    """The rows of each table, in the order measured."""
    found: dict[Panel, list[Row]] = {}
    for row in rows:
        found.setdefault(row.panel, []).append(row)
    return found


def by_mechanism(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each mechanism of one table, from the shortest length to the longest."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.mechanism, []).append(row)
    return {name: sorted(own, key=lambda row: row.length) for name, own in found.items()}


# Comparing with an earlier run


class Results(NamedTuple):
    """A ``results.csv``: the line of each measurement by what was measured, and the column that is compared."""

    path: Path
    key: tuple[str, ...]
    figure: str
    lines: dict[tuple[str, ...], dict[str, str]]


def read_results(path: Path, key: Sequence[str], figure: str) -> Results:
    """Read a ``results.csv``.

    Args:
        path: The file.
        key: Columns that say what was measured.
        figure: The column that is compared.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it has other columns, or something else than numbers to compare.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results of a benchmark at {path}: expected the results.csv of an earlier run")
    lines = {}
    for number, line in read_rows(path, [*key, figure]):
        if line[figure] and not NUMBER.fullmatch(line[figure]):
            raise ValueError(f"{path}:{number}: {figure} must be a number, or nothing, found {line[figure][:40]!r}")
        lines[tuple(line[name] for name in key)] = line
    return Results(path, tuple(key), figure, lines)


def comparison(before: Results, now: Results) -> str:
    """Markdown: the figure of each measurement before and now, their ratio, and what only one of both has.

    Columns of the key that are alike in all stand above the table.
    """
    wheres = list(dict.fromkeys([*now.lines, *before.lines]))
    places = range(len(now.key))
    varied = [place for place in places if len({where[place] for where in wheres}) > 1]
    table = [[*(now.key[place] for place in varied), "before", "now", "now / before"]]
    missing: dict[str, list[str]] = {"Only before": [], "Only now": []}
    for where in wheres:
        names = [where[place] for place in varied]
        lines = [results.lines.get(where) for results in (before, now)]
        if None in lines:
            missing["Only before" if lines[0] else "Only now"].append(", ".join(names))
            continue
        one, other = (line[now.figure] for line in lines if line)
        told = [line[now.figure] or line.get("note", "") for line in lines if line]
        table.append([*names, *told, f"{float(other) / float(one):.3f}" if one and other and float(one) else ""])
    alike = [f"{now.key[place]} {wheres[0][place]}" for place in places if wheres and place not in varied]
    parts = [
        f"# {now.figure} beside an earlier run",
        f"- before: {before.path}{_device_of(before.path)}\n- now: {now.path}{_device_of(now.path)}",
        *(["In all: " + ", ".join(alike)] if alike else []),
        markdown(table) if len(table) > 1 else "No measurement is in both.",
        *(f"{title}:\n\n" + "\n".join(f"- {each}" for each in told) for title, told in missing.items() if told),
    ]
    return "\n\n".join(parts) + "\n"


def _device_of(results: Path) -> str:
    machine = results.with_name("machine.json")
    return f" ({read_json(machine, 'description of a machine')['device']})" if machine.is_file() else ""


# Where a mechanism passes the baseline


@dataclass(frozen=True)
class Standing:
    """How a mechanism compares with the baseline as the length grows.

    Args:
        crossings: Lengths at which it passes the baseline (True) or falls behind it (False).
        faster: Lengths measured at which it is faster, beyond the spread of the measurements.
        slower: Lengths at which it is slower likewise.
        level: Lengths at which neither can be said.
        few_rounds: Whether there were fewer than `MIN_ROUNDS`: the lengths are all level then.
    """

    crossings: tuple[tuple[float, bool], ...]
    faster: tuple[int, ...]
    slower: tuple[int, ...]
    level: tuple[int, ...]
    few_rounds: bool = False

    def sentence(self, name: str, baseline: str) -> str:
        """The comparison in words."""
        lengths = sorted((*self.faster, *self.slower, *self.level))
        if not lengths:
            return f"{name} was not measured"
        if self.few_rounds:
            return f"{name} and {baseline}: too few rounds to compare (at least {MIN_ROUNDS})"
        if self.crossings:
            words = [
                f"{'passes' if up else 'falls behind'} {baseline} at about T = {two_digits(at)}" for at, up in self.crossings
            ]
            return f"{name} {' and '.join(words)}"
        level = f"; level at T = {_listed(self.level)}" if self.level else ""
        if self.faster:
            return f"{name} is faster than {baseline} at T = {_listed(self.faster)}{level}"
        if self.slower:
            return f"{name} never passes {baseline} within the lengths measured ({_listed(lengths)}){level}"
        return f"{name} and {baseline} are level: they differ by less than the measurements spread"

    def words(self) -> str:
        """The comparison in a few words, for a legend."""
        if self.crossings:
            return ", ".join(f"{'faster' if up else 'slower'} from T ≈ {two_digits(at)}" for at, up in self.crossings)
        if self.faster:
            return "faster" if not self.level else f"faster at T = {_listed(self.faster)}"
        if self.few_rounds:
            return "too few rounds to compare"
        return "slower" if self.slower else "level" if self.level else "not measured"


def standing(own: Sequence[Row], baseline: Sequence[Row]) -> Standing:
    """Compare a mechanism's rows with the baseline's, both of one table.

    A length counts as faster or slower where the ranges between the quartiles, of `MIN_ROUNDS` at least, don't overlap. Between
    two lengths that differ in that, the crossing is where the speed-up is 1, its logarithm interpolated linearly in the
    logarithm of the length.
    """
    base = {row.length: row for row in baseline if row.median_ms is not None}
    pairs = [(row, base[row.length]) for row in sorted(own, key=lambda row: row.length) if row.median_ms and row.length in base]
    lengths = [row.length for row, _ in pairs]
    speedups = [_given(other.median_ms) / _given(row.median_ms) for row, other in pairs]
    few_rounds = any((each.rounds or 0) < MIN_ROUNDS for pair in pairs for each in pair)
    signs = [
        1 if _given(row.q75_ms) < _given(other.q25_ms) else -1 if _given(row.q25_ms) > _given(other.q75_ms) else 0
        for row, other in pairs
    ]
    if few_rounds:
        signs = [0] * len(signs)
    clear = [place for place, sign in enumerate(signs) if sign]
    return Standing(
        crossings=tuple(
            (crossing(lengths[one : other + 1], speedups[one : other + 1]), signs[other] > 0)
            for one, other in pairwise(clear)
            if signs[one] != signs[other]
        ),
        faster=tuple(lengths[place] for place in clear if signs[place] > 0),
        slower=tuple(lengths[place] for place in clear if signs[place] < 0),
        level=tuple(length for length, sign in zip(lengths, signs, strict=True) if not sign),
        few_rounds=few_rounds,
    )


def crossing(lengths: Sequence[int], speedups: Sequence[float]) -> float:
    """The length at which the speed-up, above 1 at one end and below 1 at the other, first becomes 1."""
    logs = [math.log(speedup) for speedup in speedups]
    for place, (one, other) in enumerate(pairwise(logs)):
        if (one > 0) != (other > 0):
            share = one / (one - other)
            return math.exp(math.log(lengths[place]) * (1 - share) + math.log(lengths[place + 1]) * share)
    raise ValueError(f"speed-ups {list(speedups)} do not pass 1")


# Tables


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of a table of times: mechanisms down, lengths across."""
    return _grid(rows, _time_cell)


def memory_grid(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of a table of peak memory; none where it was not measured."""
    if all(row.peak_mib is None for row in rows):
        return []
    return _grid(rows, lambda row: "" if row.peak_mib is None else f"{row.peak_mib:,.0f}")


def notes(rows: Sequence[Row]) -> list[str]:
    """Why there are no results, each reason once with the mechanism and the lengths it holds for."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.note:
            reasons.setdefault((row.mechanism, row.note), []).append(row.length)
    return [f"{name}, T = {_listed(sorted(set(lengths)))}: {note}" for (name, note), lengths in reasons.items()]


def sentences(rows: Sequence[Row], baseline: str) -> Iterator[str]:
    """How each mechanism of one table compares with the baseline."""
    own = by_mechanism(rows)
    for name in own:
        if name != baseline:
            yield standing(own[name], own[baseline]).sentence(name, baseline)


def _grid(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[list[str]]:
    lengths = sorted({row.length for row in rows})
    lines = [["mechanism", *(f"T={length:,}" for length in lengths)]]
    for name, own in by_mechanism(rows).items():
        cells = {row.length: cell(row) for row in own}
        lines.append([name, *(cells.get(length, "") for length in lengths)])
    return lines


def _time_cell(row: Row) -> str:
    if row.median_ms is None:
        return row.note.split(":")[0]
    details = [] if row.speedup is None else [f"×{row.speedup:.{2 if row.speedup < 10 else 1}f}"]
    details += [] if row.recall is None else [f"recall {row.recall:.2f}"]
    return milliseconds(row.median_ms) + (f" ({', '.join(details)})" if details else "")


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def two_digits(length: float) -> str:
    """An estimated length, as exact as it can be."""
    return f"{float(f'{length:.2g}'):,.0f}"


def _listed(lengths: Sequence[int]) -> str:
    return ", ".join(f"{length:,}" for length in lengths)


def _given(value: float | None) -> float:
    assert value is not None
    return value


# What is written of them


def report(rows: Sequence[Row], baseline: str, introduction: Sequence[str]) -> str:
    """All tables as Markdown, each with what follows from it."""
    parts = ["# Benchmark", *introduction]
    for panel, own in panels(rows).items():
        parts += [f"## {panel.title}, ms", markdown(grid(own)), "\n".join(f"- {line}" for line in sentences(own, baseline))]
        parts += ["\n".join(f"- {line}" for line in notes(own))] if notes(own) else []
        memory = memory_grid(own)
        parts += ["Peak memory above parameters and inputs, MiB:", markdown(memory)] if memory else []
    return "\n\n".join(parts) + "\n"


def draw(rows: Sequence[Row], baseline: str, title: str, folder: Path) -> list[str]:
    """Draw time a frame and memory against length, a picture for each precision, compiled or not; their names."""
    pictures: dict[tuple[str, bool], dict[Panel, list[Row]]] = {}
    for panel, own in panels(rows).items():
        pictures.setdefault(panel[:2], {})[panel] = own
    drawn = []
    for number, (kind, tables) in enumerate(pictures.items()):
        name = f"benchmark-{kind[0]}{'-compiled' if kind[1] else ''}.png" if number else "benchmark.png"
        axes = []
        for panel, own in tables.items():
            axes.append((panel.title, "µs a frame", _times(own, baseline)))
            if memory_grid(own):
                axes.append((panel.title, "peak memory, KiB a frame", _peaks(own)))
        axes = [axis for axis in axes if any(line["values"] for line in axis[2].values())]
        if axes:  # all may be refused, or out of memory
            plot_benchmark(axes, baseline, title, folder / name)
            drawn.append(name)
    return drawn


def _times(rows: Sequence[Row], baseline: str) -> dict[str, dict[str, Any]]:
    own = by_mechanism(rows)
    lines = {}
    for name, each in own.items():
        measured = [row for row in each if row.frames_per_s]
        against = standing(each, own[baseline])
        lines[name] = {
            "lengths": [row.length for row in measured],
            "values": [1e6 / _given(row.frames_per_s) for row in measured],
            "crossings": [at for at, _ in against.crossings],
            "label": name if name == baseline else f"{name}: {against.words()}",
        }
    return lines


def _peaks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    lines = {}
    for name, own in by_mechanism(rows).items():
        measured = [row for row in own if row.peak_mib]  # nothing at all can't be drawn
        frames = [row.batch * row.length for row in measured]
        values = [1024 * _given(row.peak_mib) / count for row, count in zip(measured, frames, strict=True)]
        lines[name] = {"lengths": [row.length for row in measured], "values": values, "crossings": [], "label": name}
    return lines
