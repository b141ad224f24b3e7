"""What a training step costs: its parts timed, its matrix products counted, and the tables and pictures of both."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from audiot.analysis.plots import plot_lengths, plot_roofline, plot_step_parts
from audiot.base.private import dispatch_mode
from audiot.benchmark import measure as benchmark
from audiot.benchmark.measure import markdown, milliseconds
from audiot.data.batches import Batch
from audiot.pretraining import MaskedAcousticModel
from audiot.training.callbacks import Throughput

BASELINE = "query_key"
SCOPES = ("inference", "encoder", "step", "program")
PARTS = ("data", "features", "masking", "forward", "backward", "optimiser", "other")
HOW = """\
Sequences of T frames of the encoder, B a batch, nothing padded; dropout: hidden/attention. frames/s count real spectrogram \
frames, `features.stack` to a frame of the encoder.

- inference: waveforms that are ready to the hidden states of all layers, by the encoder that `audiot.load_encoder` gives, \
weights in the precision of the run; no masks, no head.
- encoder: forward and backward of the encoder on features that are ready; the loss is the mean magnitude of its output.
- step: features, masking, encoder, head, L1, backward, clipping, optimiser on waveforms that are ready.
- program: prepared audio through the Trainer, with callbacks, loggers, a validation and a checkpoint. frames/s leave \
validation out, as the program's own figure does; wall has both in it, far more often than a recipe does.

ms: the median step; a GPU is timed by its own events, without waiting for it in between. MiB: the most that tensors took in \
a step, parameters and optimiser included, validation left out. First call: the first step, compilation included.

Where the step goes: between the device's own time marks. Masking is computed inside the loss: it is timed by itself and \
taken from forward, so what is fused there shows as too much masking and too little forward. data: the device waits for a \
batch; other: what else lies between two steps.

FLOPs: three times those of the matrix products in a forward pass (a backward pass has two for each; inference has none) of \
the encoder, and in step and program of the head on the frames that it may have to predict, counted by shape, fused attention \
as QKᵀ and AV. Softmax, norms, features and what a backward pass computes again are left out. A frame of the encoder with \
`query_key`, d wide, f in its feed-forward networks, of c channels: 6·(layers·(4·d² + 2·d·f) + c·d) + 12·T·d·layers; with \
`synthesizer_random` 6·(layers·(2·d² + 2·d·f) + c·d) + 6·T·d·layers; in inference a third of that.

FLOPs a byte (roofline): over the bytes that these products alone must move, each reading its operands and writing its \
result once in the precision of the run, fused attention as one product. The true traffic is larger, so a point's true place \
is further to the left. How far a point lies below the roof is what norms, dropout, GELU, softmax and all else between the \
products take, and what the products lose."""


class Stopwatch:
    """The parts of steps one after the other, timed on a GPU by its own events, which make nobody wait.

    Args:
        device: Where they are computed.
        last: The part that a step ends with.
    """

    def __init__(self, device: torch.device, last: str) -> None:
        self.device = device
        self.last = last
        self.marks: list[tuple[str | None, Any]] = []
        self.running = False

    def begin(self) -> None:
        """A step begins here; marks count from now on."""
        self.running = True
        self._note(None)

    def stop(self) -> None:
        """Marks count no more."""
        self.running = False

    def mark(self, part: str) -> None:
        """A part ends here. Parts of one name in a step add up."""
        if self.running:
            self._note(part)

    def _note(self, part: str | None) -> None:
        if self.device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
        else:
            benchmark.synchronise(self.device)
            now = time.perf_counter()
        self.marks.append((part, now))

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each step's parts; waits for the device."""
        benchmark.synchronise(self.device)
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


