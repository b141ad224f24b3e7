"""``audiot export-onnx RUN``: write the encoder of a pre-training run, or a fine-tuned model, as an ONNX file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from audiot.base.console import table
from audiot.base.files import replacing
from audiot.commands.finetune import task_data
from audiot.data.opening import open_corpus
from audiot.deployment.graphs import Compute, Deployable, check, largest_difference, open_run, trace
from audiot.deployment.int8 import Tested, measure, quantise
from audiot.deployment.onnx_file import OnnxModel, describe, write_onnx
from audiot.downstream.objectives import Objective
from audiot.runs import run_config


def main(options: argparse.Namespace) -> None:
    """Write the file, check it against PyTorch, and say what it takes and gives; with ``--int8``, what it loses too."""
    run, output = place(options, "model-int8.onnx" if options.int8 else "model.onnx")
    model = open_run(run, options.trust)
    if options.int8 and model.objective is None:
        raise ValueError(f"--int8 measures its loss by the test of a task, and {run} has none: fine-tune the encoder first")
    program = trace(model)
    with replacing(output) as temporary:
        write_onnx(temporary, model, program, options.opset)
        say(model, check(model, OnnxModel(temporary)))
        if options.int8 and model.objective is not None:
            with _beside(temporary) as whole:
                temporary.rename(whole)
                quantise(whole, temporary)
                _measure(options, run, model, model.objective, whole, temporary)
    print(f"wrote   {output}, {output.stat().st_size / 1e6:.1f} MB")


def place(options: argparse.Namespace, name: str) -> tuple[Path, Path]:
    """Folder of the run, and the file to write.

    Raises:
        FileNotFoundError: there is no such folder.
        FileExistsError: the file is there already.
    """
    run = Path(options.run)
    if not run.is_dir():
        raise FileNotFoundError(f"no folder {run}: expected one of a run, such as outputs/finetune/…")
    output = run / name if options.output is None else Path(options.output)
    if output.exists():
        raise FileExistsError(f"{output} is there already: choose another name with -o, or remove it")
    return run, output


def say(model: Deployable, difference: float) -> None:
    """What a graph takes and gives, and how far it is from the model."""
    rate, axes = model.description["sample_rate"], ", ".join(model.axes)
    print(f"model   waveforms (batch, samples) at {rate:,} Hz, lengths (batch) → {model.output} ({axes}), num_frames (batch)")
    print(f"check   differs from PyTorch by {difference:.1e} at most, over batches of 1 to 4 and lengths of 2 to 150 frames")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The name of another temporary file beside one, which is gone at the end."""
    other = path.with_stem(f"{path.stem}-float32")
    try:
        yield other
    finally:
        other.unlink(missing_ok=True)


def _measure(
    options: argparse.Namespace, run: Path, model: Deployable, objective: Objective, whole: Path, quantised: Path
) -> None:
    """Test both files, print what they did, and add it to the metadata of the second."""
    settings = run_config(run, trusted=options.trust)
    data = task_data(settings, open_corpus(settings, run), model.features)
    if data.classes != objective.classes:
        raise ValueError(f"{run}: its corpus now has other classes ({len(data.classes)}) than it was trained on")
    sizes = {"float32": whole.stat().st_size, "int8": quantised.stat().st_size}
    models: dict[str, Compute] = {"float32": OnnxModel(whole), "int8": OnnxModel(quantised)}
    count = len(data.cuts("test"))
    wanted = min(count, options.utterances)
    results = measure(models, objective, model.features.sample_rate, data.some("test", wanted))
    threads = torch.get_num_threads()
    print(f"test    {wanted:,} of {count:,} utterances, {threads} thread{'s' if threads > 1 else ''}")
    print(table(_rows(results, sizes)))
    found: dict[str, Any] = {
        name: {
            "metrics": {metric: round(value, 6) for metric, value in results[name].metrics.items()},
            "bytes": sizes[name],
            "times_real_time": round(1 / results[name].seconds_per_second, 1),
        }
        for name in models
    }
    found |= {"utterances": wanted, "threads": threads}
    model.description["weights"] = "int8"
    model.description["test"] = found | {"largest_difference": largest_difference(model, models["int8"])}
    describe(quantised, model)


def _rows(results: dict[str, Tested], sizes: dict[str, int]) -> dict[str, str]:
    """Name → the figures of float32 and int8."""
    rows = {"": f"{'float32':>12} {'int8':>12}"}
    first, second = results["float32"], results["int8"]
    for metric, value in first.metrics.items():
        rows[f"  {metric}"] = f"{value:12.4f} {second.metrics[metric]:12.4f}   ({second.metrics[metric] - value:+.4f})"
    rows["  size, MB"] = " ".join(f"{sizes[name] / 1e6:12.2f}" for name in results)
    rows["  times real time"] = " ".join(f"{1 / each.seconds_per_second:12.0f}" for each in results.values())
    return rows
