"""Training of two ranks, one of which has batches that are not finite. As a program: one of the ranks.

Usage: ``python skipping_ranks.py FOLDER RANK``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from conftest import TINY
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader
from unequal_batches import STILL, STRATEGIES, Tokens, batch_of, silent_trainer, whole

from audiot.training.watch import FiniteSteps

OPTIMIZERS = {"fused": True, "plain": False}
BAD = (1, 3, 4)  # batches of rank 1


def batches(rank):
    """Batches of a rank, each of another number of frames."""
    made = []
    for number in range(6):
        lengths = [30 - rank, 20 + number, 25, 12]
        batch = batch_of("reconstruction", [(100 * rank + 10 * number + place, length) for place, length in enumerate(lengths)])
        bad = rank == 1 and number in BAD
        if bad:
            batch["tokens"][2, 3] = torch.nan
        made.append(batch | {"tokens": batch["tokens"].float(), "ids": [f"{'bad' if bad else 'good'} {n}" for n in range(4)]})
    return made


class Note(Callback):
    """Keep the weights after each step."""

    def __init__(self):
        self.states = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, parameter in pl_module.named_parameters():
            self.states.setdefault(name, []).append(whole(parameter.detach()).clone())


def train(strategy, fused, rank, folder):
    """Weights after each step, the number of skipped steps, and the line that ends the training."""
    torch.manual_seed(0)
    optimizer = TINY["optimizer"] | {"fused": fused}
    module, note, watch = Tokens(**TINY | STILL | {"optimizer": optimizer}), Note(), FiniteSteps(folder, limit=2)
    trainer = silent_trainer(max_steps=6, devices=2, strategy=STRATEGIES[strategy](), callbacks=[note, watch])
    try:
        trainer.fit(module, DataLoader(batches(rank), batch_size=None))
    except ValueError as error:
        return note.states, watch.skipped, str(error)
    raise AssertionError("the training did not end")


def main(folder, rank):
    """Train with every strategy and optimiser, and store what came of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {
        (strategy, name): train(strategy, fused, rank, Path(folder) / strategy / name)
        for strategy in STRATEGIES
        for name, fused in OPTIMIZERS.items()
    }
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
