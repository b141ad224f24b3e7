"""``audiot analyze``: what a pre-training run has learned, in figures and pictures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from audiot.analysis.heads import plot_heads, plot_pruning
from audiot.analysis.plots import plot_attention, plot_probes, plot_training
from audiot.attention.table import TableSynthesizer
from audiot.base.console import say
from audiot.base.devices import find_device
from audiot.base.failures import Failures
from audiot.base.files import finished, replacing, write_json
from audiot.base.framing import SpectrogramScale
from audiot.base.quoting import argument
from audiot.checkpoint import AudioEncoder
from audiot.data.batches import Batch
from audiot.data.datamodule import SpeechDataModule, open_cuts
from audiot.data.labels import tier_of
from audiot.data.opening import data_options, open_corpus
from audiot.measures.learned import (
    Interval,
    attention_rows,
    code_figures,
    hear,
    pruning_figures,
    sampled_states,
    small_tables,
    table_rows,
    tables,
    token_seconds,
)
from audiot.model import Encoder
from audiot.pretraining import MaskedAcousticModel
from audiot.runs import has_checkpoints, newest_checkpoint, read_results, run_config


@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Measure heads, tables, pruning, codes and states, and draw them beside curves, probes and one utterance's attention.

    The model is the newest checkpoint's. Where a run has kept none, as those of a study, it is the exported encoder's.

    Raises:
        ValueError: something can't be read; or pictures failed, which is told after the others are drawn.
    """
    run = Path(cfg.run)
    settings = run_config(run, cfg.data.prepare.when, trusted=cfg.trusted)
    if "downstream" in settings:
        raise ValueError(f"run={run} is a run of finetune, analyze draws runs of pretrain: see {run / 'confusion.png'}")
    device = find_device(cfg.device, f"no device {cfg.device!r} here")
    for name, least in (("utterances", 1), ("code_utterances", 0), ("states", 1)):
        if cfg[name] < least:
            raise ValueError(f"{name} must be at least {least}, found {cfg[name]}")
    module = load(run, settings, cfg.trusted)
    data = SpeechDataModule(open_corpus(settings, run), "pretrain", crop_s=settings.data.crop_s, **data_options(settings))
    batch = utterance(data, cfg.utterance) if cfg.plots else None  # an unknown one is refused before anything is measured
    torch.manual_seed(settings.seed)
    fresh = AudioEncoder(**module.model.config).eval()
    figures, arrays, frames = measured(cfg, settings, module.to(device), fresh.to(device).encoder, data)
    for folder in dict.fromkeys((run, Path(cfg.run_dir))):  # there, a study or a sweep over runs finds it
        write_json(folder / "analysis.json", figures)
        with replacing(folder / "analysis.safetensors") as temporary:
            save_file(arrays, temporary, {"frames": frames})
    say(f"wrote   {run / 'analysis.json'}, {run / 'analysis.safetensors'}")
    for what, why in figures["absent"].items():
        say(f"absent  {what}: {why}")
    failures = Failures()
    if batch is not None:
        draw(module.cpu(), fresh.cpu().encoder, batch, figures, run, failures)
    trust = [argument("trusted", list(cfg.trusted))] if cfg.trusted else []
    say(" ".join(["next:   audiot evaluate", argument("run", run), *trust]))
    failures.tell(cfg.debug)
    if failures.reasons:
        raise ValueError(f"not drawn in {run / 'plots'}: {', '.join(failures.reasons)}")


def load(run: Path, settings: DictConfig, trusted: Sequence[str]) -> MaskedAcousticModel:
    """The module of a run, of its newest checkpoint or, where it has none, of its exported encoder.

    Raises:
        FileNotFoundError: it has neither.
        ValueError: its files are damaged.
    """
    if has_checkpoints(run) or not (run / "encoder").is_dir():
        return MaskedAcousticModel.from_checkpoint(newest_checkpoint(run), trusted)
    module = MaskedAcousticModel.from_encoder(run / "encoder", settings.seed, trusted)
    module.trained_steps = int(read_results(run / "summary.json")["steps"])
    return module


