"""Mockingjay's transformer encoder (Liu et al. 2020, arXiv:1910.12638) with a choice of attention mechanisms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audiot.attention import AttentionMechanism, SelfAttention
from audiot.base.parts import make
from audiot.base.tracing import can_be_read
from audiot.layers import LAYER_NORM_EPS, EncoderLayer, norm_dropout
from audiot.positions import Positions


class Encoder(nn.Module):
    """Transformer encoder over spectrogram frames.

    Args:
        input_dim: Size C of a feature frame.
        embed_dim: Size d of a hidden state.
        num_layers: Number of layers.
        num_heads: Number of heads in each layer.
        ffn_dim: Width of the feed-forward networks.
        max_frames: Longest input, in encoder frames. Mechanisms without a limit ignore it.
        attention: Config of the mechanism (``_target_`` and its parameters), built anew for every layer.
        positions: Config of the positions.
        dropout: Dropout probability on the input and on every block's output.
        norm: ``post`` (as published) or ``pre``.
        share_layers: Whether all layers share one set of parameters (AudioALBERT, arXiv:2005.08575).
        init_std: Standard deviation of the linear layers' weights, N(0, init_std).
        input_init: Initialisation of the input projection: ``xavier`` (uniform, Glorot and Bengio 2010) or ``normal``
            (N(0, init_std), as published). With ``normal``, positions are much larger than the features at first. The bias
            starts from N(0, init_std); the published one starts at 0. With a zero bias, a masked frame can stay a zero vector
            (where positions and attention add nothing), and gradients explode in its LayerNorms.
        norm_states: With ``pre``, give each hidden state its own LayerNorm, as S3PRL does. Without it, only the last state has
            one. The layers do not use these norms, so pre-training does not train them.
        norm_eps: Constant added to the variance in the LayerNorms.
        chunk_frames: Longest input that is encoded whole; None means any. A longer input is split into the fewest equal chunks of
            at most this many frames. Each chunk is encoded separately, with positions from 0, as S3PRL does.
        other_attention: Config of another mechanism, for some of the layers.
        other_layers: Numbers of the layers that have it, from 0.
        activation_checkpointing: Whether layers keep their input alone in training, and compute the rest again for the backward
            pass (Chen et al. 2016, arXiv:1604.06174). That takes less memory and about a third more time.

    Raises:
        ValueError: a setting is impossible, or two exclude each other.
    """

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        max_frames: int,
        attention: Mapping[str, Any],
        positions: Mapping[str, Any],
        dropout: float = 0.1,
        norm: str = "post",
        share_layers: bool = False,
        init_std: float = 0.02,
        input_init: str = "xavier",
        norm_states: bool = False,
        norm_eps: float = LAYER_NORM_EPS,
        chunk_frames: int | None = None,
        other_attention: Mapping[str, Any] | None = None,
        other_layers: Sequence[int] = (),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if norm not in ("post", "pre"):
            raise ValueError(f"model.norm must be post or pre, found {norm!r}")
        if input_init not in ("xavier", "normal"):
            raise ValueError(f"model.input_init must be xavier or normal, found {input_init!r}")
        if norm_states and norm != "pre":
            raise ValueError("model.norm_states=true needs model.norm=pre: with post, every hidden state is normalised already")
        sizes = {"embed_dim": embed_dim, "num_layers": num_layers, "num_heads": num_heads, "ffn_dim": ffn_dim}
        for name, size in (sizes | {"max_frames": max_frames, "chunk_frames": chunk_frames}).items():
            if size is not None and size < 1:
                raise ValueError(f"model.{name} must be at least 1, found {size}")
        _check_other(other_attention, other_layers, num_layers, share_layers)
        shape: dict[str, Any] = {"embed_dim": embed_dim, "num_heads": num_heads, "max_frames": max_frames}
        self.embed_dim = embed_dim
        self.num_layers = num_layers
        self.pre_norm = norm == "pre"
        self.max_frames = max_frames
        self.chunk_frames = chunk_frames
        self.input = nn.Linear(input_dim, embed_dim)
        self.positions: Positions = make(positions, **shape)
        self.input_norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        other = attention if other_attention is None else other_attention
        layers = [
            EncoderLayer(
                SelfAttention(embed_dim, num_heads, make(other if index in other_layers else attention, **shape), self.positions),
                embed_dim,
                ffn_dim,
                dropout,
                norm,
                norm_eps,
            )
            for index in range(1 if share_layers else num_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.activation_checkpointing = activation_checkpointing
        for mechanism in self.mechanisms if activation_checkpointing else []:
            if type(mechanism).after_step is not AttentionMechanism.after_step:
                raise ValueError(
                    f"model.activation_checkpointing=true runs forward passes twice, and {type(mechanism).__name__} would learn "
                    "from both: set it to false, or choose another attention"
                )
        norms = [nn.LayerNorm(embed_dim, eps=norm_eps) if norm_states else nn.Identity() for _ in range(num_layers)]
        self.state_norms = nn.ModuleList(norms).requires_grad_(False)  # a downstream task may train them
        self.output_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if norm == "pre" else nn.Identity()
        initialise_linear(self, init_std)
        nn.init.normal_(self.input.bias, std=init_std)
        if input_init == "xavier":
            nn.init.xavier_uniform_(self.input.weight)

    def layer(self, index: int) -> EncoderLayer:
        """Layer ``index`` of ``num_layers``. With shared layers it is always the same module."""
        layer = self.layers[index % len(self.layers)]
        assert isinstance(layer, EncoderLayer)
        return layer

    def embed(self, features: Tensor) -> Tensor:
        """Embed features (B, T, C) as the first layer's input (B, T, d)."""
        embedded = self.positions(self.input(features))
        # LayerNorm gives float32 under autocast. Pre-LN keeps that: its states are one long sum, and rounding would grow with
        # every layer. Post-LN normalises every state anew, so half precision suffices and the layers move half the memory.
        if self.pre_norm:
            return self.dropout(self.input_norm(embedded))
        return norm_dropout(embedded, self.input_norm, self.dropout.p if self.training else 0.0)

    def forward(self, features: Tensor, valid: Tensor | None = None, last: int | None = None) -> list[Tensor]:
        """Encode a batch.

        Args:
            features: Feature frames (B, T, C).
            valid: Mask, bool (B, T), True for a real frame; None where nothing is padded.
            last: Number of layers to run; None: all.

        Returns:
            The input embedding and the output of each layer that ran: at most ``num_layers + 1`` tensors (B, T, d). With pre-LN,
            the last state is normalised, and the others only with ``norm_states``. With post-LN, states are in half precision
            under autocast.
        """
        if self.chunk_frames is not None and features.shape[1] > self.chunk_frames:
            return self._in_chunks(features, valid, self.chunk_frames, last)
        norms = [*self.state_norms, self.output_norm]
        return [norm(state) for norm, state in zip(norms, self._states(features, valid, last), strict=False)]

    def _states(self, features: Tensor, valid: Tensor | None, last: int | None = None) -> list[Tensor]:
        """The input of each layer, then the output of the last layer that runs."""
        states = [self.embed(features)]
        for index in range(self.num_layers if last is None else last):
            layer = self.layer(index)
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                states.append(checkpoint(layer, states[-1], valid, use_reentrant=False))
            else:
                states.append(layer(states[-1], valid))
        return states

    def _in_chunks(self, features: Tensor, valid: Tensor | None, longest: int, last: int | None) -> list[Tensor]:
        """Encode chunks of each utterance and join their hidden states. Padding is zero."""
        if valid is None:
            valid = features.new_ones(features.shape[:2], dtype=torch.bool)
        chunks: list[Tensor] = []
        for utterance, length in zip(features, valid.sum(1).tolist(), strict=True):
            chunks += utterance[:length].split(math.ceil(length / max(1, math.ceil(length / longest))))
        lengths = torch.tensor([len(chunk) for chunk in chunks])
        padded = nn.utils.rnn.pad_sequence(chunks, batch_first=True)
        mask = length_mask(lengths, padded.shape[1], features.device)
        inside = slice(None) if mask is None else mask
        hidden = []
        for state in self(padded, mask, last):
            whole = state.new_zeros(*valid.shape, self.embed_dim)
            whole[valid] = state[inside].reshape(-1, self.embed_dim)
            hidden.append(whole)
        return hidden

    @property
    def mechanisms(self) -> list[AttentionMechanism]:
        """The mechanism of every layer."""
        return [self.layer(index).attention.mechanism for index in range(self.num_layers)]

    @property
    def has_weights(self) -> bool:
        """Whether the attention of the layers has weights: ask before `attention_weights`."""
        return all(mechanism.has_weights for mechanism in self.mechanisms)

    def attention_inputs(self, features: Tensor, valid: Tensor | None = None) -> list[tuple[SelfAttention, Tensor]]:
        """Every layer's attention and its input (B, T, d) for features (B, T, C).

        Raises:
            ValueError: the input is longer than ``chunk_frames``. Attention does not cross chunks.
        """
        if self.chunk_frames is not None and features.shape[1] > self.chunk_frames:
            raise ValueError(
                f"attention needs at most model.chunk_frames = {self.chunk_frames} frames, found {features.shape[1]}: longer "
                "inputs are encoded in separate chunks, so take a shorter utterance"
            )
        layers = [self.layer(index) for index in range(self.num_layers)]
        states = self._states(features, valid)
        return [(layer.attention, layer.attention_input(state)) for layer, state in zip(layers, states, strict=False)]

    def attention_weights(self, features: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Attention weights (B, H, T, T) of every layer for features (B, T, C).

        Raises:
            ValueError: the mechanism has none: ask `has_weights` before.
        """
        return [attention.weights(hidden, valid) for attention, hidden in self.attention_inputs(features, valid)]


def _check_other(attention: Mapping[str, Any] | None, layers: Sequence[int], num_layers: int, share_layers: bool) -> None:
    """Refuse layers without another mechanism, and layers that are none."""
    if layers and attention is None:
        raise ValueError("model.other_layers needs their mechanism: set model.other_attention")
    if layers and share_layers:
        raise ValueError("model.other_layers needs layers with parameters of their own: set model.share_layers=false")
    if not all(type(index) is int and 0 <= index < num_layers for index in layers) or len(set(layers)) < len(layers):
        raise ValueError(f"model.other_layers is {layers}: expected numbers from 0 to {num_layers - 1}, each once")


def initialise_linear(module: nn.Module, std: float) -> None:
    """Initialise every ``nn.Linear`` inside with weights N(0, std) and zero bias, as BERT and Mockingjay do."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def length_mask(lengths: Tensor, num_frames: int, device: torch.device | str | None = None) -> Tensor | None:
    """Mask of real frames, or None where nothing is padded.

    Args:
        lengths: Frames of each utterance (B,). On the CPU, checking that nothing is padded needs no synchronisation.
        num_frames: Frames T of the padded batch.
        device: Device of the mask; by default the one of ``lengths``.

    Returns:
        bool (B, T) or None.
    """
    if can_be_read(lengths) and bool((lengths == num_frames).all()):
        return None
    lengths = lengths.to(device or lengths.device, non_blocking=True)
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]
