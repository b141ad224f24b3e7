"""Weights of eight bits: smaller files, and what they lose on a task's test."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from audiot.data.batches import Batch
from audiot.deployment.graphs import Compute, quiet
from audiot.downstream.objectives import Objective

try:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
except ImportError as error:
    message = "ONNX files need onnx, onnxruntime and onnxscript: pip install 'audiot[onnx]'"
    raise ImportError(message, name=error.name) from error


def quantise(source: Path, target: Path) -> None:
    """Write an ONNX file with the weights of matrix products in int8, with a scale for each output.

    Inputs of these products are quantised as they come. The features stay in float32, because their logarithms are of tiny
    numbers. Weights have seven bits: with eight, processors without special instructions (VNNI) would saturate, and one file
    would have two scores.

    Args:
        source: File that `audiot.deployment.onnx_file.write_onnx` wrote.
        target: File to write.
    """
    names = [node.name for node in onnx.load(source).graph.node]
    with quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "LSTM"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[name for name in names if name.rpartition("/")[0].endswith("features")],
        )


@dataclass(frozen=True)
class Tested:
    """What a model did in a test.

    Args:
        metrics: The task's metrics.
        seconds_per_second: Seconds that it took per second of audio, without reading it.
    """

    metrics: dict[str, float]
    seconds_per_second: float


def measure(models: dict[str, Compute], objective: Objective, sample_rate: int, batches: Iterable[Batch]) -> dict[str, Tested]:
    """Test several models on the same batches.

    Args:
        models: Name → model.
        objective: The task's objective.
        sample_rate: Rate of the waveforms in Hz.
        batches: Batches of the test, with ``waveforms`` and ``lengths``.

    Raises:
        ValueError: there are no batches.
    """
    objectives = {name: copy.deepcopy(objective) for name in models}
    taken, samples = dict.fromkeys(models, 0.0), 0
    for each in objectives.values():
        each.reset("test")
    for number, batch in enumerate(batches):
        for name, compute in models.items():
            if number == 0:  # the first call of a session takes longer
                compute(batch["waveforms"], batch["lengths"])
            begun = time.perf_counter()
            outputs, counts = compute(batch["waveforms"], batch["lengths"])
            taken[name] += time.perf_counter() - begun
            objectives[name].update(outputs, counts, batch)
        samples += int(batch["lengths"].sum())
    if not samples:
        raise ValueError("the test has no utterances")
    with torch.no_grad():
        return {name: Tested(each.compute(), taken[name] * sample_rate / samples) for name, each in objectives.items()}
