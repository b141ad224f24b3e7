"""``audiot benchmark benchmark=training``: inference, the encoder alone, the whole step and the whole program of pre-training."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from audiot.base.console import say
from audiot.base.devices import free_memory, synchronise
from audiot.base.files import write_csv, write_text
from audiot.base.groups import options
from audiot.base.private import many_compilations
from audiot.base.quoting import quoted
from audiot.base.tables import aligned
from audiot.benchmark.entries import Entry, check_labels
from audiot.benchmark.measure import Failed, MismatchError, attempt, quartiles, time_of
from audiot.benchmark.products import Work, products
from audiot.benchmark.results import cells, refuse_broken
from audiot.benchmark.roofline import measure_ceilings, rates
from audiot.benchmark.settings import check_choices, check_counts, find_device
from audiot.benchmark.stopwatch import Stopwatch
from audiot.benchmark.training_calls import LAST_PART, PRECISIONS, Calls
from audiot.benchmark.training_config import Place, Recipe, places
from audiot.benchmark.training_program import ProgramClock, meter, run_program
from audiot.benchmark.training_report import draw, grid, markdown_report, told
from audiot.benchmark.training_results import SCOPES, Row, shares_of, with_speedups
from audiot.pretraining import MaskedAcousticModel, build
from audiot.training.float8 import FP8, check_float8
from audiot.training.trainer import make_trainer

WARM_UP = 2  # steps after the first one, which compiles


@dataclass
class Running:
    """A configuration that is being measured.

    Args:
        row: Its row, without results.
        call: Function that computes one step.
        watch: Stopwatch that the call tells of its parts.
        frames: Spectrogram frames per step.
        work: Matrix products of a forward pass, or why they are not counted.
        inside_s: Seconds of ``masking`` and ``targets`` per step.
        peak_mib: Peak memory.
        compile_s: Seconds of the first call.
    """

    row: Row
    call: Callable[[], Tensor]
    watch: Stopwatch
    frames: int
    work: Work | Failed
    inside_s: Mapping[str, float] = field(default_factory=dict)
    peak_mib: int | None = None
    compile_s: float | None = None


class TrainingBenchmark:
    """Pre-training in four scopes, each composed as ``audiot pretrain`` composes it.

    ``inference`` computes hidden states of waveforms that lie on the device, as an exported encoder does. ``encoder`` is forward
    and backward of the encoder alone: its features are ready, nothing is masked, and there is no head. ``step`` is a whole
    training step on waveforms that lie on the device. ``program`` takes prepared audio through the Trainer, with its callbacks
    and loggers, one validation and one checkpoint.

    Args:
        experiment: Name in `conf/experiment` that all configurations start from. None means the defaults.
        models: Names of `conf/model`, or mappings with the keys of `ModelEntry`.
        attentions: Names of `conf/attention`, mappings with the keys of `Entry`, or the words of `Entry.all_of`. Speed-ups are
            over ``query_key``.
        shapes: Mappings of ``frames`` (frames of the encoder per sequence) and ``batch`` (sequences per batch).
        dropouts: Mappings of ``hidden`` and ``attention``.
        scopes: Some of ``inference``, ``encoder``, ``step`` and ``program``.
        positions: Name of `conf/positions` for all, or ``own`` for the choice of each mechanism's file.
        precision: The Trainer's precision: ``32-true``, ``bf16-mixed``, or ``fp8``, which ``inference`` has not.
        compile: ``true``, ``false``, or ``auto``, which compiles on GPUs as training does.
        steps: Steps in a row, in all scopes but the program.
        rounds: Number of rounds. In each round all mechanisms take turns.
        program_steps: Steps of the program that are measured.
        warmup_steps: Steps of the program before those.
        utterances: Training utterances of demo speech, each as long as a crop. None means the corpus of `overrides`.
        overrides: More overrides of ``audiot pretrain``, for all configurations.
        device: ``auto``, ``cpu``, ``cuda``, …
        data_dir: Folder of the corpora.
        seed: Seed of the parameters and the inputs.

    Raises:
        ValueError: an unknown name or an impossible size.
    """

    key = tuple(each.name for each in fields(Row))[:10]
    figure = "frames_per_s"

    def __init__(
        self,
        experiment: str | None,
        models: Sequence[str | Mapping[str, Any]],
        attentions: Sequence[str | Mapping[str, Any]],
        shapes: Sequence[Mapping[str, int]],
        dropouts: Sequence[Mapping[str, float]],
        scopes: Sequence[str],
        positions: str,
        precision: str,
        compile: bool | str,
        steps: int,
        rounds: int,
        program_steps: int,
        warmup_steps: int,
        utterances: int | None,
        overrides: Sequence[str],
        device: str,
        data_dir: str,
        seed: int,
    ) -> None:
        check_counts(steps=steps, rounds=rounds, program_steps=program_steps, warmup_steps=warmup_steps)
        if utterances is not None:
            check_counts(utterances=utterances)
        if compile not in ("auto", True, False):
            raise ValueError(f"benchmark.compile={compile}: expected auto, true or false")
        if experiment is not None:
            check_choices("experiment", [experiment], options("experiment"))
        check_choices("positions", [positions], ["own", *options("positions")])
        check_choices("precision", [precision], list(PRECISIONS))
        check_choices("scopes", scopes, SCOPES)
        if not models or not attentions:
            raise ValueError(f"benchmark.{'attentions' if models else 'models'} is empty: nothing to measure")
        self.entries = Entry.all_of(attentions, "benchmark.attentions")
        check_labels(self.entries, "benchmark.attentions")
        self.places = list(places(models, shapes, dropouts, scopes))
        if not self.places:
            raise ValueError("benchmark.shapes or benchmark.dropouts is empty: nothing to measure")
        self.device = find_device(device)
        if precision == FP8:
            check_float8(self.device)
            if any("inference" in each for _, each in self.places):
                raise ValueError(f"benchmark.precision={FP8} is of training: leave inference out of benchmark.scopes")
        compiled = self.device.type == "cuda" if compile == "auto" else bool(compile)
        self.calls = Calls(self.device, precision, compiled, seed)
        self.recipe = Recipe(
            experiment=experiment,
            positions=positions,
            precision=precision,
            device=self.device,
            warmup_steps=warmup_steps,
            program_steps=program_steps,
            utterances=utterances,
            overrides=overrides,
            data_dir=data_dir,
            seed=seed,
        )
        self.steps = steps
        self.rounds = rounds
        self._inside: dict[tuple[Any, ...], dict[str, float]] = {}  # seconds

    def report(self, run: Path, machine: dict[str, Any]) -> None:
        """Measure. Write ``results.csv``, ``table.md`` and pictures, and print the table.

        Raises:
            ValueError: a measurement crashed. The error comes after all else is done.
        """
        self.ceilings = measure_ceilings(self.calls.noise, self.calls.dtype)
        machine["ceilings"] = self.ceilings._asdict()
        free_memory()
        say(f"peak    {self.ceilings}\n")
        rows: list[Row] = []
        for more in self.run(run):
            rows = with_speedups([*rows, *more])
            write_csv(run / "results.csv", map(cells, rows))  # each time, so that Ctrl-C leaves something behind
            for row in more:
                say(f"{row.label}: {told(row)}")
        write_text(run / "table.md", markdown_report(rows, self.ceilings, self._describe(machine)))
        say(f"\n{aligned(grid(rows))}\n")
        title = f"Pre-training, {self.calls.precision}{', compiled' if self.calls.compiled else ''}, {machine['device']}"
        plots = draw(rows, self.ceilings, title, run)
        say(f"run     {run}\nfiles   {', '.join(['table.md', 'results.csv', *plots, 'machine.json'])}")
        say(f"next:   {self._next_command(rows)}")
        refuse_broken(rows, run / "table.md")

    def run(self, folder: Path) -> Iterator[list[Row]]:
        """Measure. Yields the rows of one place and scope at a time. Runs of the program have temporary folders in `folder`."""
        for place, scopes in self.places:
            for scope in scopes:
                # All configurations are compiled through the same lines of code, more often than PyTorch allows by default.
                # What was compiled is forgotten: PyTorch would make sizes that have changed variable, where training has one.
                torch.compiler.reset()
                with many_compilations():
                    yield self._programs(place, folder) if scope == "program" else self._side_by_side(place, scope)

    # Inference, encoder and step

    def _side_by_side(self, place: Place, scope: str) -> list[Row]:
        """Measure all mechanisms in rounds. Whatever slows the machine down for a while affects all of them alike."""
        states = {entry.label: attempt(partial(self._prepared, entry, place, scope)) for entry in self.entries}
        for number in range(self.rounds):
            for label in list(states) if number % 2 == 0 else list(reversed(states)):
                running = states[label]
                if isinstance(running, Running):
                    failed = attempt(partial(self._round, running))
                    if isinstance(failed, Failed):
                        states[label] = failed
        rows = []
        for entry in self.entries:
            state = states.pop(entry.label)
            if isinstance(state, Failed):
                rows.append(replace(self._row(entry, place, scope), note=state.reason))
            else:
                finished = attempt(partial(self._finished, state))
                rows.append(replace(state.row, note=finished.reason) if isinstance(finished, Failed) else finished)
            del state
        free_memory()
        return rows

    def _prepared(self, entry: Entry, place: Place, scope: str) -> Running:
        """A configuration after its first steps, which compile, tune and allocate."""
        _check_length(entry, place)
        free_memory()
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if on_gpu else 0
        cfg, positions = self.recipe.config(entry, place, Path("unused"))
        pl.seed_everything(cfg.seed, verbose=False)
        module = build(cfg).train()
        work = attempt(partial(self._work, module, place, scope))
        module = module.to(self.device)
        watch = Stopwatch(self.device, LAST_PART[scope])
        if scope == "step":
            call = self.calls.step(module, place, watch, cfg.trainer)
        else:
            call = {"inference": self.calls.inference, "encoder": self.calls.encoder}[scope](module, place, watch)
        running = Running(self._row(entry, place, scope, positions), call, watch, _frames(module, place), work)
        begin = time.perf_counter()
        call()
        synchronise(self.device)
        running.compile_s = time.perf_counter() - begin
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(WARM_UP):  # CUDA graphs are recorded here, and take their memory
            call()
        if on_gpu:
            synchronise(self.device)
            running.peak_mib = round((torch.cuda.max_memory_allocated(self.device) - before) / 2**20)
        if scope == "step":
            running.inside_s = self._inside_s(module, place)
        return running

    def _round(self, running: Running) -> None:
        running.call()  # not timed, since the device would have to wait for its launch
        running.watch.begin()
        for _ in range(self.steps):
            running.call()
        running.watch.stop()

    def _finished(self, running: Running) -> Row:
        steps = running.watch.steps()
        loss = running.call().item()
        if not math.isfinite(loss):
            raise MismatchError(f"its loss is {loss}")
        row = replace(running.row, peak_mib=running.peak_mib, compile_s=running.compile_s)
        row = self._with_times(row, steps, running.frames, running.work)
        return replace(row, **shares_of(steps, running.inside_s)) if row.scope == "step" else row

    # The program

    def _programs(self, place: Place, folder: Path) -> list[Row]:
        rows = []
        for entry in self.entries:
            torch.compiler.reset()
            measured = attempt(partial(self._program, entry, place, folder))
            row = self._row(entry, place, "program")
            rows.append(replace(row, note=measured.reason) if isinstance(measured, Failed) else measured)
            free_memory()
        return rows

    def _program(self, entry: Entry, place: Place, folder: Path) -> Row:
        _check_length(entry, place)
        with tempfile.TemporaryDirectory(prefix="program-", dir=folder) as run_dir:
            cfg, positions = self.recipe.config(entry, place, Path(run_dir))
            pl.seed_everything(cfg.seed, verbose=False)
            trainer = make_trainer(cfg)
            module = build(cfg)
            work = attempt(partial(self._work, module, place, "program"))
            clock = ProgramClock(meter(trainer), self.recipe.warmup_steps, self.recipe.program_steps, self.device)
            run_program(module, trainer, cfg, place.frames, self.calls.compiled, clock)
        steps = clock.watch.steps()
        inside_s = self._inside_s(module.to(self.device), place)
        row = replace(
            self._row(entry, place, "program", positions),
            wall_frames_per_s=round(clock.frames / clock.wall_s),
            peak_mib=round(clock.peak_bytes / 2**20) if self.device.type == "cuda" else None,
            compile_s=clock.compile_s,
            validation_s=clock.validation_s,
            **shares_of(steps, inside_s, clock.throughput.data_wait),
        )
        return self._with_times(row, steps, _frames(module, place), work)

    # What both have in common

    def _row(self, entry: Entry, place: Place, scope: str, positions: str = "") -> Row:
        """A row without results."""
        where = {name: value for name, value in vars(place).items() if name != "model"}
        how: dict[str, Any] = {"scope": scope, "compiled": self.calls.compiled, "precision": self.calls.precision}
        return Row(place.model.name, entry.label, positions or self.recipe.positions, **where, **how)

    def _with_times(self, row: Row, steps: Sequence[Mapping[str, float]], frames: int, work: Work | Failed) -> Row:
        """A row with the times of its steps and what follows from them.

        Args:
            row: The row.
            steps: Seconds of the parts of each step.
            frames: Spectrogram frames per step.
            work: Matrix products of a forward pass, or why they are not counted.
        """
        low, middle, high = quartiles([sum(step.values()) for step in steps])
        row = replace(row, median_ms=1000 * middle, q25_ms=1000 * low, q75_ms=1000 * high)
        row = replace(row, frames_per_s=round(frames / middle), steps=len(steps))
        if isinstance(work, Failed):
            return replace(row, note=f"matrix products not counted ({work.reason})")
        passes = 1 if row.scope == "inference" else 3
        return replace(row, **rates(work, passes, middle, self.calls.dtype, self.ceilings))

    def _work(self, module: MaskedAcousticModel, place: Place, scope: str) -> Work:
        """Matrix products of a forward pass: those of the encoder, and in a step those of the head on the frames to predict."""
        work = products(module.model.encoder, place.batch, place.frames, module.model.features.embed_dim)
        if scope in ("inference", "encoder"):
            return work
        objective: Any = module.objective
        return work + products(objective.head, place.batch, objective.predicted(place.frames), module.model.encoder.embed_dim)

    def _inside_s(self, module: MaskedAcousticModel, place: Place) -> dict[str, float]:
        """Seconds of masking and of targets per step, measured once per model and shape."""
        where = (place.model.name, place.model.overrides, place.frames, place.batch)
        if where not in self._inside:
            self._inside[where] = {}
            for part, call in (("masking", self.calls.masking(module, place)), ("targets", self.calls.targets(module, place))):
                time_of(call, 1 + WARM_UP, self.device)
                self._inside[where][part] = median(time_of(call, self.steps, self.device) for _ in range(self.rounds))
        return self._inside[where]

    # What is told of it

    def _describe(self, machine: Mapping[str, Any]) -> list[str]:
        """What was measured and how, for the reader of the table."""
        recipe = self.recipe
        given = f"`experiment={recipe.experiment}`" if recipe.experiment else "the defaults"
        speech = "" if recipe.utterances is None else f" of {recipe.utterances} utterances of demo speech"
        return [
            f"{machine['device']}, {machine['threads']} CPU threads, PyTorch {machine['torch']}, {recipe.precision}"
            f"{', compiled' if self.calls.compiled else ''}, seed {recipe.seed}; `audiot pretrain` with {given}"
            f"{''.join(f' `{override}`' for override in recipe.overrides)}.",
            f"{self.rounds} rounds of {self.steps} steps in a row, in which all mechanisms take turns; "
            f"program: {recipe.program_steps} steps{speech}, after {recipe.warmup_steps}.",
            f"`{machine['command']}`",
        ]

    def _next_command(self, rows: Sequence[Row]) -> str:
        """How to pre-train with the fastest configuration."""
        measured = [row for row in rows if row.frames_per_s]
        if not measured:
            return "audiot benchmark --help"
        best = max(measured, key=lambda row: (SCOPES.index(row.scope), row.frames_per_s or 0))
        (entry,) = (entry for entry in self.entries if entry.label == best.attention)
        return " ".join(["audiot pretrain", *map(quoted, self.recipe.choices(best.model, entry))])


def _check_length(entry: Entry, place: Place) -> None:
    """Raise ValueError if sequences are longer than an entry allows."""
    if entry.max_length is not None and place.frames > entry.max_length:
        raise ValueError(f"longer than max_length {entry.max_length:,}")


def _frames(module: MaskedAcousticModel, place: Place) -> int:
    """Spectrogram frames per step."""
    return place.batch * place.frames * module.model.features.stack
