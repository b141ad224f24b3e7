"""Models as graphs of plain operations: waveforms and lengths in, hidden states or outputs of a task out.

A graph holds for any number of utterances and any length, the features are inside, and padding changes nothing. Attention is
computed by the plain form of its mechanism, and the Fourier transform as a matrix product (`audiot.base.tracing`).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from audiot.attention.lsh import LSHAttention
from audiot.attention.routing import Routing
from audiot.base.parts import named
from audiot.base.tracing import recording
from audiot.checkpoint import load_encoder
from audiot.data.labels import BLANK_TOKEN
from audiot.downstream.classifier import load_classifier
from audiot.downstream.ctc import CTC
from audiot.downstream.heads import LayerSelection
from audiot.downstream.module import DownstreamModule
from audiot.downstream.objectives import Objective
from audiot.downstream.upstream import Upstream
from audiot.downstream.verification import Verification
from audiot.runs import has_config, run_config

TOLERANCE = 1e-4
TOKENS = (2, 9, 40, 150)  # lengths that a graph is tried on
Compute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A model: waveforms (B, N) and lengths (B,) → outputs, and their number of frames (B,)."""


@dataclass(frozen=True)
class Deployable:
    """A model, and what is written beside it.

    Args:
        module: The model, a `Compute`, in evaluation mode.
        features: Its front end.
        output: Name of the outputs.
        axes: Names of their dimensions.
        description: What a user of the file has to know, as plain values.
        objective: Objective of its task; None: it is an encoder.
    """

    module: nn.Module
    features: Any
    output: str
    axes: tuple[str, ...]
    description: dict[str, Any]
    objective: Objective | None = None

    def metadata(self) -> dict[str, str]:
        """The description, each value as text: words as they are, others as JSON."""
        return {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in self.description.items()
        }


class TaskModel(nn.Module):
    """The parts of a fine-tuned model that give its outputs.

    Args:
        module: Module that ``audiot finetune`` trained.
    """

    def __init__(self, module: DownstreamModule) -> None:
        super().__init__()
        self.upstream: Upstream = module.upstream
        self.layers: LayerSelection = module.layers
        self.head = module.head
        self.stack = module.stack
        self.is_embedding = isinstance(module.objective, Verification)

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the head, (B, frames, C) or (B, C), and lengths (B,) in frames. An embedding has length 1."""
        hidden, counts = self.upstream(waveforms, lengths)
        outputs = self.head(self.layers(self.layers.pick(hidden)), counts)
        return nn.functional.normalize(outputs) if self.is_embedding else outputs, counts * self.stack


def open_run(run: Path, trusted: Collection[str] = ()) -> Deployable:
    """The model of a run: the encoder of a pre-training run, or the fine-tuned model of a task.

    Args:
        run: The run's folder; or an encoder's.
        trusted: Packages from outside audiot whose classes it may name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    for folder in (run, run / "encoder"):
        if (folder / "config.json").is_file():
            return of_encoder(folder, trusted)
    return of_task(run, trusted)


def of_encoder(folder: Path, trusted: Collection[str]) -> Deployable:
    """The encoder in a folder."""
    encoder = load_encoder(folder, trusted).requires_grad_(False)
    description = _described("encoder", encoder.features, encoder.config)
    return Deployable(encoder, encoder.features, "hidden", ("states", "batch", "frames", "channels"), description)


def of_task(run: Path, trusted: Collection[str]) -> Deployable:
    """The fine-tuned model of a run."""
    classifier = load_classifier(run, trusted=trusted)
    module, objective = classifier.module, classifier.objective
    model = TaskModel(module).eval().requires_grad_(False)
    description = _described("classifier", classifier.features, module.upstream.config)
    description["task"] = _task(run, objective)
    if not isinstance(objective, Verification):
        description["labels"] = [BLANK_TOKEN, *objective.classes] if isinstance(objective, CTC) else list(objective.classes)
    samples = classifier.features.num_samples(max(TOKENS[:2]))
    with torch.no_grad():
        outputs, _ = model(torch.zeros(1, samples), torch.tensor([samples]))
    if outputs.ndim == 3:
        description |= _times(classifier.features, 1)
    channels = "embedding" if isinstance(objective, Verification) else "labels"
    axes = ("batch", "frames", channels) if outputs.ndim == 3 else ("batch", channels)
    output = "embedding" if channels == "embedding" else "logits"
    return Deployable(model, classifier.features, output, axes, description, objective)


def _described(kind: str, features: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"audiot_version": version("audiot"), "kind": kind, "sample_rate": features.sample_rate}
    if kind == "encoder":
        found |= _times(features, features.stack)
    return found | {name: named(config[name]) for name in ("features", "model") if name in config}


