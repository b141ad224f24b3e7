"""``audiot export-hf``: write an encoder as a model of Hugging Face transformers, with a model card."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from audiot.base.quoting import path, quoted
from audiot.checkpoint import AudioEncoder, load_encoder
from audiot.following import demo_command, finetune_command
from audiot.interop.hf_model import AudiotFeatureExtractor, AudiotModel, quiet
from audiot.positions import Learned
from audiot.runs import choices, has_config, read_results, run_config

from huggingface_hub import EvalResult, ModelCardData  # isort: skip  # after audiot.interop.hf_model, which says how to install it

USAGE = """import torch, transformers
import audiot.huggingface  # pip install 'audiot[hf]': makes the model type known to transformers
{trust}
model = transformers.AutoModel.from_pretrained({literal}).eval()  # a folder, or USER/{name} on the hub
extractor = transformers.AutoFeatureExtractor.from_pretrained({literal})
waveforms = [torch.randn({rate}).numpy(), torch.randn({shorter}).numpy()]  # mono, {rate} Hz, in [-1, 1]
inputs = extractor(waveforms, sampling_rate={rate}, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs, output_hidden_states=True)
output.last_hidden_state  # (2, frames, {width}); output.hidden_states has {states} of these"""


def main(options: argparse.Namespace) -> None:
    """Write the folder and say what is in it."""
    AudiotModel.trusted = tuple(options.trust)
    run, sample_rate = export(options.encoder, options.folder, options.license, tuple(options.trust))
    print(f"wrote   {options.folder}: {', '.join(sorted(path.name for path in options.folder.iterdir()))}")
    if options.license is None:
        print("licence not stated: write the one that the weights are under into README.md, or export again with --license")
    print(f"publish hf upload {quoted(f'USER/{options.folder.resolve().name}')} {path(options.folder)}")
    following = finetune_command(run, options.folder, "hf") if run else demo_command(options.folder, sample_rate, "hf")
    print(f"next:   {following}")


