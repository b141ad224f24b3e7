"""``audiot average RUN OUT``: the encoder of a run with the mean of the weights of its last checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from audiot.checkpoint import save_encoder, save_objective
from audiot.following import finetune_command
from audiot.pretraining import MaskedAcousticModel
from audiot.runs import checkpoints, step_of


def main(options: argparse.Namespace) -> None:
    """Write the encoder's folder, with the objective beside it, as pre-training does."""
    run, output = Path(options.run), Path(options.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} is there already: choose another folder, or remove it")
    found = checkpoints(run / "checkpoints")
    if len(found) < options.last:
        raise ValueError(
            f"{run / 'checkpoints'} has {len(found)} checkpoints of a run, step=N.ckpt, and {options.last} are wanted: "
            f"lower --last, or train with checkpoint.keep_last={options.last}"
        )
    chosen = found[: options.last]
    module = mean(chosen, options.trust)
    save_encoder(output, module.model)
    save_objective(output, module.hparams["objective"], module.objective)
    print(f"mean    of the weights after steps {', '.join(f'{step_of(each):,}' for each in reversed(chosen))}")
    print(f"wrote   {output}")
    print(f"next:   {finetune_command(run, output)}")


@torch.no_grad()
def mean(paths: Sequence[Path], trusted: Collection[str] = ()) -> MaskedAcousticModel:
    """The module of the first of several checkpoints of a run, with the mean of the parameters of all, computed in float64.

    Buffers, such as codebooks, are those of the first.
    """
    module = MaskedAcousticModel.from_checkpoint(paths[0], trusted)
    sums = [parameter.double() for parameter in module.parameters()]
    for path in paths[1:]:
        other = MaskedAcousticModel.from_checkpoint(path, trusted)
        for total, parameter in zip(sums, other.parameters(), strict=True):
            total += parameter
    for parameter, total in zip(module.parameters(), sums, strict=True):
        parameter.copy_(total / len(paths))
    return module
