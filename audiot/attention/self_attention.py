"""The attention layer around a mechanism: projections, heads, positions, output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.attention.mechanism import AttentionMechanism
from audiot.base.devices import autocast_dtype, in_half_precision
from audiot.base.tracing import is_recording
from audiot.positions import Positions, Rotary

try:
    from audiot.kernels import projection as projection_kernels
except ImportError:  # no Triton
    projection_kernels = None  # type: ignore[assignment]

PROJECTIONS = ("query", "key", "value")
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # what `F.linear` computes of frames, a weight and a bias


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2) with any mechanism.

    It owns exactly the projections that `mechanism.inputs` names (`query`, `key`, `value`), and `output`.

    Args:
        embed_dim: Width d of the model.
        num_heads: Number of heads H.
        mechanism: How frames exchange information; built for the same `embed_dim` and `num_heads`.
        positions: The model's positions. Rotary positions turn queries and keys here, and biases are added to their scores here.
            All others act on the encoder's input and are ignored here.
        dropout: Probability of dropping an element of the layer's output. Attention dropout belongs to the mechanism.
        bias: Whether the projections have a bias.

    Raises:
        ValueError: the mechanism was built for other sizes, has no queries and keys for rotary positions to turn, or can't carry
            the positions' bias.
    """

    # In place of `F.linear`, where a training computes in another precision (`audiot.training.float8`).
    project: Product | None = None  # of queries, keys and values together
    project_output: Product | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mechanism: AttentionMechanism,
        positions: Positions | None = None,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        built = (mechanism.embed_dim, mechanism.num_heads)
        if built != (embed_dim, num_heads):
            raise ValueError(
                f"{type(mechanism).__name__} was built for embed_dim {built[0]} and num_heads {built[1]}, but the "
                f"layer has embed_dim {embed_dim} and num_heads {num_heads}: pass the same to both"
            )
        kind = type(mechanism).__name__
        if isinstance(positions, Rotary) and "query" not in mechanism.inputs:
            raise ValueError(f"rotary positions turn queries and keys but {kind} has none: set positions=sinusoid")
        if positions is not None and positions.has_bias and mechanism.no_bias:
            raise ValueError(
                f"{type(positions).__name__} positions add a bias to scores but {kind} {mechanism.no_bias}: "
                "set positions=sinusoid"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        for name in PROJECTIONS:
            if name in mechanism.inputs:
                self.add_module(name, nn.Linear(embed_dim, embed_dim, bias=bias))
        # Only what acts here is kept: a table shared by all layers would otherwise belong to each of them.
        self.positions = None if positions is None else positions.layer_part()
        self.mechanism = mechanism
        self.output = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """Exchange information between the frames.

        Args:
            hidden: (B, T, d).
            valid: bool (B, T), True = real frame; None when nothing is padded.

        Returns:
            (B, T, d), zero on padded frames.

        Raises:
            ValueError: T is beyond the mechanism's limit.
        """
        if is_recording() and not self.training:  # other runtimes have no fused kernels
            return self.reference(hidden, valid)
        context = self.mechanism(**self._inputs(hidden, self.mechanism.inputs, valid))  # B, H, T, D
        frames = context.transpose(1, 2).flatten(2)
        if self.project_output is None:
            projected = self.output(frames)
        else:
            projected = self.project_output(frames, self.output.weight, self.output.bias)
        output = self.dropout(projected)
        return output if valid is None else output * valid[:, :, None]

    @property
    def has_weights(self) -> bool:
        """Whether the mechanism has attention weights: ask before `weights`."""
        return self.mechanism.has_weights

    def reference(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """What `forward` gives (B, T, d), by the mechanism's plain form and without dropout; slow, for comparisons."""
        context = self.mechanism.reference(**self._inputs(hidden, self.mechanism.reference_inputs, valid))
        output = self.output(context.transpose(1, 2).flatten(2))
        return output if valid is None else output * valid[:, :, None]

    def weights(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attention weights (B, H, T, T) by the plain dense computation, without dropout; rows of padded frames are zero.

        Raises:
            ValueError: the mechanism has none.
        """
        weights = self.mechanism.weights(**self._inputs(hidden, self.mechanism.weight_inputs, valid))
        return weights if valid is None else weights * valid[:, None, :, None]

    def chosen_keys(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor | None:
        """Which keys each query may attend to, bool (B, H, T, T); None where the mechanism chooses none."""
        chosen = self.mechanism.chosen_keys(**self._inputs(hidden, self.mechanism.weight_inputs, valid))
        return chosen if valid is None or chosen is None else chosen & valid[:, None, :, None]

    def _inputs(self, hidden: Tensor, names: frozenset[str], valid: Tensor | None) -> dict[str, Any]:
        """What the mechanism asks for: the layer's input, and projections split into heads (B, H, T, D)."""
        inputs: dict[str, Any] = {"valid": valid, "positions": self.positions}
        if "hidden" in names:
            inputs["hidden"] = hidden
        wanted = [name for name in PROJECTIONS if name in names]
        layers = [getattr(self, name) for name in wanted]
        fewest = 2 if self.project is None else 1  # that are worth a joint product
        if len(layers) < fewest or any(type(layer) is not nn.Linear for layer in layers):  # replaced by an adapter, say
            projected: Sequence[Tensor] = [layer(hidden) for layer in layers]
        else:
            weight = torch.cat([layer.weight for layer in layers])
            bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
            if self._turns_here(hidden, wanted):
                projected = self._turned(hidden, weight, bias)
                inputs["positions"] = None
            else:
                projected = (self.project or F.linear)(hidden, weight, bias).chunk(len(layers), dim=-1)
        for name, frames in zip(wanted, projected, strict=True):
            inputs[name] = frames.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return inputs

    def _turned(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Sequence[Tensor]:
        """Queries, keys and values (B, T, d) of a joint projection, turned by rotary positions."""
        assert projection_kernels is not None
        assert isinstance(self.positions, Rotary)
        angles = self.positions.factors(hidden.shape[1], torch.float32)
        frames = hidden.to(autocast_dtype(hidden))
        return projection_kernels.ProjectAndTurn.apply(frames, weight, bias, angles, self.embed_dim // self.num_heads)

    def _turns_here(self, hidden: Tensor, wanted: list[str]) -> bool:
        """Whether a kernel merges the gradients: with queries, keys, values and rotary positions, in half precision on CUDA."""
        return (
            projection_kernels is not None
            and self.project is None
            and isinstance(self.positions, Rotary)
            and wanted == list(PROJECTIONS)
            and not getattr(self.mechanism, "rotates_itself", False)
            and in_half_precision(hidden)
            and self.embed_dim <= projection_kernels.MAX_DIM
        )
