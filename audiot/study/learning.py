"""From the records of a study's analyses to what its report says of what was learned."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean

from torch import Tensor

from audiot.measures.similarity import cka
from audiot.study.comparison import estimate
from audiot.study.design import Study
from audiot.study.findings import CODE_FIGURES, HEAD_FIGURES, Estimate, Learned, Moved, Picture, Sample, Similarity
from audiot.study.records import Arrays, Record

LEVELS = "0123456789abcdef"

Found = dict[int, Record]
"""Seed → the record of its analysis."""


def learning(
    study: Study, records: Mapping[str, Record], arrays: Callable[[str], Arrays | None]
) -> tuple[tuple[Learned, ...], tuple[Similarity, ...]]:
    """What was learned by equal steps, as far as it was measured.

    Args:
        study: The study.
        records: Its finished runs.
        arrays: Function from the key of a run to the arrays beside its record.
    """
    learned: list[Learned] = []
    similarities: list[Similarity] = []
    for objective in study.objectives if study.learned else ():
        beside: dict[str, dict[int, Arrays]] = {}
        for mechanism in study.mechanisms:
            found: Found = {}
            for seed in study.seeds:
                training = study.training(objective, mechanism, seed, "steps", records)
                key = "" if training is None else study.analysis(training).key
                if key in records:
                    found[seed] = records[key]
                    if (own := arrays(key)) is not None:
                        beside.setdefault(mechanism, {})[seed] = own
            if found:
                own_arrays = beside.get(mechanism, {})
                first = own_arrays[min(own_arrays)] if own_arrays else None
                learned.append(_learned(objective, mechanism, found, first, study.resamples))
        similarities += _similarities(objective, beside)
    return tuple(learned), tuple(similarities)


def _learned(objective: str, mechanism: str, found: Found, first: Arrays | None, resamples: int) -> Learned:
    """What the runs of a mechanism have learned; `first` has the tables of the first seed."""

    def over_seeds(name: str) -> Estimate | None:
        return _over_seeds({seed: record.figures[name] for seed, record in found.items() if name in record.figures}, resamples)

    codes = {name: figure for name in CODE_FIGURES if (figure := over_seeds(f"codes/{name}")) is not None}
    removed: list[Estimate] = []
    while (loss := over_seeds(f"pruning/removed/{len(removed)}")) is not None:
        removed.append(replace(loss, samples=()))
    heads, untrained = (
        {name: layers for name in HEAD_FIGURES if (layers := _by_layer(found, group, name, resamples))}
        for group in ("heads", "untrained_heads")
    )
    moved = _moved(found, resamples)
    tables = None if first is None else first.tensors.get("tables")
    patterns = list(dict.fromkeys(each.pattern for each in moved if each.pattern))
    pictures = () if tables is None else _pictures(tables, patterns)
    return Learned(objective, mechanism, heads, untrained, tuple(removed), moved, pictures, codes)


def _over_seeds(values: Mapping[int, float], resamples: int) -> Estimate | None:
    samples = [Sample(seed, value) for seed, value in values.items()]
    return estimate(samples, resamples) if samples else None


def _by_layer(found: Found, group: str, name: str, resamples: int) -> tuple[Estimate, ...]:
    """The estimate of a figure in each layer, of its mean over the layer's heads."""
    layers: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed, record in found.items():
        for key, value in record.figures.items():
            if match := re.fullmatch(rf"{group}/(\d+)/\d+/{name}", key):
                layers[int(match[1])][seed].append(value)
    estimates = [_over_seeds({seed: fmean(own) for seed, own in layers[layer].items()}, resamples) for layer in sorted(layers)]
    return tuple(replace(each, samples=()) for each in estimates if each is not None)


def _moved(found: Found, resamples: int) -> tuple[Moved, ...]:
    """How far heads of tables have moved, those without a pattern together."""
    heads: dict[tuple[int, str], dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for seed, record in found.items():
        for key, value in record.figures.items():
            if match := re.fullmatch(r"tables/(\d+)/(\w+)/(\w+)", key):
                pattern = "" if match[2].isdigit() else match[2]
                heads[int(match[1]), pattern][match[3]][seed].append(value)
    rows = []
    for (layer, pattern), figures in heads.items():
        of_all = {name: [value for own in seeds.values() for value in own] for name, seeds in figures.items()}
        moved = _over_seeds({seed: fmean(own) for seed, own in figures["moved"].items()}, resamples)
        assert moved is not None
        before, after = (fmean(of_all[f"entropy_{when}"]) for when in ("before", "after"))
        survivors = of_all["survives"]
        rows.append(Moved(layer, pattern, replace(moved, samples=()), before, after, round(sum(survivors)), len(survivors)))
    return tuple(rows)


def _pictures(tables: Tensor, patterns: Sequence[str]) -> tuple[Picture, ...]:
    """Tables (layers + 1, H, cells, cells) as text."""
    pictures = []
    for layer, heads in enumerate(tables.tolist()):
        for head, cells in enumerate(heads):
            name = f"{head + 1} {patterns[head]}" if head < len(patterns) else str(head + 1)
            rows = ("".join(LEVELS[cell * 15 // 255] for cell in row) for row in cells)
            pictures.append(Picture(layer, name, tuple(rows)))
    return tuple(pictures)


def _similarities(objective: str, beside: Mapping[str, Mapping[int, Arrays]]) -> list[Similarity]:
    """The similarity of every two mechanisms in each layer that they all have."""
    if not beside:
        return []
    layers = min(len(arrays.tensors["states"]) for own in beside.values() for arrays in own.values()) - 1
    names = tuple(beside)
    found = []
    for layer in range(1, layers + 1):
        means: dict[tuple[str, str], float | None] = {}
        for one, name in enumerate(names):
            means[name, name] = _mean_cka(list(combinations(beside[name].values(), 2)), layer)
            for other in names[one + 1 :]:
                pairs = [(beside[name][seed], beside[other][seed]) for seed in beside[name].keys() & beside[other].keys()]
                means[name, other] = means[other, name] = _mean_cka(pairs, layer)
        found.append(Similarity(objective, layer, names, tuple(tuple(means[name, other] for other in names) for name in names)))
    return found


def _mean_cka(pairs: Sequence[tuple[Arrays, Arrays]], layer: int) -> float | None:
    """Mean over the pairs of states of the same frames; None without any."""
    values = [
        cka(one.tensors["states"][layer], other.tensors["states"][layer]) for one, other in pairs if one.frames == other.frames
    ]
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else None
