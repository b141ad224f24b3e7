"""Upstreams: what a downstream task listens to. All map waveforms to hidden states through one interface.

An upstream is an ``nn.Module`` whose call takes waveforms (B, N) and lengths (B,) in samples and gives hidden states
(layers + 1, B, T, d) with lengths (B,); it has ``features`` (its front end), ``stack`` (spectrogram frames behind a hidden
state), ``num_states`` (layers + 1), ``state_dim`` (d), and ``config``, from which :func:`rebuild` makes it again for its weights
to be loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from audiot.checkpoint import AudioEncoder, load_encoder
from audiot.features import Features


class EncoderUpstream(nn.Module):
    """Hidden states of an audiot encoder."""

    def __init__(self, encoder: AudioEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.features = encoder.features
        self.stack = encoder.features.stack
        self.num_states = encoder.encoder.num_layers + 1
        self.state_dim = encoder.encoder.embed_dim
        self.config = {"kind": "encoder", **encoder.config}

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (layers + 1, B, T, d) and lengths (B,)."""
        return self.encoder(waveforms, lengths)


class FeaturesUpstream(nn.Module):
    """The control without any encoder: spectrogram frames beside their neighbours.

    Args:
        features: Config of the front end; its frames are not stacked.
        context: Frames around and including each one that are concatenated, an odd number.
        cmvn: Normalisation in place of the front end's own; ``global`` keeps what utterance normalisation takes away, a speaker's
            average spectrum among it.
    """

    def __init__(self, features: Mapping[str, Any], context: int = 9, cmvn: str | None = None) -> None:
        super().__init__()
        if context < 1 or context % 2 == 0:
            raise ValueError(f"upstream.context must be an odd number of frames, found {context}")
        self.config = {"kind": "features", "features": dict(features), "context": context, "cmvn": cmvn}
        overrides = {"stack": 1} if cmvn is None else {"stack": 1, "cmvn": cmvn}
        self.features: Features = instantiate(features, **overrides)
        self.context = context
        self.stack = 1
        self.num_states = 1
        self.state_dim = self.features.output_dim * context

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure the statistics of global normalisation, where that is asked for."""
        if self.features.cmvn == "global":
            self.features.fit(batches)

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Frames with context (1, B, T, channels · context), zeros beyond an utterance's edges, and lengths (B,)."""
        frames, num_frames = self.features(waveforms, lengths)
        around = nn.functional.pad(frames, (0, 0, self.context // 2, self.context // 2)).unfold(1, self.context, 1)
        return around.flatten(2)[None], num_frames


def checkpoint(path: str, trusted: tuple[str, ...] = ("audiot",)) -> EncoderUpstream:
    """An exported encoder (``RUN/encoder``)."""
    return EncoderUpstream(load_encoder(path, tuple(trusted)))


def random_encoder(
    seed: int, path: str | None = None, features: Mapping[str, Any] | None = None, model: Mapping[str, Any] | None = None
) -> EncoderUpstream:
    """An untrained encoder: the architecture of the one at ``path``, else of ``features`` and ``model``."""
    config = load_encoder(path).config if path is not None else {"features": features or {}, "model": model or {}}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
        fresh = AudioEncoder(config["features"], config["model"])
    if fresh.features.cmvn == "global":
        if path is None:
            raise ValueError("upstream=random with features.cmvn=global needs upstream.path: an encoder whose statistics to take")
        fresh.features.load_state_dict(load_encoder(path).features.state_dict())
    return EncoderUpstream(fresh)


def rebuild(config: Mapping[str, Any]) -> EncoderUpstream | FeaturesUpstream:
    """An upstream of the same shape as the one whose ``config`` this is; its weights are for the caller to load."""
    if config["kind"] == "encoder":
        return EncoderUpstream(AudioEncoder(config["features"], config["model"]))
    return FeaturesUpstream(config["features"], config["context"], config["cmvn"])
