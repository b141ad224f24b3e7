"""Upstreams: what a downstream task listens to. All map waveforms to hidden states through one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from audiot.checkpoint import AudioEncoder, load_encoder
from audiot.features import Features


class Upstream(nn.Module, ABC):
    """Base of the upstreams.

    Attributes:
        features: How it cuts audio into frames.
        stack: Frames behind a hidden state.
        num_states: Hidden states it gives: layers + 1.
        state_dim: d.
        config: Plain dict from which :func:`rebuild` makes it again, untrained, for its weights to be loaded.
    """

    features: Any
    stack: int
    num_states: int
    state_dim: int
    config: dict[str, Any]

    @abstractmethod
    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (layers + 1, B, T, d), zero after an utterance's end, and lengths (B,) in states.

        Args:
            waveforms: (B, N) in [-1, 1] at ``features.sample_rate``.
            lengths: (B,) samples, on the CPU.
        """

    @abstractmethod
    def top(self, num_layers: int) -> list[nn.Module]:
        """The modules of the top layers, to be fine-tuned alone.

        Raises:
            ValueError: there are not so many, or they share parameters with those below.
        """


class EncoderUpstream(Upstream):
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

    def top(self, num_layers: int) -> list[nn.Module]:
        """The top layers, and the normalisation behind them."""
        encoder = self.encoder.encoder
        check_top(num_layers, encoder.num_layers)
        if len(encoder.layers) < encoder.num_layers:
            raise ValueError("downstream.top_layers: the layers of this encoder share their parameters: fine-tune all or none")
        return [*list(encoder.layers)[-num_layers:], encoder.output_norm]


class FeaturesUpstream(Upstream):
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

    def top(self, num_layers: int) -> list[nn.Module]:
        """There are none: refused."""
        raise ValueError("upstream=features has no layers to train: drop downstream.train_encoder and downstream.top_layers")


def checkpoint(path: str, trusted: Sequence[str] = ("audiot",)) -> EncoderUpstream:
    """An exported encoder (``RUN/encoder``); ``trusted`` as in `load_encoder`."""
    return EncoderUpstream(load_encoder(path, tuple(trusted)))


def random_encoder(
    seed: int,
    path: str | None = None,
    features: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    trusted: Sequence[str] = ("audiot",),
) -> EncoderUpstream:
    """An untrained encoder: the architecture of the one at ``path``, else of ``features`` and ``model``."""
    if path is not None:
        return untrained(checkpoint(path, trusted), seed)
    with _seeded(seed):
        fresh = EncoderUpstream(AudioEncoder(features or {}, model or {}))
    if fresh.features.cmvn == "global":
        raise ValueError("upstream=random with features.cmvn=global needs upstream.path: an encoder whose statistics to take")
    return fresh


AnyUpstream = TypeVar("AnyUpstream", bound=Upstream)


def untrained(upstream: AnyUpstream, seed: int) -> AnyUpstream:
    """An upstream of the same architecture and normalisation, with random weights."""
    with _seeded(seed):
        fresh = rebuild(upstream.config)
    statistics = {name: value for name, value in upstream.state_dict().items() if ".cmvn_" in name}
    fresh.load_state_dict(fresh.state_dict() | statistics)
    assert isinstance(fresh, type(upstream))
    return fresh


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
        yield


def check_top(num_layers: int, available: int) -> None:
    """Refuse a number of top layers that there is not."""
    if not 1 <= num_layers <= available:
        raise ValueError(f"downstream.top_layers must be between 1 and the upstream's {available} layers, found {num_layers}")


def rebuild(config: Mapping[str, Any]) -> Upstream:
    """An upstream of the same shape as the one whose ``config`` this is; its weights are for the caller to load."""
    if config["kind"] == "encoder":
        return EncoderUpstream(AudioEncoder(config["features"], config["model"]))
    if config["kind"] == "hf":
        from audiot.interop.hf_upstream import from_config  # needs transformers

        return from_config(config)
    return FeaturesUpstream(config["features"], config["context"], config["cmvn"])
