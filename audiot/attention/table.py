"""Attention by a trained table that is the same for every input: what the random synthesizers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from audiot.attention import folding
from audiot.attention.mechanism import AttentionMechanism, check_type, key_mask, masked_softmax


class Init(NamedTuple):
    """A way to set the initial values of a table."""

    fill: Callable[..., None]
    head_names: tuple[str, ...] = ()  # patterns that the first heads start from


class TableSynthesizer(AttentionMechanism):
    """Base: softmax(R)V, where each head has one table R, whatever the input.

    A subclass owns the parameters of R and writes `scores`. All sequences share R, so that the batch is folded into the columns
    of one matrix product (`audiot.attention.folding`). The weights are computed from the parameters in every call. They are not
    kept for the next one: PyTorch has ways to write parameters that leave no trace, and the kept weights could then be those of
    other parameters. One dropout mask serves the whole batch.
    """

    inputs = frozenset({"value"})

    head_names: tuple[str, ...] = ()
    """Patterns that the first heads start from; pictures call the heads so."""

    @abstractmethod
    def scores(self, num_frames: int) -> Tensor:
        """The table for sequences of T frames, (H, T, T)."""

    def attend(self, value: Tensor, valid: Tensor | None) -> Tensor:
        """Attend with the batch folded into columns."""
        # Not in float16, which ends at exp(-17), even under autocast (which meta tensors do not know).
        dtype = torch.float32 if value.dtype == torch.float16 else value.dtype
        with nullcontext() if value.is_meta else torch.autocast(value.device.type, enabled=False):
            return self.fold(self.scores(value.shape[2]), value.to(dtype), valid).to(value.dtype)

    def fold(self, scores: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """The context (B, H, T, D) of the table `scores` (H, T, T)."""
        return folding.attend(scores, value, valid, self.dropout_now)

    def dense_weights(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """softmax(R), (B, H, T, T)."""
        num_sequences, num_frames, _ = hidden.shape
        scores = self.scores(num_frames).expand(num_sequences, -1, -1, -1)
        return masked_softmax(scores, key_mask(valid))


def floored(pattern: Tensor, num_frames: int, floor: float) -> Tensor:
    """(1 − ρ)·pattern + ρ/T: a pattern whose every weight can be trained."""
    return (1 - floor) * pattern + floor / max(num_frames, 1)


def check_floor(init_floor: Any) -> None:
    """Raise ValueError if `init_floor` is not in (0, 1]."""
    check_type(float, init_floor=init_floor)
    if not 0 < init_floor <= 1:
        raise ValueError(f"init_floor is {init_floor}: set it above 0 (which would freeze the head) and to at most 1")
