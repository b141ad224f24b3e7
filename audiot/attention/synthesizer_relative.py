"""Random Synthesizer whose table depends on the offset between two frames."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention.mechanism import choose
from audiot.attention.patterns import NAMES, offset_patterns
from audiot.attention.table import Init, TableSynthesizer, check_floor, floored


class SynthesizerRelative(TableSynthesizer):
    """Relative Random Synthesizer, softmax(R)V with R_ij = o(j − i) + c(j), whatever the input.

    Each head has one logit o per offset (`offsets`) and one logit c per frame (`columns`). It is in neither of the papers of the
    Random Synthesizer (`SynthesizerRandom`), whose table has a logit for every pair of frames.

    Works at any length: beyond L = `max_frames`, offsets and frames take the values at the ends.

    Cost: time and memory of `SynthesizerRandom`, with H(3L − 1) parameters.

    The other arguments are those of `AttentionMechanism`.

    Args:
        max_frames: Longest sequence that has trained values of its own, L.
        init: Initial values of the offsets. `handcrafted`: the first seven heads start from the patterns, the others from
            N(0, 1). Five of the patterns are functions of the offset (`audiot.attention.patterns.offset_patterns`); `start` and
            `end` are set by the columns. Near the ends of the sequence, a row whose offset leads outside is uniform. `normal`:
            N(0, 1) on all heads.
        init_floor: Floor ρ in (0, 1]. A handcrafted head starts from (1 − ρ)·pattern + ρ/L.

    Raises:
        ValueError: an unknown `init`, or `init_floor` outside (0, 1].
    """

    no_weight_decay = frozenset({"offsets", "columns"})

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        init: str = "handcrafted",
        init_floor: float = 0.1,
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout)
        self.init = choose("init", init, INITS)
        check_floor(init_floor)
        self.head_names = self.init.head_names
        self.init_floor = init_floor
        self.table_frames = max_frames  # L
        self.offsets = nn.Parameter(torch.empty(num_heads, 2 * max_frames - 1))
        self.columns = nn.Parameter(torch.empty(num_heads, max_frames))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set offsets and columns to their initial values."""
        self.init.fill(self.offsets, self.columns, self.init_floor)

    def scores(self, num_frames: int) -> Tensor:
        """R_ij = o(j − i) + c(j), (H, T, T)."""
        furthest = self.table_frames - 1
        offset = torch.arange(1 - num_frames, num_frames, device=self.offsets.device).clamp(-furthest, furthest)
        columns = self.columns.index_select(1, offset[num_frames - 1 :])  # H, T
        return _Toeplitz.apply(self.offsets.index_select(1, offset + furthest)) + columns[:, None]


def _fill_normal(offsets: Tensor, columns: Tensor, floor: float) -> None:
    nn.init.normal_(offsets)
    nn.init.zeros_(columns)


def _fill_handcrafted(offsets: Tensor, columns: Tensor, floor: float) -> None:
    _fill_normal(offsets, columns, floor)
    num_heads, num_frames = columns.shape
    by_offset = offset_patterns(num_frames)
    rising = torch.arange(1, num_frames + 1, dtype=torch.float64) ** 3
    by_column = {"start": rising.flip(0) / rising.sum(), "end": rising / rising.sum()}  # all rows are alike
    for head, name in enumerate(NAMES[:num_heads]):
        if name in by_offset:
            offsets[head] = floored(by_offset[name], num_frames, floor).log()
        else:
            offsets[head] = 0
            columns[head] = floored(by_column[name], num_frames, floor).log()


INITS = {"handcrafted": Init(_fill_handcrafted, NAMES), "normal": Init(_fill_normal)}


class _Toeplitz(torch.autograd.Function):
    """Values of the offsets 1 − T to T − 1, (H, 2T − 1) → the matrix of the values at j − i, (H, T, T).

    Its gradient sums diagonals as columns of one copy. The gradient of an index would be a scattered sum over all pairs of
    frames.
    """

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        """Row i is the window of T values that begins at offset −i."""
        num_heads, num_values = values.shape
        num_frames = (num_values + 1) // 2
        windows = values.contiguous().as_strided((num_heads, num_frames, num_frames), (num_values, 1, 1))
        return windows.flip(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: the matrix is linear in the values."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Rows filled up to 2T − 1 and read as rows of 2T: entry (i, j) comes to lie in column j − i, modulo 2T."""
        num_frames = gradient.shape[-1]
        filled = F.pad(gradient, (0, num_frames - 1)).flatten(1)
        rows, rest = filled.split([(num_frames - 1) * 2 * num_frames, num_frames], dim=1)
        columns = rows.unflatten(1, (num_frames - 1, 2 * num_frames)).sum(dim=1)
        return torch.cat([columns[:, num_frames + 1 :], columns[:, :num_frames] + rest], dim=1)
