"""Hidden states of a frozen upstream, computed once and kept in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, starmap
from math import ceil

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from audiot.base.devices import attention_of_any_shape
from audiot.base.streams import key
from audiot.data.batches import Batch, first_batches, to_device
from audiot.data.datamodule import EndlessData, SpeechDataModule
from audiot.data.labels import Labels
from audiot.downstream.heads import LayerSelection
from audiot.downstream.upstream import Upstream

MAX_GIB = 16.0  # limit for the hidden states


@dataclass(frozen=True)
class State:
    """Hidden states (chosen, T, d), label(s), id and speaker of one utterance."""

    hidden: Tensor
    labels: Tensor
    id: str
    speaker: str | None


class CachedStates(EndlessData):
    """Batches of hidden states instead of waveforms, so that epochs of a probe do not run the encoder.

    Args:
        data: Source of waveforms and labels.
        upstream: Frozen upstream.
        device: Device of the upstream.
        layers: Indices of the hidden states to keep.
        batch_size: Utterances per batch.
    """

    def __init__(
        self,
        data: SpeechDataModule,
        upstream: Upstream,
        device: torch.device,
        *,
        layers: LayerSelection,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        assert data.labels is not None
        self.labels = data.labels
        self.seed = data.seed
        self.batch_size = batch_size
        needed = size_gib(data, upstream, len(layers.chosen))
        if needed > MAX_GIB:
            raise ValueError(
                f"the hidden states of this data would take {needed:.0f} GiB of memory, more than {MAX_GIB:.0f}: set "
                "downstream.cache=false, or use fewer utterances with data.label_fraction"
            )
        self.states = {role: compute_states(data, role, upstream, device, layers) for role in ("train", "valid", "test")}

    def _loader(self, role: str, seed: int | None) -> DataLoader[Batch]:
        turns = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        start = (0, 0) if seed is None else self.next_batch
        return DataLoader(_Batches(self.states[role], self.labels, self.batch_size, seed, turns, start), batch_size=None)

    def faster_loading(self) -> str:
        """What makes batches faster."""
        return "raise downstream.batch_size"

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless batches, shuffled again in every epoch, starting at ``next_batch``."""
        return first_batches(self._loader("train", self.seed), self.trainer)

    def val_dataloader(self) -> Iterable[Batch]:
        """The validation split in order."""
        return first_batches(self._loader("valid", None), self.trainer)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test split in order."""
        return self._loader("test", None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move tensors except lengths to the device."""
        return to_device(batch, device)


def size_gib(data: SpeechDataModule, upstream: Upstream, num_states: int) -> float:
    """Size of the hidden states of all splits in GiB."""
    split = {role: data.corpus.split_for(data.task, role) for role in ("train", "valid", "test")}
    hours = sum(data.corpus.hours[name] * (data.label_fraction if role == "train" else 1) for role, name in split.items())
    features = upstream.features
    states = hours * 3600 * features.sample_rate / features.hop_length / upstream.stack
    return states * num_states * upstream.state_dim * 4 / 2**30


@torch.inference_mode()
def compute_states(
    data: SpeechDataModule,
    role: str,
    upstream: Upstream,
    device: torch.device,
    layers: LayerSelection,
) -> list[State]:
    """The chosen hidden states and labels of every utterance of a role (``train``, ``valid``, ``test``)."""
    upstream = upstream.to(device).eval()
    states: list[State] = []
    for batch in data.ordered_loader(role):
        batch = to_device(batch, device)
        with attention_of_any_shape():
            hidden, lengths = upstream(batch["waveforms"], batch["lengths"])
        hidden, labels = layers.pick(hidden).cpu(), batch["labels"].cpu()
        for number, length in enumerate(lengths.tolist()):
            own = hidden[:, number, :length].clone()
            states.append(State(own, labels[number], batch["ids"][number], batch["speakers"][number]))
    return states


class _Batches(IterableDataset[Batch]):
    """Collated states: one ordered pass (seed None) or endless shuffled ones.

    ``turns`` (r, N) selects batches r, r + N, … of one sequence through all epochs, from ``start`` on: an epoch, and a number of
    batches to leave out from its start.
    """

    def __init__(
        self,
        states: list[State],
        labels: Labels,
        batch_size: int,
        seed: int | None,
        turns: tuple[int, int],
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.states = states
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.turns = turns
        self.start = start

    def _collate(self, chosen: list[int], position: tuple[int, int]) -> Batch:
        states = [self.states[number] for number in chosen]
        hidden = [state.hidden.transpose(0, 1) for state in states]  # T, chosen, d
        return {
            "hidden": pad_sequence(hidden, batch_first=True).permute(2, 0, 1, 3),
            "lengths": torch.tensor([len(item) for item in hidden]),
            "labels": self.labels.collate([state.labels for state in states]),
            "ids": [state.id for state in states],
            "speakers": [state.speaker for state in states],
            "position": position,
        }

    def __iter__(self) -> Iterator[Batch]:
        rank, world_size = self.turns
        epoch, left_out = self.start
        return starmap(self._collate, islice(self._chosen(epoch), left_out + rank, None, world_size))

    def _chosen(self, epoch: int) -> Iterator[tuple[list[int], tuple[int, int]]]:
        """Utterances and position of each batch."""
        count = len(self.states)
        while True:
            order = list(range(count))
            if self.seed is not None:
                generator = torch.Generator().manual_seed(key("cached batches", self.seed, epoch))
                order = torch.randperm(count, generator=generator).tolist()
            for number in range(ceil(count / self.batch_size)):
                yield order[number * self.batch_size : (number + 1) * self.batch_size], (epoch, number)
            if self.seed is None:
                return
            epoch += 1
