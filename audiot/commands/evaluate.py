"""``audiot evaluate``: measure a finished run again from its checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from audiot.base.console import say, table
from audiot.base.files import write_json
from audiot.commands.finetune import bootstrap, task_data
from audiot.data.datamodule import SpeechDataModule
from audiot.data.opening import data_options, open_corpus
from audiot.downstream.bootstrap import in_words
from audiot.downstream.module import DownstreamModule
from audiot.following import finetune_command
from audiot.pretraining import MaskedAcousticModel
from audiot.runs import newest_checkpoint, read_results, run_config
from audiot.training.callbacks import ProgressBar
from audiot.training.trainer import known_precision


def main(cfg: DictConfig) -> None:
    """Print what was measured then and now; now's figures go to ``evaluation.json`` in the run's folder."""
    run = Path(cfg.run)
    settings = run_config(run, cfg.data.prepare.when, trusted=cfg.trusted)
    trainer = pl.Trainer(
        accelerator=cfg.accelerator,
        precision=known_precision(cfg.precision or settings.trainer.precision, cfg.accelerator),
        devices=1,
        callbacks=[ProgressBar(leave=False)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    if (run / "metrics.json").is_file():
        then, now = read_results(run / "metrics.json"), evaluate_downstream(trainer, settings, run, cfg.trusted)
    else:
        then = read_results(run / "summary.json") if (run / "summary.json").is_file() else {}
        now = evaluate_pretraining(trainer, settings, run, cfg.trusted)
    for folder in dict.fromkeys((run, Path(cfg.run_dir))):  # there, a sweep over runs finds it
        write_json(folder / "evaluation.json", now)
    rows = {}
    for name, value in now.items():
        if name.startswith(("test/", "pretrain/")):
            ends = "–".join(f"{end:.4f}" for end in now.get("intervals", {}).get(name, ()))
            before = f"   (then {then[name]:.4f})" if name in then else ""
            rows[name] = f"{value:.4f}{ends and f' ({ends})'}{before}"
    if "bootstrap" in now:
        rows["ci"] = in_words(now["bootstrap"], now["intervals"])
    say(table(rows))
    say(f"wrote   {run / 'evaluation.json'}")
    if (run / "encoder").is_dir():
        say(f"next:   {finetune_command(run)}")


def evaluate_pretraining(trainer: pl.Trainer, settings: DictConfig, run: Path, trusted: Collection[str]) -> dict[str, float]:
    """Validation L1 beside both baselines."""
    module = MaskedAcousticModel.from_checkpoint(newest_checkpoint(run), trusted)
    data = SpeechDataModule(open_corpus(settings, run), "pretrain", crop_s=settings.data.crop_s, **data_options(settings))
    (metrics,) = trainer.validate(module, data, verbose=False)
    return {name: value for name, value in metrics.items() if name.startswith("pretrain/")}


def evaluate_downstream(trainer: pl.Trainer, settings: DictConfig, run: Path, trusted: Collection[str]) -> dict[str, Any]:
    """Test metrics of the best checkpoint, with their intervals."""
    module = DownstreamModule.from_checkpoint(run / "checkpoints" / "best.ckpt", trusted)
    data = task_data(settings, open_corpus(settings, run), module.upstream.features)
    if data.classes != module.hparams["classes"]:
        raise ValueError(f"run={run}: its corpus now has other classes ({len(data.classes)}) than it was trained on")
    resampling = replace(bootstrap(settings, data), keep=False)
    with torch.inference_mode():
        (metrics,) = trainer.test(module, data, verbose=False)
    return dict(metrics) | resampling.intervals(module.objective.measured(), metrics)


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("evaluate", sys.argv[1:])
