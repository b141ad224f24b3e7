"""``audiot pretrain``: pre-train a masked acoustic model, export its encoder, probe it, draw it."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import LambdaCallback

from audiot.analysis.plots import plot_attention, plot_probes, plot_training
from audiot.base.console import say, table
from audiot.base.failures import Failures
from audiot.base.files import read_json, write_json
from audiot.checkpoint import save_encoder
from audiot.commands.few import say_few
from audiot.commands.probing import check_probes, probe_configs, run_probes, warm_up
from audiot.data.datamodule import SpeechDataModule
from audiot.data.opening import note_data, open_corpus
from audiot.following import finetune_command
from audiot.pretraining import MaskedAcousticModel, build, open_data
from audiot.runs import (
    Interrupted,
    Resumed,
    check_fresh,
    is_finished,
    newest_checkpoint,
    resume_command,
    step_of,
    write_config,
)
from audiot.training.callbacks import ReconstructionPictures, Throughput
from audiot.training.fsdp import is_sharded
from audiot.training.optimization import Schedule, schedule
from audiot.training.trainer import is_short, make_trainer, wants_compile, wants_graphs


def main(cfg: DictConfig, resumed: Resumed | None = None) -> float:
    """Run the whole of it in ``cfg.run_dir``, or the rest of it there; the validation L1, for a sweep that searches.

    Raises:
        ValueError: something can't be done; or probes failed, which is told after all else is done.
    """
    begin = time.monotonic()
    run = Path(cfg.run_dir)
    if resumed is None:
        if cfg.resume:
            raise ValueError("a config can't resume a run: put resume=RUN on the command line, without a + before it")
        check_fresh(run)
    else:
        if is_finished(run, cfg):
            say(f"{run} is finished: nothing to resume\n{report(run)}")
            return read_json(run / "summary.json", "summary")["pretrain/val_l1"]
        announce(resumed)
    pl.seed_everything(cfg.seed, verbose=False)
    trainer = make_trainer(cfg)
    module = build(cfg)
    corpus = open_corpus(cfg, None if resumed is None else run)
    if resumed is None:
        note_data(cfg, corpus)
        if trainer.is_global_zero:
            write_config(cfg, run)
    say_few(cfg, corpus, "pretrain", ("valid",))
    _check_rate(module, corpus.sample_rate)
    probes = probe_configs(cfg, run, trusted=None if resumed is None else cfg.trusted) if cfg.probe else {}
    check_probes(probes, corpus)
    if len(probes) > 1 and cfg.probe_jobs != 1 and trainer.is_global_zero and is_short(trainer):
        warm_up()
    data = open_data(cfg, module, corpus)
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    mechanism = type(module.model.encoder.layer(0).attention.mechanism).__name__
    compiled = wants_compile(cfg, trainer)
    if compiled:
        module.compile_step(graphs=wants_graphs(trainer))
    how = ", compiled" if compiled else ""
    say(f"model   {mechanism}, {parameters / 1e6:.2f} M parameters, on {trainer.strategy.root_device}, {trainer.precision}{how}")
    if resumed is None:
        trainer.fit(module, data)
    else:
        go_on(trainer, module, data, resumed)
    last = run / "checkpoints" / f"step={trainer.global_step}.ckpt"
    if not trainer.fast_dev_run and not trainer.strategy.broadcast(last.exists()):  # type: ignore[attr-defined]
        trainer.save_checkpoint(last)
    (validation,) = trainer.validate(module, data, verbose=False)
    throughput = next(callback for callback in trainer.callbacks if isinstance(callback, Throughput))  # type: ignore[attr-defined]
    resumed_step = module.trained_steps  # which a module that is built anew for export does not know
    loss = validation["pretrain/val_l1"]
    if not math.isfinite(loss):
        raise ValueError(f"training diverged, pretrain/val_l1 is {loss}: lower optimizer.lr={cfg.optimizer.lr}")
    state = trainer.strategy.lightning_module_state_dict() if is_sharded(module) else None  # of all processes
    if torch.distributed.is_initialized():  # the rest is for one process, whose metrics must not wait for the others
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not trainer.is_global_zero:
        return loss
    if state is not None:
        module = build(cfg)
        module.load_state_dict(state)
    save_encoder(run / "encoder", module.model, module.head)
    summary: dict[str, Any] = {name: value for name, value in validation.items() if name.startswith("pretrain/")}
    pictures = Failures()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ReconstructionPictures):
            pictures.update(callback.failures)
    draw(run, module, data, pictures)
    failed: dict[str, str] = {}
    if cfg.probe:
        try:
            figures, failed = run_probes(cfg, run, probes, trainer.strategy.root_device)
        except Interrupted as stop:
            raise Interrupted(trainer.global_step, newest_checkpoint(run), "in the probes ") from stop
        summary |= figures
        if figures:
            with pictures.noted("probes.png"):
                plot_probes(summary, run / "plots" / "probes.png")
    summary |= {
        "frames_per_s": round(throughput.average),
        "data_wait": round(throughput.data_wait, 4),
        "first_step_s": round(throughput.first_step_s, 1),
        "precision": trainer.precision,
        "parameters": parameters,
        "steps": trainer.global_step,
        "wall_s": round(time.monotonic() - begin, 1),
        "resumed_step": resumed_step,
    }
    write_json(run / "summary.json", summary)
    say(report(run))
    pictures.tell(cfg.debug)
    if failed:
        first, why = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(probes)} probes failed, and all else is done; {resume_command(run)} does them again; "
            f"the first, {first}: {why}"
        )
    return loss


def announce(resumed: Resumed) -> None:
    """Say where a run goes on, with what changes, and its learning rates where they aren't what they would have been.

    Raises:
        ValueError: the rates can't be changed.
    """
    changes = f", with {' '.join(resumed.changes)}" if resumed.changes else ""
    say(f"resume  {resumed.checkpoint}{changes}")
    before, after = (schedule(cfg) for cfg in (resumed.before, resumed.config))
    step = step_of(resumed.checkpoint)
    if isinstance(before, Schedule) and isinstance(after, Schedule):
        if (before.description, before.rate(step + 1)) != (after.description, after.rate(step + 1)):
            rates = f"step {step:,} had {before.rate(step):.3g}" + (
                f", step {step + 1:,} has {after.rate(step + 1):.3g}" if step < resumed.config.trainer.max_steps else ""
            )
            say(f"rates   the learning rate goes {after.description}: {rates}")
        return
    for change in resumed.changes:
        if change.startswith(("trainer.max_steps=", "optimizer.lr=", "scheduler.")):
            kind = resumed.config.scheduler._target_
            raise ValueError(f"{change} can't change on resume: {kind} keeps its rates in the checkpoint; a new run can have it")


def go_on(trainer: pl.Trainer, module: MaskedAcousticModel, data: SpeechDataModule, resumed: Resumed) -> None:
    """Train on from a checkpoint. Once it is loaded, the run's changes are its own, and probes of the encoder as it was go away.

    Raises:
        ValueError: the checkpoint can't be loaded.
    """
    accepted = False

    def accept(*_: Any) -> None:
        nonlocal accepted
        accepted = True
        if trainer.is_global_zero:
            resumed.record()
            if step_of(resumed.checkpoint) < resumed.config.trainer.max_steps:
                shutil.rmtree(resumed.run / "probes", ignore_errors=True)

    trainer.callbacks.insert(0, LambdaCallback(on_train_start=accept))  # type: ignore[attr-defined]
    try:
        trainer.fit(module, data, ckpt_path=resumed.checkpoint, weights_only=True)
    except (RuntimeError, LookupError, EOFError, UnpicklingError) as error:
        if accepted or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{resumed.run} can't go on from {resumed.checkpoint}: {error}") from error
    if not accepted:  # nothing was left to train
        accept()


def _check_rate(module: MaskedAcousticModel, sample_rate: int) -> None:
    wanted = module.model.features.sample_rate
    if wanted != sample_rate:
        raise ValueError(
            f"the corpus is at {sample_rate} Hz and the features at {wanted} Hz: set data.prepare.sample_rate={wanted}"
        )


@torch.no_grad()
def draw(run: Path, module: MaskedAcousticModel, data: SpeechDataModule, failures: Failures) -> None:
    """Curves from ``metrics.csv`` and the attention of the first validation utterance, where attention has weights."""
    if (run / "metrics.csv").is_file():
        with failures.noted("training.png"):
            plot_training(run / "metrics.csv", run / "plots" / "training.png")
    model = module.model.cpu().eval()
    if not model.encoder.has_weights:
        say(f"plots   no picture of attention: {type(model.encoder.layer(0).attention.mechanism).__name__} has no weights")
        return
    with failures.noted("attention.png"):
        batch = next(iter(data.ordered_loader("valid")))
        length = int(batch["lengths"][0])
        tokens, _ = model.features(batch["waveforms"][:1, :length], batch["lengths"][:1])
        weights = [layer[0] for layer in model.encoder.attention_weights(tokens)]
        plot_attention(weights, f"Attention, {batch['ids'][0]}", run / "plots" / "attention.png")


def report(run: Path) -> str:
    """The closing lines: what was done, how good it is, what to run next."""
    summary: Mapping[str, Any] = read_json(run / "summary.json", "summary")
    since = f"since step {summary['resumed_step']}" if summary.get("resumed_step") else "in all"
    lines = [
        "",
        table(
            {
                "validation L1": f"{summary['pretrain/val_l1']:.3f}   (zeros {summary['pretrain/zero_l1']:.3f}, "
                f"interpolation {summary['pretrain/interpolation_l1']:.3f})",
                "throughput": f"{summary['frames_per_s']:,} frames/s, {summary['steps']} steps, "
                f"{summary['parameters'] / 1e6:.2f} M parameters, {summary['wall_s']:.0f} s {since}"
                + (f", {summary['first_step_s']:.0f} s to the first step" if summary.get("first_step_s", 0) >= 5 else ""),
            }
        ),
    ]
    results = {tuple(name.split("/")): value for name, value in summary.items() if name.startswith(("probe/", "finetune/"))}
    if results:
        columns = {"encoder": "pre-trained", "random": "untrained"} | {name: name for _, _, name in results if "features" in name}
        rows = {}
        for kind, task in dict.fromkeys((kind, task) for kind, task, _ in results):
            first = next(column for column in columns if (kind, task, column) in results)
            metrics = read_json(run / "probes" / f"{kind}-{task}-{first}" / "metrics.json", "metrics")
            monitor = "" if metrics["monitor"] == "accuracy" else f" ({metrics['monitor']})"
            name = f"{task}{monitor}, {'frozen' if kind == 'probe' else 'fine-tuned'}, {metrics['train_utterances']:,} utterances"
            rows[name] = [results.get((kind, task, column)) for column in columns]
        width = max(38, *map(len, rows))
        lines += ["", f"{'test accuracy, %':<{width}}" + "".join(f"{title.replace('_', ' '):>16}" for title in columns.values())]
        for name, cells in rows.items():
            percent = [f"{100 * cell:16.1f}" if cell is not None else f"{'':>16}" for cell in cells]
            lines.append(f"{name:<{width}}" + "".join(percent))
    plots = sorted(path.name for path in (run / "plots").glob("*.png") if "step" not in path.name)
    lines += [
        "",
        f"run     {run}",
        f"plots   {run / 'plots'}: {', '.join(plots)}",
        f"next:   {finetune_command(run)}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("pretrain", sys.argv[1:])
