"""What heads are worth: the loss without each, and without more and more of them.

After Michel, Levy and Neubig 2019, arXiv:1905.10650, and Voita et al. 2019, arXiv:1905.09418. Nothing is trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from audiot.attention import SelfAttention
from audiot.model import Encoder

Head = tuple[int, int]
"""Layer and head, both counted from 1."""


@dataclass(frozen=True)
class Pruning:
    """Losses without heads.

    Attributes:
        alone: Head → the loss without it alone.
        order: Heads in the order of that loss, the least important first; of equal ones the earlier.
        removed: Loss without the first 0, 1, … heads of the order, up to all of them.
    """

    alone: dict[Head, float]
    order: list[Head]
    removed: list[float]


def prune(encoder: Encoder, loss: Callable[[], float]) -> Pruning:
    """Remove every head alone, and then one after the other from the least important one on.

    A removed head gives zeros to the output projection. A layer that is shared loses it wherever it is used.

    Args:
        encoder: The encoder, as it is after this too.
        loss: Gives the loss with the encoder as it is now, the same for the same encoder.
    """
    with kept_heads(encoder) as kept:
        heads = [(layer, head) for layer, own in enumerate(kept, 1) for head in range(1, len(own) + 1)]
        intact, alone = loss(), {}
        for layer, head in heads:
            kept[layer - 1][head - 1] = 0
            alone[layer, head] = loss()
            kept[layer - 1][head - 1] = 1
        order = sorted(heads, key=lambda each: alone[each])
        removed = [intact, alone[order[0]]]
        kept[order[0][0] - 1][order[0][1] - 1] = 0
        for layer, head in order[1:]:
            kept[layer - 1][head - 1] = 0
            removed.append(loss())
    return Pruning(alone, order, removed)


@contextmanager
def kept_heads(encoder: Encoder) -> Iterator[list[Tensor]]:
    """Inside, what the output projections are given of each head is multiplied by these factors, ones at first.

    Yields:
        A tensor (H,) for each layer that has parameters of its own.
    """
    with ExitStack() as stack:
        factors = []
        for index in range(len(encoder.layers)):
            attention = encoder.layer(index).attention
            factor = torch.ones(attention.num_heads, device=attention.output.weight.device)
            stack.callback(_scale(attention, factor))
            factors.append(factor)
        yield factors


def _scale(attention: SelfAttention, factor: Tensor) -> Callable[[], None]:
    """Multiply the heads by factors (H,) from now on. Returns the function that ends this."""

    def scaled(_: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (context,) = inputs  # B, T, d
        heads = context.unflatten(-1, (len(factor), -1))
        return ((heads * factor[:, None].to(heads.dtype)).flatten(-2),)

    return attention.output.register_forward_pre_hook(scaled).remove
