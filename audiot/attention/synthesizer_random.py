"""Random Synthesizer and its handcrafted initialisation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention.mechanism import AttentionMechanism, key_mask, masked_softmax
from audiot.attention.patterns import NAMES, legacy_patterns, patterns

INITS = ("handcrafted", "normal", "legacy")
ANCHORS = ("max_frames", "length")
LOWEST = -80.0  # exp(-80) is still a normal number in float32 and bfloat16
LEFT, RIGHT, START = (NAMES.index(name) for name in ("left", "right", "start"))


class SynthesizerRandom(AttentionMechanism):
    """Random Synthesizer, softmax(R)V: one trained table of attention a head, whatever the input.

    (Tay et al. 2020, arXiv:2005.00743, section 3.2; handcrafted initialisation: Wu et al. 2020, arXiv:2006.05174.)

    Because all sequences share R, the batch is folded into the columns of one matrix product, and padding is exact in
    the same product: E = exp(R − row maximum) times the columns [V·m | m], m = 1 on real frames, gives numerators and
    denominators. Logits more than 80 below their row's maximum count as 80 below it.

    Differs from the papers: R holds *logits* of the patterns (arXiv:2006.05174 puts probabilities through the softmax,
    which all but erases them; `init: legacy` does so, defects included), and a floor ρ keeps every logit trainable.

    Args:
        embed_dim: See `AttentionMechanism`.
        num_heads: See `AttentionMechanism`.
        max_frames: Longest sequence supported, L: R has L² entries a head.
        dropout: See `AttentionMechanism`; one mask serves the whole batch.
        init: `handcrafted`: the patterns of `audiot.attention.patterns` on the first seven heads, N(0, 1) on the rest;
            `normal`: N(0, 1) on all; `legacy`: the initial values of the code that accompanies arXiv:2006.05174.
        init_floor: ρ in (0, 1]: a handcrafted head starts from (1 − ρ)·pattern + ρ/L.
        anchor: `max_frames`: the patterns are those of L frames, cropped to shorter sequences, where `right`, `start`
            and `end` fade. `length` (handcrafted only): the patterns follow the length of each sequence, and what is
            trained is Δ = 0 (`delta`) in logits = log((1 − ρ)·pattern + ρ/length) + Δ; real frames must come first.

    Raises:
        ValueError: an unknown `init` or `anchor`, `init_floor` outside (0, 1], or `anchor: length` without
            `init: handcrafted`.
    """

    inputs = frozenset({"value"})
    no_weight_decay = frozenset({"logits", "delta"})
    max_frames: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        init: str = "handcrafted",
        init_floor: float = 0.1,
        anchor: str = "max_frames",
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout)
        if init not in INITS:
            raise ValueError(f"init is {init!r}: set it to one of {', '.join(INITS)}")
        if anchor not in ANCHORS:
            raise ValueError(f"anchor is {anchor!r}: set it to one of {', '.join(ANCHORS)}")
        if not 0 < init_floor <= 1:
            raise ValueError(f"init_floor is {init_floor}: set it above 0 (which would freeze the head) and to at most 1")
        if anchor == "length" and init != "handcrafted":
            raise ValueError(f"anchor=length needs init=handcrafted, but init is {init}: set anchor=max_frames")
        self.max_frames = max_frames
        self.init = init
        self.init_floor = init_floor
        self.anchor = anchor
        table = nn.Parameter(torch.empty(num_heads, max_frames, max_frames))
        if anchor == "length":
            self.delta = table
        else:
            self.logits = table
        self._cache: _Cache | None = None
        self.reset_parameters()

    @property
    def table(self) -> nn.Parameter:
        """The trained table (H, L, L): R, or Δ with `anchor: length`."""
        return self.delta if self.anchor == "length" else self.logits

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the table to its initial values; see `init`."""
        nn.init.normal_(self.table)
        if self.anchor == "length":
            self.delta[: len(NAMES)] = 0
        elif self.init == "handcrafted":
            for logits, pattern in zip(self.logits, patterns(self.max_frames, self.num_heads).values(), strict=False):
                logits.copy_(self._floored(pattern).log())
        elif self.init == "legacy":
            values = legacy_patterns(self.max_frames)[: self.num_heads]
            self.logits[: len(values)] = values.to(self.logits)

    def attend(self, value: Tensor, valid: Tensor | None) -> Tensor:
        """Attend. With `anchor: length`, the rows of padded frames are zero."""
        # Not in float16, which ends at exp(-17), even under autocast (which meta tensors do not know).
        dtype = torch.float32 if value.dtype == torch.float16 else value.dtype
        attend = self._attend_by_length if self.anchor == "length" else self._attend
        with nullcontext() if value.is_meta else torch.autocast(value.device.type, enabled=False):
            return attend(value.to(dtype), valid).to(value.dtype)

    def dense_weights(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """softmax(R), (B, H, T, T), cropped to T frames."""
        num_sequences, num_frames, _ = hidden.shape
        logits = self.table[:, :num_frames, :num_frames].expand(num_sequences, -1, -1, -1)
        if self.anchor == "max_frames":
            return masked_softmax(logits, key_mask(valid))
        if valid is None:
            valid = torch.ones(num_sequences, num_frames, dtype=torch.bool, device=logits.device)
        start = torch.zeros_like(logits)
        for row, length in zip(start, valid.sum(dim=-1).tolist(), strict=True):
            for head, pattern in zip(row, patterns(length, self.num_heads).values(), strict=False):
                head[:length, :length] = self._floored(pattern).log()
        return masked_softmax(start + logits, key_mask(valid)) * valid[:, None, :, None]

    def _floored(self, pattern: Tensor) -> Tensor:
        """(1 − ρ)·pattern + ρ/T."""
        return (1 - self.init_floor) * pattern + self.init_floor / max(len(pattern), 1)

    def _attend(self, value: Tensor, valid: Tensor | None) -> Tensor:
        """softmax(R)V with the patterns of `max_frames`."""
        num_sequences, _, num_frames, _ = value.shape
        columns = value.permute(1, 2, 0, 3)  # H, T, B, D
        if valid is None and not self._may_cache():
            table = self.table[:, :num_frames, :num_frames]
            rows = table.softmax(dim=-1, dtype=_at_least_float32(table)).to(value.dtype)
            context = self._dropped(rows) @ columns.flatten(2)
            return context.unflatten(-1, columns.shape[2:]).permute(2, 0, 1, 3)
        if valid is None:
            mass = columns.new_ones(num_frames, num_sequences)
        else:
            columns = columns.masked_fill(~valid.T[:, :, None], 0)
            mass = valid.T.to(value.dtype)
        whole = self._exponentials(num_frames, value.dtype)
        kept = self._dropped(whole)
        numerator, denominator = _fold(kept, whole, columns, mass.expand(self.num_heads, -1, -1))
        return _divide(numerator, denominator).permute(2, 0, 1, 3)

    def _attend_by_length(self, value: Tensor, valid: Tensor | None) -> Tensor:
        """softmax(log((1 − ρ)P_b + ρ/T_b) + Δ)V, where P_b is the pattern of sequence b of T_b frames.

        With E = exp(Δ − row maximum), a weight is proportional to E·((1 − ρ)P_b + ρ/T_b). The floor and the patterns
        `start` and `end`, whose rows are all alike, depend on b and j alone: they scale the columns. `left` and `right`
        are triangular with rows that differ in their sum only: one more product for these two heads. What remains (the
        frame itself and its neighbours) is one entry a row.
        """
        num_sequences, num_heads, num_frames, _ = value.shape
        dtype = _at_least_float32(value)
        rho = self.init_floor
        device = value.device
        if valid is None:
            valid = torch.ones(num_sequences, num_frames, dtype=torch.bool, device=device)
        real = valid.T  # T, B
        length = real.sum(dim=0).clamp_min(1).to(dtype)  # B
        position = torch.arange(num_frames, device=device)[:, None]  # T, 1
        rising = ((position + 1) / length).pow(3)  # T, B: cubes within (0, 1], whose constant cancels
        falling = ((length - position).clamp_min(0) / length).pow(3)
        cubes = length * ((length + 1) / length / 2).square()  # B: the sum of either over the sequence

        # Every frame's weight (H, T, B): for the floor, and for the patterns whose rows are all alike.
        floor = (rho / length).expand(num_frames, -1)
        every = torch.stack([floor] * START + [(1 - rho) * cube / cubes + floor for cube in (falling, rising)])
        extra = max(0, num_heads - len(NAMES))
        every = torch.cat([every, torch.ones_like(floor).expand(extra, -1, -1)])[:num_heads] * real

        whole = self._exponentials(num_frames, value.dtype)
        kept = self._dropped(whole)
        columns = value.permute(1, 2, 0, 3).masked_fill(~real[:, :, None], 0)  # H, T, B, D
        numerator, denominator = _fold(kept, whole, columns, every.to(value.dtype), scale=True)

        # One frame's weight: frame i itself, i - 1 or i + 1; for left and right only where they allow no frame.
        one = (1 - rho) * real.to(dtype)  # T, B
        last = position + 1 >= length
        itself = position.expand(-1, num_sequences)
        targets = (
            itself,
            (itself - 1).clamp_min(0),
            torch.where(last, itself, (itself + 1).clamp_max(num_frames - 1)),
            itself,
            itself,
        )
        factors = (one, one, one, one * (position < 2), one * (position + 2 >= length))
        target, factor = torch.stack(targets[:num_heads]), torch.stack(factors[:num_heads])  # up to 5, T, B
        single = len(target)
        reached = columns[:single].gather(1, target[..., None].expand(-1, -1, -1, columns.shape[-1]))
        numerator = _add_heads(numerator, 0, (factor * kept[:single].gather(2, target))[..., None] * reached)
        denominator = _add_heads(denominator, 0, factor * whole[:single].gather(2, target))

        if num_heads > LEFT:
            # Row i sums the first n cubes, (n(n + 1)/2)², with n frames on its side: i - 1, or length - 2 - i.
            sides = slice(LEFT, min(num_heads, RIGHT + 1))
            count = torch.stack([itself - 1, length - 2 - position])[: num_heads - LEFT].clamp_min(0)
            total = (count * (count + 1) / 2).square() / length.pow(3)
            factor = torch.where((count > 0) & real, (1 - rho) / torch.where(count > 0, total, 1), 0)
            cube = (torch.stack([rising, falling])[: num_heads - LEFT] * real).to(value.dtype)
            side_whole = _sides(whole[sides])
            side_kept = side_whole if kept is whole else _sides(kept[sides])
            side_numerator, side_denominator = _fold(side_kept, side_whole, columns[sides], cube, scale=True)
            numerator = _add_heads(numerator, LEFT, factor[..., None] * side_numerator)
            denominator = _add_heads(denominator, LEFT, factor * side_denominator)

        return _divide(numerator, denominator).masked_fill(~real[:, :, None], 0).permute(2, 0, 1, 3)

    def _dropped(self, weights: Tensor) -> Tensor:
        return F.dropout(weights, self.dropout_now) if self.dropout_now else weights

    def _exponentials(self, num_frames: int, dtype: torch.dtype) -> Tensor:
        """E = exp(table − row maximum) of the first T frames (H, T, T); taken from the cache where there may be one."""
        if not self._may_cache():
            return _exponentials(self.table[:, :num_frames, :num_frames], dtype)
        table, cache = self.table, self._cache
        if cache is None or not cache.holds(table, dtype):
            cache = self._cache = _Cache(table, table.detach(), table._version, _exponentials(table, dtype))
        return cache.exponentials[:, :num_frames, :num_frames]

    def _may_cache(self) -> bool:
        # A tensor made in inference mode counts no versions, and a compiled graph can't ask for them.
        fixed = not self.training and not torch.is_grad_enabled()
        return fixed and not torch.compiler.is_compiling() and not self.table.is_inference()

    def train(self, mode: bool = True) -> SynthesizerRandom:
        """Switch between training and evaluation; drops the cache of the exponentials."""
        self._cache = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> SynthesizerRandom:
        self._cache = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return {**self.__dict__, "_cache": None}


class _Cache(NamedTuple):
    """exp(table − row maximum) and the state of the table that it was computed from.

    Any in-place change counts the tensor's version up, and a replaced parameter is another object. Only a write through
    `.data` leaves no trace: it is seen after the next `train()` or `eval()`.
    """

    table: Tensor
    storage: Tensor  # keeps the memory alive, so that its address can't be given to other values
    version: int
    exponentials: Tensor

    def holds(self, table: Tensor, dtype: torch.dtype) -> bool:
        """Whether the cached values are those of `table` now, in `dtype`."""
        return (
            self.table is table
            and self.storage.data_ptr() == table.data_ptr()
            and self.version == table._version
            and self.exponentials.dtype == dtype
        )


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _exponentials(table: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(table − row maximum), at least exp(−80): computed in float32 or better, returned in `dtype`."""
    table = table.to(_at_least_float32(table))
    # The maximum cancels between numerator and denominator, hence has no gradient.
    return (table - table.detach().amax(dim=-1, keepdim=True)).clamp_min(LOWEST).exp().to(dtype)


def _sides(matrices: Tensor) -> Tensor:
    """Keep j ≤ i − 2 of the left-context head's matrix and, if there are two, j ≥ i + 2 of the right-context head's."""
    return torch.stack([matrix.tril(-2) if side == 0 else matrix.triu(2) for side, matrix in enumerate(matrices)])


def _fold(kept: Tensor, whole: Tensor, columns: Tensor, mass: Tensor, scale: bool = False) -> tuple[Tensor, Tensor]:
    """Numerators Σ_j kept·mass·V and denominators Σ_j whole·mass, with the batch folded into the columns.

    Args:
        kept: Matrices (H, T, T), after dropout.
        whole: Matrices (H, T, T), before dropout; the same object if nothing is dropped, which needs one product only.
        columns: Values (H, T, B, D), zero on padded frames.
        mass: Weights of the frames (H, T, B), zero on padded frames.
        scale: Multiply the values by `mass`; needless where it is 1 on real frames.

    Returns:
        (H, T, B, D) and (H, T, B), in float32 or better.
    """
    num_heads, num_frames, num_sequences, head_dim = columns.shape
    if scale:
        columns = columns * mass[..., None]
    columns = columns.reshape(num_heads, num_frames, num_sequences * head_dim)
    if kept is whole:
        padding = columns.new_zeros(()).expand(num_heads, num_frames, -num_sequences * (head_dim + 1) % 8)
        product = whole @ torch.cat([columns, mass, padding], dim=-1)
        numerator, denominator, _ = product.split([columns.shape[-1], num_sequences, padding.shape[-1]], dim=-1)
    else:
        numerator, denominator = kept @ columns, whole @ mass
    dtype = _at_least_float32(columns)
    return numerator.unflatten(-1, (num_sequences, head_dim)).to(dtype), denominator.to(dtype)


def _add_heads(total: Tensor, first: int, part: Tensor) -> Tensor:
    """Add `part` to the heads of `total` (H, …) from `first` on."""
    before, heads, after = total.split([first, len(part), len(total) - first - len(part)])
    return torch.cat([before, heads + part, after])


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator (H, T, B, D) / denominator (H, T, B); zero, also in the gradients, where no real frame was summed."""
    return numerator / torch.where(denominator > 0, denominator, 1)[..., None]
