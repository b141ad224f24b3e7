"""``audiot pretrain``: pre-train a masked acoustic model, export its encoder, probe it, draw it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, open_dict
from pytorch_lightning.utilities import rank_zero_warn

from audiot.analysis.plots import plot_attention, plot_probes, plot_training
from audiot.base.console import say
from audiot.base.failures import Failures
from audiot.base.files import read_json, write_json
from audiot.checkpoint import save_encoder, save_objective
from audiot.commands.closing import report, validation_loss
from audiot.commands.environment import note_environment
from audiot.commands.few import say_few, say_little
from audiot.commands.going_on import announce, check_new, go_on, how_to_go_on, save_last
from audiot.commands.probing import check_probes, probe_configs, run_probes, warm_up
from audiot.commands.upstreams import kind_of, open_upstream
from audiot.data.datamodule import SpeechDataModule
from audiot.data.opening import note_data, open_corpus
from audiot.pretraining import MaskedAcousticModel, build, fit_statistics, open_data, saved_teacher
from audiot.runs import (
    Interrupted,
    Resumed,
    has_checkpoints,
    has_config,
    has_rounds,
    is_finished,
    is_in_earlier_round,
    newest_checkpoint,
    read_results,
    resume_command,
    round_folder,
    step_of,
    whole_run,
    write_config,
)
from audiot.training.averaging import hand_over_average
from audiot.training.callbacks import ObjectivePictures, StopAfter, Throughput
from audiot.training.early_stopping import stopped_early
from audiot.training.exhibits import show_picture
from audiot.training.fsdp import ShardedStrategy, is_sharded
from audiot.training.trainer import float8_of, is_short, make_trainer, precision_of, wants_compile, wants_graphs
from audiot.training.watch import batches_that_fit


@dataclass
class Pretraining:
    """What a pre-training run works with.

    Args:
        run: Folder of the run.
        cfg: Config of the run.
        trainer: Lightning's Trainer.
        module: Model, objective and optimiser.
        data: Batches.
        probes: Name of each probe → its config.
        targets: Figures of what was fitted for the objective.
    """

    run: Path
    cfg: DictConfig
    trainer: pl.Trainer
    module: MaskedAcousticModel
    data: SpeechDataModule
    probes: dict[str, DictConfig]
    targets: dict[str, Any]

    @property
    def draws(self) -> bool:
        """Whether pictures are wanted; runs of earlier versions always drew."""
        return bool(self.cfg.get("plots", True))

    @property
    def callbacks(self) -> list[pl.Callback]:
        """The Trainer's callbacks."""
        return self.trainer.callbacks  # type: ignore[attr-defined]


def main(cfg: DictConfig, resumed: Resumed | None = None, steps: int | None = None, follow: bool = True) -> float:
    """Run the whole of it in ``cfg.run_dir``, or the rest of it there; the validation loss, for a sweep that searches.

    Args:
        cfg: Config of the run.
        resumed: How it goes on; None: it starts.
        steps: Number of steps after which it stops before its end.
        follow: Whether to say what to run next.

    Raises:
        ValueError: something can't be done; or probes failed, which is told after all else is done.
    """
    begin, run = time.monotonic(), Path(cfg.run_dir)
    if resumed is None:
        check_new(cfg)
    elif is_finished(run, cfg):
        say(f"{run} is finished: nothing to resume\n{report(run)}")
        return validation_loss(read_results(run / "summary.json"))
    elif resumed.checkpoint is not None:
        announce(resumed)
    teacher = None
    if resumed is None or resumed.checkpoint is None:
        if resumed is not None:
            resumed.record()
        teacher = earlier_round(cfg if resumed is None else resumed.written, run)
    work = prepare(cfg, run, resumed, teacher)
    if steps is not None:
        work.callbacks.append(StopAfter(steps))
    summary = fit(work, resumed)
    loss = validation_loss(summary)
    if not export(work):  # another process goes on alone
        return loss
    failures = Failures()
    draw(work, failures)
    figures, failed = probe(work, failures)
    summary |= figures | {"wall_s": round(time.monotonic() - begin, 1)}
    write_json(run / "summary.json", summary)
    say(report(run, follow))
    failures.tell(cfg.debug)
    if failed:
        first, why = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(work.probes)} probes failed, and all else is done; {resume_command(run)} does them again; "
            f"the first, {first}: {why}"
        )
    return loss


