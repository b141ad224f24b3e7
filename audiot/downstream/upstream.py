"""Upstreams: models that map waveforms to hidden states for downstream tasks, with one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from audiot.base.parts import make
from audiot.checkpoint import AudioEncoder, load_encoder
from audiot.features import Features


class Upstream(nn.Module, ABC):
    """Base class of the upstreams.

    Attributes:
        features: Front end, which divides audio into frames.
        stack: Frames per hidden state.
        num_states: Number of hidden states, layers + 1.
        state_dim: Size d of a hidden state.
        config: Plain dict from which :func:`rebuild` makes an untrained copy, to load weights into.
    """

    features: Any
    stack: int
    num_states: int
    state_dim: int
    config: dict[str, Any]

    @abstractmethod
    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (layers + 1, B, T, d), zero on padding, and lengths (B,) in states.

        Args:
            waveforms: Samples (B, N) in [-1, 1] at ``features.sample_rate``.
            lengths: Samples of each utterance (B,), on the CPU.
        """

    def state(self, waveforms: Tensor, lengths: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """One hidden state (B, T, d), counted as `forward` returns them, and lengths (B,)."""
        hidden, counts = self(waveforms, lengths)
        return hidden[number], counts

    @abstractmethod
    def top(self, num_layers: int) -> list[nn.Module]:
        """Modules of the top layers, for fine-tuning only these.

        Raises:
            ValueError: there are fewer layers, or they share parameters with the layers below.
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
        self.config = {"_target_": "audiot.downstream.upstream.untrained_encoder", **encoder.config}

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (layers + 1, B, T, d) and lengths (B,)."""
        return self.encoder(waveforms, lengths)

    def state(self, waveforms: Tensor, lengths: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """One hidden state (B, T, d) and lengths (B,). The layers above it do not run."""
        hidden, counts = self.encoder(waveforms, lengths, number % self.num_states)
        return hidden[-1], counts

    def top(self, num_layers: int) -> list[nn.Module]:
        """The top layers, and the final normalisation."""
        encoder = self.encoder.encoder
        check_top(num_layers, encoder.num_layers)
        if len(encoder.layers) < encoder.num_layers:
            raise ValueError("downstream.top_layers: the layers of this encoder share their parameters: fine-tune all or none")
        return [*list(encoder.layers)[-num_layers:], encoder.output_norm]


class FeaturesUpstream(Upstream):
    """Control without an encoder: each spectrogram frame with its neighbours.

    Args:
        features: Config of the front end. Its frames are neither stacked nor subsampled. Trained convolutions on samples are
            replaced by a log-mel spectrogram, since nothing has trained them.
        context: Number of frames to concatenate, centred on each one. It must be odd.
        cmvn: Normalisation instead of the front end's own. ``global`` keeps what ``utterance`` removes, such as a speaker's
            average spectrum.
    """

    def __init__(self, features: Mapping[str, Any], context: int = 9, cmvn: str | None = None) -> None:
        super().__init__()
        if context < 1 or context % 2 == 0:
            raise ValueError(f"upstream.context must be an odd number of frames, found {context}")
        self.config = {
            "_target_": "audiot.downstream.upstream.FeaturesUpstream",
            "features": dict(features),
            "context": context,
            "cmvn": cmvn,
        }
        unjoined = {**features, "stack": 1} | ({"subsample": None, "subsample_dim": None} if features.get("subsample") else {})
        front_end: Features = make(unjoined)
        spectra = front_end.spectra or unjoined
        self.features: Features = make(spectra if cmvn is None else {**spectra, "cmvn": cmvn})
        self.context = context
        self.stack = 1
        self.num_states = 1
        self.state_dim = self.features.output_dim * context

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Compute the statistics of global normalisation, if it is used."""
        if self.features.cmvn == "global":
            self.features.fit(batches)

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Frames with context (1, B, T, channels · context), with zeros outside an utterance, and lengths (B,)."""
        frames, num_frames = self.features(waveforms, lengths)
        around = nn.functional.pad(frames, (0, 0, self.context // 2, self.context // 2)).unfold(1, self.context, 1)
        return around.flatten(2)[None], num_frames

    def top(self, num_layers: int) -> list[nn.Module]:
        """Always refused, because there are no layers."""
        raise ValueError("upstream=features has no layers to train: drop downstream.train_encoder and downstream.top_layers")


def checkpoint(path: str, trusted: Collection[str] = ()) -> EncoderUpstream:
    """An exported encoder (``RUN/encoder``); ``trusted`` as `load_encoder` takes it."""
    return EncoderUpstream(load_encoder(path, trusted))


def untrained_encoder(features: Mapping[str, Any], model: Mapping[str, Any]) -> EncoderUpstream:
    """An encoder of random weights, of its configs."""
    return EncoderUpstream(AudioEncoder(features, model))


def random_encoder(
    seed: int,
    path: str | None = None,
    features: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    trusted: Collection[str] = (),
) -> EncoderUpstream:
    """An untrained encoder with the architecture of the one at ``path``, or that of ``features`` and ``model``."""
    if path is not None:
        return untrained(checkpoint(path, trusted), seed)
    with _seeded(seed):
        fresh = untrained_encoder(features or {}, model or {})
    if fresh.features.cmvn == "global":
        raise ValueError("upstream=random with features.cmvn=global needs upstream.path, an encoder that provides the statistics")
    return fresh


def untrained_upstream(upstream: Mapping[str, Any], seed: int) -> Upstream:
    """The control of another upstream, of its config: its architecture with random weights."""
    return untrained(make(upstream, inside=False), seed)


AnyUpstream = TypeVar("AnyUpstream", bound=Upstream)


def untrained(upstream: AnyUpstream, seed: int) -> AnyUpstream:
    """An upstream with the same architecture and normalisation, but random weights."""
    with _seeded(seed):
        fresh = rebuild(upstream.config)
    statistics = {name: value for name, value in upstream.state_dict().items() if ".cmvn_" in name}
    fresh.load_state_dict(fresh.state_dict() | statistics)
    assert isinstance(fresh, type(upstream))
    return fresh


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs
        yield


def check_top(num_layers: int, available: int) -> None:
    """Refuse a number of top layers that does not exist."""
    if not 1 <= num_layers <= available:
        raise ValueError(f"downstream.top_layers must be between 1 and the upstream's {available} layers, found {num_layers}")


def rebuild(config: Mapping[str, Any]) -> Upstream:
    """An upstream of the same shape as the one whose ``config`` this is; its weights are for the caller to load."""
    upstream = make(config, inside=False)
    assert isinstance(upstream, Upstream)
    return upstream
