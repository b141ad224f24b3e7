"""Models as graphs of torch.export in files, which PyTorch alone loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.export import ExportedProgram

from audiot.deployment.graphs import Deployable, quiet

METADATA = "metadata.json"


def write_torch(path: Path, model: Deployable, program: ExportedProgram) -> None:
    """Write a graph, with the model's description beside it.

    Args:
        path: The file.
        model: What the graph is of.
        program: Its graph.
    """
    with quiet(), path.open("wb") as stream:  # given a name, the archive would have it inside
        torch.export.save(program, stream, extra_files={METADATA: json.dumps(model.description, indent=2, ensure_ascii=False)})


def read_torch(path: Path) -> torch.nn.Module:
    """The module of a graph in a file: waveforms and lengths → outputs and numbers of frames."""
    with quiet():
        return torch.export.load(path).module()
