"""``audiot analyze``: pictures of a pre-training run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from audiot.analysis.plots import plot_attention, plot_probes, plot_training
from audiot.attention.table import TableSynthesizer
from audiot.base.console import say
from audiot.base.failures import Failures
from audiot.base.quoting import argument
from audiot.checkpoint import AudioEncoder
from audiot.data.batches import Batch
from audiot.data.datamodule import SpeechDataModule
from audiot.data.opening import data_options, open_corpus
from audiot.model import Encoder
from audiot.pretraining import MaskedAcousticModel
from audiot.runs import newest_checkpoint, read_results, run_config


@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Draw curves, probes, an utterance's reconstruction, its attention, keys and tables beside the untrained model's.

    Raises:
        ValueError: something can't be read; or pictures failed, which is told after the others are drawn.
    """
    run = Path(cfg.run)
    settings = run_config(run, cfg.data.prepare.when, trusted=cfg.trusted)
    if "downstream" in settings:
        raise ValueError(f"run={run} is a run of finetune, analyze draws runs of pretrain: see {run / 'confusion.png'}")
    module = MaskedAcousticModel.from_checkpoint(newest_checkpoint(run), cfg.trusted)
    data = SpeechDataModule(open_corpus(settings, run), "pretrain", crop_s=settings.data.crop_s, **data_options(settings))
    batch = utterance(data, cfg.utterance)
    plots = run / "plots"
    name = batch["ids"][0]
    failures = Failures()
    picture = module.objective.picture
    with failures.noted(picture):
        module.objective.draw(module.view(batch), f"{name}, step {module.trained_steps}", plots / picture)
    tokens, _ = module.model.features(batch["waveforms"], batch["lengths"])
    tokens = module.model.features.embed(tokens)  # both encoders read what the trained front end gives
    torch.manual_seed(settings.seed)
    fresh = AudioEncoder(**module.model.config).eval()
    untrained, trained = fresh.encoder, module.model.encoder
    mechanism = trained.layer(0).attention.mechanism
    if trained.has_weights:
        with failures.noted("attention.png, attention-untrained.png"):
            draw_both(untrained, trained, tokens, name, plots)
    else:
        say(f"no picture of attention: {type(mechanism).__name__} has no weights")
    if isinstance(mechanism, TableSynthesizer):
        with failures.noted("patterns.png"):
            draw_tables(untrained, trained, plots / "patterns.png")
    if (run / "metrics.csv").is_file():
        with failures.noted("training.png"):
            plot_training(run / "metrics.csv", plots / "training.png", module.objective)
    summary = read_results(run / "summary.json") if (run / "summary.json").is_file() else {}
    if any(key.startswith(("probe/", "finetune/")) for key in summary):
        with failures.noted("probes.png"):
            plot_probes(summary, plots / "probes.png")
    for path in sorted(plots.glob("*.png")):
        if "step" not in path.name:
            say(str(path))
    trust = [argument("trusted", list(cfg.trusted))] if cfg.trusted else []
    say(" ".join(["next:   audiot evaluate", argument("run", run), *trust]))
    failures.tell(cfg.debug)
    if failures.reasons:
        raise ValueError(f"not drawn in {plots}: {', '.join(failures.reasons)}")


def draw_both(untrained: Encoder, trained: Encoder, tokens: Tensor, name: str, plots: Path) -> None:
    """Draw an utterance's attention in both models; the untrained one is random, whatever the run began with."""
    draw_attention(trained, tokens, f"trained model, {name}", plots / "attention.png")
    draw_attention(untrained, tokens, f"untrained model, {name}", plots / "attention-untrained.png")


def draw_attention(encoder: Encoder, tokens: Tensor, title: str, path: Path) -> None:
    """Draw an utterance's attention weights, and beside them, in ``…-keys.png``, the keys where the mechanism chooses some."""
    layers = encoder.attention_inputs(tokens)
    plot_attention([attention.weights(hidden)[0] for attention, hidden in layers], f"Attention, {title}", path)
    chosen = [keys[0] for attention, hidden in layers if (keys := attention.chosen_keys(hidden)) is not None]
    if chosen:
        share = torch.stack(chosen).float().mean()
        heading = f"Keys that each frame may attend to (bright, {share:.0%} of all pairs), {title}"
        plot_attention(chosen, heading, path.with_name(f"{path.stem}-keys.png"))


def draw_tables(untrained: Encoder, trained: Encoder, path: Path) -> None:
    """Draw the tables of a random synthesizer, which no utterance changes: an untrained model's and the trained ones."""
    start = untrained.layer(0).attention.mechanism
    assert isinstance(start, TableSynthesizer)
    num_frames = trained.max_frames
    frames = torch.zeros(1, num_frames, trained.embed_dim)
    tables = [trained.layer(index).attention.mechanism.weights(hidden=frames)[0] for index in range(trained.num_layers)]
    rows = ["untrained", *(f"layer {index + 1}" for index in range(trained.num_layers))]
    known = start.head_names
    columns = [f"head {head + 1}: {known[head]}" if head < len(known) else f"head {head + 1}" for head in range(start.num_heads)]
    heading = f"Attention tables of {num_frames} frames, the same for every utterance"
    plot_attention([start.weights(hidden=frames)[0], *tables], heading, path, rows, columns)


def utterance(data: SpeechDataModule, name: str | None) -> Batch:
    """A batch of one validation utterance: the one called ``name``, or the first."""
    for batch in data.ordered_loader("valid"):
        number = 0 if name is None else batch["ids"].index(name) if name in batch["ids"] else None
        if number is not None:
            length = int(batch["lengths"][number])
            one = {key: value[number : number + 1] for key, value in batch.items() if key != "position"}
            return one | {"waveforms": one["waveforms"][:, :length]}
    raise ValueError(f"utterance={name}: no such utterance in the validation split")


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("analyze", sys.argv[1:])
