"""``audiot finetune``: probe or fine-tune an encoder on a speech task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from audiot.analysis.plots import plot_layer_weights
from audiot.base.config import plain
from audiot.base.console import say, table
from audiot.base.failures import Failures
from audiot.base.files import write_json
from audiot.base.quoting import argument, path
from audiot.commands.closing import stop_line
from audiot.commands.compare import bracket, cell, is_rate, write_comparison
from audiot.commands.environment import note_environment
from audiot.commands.few import say_few
from audiot.commands.going_on import announce, check_new, go_on, how_to_go_on, save_last
from audiot.data.datamodule import SpeechDataModule
from audiot.data.labels import Framing, speaker_of
from audiot.data.opening import corpus_folder, data_options, note_data, open_corpus
from audiot.data.prepare import PreparedCorpus
from audiot.downstream.bootstrap import Bootstrap, in_words, write_draws
from audiot.downstream.cache import CachedStates
from audiot.downstream.classifier import without_trials
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import FeaturesUpstream, Upstream, untrained
from audiot.following import example_files
from audiot.runs import (
    CONTROLS,
    Resumed,
    has_checkpoints,
    has_metrics,
    is_finished,
    newest_checkpoint,
    read_results,
    step_of,
    write_config,
)
from audiot.training.averaging import hand_over_average
from audiot.training.callbacks import Throughput
from audiot.training.early_stopping import stopped_early
from audiot.training.exhibits import show_picture
from audiot.training.float8 import check_tasks_precision
from audiot.training.fsdp import ShardedStrategy
from audiot.training.store import store_of
from audiot.training.trainer import make_trainer
from audiot.training.watch import batches_that_fit

BEST = Path("checkpoints") / "best.ckpt"


def main(cfg: DictConfig, resumed: Resumed | None = None) -> float:
    """Train, test the best checkpoint, say what came of it; the validation's figure, for a sweep that searches.

    Args:
        cfg: The config.
        resumed: How a run goes on that was stopped.
    """
    run = Path(cfg.run_dir)
    if resumed is not None and is_finished(run, cfg):
        metrics = read_results(run / "metrics.json")
        say(f"{run} is finished: nothing to resume\n{describe(metrics, run, [])}")
        _say_next(cfg)
        return float(metrics[f"valid/{cfg.downstream.monitor}"])
    metrics = noted(cfg, resumed)
    _say_next(cfg)
    return metrics[f"valid/{cfg.downstream.monitor}"]


def noted(cfg: DictConfig, resumed: Resumed | None = None) -> dict[str, Any]:
    """`finetune`, with what a run's folder notes before it begins or goes on."""
    run = Path(cfg.run_dir)
    if resumed is None:
        check_new(cfg)
        write_config(cfg, run)
        note_environment(cfg, run)
    else:
        announce(resumed)
        assert resumed.checkpoint is not None
        note_environment(cfg, run, step_of(resumed.checkpoint))
    return finetune(cfg, resumed)


def _say_next(cfg: DictConfig) -> None:
    """Say how the model is used. After trainer.fast_dev_run there is none, and the corpus of a finished run may be gone."""
    if (Path(cfg.run_dir) / BEST).is_file() and (corpus_folder(cfg)[0] / "corpus.json").is_file():
        say(f"next:   {predict_command(cfg)}")


def predict_command(cfg: DictConfig) -> str:
    """The command that uses a run's model on files of its test, to be pasted; what lies in shards is measured again."""
    corpus = PreparedCorpus.load(corpus_folder(cfg)[0])
    pair = str(cfg.downstream.objective._target_).endswith(".Verification")
    if corpus.is_sharded:  # which has no files to predict
        return f"audiot evaluate {argument('run', cfg.run_dir)}"
    examples = example_files(corpus, cfg.downstream.task, 2 if pair else 1)
    return " ".join(["audiot predict", *map(path, [cfg.run_dir, *examples]), *trust_flags(cfg)])


def trust_flags(cfg: DictConfig) -> list[str]:
    """The flags of a tool that opens a run's model, for packages from outside audiot that are in it."""
    return [f"--trust {name}" for name in cfg.upstream.get("trusted", []) if name != "audiot"]


