"""What a pre-training run has learned, on a few utterances that no run was trained on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiot.attention.table import TableSynthesizer
from audiot.base.devices import attention_of_any_shape
from audiot.base.framing import middles
from audiot.base.streams import bits, key
from audiot.data.batches import Batch
from audiot.measures.codes import quality
from audiot.measures.heads import head_figures, table_figures
from audiot.measures.pruning import Pruning, prune
from audiot.model import Encoder, length_mask
from audiot.pretraining import MaskedAcousticModel

Row = dict[str, Any]
CELLS = 24  # rows and columns of a drawn table


class Heard(NamedTuple):
    """What an encoder is given of a batch: front end's output (B, T, C), mask (B, T) or None, lengths (B,) on the CPU."""

    tokens: Tensor
    valid: Tensor | None
    lengths: Tensor


def hear(module: MaskedAcousticModel, batches: Sequence[Batch]) -> list[Heard]:
    """What the trained front end makes of batches, nothing hidden."""
    found = []
    for batch in batches:
        tokens, lengths = module.model.features(batch["waveforms"], batch["lengths"])
        valid = length_mask(lengths, tokens.shape[1], tokens.device)
        found.append(Heard(module.model.features.embed(tokens, valid), valid, lengths.cpu()))
    return found


def token_seconds(module: MaskedAcousticModel) -> float:
    """Seconds from one token to the next."""
    first, second = middles(module.model.features, module.model.features.stack, 2).tolist()
    return (second - first) / module.sample_rate


def attention_rows(encoder: Encoder, heard: Sequence[Heard], token_s: float) -> list[Row]:
    """Figures of every layer and head, counted from 1; see `head_figures`. Each utterance counts alike.

    Raises:
        ValueError: the mechanism has no weights, or an utterance is longer than the encoder takes at once.
    """
    layers: list[list[dict[str, Tensor]]] = [[] for _ in range(encoder.num_layers)]
    for tokens, valid, lengths in heard:
        for found, (attention, hidden) in zip(layers, encoder.attention_inputs(tokens, valid), strict=True):
            found.append(head_figures(attention.weights(hidden, valid), lengths, token_s))
    rows = []
    for layer, found in enumerate(layers, 1):
        means = {name: torch.cat([each[name] for each in found]).double().mean(0).tolist() for name in found[0]}
        rows += _rows(layer, means)
    return rows


def _rows(layer: int, figures: Mapping[str, Sequence[float]]) -> list[Row]:
    heads = range(len(next(iter(figures.values()))))
    return [{"layer": layer, "head": head + 1, **{name: values[head] for name, values in figures.items()}} for head in heads]


def tables(encoder: Encoder, num_frames: int) -> list[Tensor]:
    """The tables of every layer for sequences of so many frames (H, T, T), which no utterance changes."""
    frames = torch.zeros(1, num_frames, encoder.embed_dim, device=encoder.input.weight.device)
    return [encoder.layer(index).attention.mechanism.weights(hidden=frames)[0] for index in range(encoder.num_layers)]


def table_rows(untrained: Encoder, trained: Encoder, num_frames: int, all_heads: bool) -> list[Row]:
    """How far the tables of every layer and head have moved; see `table_figures`.

    Args:
        untrained: An encoder as the run's was when it began. Where a head begins with a pattern, any untrained one is.
        trained: The encoder.
        num_frames: Length of the sequences that the tables are taken for. They should be of a length that training has heard.
        all_heads: Whether the heads without a pattern began as those of `untrained`; else they are left out.
    """
    mechanism = trained.layer(0).attention.mechanism
    assert isinstance(mechanism, TableSynthesizer)
    patterns = mechanism.head_names
    rows = []
    for layer, (before, after) in enumerate(zip(tables(untrained, num_frames), tables(trained, num_frames), strict=True), 1):
        found = {name: values.tolist() for name, values in table_figures(before, after).items()}
        for row in _rows(layer, found):
            pattern = patterns[row["head"] - 1] if row["head"] <= len(patterns) else None
            if pattern is not None or all_heads:
                rows.append({"layer": layer, "head": row["head"], "pattern": pattern, **row})
    return rows


def small_tables(layers: Sequence[Tensor], cells: int = CELLS) -> Tensor:
    """Tables (H, T, T) of each layer for small pictures, uint8 (layers, H, cells, cells).

    A cell has the square root of its mean weight, 255 where the head's is largest. The root makes weak weights visible.
    """
    mean = torch.nn.functional.adaptive_avg_pool2d(torch.stack(list(layers)).float(), cells).sqrt()
    return (255 * mean / mean.amax((-2, -1), keepdim=True).clamp(min=1e-12)).round().to(torch.uint8).cpu()


def validation_loss(module: MaskedAcousticModel, batches: Sequence[Batch]) -> Callable[[], float]:
    """Function that gives the validation loss of the objective on batches, whose corruption is always the same."""
    objective, inputs = module.objective, [module.inputs(batch) for batch in batches]
    name = f"val_{objective.figure}"

    def loss() -> float:
        total = scored = 0.0
        for tokens, lengths, keys, valid, source in inputs:
            with attention_of_any_shape():
                view = objective.view(module.model, tokens, lengths, keys, valid, tokens if source is None else source)
            mean = objective.measures(view)[name]
            total += float(mean.value) * float(mean.scored)
            scored += float(mean.scored)
        return total / scored

    return loss