class ProgramClock(Callback):
    """Times `count` steps of a training after the first `first`, part by part, and takes the program's own meters.

    To be the first of the callbacks: a step ends before the others do their work.

    Args:
        throughput: Its totals start anew at the first step measured.
        first: Steps before.
        count: Steps measured.
        device: Where they are computed.
    """

    def __init__(self, throughput: Throughput, first: int, count: int, device: torch.device) -> None:
        self.throughput = throughput
        self.first = first
        self.count = count
        self.device = device
        self.watch = Stopwatch(device, "optimiser")
        self.interrupted = False
        self.begun = self.validation_begun = 0.0
        self.frames = 0
        self.wall_s = 0.0
        self.validation_s = 0.0
        self.compile_s = 0.0
        self.peak_bytes = 0

    def _now(self) -> float:
        benchmark.synchronise(self.device)
        return time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to the features, which are a part of their own; count memory, which a CUDA graph takes when it is recorded."""
        assert isinstance(pl_module, MaskedAcousticModel)
        pl_module.model.features.register_forward_pre_hook(lambda *_: self.watch.mark("between"))
        pl_module.model.features.register_forward_hook(lambda *_: self.watch.mark("features"))
        self._reset_peak()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is on its way to the device."""
        if batch_idx in (0, self.first):
            self.begun = self._now()
        if batch_idx == self.first:
            self.throughput.load_state_dict({"frames": 0, "seconds": 0.0})
            self.throughput.on_train_start(trainer, pl_module)
            self.watch.begin()
        self.watch.mark("between")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The loss is known."""
        self.watch.mark("forward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The gradients are known."""
        self.watch.mark("backward")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """The step is done."""
        if batch_idx == 0:
            self.compile_s = self._now() - self.begun
        if not self.watch.running:
            return
        self.watch.mark("optimiser")
        features = pl_module.model.features  # type: ignore[union-attr]
        self.frames += int((features.num_tokens(batch["lengths"]) * features.stack).sum())  # type: ignore[union-attr, operator]
        if batch_idx == self.first + self.count - 1:
            self.wall_s = self._now() - self.begun
            self._note_peak()
            self.watch.stop()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Neither its time nor its memory is that of steps."""
        self.interrupted = self.watch.running
        if self.interrupted:
            self._note_peak()
        self.watch.stop()
        self.validation_begun = self._now()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Steps go on."""
        self.validation_s = self._now() - self.validation_begun
        if self.interrupted:
            self._reset_peak()
            self.watch.begin()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _note_peak(self) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))


class Work(NamedTuple):
    """What the matrix products of a forward pass compute, and the tensor elements that they read and write."""

    flops: int
    elements: int

    def __add__(self, other: tuple[int, ...]) -> Work:  # type: ignore[override]
        return Work(self.flops + other[0], self.elements + other[1])


class Ceilings(NamedTuple):
    """What the device reaches: operations a second in a large matrix product, bytes a second in a large copy."""

    flops_per_s: float
    bytes_per_s: float
    size: int

    def __str__(self) -> str:
        return f"{self.flops_per_s / 1e12:.4g} TFLOP/s ({self.size}³ matrix product), {self.bytes_per_s / 1e9:.4g} GB/s (copy)"


