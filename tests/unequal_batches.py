"""Training steps of several unequal batches in float64, and the same utterances as one batch. As a program: a rank of two.

Usage: ``python unequal_batches.py FOLDER RANK``.
"""

from __future__ import annotations

import functools
import sys
import warnings
from itertools import chain

import pytorch_lightning as pl
import torch
from conftest import TINY
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, IterableDataset

from audiot.base.groups import options, read_option
from audiot.data.labels import IGNORED
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import FeaturesUpstream
from audiot.model import length_mask
from audiot.pretraining import MaskedAcousticModel
from audiot.training.ddp import ReplicatedStrategy
from audiot.training.fsdp import ShardedStrategy

LENGTHS = ([25], [40, 31, 12, 33], [18, 9], [50, 7, 21])  # frames of each utterance, batch by batch
STILL = {
    "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.0},
    "scheduler": {"_target_": "audiot.training.optimization.constant", "_partial_": True},
}


class Tokens(MaskedAcousticModel):
    """Pre-training on given features."""

    def inputs(self, batch):
        tokens, lengths = batch["tokens"], batch["lengths"]
        return tokens, lengths, batch["keys"], length_mask(lengths, tokens.shape[1], tokens.device), None


def reconstruction(**objective):
    configs = TINY | STILL | {"model": TINY["model"] | {"dropout": 0.0}, "objective": TINY["objective"] | objective}
    return Tokens(**configs)


SMALL = {"span": 3, "num_codebooks": 2, "num_codes": 16, "num_clusters": 16, "sample_s": 30.0, "iterations": 5, "steps": 9}
OBJECTIVES = options("objective")


def objective_config(name):
    """conf/objective/NAME.yaml as a plain dict, of a tiny size."""
    own, config = read_option("objective", name), {}
    for base in own.pop("defaults", []):
        config |= objective_config(base)
    config |= own
    return config | {key: value for key, value in SMALL.items() if key in config}


def objective(name):
    """A module with an objective, with noise for what it would fit."""
    module = Tokens(**TINY | STILL | {"model": TINY["model"] | {"dropout": 0.0}, "objective": objective_config(name)})
    for buffer in module.objective.buffers():
        if buffer.isnan().any():
            buffer.normal_()
    return module


def task(head, objective, classes):
    names = {"head": f"audiot.downstream.heads.{head}", "objective": f"audiot.downstream.{objective.pop('kind')}"}
    return DownstreamModule(
        upstream=FeaturesUpstream(TINY["features"], context=1).config,
        head={"_target_": names["head"]},
        objective={"_target_": names["objective"], **objective},
        classes=classes,
        layers="last",
        train_encoder=False,
        **STILL,
    )


CLASSES = ["a", "b", "c", "d"]
SLOTS = ["x=1", "x=2", "y=1", "y=2"]
KINDS = {
    "reconstruction": lambda: reconstruction(),
    "reconstruction of bands": lambda: reconstruction(band_width=8, noise_probability=0.5),
    **{f"pretraining {name}": functools.partial(objective, name) for name in OBJECTIVES},
    "frames": lambda: task("FrameClassifier", {"kind": "objectives.Classification"}, CLASSES),
    "utterances": lambda: task("UtteranceClassifier", {"kind": "objectives.Classification"}, CLASSES),
    "slots": lambda: task("UtteranceClassifier", {"kind": "objectives.Slots", "fields": ["x", "y"]}, SLOTS),
    "ctc": lambda: task("FrameClassifier", {"kind": "ctc.CTC"}, CLASSES),
    "verification": lambda: task("UtteranceClassifier", {"kind": "verification.Verification", "embedding_dim": 6}, CLASSES),
}


def is_pretraining(kind):
    return kind.startswith(("reconstruction", "pretraining"))


def made(kind):
    torch.manual_seed(0)
    module = KINDS[kind]().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # attention and biases matter
    return module


def labels_of(kind, number, length):
    generator = torch.Generator().manual_seed(number)
    if kind == "frames":  # every third frame has no label
        labels = torch.randint(4, (length,), generator=generator)
        labels[::3] = IGNORED
        return labels
    if kind == "slots":
        return torch.randint(2, (2,), generator=generator) + torch.tensor([0, 2])
    if kind == "ctc":
        return torch.randint(4, (1 + number % 4,), generator=generator)
    return torch.randint(4, (), generator=generator)


