"""``audiot export-torch RUN``: write the encoder of a pre-training run, or a fine-tuned model, as a graph of torch.export."""

from __future__ import annotations

import argparse

from audiot.base.files import replacing
from audiot.commands.export_onnx import place, say
from audiot.deployment.graphs import check, open_run, trace
from audiot.deployment.torch_file import read_torch, write_torch


def main(options: argparse.Namespace) -> None:
    """Write the file, check it against the model, and say what it takes and gives."""
    run, output = place(options, "model.pt2")
    model = open_run(run, options.trust)
    program = trace(model)
    with replacing(output) as temporary:
        write_torch(temporary, model, program)
        difference = check(model, read_torch(temporary))
    say(model, difference)
    print(f"wrote   {output}, {output.stat().st_size / 1e6:.1f} MB")