def earlier_round(cfg: DictConfig, run: Path) -> str | None:
    """Train the earlier rounds of a run that has several, or the rest of them.

    Returns:
        The encoder of the last of them, which is the teacher of the next; None if there are none.
    """
    number = cfg.objective.get("rounds", 1) - 1
    if number < 1:
        return None
    if cfg.objective.teacher is not None:
        raise ValueError(
            f"objective.rounds={number + 1} trains its own teacher: drop objective.teacher, or set objective.rounds=1"
        )
    if run == whole_run(run) and not has_rounds(run):
        write_config(cfg, run)  # from here on it can be resumed
    folder = round_folder(run, number)
    earlier = cfg.copy()
    with open_dict(earlier):
        earlier.run_dir, earlier.probe, earlier.objective.rounds, earlier.logger = str(folder), False, number, {}
        earlier.resume = None
        if number == 1:
            earlier.objective.layer = None  # of the teacher, which the first round has not
    say(f"round   {number} of {number + 1}, in {folder}")
    if has_rounds(folder) or has_checkpoints(folder):
        checkpoint = None if is_in_earlier_round(folder) else newest_checkpoint(folder)
        main(earlier, Resumed(folder, checkpoint, earlier, earlier, [], [], earlier))
    else:
        main(earlier)
    say(f"\nround   {number + 1} of {number + 1}, in {run}")
    return str(folder / "encoder")


def prepare(cfg: DictConfig, run: Path, resumed: Resumed | None, teacher: str | None = None) -> Pretraining:
    """Build all that the run needs, and find what is wrong with it before anything is trained."""
    pl.seed_everything(cfg.seed, verbose=False)
    trainer = make_trainer(cfg)
    checkpoint = None if resumed is None else resumed.checkpoint
    continues = checkpoint is not None
    if checkpoint is not None:
        module = build(cfg, saved_teacher(checkpoint, cfg.trusted) if "teacher" in cfg.objective else None)
    else:
        module = new_module(cfg, teacher)
    corpus = open_corpus(cfg, run if continues else None)
    if not continues:
        note_data(cfg, corpus)
        if trainer.is_global_zero and not (resumed is not None and has_config(run)):
            write_config(cfg, run)
    note_environment(cfg, run, 0 if checkpoint is None else step_of(checkpoint))
    say_few(cfg, corpus, "pretrain", ("valid",))
    hours = corpus.hours[corpus.split_for("pretrain", "train")]
    say_little(cfg, hours, trainer.max_steps, trainer.world_size * trainer.accumulate_grad_batches)
    check_rate(module, corpus.sample_rate)
    probes = probe_configs(cfg, run, trusted=None if resumed is None else cfg.trusted) if cfg.probe else {}
    check_probes(probes, corpus)
    if len(probes) > 1 and cfg.probe_jobs != 1 and trainer.is_global_zero and is_short(trainer):
        warm_up()
    data = open_data(cfg, module, corpus)
    if module.objective.mixing is not None:
        module.objective.mixing.open()
    noted = run / "targets.json"
    if continues:
        figures = read_json(noted, "figures of the targets") if noted.is_file() else {}
    else:
        figures = fit_statistics(module, data, trainer.strategy.root_device)
        say_targets(figures)
        if figures and trainer.is_global_zero:
            write_json(noted, figures)
    return Pretraining(run, cfg, trainer, module, data, probes, figures)


def new_module(cfg: DictConfig, teacher: str | None = None) -> MaskedAcousticModel:
    """The module with which a run begins, before anything is fitted.

    Args:
        cfg: Config of the run.
        teacher: Encoder of an earlier round that the objective learns from; None: ``cfg.objective.teacher``, if it has one.
    """
    path = teacher or cfg.objective.get("teacher")
    if not path:
        return build(cfg)
    upstream = open_upstream(kind_of(path), path, cfg.trusted)
    module = build(cfg, upstream.config)
    module.objective.get_submodule("teacher").load_state_dict(upstream.state_dict())
    return module


def say_targets(figures: Mapping[str, Any]) -> None:
    """Say what the targets are, where they were fitted."""
    if figures:
        stable = f", stability {figures['targets/stability']:.2f}" if "targets/stability" in figures else ""
        say(
            f"targets {figures['targets/codes']:,} codes, {figures['targets/used']:g} used, "
            f"perplexity {figures['targets/perplexity']:g}{stable}"
        )