@dataclass(frozen=True)
class Row:
    """One measurement: what was measured where, and the result, or in `note` why there is none."""

    model: str
    attention: str
    positions: str
    frames: int
    batch: int
    dropout: float
    attention_dropout: float
    scope: str
    compiled: bool
    precision: str
    median_ms: float | None = None
    q25_ms: float | None = None
    q75_ms: float | None = None
    frames_per_s: int | None = None
    wall_frames_per_s: int | None = None
    speedup: float | None = None
    tflops: float | None = None
    share_of_peak: float | None = None
    flops_per_byte: float | None = None
    peak_mib: int | None = None
    compile_s: float | None = None
    validation_s: float | None = None
    steps: int | None = None
    share_data: float | None = None
    share_features: float | None = None
    share_masking: float | None = None
    share_forward: float | None = None
    share_backward: float | None = None
    share_optimiser: float | None = None
    share_other: float | None = None
    note: str = ""

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it compares with other mechanisms."""
        return (self.model, self.frames, self.batch, self.dropout, self.attention_dropout, self.scope)

    @property
    def label(self) -> str:
        """`base query_key 32 × 1,472, dropout 0.1/0, step`."""
        size = f"{self.batch} × {self.frames:,}"
        return f"{self.model} {self.attention} {size}, dropout {self.dropout:g}/{self.attention_dropout:g}, {self.scope}"

    @property
    def shares(self) -> dict[str, float]:
        """Part of the step → its share; empty where there is none."""
        found = {part: getattr(self, f"share_{part}") for part in PARTS}
        return {part: share for part, share in found.items() if share is not None}

    def cells(self) -> dict[str, Any]:
        """A line of ``results.csv``: rounded, empty where there is no value."""
        values = asdict(self).items()
        return {name: "" if value is None else f"{value:.6g}" if isinstance(value, float) else value for name, value in values}


class _WholeAttention(TorchFunctionMode):
    """Takes fused attention for one product: it reads queries, keys and values and writes the result, no matrix of scores."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counted.elements
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.counted.elements = before + _elements([*args, *(kwargs or {}).values(), result])
        return result


class Counted:
    """Sums over matrix products: floating-point operations, by PyTorch's own formulas, and elements read and written."""

    def __init__(self) -> None:
        self.flops = 0
        self.elements = 0


def _counting(counted: Counted) -> Any:
    """A context in which matrix products are added to ``counted``."""

    class Products(dispatch_mode()):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in flop_registry:
                counted.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
                counted.elements += _elements([*args, result])
            return result

    return Products()


def _elements(values: Sequence[object]) -> int:
    return sum(value.numel() for value in values if isinstance(value, Tensor))


@torch.no_grad()
def products(module: nn.Module, *shape: int) -> Work:
    """What the matrix products of a forward pass for an input of `shape` compute and move: nothing is computed for it.

    Raises:
        RuntimeError: the module chooses what to compute by the values that it sees, or refuses tensors without values.
    """
    shell = copy.deepcopy(module).to("meta")
    # Without values fused attention is made of its two products, which the formulas know; on CPUs it is not.
    counted = Counted()
    with _counting(counted), _WholeAttention(counted):
        shell(torch.empty(shape, device="meta"))
    return Work(counted.flops, counted.elements)


def shares_of(steps: Sequence[Mapping[str, float]], masking_s: float, data_wait: float | None = None) -> dict[str, Any]:
    """Fields of a row: what share of the steps' time each part takes.

    Args:
        steps: Seconds of ``features``, ``forward``, ``backward``, ``optimiser``, and in the program ``between``.
        masking_s: Seconds of a step's masking, a part of ``forward``.
        data_wait: Share of the time in which the device waits for data, a part of ``between``.
    """
    seconds = {part: fmean(step.get(part, 0.0) for step in steps) for part in {part for step in steps for part in step}}
    total = sum(seconds.values())
    masking_s = min(masking_s, seconds["forward"])
    shares = {part: seconds[part] / total for part in ("features", "backward", "optimiser")}
    shares |= {"masking": masking_s / total, "forward": (seconds["forward"] - masking_s) / total}
    if data_wait is not None:
        between = seconds.get("between", 0.0) / total
        shares |= {"data": min(data_wait, between), "other": max(0.0, between - data_wait)}
    return {f"share_{part}": share for part, share in shares.items()}


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with its frames/s over those of ``query_key`` in the same place."""
    base = {row.place: row.frames_per_s for row in rows if row.attention == BASELINE and row.frames_per_s}
    return [
        replace(row, speedup=row.frames_per_s / base[row.place]) if row.frames_per_s and row.place in base else row
        for row in rows
    ]


def told(row: Row) -> str:
    """A result in a few words."""
    if row.median_ms is None or row.frames_per_s is None:
        return row.note
    words = [f"{milliseconds(row.median_ms)} ms", f"{row.frames_per_s:,} frames/s"]
    words += [f"{row.tflops:.3g} TFLOP/s ({row.share_of_peak:.0%} of the peak)"] if row.tflops and row.share_of_peak else []
    words += [f"{row.peak_mib:,} MiB"] if row.peak_mib is not None else []
    words += [f"first call {row.compile_s:.1f} s"] if row.compile_s is not None else []
    return ", ".join(words)


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of the main table."""
    measured = ["ms", "frames/s", "wall", f"× {BASELINE}", "TFLOP/s", "of peak", "MiB", "first call, s"]
    lines = [["model", "attention", "B × T", "dropout", "scope", *measured]]
    for row in rows:
        where = [f"{row.batch} × {row.frames:,}", f"{row.dropout:g}/{row.attention_dropout:g}", row.scope]
        figures: list[tuple[float | None, str]] = [
            (row.frames_per_s, ","),
            (row.wall_frames_per_s, ","),
            (row.speedup, ".2f"),
            (row.tflops, ".3g"),
            (row.share_of_peak, ".1%"),
            (row.peak_mib, ","),
            (row.compile_s, ".1f"),
        ]
        time_ms = row.note.split(":")[0] if row.median_ms is None else milliseconds(row.median_ms)
        told = ["" if value is None else f"{value:{form}}" for value, form in figures]
        lines.append([row.model, row.attention, *where, time_ms, *told])
    return lines