def measured(
    cfg: DictConfig, settings: DictConfig, module: MaskedAcousticModel, untrained: Encoder, data: SpeechDataModule
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The content of ``analysis.json``, the arrays beside it, and a digest of the frames of the states."""
    batches = list(data.some("valid", cfg.utterances, module.device))
    heard, token_s = hear(module, batches), token_seconds(module)
    trained, absent = module.model.encoder, {}
    kinds = " and ".join(dict.fromkeys(type(mechanism).__name__ for mechanism in trained.mechanisms))
    lengths = sorted(length for each in heard for length in each.lengths.tolist())
    found: dict[str, Any] = {"step": module.trained_steps, "utterances": len(lengths), "tokens": sum(lengths), "token_s": token_s}
    if not trained.has_weights:
        absent["heads"] = f"no weights in all layers of {kinds}"
    elif trained.chunk_frames is not None and lengths[-1] > trained.chunk_frames:
        absent["heads"] = (
            f"attention does not cross chunks of model.chunk_frames={trained.chunk_frames}, one has {lengths[-1]} frames"
        )
    else:
        found["heads"] = attention_rows(trained, heard, token_s)
        found["untrained_heads"] = attention_rows(untrained, heard, token_s)
    states, frames = sampled_states(module, batches, cfg.states)
    arrays = {"states": states}
    if all(isinstance(mechanism, TableSynthesizer) for mechanism in trained.mechanisms):
        middle = lengths[len(lengths) // 2]
        found["tables"] = table_rows(untrained, trained, middle, all_heads=begins_from_seed(settings))
        arrays["tables"] = small_tables([tables(untrained, middle)[0], *tables(trained, middle)])
    else:
        absent["tables"] = f"no tables in all layers of {kinds}"
    found["pruning"] = pruning_figures(module, batches)
    if not hasattr(module.objective, "codes"):
        absent["codes"] = f"{type(module.objective).__name__} predicts no codes"
    elif not cfg.code_utterances:
        absent["codes"] = "code_utterances=0"
    else:
        some = list(data.some("valid", cfg.code_utterances, module.device))
        phones = phones_of(data, [name for batch in some for name in batch["ids"]])
        if phones:
            found["codes"] = code_figures(module, some, phones)
        else:
            absent["codes"] = "the corpus has no alignment of phones"
    return found | {"absent": absent}, arrays, frames


def begins_from_seed(settings: DictConfig) -> bool:
    """Whether the seed alone makes the encoder that the run began with: no other encoder had a part in it."""
    objective = settings.objective
    return not settings.init and not objective.get("teacher") and objective.get("rounds", 1) == 1


def phones_of(data: SpeechDataModule, ids: Sequence[str]) -> dict[str, list[Interval]]:
    """Utterance → its phones, in seconds of the utterance; empty where the corpus has no alignment of phones."""
    corpus, wanted = data.corpus, set(ids)
    whole = open_cuts(corpus.directory, corpus.split_for(data.task, "valid"), True, corpus.content)
    cuts = [cut for cut in whole if cut.id in wanted]
    if not all(any((each.alignment or {}).get("phone") for each in cut.supervisions) for cut in cuts):
        return {}
    return {cut.id: [(start - cut.start, end - cut.start, phone) for start, end, phone in tier_of(cut, "phone")] for cut in cuts}


def draw(
    module: MaskedAcousticModel, untrained: Encoder, batch: Batch, figures: Mapping[str, Any], run: Path, failures: Failures
) -> None:
    """Draw all pictures of a run, one utterance's among them."""
    plots, name, trained = run / "plots", batch["ids"][0], module.model.encoder
    picture, features = module.objective.picture, module.model.features
    overall = f"{module.objective.label} {figures['pruning']['removed'][0]:.3f} over {figures['utterances']} utterances"
    with failures.noted(picture):
        module.objective.draw(module.view(batch), f"{name}, step {module.trained_steps}; {overall}", plots / picture)
    tokens, _ = features(batch["waveforms"], batch["lengths"])
    frames = features.spectrogram(tokens)[0]
    tokens = features.embed(tokens)  # both encoders read what the trained front end gives
    if trained.has_weights:
        with failures.noted("attention.png"):
            draw_attention(untrained, trained, tokens, frames, features.scale, name, plots)
    else:
        lacking = next(mechanism for mechanism in trained.mechanisms if not mechanism.has_weights)
        say(f"no picture of attention: {type(lacking).__name__} has no weights")
    if "heads" in figures:
        with failures.noted("heads.png"):
            plot_heads(figures["heads"], figures["untrained_heads"], plots / "heads.png")
    if all(isinstance(mechanism, TableSynthesizer) for mechanism in trained.mechanisms):
        with failures.noted("patterns.png"):
            draw_tables(untrained, trained, features.scale, plots / "patterns.png")
    with failures.noted("pruning.png"):
        plot_pruning(figures["pruning"], module.objective.label, plots / "pruning.png")
    if (run / "metrics.csv").is_file():
        with failures.noted("training.png"):
            plot_training(run / "metrics.csv", plots / "training.png", module.objective)
    summary = read_results(run / "summary.json") if (run / "summary.json").is_file() else {}
    if any(key.startswith(("probe/", "finetune/")) for key in summary):
        with failures.noted("probes.png"):
            plot_probes(summary, plots / "probes.png")
    for path in finished(plots, "*.png"):
        if "step" not in path.name:
            say(str(path))


def draw_attention(
    untrained: Encoder, trained: Encoder, tokens: Tensor, frames: Tensor, scale: SpectrogramScale, name: str, plots: Path
) -> None:
    """Draw an utterance's attention weights, each layer trained and untrained, in ``attention.png``.

    ``attention-keys.png`` has the keys where the mechanism chooses some. The untrained model is random, whatever the run began
    with.
    """
    weights, keys, shares = {}, {}, {}
    for who, encoder in (("trained", trained), ("untrained", untrained)):
        for number, (attention, hidden) in enumerate(encoder.attention_inputs(tokens), 1):
            weights[number, who] = attention.weights(hidden)[0]
            chosen = attention.chosen_keys(hidden)
            if chosen is not None:
                keys[number, who] = chosen[0]
        chosen_here = [value for (_, model), value in keys.items() if model == who]
        if chosen_here:
            shares[who] = f"{torch.stack(chosen_here).float().mean():.0%} {who}"
    heading = f"Attention, {name}\ntrained and untrained maps have one scale"
    plot_attention(paired(weights), scale, heading, plots / "attention.png", frames, groups=2)
    if keys:
        heading = f"Keys that each frame may attend to, {name}\nbright, of all pairs: {', '.join(shares.values())}"
        plot_attention(paired(keys), scale, heading, plots / "attention-keys.png", frames, groups=2)


def paired(maps: Mapping[tuple[int, str], Tensor]) -> dict[str, Tensor]:
    """Name of a row → its maps, each layer's trained ones first."""
    return {f"layer {number}\n{who}": maps[number, who] for number, who in sorted(maps)}


def draw_tables(untrained: Encoder, trained: Encoder, scale: SpectrogramScale, path: Path) -> None:
    """Draw the tables of a random synthesizer, which no utterance changes: an untrained model's and the trained ones.

    Args:
        untrained, trained: The encoders.
        scale: Where frames lie.
        path: Path of the PNG.
    """
    start = untrained.layer(0).attention.mechanism
    assert isinstance(start, TableSynthesizer)
    num_frames = trained.max_frames
    frames = torch.zeros(1, num_frames, trained.embed_dim)
    tables = {"untrained": start.weights(hidden=frames)[0]}
    for number, mechanism in enumerate(trained.mechanisms, 1):
        tables[f"layer {number}"] = mechanism.weights(hidden=frames)[0]
    known = start.head_names
    columns = [f"head {head + 1}: {known[head]}" if head < len(known) else f"head {head + 1}" for head in range(start.num_heads)]
    heading = f"Attention tables of {num_frames} frames, the same for every utterance\neach head has one scale"
    plot_attention(tables, scale, heading, path, columns=columns, groups=len(tables))


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
