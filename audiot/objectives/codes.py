"""Prediction of discrete codes at masked frames: what HuBERT, BEST-RQ and their kin have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from audiot.analysis.plots import plot_codes
from audiot.base import streams
from audiot.base.devices import at_least_float32
from audiot.base.framing import middles
from audiot.base.parts import make
from audiot.checkpoint import AudioEncoder
from audiot.features import Features
from audiot.model import initialise_linear
from audiot.objectives.corruption import Spans
from audiot.objectives.objective import Objective, Sample, View, at_frames, masked_first
from audiot.training.accumulation import Mean

_FILL = 6  # sub-stream of an utterance's key, beside those of `audiot.objectives.corruption`
FILL_STD = 0.1  # of noise in place of masked frames (BEST-RQ, section 3.1)


class CodePrediction(Objective):
    """Hide spans of tokens and classify the codes that stood there, under cross-entropy.

    With several codebooks a token has a code in each, and the loss is the mean over them.

    Args:
        model: The model to train, for its sizes.
        num_codebooks: Number of codebooks G.
        num_codes: Codes V in each.
        mask_proportion: Share of the tokens that spans are drawn for. Overlaps make the masked share smaller: spans of 10 tokens
            over 0.65 mask 48%.
        span: Length of a span in tokens.
        fill: What stands in place of a masked token: ``learned``, a vector that is trained (HuBERT); ``noise`` of deviation 0.1
            (BEST-RQ); or ``zero``.
        visible_weight: Weight of a visible token's cross-entropy in the loss, beside 1 for a masked one's.
        head_dim: Width of the cosine head; None for a linear one. See `CodeHead`.
        mix: Parameters of `Mixing`, see `Objective`.
        features: Config of the fixed front end that the targets are made of; a token's target is made of what is nearest in
            time. None: the model's own fixed tokens, or, where these are samples, log-mel frames of 25 ms every 10 ms.

    Attributes:
        target_features: That front end; None: the model's own.
        target_dim: Channels of a target.
    """

    figure = "cross_entropy"
    label = "cross-entropy of masked codes"
    baselines: ClassVar[Mapping[str, str]] = {"unigram_cross_entropy": "unigram", "chance_cross_entropy": "chance"}
    extras: ClassVar[Mapping[str, str]] = {
        "val_accuracy": "masked codes that are predicted",
        "neighbour_accuracy": "masked codes that the nearest visible token has",
        "unigram_accuracy": "masked codes that are the most frequent one",
    }
    picture = "codes.png"
    deciding: ClassVar[tuple[str, ...]] = ("features", "head_dim", "fill")

    prior: Tensor

    def __init__(
        self,
        model: AudioEncoder,
        *,
        num_codebooks: int,
        num_codes: int,
        mask_proportion: float = 0.65,
        span: int = 10,
        fill: str = "learned",
        visible_weight: float = 0.0,
        head_dim: int | None = None,
        mix: Mapping[str, Any] | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, mix)
        for name, size in {"num_codebooks": num_codebooks, "num_codes": num_codes, "head_dim": head_dim}.items():
            if size is not None and size < 1:
                raise ValueError(f"objective.{name} must be at least 1, found {size}")
        if fill not in ("learned", "noise", "zero"):
            raise ValueError(f"objective.fill must be learned, noise or zero, found {fill!r}")
        self.spans = Spans(mask_proportion, span)
        if not 0 <= visible_weight <= 1:
            raise ValueError(f"objective.visible_weight must be in [0, 1], found {visible_weight}")
        self.fill = fill
        self.visible_weight = visible_weight
        self.stack = model.features.stack
        self.num_codebooks, self.num_codes = num_codebooks, num_codes
        self.head = CodeHead(model.encoder.embed_dim, num_codebooks, num_codes, head_dim)
        self.mask = nn.Parameter(torch.randn(model.features.embed_dim) * FILL_STD) if fill == "learned" else None
        targets = features or model.features.spectra
        self.target_features = None if targets is None else fixed_features(targets, model.features)
        self.target_dim = (self.target_features or model.features).output_dim
        self._index: dict[tuple[int, int], Tensor | None] = {}
        self.register_buffer("prior", torch.full((num_codebooks, num_codes), 1 / num_codes))  # frequency of each code

    @torch.no_grad()
    def source(self, model: AudioEncoder, waveforms: Tensor, lengths: Tensor, tokens: Tensor | None) -> Tensor | None:
        """Features of the targets in the time of the tokens (B, T, C), or the tokens."""
        if self.target_features is None:
            return super().source(model, waveforms, lengths, tokens)
        values, counts = self.target_features(waveforms, lengths)
        wanted = model.features.num_tokens(waveforms.shape[1])
        return self.in_token_time(model.features, self.target_features, self.target_features.stack, values, counts, wanted)

    def in_token_time(
        self, features: Features, others: Any, stack: int, values: Tensor, counts: Tensor, num_tokens: int
    ) -> Tensor:
        """Of each token, what another front end made of the same time: (B, num_tokens, …). See `nearest_in_time`.

        Args:
            features: Front end of the tokens.
            others: Front end of the values.
            stack: Its frames per value.
            values: Values (B, M, …).
            counts: Values of each utterance (B,).
            num_tokens: Number of tokens.
        """
        shape = (num_tokens, values.shape[1])
        if shape not in self._index:  # computed once for each
            index = nearest_in_time(features, others, stack, *shape)
            same = num_tokens == values.shape[1] and bool((index == torch.arange(num_tokens)).all())
            self._index[shape] = None if same else index
        nearest = self._index[shape]
        if nearest is None:
            return values.contiguous()
        last = (counts - 1).clamp(min=0)[:, None]
        return at_frames(values, nearest.to(last.device).minimum(last).to(values.device, non_blocking=True))

    def fit_features(self, sample: Sample) -> None:
        """Fit the global statistics of the targets' features, if they have any, on an hour of audio."""
        if self.target_features is not None and not self.target_features.is_fitted:
            self.target_features.fit(sample(3600.0))

    @abstractmethod
    def codes(self, source: Tensor, lengths: Tensor) -> Tensor:
        """Codes (B, T, G), int64, of what `source` gave; those of padding are meaningless."""

    def targets(self, model: AudioEncoder, source: Tensor, lengths: Tensor, valid: Tensor | None) -> Tensor:
        """Codes (B, T, G)."""
        return self.codes(source, lengths)

    def predicted(self, num_frames: int) -> int:
        """Tokens that spans can cover, or all where visible ones count too."""
        return num_frames if self.visible_weight else self.spans.max_masked(num_frames)

    def corrupt(self, embedded: Tensor, lengths: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's input (B, T, C) with its masked tokens replaced, and the masked tokens, bool (B, T)."""
        frames = self.spans.mask(keys, lengths, embedded.shape[1])
        if self.mask is not None:
            instead = self.mask.to(embedded.dtype)
        elif self.fill == "noise":
            noise = streams.normal(keys, embedded[0].numel(), _FILL).view_as(embedded)
            instead = FILL_STD * noise.to(embedded.dtype)
        else:
            instead = embedded.new_zeros(())
        return torch.where(frames[..., None], instead, embedded), frames

    def loss(
        self, model: AudioEncoder, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor
    ) -> Mean:
        """Cross-entropy of the codes at masked tokens, and at visible ones as far as they count."""
        corrupted, frames = self.corrupt(model.features.embed(tokens, valid), lengths, keys)
        hidden = model.encoder(corrupted, valid)[-1]
        codes = self.codes(source, lengths)
        if self.visible_weight:
            weight = frames.float().clamp(min=self.visible_weight)
            return masked_cross_entropy(self.head(hidden), codes, weight if valid is None else weight * valid)
        index, chosen = masked_first(frames, self.predicted(tokens.shape[1]))
        return masked_cross_entropy(self.head(at_frames(hidden, index)), at_frames(codes, index), chosen)

    def fit(self, model: AudioEncoder, sample: Sample, seed: int) -> dict[str, Any]:
        """Count how often each code occurs in ten minutes of training audio."""
        self.fit_features(sample)
        device = model.encoder.input.weight.device
        counts = torch.zeros(self.num_codebooks, self.num_codes, device=device)
        for waveforms, lengths in sample(600.0):
            tokens, num_tokens = model.features(waveforms.to(device), lengths)
            source = self.source(model, waveforms.to(device), lengths, tokens)
            num_tokens = num_tokens.to(device)
            codes = self.codes(tokens if source is None else source, num_tokens)
            inside = torch.arange(codes.shape[1], device=device) < num_tokens[:, None]
            for book in range(self.num_codebooks):
                counts[book] += codes[..., book][inside].bincount(minlength=self.num_codes)
        return self.set_prior(counts)

    def set_prior(self, counts: Tensor) -> dict[str, Any]:
        """Take the frequencies of the codes from their counts (G, V): the codes used, and their perplexity, as means."""
        self.prior.copy_(counts / counts.sum(1, keepdim=True).clamp(min=1))
        return {
            "targets/codes": self.num_codes,
            "targets/used": round(float((counts > 0).sum(1).double().mean()), 1),
            "targets/perplexity": round(float(perplexity_of(self.prior.double()).mean()), 1),
        }

    def view(
        self, model: AudioEncoder, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor
    ) -> View:
        """Codes and their prediction at masked tokens.

        Returns:
            ``target``: features (B, T · stack, channels); ``masked``: bool (B, T · stack); ``lengths``: (B,) in spectrogram
            frames; ``codes``, ``predicted``, ``neighbour``: (B, T, G); ``cross_entropy``, ``unigram``: nats (B, T, G).
        """
        corrupted, frames = self.corrupt(model.features.embed(tokens, valid), lengths, keys)
        scores = at_least_float32(self.head(model.encoder(corrupted, valid)[-1])).log_softmax(-1)
        codes = self.codes(source, lengths)
        return {
            "target": model.features.spectrogram(tokens),
            "masked": frames.repeat_interleave(self.stack, dim=1),
            "lengths": lengths * self.stack,
            "codes": codes,
            "predicted": scores.argmax(-1),
            "neighbour": at_frames(codes, nearest_visible(frames, lengths)),
            "cross_entropy": -scores.gather(-1, codes[..., None])[..., 0],
            "unigram": -self.prior.clamp(min=1e-6).log()[torch.arange(self.num_codebooks, device=codes.device), codes],
        }

    def measures(self, view: View) -> dict[str, Mean]:
        """Cross-entropy and accuracy at masked tokens, with those of chance, of frequencies and of the nearest visible token."""
        frames = view["masked"][:, :: self.stack]
        count = frames.sum()

        def mean(values: Tensor) -> Mean:
            return Mean((values.float().mean(-1) * frames).sum() / count.clamp(min=1), count)

        most_frequent = self.prior.argmax(-1)
        return {
            "val_cross_entropy": mean(view["cross_entropy"]),
            "unigram_cross_entropy": mean(view["unigram"]),
            "chance_cross_entropy": mean(torch.full_like(view["unigram"], math.log(self.num_codes))),
            "val_accuracy": mean(view["predicted"] == view["codes"]),
            "neighbour_accuracy": mean(view["neighbour"] == view["codes"]),
            "unigram_accuracy": mean(view["codes"] == most_frequent),
        }

    def draw(self, view: View, title: str, path: Path) -> None:
        """Draw the spectrogram, the codes and the predicted codes of the first codebook."""
        plot_codes(view, self.scale, title, path)


class CodeHead(nn.Module):
    """Scores of every code of every codebook, (…, d) → (…, G, V).

    Without ``head_dim`` the head is linear (BEST-RQ). With it, a projection to ``head_dim`` is compared with a learned vector of
    each code, and the scores are cosine similarities divided by 0.1 (HuBERT, arXiv:2106.07447, equation 3).
    """

    TEMPERATURE = 0.1

    def __init__(self, embed_dim: int, num_codebooks: int, num_codes: int, head_dim: int | None = None) -> None:
        super().__init__()
        self.shape = (num_codebooks, num_codes)
        self.linear = nn.Linear(embed_dim, num_codebooks * (num_codes if head_dim is None else head_dim))
        initialise_linear(self, 0.02)
        self.vectors = None if head_dim is None else nn.Parameter(torch.randn(num_codebooks, num_codes, head_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores (…, G, V), the logarithms of probabilities up to a constant."""
        projected = self.linear(hidden).unflatten(-1, (self.shape[0], -1))
        if self.vectors is None:
            return projected
        norm = nn.functional.normalize
        vectors = norm(self.vectors, dim=-1).to(projected.dtype)
        return torch.einsum("...gd,gvd->...gv", norm(projected, dim=-1).to(vectors.dtype), vectors) / self.TEMPERATURE


def masked_cross_entropy(scores: Tensor, codes: Tensor, weight: Tensor) -> Mean:
    """Mean cross-entropy in nats over the codebooks of the scored frames.

    Args:
        scores: (B, N, G, V).
        codes: (B, N, G).
        weight: Frames that count, bool (B, N), or their weights.
    """
    nats = nn.functional.cross_entropy(at_least_float32(scores.flatten(0, -2)), codes.flatten(), reduction="none")
    nats = nats.view(codes.shape).mean(-1)
    count = weight.sum()
    return Mean((nats * weight).sum() / count.clamp(min=1), count)


def perplexity_of(share: Tensor) -> Tensor:
    """Perplexity of shares (…, V) that add to 1: (…)."""
    return (-torch.special.xlogy(share, share).sum(-1)).exp()


def nearest_visible(masked: Tensor, lengths: Tensor) -> Tensor:
    """Index of the nearest visible frame, of two equally near the earlier one: (B, T). Without any, the frame itself.

    Args:
        masked: Masked frames, bool (B, T).
        lengths: Valid frames of each utterance (B,).
    """
    num_frames = masked.shape[1]
    position = torch.arange(num_frames, device=masked.device).expand_as(masked)
    visible = ~masked & (position < lengths[:, None])
    before = position.masked_fill(~visible, -2 * num_frames).cummax(1).values
    after = position.masked_fill(~visible, 3 * num_frames).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(position - before <= after - position, before, after)
    return torch.where(visible.any(1, keepdim=True), nearest, position)


def in_context(tokens: Tensor, lengths: Tensor, context: int) -> Tensor:
    """Each token with its neighbours, (B, T, C) → (B, T, context · C). The first and last token of an utterance are repeated.

    Args:
        tokens: Tokens, of which those after an utterance's end do not count.
        lengths: Tokens of each utterance (B,), on the tokens' device.
        context: Odd number of tokens, centred on each one.
    """
    if context == 1:
        return tokens
    position = torch.arange(tokens.shape[1], device=tokens.device)
    last = (lengths - 1).clamp(min=0)[:, None]
    reach = context // 2
    around = [at_frames(tokens, (position + shift).clamp(min=0).minimum(last)) for shift in range(-reach, reach + 1)]
    return torch.cat(around, dim=-1)


def fixed_features(config: Mapping[str, Any], own: Features) -> Features:
    """The front end of the targets.

    Args:
        config: Its config.
        own: The model's front end.

    Raises:
        ValueError: it is trained, has another sample rate, or needs longer audio for a token.
    """
    features: Features = make(config)
    if features.is_trained:
        raise ValueError(
            "objective.features must be fixed, since targets may not change in training: choose a spectrogram, with "
            "objective.features.subsample=null"
        )
    if features.sample_rate != own.sample_rate:
        raise ValueError(
            f"objective.features.sample_rate must be that of the model's features, {own.sample_rate} Hz, found "
            f"{features.sample_rate} Hz"
        )
    if features.num_samples(1) > own.num_samples(1):
        raise ValueError(
            f"a token of objective.features needs {features.num_samples(1)} samples, more than one of the model's features, "
            f"{own.num_samples(1)}: shorten its window or lower objective.features.stack"
        )
    return features


def nearest_in_time(features: Features, others: Any, stack: int, num_tokens: int, num_values: int) -> Tensor:
    """Index of the value whose middle is nearest in time to that of each token: (num_tokens,). Of two equally near, the earlier.

    Args:
        features: Front end of the tokens.
        others: Front end of the values.
        stack: Its frames per value.
        num_tokens: Number of tokens.
        num_values: Number of values there are.
    """

    own = middles(features, features.stack, num_tokens)
    theirs = middles(others, stack, num_values)
    after = torch.searchsorted(theirs, own).clamp(max=num_values - 1)
    before = (after - 1).clamp(min=0)
    return torch.where((own - theirs[before]).abs() <= (theirs[after] - own).abs(), before, after)
