"""Hidden states of a frozen upstream, computed once and kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from audiot.data.batches import Batch, to_device
from audiot.data.datamodule import SpeechDataModule
from audiot.data.labels import IGNORED
from audiot.downstream.upstream import EncoderUpstream, FeaturesUpstream
from audiot.random import key

MAX_GIB = 16.0  # more hidden states than this are refused

State = tuple[Tensor, Tensor]  # hidden states (states, T, d) and label(s) of one utterance


class CachedStates(pl.LightningDataModule):
    """Batches of hidden states in place of waveforms; a probe's epochs then cost no encoder.

    Args:
        data: Where the waveforms and labels come from.
        upstream: A frozen upstream.
        device: Where it runs.
        last_only: Keep the last layer's states alone.
        batch_size: Utterances in a batch.
    """

    def __init__(
        self,
        data: SpeechDataModule,
        upstream: EncoderUpstream | FeaturesUpstream,
        device: torch.device,
        *,
        last_only: bool,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.seed = data.seed
        self.batch_size = batch_size
        needed = size_gib(data, upstream, last_only)
        if needed > MAX_GIB:
            raise ValueError(
                f"the hidden states of this data would take {needed:.0f} GiB of memory, more than {MAX_GIB:.0f}: set "
                "downstream.cache=false, or use fewer utterances with data.label_fraction"
            )
        self.states = {role: compute_states(data, role, upstream, device, last_only) for role in ("train", "valid", "test")}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless batches, shuffled anew every epoch."""
        return DataLoader(_Batches(self.states["train"], self.batch_size, self.seed), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation split, in order."""
        return DataLoader(_Batches(self.states["valid"], self.batch_size, None), batch_size=None)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test split, in order."""
        return DataLoader(_Batches(self.states["test"], self.batch_size, None), batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Tensors to the device, lengths excepted."""
        return to_device(batch, device)


def size_gib(data: SpeechDataModule, upstream: EncoderUpstream | FeaturesUpstream, last_only: bool) -> float:
    """Memory that the hidden states of all splits take."""
    split = {role: data.corpus.split_for(data.task, role) for role in ("train", "valid", "test")}
    hours = sum(data.corpus.hours[name] * (data.label_fraction if role == "train" else 1) for role, name in split.items())
    features = upstream.features
    states = hours * 3600 * features.sample_rate / features.hop_length / upstream.stack
    return states * (1 if last_only else upstream.num_states) * upstream.state_dim * 4 / 2**30


@torch.inference_mode()
def compute_states(
    data: SpeechDataModule,
    role: str,
    upstream: EncoderUpstream | FeaturesUpstream,
    device: torch.device,
    last_only: bool,
) -> list[State]:
    """Hidden states and labels of every utterance of a role (``train``, ``valid``, ``test``)."""
    upstream = upstream.to(device).eval()
    states: list[State] = []
    for batch in data.ordered_loader(role):
        batch = to_device(batch, device)
        hidden, lengths = upstream(batch["waveforms"], batch["lengths"])
        hidden = (hidden[-1:] if last_only else hidden).cpu()
        labels = batch["labels"].cpu()
        for number, length in enumerate(lengths.tolist()):
            label = labels[number]
            states.append((hidden[:, number, :length].clone(), label[: length * upstream.stack] if label.ndim else label))
    return states


class _Batches(IterableDataset[Batch]):
    """Collated states: in order once (seed None), or shuffled without end."""

    def __init__(self, states: list[State], batch_size: int, seed: int | None) -> None:
        self.states = states
        self.batch_size = batch_size
        self.seed = seed

    def _collate(self, chosen: list[int], position: tuple[int, int]) -> Batch:
        hidden = [self.states[number][0].transpose(0, 1) for number in chosen]  # T, states, d
        labels = [self.states[number][1] for number in chosen]
        return {
            "hidden": pad_sequence(hidden, batch_first=True).permute(2, 0, 1, 3),
            "lengths": torch.tensor([len(item) for item in hidden]),
            "labels": pad_sequence(labels, True, IGNORED) if labels[0].ndim else torch.stack(labels),
            "position": position,
        }

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.states)
        epoch = 0
        while True:
            order = list(range(count))
            if self.seed is not None:
                generator = torch.Generator().manual_seed(key("cached batches", self.seed, epoch))
                order = torch.randperm(count, generator=generator).tolist()
            for number in range(ceil(count / self.batch_size)):
                yield self._collate(order[number * self.batch_size : (number + 1) * self.batch_size], (epoch, number))
            if self.seed is None:
                return
            epoch += 1
