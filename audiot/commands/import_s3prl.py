"""``audiot import-s3prl X.ckpt OUT``: make an encoder of an S3PRL checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from audiot.checkpoint import save_encoder, save_objective
from audiot.following import demo_command
from audiot.interop.s3prl import import_s3prl
from audiot.objectives.reconstruction import Reconstruction


def main(options: argparse.Namespace) -> None:
    """Write the encoder's folder, with the reconstruction head where there is one for its input."""
    output = Path(options.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} is there already: choose another folder, or remove it")
    encoder, head = import_s3prl(options.checkpoint)
    save_encoder(output, encoder)
    if head is not None:
        objective = Reconstruction(encoder)
        objective.head.load_state_dict(head.state_dict())
        save_objective(output, {"_target_": "audiot.objectives.reconstruction.Reconstruction"}, objective)
    model = encoder.encoder
    print(
        f"model   {model.num_layers} layers × {model.embed_dim}, {sum(part.numel() for part in model.parameters()) / 1e6:.2f} M "
        f"parameters; hears {type(encoder.features).__name__}, {encoder.features.output_dim} channels"
    )
    print("head    " + ("kept" if head is not None else "none for this input: continued pre-training begins with a new one"))
    print(f"wrote   {output}")
    print(f"next:   {demo_command(output, encoder.features.sample_rate)}")
