"""Random Synthesizer, its three forms and its handcrafted initialisation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention import folding
from audiot.attention.mechanism import AttentionMechanism, at_least_one, fused_attention, key_mask, masked_softmax
from audiot.attention.patterns import NAMES, legacy_patterns, offset_patterns, patterns
from audiot.attention.synthesizer_dense import common_size, widen

FORMS = ("full", "relative", "factorized")
INITS = ("handcrafted", "normal", "legacy")
ANCHORS = ("max_frames", "length")
LOWEST = -80.0  # exp(-80) is still a normal number in float32 and bfloat16


class SynthesizerRandom(AttentionMechanism):
    """Random Synthesizer, softmax(R)V: one trained table of attention a head, whatever the input.

    (Tay et al. 2020, arXiv:2005.00743, section 3.2; handcrafted initialisation: Wu et al. 2020, arXiv:2006.05174.)

    `form` says what is trained, for L = `max_frames`:

    - `full`: R (`logits`), or with `anchor: length` what is added to the patterns (`delta`). HL² parameters.
    - `relative`: R_ij = o(j − i) + c(j), one logit an offset and one a frame (`offsets`, `columns`), at their end values
      beyond L, so that there is no limit on T. H(3L − 1) parameters.
    - `factorized`: R = R₁R₂ᵀ of rank `rank` (`left`, `right`; the paper's Factorized Random Synthesizer). 2HL·`rank` parameters.

    Because all sequences share R, `full` and `relative` fold the batch into the columns of one matrix product (see
    `audiot.attention.folding`). With padding, the weights are exp(R − row maximum), divided by their sums over the real frames;
    logits more than 80 below their row's maximum count as 80 below it. They are computed from the parameters in every call:
    PyTorch has ways to write parameters that leave no trace, so that weights kept from an earlier call could be those of other
    parameters. `factorized` is fused attention of R₁ and R₂.

    Cost: O(T²d) time, half of query-key attention's products (with `anchor: length`, one more for two heads), O(Td) memory
    a sequence and O(HT²) once a batch. `factorized`: time and memory of query-key attention. No query and key projections.

    Differs from the papers: R holds *logits* of the patterns (arXiv:2006.05174 puts probabilities through the softmax,
    which all but erases them; `init: legacy` does so, defects included), and a floor ρ keeps every logit trainable. Tables
    are cropped to the current length. `relative` is in neither paper.

    Args:
        embed_dim: Width d of the model.
        num_heads: Number of heads H, a divisor of `embed_dim`.
        max_frames: Longest sequence supported, L; with `relative`, the longest that has trained values of its own.
        dropout: Probability of dropping an attention weight while training; with `full` and `relative`, one mask serves the
            whole batch.
        form: `full`, `relative` or `factorized`.
        rank: Rank of R in the form `factorized`; others ignore it.
        init: `handcrafted`: the patterns of `audiot.attention.patterns` on the first seven heads, N(0, 1) on the rest. The
            form `relative` starts from `offset_patterns`, and from `start` and `end` by their columns; near the ends of
            the sequence, rows whose offset leads outside are uniform. `normal`: N(0, 1) on all heads, of `relative` the
            offsets; entries of R₁R₂ᵀ have variance 1. `legacy` (`full` only): the initial values of the code that
            accompanies arXiv:2006.05174.
        init_floor: ρ in (0, 1]: a handcrafted head starts from (1 − ρ)·pattern + ρ/L.
        anchor: `max_frames`: the patterns are those of L frames, cropped to shorter sequences, where `right`, `start`
            and `end` fade. `length` (`full` and handcrafted only): the patterns follow the length of each sequence, and
            what is trained is Δ = 0 (`delta`) in logits = log((1 − ρ)·pattern + ρ/length) + Δ; real frames must come first.

    Raises:
        ValueError: an unknown `form`, `init` or `anchor`, two of them that exclude each other, `init_floor` outside (0, 1],
            or `rank` not positive. With `anchor: length`, `attend` refuses padding before real frames, if `valid` is on the
            CPU and nothing is compiled; elsewhere the check would make the host wait.
    """

    inputs = frozenset({"value"})
    no_weight_decay = frozenset({"logits", "delta", "offsets", "columns", "left", "right"})

    logits: nn.Parameter
    delta: nn.Parameter
    offsets: nn.Parameter
    columns: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        form: str = "full",
        rank: int = 8,
        init: str = "handcrafted",
        init_floor: float = 0.1,
        anchor: str = "max_frames",
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout)
        at_least_one(rank=rank)
        _check(form, init, init_floor, anchor)
        self.max_frames = None if form == "relative" else max_frames
        self.table_frames = max_frames  # L
        self.form = form
        self.rank = rank
        self.init = init
        self.init_floor = init_floor
        self.anchor = anchor
        shapes: dict[str, tuple[int, ...]] = {"delta" if anchor == "length" else "logits": (max_frames, max_frames)}
        if form == "relative":
            shapes = {"offsets": (2 * max_frames - 1,), "columns": (max_frames,)}
        elif form == "factorized":
            shapes = {"left": (max_frames, rank), "right": (max_frames, rank)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_heads, *shape)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to their initial values; see `init`."""
        if self.form == "factorized":
            for factor in (self.left, self.right):
                nn.init.normal_(factor, std=self.rank**-0.25)
        elif self.form == "relative":
            self._reset_relative()
        elif self.anchor == "length":
            nn.init.normal_(self.delta)
            self.delta[: len(NAMES)] = 0
        else:
            self._reset_full()

    def _reset_full(self) -> None:
        nn.init.normal_(self.logits)
        if self.init == "handcrafted":
            for logits, pattern in zip(self.logits, patterns(self.table_frames, self.num_heads).values(), strict=False):
                logits.copy_(self._floored(pattern, self.table_frames).log())
        elif self.init == "legacy":
            values = legacy_patterns(self.table_frames)[: self.num_heads]
            self.logits[: len(values)] = values.to(self.logits)

    def _reset_relative(self) -> None:
        nn.init.normal_(self.offsets)
        nn.init.zeros_(self.columns)
        if self.init == "handcrafted":
            by_offset = offset_patterns(self.table_frames)
            rising = torch.arange(1, self.table_frames + 1, dtype=torch.float64) ** 3
            by_column = {"start": rising.flip(0) / rising.sum(), "end": rising / rising.sum()}  # all rows are alike
            for head, name in enumerate(NAMES[: self.num_heads]):
                if name in by_offset:
                    self.offsets[head] = self._floored(by_offset[name], self.table_frames).log()
                else:
                    self.offsets[head] = 0
                    self.columns[head] = self._floored(by_column[name], self.table_frames).log()

    def _floored(self, pattern: Tensor, num_frames: int) -> Tensor:
        """(1 − ρ)·pattern + ρ/T."""
        return (1 - self.init_floor) * pattern + self.init_floor / max(num_frames, 1)

    def scores(self, num_frames: int) -> Tensor:
        """The table for sequences of T frames, R or Δ, (H, T, T)."""
        if self.form == "factorized":
            return self.left[:, :num_frames] @ self.right[:, :num_frames].transpose(1, 2)
        if self.form == "relative":
            return self._relative_scores(num_frames)
        table = self.delta if self.anchor == "length" else self.logits
        return table[:, :num_frames, :num_frames]

    def _relative_scores(self, num_frames: int) -> Tensor:
        """R_ij = o(j − i) + c(j)."""
        furthest = self.table_frames - 1
        offset = torch.arange(1 - num_frames, num_frames, device=self.offsets.device).clamp(-furthest, furthest)
        columns = self.columns.index_select(1, offset[num_frames - 1 :])  # H, T
        return _Toeplitz.apply(self.offsets.index_select(1, offset + furthest)) + columns[:, None]

    def attend(self, value: Tensor, valid: Tensor | None) -> Tensor:
        """Attend. With `anchor: length`, the rows of padded frames are zero."""
        if self.form == "factorized":
            return self._attend_factorized(value, valid)
        # Not in float16, which ends at exp(-17), even under autocast (which meta tensors do not know).
        dtype = torch.float32 if value.dtype == torch.float16 else value.dtype
        with nullcontext() if value.is_meta else torch.autocast(value.device.type, enabled=False):
            return self._attend_folded(value.to(dtype), valid).to(value.dtype)

    def _attend_folded(self, value: Tensor, valid: Tensor | None) -> Tensor:
        num_sequences, _, num_frames, head_dim = value.shape
        scores = self.scores(num_frames)
        if valid is None and self.anchor == "max_frames":
            weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
            context = self._dropped(weights) @ value.permute(1, 2, 0, 3).flatten(2)  # H, T, B·D
            return context.unflatten(-1, (num_sequences, head_dim)).permute(2, 0, 1, 3)
        whole = _exponentials(scores, value.dtype)
        kept = self._dropped(whole)
        if self.anchor == "length":
            _check_order(valid)
            return folding.attend_by_length(kept, whole, value, valid, self.init_floor)
        return folding.attend(kept, whole, value, valid)

    def _attend_factorized(self, value: Tensor, valid: Tensor | None) -> Tensor:
        num_sequences, _, num_frames, _ = value.shape
        size = common_size(self.head_dim, self.rank)
        query, key = (
            # Cast before it is expanded to the batch: autocast would make a copy for every sequence.
            widen(factor[:, :num_frames].to(value.dtype), size).expand(num_sequences, -1, -1, -1)
            for factor in (self.left, self.right)
        )
        context = fused_attention(query, key, widen(value, size), key_mask(valid), self.dropout_now, scale=1.0)
        return context[..., : self.head_dim]

    def dense_weights(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """softmax(R), (B, H, T, T)."""
        num_sequences, num_frames, _ = hidden.shape
        scores = self.scores(num_frames).expand(num_sequences, -1, -1, -1)
        if self.anchor == "max_frames":
            return masked_softmax(scores, key_mask(valid))
        if valid is None:
            valid = torch.ones(num_sequences, num_frames, dtype=torch.bool, device=scores.device)
        start = torch.zeros_like(scores)
        for row, length in zip(start, valid.sum(dim=-1).tolist(), strict=True):
            for head, pattern in zip(row, patterns(length, self.num_heads).values(), strict=False):
                head[:length, :length] = self._floored(pattern, length).log()
        return masked_softmax(start + scores, key_mask(valid)) * valid[:, None, :, None]

    def _dropped(self, weights: Tensor) -> Tensor:
        return F.dropout(weights, self.dropout_now) if self.dropout_now else weights


class _Toeplitz(torch.autograd.Function):
    """Values of the offsets 1 − T to T − 1, (H, 2T − 1) → the matrix of the values at j − i, (H, T, T).

    Its gradient sums diagonals as columns of one copy; that of an index would be a scattered sum over all pairs of frames.
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


def _exponentials(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(scores − row maximum), at least exp(−80): computed in float32 or better, returned in `dtype`."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # The maximum cancels between numerator and denominator, hence has no gradient.
    below = scores - scores.detach().amax(dim=-1, keepdim=True)
    return below.clamp_min(LOWEST).exp_().to(dtype)


def _check_order(valid: Tensor | None) -> None:
    """Raise ValueError if a padded frame precedes a real one; on the CPU only, as asking a GPU would make the host wait."""
    if valid is None or valid.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        raise ValueError("anchor=length needs real frames before padded ones: pad at the end, or set anchor=max_frames")


def _check(form: str, init: str, init_floor: float, anchor: str) -> None:
    """Raise ValueError for a value that is unknown, or excluded by another one."""
    for name, choice, choices in (("form", form, FORMS), ("init", init, INITS), ("anchor", anchor, ANCHORS)):
        if choice not in choices:
            raise ValueError(f"{name} is {choice!r}: set it to one of {', '.join(choices)}")
    if not 0 < init_floor <= 1:
        raise ValueError(f"init_floor is {init_floor}: set it above 0 (which would freeze the head) and to at most 1")
    if anchor == "length" and form != "full":
        raise ValueError(
            f"anchor=length needs a logit for every pair of frames, which form={form} lacks: set anchor=max_frames or form=full"
        )
    if anchor == "length" and init != "handcrafted":
        raise ValueError(f"anchor=length needs init=handcrafted, but init is {init}: set anchor=max_frames")
    if form == "factorized" and init == "handcrafted":
        raise ValueError(
            "init=handcrafted is not for form=factorized: of the patterns only start and end have a low rank; set init=normal"
        )
    if form != "full" and init == "legacy":
        raise ValueError(f"init=legacy is a published table of all pairs of frames, but form is {form}: set init=normal")
