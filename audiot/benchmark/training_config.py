"""The configurations of pre-training that the training benchmark measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from audiot.attention.mechanism import check_type
from audiot.base.groups import options
from audiot.benchmark.entries import Entry
from audiot.benchmark.settings import check_choices
from audiot.benchmark.training_results import SCOPES
from audiot.features import Features

NUM_SPEAKERS = 16  # of the demo speech


@dataclass(frozen=True)
class ModelEntry:
    """A model to measure.

    Args:
        name: Name of its file in `conf/model`.
        overrides: Overrides of ``audiot pretrain`` for this model alone.
        shapes: Shapes for this model instead of the benchmark's.
        dropouts: Dropouts for this model instead of the benchmark's.
        scopes: Scopes for this model instead of the benchmark's.
    """

    name: str
    overrides: tuple[str, ...] = ()
    shapes: Any = None
    dropouts: Any = None
    scopes: Any = None

    @classmethod
    def of(cls, config: str | Mapping[str, Any]) -> ModelEntry:
        """An entry of the config: a name, or a mapping with some of these keys."""
        given = {"name": config} if isinstance(config, str) else config
        known = [each.name for each in fields(cls)]
        if not isinstance(given, Mapping) or "name" not in given or not set(given) <= set(known):
            raise ValueError(f"benchmark.models: {config!r} is neither a name nor a mapping with name, {', '.join(known[1:])}")
        check_choices("models", [given["name"]], options("model"))
        return cls(**{**given, "overrides": tuple(given.get("overrides") or ())})


@dataclass(frozen=True)
class Place:
    """What attention mechanisms that are measured side by side have in common.

    Args:
        model: Model around the attention.
        frames: Frames of the encoder per sequence, T.
        batch: Sequences per batch, B.
        dropout: Dropout of the hidden states.
        attention_dropout: Dropout of the attention weights.
    """

    model: ModelEntry
    frames: int
    batch: int
    dropout: float
    attention_dropout: float


def places(
    models: Sequence[str | Mapping[str, Any]],
    shapes: Sequence[Mapping[str, int]],
    dropouts: Sequence[Mapping[str, float]],
    scopes: Sequence[str],
) -> Iterator[tuple[Place, Sequence[str]]]:
    """All places with their scopes, as the benchmark's config names them.

    Raises:
        ValueError: an unknown model or scope, or an impossible size.
    """
    for model in map(ModelEntry.of, models):
        own = model.scopes or scopes
        check_choices("scopes", own, SCOPES)
        for shape in model.shapes or shapes:
            frames, batch = _numbers("shapes", shape, ("frames", "batch"), int, 1)
            for dropout in model.dropouts or dropouts:
                hidden, attention = _numbers("dropouts", dropout, ("hidden", "attention"), float, 0)
                yield Place(model, int(frames), int(batch), hidden, attention), own


def _numbers(name: str, given: Mapping[str, float], keys: tuple[str, str], kind: type, least: float) -> tuple[float, float]:
    """The two numbers of an entry.

    Raises:
        ValueError: the entry has other keys, or a value that is no number or out of range.
    """
    if not isinstance(given, Mapping) or set(given) != set(keys):
        raise ValueError(f"benchmark.{name}: {given!r} is no mapping with {' and '.join(keys)}")
    for what in keys:
        check_type(kind, **{f"benchmark.{name}: {what}": given[what]})
        if given[what] < least or (kind is float and given[what] >= 1):
            below = " and less than 1" if kind is float else ""
            raise ValueError(f"benchmark.{name}: {what}={given[what]}: expected at least {least}{below}")
    return given[keys[0]], given[keys[1]]


@dataclass(frozen=True)
class Recipe:
    """Settings that all configurations share.

    Args:
        experiment: Name in `conf/experiment`, or None for the defaults of ``audiot pretrain``.
        positions: Name in `conf/positions`, or ``own`` for the choice of each mechanism's file.
        precision: The Trainer's precision.
        device: Device that the Trainer uses.
        warmup_steps: Steps of the program before those that are measured.
        program_steps: Steps of the program that are measured.
        utterances: Training utterances of demo speech, or None for the corpus of `overrides`.
        overrides: More overrides of ``audiot pretrain``.
        data_dir: Folder of the corpora.
        seed: Seed of the run.
    """

    experiment: str | None
    positions: str
    precision: str
    device: torch.device
    warmup_steps: int
    program_steps: int
    utterances: int | None
    overrides: Sequence[str]
    data_dir: str
    seed: int

    def choices(self, model: str, entry: Entry) -> list[str]:
        """Overrides of ``audiot pretrain`` that choose a model and a mechanism."""
        experiment = [] if self.experiment is None else [f"experiment={self.experiment}"]
        return [*experiment, f"model={model}", *entry.arguments]

    def config(self, entry: Entry, place: Place, folder: Path) -> tuple[DictConfig, str]:
        """Config of ``audiot pretrain`` for a mechanism at a place, and the name of its positions.

        Args:
            entry: The mechanism.
            place: The place.
            folder: Folder of the run.
        """
        chosen = self.choices(place.model.name, entry)
        chosen += [] if self.positions == "own" else [f"positions={self.positions}"]
        chosen += [] if self.utterances is None else ["data=demo"]
        chosen += [f"run_dir={folder}", f"data_dir={self.data_dir}", f"seed={self.seed}", "probe=false"]
        chosen += [f"model.dropout={place.dropout}", f"attention.dropout={place.attention_dropout}"]
        chosen += [*self.overrides, *place.model.overrides]
        features: Features = instantiate(compose("pretrain", chosen).features)
        crop = features.num_samples(place.frames)
        crop_s = crop / features.sample_rate
        middle = self.warmup_steps + self.program_steps // 2  # the only step at which it validates and saves
        index = self.device.index
        chosen += [
            f"data.crop_s={crop_s}",
            f"data.batch_s={crop_s * place.batch}",
            f"data.max_utterances={place.batch}",
            f"trainer.precision={self.precision}",
            f"trainer.accelerator={'gpu' if self.device.type == 'cuda' else self.device.type}",
            f"trainer.devices={1 if index is None or self.device.type != 'cuda' else [index]}",
            "trainer.strategy=auto",
            "trainer.num_nodes=1",
            "trainer.accumulate_grad_batches=1",
            f"trainer.max_steps={self.warmup_steps + self.program_steps}",
            f"trainer.val_check_interval={middle}",
            f"checkpoint.every_n_steps={middle}",
        ]
        if self.utterances is not None:
            chosen += [
                f"data.name=demo-{crop}",
                f"data.utterance_s={crop_s}",
                f"data.num_speakers={NUM_SPEAKERS}",
                f"data.corpus.train_utterances={-(-self.utterances // NUM_SPEAKERS)}",
                "data.corpus.num_test_speakers=1",
                "data.corpus.heldout_utterances=8",
                "data.corpus.speaker_utterances=1",
            ]
        cfg = compose("pretrain", chosen, return_hydra_config=True)
        positions = str(cfg.hydra.runtime.choices["positions"])
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg, positions
