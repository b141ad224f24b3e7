"""``audiot benchmark benchmark=training``: inference, the encoder alone, the whole step, the whole program of pre-training."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from audiot.attention.mechanism import check_type
from audiot.base.console import say
from audiot.base.files import replacing, write_csv
from audiot.base.groups import options
from audiot.base.private import many_compilations
from audiot.base.quoting import argument
from audiot.base.streams import key
from audiot.benchmark import costs
from audiot.benchmark import measure as benchmark
from audiot.benchmark.attention import Entry, check_choices
from audiot.benchmark.costs import SCOPES, Ceilings, ProgramClock, Row, Stopwatch, Work
from audiot.benchmark.measure import Failed, MismatchError, attempt, quartiles
from audiot.data.batches import Batch, crop_lengths
from audiot.data.opening import open_corpus
from audiot.features import Features
from audiot.pretraining import MaskedAcousticModel, build, open_data
from audiot.runs import Interrupted
from audiot.training.callbacks import Throughput
from audiot.training.optimization import configure
from audiot.training.trainer import make_trainer, wants_graphs

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
WARM_UP = 2  # steps after the first, which compiles
NUM_SPEAKERS = 16  # of the demo speech


@dataclass(frozen=True)
class ModelEntry:
    """A model to measure: a name of `conf/model`, with what else it alone has; None: what all have."""

    name: str
    overrides: tuple[str, ...] = ()
    shapes: Any = None
    dropouts: Any = None
    scopes: Any = None

    @classmethod
    def of(cls, config: str | Mapping[str, Any]) -> ModelEntry:
        """An entry of the config: a name, or a mapping with some of these keys."""
        given = {"name": config} if isinstance(config, str) else config
        known = [each.name for each in fields(cls)]
        if not isinstance(given, Mapping) or "name" not in given or not set(given) <= set(known):
            raise ValueError(f"benchmark.models: {config!r} is neither a name nor a mapping with name, {', '.join(known[1:])}")
        check_choices("models", [given["name"]], options("model"))
        return cls(**{**given, "overrides": tuple(given.get("overrides") or ())})


@dataclass(frozen=True)
class Place:
    """A model, the size of its batches, and its dropout: there, attention mechanisms are measured side by side.

    Args:
        frames: T, frames that the encoder sees of a sequence.
        batch: B, sequences.
    """

    model: ModelEntry
    frames: int
    batch: int
    dropout: float
    attention_dropout: float


@dataclass
class Running:
    """A configuration that is being measured: a call is a step."""

    row: Row
    call: Callable[[], Tensor]
    watch: Stopwatch
    frames: int
    work: Work | None
    masking_s: float = 0.0
    peak_mib: int | None = None
    compile_s: float | None = None
    notes: list[str] = field(default_factory=list)


class TrainingBenchmark:
    """Pre-training in four scopes, each composed as ``audiot pretrain`` composes it.

    ``inference``: hidden states of waveforms that are ready on the device, as an exported encoder computes them. ``encoder``:
    forward and backward of the encoder alone, features ready, nothing masked, no head. ``step``: all of a training step, the
    waveforms ready on the device. ``program``: prepared audio through the Trainer with its callbacks and loggers, a validation
    and a checkpoint on the way.

    Args:
        experiment: Of `conf/experiment`, which all configurations start from; None: the defaults.
        models: Names of `conf/model`, or mappings with the keys of `ModelEntry`.
        attentions: Names of `conf/attention`, mappings with the keys of `Entry`, or the words of `Entry.all_of`; speed-ups are
            over ``query_key``.
        shapes: Mappings of ``frames`` (of the encoder, a sequence) and ``batch`` (sequences).
        dropouts: Mappings of ``hidden`` and ``attention``.
        scopes: Of ``inference``, ``encoder``, ``step``, ``program``.
        positions: A name of `conf/positions` for all, or ``own``: what each mechanism's file chooses.
        precision: The Trainer's: ``32-true`` or ``bf16-mixed``.
        compile: ``true``, ``false``, or ``auto``: on GPUs, as in training.
        steps: Steps in a row, of all but the program.
        rounds: Times so many; in each, all mechanisms take turns.
        program_steps: Steps of the program.
        warmup_steps: Steps of the program before those.
        utterances: Training utterances of demo speech, made as long as the longest crop; None: the corpus of `overrides`.
        overrides: More overrides of ``audiot pretrain``, for all.
        device: ``auto``, ``cpu``, ``cuda``, …
        data_dir: Where corpora are.
        seed: Of parameters and inputs.

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
        counts = {"steps": steps, "rounds": rounds, "program_steps": program_steps, "warmup_steps": warmup_steps}
        if utterances is not None:
            counts["utterances"] = utterances
        for name, count in counts.items():
            check_type(int, **{f"benchmark.{name}": count})
            if count < 1:
                raise ValueError(f"benchmark.{name} must be at least 1, found {count}")
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
        labels = [entry.label for entry in self.entries]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"benchmark.attentions: {labels.count(label)} entries are called {label!r}: give each a label")
        self.experiment = experiment
        self.places: list[tuple[Place, Sequence[str]]] = []
        for model in map(ModelEntry.of, models):
            check_choices("scopes", model.scopes or scopes, SCOPES)
            for shape in model.shapes or shapes:
                frames, batch = _numbers("shapes", shape, ("frames", "batch"), int, 1)
                for dropout in model.dropouts or dropouts:
                    hidden, attention = _numbers("dropouts", dropout, ("hidden", "attention"), float, 0)
                    self.places.append((Place(model, int(frames), int(batch), hidden, attention), model.scopes or scopes))
        if not self.places:
            raise ValueError("benchmark.shapes or benchmark.dropouts is empty: nothing to measure")
        self.positions = positions
        self.precision = precision
        self.steps = steps
        self.rounds = rounds
        self.program_steps = program_steps
        self.warmup_steps = warmup_steps
        self.utterances = utterances
        self.overrides = list(overrides)
        self.device = benchmark.find_device(device)
        self.compiled = self.device.type == "cuda" if compile == "auto" else bool(compile)
        self.data_dir = data_dir
        self.seed = seed
        self._masking: dict[tuple[Any, ...], float] = {}  # seconds

    def report(self, run: Path, machine: dict[str, Any]) -> None:
        """Measure; write ``results.csv``, ``table.md`` and plots; print the table.

        Raises:
            ValueError: a measurement crashed; told after all else is done.
        """
        self.ceilings = self._ceilings()
        machine["ceilings"] = self.ceilings._asdict()
        benchmark.free_memory()
        say(f"peak    {self.ceilings}\n")
        rows: list[Row] = []
        for more in self.run(run):
            rows = costs.with_speedups([*rows, *more])
            write_csv(run / "results.csv", [row.cells() for row in rows])  # now, for Ctrl-C to leave something behind
            for row in more:
                say(f"{row.label}: {costs.told(row)}")
        with replacing(run / "table.md") as temporary:
            temporary.write_text(costs.report(rows, self.ceilings, self._describe(machine)), encoding="utf-8")
        say(f"\n{benchmark.aligned(costs.grid(rows))}\n")
        title = f"Pre-training, {self.precision}{', compiled' if self.compiled else ''}, {machine['device']}"
        plots = costs.draw(rows, self.ceilings, title, run)
        say(f"run     {run}\nfiles   {', '.join(['table.md', 'results.csv', *plots, 'machine.json'])}")
        say(f"next:   {self._next_command(rows)}")
        broken = [row for row in rows if row.median_ms is None and Failed(row.note).broken]
        if broken:
            first = f"{broken[0].label}: {broken[0].note}"
            raise ValueError(f"{len(broken)} of {len(rows)} measurements failed, see {run / 'table.md'}; the first: {first}")

    def run(self, folder: Path) -> Iterator[list[Row]]:
        """Measure; the rows of one place and scope at a time. Runs of the program have their folders in `folder`, for a while."""
        for place, scopes in self.places:
            for scope in scopes:
                # All configurations are compiled through the same lines of code, more of them than PyTorch expects. Afresh in
                # each place: PyTorch would make sizes variable that have changed, where training meets one.
                torch.compiler.reset()
                with many_compilations():
                    yield self._programs(place, folder) if scope == "program" else self._side_by_side(place, scope)

    # Inference, encoder and step

    def _side_by_side(self, place: Place, scope: str) -> list[Row]:
        """Measure all mechanisms in rounds: whatever slows the machine down for a while hits all alike."""
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
        benchmark.free_memory()
        return rows

    def _row(self, entry: Entry, place: Place, scope: str, positions: str = "") -> Row:
        where = {name: value for name, value in vars(place).items() if name != "model"}
        how: dict[str, Any] = {"scope": scope, "compiled": self.compiled, "precision": self.precision}
        return Row(place.model.name, entry.label, positions or self.positions, **where, **how)

    def _prepared(self, entry: Entry, place: Place, scope: str) -> Running:
        """A configuration whose step has run: the first time compiles, tunes and allocates."""
        if entry.max_length is not None and place.frames > entry.max_length:
            raise ValueError(f"longer than max_length {entry.max_length:,}")
        benchmark.free_memory()
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if on_gpu else 0
        cfg, positions = self._config(entry, place, Path("unused"))
        pl.seed_everything(self.seed, verbose=False)
        module = build(cfg).train()
        work = attempt(partial(self._work, module, place, scope))
        module = module.to(self.device)
        watch = Stopwatch(self.device, {"inference": "forward", "encoder": "backward", "step": "optimiser"}[scope])
        if scope == "step":
            call = self._step(module, cfg, place, watch)
        else:
            call = {"inference": self._inference, "encoder": self._encoder}[scope](module, place, watch)
        row = self._row(entry, place, scope, positions)
        frames = place.batch * place.frames * module.model.features.stack
        running = Running(row, call, watch, frames, None if isinstance(work, Failed) else work)
        if isinstance(work, Failed):
            running.notes.append(f"matrix products not counted ({work.reason})")
        begin = time.perf_counter()
        call()
        benchmark.synchronise(self.device)
        running.compile_s = time.perf_counter() - begin
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(WARM_UP):  # in which CUDA graphs are recorded, and take their memory
            call()
        if on_gpu:
            benchmark.synchronise(self.device)
            running.peak_mib = round((torch.cuda.max_memory_allocated(self.device) - before) / 2**20)
        if scope == "step":
            running.masking_s = self._masking_s(module, place)
        return running

    def _inference(self, module: MaskedAcousticModel, place: Place, watch: Stopwatch) -> Callable[[], Tensor]:
        model = module.model.eval().to(PRECISIONS[self.precision])
        batch = self._batch(model.features, place)
        if self.compiled:
            model.compile()

        def call() -> Tensor:
            with torch.no_grad():
                hidden, _ = model(batch["waveforms"], batch["lengths"])
            watch.mark("forward")
            return hidden[-1, :, 0].float().abs().mean()

        return call

    def _encoder(self, module: MaskedAcousticModel, place: Place, watch: Stopwatch) -> Callable[[], Tensor]:
        encoder = module.model.encoder
        tokens = self._noise(place.batch, place.frames, module.model.features.output_dim)

        def forward(tokens: Tensor) -> Tensor:
            return encoder(tokens)[-1].float().abs().mean()

        compiled = torch.compile(forward) if self.compiled else forward

        def call() -> Tensor:
            with self._autocast():
                loss = compiled(tokens)
            watch.mark("forward")
            encoder.zero_grad(set_to_none=True)
            loss.backward()
            watch.mark("backward")
            return loss.detach()

        return call

    def _step(self, module: MaskedAcousticModel, cfg: DictConfig, place: Place, watch: Stopwatch) -> Callable[[], Tensor]:
        settings = module.hparams
        optimizer, schedule = (instantiate(settings[name]) for name in ("optimizer", "scheduler"))
        configured = configure(module, optimizer, schedule, settings["optimizer"].get("weight_decay", 0.0), cfg.trainer.max_steps)
        optimiser, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        batch = self._batch(module.model.features, place)
        if self.compiled:
            module.compile_step(graphs=self.device.type == "cuda")

        def call() -> Tensor:
            module.on_train_batch_start(batch, 0)
            with self._autocast():
                tokens, lengths, valid = module._features(batch)
                watch.mark("features")
                loss = module.step_loss(tokens, lengths, batch["keys"], valid).value
            watch.mark("forward")
            optimiser.zero_grad()
            loss.backward()
            watch.mark("backward")
            if cfg.trainer.gradient_clip_val:
                nn.utils.clip_grad_norm_(module.parameters(), cfg.trainer.gradient_clip_val)
            optimiser.step()
            scheduler.step()
            watch.mark("optimiser")
            return loss.detach()

        return call

    def _batch(self, features: Features, place: Place) -> Batch:
        """Noise, as the data module would hand it over."""
        num_samples = features.num_samples(place.frames)
        return {
            "waveforms": 0.1 * self._noise(place.batch, num_samples),
            "lengths": torch.full((place.batch,), num_samples),
            "keys": torch.tensor([key("benchmark", self.seed, number) for number in range(place.batch)], device=self.device),
            "ids": [str(number) for number in range(place.batch)],
            "position": (0, 0),
        }

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator(self.device).manual_seed(self.seed), device=self.device)

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.precision == "32-true" else torch.autocast(self.device.type, PRECISIONS[self.precision])

    def _round(self, running: Running) -> None:
        running.call()  # whose launch the device would have to wait for
        running.watch.begin()
        for _ in range(self.steps):
            running.call()
        running.watch.stop()

    def _finished(self, running: Running) -> Row:
        steps = running.watch.steps()
        loss = running.call().item()
        if not math.isfinite(loss):
            raise MismatchError(f"its loss is {loss}")
        low, middle, high = quartiles([sum(step.values()) for step in steps])
        row = replace(
            running.row,
            **_milliseconds(low, middle, high),
            frames_per_s=round(running.frames / middle),
            peak_mib=running.peak_mib,
            compile_s=running.compile_s,
            steps=len(steps),
            **self._rates(running.work, running.frames / middle, running.frames, running.row.scope),
            note="; ".join(running.notes),
        )
        return replace(row, **costs.shares_of(steps, running.masking_s)) if row.scope == "step" else row

    # The program

    def _programs(self, place: Place, folder: Path) -> list[Row]:
        rows = []
        for entry in self.entries:
            torch.compiler.reset()
            measured = attempt(partial(self._program, entry, place, folder))
            row = self._row(entry, place, "program")
            rows.append(replace(row, note=measured.reason) if isinstance(measured, Failed) else measured)
            benchmark.free_memory()
        return rows

    def _program(self, entry: Entry, place: Place, folder: Path) -> Row:
        if entry.max_length is not None and place.frames > entry.max_length:
            raise ValueError(f"longer than max_length {entry.max_length:,}")
        with tempfile.TemporaryDirectory(prefix="program-", dir=folder) as run_dir:
            cfg, positions = self._config(entry, place, Path(run_dir))
            pl.seed_everything(cfg.seed, verbose=False)
            trainer = make_trainer(cfg)
            module = build(cfg)
            work = attempt(partial(self._work, module, place, "step"))
            corpus = open_corpus(cfg)
            lengths = crop_lengths(module.model.features, cfg.data.crop_s, cfg.data.num_lengths)
            given = module.model.features.num_samples(place.frames)
            if lengths is not None and lengths[-1] != given:
                cropped = module.model.features.num_tokens(lengths[-1])
                raise ValueError(f"the program crops to {cropped} frames: set that, a multiple of 64 (of 8 below 512)")
            data = open_data(cfg, module, corpus)
            if self.compiled:
                module.compile_step(graphs=wants_graphs(trainer))
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            throughput = next(callback for callback in callbacks if isinstance(callback, Throughput))
            clock = ProgramClock(throughput, self.warmup_steps, self.program_steps, self.device)
            callbacks.insert(0, clock)
            try:
                trainer.fit(module, data)
            except Interrupted as stop:  # whose checkpoint goes away with the folder
                raise KeyboardInterrupt from stop
        steps = clock.watch.steps()
        masking_s = self._masking_s(module.to(self.device), place)
        low, middle, high = quartiles([sum(step.values()) for step in steps])
        frames = place.batch * place.frames * module.model.features.stack
        return replace(
            self._row(entry, place, "program", positions),
            **_milliseconds(low, middle, high),
            frames_per_s=round(frames / middle),
            wall_frames_per_s=round(clock.frames / clock.wall_s),
            peak_mib=round(clock.peak_bytes / 2**20) if self.device.type == "cuda" else None,
            compile_s=clock.compile_s,
            validation_s=clock.validation_s,
            steps=self.program_steps,
            **self._rates(None if isinstance(work, Failed) else work, frames / middle, frames, "program"),
            **costs.shares_of(steps, masking_s, throughput.data_wait),
            note=f"matrix products not counted ({work.reason})" if isinstance(work, Failed) else "",
        )

    # Configurations

    def _config(self, entry: Entry, place: Place, folder: Path) -> tuple[DictConfig, str]:
        """The config of ``audiot pretrain``, and the name of its positions."""
        chosen = [] if self.experiment is None else [f"experiment={self.experiment}"]
        chosen += [f"model={place.model.name}", f"attention={entry.name}"]
        chosen += [] if self.positions == "own" else [f"positions={self.positions}"]
        chosen += [] if self.utterances is None else ["data=demo"]
        chosen += [f"run_dir={folder}", f"data_dir={self.data_dir}", f"seed={self.seed}", "probe=false"]
        chosen += [f"attention.{name}={value}" for name, value in entry.overrides.items()]
        chosen += [f"model.dropout={place.dropout}", f"attention.dropout={place.attention_dropout}"]
        chosen += [*self.overrides, *place.model.overrides]
        features: Features = instantiate(compose("pretrain", chosen).features)
        crop_s = features.num_samples(place.frames) / features.sample_rate
        middle = self.warmup_steps + self.program_steps // 2  # where it validates and saves, once
        index = self.device.index
        chosen += [
            f"data.crop_s={crop_s}",
            f"data.batch_s={crop_s * place.batch}",
            f"data.max_utterances={place.batch}",
            f"trainer.precision={self.precision}",
            f"trainer.accelerator={'gpu' if self.device.type == 'cuda' else self.device.type}",
            f"trainer.devices={1 if index is None or self.device.type != 'cuda' else [index]}",
            "trainer.strategy=auto",
            "trainer.num_nodes=1",
            "trainer.accumulate_grad_batches=1",
            f"trainer.max_steps={self.warmup_steps + self.program_steps}",
            f"trainer.val_check_interval={middle}",
            f"checkpoint.every_n_steps={middle}",
        ]
        if self.utterances is not None:
            chosen += [
                f"data.name=demo-{place.frames}x{features.hop_length * features.stack}",
                f"data.utterance_s={crop_s}",
                f"data.num_speakers={NUM_SPEAKERS}",
                f"data.corpus.train_utterances={-(-self.utterances // NUM_SPEAKERS)}",
                "data.corpus.num_test_speakers=1",
                "data.corpus.heldout_utterances=8",
                "data.corpus.speaker_utterances=1",
            ]
        cfg = compose("pretrain", chosen, return_hydra_config=True)
        positions = str(cfg.hydra.runtime.choices["positions"])
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg, positions

    # What a step needs, and what the device has

    def _work(self, module: MaskedAcousticModel, place: Place, scope: str) -> Work:
        """Matrix products of a forward pass: of the encoder, and in a step of the head on the frames that it predicts."""
        work = costs.products(module.model.encoder, place.batch, place.frames, module.model.features.output_dim)
        if scope in ("inference", "encoder"):
            return work
        objective = module.objective
        predicted = place.frames if objective.band_width else objective.max_masked(place.frames)
        return work + costs.products(module.head, place.batch, predicted, module.model.encoder.embed_dim)

    def _rates(self, work: Work | None, frames_per_s: float, frames: int, scope: str) -> dict[str, Any]:
        """What a backward pass computes and moves is twice what a forward pass does: two products for each."""
        if work is None:
            return {}
        rate = (1 if scope == "inference" else 3) * work.flops * frames_per_s / frames
        intensity = work.flops / (work.elements * torch.finfo(PRECISIONS[self.precision]).bits / 8)
        return {"tflops": rate / 1e12, "share_of_peak": rate / self.ceilings.flops_per_s, "flops_per_byte": intensity}

    def _masking_s(self, module: MaskedAcousticModel, place: Place) -> float:
        """Seconds of the corruption by itself, compiled like the loss that it is inside of in a step."""
        where = (place.model.name, place.model.overrides, place.frames, place.batch)
        if where in self._masking:
            return self._masking[where]
        features = module.model.features
        batch = self._batch(features, place)
        tokens = self._noise(place.batch, place.frames, features.output_dim)
        lengths = torch.full((place.batch,), place.frames, device=self.device)
        corrupt = torch.compile(module.objective.__call__) if self.compiled else module.objective

        def call() -> object:
            with torch.no_grad(), self._autocast():
                return corrupt(tokens, lengths, batch["keys"], module.stack)

        benchmark.time_of(call, 1 + WARM_UP, self.device)
        self._masking[where] = median(benchmark.time_of(call, self.steps, self.device) for _ in range(self.rounds))
        return self._masking[where]

    def _ceilings(self) -> Ceilings:
        """Measured, on random numbers."""
        on_gpu = self.device.type == "cuda"
        size = 8192 if on_gpu else 1024
        one, other = self._noise(2, size, size).to(PRECISIONS[self.precision])
        source = self._noise(2**28 if on_gpu else 2**25)
        target = torch.empty_like(source)
        product = _seconds_of(lambda: one @ other, self.device)
        copy = _seconds_of(lambda: target.copy_(source), self.device)
        return Ceilings(2 * size**3 / product, 2 * source.nbytes / copy, size)

    # What is told of it

    def _describe(self, machine: Mapping[str, Any]) -> list[str]:
        """What was measured how, for the reader of the table."""
        given = f"`experiment={self.experiment}`" if self.experiment else "the defaults"
        speech = "" if self.utterances is None else f" of {self.utterances} utterances of demo speech"
        return [
            f"{machine['device']}, {machine['threads']} CPU threads, PyTorch {machine['torch']}, {self.precision}"
            f"{', compiled' if self.compiled else ''}, seed {self.seed}; `audiot pretrain` with {given}"
            f"{''.join(f' `{override}`' for override in self.overrides)}.",
            f"{self.rounds} rounds of {self.steps} steps in a row, in which all mechanisms take turns; "
            f"program: {self.program_steps} steps{speech}, after {self.warmup_steps}.",
            f"`{machine['command']}`",
        ]

    def _next_command(self, rows: Sequence[Row]) -> str:
        """How to pre-train with the fastest configuration."""
        measured = [row for row in rows if row.frames_per_s]
        if not measured:
            return "audiot benchmark --help"
        best = max(measured, key=lambda row: (SCOPES.index(row.scope), row.frames_per_s or 0))
        (entry,) = (entry for entry in self.entries if entry.label == best.attention)
        chosen = [] if self.experiment is None else [f"experiment={self.experiment}"]
        chosen += [f"model={best.model}", f"attention={entry.name}"]
        chosen += [argument(f"attention.{name}", value) for name, value in entry.overrides.items()]
        return " ".join(["audiot pretrain", *chosen])


def _milliseconds(low: float, middle: float, high: float) -> dict[str, Any]:
    return {"median_ms": 1000 * middle, "q25_ms": 1000 * low, "q75_ms": 1000 * high}


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call when nothing disturbs it: the least of ten times, since what is measured is a ceiling."""
    count = max(1, round(0.05 / max(1e-6, benchmark.time_of(call, 3, device))))
    return min(benchmark.time_of(call, count, device) for _ in range(10))


def _numbers(name: str, given: Mapping[str, float], keys: tuple[str, str], kind: type, least: float) -> tuple[float, float]:
    """The two numbers of an entry.

    Raises:
        ValueError: other keys, or a value that is no number or too small.
    """
    if not isinstance(given, Mapping) or set(given) != set(keys):
        raise ValueError(f"benchmark.{name}: {given!r} is no mapping with {' and '.join(keys)}")
    for what in keys:
        check_type(kind, **{f"benchmark.{name}: {what}": given[what]})
        if given[what] < least or (kind is float and given[what] >= 1):
            below = " and less than 1" if kind is float else ""
            raise ValueError(f"benchmark.{name}: {what}={given[what]}: expected at least {least}{below}")
    return given[keys[0]], given[keys[1]]
