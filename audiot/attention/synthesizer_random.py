"""Random Synthesizer with a full table, and its handcrafted initial values."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from audiot.attention import folding
from audiot.attention.mechanism import choose, key_mask, masked_softmax
from audiot.attention.patterns import NAMES, legacy_patterns, patterns
from audiot.attention.table import Init, TableSynthesizer, check_floor, floored
from audiot.base.tracing import first, is_recording


class SynthesizerRandom(TableSynthesizer):
    """Random Synthesizer, softmax(R)V: each head has one trained table R, whatever the input.

    The mechanism is that of Tay et al. 2020, arXiv:2005.00743, section 3.2. The handcrafted initial values are those of Wu et
    al. 2020, arXiv:2006.05174.

    A sequence of T frames uses the first T rows and columns of R. With padding, the weights are exp(R − row maximum), divided
    by their sums over the real frames. A logit that is more than 80 below its row's maximum counts as 80 below it.

    Cost: O(T²d) time, which is half of the products of query-key attention; with `anchor: length`, two heads need one product
    more. Memory is O(Td) per sequence and O(HT²) per batch. There are HL² parameters, for L = `max_frames`, and no query and
    key projections.

    Differs from the papers: R holds the *logits* of the patterns. (Wu et al. put probabilities through the softmax, which all
    but erases them. `init: legacy` does the same, with its other defects.) A floor ρ keeps every logit trainable. Tables are
    cropped to the current length.

    The other arguments are those of `AttentionMechanism`.

    Args:
        max_frames: Longest sequence supported, L.
        init: Initial values of R. `handcrafted`: the patterns of `audiot.attention.patterns` on the first seven heads, N(0, 1)
            on the others. `without_X`: likewise, but the head of pattern X is N(0, 1) too. `normal`: N(0, 1) on all heads.
            `legacy`: the initial values of the code that accompanies arXiv:2006.05174.
        init_floor: Floor ρ in (0, 1]. A handcrafted head starts from (1 − ρ)·pattern + ρ/L.
        anchor: Length that the patterns belong to. `max_frames`: the patterns are those of L frames. In shorter sequences they
            are cropped, and `right`, `start` and `end` fade. What is trained is R (`logits`). `length`: the patterns follow the
            length of each sequence. The logits are log((1 − ρ)·pattern + ρ/length) + Δ. What is trained is Δ (`delta`), which
            starts from 0. This takes `init: handcrafted`, and real frames before padded ones.

    Raises:
        ValueError: an unknown `init` or `anchor`, two of them that exclude each other, or `init_floor` outside (0, 1]. With
            `anchor: length`, `attend` refuses padding before real frames if `valid` is on the CPU and nothing is compiled. On
            other devices the check would make the host wait.
    """

    no_weight_decay = frozenset({"logits", "delta"})

    logits: nn.Parameter
    delta: nn.Parameter

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
        given = choose("init", init, INITS)
        self.anchor = choose("anchor", anchor, ANCHORS)
        check_floor(init_floor)
        self.init = self.anchor.accept(init, given)
        self.head_names = self.init.head_names
        self.init_floor = init_floor
        self.max_frames = max_frames
        self.register_parameter(self.anchor.parameter, nn.Parameter(torch.empty(num_heads, max_frames, max_frames)))
        self.reset_parameters()

    @property
    def table(self) -> nn.Parameter:
        """The trained table, R or Δ, (H, L, L)."""
        table: nn.Parameter = getattr(self, self.anchor.parameter)
        return table

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the table to its initial values."""
        self.init.fill(self.table, self.init_floor)

    def scores(self, num_frames: int) -> Tensor:
        """The table for sequences of T frames, R or Δ, (H, T, T)."""
        return first(first(self.table, 1, num_frames), 2, num_frames)

    def fold(self, scores: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """The context (B, H, T, D). With `anchor: length`, the rows of padded frames are zero."""
        return self.anchor.attend(scores, value, valid, self.init_floor, self.dropout_now)

    def dense_weights(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """softmax(R), or the softmax of the patterns' logits + Δ, (B, H, T, T)."""
        num_sequences, num_frames, _ = hidden.shape
        return self.anchor.weights(self.scores(num_frames).expand(num_sequences, -1, -1, -1), valid, self.init_floor)


def _fill_normal(table: Tensor, floor: float) -> None:
    nn.init.normal_(table)


def _fill_handcrafted(table: Tensor, floor: float, left_out: str = "") -> None:
    nn.init.normal_(table)
    num_heads, num_frames, _ = table.shape
    for logits, (name, pattern) in zip(table, patterns(num_frames, num_heads).items(), strict=False):
        if name != left_out:
            logits.copy_(floored(pattern, num_frames, floor).log())


def _without(left_out: str) -> Init:
    names = tuple("normal" if name == left_out else name for name in NAMES)
    return Init(partial(_fill_handcrafted, left_out=left_out), names)


def _fill_legacy(table: Tensor, floor: float) -> None:
    nn.init.normal_(table)
    values = legacy_patterns(table.shape[-1])[: len(table)]
    table[: len(values)] = values.to(table)


def _fill_change(table: Tensor, floor: float) -> None:
    nn.init.normal_(table)
    table[: len(NAMES)] = 0


HANDCRAFTED = Init(_fill_handcrafted, NAMES)
INITS = {
    "handcrafted": HANDCRAFTED,
    "normal": Init(_fill_normal),
    "legacy": Init(_fill_legacy),
    **{f"without_{name}": _without(name) for name in NAMES},
}


class OfMaxFrames:
    """`anchor: max_frames`: the table itself is trained, and cropped to the current length."""

    parameter = "logits"

    @staticmethod
    def accept(name: str, init: Init) -> Init:
        """The initial values that the config calls `name`."""
        return init

    @staticmethod
    def attend(scores: Tensor, value: Tensor, valid: Tensor | None, floor: float, dropout: float) -> Tensor:
        """The context (B, H, T, D) of the table (H, T, T)."""
        return folding.attend(scores, value, valid, dropout)

    @staticmethod
    def weights(scores: Tensor, valid: Tensor | None, floor: float) -> Tensor:
        """The dense weights of the table (B, H, T, T)."""
        return masked_softmax(scores, key_mask(valid))


class OfLength:
    """`anchor: length`: what is trained is added to the logits of the patterns, which follow the length of each sequence."""

    parameter = "delta"

    @staticmethod
    def accept(name: str, init: Init) -> Init:
        """No change of the patterns.

        Raises:
            ValueError: other initial values were asked for.
        """
        if init is not HANDCRAFTED:
            raise ValueError(f"anchor=length needs init=handcrafted, but init is {name}: set anchor=max_frames")
        return Init(_fill_change, NAMES)

    @staticmethod
    def attend(scores: Tensor, value: Tensor, valid: Tensor | None, floor: float, dropout: float) -> Tensor:
        """The context (B, H, T, D) of the changes (H, T, T)."""
        _check_order(valid)
        return folding.attend_by_length(scores, value, valid, floor, dropout)

    @staticmethod
    def weights(scores: Tensor, valid: Tensor | None, floor: float) -> Tensor:
        """The dense weights of the changes (B, H, T, T)."""
        if is_recording():
            raise ValueError(
                "anchor=length makes the patterns of one utterance after the other, which a graph can't: anchor=max_frames"
            )
        num_sequences, num_heads, num_frames, _ = scores.shape
        if valid is None:
            valid = torch.ones(num_sequences, num_frames, dtype=torch.bool, device=scores.device)
        start = torch.zeros_like(scores)
        for row, length in zip(start, valid.sum(dim=-1).tolist(), strict=True):
            for head, pattern in zip(row, patterns(length, num_heads).values(), strict=False):
                head[:length, :length] = floored(pattern, length, floor).log()
        return masked_softmax(start + scores, key_mask(valid)) * valid[:, None, :, None]


ANCHORS: dict[str, type[OfMaxFrames] | type[OfLength]] = {"max_frames": OfMaxFrames, "length": OfLength}


def _check_order(valid: Tensor | None) -> None:
    """Raise ValueError if a padded frame precedes a real one; on the CPU only, as asking a GPU would make the host wait."""
    if valid is None or valid.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        raise ValueError("anchor=length needs real frames before padded ones: pad at the end, or set anchor=max_frames")