def finetune(cfg: DictConfig, resumed: Resumed | None = None) -> dict[str, Any]:
    """Train and test as the config says, in ``cfg.run_dir``, with ``compare`` also the controls in folders below it.

    Args:
        cfg: The config.
        resumed: How a run goes on that was stopped. What of it is done is not done again.

    Returns:
        The metrics, which also go to ``metrics.json``.
    """
    _check(cfg)
    run = Path(cfg.run_dir)
    if resumed is None:  # before a corpus is prepared for nothing
        upstream: Upstream = instantiate(cfg.upstream, _recursive_=False, _convert_="all")
    else:
        assert resumed.checkpoint is not None
        upstream = DownstreamModule.from_checkpoint(resumed.checkpoint, cfg.trusted, without_trials).upstream
    corpus = open_corpus(cfg, None if resumed is None else run)
    per_frame = str(cfg.downstream.head._target_).endswith(".FrameClassifier")
    say_few(cfg, corpus, cfg.downstream.task, ("valid", "test"), cfg.downstream.monitor == "accuracy" and not per_frame)
    if resumed is None:
        note_data(cfg, corpus)
    metrics = train(cfg, upstream, corpus, resumed)
    if cfg.compare:
        results = {"encoder": metrics}
        for name, control in zip(CONTROLS, (untrained(upstream, cfg.seed), _features_control(cfg, upstream)), strict=True):
            say(f"\n{name}")
            results[name] = _compare(_control_config(cfg, control, run / name), control, corpus)
        tables = Failures()
        with tables.noted("comparison.csv, comparison.md"):
            say("\n" + write_comparison(results, run))
        tables.tell(cfg.debug)
    return metrics


def task_data(cfg: DictConfig, corpus: PreparedCorpus, features: Framing) -> SpeechDataModule:
    """The data module of a downstream config."""
    if corpus.sample_rate != features.sample_rate:
        raise ValueError(
            f"the corpus is at {corpus.sample_rate} Hz and the upstream at {features.sample_rate} Hz: "
            f"set data.prepare.sample_rate={features.sample_rate}"
        )
    return SpeechDataModule(
        corpus,
        cfg.downstream.task,
        labels=instantiate(cfg.downstream.labels, features=features),
        new_speakers=cfg.downstream.new_speakers,
        label_fraction=cfg.data.label_fraction,
        **data_options(cfg),
    )


def bootstrap(cfg: DictConfig, data: SpeechDataModule) -> Bootstrap:
    """How the test is resampled for confidence intervals. The config of an older run has no say in it."""
    settings = cfg.downstream.get("bootstrap")
    speakers = {cut.id: speaker_of(cut) for cut in data.cuts("test")}
    return Bootstrap.choose(settings and plain(settings), cfg.seed, speakers, lambda: map(speaker_of, data.cuts("train")))


