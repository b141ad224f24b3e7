"""``audiot abx``: how well the layers of an encoder tell phones apart, and how much their clusters say of phones."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from audiot.analysis.plots import plot_measures
from audiot.base.config import plain
from audiot.base.console import say, table
from audiot.base.devices import find_device
from audiot.base.failures import Failures
from audiot.base.files import write_csv, write_json
from audiot.base.quoting import argument, path, quoted
from audiot.base.tables import aligned
from audiot.commands.extract import chosen_layers, find_utterances
from audiot.data.labels import SILENCE
from audiot.data.opening import note_data, open_corpus
from audiot.data.prepare import PreparedCorpus
from audiot.downstream.bootstrap import in_words, write_draws
from audiot.downstream.upstream import FeaturesUpstream, Upstream
from audiot.extraction.extract import Utterance
from audiot.extraction.states import Failures as Unreadable
from audiot.following import same_data
from audiot.measures.abx import SPEAKERS, Unit
from audiot.measures.measure import Settings, abx_error, measure
from audiot.measures.units import item_units, recording_units, tier_units
from audiot.runs import choices, run_overrides, write_config

COLUMNS = {"pnmi": "PNMI", "phone_purity": "phone purity", "cluster_purity": "cluster purity", "perplexity": "perplexity"}
FOLLOWING = ("upstream", "features", "positions", "attention", "model")  # settings that name the upstream


def main(cfg: DictConfig) -> float:
    """Measure every layer and, beside them, the features; the least ABX error, for a sweep that searches."""
    run = Path(cfg.run_dir)
    write_config(cfg, run)
    given = {name: cfg[name] for name in Settings.__dataclass_fields__ if name not in ("batch_s", "bootstrap")}
    settings = Settings(**given, batch_s=cfg.data.batch_s, bootstrap=plain(cfg.bootstrap))
    device = find_device(cfg.device, f"no device {cfg.device!r} here")
    upstream: Upstream = instantiate(cfg.upstream, _recursive_=False, _convert_="all")  # before a corpus is prepared for nothing
    text = ",".join(map(str, cfg.layers)) if isinstance(cfg.layers, ListConfig) else str(cfg.layers)
    layers = chosen_layers(text, upstream.num_states, "layers")
    units, utterances, corpus = find_units(cfg)
    silent = sum(unit.silent for unit in units)
    seconds = sum(utterance.seconds for utterance in utterances)
    say(f"units   {len(units) - silent:,} of {len(utterances):,} utterances, {seconds / 3600:.2f} h")
    measured = measure(upstream, utterances, units, layers, settings, device)
    rows, draws = measured.layers, measured.draws
    control = None
    if cfg.compare and not isinstance(upstream, FeaturesUpstream):
        features = FeaturesUpstream(upstream.config.get("features") or plain(cfg.features), context=1)
        beside = measure(features, utterances, units, [0], settings, device)
        (control,) = beside.layers
        del control["layer"]
        draws = {f"features{name.removeprefix('0')}": values for name, values in beside.draws.items()} | draws
    given = {name: cfg[name] for name in ("item", "audio", "tier", "field", "split")}
    about = {"settings": asdict(settings) | given, "compared": measured.compared, "bootstrap": measured.bootstrap}
    write_json(run / "abx.json", {**about, "layers": rows, "features": control})
    named = [*([{"layer": "features", **control}] if control else []), *rows]
    write_csv(run / "abx.csv", map(flat, named))
    failures = Failures()
    files = ["abx.json", "abx.csv"]
    if draws:
        write_draws(run / "draws.csv", draws)
        files.append("draws.csv")
    if cfg.plots:
        with failures.noted("abx.png"):
            plot_measures(rows, control, f"{settings.distance} distance, context: {settings.context}", run / "abx.png")
            files.append("abx.png")
    say("\n" + describe(named, measured.bootstrap))
    best = min(rows, key=abx_error)
    lines = {"best": f"layer {best['layer']}, ABX error {100 * abx_error(best):.2f}%", "run": f"{run}: {', '.join(files)}"}
    if lost := measured.compared["units_without_frames"]:
        lines = {"left out": f"{lost:,} units, too short to hold the middle of a frame"} | lines
    say("\n" + table(lines))
    failures.tell(cfg.debug)
    say(f"next:   {next_command(cfg, best['layer'], corpus, upstream)}")
    return abx_error(best)


def find_units(cfg: DictConfig) -> tuple[list[Unit], list[Utterance], PreparedCorpus | None]:
    """The units to compare, the utterances that they are in, and the prepared corpus unless ``audio`` names a folder.

    Raises:
        ValueError: settings exclude each other, or an utterance of the item file is not there.
        FileNotFoundError: the item file or the audio is missing.
    """
    if cfg.audio is not None and cfg.item is None:
        raise ValueError(f"audio={cfg.audio} is for an item file, which says what is in it: set item=FILE, or choose data=…")
    if cfg.item is not None and cfg.field is not None:
        raise ValueError("item and field both say what the units are: set one of them")
    silences = {SILENCE, *cfg.silences}
    units = [] if cfg.item is None else item_units(cfg.item, silences)
    if cfg.audio is not None:
        unreadable: Unreadable = {}
        utterances = find_utterances([cfg.audio], unreadable)
        units = matched(units, utterances, f"{cfg.audio}", unreadable)
        return units, in_use(units, utterances), None
    corpus = open_corpus(cfg)
    note_data(cfg, corpus)
    split = corpus.split_for(cfg.field or "phone", cfg.split)
    utterances = find_utterances([str(corpus.directory / f"{split}.jsonl.gz")], {})
    if cfg.item is not None:
        units = matched(units, utterances, f"the split {split} of {corpus.directory}", {})
    elif cfg.field is not None:
        units = recording_units(corpus.cuts(split), cfg.field)
    else:
        units = tier_units(corpus.cuts(split), cfg.tier, silences)
    return units, in_use(units, utterances), corpus


def in_use(units: Sequence[Unit], utterances: Sequence[Utterance]) -> list[Utterance]:
    """The utterances that hold units."""
    used = {unit.utterance for unit in units}
    return [utterance for utterance in utterances if utterance.id in used]


def matched(units: Sequence[Unit], utterances: Sequence[Utterance], where: str, unreadable: Unreadable) -> list[Unit]:
    """Units of an item file with the ids of utterances, which it may name by the last part of their path alone.

    Raises:
        ValueError: an utterance is not there, or its name is not the only one.
    """
    ids = {utterance.id: utterance.id for utterance in utterances}
    last: dict[str, list[str]] = {}
    for name in ids:
        last.setdefault(name.rpartition("/")[2], []).append(name)
    found = []
    for unit in units:
        named = [ids[unit.utterance]] if unit.utterance in ids else last.get(unit.utterance, [])
        if len(named) != 1:
            reasons = [reason for name, reason in unreadable.items() if Path(name).stem == unit.utterance]
            why = f"can't be used: {reasons[0]}" if reasons else f"is there {len(named)} times" if named else "is not there"
            raise ValueError(f"the item file names the utterance {unit.utterance!r}, which {why} ({where})")
        found.append(Unit(**{**vars(unit), "utterance": named[0]}))
    return found


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's figures as a row of a table."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            cells |= {name if part == "error" else f"{name}_{part}": figure for part, figure in value.items()}
        else:
            cells[name] = value
    return cells


def describe(rows: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> str:
    """Table of the figures for the terminal.

    Args:
        rows: Figures of the features and the layers.
        how: How the intervals were computed.
    """
    speakers = [speaker for speaker in SPEAKERS if speaker in rows[0]]
    others = [name for name in COLUMNS if name in rows[0]]
    lines = [["layer", *(f"{speaker}, %" for speaker in speakers), *(COLUMNS[name] for name in others)]]
    intervals = {}
    for row in rows:
        cells = []
        for speaker in speakers:
            error, *ends = (row[speaker][part] for part in ("error", "low", "high"))
            if None not in ends:
                intervals[f"{row['layer']}/{speaker}"] = ends
            cells.append(f"{100 * error:.2f}" + (f" ({100 * ends[0]:.2f} to {100 * ends[1]:.2f})" if None not in ends else ""))
        lines.append([str(row["layer"]), *cells, *(f"{row[name]:.{1 if name == 'perplexity' else 3}f}" for name in others)])
    brackets = f"{'; in brackets' if intervals else '; intervals:'} {in_words(how, intervals)}" if how else ""
    return f"ABX error by layer, 50% is chance{brackets}\n{aligned(lines)}"


def next_command(cfg: DictConfig, layer: int, corpus: PreparedCorpus | None, upstream: Upstream) -> str:
    """What to run next: a probe of the best layer, or the extraction of its states."""
    run = Path(cfg.run_dir)
    given = [override for override in run_overrides(run) if override.split("=")[0].split(".")[0] in FOLLOWING]
    if corpus is not None and cfg.item is None:
        if cfg.field is None:
            task = ["downstream=phone_linear", *([] if cfg.tier == "phone" else [argument("downstream.labels.tier", cfg.tier)])]
        else:
            own = [] if cfg.field == "keyword" else [argument("downstream.labels.field", cfg.field)]
            task = ["downstream=keyword", *own]
        chosen = [] if isinstance(upstream, FeaturesUpstream) else [argument("downstream.layers", [layer])]
        return " ".join(["audiot finetune", *task, *map(quoted, given), *chosen, *same_data(run)])
    source = corpus.directory if corpus is not None else cfg.audio
    kind = choices(run).get("upstream", "checkpoint")
    if kind in ("checkpoint", "s3prl", "hf"):
        flags = [*([] if kind == "checkpoint" else [f"--upstream {kind}"]), f"--layers={layer}"]
        flags += [f"--trust {name}" for name in cfg.upstream.get("trusted", [])]
        return " ".join(["audiot extract", path(source), path(run / "states"), "--encoder", path(cfg.upstream.path), *flags])
    if corpus is not None:
        return " ".join(["audiot pretrain", *same_data(run)])
    return " ".join(["audiot pretrain data=folder", argument("data.root", cfg.audio)])


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("abx", sys.argv[1:])