def pruning_figures(module: MaskedAcousticModel, batches: Sequence[Batch]) -> dict[str, Any]:
    """The validation loss without heads; see `prune`.

    Raises:
        ValueError: a loss is not finite.
    """
    found: Pruning = prune(module.model.encoder, validation_loss(module, batches))
    if not all(map(math.isfinite, [*found.alone.values(), *found.removed])):
        raise ValueError("the loss without some heads is not finite")
    alone = [{"layer": layer, "head": head, "loss": value} for (layer, head), value in found.alone.items()]
    return {
        "loss": module.monitor.removeprefix("pretrain/"),
        "alone": alone,
        "order": [list(head) for head in found.order],
        "removed": found.removed,
    }


def sampled_states(module: MaskedAcousticModel, batches: Sequence[Batch], count: int) -> tuple[Tensor, str]:
    """Hidden states of a sample of frames, which depends on the utterances alone: all encoders of as many frames have the same.

    Args:
        module: The model.
        batches: Utterances.
        count: Number of frames, the same of each utterance as far as it has them.

    Returns:
        States (layers + 1, N, d) in float16, and a digest of which frames they are.

    Raises:
        ValueError: a state is not finite, or too large for float16.
    """
    own = math.ceil(count / sum(len(batch["ids"]) for batch in batches))
    found: dict[str, tuple[list[int], int, Tensor]] = {}
    for batch in batches:
        hidden, lengths = module.model(batch["waveforms"], batch["lengths"])  # layers + 1, B, T, d
        for place, (name, length) in enumerate(zip(batch["ids"], lengths.tolist(), strict=True)):
            order = bits(torch.tensor([key("states", name)]), length)[0].argsort()
            frames = order[:own].sort().values.tolist()
            found[name] = frames, length, hidden[:, place, frames].half().cpu()
    ordered = sorted(found.items())
    sampled = json.dumps([[name, frames, length] for name, (frames, length, _) in ordered])
    states = torch.cat([own_states for _, (_, _, own_states) in ordered], dim=1)
    if not bool(states.isfinite().all()):
        raise ValueError("hidden states are not finite in float16: training has diverged, or a norm is missing")
    return states, hashlib.sha256(sampled.encode()).hexdigest()[:16]


Interval = tuple[float, float, str]
"""Start and end in seconds of the utterance, and the phone."""


def code_figures(
    module: MaskedAcousticModel, batches: Sequence[Batch], phones: Mapping[str, Sequence[Interval]]
) -> dict[str, dict[str, float]]:
    """How much the codes of the objective say of phones; see `audiot.measures.codes.quality`. Means over the codebooks.

    Args:
        module: A model whose objective has codes.
        batches: Utterances.
        phones: Utterance → the phones of its alignment, ordered by time.

    Returns:
        ``targets``: of the codes of all tokens; ``predicted``: of those that the encoder predicts where they are hidden from it.
    """
    features = module.model.features
    index = {name: number for number, name in enumerate(sorted({phone for own in phones.values() for _, _, phone in own}))}
    kept: dict[str, list[Tensor]] = {"phones": [], "masked": [], "codes": [], "predicted": []}
    for batch in batches:
        view = module.view(batch)
        stack = view["masked"].shape[1] // view["codes"].shape[1]
        masked, lengths = view["masked"][:, ::stack].cpu(), (view["lengths"] // stack).tolist()
        centres = middles(features, features.stack, masked.shape[1]).numpy() / module.sample_rate
        for place, (name, length) in enumerate(zip(batch["ids"], lengths, strict=True)):
            labels = labelled(centres[:length], phones[name], index)
            known = torch.from_numpy(np.flatnonzero(labels >= 0))
            kept["phones"].append(torch.from_numpy(labels)[known])
            kept["masked"].append(masked[place][known])
            for which in ("codes", "predicted"):
                kept[which].append(view[which][place].cpu()[known])
    spoken, hidden = torch.cat(kept["phones"]), torch.cat(kept["masked"])
    found = {}
    for name, which, where in (("targets", "codes", torch.ones_like(hidden)), ("predicted", "predicted", hidden)):
        codes = torch.cat(kept[which])[where]  # N, G
        qualities = [quality(spoken[where].numpy(), book.numpy())._asdict() for book in codes.unbind(-1)]
        found[name] = {figure: fmean(each[figure] for each in qualities) for figure in qualities[0]}
    return found


def labelled(centres: np.ndarray, intervals: Sequence[Interval], index: Mapping[str, int]) -> np.ndarray:
    """Number of the phone of each token whose middle is at ``centres`` seconds, −1 where none is spoken."""
    starts, ends = (np.array([interval[part] for interval in intervals]) for part in (0, 1))
    classes = np.array([index[phone] for _, _, phone in intervals])
    at = np.searchsorted(starts, centres, side="right") - 1
    return np.where((at >= 0) & (centres < ends[at.clip(0)]), classes[at.clip(0)], -1)
