"""Corruption of spectrogram frames for masked acoustic modelling.

Mockingjay (Liu et al. 2020, arXiv:1910.12638) masks spans of frames. TERA (Liu et al. 2021, arXiv:2007.06028) also masks a band
of channels and adds noise to the magnitudes. AudioALBERT (Chi et al. 2021, arXiv:2005.08575) corrupts as Mockingjay does.
All operations are vectorised over the batch. Each utterance has its own random key, so its corruption does not depend on the
batch or the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from audiot.base import streams

_SPANS, _POLICY, _SOURCES, _BAND, _NOISE, _NOISE_CHOICE = range(6)


def num_spans(lengths: Tensor, proportion: float, span: int) -> Tensor:
    """Number of spans per utterance: proportion · length / span, rounded, at least 1, at most the number of start positions."""
    return (lengths * proportion / span).round().long().clamp(min=1).minimum((lengths - span + 1).clamp(min=1))


def max_spans(num_frames: int, proportion: float, span: int) -> int:
    """Upper bound of `num_spans` for utterances of up to ``num_frames``. It is a Python number and needs no synchronisation."""
    return max(1, math.ceil(num_frames * proportion / span))


def span_starts(keys: Tensor, lengths: Tensor, num_frames: int, proportion: float, span: int) -> Tensor:
    """Draw the start frames of the masked spans without replacement. Spans may overlap.

    Args:
        keys: Random keys (B,).
        lengths: Valid frames of each utterance (B,), on the keys' device.
        num_frames: Frames T of the padded batch.

    Returns:
        bool (B, T).
    """
    position = torch.arange(num_frames, device=keys.device)
    allowed = position <= (lengths[:, None] - span).clamp(min=0)
    score = streams.bits(keys, num_frames, _SPANS).masked_fill(~allowed, torch.iinfo(torch.int64).max)
    # topk instead of sort: Inductor leaves topk to PyTorch's kernels, while its code for a sort takes minutes to compile.
    lowest = score.topk(min(max_spans(num_frames, proportion, span), num_frames), dim=1, largest=False, sorted=True).values
    threshold = lowest.gather(1, num_spans(lengths, proportion, span)[:, None] - 1)
    return allowed & (score <= threshold)


def cover(starts: Tensor, lengths: Tensor, span: int) -> Tensor:
    """Frames (B, T) that lie in a span of ``span`` frames from one of ``starts`` (B, T) and within ``lengths``, as bool."""
    position = torch.arange(starts.shape[1], device=starts.device)
    return _latest(starts, span).any(-1) & (position < lengths[:, None])


def _latest(starts: Tensor, span: int) -> Tensor:
    """``starts`` at each frame and at the ``span`` - 1 frames before it, latest first: bool (B, T, span).

    Inductor compiles this window to a plain reduction. For a running sum or maximum it would write a scan. Its size is that of
    ``starts`` whatever the span, since Inductor's code for any length fails on sizes such as ``T + min(T, span) - span``.
    """
    return torch.nn.functional.pad(starts, (span - 1, 0)).unfold(1, span, 1).flip(-1)


def frames_from_elsewhere(features: Tensor, starts: Tensor, keys: Tensor, lengths: Tensor, span: int) -> Tensor:
    """Replace every span by a random span of the same utterance: (B, T, C).

    Values outside the spans are meaningless.
    """
    num_frames = features.shape[1]
    position = torch.arange(num_frames, device=features.device).expand_as(starts)
    begin = (position - _latest(starts, span).byte().argmax(-1)).clamp(min=0)  # start of the latest span that covers each frame
    choices = (lengths[:, None] - span).clamp(min=0) + 1
    drawn = (streams.uniform(keys, num_frames, _SOURCES) * choices).long()
    source = (drawn.gather(1, begin) + position - begin).clamp(max=num_frames - 1)
    return features.gather(1, source[..., None].expand_as(features))


def band(keys: Tensor, num_channels: int, max_width: int) -> Tensor:
    """A random band of channels per utterance, its width uniform in 0…max_width: bool (B, num_channels)."""
    if max_width > num_channels:
        raise ValueError(
            f"objective.band_width must be at most the {num_channels} channels of a frame, found {max_width}: lower it"
        )
    width, start = streams.uniform(keys, 2, _BAND).unbind(1)
    width = (width * (max_width + 1)).long()
    start = (start * (num_channels - width + 1)).long()
    channel = torch.arange(num_channels, device=keys.device)
    return (channel >= start[:, None]) & (channel < (start + width)[:, None])


class Corrupted(NamedTuple):
    """A corrupted batch and the elements that the loss scores.

    Args:
        features: Corrupted features (B, T, C), the encoder's input.
        frames: Frames with something to reconstruct, bool (B, T).
        elements: Scored elements of those frames, bool (B, T, C); None means all of them.
    """

    features: Tensor
    frames: Tensor
    elements: Tensor | None


class Spans:
    """Masked spans of frames. The share of spans is of the length; they may overlap.

    Args:
        mask_proportion: Share of the frames that spans are drawn for. Overlaps make the masked share smaller.
        span: Length of a span in encoder frames (stacked ones with ``features.stack`` > 1).
    """

    def __init__(self, mask_proportion: float = 0.15, span: int = 7) -> None:
        if not 0 < mask_proportion <= 1:
            raise ValueError(f"objective.mask_proportion must be in (0, 1], found {mask_proportion}")
        if span < 1:
            raise ValueError(f"objective.span must be at least 1 frame, found {span}")
        self.mask_proportion = mask_proportion
        self.span = span

    def max_masked(self, num_frames: int) -> int:
        """Most frames that spans can cover in up to ``num_frames`` frames. It is a Python number and needs no synchronisation."""
        return min(max_spans(num_frames, self.mask_proportion, self.span) * self.span, num_frames)

    def starts(self, keys: Tensor, lengths: Tensor, num_frames: int) -> Tensor:
        """First frames of the spans, bool (B, T)."""
        return span_starts(keys, lengths, num_frames, self.mask_proportion, self.span)

    def mask(self, keys: Tensor, lengths: Tensor, num_frames: int) -> Tensor:
        """Masked frames, bool (B, T)."""
        return cover(self.starts(keys, lengths, num_frames), lengths, self.span)


class Corruption(Spans):
    """Time, channel and magnitude alteration. Each preset of reconstruction sets its parameters.

    Differs from the published code: noise is drawn per utterance, not per batch, and every utterance has at least one span.

    Args:
        mask_proportion: Share of the frames that spans are drawn for. Overlaps make the masked share smaller.
        span: Length of a span in encoder frames (stacked ones with ``features.stack`` > 1).
        zero_probability: Probability that an utterance's spans are set to zero.
        replace_probability: Probability that other spans of the utterance replace its spans; else they stay.
        band_width: Widest band of channels set to zero; 0 means no band.
        noise_std: Standard deviation of the noise added to all magnitudes.
        noise_probability: Probability that an utterance gets noise.
    """

    def __init__(
        self,
        mask_proportion: float = 0.15,
        span: int = 7,
        zero_probability: float = 0.8,
        replace_probability: float = 0.1,
        band_width: int = 0,
        noise_std: float = 0.2,
        noise_probability: float = 0.0,
    ) -> None:
        super().__init__(mask_proportion, span)
        if zero_probability < 0 or replace_probability < 0 or zero_probability + replace_probability > 1:
            raise ValueError(
                "objective.zero_probability and objective.replace_probability must be probabilities that add to at most 1, "
                f"found {zero_probability} and {replace_probability}"
            )
        self.zero_probability = zero_probability
        self.replace_probability = replace_probability
        self.band_width = band_width
        self.noise_std = noise_std
        self.noise_probability = noise_probability

    def zero_out(self, features: Tensor, lengths: Tensor, keys: Tensor) -> Corrupted:
        """Corrupt a batch for validation: every span is zeroed and nothing else is altered.

        Args:
            features: Feature frames (B, T, C).
            lengths: Valid frames of each utterance (B,).
            keys: Random keys (B,).
        """
        frames = self.mask(keys, lengths, features.shape[1])
        return Corrupted(features.masked_fill(frames[..., None], 0), frames, None)

    def __call__(self, features: Tensor, lengths: Tensor, keys: Tensor, stack: int = 1) -> Corrupted:
        """Corrupt a batch for training.

        Args:
            features: Feature frames (B, T, C).
            lengths: Valid frames of each utterance (B,), on the features' device.
            keys: Random keys (B,), on the features' device.
            stack: Spectrogram frames per encoder frame. A band covers the same channels in each of them.
        """
        num_frames = features.shape[1]
        starts = self.starts(keys, lengths, num_frames)
        frames = cover(starts, lengths, self.span)
        policy = streams.uniform(keys, 1, _POLICY)[..., None]
        zeroed = features.masked_fill(frames[..., None], 0)
        replaced = torch.where(frames[..., None], frames_from_elsewhere(features, starts, keys, lengths, self.span), features)
        altered = torch.where(policy < self.zero_probability + self.replace_probability, replaced, features)
        altered = torch.where(policy < self.zero_probability, zeroed, altered)

        elements = None
        if self.band_width:
            channels = band(keys, features.shape[2] // stack, self.band_width).repeat(1, stack)[:, None]
            altered = altered.masked_fill(channels, 0)
            valid = torch.arange(num_frames, device=keys.device) < lengths[:, None]
            elements = (frames[..., None] | channels) & valid[..., None]
            frames = valid
        if self.noise_probability:
            noisy = streams.uniform(keys, 1, _NOISE_CHOICE)[..., None] < self.noise_probability
            noise = streams.normal(keys, features[0].numel(), _NOISE).view_as(features) * self.noise_std
            altered = torch.where(noisy, altered + noise, altered)
        return Corrupted(altered, frames, elements)
