"""``audiot analyze``: pictures of a pre-training run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from audiot.analysis.plots import plot_attention, plot_probes, plot_reconstruction, plot_training
from audiot.commands.common import data_options, open_corpus, say
from audiot.commands.evaluate import load_pretraining, run_config
from audiot.data.batches import Batch
from audiot.data.datamodule import SpeechDataModule
from audiot.files import read_json
from audiot.pretraining import MaskedAcousticModel


@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Draw curves, probes, one utterance's reconstruction, and its attention before and after training."""
    run = Path(cfg.run)
    settings = run_config(run)
    if "downstream" in settings:
        raise ValueError(f"run={run} is a run of finetune, analyze draws runs of pretrain: see {run / 'confusion.png'}")
    module = load_pretraining(run).eval()
    data = SpeechDataModule(open_corpus(settings), "pretrain", crop_s=settings.data.crop_s, **data_options(settings))
    batch = utterance(data, cfg.utterance)
    plots = run / "plots"
    name = batch["ids"][0]
    plot_reconstruction(module.reconstruct(batch), f"{name}, step {module.trained_steps}", plots / "reconstruction.png")
    tokens, _ = module.model.features(batch["waveforms"], batch["lengths"])
    trained = [layer[0] for layer in module.model.encoder.attention_weights(tokens)]
    plot_attention(trained, f"Attention after training, {name}", plots / "attention.png")
    torch.manual_seed(settings.seed)
    fresh = MaskedAcousticModel(**module.hparams).eval()
    fresh.model.features.load_state_dict(module.model.features.state_dict())
    untrained = [layer[0] for layer in fresh.model.encoder.attention_weights(tokens)]
    plot_attention(untrained, f"Attention before training, {name}", plots / "attention-untrained.png")
    if (run / "metrics.csv").is_file():
        plot_training(run / "metrics.csv", plots / "training.png")
    summary = read_json(run / "summary.json", "summary") if (run / "summary.json").is_file() else {}
    if any(key.startswith(("probe/", "finetune/")) for key in summary):
        plot_probes(summary, plots / "probes.png")
    for path in sorted(plots.glob("*.png")):
        if "step" not in path.name:
            say(str(path))
    say(f"next:   audiot evaluate run={run}")


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
    from audiot.launch import run as run_command

    run_command("analyze", sys.argv[1:])