def _times(features: Any, stack: int) -> dict[str, float]:
    """Middle of the first frame of the outputs, and the time to the next one, in seconds."""
    centers = features.frame_centers(2 * stack).double().view(2, stack).mean(1) / features.sample_rate
    return {"first_frame_s": round(centers[0].item(), 6), "frame_step_s": round((centers[1] - centers[0]).item(), 6)}


def _task(run: Path, objective: nn.Module) -> str:
    if has_config(run):
        task = run_config(run, trusted=None).get("downstream", {}).get("task")
        if isinstance(task, str):
            return task
    return type(objective).__name__.lower()


def trace(model: Deployable) -> ExportedProgram:
    """The model's graph, for any batch and length.

    `Deployable.description` gets ``min_samples``, and ``max_samples`` where there is a limit.

    Raises:
        ValueError: a part of the model can't be written as a graph, or only as one for certain sizes.
    """
    example = _example(model)
    axes = ({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO})
    try:
        with torch.no_grad(), quiet(), recording():
            program = torch.export.export(model.module, example, dynamic_shapes=axes)
    except Exception as error:  # PyTorch has many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the model can't be written as a graph: {reason[0][:300]}") from error
    _strip(program)
    shape = next(node for node in program.graph.nodes if node.name == "waveforms").meta["val"].shape
    for name, size in zip(("batches of one size", "waveforms of one length"), shape, strict=True):
        if isinstance(size, int):
            raise ValueError(f"the model can't be written as a graph: it would hold for {name} only, {size}")
    limits = program.range_constraints[shape[1].node.expr]
    shortest = max(int(limits.lower), model.features.num_samples(1))
    model.description["min_samples"] = shortest
    if limits.upper.is_Integer:  # infinity is none
        model.description["max_samples"] = int(limits.upper)
    return program


def _strip(program: ExportedProgram) -> None:
    """Take the places of the code, on this machine, out of a graph."""
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _example(model: Deployable) -> tuple[Tensor, Tensor]:
    """What the graph is recorded with: nothing of its size must matter."""
    samples = model.features.num_samples(TOKENS[1]) + 3
    lengths = torch.tensor([samples, samples - 5, model.features.num_samples(TOKENS[0])])
    return torch.zeros(len(lengths), samples), lengths


@contextmanager
def quiet() -> Iterator[None]:
    """Without the messages of exporters, which are about their own inside."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def largest_difference(model: Deployable, compute: Compute) -> float:
    """The largest difference of a graph to the model, over batches of several sizes and lengths.

    A number above 1 differs by a share of itself. In a batch, utterances of unequal lengths are compared with what the model
    gives for each alone, and noise stands where their padding is.

    Args:
        model: The model.
        compute: Its graph.

    Raises:
        ValueError: the numbers of frames differ, or a value is not finite.
    """
    return max(_differences(model, compute))


@torch.no_grad()
def _differences(model: Deployable, compute: Compute) -> Iterator[float]:
    draw = torch.Generator().manual_seed(0)
    for number, tokens in enumerate(TOKENS):
        longest = model.features.num_samples(tokens) + 7 * number
        longest = min(max(longest, model.description["min_samples"]), model.description.get("max_samples", longest))
        shortest = model.features.num_samples(1)
        lengths = [longest - (longest - shortest) * part // 4 for part in range(1 + number)]
        waveforms = 0.1 * torch.randn(len(lengths), longest, generator=draw)
        waveforms *= torch.linspace(0.1, 1, longest) ** 2
        outputs, counts = compute(waveforms, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            expected, count = model.module(waveforms[row : row + 1, :length], torch.tensor([length]))
            if counts[row] != count[0]:
                raise ValueError(f"the graph counts {counts[row]} frames in {length} samples, and the model {count[0]}")
            yield _difference(model.axes, outputs, expected, row)


def _difference(axes: tuple[str, ...], outputs: Tensor, expected: Tensor, row: int) -> float:
    batch = axes.index("batch")
    actual, expected = outputs.select(batch, row).double(), expected.select(batch, 0).double()
    if "frames" in axes:
        frames = axes.index("frames") - 1
        actual = actual.narrow(frames, 0, expected.shape[frames])
    found = ((actual - expected).abs() / expected.abs().clamp(min=1)).amax().item()
    if not found < float("inf"):
        raise ValueError("the graph gives a number that is not finite")
    return found


def check(model: Deployable, compute: Compute) -> float:
    """`largest_difference`, which must not exceed `TOLERANCE`.

    Raises:
        ValueError: it does.
    """
    found = largest_difference(model, compute)
    if found > TOLERANCE:
        choosing = {type(part).__name__ for part in model.module.modules() if isinstance(part, (LSHAttention, Routing))}
        why = f"; {', '.join(choosing)} chooses keys by what frames hold, and rounding changes some choices" if choosing else ""
        raise ValueError(
            f"the graph differs from the model by {found:.1e}, and {TOLERANCE:g} is allowed: nothing is written{why}"
        )
    return found
