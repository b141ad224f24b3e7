"""``audiot tune``: find a batch and a learning rate for a pre-training on this machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from audiot.analysis.plots import plot_tuning
from audiot.base.console import say, table
from audiot.base.failures import Failures
from audiot.base.files import write_csv, write_json
from audiot.base.quoting import argument, quoted
from audiot.base.tables import aligned
from audiot.commands.pretrain import check_rate, new_module
from audiot.data.datamodule import SpeechDataModule
from audiot.data.opening import open_corpus
from audiot.data.prepare import PreparedCorpus
from audiot.pretraining import MaskedAcousticModel, fit_statistics, open_data
from audiot.training.trainer import make_trainer, precision_of, wants_compile
from audiot.training.tuning import (
    BatchTrials,
    LongestCrops,
    RangeTest,
    Suggestion,
    Trial,
    recommended,
    search,
    smoothed,
    suggestion,
)
from audiot.training.watch import batches_that_fit

TIMES = 8  # data.batch_s that are tried at most where memory is not probed
NEIGHBOURS = (1 / 3, 1, 3)  # factors of the suggested rate in the sweep that is recommended
SHORT: dict[str, Any] = {  # arguments of a trainer that takes a few steps and keeps nothing
    "min_steps": None,
    "max_epochs": -1,
    "min_epochs": None,
    "max_time": None,
    "limit_train_batches": None,
    "limit_val_batches": 0,
    "overfit_batches": 0,
    "fast_dev_run": False,
    "num_sanity_val_steps": 0,
    "profiler": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


class Tests:
    """The range tests, by their seeds.

    Args:
        window: Number of losses in a mean.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.done: dict[int, tuple[RangeTest, Suggestion | None]] = {}

    def add(self, seed: int, test: RangeTest) -> None:
        """Take a test that has ended, and say what it suggests."""
        found = suggestion(test.rates, test.losses, self.window)
        self.done[seed] = test, found
        steps = f"{len(test.losses)} steps, up to {test.rates[-1]:.2g}"
        if found is None:
            say(f"rate    seed {seed}: nothing to suggest, the loss does not fall ({steps})")
        else:
            say(f"rate    seed {seed}: {found.rate:.2g}, the loss is lowest at {found.best:.2g} ({steps})")

    @property
    def rates(self) -> list[float]:
        """The rates that the tests suggest."""
        return [found.rate for _, found in self.done.values() if found is not None]

    @property
    def rate(self) -> float | None:
        """Their median over the logarithm, with two digits; None: none suggests any."""
        return float(f"{math.exp(median(map(math.log, self.rates))):.1e}") if self.rates else None

    def figures(self) -> list[dict[str, Any]]:
        """Figures of each test."""
        return [
            {
                "seed": seed,
                "suggested": None if found is None else found.rate,
                "half_as_steep": None if found is None else [found.low, found.high],
                "lowest_loss_at": None if found is None else found.best,
                "steps": len(test.losses),
                "highest": test.rates[-1],
            }
            for seed, (test, found) in self.done.items()
        ]

    def curves(self) -> dict[int, tuple[list[float], list[float], list[float]]]:
        """Seed → rates, losses that are finite, and the smoothed losses."""
        curves = {}
        for seed, (test, _) in self.done.items():
            losses = [loss for loss in test.losses if math.isfinite(loss)]
            curves[seed] = test.rates[: len(losses)], losses, smoothed(losses, self.window)
        return curves


