"""``audiot finetune``: probe or fine-tune an encoder on a speech task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import ModelCheckpoint

from audiot.analysis.plots import plot_confusion
from audiot.commands.common import data_options, make_trainer, open_corpus, plain, say, table
from audiot.data.datamodule import SpeechDataModule
from audiot.data.prepare import PreparedCorpus
from audiot.downstream.cache import CachedStates
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import EncoderUpstream, FeaturesUpstream
from audiot.features import Features
from audiot.files import write_json


def main(cfg: DictConfig) -> float:
    """Train, test the best checkpoint, say what came of it; the validation accuracy, for a sweep that searches."""
    metrics = finetune(cfg)
    say(f"next:   audiot evaluate run={cfg.run_dir}")
    return metrics["valid/accuracy"]


def task_data(cfg: DictConfig, corpus: PreparedCorpus, features: Features) -> SpeechDataModule:
    """The data module of a downstream config."""
    if corpus.sample_rate != features.sample_rate:
        raise ValueError(
            f"the corpus is at {corpus.sample_rate} Hz and the upstream at {features.sample_rate} Hz: "
            f"set data.prepare.sample_rate={features.sample_rate}"
        )
    labels = instantiate(cfg.downstream.labels, features=features)
    fraction = cfg.data.label_fraction
    return SpeechDataModule(corpus, cfg.downstream.task, labels=labels, label_fraction=fraction, **data_options(cfg))


def finetune(cfg: DictConfig) -> dict[str, Any]:
    """Train and test as the config says, in ``cfg.run_dir``; the metrics, which also go to ``metrics.json``."""
    run = Path(cfg.run_dir)
    pl.seed_everything(cfg.seed, verbose=False)
    if cfg.trainer.val_check_interval > cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches:
        raise ValueError(
            f"trainer.val_check_interval={cfg.trainer.val_check_interval} comes after the last step, "
            f"trainer.max_steps={cfg.trainer.max_steps}: lower it, since the best validation chooses the checkpoint"
        )
    if cfg.downstream.batch_size < 1:
        raise ValueError(f"downstream.batch_size must be at least 1, found {cfg.downstream.batch_size}")
    trainer = make_trainer(cfg)
    upstream: EncoderUpstream | FeaturesUpstream = instantiate(cfg.upstream, _recursive_=False, _convert_="all")
    if isinstance(upstream, FeaturesUpstream) and cfg.downstream.train_encoder:
        raise ValueError("upstream=features has nothing to train: drop downstream.train_encoder=true")
    data = task_data(cfg, open_corpus(cfg), upstream.features)
    if isinstance(upstream, FeaturesUpstream):
        upstream.fit((batch["waveforms"], batch["lengths"]) for batch in data.ordered_loader("train"))
    pl.seed_everything(cfg.seed, verbose=False)
    module = DownstreamModule(
        upstream=upstream.config,
        head=plain(cfg.downstream.head),
        classes=data.classes,
        layers=cfg.downstream.layers,
        train_encoder=cfg.downstream.train_encoder,
        optimizer=plain(cfg.optimizer),
        scheduler=plain(cfg.scheduler),
        seed=cfg.seed,
    )
    module.upstream.load_state_dict(upstream.state_dict())
    source: pl.LightningDataModule = data
    if cfg.downstream.cache and not cfg.downstream.train_encoder:
        source = CachedStates(
            data,
            module.upstream,
            trainer.strategy.root_device,
            last_only=cfg.downstream.layers == "last",
            batch_size=cfg.downstream.batch_size,
        )
    trainer.fit(module, source)
    best = next(callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint))  # type: ignore[attr-defined]
    metrics = test(trainer, module, source, best.best_model_path)
    metrics |= {
        "valid/accuracy": float(best.best_model_score),  # type: ignore[arg-type]
        "task": cfg.downstream.task,
        "upstream": str(cfg.upstream._target_).rpartition(".")[2],
        "layers": cfg.downstream.layers,
        "fine_tuned": cfg.downstream.train_encoder,
        "train_utterances": len(data.training_cuts()),
        "classes": len(data.classes),
        "steps": trainer.global_step,
    }
    weights = module.layers.weights()
    if weights is not None:
        metrics["layer_weights"] = [round(weight, 4) for weight in weights.tolist()]
    if trainer.is_global_zero:
        write_json(run / "metrics.json", metrics)
        title = f"{cfg.downstream.task}: test accuracy {100 * metrics['test/accuracy']:.1f}%"
        plot_confusion(module.confusion.compute(), data.classes, title, run / "confusion.png")
        say(describe(metrics, run))
    return metrics


def test(trainer: pl.Trainer, module: DownstreamModule, source: pl.LightningDataModule, checkpoint: str | Path) -> dict[str, Any]:
    """Test metrics of a checkpoint."""
    (metrics,) = trainer.test(module, source, ckpt_path=checkpoint, weights_only=False, verbose=False)
    return dict(metrics)


def describe(metrics: dict[str, Any], run: Path) -> str:
    """The result in a few lines."""
    return table(
        {
            "test": f"accuracy {100 * metrics['test/accuracy']:.1f}%, macro F1 {100 * metrics['test/macro_f1']:.1f}% "
            f"({metrics['task']}, {metrics['classes']} classes, {metrics['train_utterances']} training utterances)",
            "run": f"{run}: metrics.json, confusion.png, checkpoints/best.ckpt",
        }
    )


if __name__ == "__main__":
    from audiot.launch import run as run_command

    run_command("finetune", sys.argv[1:])
