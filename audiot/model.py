"""Mockingjay's transformer encoder (Liu et al. 2020, arXiv:1910.12638) with a mechanism of one's choice in place of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from audiot.attention import SelfAttention
from audiot.layers import LAYER_NORM_EPS, EncoderLayer, norm_dropout
from audiot.positions import Positions


class Encoder(nn.Module):
    """Transformer encoder over spectrogram frames.

    Args:
        input_dim: C, size of a feature frame.
        embed_dim: d.
        num_layers: Layers.
        num_heads: Heads of each layer.
        ffn_dim: Width of the feed-forward networks.
        max_frames: Longest input, in encoder frames; mechanisms without a limit ignore it.
        attention: Config of the mechanism (``_target_`` and its parameters), built anew for every layer.
        positions: Config of the positions.
        dropout: Probability, on the input and on every block's output.
        norm: ``post`` (as published) or ``pre``.
        share_layers: One set of parameters for all layers (AudioALBERT, arXiv:2005.08575).
        init_std: Standard deviation of the linear layers' weights, N(0, init_std).
        input_init: ``xavier`` (uniform, Glorot and Bengio 2010) or ``normal`` (N(0, init_std), as published, where the positions
            drown the features at first) for the input projection. Its bias starts from N(0, init_std), where the published
            one is 0: a frame of zeros, as masks make them, would else be a zero vector wherever positions add nothing and
            attention brings nothing, and gradients would explode in its LayerNorms.
        norm_states: With ``pre``, give each hidden state a LayerNorm of its own, as S3PRL does, not the last one alone. Layers
            hear each other without them, so pre-training doesn't train them.
        norm_eps: Added to the variance in the LayerNorms.
        chunk_frames: Encode an input that is longer in the fewest equal chunks of at most so many frames, each by itself with
            positions from 0, as S3PRL does; None encodes any input whole.
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
        shape = {"embed_dim": embed_dim, "num_heads": num_heads, "max_frames": max_frames}
        self.embed_dim = embed_dim
        self.num_layers = num_layers
        self.pre_norm = norm == "pre"
        self.max_frames = max_frames
        self.chunk_frames = chunk_frames
        self.input = nn.Linear(input_dim, embed_dim)
        self.positions: Positions = instantiate(positions, **shape)
        self.input_norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        layers = [
            EncoderLayer(
                SelfAttention(embed_dim, num_heads, instantiate(attention, **shape), self.positions),
                embed_dim,
                ffn_dim,
                dropout,
                norm,
                norm_eps,
            )
            for _ in range(1 if share_layers else num_layers)
        ]
        self.layers = nn.ModuleList(layers)
        norms = [nn.LayerNorm(embed_dim, eps=norm_eps) if norm_states else nn.Identity() for _ in range(num_layers)]
        self.state_norms = nn.ModuleList(norms).requires_grad_(False)  # until a downstream task asks for it
        self.output_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if norm == "pre" else nn.Identity()
        initialise_linear(self, init_std)
        nn.init.normal_(self.input.bias, std=init_std)
        if input_init == "xavier":
            nn.init.xavier_uniform_(self.input.weight)

    def layer(self, index: int) -> EncoderLayer:
        """Layer ``index`` of ``num_layers``; the same one every time where layers are shared."""
        layer = self.layers[index % len(self.layers)]
        assert isinstance(layer, EncoderLayer)
        return layer

    def embed(self, features: Tensor) -> Tensor:
        """Input embedding: features (B, T, C) → (B, T, d)."""
        embedded = self.positions(self.input(features))
        # LayerNorm gives float32 under autocast. With pre-LN states are one long sum, which would round more with every layer;
        # with post-LN every state is normalised anew and half precision will do: layers read and write half as much.
        if self.pre_norm:
            return self.dropout(self.input_norm(embedded))
        return norm_dropout(embedded, self.input_norm, self.dropout.p if self.training else 0.0)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Encode a batch.

        Args:
            features: (B, T, C).
            valid: bool (B, T), True = real frame; None where nothing is padded.

        Returns:
            The input embedding and the output of each layer, ``num_layers + 1`` tensors (B, T, d). With pre-LN the last one is
            normalised, the others with ``norm_states`` alone. Under autocast with post-LN they are in half precision.
        """
        if self.chunk_frames is not None and features.shape[1] > self.chunk_frames:
            return self._in_chunks(features, valid, self.chunk_frames)
        norms = [*self.state_norms, self.output_norm]
        return [norm(state) for norm, state in zip(norms, self._states(features, valid), strict=True)]

    def _states(self, features: Tensor, valid: Tensor | None) -> list[Tensor]:
        """The input of each layer, and the output of the last."""
        states = [self.embed(features)]
        for index in range(self.num_layers):
            states.append(self.layer(index)(states[-1], valid))
        return states

    def _in_chunks(self, features: Tensor, valid: Tensor | None, longest: int) -> list[Tensor]:
        """Hidden states of chunks of each utterance, put together again; zero behind an utterance's end."""
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
        for state in self(padded, mask):
            whole = state.new_zeros(*valid.shape, self.embed_dim)
            whole[valid] = state[inside].reshape(-1, self.embed_dim)
            hidden.append(whole)
        return hidden

    @property
    def has_weights(self) -> bool:
        """Whether the attention of the layers has weights: ask before `attention_weights`."""
        return all(self.layer(index).attention.has_weights for index in range(self.num_layers))

    def attention_inputs(self, features: Tensor, valid: Tensor | None = None) -> list[tuple[SelfAttention, Tensor]]:
        """Every layer's attention and its input (B, T, d) for features (B, T, C).

        Raises:
            ValueError: the input is longer than ``chunk_frames``: attention does not reach from one chunk to another.
        """
        if self.chunk_frames is not None and features.shape[1] > self.chunk_frames:
            raise ValueError(
                f"attention over {features.shape[1]} frames, where the model encodes chunks of at most {self.chunk_frames} by "
                "themselves (model.chunk_frames): take a shorter utterance"
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


def initialise_linear(module: nn.Module, std: float) -> None:
    """Set every ``nn.Linear`` inside to weights N(0, std) and zero bias, as BERT and Mockingjay do."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def length_mask(lengths: Tensor, num_frames: int, device: torch.device | str | None = None) -> Tensor | None:
    """Mask of real frames, or None where nothing is padded.

    Args:
        lengths: (B,) frames. Kept on the CPU, it costs no synchronisation to see that nothing is padded.
        num_frames: T.
        device: Of the mask; default: of ``lengths``.

    Returns:
        bool (B, T) or None.
    """
    if lengths.device.type == "cpu" and bool((lengths == num_frames).all()):
        return None
    lengths = lengths.to(device or lengths.device, non_blocking=True)
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]