def batch_of(kind, numbered):
    """A padded batch of (number, length) of utterances, whose content follows from the number."""
    longest = max(length for _, length in numbered)
    numbers, lengths = zip(*numbered, strict=True)
    width = 60 if is_pretraining(kind) else 20
    frames = torch.full((len(numbered), longest, width), 9.0, dtype=torch.float64)
    for row, (number, length) in zip(frames, numbered, strict=True):
        row[:length] = torch.randn(length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    batch = {"lengths": torch.tensor(lengths), "position": (0, 0), "keys": torch.tensor(numbers)}
    if is_pretraining(kind):
        return batch | {"tokens": frames}
    labels = [labels_of(kind, *each) for each in numbered]
    if labels[0].ndim:
        most = max(map(len, labels))
        labels = [pad(row, (0, most - len(row)), value=IGNORED) for row in labels]
    return batch | {"hidden": frames[None], "labels": torch.stack(labels)}


def batches_of(kind, count):
    """The first batches."""
    numbers = iter(range(1, 100))
    return [batch_of(kind, [(next(numbers), length) for length in lengths]) for lengths in LENGTHS[:count]]


def big_batch(kind, count):
    """All utterances of the first batches."""
    return batch_of(kind, list(enumerate(chain(*LENGTHS[:count]), start=1)))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def silent_trainer(**options):
    settings = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    return pl.Trainer(**settings | shown | options)


class Batches(IterableDataset):
    """Batches without a length, like those of a data module."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def validate(batches, **options):
    """Metrics of the validation of one kind."""
    (metrics,) = silent_trainer(**options).validate(
        made("reconstruction"), DataLoader(Batches(batches), batch_size=None), verbose=False
    )
    return metrics


def step(kind, batches, **options):
    """One step of the optimiser. Returns the logged loss and its gradients."""
    module, trainer = made(kind), silent_trainer(**options)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    logged = {name.rpartition("/")[2]: float(value) for name, value in trainer.callback_metrics.items()}
    gradients = {name: whole(parameter.grad) for name, parameter in module.named_parameters() if parameter.grad is not None}
    loss = next(value for name, value in logged.items() if name == "loss" or name.startswith("train_"))
    state = {name: whole(value) for name, value in module.objective.state_dict().items()}
    return {"loss": loss, "norm": logged.get("gradient_norm"), "gradients": gradients, "state": state}


def validate_in_training(batches, **options):
    """Accuracy of the validation after a step of the task of frames."""
    trainer = silent_trainer(val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=0, **options)
    loaders = [DataLoader(Batches(given), batch_size=None) for given in (batches_of("frames", 1), batches)]
    trainer.fit(made("frames"), *loaders)
    return float(trainer.callback_metrics["valid/accuracy"])


STRATEGIES = {"ddp": ReplicatedStrategy, "fsdp": ShardedStrategy}
STEPS = [  # strategy, kind, batches that each rank adds up
    *(("ddp", kind, 1) for kind in KINDS),
    ("ddp", "reconstruction", 2),
    ("ddp", "ctc", 2),
    ("fsdp", "reconstruction of bands", 2),
    ("fsdp", "reconstruction", 1),
    *((strategy, "pretraining self_distillation", 2) for strategy in STRATEGIES),
]
VALIDATIONS = [3, 1]  # batches that two ranks share


def main(folder, rank):
    """Run all steps as one of two ranks, and store the result of each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {}
    for strategy, kind, count in STEPS:
        options = {"accumulate_grad_batches": count, "devices": 2, "strategy": STRATEGIES[strategy]()}
        results[strategy, kind, count] = step(kind, batches_of(kind, 2 * count)[rank::2], **options)
    for count in VALIDATIONS:
        results["validation", count] = validate(
            batches_of("reconstruction", count)[rank::2], devices=2, strategy=STRATEGIES["ddp"]()
        )
    one = [batch | {"ids": list("abcd")} for batch in batches_of("frames", 2)[1:]]
    results["validation in training"] = validate_in_training(one[rank:], devices=2, strategy=STRATEGIES["ddp"]())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