def export(encoder: Path, folder: Path, license_id: str | None = None, trust: tuple[str, ...] = ()) -> tuple[Path | None, int]:
    """Write the model, its feature extractor and its card to a folder, whole or not at all.

    Args:
        encoder: Folder of the encoder, or of the run that it is in.
        folder: Not there yet, or empty.
        license_id: The licence of the weights, as the hub calls it; None: the card says that it is not stated.
        trust: Packages from outside audiot, whose classes the encoder may name; `AudiotModel` has to trust them too.

    Returns:
        The run's folder, if the encoder is in one, and the encoder's sampling rate in Hz.

    Raises:
        ValueError: the folder is in use, or the licence is no identifier.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already, and not empty: give another folder, or remove it")
    if license_id is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_id):
        raise ValueError(f"--license={license_id} is no identifier of the hub, such as apache-2.0, cc-by-4.0 or other")
    if not (encoder / "config.json").is_file() and (encoder / "encoder" / "config.json").is_file():
        encoder = encoder / "encoder"
    loaded = load_encoder(encoder, trust)
    parent = encoder.absolute().parent
    run = parent if has_config(parent) or (parent / "summary.json").is_file() else None
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with quiet():
            AudiotModel.from_encoder(loaded).save_pretrained(temporary)
            AudiotFeatureExtractor(sampling_rate=loaded.features.sample_rate).save_pretrained(temporary)
        (temporary / "README.md").write_text(card(folder.resolve().name, loaded, run, license_id, trust), encoding="utf-8")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return run, loaded.features.sample_rate


def card(name: str, encoder: AudioEncoder, run: Path | None, license_id: str | None, trust: tuple[str, ...] = ()) -> str:
    """The model card: what the encoder is, and how its run trained and measured it, as far as there is a run.

    Args:
        name: Name of the model.
        encoder: What is exported.
        run: The run's folder; what it does not hold is left out.
        license_id: The licence of the weights, or None.
        trust: Packages from outside audiot, that whoever loads the model has to trust.
    """
    settings = run_config(run, trusted=None) if run and has_config(run) else None
    summary = read_results(run / "summary.json") if run and (run / "summary.json").is_file() else {}
    corpus = _select(settings, "data.name") or "its corpus"
    lines, results = _figures(run, summary, corpus)
    data = ModelCardData(
        library_name="audiot",
        license=license_id,
        pipeline_tag="feature-extraction",
        tags=[
            "audiot",
            "transformers",
            "audio",
            "speech",
            "self-supervised-learning",
            *(["masked-acoustic-model"] if run else []),
        ],
        model_name=name,
        eval_results=results or None,
    )
    rate, model = encoder.features.sample_rate, encoder.encoder
    literal = json.dumps(name, ensure_ascii=False)  # of Python too
    usage = USAGE.format(
        trust=f"audiot.huggingface.AudiotModel.trusted += {trust!r}  # packages to install\n" if trust else "",
        name=name,
        literal=literal,
        rate=rate,
        shorter=rate // 2,
        width=model.embed_dim,
        states=model.num_layers + 1,
    )
    training = _training(settings, choices(run) if run else {}, summary)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"An audio encoder, waveforms at {rate} Hz to hidden states of width {model.embed_dim}"
        + (", pre-trained with audiot as a masked acoustic model." if run else ", made with audiot."),
        f"## Use\n\n```python\n{usage}\n```",
        "An utterance gives the same states alone and in a padded batch.",
        f"## Model\n\n{_table(_description(encoder))}",
        f"## Training\n\n{_table(training)}" if training else "",
        DEMO if corpus == "demo" else "",
        "## Figures\n\n" + "\n".join(lines) if lines else "",
        f"## Licence\n\nThe weights are under the licence `{license_id}`." if license_id else f"## Licence\n\n{NO_LICENSE}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


NO_LICENSE = "The licence of these weights is not stated."
DEMO = "The corpus is synthetic speech, spoken by eSpeak NG: no recording of a person is in it."


def _description(encoder: AudioEncoder) -> dict[str, str]:
    """What the encoder's own config says."""
    features, model = encoder.config["features"], encoder.config["model"]
    step = 1000 * encoder.features.hop_length * encoder.features.stack / encoder.features.sample_rate
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    mechanisms, positions = encoder.encoder.mechanisms, encoder.encoder.positions
    limited = (each.max_frames for each in mechanisms if each.max_frames)
    longest = next(limited, positions.max_frames if isinstance(positions, Learned) else None)
    shared = ", which share their parameters" if model.get("share_layers") else ""
    return {
        "features": _call(features),
        "states": f"one every {step:g} ms",
        "layers": f"{model['num_layers']}{shared}, {model['num_heads']} heads, feed-forward width {model['ffn_dim']}, "
        f"{model.get('norm', 'post')}-LN",
        "attention": _attention(model),
        "positions": _call(model["positions"]),
        "longest input": f"{longest} states" if longest else "any",
        "parameters": f"{parameters / 1e6:.2f} M",
    }


def _attention(model: Mapping[str, Any]) -> str:
    if not model.get("other_layers"):
        return _call(model["attention"])
    numbers = ", ".join(str(index + 1) for index in model["other_layers"])
    return f"{_call(model['attention'])}; {_call(model['other_attention'])} in layer {numbers}"


def _training(settings: DictConfig | None, choices: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str]:
    """What the run's config says of training: names and numbers, no paths."""
    rows: dict[str, str] = {}
    if settings is not None:
        crop, batch, hours = (_select(settings, f"data.{key}") for key in ("crop_s", "batch_s", "hours"))
        objective, optimizer = (_select(settings, key) for key in ("objective", "optimizer"))
        subsets = _select(settings, "data.pretrain")
        named = f" ({', '.join(map(str, subsets))})" if isinstance(subsets, ListConfig) else ""
        rows["corpus"] = f"{_select(settings, 'data.name')}{named}" + (f", {hours:g} h" if hours else "")
        rows["batches"] = f"{batch:g} s of audio, in pieces of at most {crop:g} s" if crop else f"{batch:g} s of audio"
        rows["objective"] = ", ".join(part for part in (choices.get("objective"), _call(objective)) if part)
        rows["optimiser"] = _call(optimizer)
        rows["precision"] = str(summary.get("precision") or _select(settings, "trainer.precision"))
        rows["seed"] = str(_select(settings, "seed"))
        if _select(settings, "init"):
            rows["start"] = "another encoder's weights"
    if "steps" in summary:
        rows["steps"] = f"{summary['steps']:,}"
    if "wall_s" in summary:
        rows["time"] = f"{summary['wall_s']:.0f} s, probes included, {summary['frames_per_s']:,} frames/s in training"
    return rows