def train(cfg: DictConfig, upstream: Upstream, corpus: PreparedCorpus, resumed: Resumed | None = None) -> dict[str, Any]:
    """Train on one upstream, or go on, test the best checkpoint, write what came of it to ``cfg.run_dir``; the metrics."""
    run, task = Path(cfg.run_dir), cfg.downstream
    if resumed is not None and has_metrics(run, cfg):
        metrics = read_results(run / "metrics.json")
        say(f"done    {describe(metrics, run, [])}")
        return metrics
    check_tasks_precision(cfg.trainer.precision)
    trainer = make_trainer(cfg)
    if isinstance(trainer.strategy, ShardedStrategy):
        raise ValueError("trainer=fsdp shares out the parameters of pre-training alone: set trainer=ddp or trainer=gpu")
    data = task_data(cfg, corpus, upstream.features)
    if isinstance(upstream, FeaturesUpstream):
        upstream.fit((batch["waveforms"], batch["lengths"]) for batch in data.ordered_loader("train"))
    pl.seed_everything(cfg.seed, verbose=False)
    module = new_module(cfg, upstream, data.classes)
    module.objective.check(data.cuts("test").ids)
    resampling = bootstrap(cfg, data)
    source: pl.LightningDataModule = data
    if task.cache and not task.train_encoder:
        device = trainer.strategy.root_device
        with trainer.precision_plugin.forward_context():  # as if they were computed in every step
            source = CachedStates(data, module.upstream, device, layers=module.layers, batch_size=task.batch_size)
    with how_to_go_on(trainer, run), batches_that_fit(trainer):
        if resumed is None:
            trainer.fit(module, source)
        else:
            go_on(trainer, module, source, resumed)
        if store_of(trainer) is not None:
            save_last(trainer, module, run, cfg.optimizer.lr)
        hand_over_average(trainer, module)
    store = store_of(trainer)
    best = store.best_path if store else None  # trainer.fast_dev_run keeps none
    score = store.best_score if store and best else trainer.callback_metrics.get(f"valid/{task.monitor}")
    if score is None:
        raise ValueError("training ended before its first validation: lower trainer.val_check_interval, or train longer")
    # Before a checkpoint is tested, which brings its own counts. A run of an earlier version counts no costs.
    stopped = stopped_early(trainer)
    counted = [each for each in trainer.callbacks if isinstance(each, Throughput)]  # type: ignore[attr-defined]
    costs = counted[0].costs(trainer.strategy.root_device) if counted else {}
    with how_to_go_on(trainer, run):
        metrics = test(trainer, module, source, best)
    resampled = resampling.intervals(module.objective.measured(), metrics)
    draws = resampled.pop("draws", {})
    metrics |= (
        resampled
        | {
            f"valid/{task.monitor}": float(score),
            "task": task.task,
            "monitor": task.monitor,
            "upstream": str(cfg.upstream._target_).rpartition(".")[2],
            "layers": chosen_layers(cfg),
            "fine_tuned": task.top_layers or task.train_encoder,
            "train_utterances": len(data.training_cuts()),
            "classes": len(data.classes),
            "steps": trainer.global_step,
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
        }
        | stopped
        | costs
    )
    weights = module.layers.weights()
    if weights is not None:
        metrics["layer_weights"] = [round(weight, 4) for weight in weights.tolist()]
    first = f"test/{task.monitor}"
    title = f"{task.task}: test {figures({first: metrics[first]})}"
    files: list[str] = []
    failures = Failures()
    draws_pictures = cfg.get("plots", True)  # a run of an earlier version has no such key
    with failures.noted("tables and pictures of the test"):
        files += module.objective.write(run, title, draws_pictures)
    if trainer.is_global_zero:
        if draws:
            write_draws(run / "draws.csv", draws)
            files.append("draws.csv")
        write_json(run / "metrics.json", metrics)
        if weights is not None and draws_pictures:
            with failures.noted("layer_weights.png"):
                states = [str(state) for state in module.layers.chosen]
                plot_layer_weights(weights.tolist(), states, title, run / "layer_weights.png")
                files.append("layer_weights.png")
        for picture in (name for name in files if name.endswith(".png")):
            with failures.noted(f"{picture} in the loggers"):
                show_picture(trainer.loggers, run / picture, trainer.global_step)
        say(describe(metrics, run, files))
        failures.tell(cfg.debug)
    return metrics


def new_module(cfg: DictConfig, upstream: Upstream, classes: list[str]) -> DownstreamModule:
    """The module with which a training begins on an upstream, whose weights it copies."""
    task = cfg.downstream
    module = DownstreamModule(
        upstream=upstream.config,
        head=plain(task.head),
        objective=plain(task.objective),
        classes=classes,
        layers=chosen_layers(cfg),
        train_encoder=task.train_encoder,
        top_layers=task.top_layers,
        optimizer=plain(cfg.optimizer),
        scheduler=plain(cfg.scheduler),
        seed=cfg.seed,
    )
    module.upstream.load_state_dict(upstream.state_dict())
    return module


def chosen_layers(cfg: DictConfig) -> str | int | list[int]:
    """The hidden states that the head reads."""
    layers = cfg.downstream.layers
    return list(layers) if isinstance(layers, ListConfig) else layers