def shares_grid(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of the table of the step's parts; the header alone where no step was measured."""
    lines = [["", *PARTS]]
    for row in rows:
        if row.shares:
            lines.append([row.label, *(f"{row.shares[part]:.1%}" if part in row.shares else "" for part in PARTS)])
    return lines


def by_length(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Panel → mechanism → (T, value) of what was measured at three lengths or more: ms and MiB, both a 1,000 frames."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in sorted(rows, key=lambda row: row.frames):
        if row.frames_per_s is None:
            continue
        where = f"{row.model}, dropout {row.dropout:g}/{row.attention_dropout:g}, {row.scope}"
        values = {"ms": 1e6 / row.frames_per_s}
        values |= {"peak memory, MiB": 1000 * row.peak_mib / (row.batch * row.frames)} if row.peak_mib else {}
        for unit, value in values.items():
            panel = panels.setdefault(f"{where}: {unit} a 1,000 frames", {})
            panel.setdefault(row.attention, []).append((row.frames, value))
    return {
        title: lines for title, lines in panels.items() if len({length for line in lines.values() for length, _ in line}) >= 3
    }


def report(rows: Sequence[Row], ceilings: Ceilings, introduction: Sequence[str]) -> str:
    """All of it as Markdown, with how it was measured."""
    parts = [
        "# Pre-training",
        *introduction,
        f"Ceilings, measured in this run: {ceilings}, bytes read and written.",
        markdown(grid(rows)),
        "\n".join(f"- {row.label}: {row.note}" for row in rows if row.note),
        "## Where the step goes",
        markdown(shares_grid(rows)),
        "## How",
        HOW,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(rows: Sequence[Row], ceilings: Ceilings, title: str, folder: Path) -> list[str]:
    """Draw what there is; the pictures' names."""
    drawn = []
    bars = {
        row.label: {part: 1e7 / row.frames_per_s * share for part, share in row.shares.items()}
        for row in rows
        if row.shares and row.frames_per_s
    }
    if bars:
        plot_step_parts(bars, PARTS, title, folder / "steps.png")
        drawn.append("steps.png")
    points = [
        (row.label, row.attention, row.scope, row.flops_per_byte, row.tflops)
        for row in rows
        if row.scope != "program" and row.flops_per_byte and row.tflops
    ]
    if points:
        plot_roofline(points, ceilings.flops_per_s / 1e12, ceilings.bytes_per_s / 1e12, title, folder / "roofline.png")
        drawn.append("roofline.png")
    lines = by_length(rows)
    if lines:
        plot_lengths(lines, BASELINE, title, folder / "lengths.png")
        drawn.append("lengths.png")
    return drawn