def _figures(run: Path | None, summary: Mapping[str, Any], corpus: str) -> tuple[list[str], list[EvalResult]]:
    """What the run measured: lines for the card, and the encoder's own results for its header."""
    lines: list[str] = []
    results: list[EvalResult] = []
    if "pretrain/val_l1" in summary:
        loss, zero, between = (summary[f"pretrain/{name}"] for name in ("val_l1", "zero_l1", "interpolation_l1"))
        lines += [
            f"Validation L1 of the masked frames: {loss:.3f} (zeros in their place {zero:.3f}, interpolation {between:.3f})."
        ]
        results.append(_result(corpus, "validation", "masked-acoustic-modeling", "l1", "L1 of the masked frames", loss))
    if "pretrain/val_cross_entropy" in summary:
        loss, unigram, chance = (summary[f"pretrain/{name}_cross_entropy"] for name in ("val", "unigram", "chance"))
        lines += [f"Validation cross-entropy of the masked codes: {loss:.3f} nats (unigram {unigram:.3f}, chance {chance:.3f})."]
        what = ("cross-entropy", "cross-entropy of the masked codes, nats")
        results.append(_result(corpus, "validation", "masked-acoustic-modeling", *what, loss))
    measured: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in summary.items():
        if key.startswith(("probe/", "finetune/")):
            kind, task_name, column = key.split("/")
            measured.setdefault((kind, task_name), {})[column] = value
    if measured:
        found = dict.fromkeys(column for row in measured.values() for column in row)
        columns = sorted(found, key=lambda column: ("encoder", "random").index(column) if column in ("encoder", "random") else 2)
        titles = [{"encoder": "this encoder", "random": "untrained"}.get(column, column.replace("_", " ")) for column in columns]
        lines += ["", f"| test, % | {' | '.join(titles)} |", "|---|" + "---:|" * len(columns)]
    for (kind, task_name), row in measured.items():
        path = Path(run or "") / "probes" / f"{kind}-{task_name}-{next(iter(row))}" / "metrics.json"
        metrics = read_results(path) if path.is_file() else {}
        metric = metrics.get("monitor", "accuracy")
        how = f"{task_name}, {'frozen' if kind == 'probe' else 'fine-tuned'}"
        count = f", {metrics['train_utterances']:,} training utterances" if "train_utterances" in metrics else ""
        cells = [f"{100 * row[column]:.1f}" if column in row else "" for column in columns]
        lines.append(f"| {how}, {metric}{count} | {' | '.join(cells)} |")
        if "encoder" in row:
            results.append(_result(corpus, "test", "audio-classification", metric, f"{how}: {metric}", row["encoder"]))
    return lines, results


def _result(corpus: str, split: str, task: str, metric: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=corpus,
        dataset_name=corpus,
        dataset_split=split,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 4),
    )


def _select(settings: DictConfig | None, key: str) -> Any:
    """A value of a run's config, None if it has none."""
    return None if settings is None else OmegaConf.select(settings, key)


def _call(config: Any) -> str:
    """A part's config in words: its class, and its parameters that are plain values."""
    values = {
        key: value for key, value in config.items() if not key.startswith("_") and isinstance(value, (bool, int, float, str))
    }
    name = str(config["_target_"]).rpartition(".")[2]
    return f"{name} ({', '.join(f'{key} {value}' for key, value in values.items())})" if values else name


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