def _compare(cfg: DictConfig, control: Upstream, corpus: PreparedCorpus) -> dict[str, Any]:
    """Train a control, or the rest of it; its metrics."""
    folder = Path(cfg.run_dir)
    checkpoint = newest_checkpoint(folder) if has_checkpoints(folder) else None
    return train(cfg, control, corpus, Resumed(folder, checkpoint, cfg, cfg, [], [], cfg) if checkpoint else None)


def test(
    trainer: pl.Trainer, module: DownstreamModule, source: pl.LightningDataModule, checkpoint: str | Path | None
) -> dict[str, Any]:
    """Test metrics of a checkpoint; None: of the module as it is."""
    with batches_that_fit(trainer):
        (metrics,) = trainer.test(module, source, ckpt_path=checkpoint, weights_only=True, verbose=False)
    return dict(metrics)


def figures(metrics: dict[str, Any]) -> str:
    """The test's metrics in words, with their intervals in brackets; rates in per cent."""
    return ", ".join(
        f"{name.removeprefix('test/')} {cell(name, value)}{'%' if is_rate(name) else ''}{bracket(name, metrics)}"
        for name, value in metrics.items()
        if name.startswith("test/")
    )


def describe(metrics: dict[str, Any], run: Path, files: list[str]) -> str:
    """The result in a few lines."""
    sizes = f"{metrics['task']}, {metrics['classes']} classes, {metrics['train_utterances']} training utterances"
    ci = {"ci": in_words(metrics["bootstrap"], metrics["intervals"])} if "bootstrap" in metrics else {}
    return table(
        {
            "test": f"{figures(metrics)} ({sizes})",
            **ci,
            **stop_line(metrics),
            "run": f"{run}: {', '.join(['metrics.json', *files, *([str(BEST)] if (run / BEST).is_file() else [])])}",
        }
    )


def _check(cfg: DictConfig) -> None:
    """Refuse what would only be noticed after training."""
    if cfg.trainer.val_check_interval > cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches:
        raise ValueError(
            f"trainer.val_check_interval={cfg.trainer.val_check_interval} comes after the last step, "
            f"trainer.max_steps={cfg.trainer.max_steps}: lower it, since the best validation chooses the checkpoint"
        )
    if cfg.data.get("global_batch_s") is not None and cfg.downstream.cache and not cfg.downstream.train_encoder:
        raise ValueError(
            f"data.global_batch_s={cfg.data.global_batch_s:g} has no effect on kept states, whose batches have "
            "downstream.batch_size utterances: set downstream.cache=false, or drop it"
        )
    if cfg.downstream.batch_size < 1:
        raise ValueError(f"downstream.batch_size must be at least 1, found {cfg.downstream.batch_size}")
    if str(cfg.upstream._target_).endswith(".FeaturesUpstream"):
        if cfg.downstream.train_encoder:
            raise ValueError("upstream=features has nothing to train: drop downstream.train_encoder=true")
        if cfg.compare:
            raise ValueError("compare=true sets an encoder beside features and itself untrained: choose another upstream")


def _features_control(cfg: DictConfig, upstream: Upstream) -> FeaturesUpstream:
    """The features that the encoder sees, or else ``cfg.features``."""
    control = cfg.downstream.features_control
    return FeaturesUpstream(upstream.config.get("features") or plain(cfg.features), control.context, control.cmvn)


def _control_config(cfg: DictConfig, control: Upstream, folder: Path) -> DictConfig:
    """The config of a control's run, which is kept in its folder as every run's is."""
    changed = cfg.copy()
    with open_dict(changed):
        changed.run_dir, changed.compare, changed.logger = str(folder), False, {}
        if isinstance(control, FeaturesUpstream):
            changed.upstream = control.config
            changed.downstream.head = OmegaConf.merge(cfg.downstream.head, cfg.downstream.features_control.head)
            changed.downstream.update({"layers": "last", "train_encoder": False, "top_layers": None, "cache": False})
        else:
            changed.upstream = {
                "_target_": "audiot.downstream.upstream.untrained_upstream",
                "upstream": cfg.upstream,
                "seed": cfg.seed,
            }
    write_config(changed, folder)
    return changed


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("finetune", sys.argv[1:])
