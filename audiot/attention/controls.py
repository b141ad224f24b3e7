"""Controls: what a model learns without attention, or with attention that distinguishes no frame."""

from __future__ import annotations

import torch
from torch import Tensor

from audiot.attention.mechanism import AttentionMechanism


class PositionWise(AttentionMechanism):
    """No exchange between frames: every frame attends to itself alone, the context is the value.

    This is the lower control of every comparison: the layer is a linear map of each frame.

    Works at any length: `max_frames` is ignored. `dropout` is an argument so that a comparison can set it for all mechanisms
    alike. It drops nothing: the only weight of a row is 1.

    Cost: none. There are no query and key projections.

    The arguments are those of `AttentionMechanism`.
    """

    inputs = frozenset({"value"})
    subquadratic = True

    def attend(self, value: Tensor, valid: Tensor | None) -> Tensor:
        """The values of the real frames."""
        return value if valid is None else value * valid[:, None, :, None]

    def dense_weights(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """The identity, (B, H, T, T)."""
        num_sequences, num_frames, _ = hidden.shape
        identity = torch.eye(num_frames, dtype=hidden.dtype, device=hidden.device)
        weights = identity.expand(num_sequences, self.num_heads, -1, -1)
        return weights if valid is None else weights * valid[:, None, None, :]

    def dense_choice(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """The frame itself, bool (B, H, T, T)."""
        return self.dense_weights(hidden, valid) > 0


class Uniform(AttentionMechanism):
    """Attention that distinguishes no frame: the context of all frames is the mean value of the real frames.

    This is what is left of attention where all scores are equal.

    Works at any length: `max_frames` is ignored.

    Dropout drops frames, for all rows of a head alike. Other mechanisms drop each weight on its own. Here that would take a T×T
    mask and cost what the mechanism saves.

    Cost: O(Td) time and memory. There are no query and key projections.

    The arguments are those of `AttentionMechanism`.
    """

    inputs = frozenset({"value"})
    subquadratic = True

    def attend(self, value: Tensor, valid: Tensor | None) -> Tensor:
        """The mean over the real frames, repeated."""
        num_sequences, _, num_frames, _ = value.shape
        kept = None if valid is None else valid[:, None]  # B, 1, T
        count = num_frames if valid is None else valid.sum(dim=-1).clamp(min=1)[:, None, None]
        if self.dropout_now:
            drawn = torch.rand(num_sequences, self.num_heads, num_frames, device=value.device) >= self.dropout_now
            kept = drawn if kept is None else kept & drawn
        # In float32 at least: a float16 sum over some thousand frames may overflow.
        dtype = torch.promote_types(value.dtype, torch.float32)
        total = (value if kept is None else value * kept[..., None]).sum(dim=2, dtype=dtype)  # B, H, D
        mean = total / (count * (1 - self.dropout_now))
        return mean.to(value.dtype)[:, :, None].expand_as(value)

    def dense_weights(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """1 / number of real frames, (B, H, T, T)."""
        num_sequences, num_frames, _ = hidden.shape
        real = hidden.new_ones(num_sequences, num_frames) if valid is None else valid.to(hidden.dtype)
        weights = real / real.sum(dim=-1, keepdim=True).clamp(min=1)
        return weights[:, None, None].expand(-1, self.num_heads, num_frames, -1)