def fit(work: Pretraining, resumed: Resumed | None) -> dict[str, Any]:
    """Train to the last step, save it, and validate.

    Returns:
        Figures of the validation and of the training.

    Raises:
        ValueError: training diverged.
    """
    trainer, module = work.trainer, work.module
    compiled = wants_compile(work.cfg, trainer)
    if compiled:
        if isinstance(trainer.strategy, ShardedStrategy):
            module.compile_layers()
        else:
            module.compile_step(graphs=wants_graphs(trainer))
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    mechanism = " and ".join(dict.fromkeys(type(each).__name__ for each in module.model.encoder.mechanisms))
    how = f"{precision_of(trainer)}{', compiled' if compiled else ''}"
    say(f"model   {mechanism}, {parameters / 1e6:.2f} M parameters, on {trainer.strategy.root_device}, {how}")
    float8 = float8_of(trainer)
    if float8 is not None:
        say(f"float8  {float8.begin(module)}")
        if not compiled:
            rank_zero_warn("trainer.precision=fp8 is slower than bf16-mixed where layers are not compiled: set compile=true")
    with how_to_go_on(trainer, work.run), batches_that_fit(trainer):
        if resumed is None or resumed.checkpoint is None:
            trainer.fit(module, work.data)
        else:
            go_on(trainer, module, work.data, resumed)
        save_last(trainer, module, work.run, work.cfg.optimizer.lr)
        hand_over_average(trainer, module)
        (validation,) = trainer.validate(module, work.data, verbose=False)
    loss = validation[module.monitor]
    if not math.isfinite(loss):
        raise ValueError(f"training diverged, {module.monitor} is {loss}: lower optimizer.lr={work.cfg.optimizer.lr}")
    throughput = next(callback for callback in work.callbacks if isinstance(callback, Throughput))
    reading = {}
    if work.data.corpus.is_sharded:
        read = torch.tensor(float(work.data.bytes_read), device=trainer.strategy.root_device)
        reading["read_gb"] = round(float(trainer.strategy.reduce(read, reduce_op="sum")) / 1e9, 6)
    return (
        {name: value for name, value in validation.items() if name.startswith("pretrain/")}
        | work.targets
        | {
            "monitor": module.monitor,
            **throughput.costs(trainer.strategy.root_device),
            "precision": precision_of(trainer),
            "parameters": parameters,
            "steps": trainer.global_step,
            "resumed_step": module.trained_steps,
        }
        | stopped_early(trainer)
        | reading
    )


def export(work: Pretraining) -> bool:
    """Write the encoder, and end what several processes do together.

    Returns:
        Whether this process does the rest: it is for one, whose metrics must not wait for the others.
    """
    trainer = work.trainer
    state = trainer.strategy.lightning_module_state_dict() if is_sharded(work.module) else None  # of all processes
    if trainer.is_global_zero:
        if state is not None:
            work.module = MaskedAcousticModel(**work.module.hparams)
            work.module.load_state_dict(state)
        save_encoder(work.run / "encoder", work.module.model)
        save_objective(work.run / "encoder", work.module.hparams["objective"], work.module.objective)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return trainer.is_global_zero


def probe(work: Pretraining, failures: Failures) -> tuple[dict[str, float], dict[str, str]]:
    """Probe and fine-tune the encoder, and draw the results.

    Returns:
        Figure of each probe, and the reason for each one that failed.
    """
    if not work.cfg.probe:
        return {}, {}
    try:
        figures, failed = run_probes(work.cfg, work.run, work.probes, work.trainer.strategy.root_device)
    except Interrupted as stop:
        raise Interrupted(work.trainer.global_step, newest_checkpoint(work.run), "in the probes ") from stop
    if figures and work.draws:
        with failures.noted("probes.png"):
            plot_probes(figures, work.run / "plots" / "probes.png")
    return figures, failed


def check_rate(module: MaskedAcousticModel, sample_rate: int) -> None:
    """Refuse a corpus of another sample rate (Hz) than the features'."""
    wanted = module.model.features.sample_rate
    if wanted != sample_rate:
        raise ValueError(
            f"the corpus is at {sample_rate} Hz and the features at {wanted} Hz: set data.prepare.sample_rate={wanted}"
        )


@torch.no_grad()
def draw(work: Pretraining, failures: Failures) -> None:
    """Curves from ``metrics.csv`` and the attention of the first validation utterance, where attention has weights."""
    if not work.draws:
        return
    for callback in work.callbacks:
        if isinstance(callback, ObjectivePictures):
            failures.update(callback.failures)
    run, model = work.run, work.module.model.cpu().eval()
    if (run / "metrics.csv").is_file():
        with failures.noted("training.png"):
            plot_training(run / "metrics.csv", run / "plots" / "training.png", work.module.objective)
            show_picture(work.trainer.loggers, run / "plots" / "training.png", work.trainer.global_step)
    if not model.encoder.has_weights:
        lacking = next(each for each in model.encoder.mechanisms if not each.has_weights)
        say(f"plots   no picture of attention: {type(lacking).__name__} has no weights")
        return
    with failures.noted("attention.png"):
        batch = next(iter(work.data.ordered_loader("valid")))
        length = int(batch["lengths"][0])
        tokens, _ = model.features(batch["waveforms"][:1, :length], batch["lengths"][:1])
        maps = model.encoder.attention_weights(model.features.embed(tokens))
        weights = {f"layer {number}": layer[0] for number, layer in enumerate(maps, 1)}
        heading = f"Attention, {batch['ids'][0]}\neach map has its own scale"
        frames = model.features.spectrogram(tokens)[0]
        plot_attention(weights, model.features.scale, heading, run / "plots" / "attention.png", frames)
        show_picture(work.trainer.loggers, run / "plots" / "attention.png", work.trainer.global_step)


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("pretrain", sys.argv[1:])