def main(cfg: DictConfig) -> None:
    """Try sizes of batches, then rates with the batch that is recommended; write, draw and say what came of it.

    Raises:
        ValueError: a setting is wrong, not even one utterance fits into memory, or no test suggests a rate.
    """
    check(cfg)
    run, given = Path(cfg.run_dir), cfg
    cfg = short(cfg)
    trainer = one_device(cfg)
    compiled, on_gpu = wants_compile(given, trainer), trainer.strategy.root_device.type == "cuda"
    corpus = open_corpus(cfg)
    module, data = begin(cfg, corpus, cfg.seed)
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    how = ", compiled" if compiled else ""
    say(f"model   {parameters / 1e6:.2f} M parameters, on {trainer.strategy.root_device}, {precision_of(trainer)}{how}")
    results: dict[str, Any] = {
        "device": str(trainer.strategy.root_device),
        "precision": precision_of(trainer),
        "compiled": compiled,
        "parameters": parameters,
        "seed": cfg.seed,
    }
    sizes: list[Trial] = []
    chosen: Trial | None = None
    if cfg.tune.batch.search:
        if compiled:
            module.compile_step()
        crops = LongestCrops(data)
        sizes = try_batches(cfg, module, crops, on_gpu, corpus)
        chosen = recommended(sizes, cfg.tune.batch.within)
        results["batch"] = {
            "batch_s": chosen.batch_s,
            "largest_s": max(trial.batch_s for trial in sizes if trial.fits),
            "memory_probed": on_gpu,
            "crop_s": round(crops.num_samples / crops.sample_rate, 4),
            "tried": [trial._asdict() for trial in sizes],
        }
        with open_dict(cfg):
            cfg.data.batch_s = chosen.batch_s
    del module, data, trainer
    tests = Tests(max(3, round(cfg.tune.lr.smoothing * cfg.tune.lr.steps) // 2 * 2 + 1))
    if cfg.tune.lr.search:
        for seed in range(cfg.seed, cfg.seed + cfg.tune.lr.repeats):
            tests.add(seed, range_test(cfg, corpus, seed, tests.window))
        results["lr"] = {"lr": tests.rate, "batch_s": cfg.data.batch_s, "tests": tests.figures()}
    found = {"data.batch_s": chosen and chosen.batch_s, "optimizer.lr": tests.rate}
    found = {name: value for name, value in found.items() if value is not None}
    write_json(run / "tune.json", results | {"next": next_command(found)})
    write_csv(run / "tune.csv", rows(sizes, tests))
    failures, files = Failures(), ["tune.json", "tune.csv"]
    if cfg.plots:
        with failures.noted("tune.png"):
            curves = {f"seed {seed}": curve for seed, curve in tests.curves().items()}
            marked = {f"seed {seed}": each.rate for seed, (_, each) in tests.done.items() if each is not None}
            plot_tuning(sizes, chosen and chosen.batch_s, curves, marked, tests.rate, run / "tune.png")
            files.append("tune.png")
    lines = ({} if chosen is None else of_batches(sizes, chosen, cfg, on_gpu)) | ({} if not tests.done else of_rates(tests))
    say(f"\n{size_table(sizes)}\n" if sizes else "")
    say(table(lines | {"run": f"{run}: {', '.join(files)}"}))
    failures.tell(given.debug)
    if cfg.tune.lr.search and tests.rate is None:
        raise ValueError(
            f"the loss fell at no rate from tune.lr.lowest={cfg.tune.lr.lowest:g} to tune.lr.highest={cfg.tune.lr.highest:g}: "
            "set other ends, or more tune.lr.steps"
        )
    say(f"next:   {next_command(found)}")


def check(cfg: DictConfig) -> None:
    """Refuse settings that can't be used.

    Raises:
        ValueError: one of them.
    """
    batch, lr = cfg.tune.batch, cfg.tune.lr
    if not batch.search and not lr.search:
        raise ValueError("tune.batch.search=false and tune.lr.search=false leave nothing to find: set one of them to true")
    for key, value, least in (
        ("batch.warmup", batch.warmup, 1),
        ("batch.steps", batch.steps, 1),
        ("lr.steps", lr.steps, 10),
        ("lr.repeats", lr.repeats, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(f"tune.{key} must be a whole number, at least {least}, found {value}")
    for key, value in (
        ("batch.margin", batch.margin),
        ("batch.resolution", batch.resolution),
        ("batch.within", batch.within),
        ("lr.smoothing", lr.smoothing),
    ):
        if not 0 <= value < 1:
            raise ValueError(f"tune.{key} must be a share in [0, 1), found {value}")
    for key, value, word in (("smallest_s", batch.smallest_s, None), ("largest_s", batch.largest_s, "auto")):
        if value != word and not (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
            raise ValueError(f"tune.batch.{key} must be {word or 'null'} or a positive number of seconds, found {value}")
    if not 0 < lr.lowest < lr.highest:
        raise ValueError(f"tune.lr.lowest must be above 0 and below tune.lr.highest={lr.highest}, found {lr.lowest}")
    if lr.stop <= 1:
        raise ValueError(f"tune.lr.stop must be above 1, found {lr.stop}")


def short(cfg: DictConfig) -> DictConfig:
    """The config of the short trainings: without callbacks, loggers and a schedule, and of the first of several rounds."""
    changed = cfg.copy()
    with open_dict(changed):
        changed.callbacks, changed.logger = {}, {}
        changed.scheduler = {"_target_": "audiot.training.optimization.constant", "_partial_": True}
        changed.optimizer.lr = cfg.tune.lr.lowest
        if cfg.objective.get("rounds", 1) > 1:
            say(f"round   1 of {cfg.objective.rounds} is tuned: the others have the same model")
            changed.objective.rounds, changed.objective.layer = 1, None
    return changed


def one_device(cfg: DictConfig) -> pl.Trainer:
    """A trainer of the config.

    Raises:
        ValueError: it has several devices, or a strategy for them.
    """
    where = "audiot tune measures one device: set trainer=gpu; what it finds fits each device of trainer=ddp, too"
    if cfg.trainer.strategy != "auto":
        raise ValueError(f"{where} (trainer.strategy is {cfg.trainer.strategy})")
    trainer = make_trainer(cfg, **SHORT)
    if trainer.num_devices * trainer.num_nodes > 1:
        raise ValueError(f"{where} (trainer.devices={cfg.trainer.devices} are {trainer.num_devices * trainer.num_nodes})")
    return trainer


def begin(cfg: DictConfig, corpus: PreparedCorpus, seed: int) -> tuple[MaskedAcousticModel, SpeechDataModule]:
    """Model and data with which a pre-training of that seed begins."""
    seeded = cfg.copy()
    seeded.seed = seed
    pl.seed_everything(seed, verbose=False)
    trainer = make_trainer(seeded, **SHORT)
    module = new_module(seeded)
    check_rate(module, corpus.sample_rate)
    data = open_data(seeded, module, corpus)
    if module.objective.mixing is not None:
        module.objective.mixing.open()
    fit_statistics(module, data, trainer.strategy.root_device)
    return module, data


def try_batches(
    cfg: DictConfig, module: MaskedAcousticModel, crops: LongestCrops, on_gpu: bool, corpus: PreparedCorpus
) -> list[Trial]:
    """Train with batches of several sizes, and say how fast each is.

    Raises:
        ValueError: not even one utterance fits into memory, or the sizes exclude each other.
    """
    options = cfg.tune.batch
    audio_s = 3600 * corpus.hours[corpus.split_for("pretrain", "train")]
    automatic = audio_s if on_gpu else min(audio_s, TIMES * cfg.data.batch_s)
    limit = automatic if options.largest_s == "auto" else options.largest_s
    smallest, largest = crops.most(options.smallest_s or crops.seconds(1)), crops.most(limit)
    if cfg.data.max_utterances is not None:
        largest = min(largest, cfg.data.max_utterances)
    if smallest > largest:
        raise ValueError(
            f"tune.batch.smallest_s={options.smallest_s} is above the largest batch, {crops.seconds(largest):g} s: "
            "lower it, or raise tune.batch.largest_s or data.max_utterances"
        )
    memory = f"until {1 - options.margin:.0%} of the GPU's memory are full" if on_gpu else "memory is not probed on this device"
    length = crops.num_samples / crops.sample_rate
    say(f"batch   crops of {length:.4g} s, at most {crops.seconds(largest):g} s together; {memory}")

    def attempt(utterances: int) -> Trial:
        trial = trials(utterances)
        peak = f", {trial.peak_gib:.2f} GiB" if trial.peak_gib is not None else ""
        came = f"{trial.frames_per_s:,.0f} frames/s{peak}" if trial.frames_per_s is not None else "out of memory"
        say(f"try     {trial.batch_s:g} s: {came}")
        return trial

    trials = BatchTrials(
        lambda steps: make_trainer(cfg, **SHORT, max_steps=steps), module, crops, options.warmup, options.steps, options.margin
    )
    sizes = search(attempt, smallest, largest, options.resolution)
    if not any(trial.fits for trial in sizes):
        raise ValueError(f"out of memory with one utterance of {length:.4g} s: lower data.crop_s, or choose a smaller model")
    return sizes


def range_test(cfg: DictConfig, corpus: PreparedCorpus, seed: int, window: int) -> RangeTest:
    """The range test of a pre-training of that seed, with its batches in their order."""
    options = cfg.tune.lr
    module, data = begin(cfg, corpus, seed)
    trainer = make_trainer(cfg, **SHORT, max_steps=options.steps)
    test = RangeTest(options.lowest, options.highest, options.steps, window, options.stop)
    trainer.callbacks.append(test)  # type: ignore[attr-defined]
    with batches_that_fit(trainer):
        trainer.fit(module, data)
    return test


def next_command(found: Mapping[str, Any]) -> str:
    """The pre-training with what was found, and with all other overrides that were given."""
    given = HydraConfig.get().overrides.task
    kept = [each for each in given if (name := each.lstrip("+~").split("=", 1)[0]) not in found and not name.startswith("tune.")]
    folders = [each for each in sys.argv[1:] if each.startswith("--config-dir=")]
    arguments = [*map(quoted, [*folders, *kept]), *(argument(name, value) for name, value in found.items())]
    return " ".join(["audiot pretrain", *arguments])


def rows(sizes: Sequence[Trial], tests: Tests) -> Iterator[dict[str, Any]]:
    """Rows of ``tune.csv``: of each batch that was tried, then of each step of the range tests."""
    batch, step = Trial._fields, ("seed", "step", "lr", "loss", "smoothed")
    empty = dict.fromkeys(("what", *batch, *step), "")
    for trial in sizes:
        yield empty | {"what": "batch"} | {name: value for name, value in trial._asdict().items() if value is not None}
    curves = tests.curves()
    for seed, (test, _) in tests.done.items():
        smooth = curves[seed][2]
        for number, (rate, loss) in enumerate(zip(test.rates, test.losses, strict=True)):
            mean = smooth[number] if number < len(smooth) else ""
            yield empty | dict(zip(("what", *step), ("lr", seed, number + 1, rate, loss, mean), strict=True))


def size_table(sizes: Sequence[Trial]) -> str:
    """Table of the batches that were tried, for the terminal."""
    lines = [["batch, s", "utterances", "frames/s", "ms per step", "GiB"]]
    for size in sizes:
        speed = ["no memory", "-"]
        if size.frames_per_s is not None and size.step_s is not None:
            speed = [f"{size.frames_per_s:,.0f}", f"{1000 * size.step_s:,.1f}"]
        peak = "-" if size.peak_gib is None else f"{size.peak_gib:.2f}"
        lines.append([f"{size.batch_s:g}", str(size.utterances), *speed, peak])
    return aligned(lines)


def of_batches(sizes: Sequence[Trial], chosen: Trial, cfg: DictConfig, on_gpu: bool) -> dict[str, str]:
    """What is recommended of the batches, in words."""
    within = f"the smallest within {cfg.tune.batch.within:.0%} of the best throughput"
    largest = max(size.batch_s for size in sizes if size.fits)
    if all(size.fits for size in sizes):
        limit = "the largest that was tried" + ("" if on_gpu else ", as memory is not probed on this device")
    else:
        limit = f"with {cfg.tune.batch.margin:.0%} of memory to spare" if on_gpu else "the largest that fits"
    return {"batch": f"data.batch_s={chosen.batch_s:g}, {within}", "largest": f"{largest:g} s, {limit}"}


def of_rates(tests: Tests) -> dict[str, str]:
    """What is recommended of the rates, in words, and how rough that is."""
    if tests.rate is None:
        return {}
    low, high = min(tests.rates), max(tests.rates)
    several = f"; {len(tests.rates)} of {len(tests.done)} seeds suggest {low:.2g} to {high:.2g}" if len(tests.done) > 1 else ""
    values = ",".join(f"{factor * tests.rate:.1e}" for factor in NEIGHBOURS)
    return {
        "rate": f"optimizer.lr={tests.rate:g}, where the loss falls most steeply{several}",
        "rough": f"these are the first steps of a training; a long one may do better with other rates: -m optimizer.lr={values}",
    }


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("tune", sys.argv[1:])
