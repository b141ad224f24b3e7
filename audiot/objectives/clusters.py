"""Clusters of features, or of another encoder's hidden states, as targets (HuBERT: Hsu et al. 2021, arXiv:2106.07447)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from audiot.base.devices import attention_of_any_shape
from audiot.base.parts import make
from audiot.checkpoint import AudioEncoder
from audiot.objectives.best_rq import check_context
from audiot.objectives.codes import CodePrediction, in_context
from audiot.objectives.kmeans import assigned, kmeans, nearest, normalised_mutual_information
from audiot.objectives.objective import Sample

FRAMES_EACH = 10  # fewest frames per cluster
FAR = 1e4  # value of centres that no frame has


class Clusters(CodePrediction):
    """Predict the k-means cluster of what is masked.

    Clusters are of the tokens with their neighbours, or of a layer of a frozen encoder, the teacher, which hears the whole
    utterance. They are fitted before training on audio drawn by the seed. A second clustering, of the other half of that audio,
    tells how stable they are.

    Args:
        model: The model to train, for its sizes.
        num_clusters: Most clusters. With fewer than 10 frames of audio for each there are fewer of them.
        context: Odd number of tokens that are clustered together, without a teacher.
        sample_s: Seconds of audio to fit on.
        iterations: Most iterations of k-means.
        teacher: Config of an upstream (see `audiot.downstream.upstream`); None: clusters of features.
        layer: Hidden state of the teacher, where 0 is the input of its first layer and −1 the last one; None: the one two thirds
            of the way up, as phones are known best there.
        rounds: Rounds of training in all. `audiot pretrain` trains the earlier ones itself, each the teacher of the next.
        options: Parameters of `CodePrediction`.
    """

    deciding: ClassVar[tuple[str, ...]] = (*CodePrediction.deciding, "num_clusters", "context", "teacher", "layer")
    centres: Tensor

    def __init__(
        self,
        model: AudioEncoder,
        num_clusters: int = 500,
        context: int = 3,
        sample_s: float = 600.0,
        iterations: int = 20,
        teacher: Mapping[str, Any] | None = None,
        layer: int | None = None,
        rounds: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(model, num_codebooks=1, num_codes=num_clusters, **options)
        check_context(context)
        if sample_s <= 0:
            raise ValueError(f"objective.sample_s must be a positive number of seconds, found {sample_s}")
        if iterations < 1 or rounds < 1:
            raise ValueError(f"objective.iterations and objective.rounds must be at least 1, found {iterations} and {rounds}")
        if teacher is None and rounds == 1 and layer is not None:
            raise ValueError(f"objective.layer={layer} has no effect without objective.teacher or objective.rounds: drop it")
        if teacher is not None and rounds == 1 and options.get("features") is not None:
            raise ValueError("objective.features has no effect beside objective.teacher: drop one of them")
        self.context, self.sample_s, self.iterations = context, sample_s, iterations
        self.teacher: Any = None
        width = self.target_dim * context
        if teacher is not None:
            if teacher.keys() & {"path", "upstream", "trusted"}:  # of a file, which must bring the weights itself
                raise ValueError("objective.teacher: expected the config of a model whose weights stand beside it, found a path")
            self.target_features = None
            self.teacher = make(teacher, inside=False).requires_grad_(False)
            top = self.teacher.num_states - 1
            self.layer = round(top * 2 / 3) if layer is None else layer
            if not -top - 1 <= self.layer <= top:
                raise ValueError(f"objective.layer={layer}: the teacher has the hidden states 0 to {top}")
            if self.teacher.features.sample_rate != model.features.sample_rate:
                raise ValueError(
                    f"objective.teacher hears {self.teacher.features.sample_rate} Hz and the features are of "
                    f"{model.features.sample_rate} Hz: set features.sample_rate"
                )
            width = self.teacher.state_dim
        self.register_buffer("centres", torch.full((num_clusters, width), torch.nan))

    def train(self, mode: bool = True) -> Clusters:
        """Set training mode. The teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def compile_source(self) -> None:
        """Compile the teacher, if it is an encoder of audiot's."""
        encoder = getattr(self.teacher, "encoder", None)
        if isinstance(encoder, AudioEncoder):
            encoder.compile()

    @torch.no_grad()
    def source(self, model: AudioEncoder, waveforms: Tensor, lengths: Tensor, tokens: Tensor | None) -> Tensor | None:
        """Hidden states of the teacher in the time of the tokens (B, T, d), or the tokens."""
        if self.teacher is None:
            return super().source(model, waveforms, lengths, tokens)
        with attention_of_any_shape():
            hidden, counts = self.teacher.state(waveforms, lengths, self.layer)
        wanted = model.features.num_tokens(waveforms.shape[1])
        return self.in_token_time(model.features, self.teacher.features, self.teacher.stack, hidden, counts, wanted)

    @torch.no_grad()
    def codes(self, source: Tensor, lengths: Tensor) -> Tensor:
        """Clusters (B, T, 1)."""
        return nearest(self._points(source, lengths), self.centres)[..., None]

    def _points(self, source: Tensor, lengths: Tensor) -> Tensor:
        return source if self.teacher is not None else in_context(source, lengths, self.context)

    @torch.no_grad()
    def fit(self, model: AudioEncoder, sample: Sample, seed: int) -> dict[str, Any]:
        """Cluster the tokens of `sample_s` seconds of training audio.

        Returns:
            Clusters, how many of them are used, their perplexity, and the stability: the normalised mutual information, on the
            sample, of clusters fitted on one half of its utterances and on the other.
        """
        self.fit_features(sample)
        device = model.encoder.input.weight.device
        halves: tuple[list[Tensor], list[Tensor]] = [], []
        for waveforms, lengths in sample(self.sample_s):
            heard = waveforms.to(device)
            tokens, num_tokens = model.features(heard, lengths)
            source = self.source(model, heard, lengths, tokens)
            points = self._points(tokens if source is None else source, num_tokens.to(device))
            for row, count in zip(points, num_tokens.tolist(), strict=True):
                halves[len(halves[0]) > len(halves[1])].append(row[:count].float())
        points = torch.cat([*halves[0], *halves[1]])
        if not bool(points.isfinite().all()):
            whose = "the features" if self.teacher is None else "the teacher's states: its encoder is damaged, or diverged"
            raise ValueError(f"what is to be clustered is not finite, {whose}")
        # What is left of the codes where there is little audio stands far from everything.
        num_clusters = min(self.num_codes, max(1, len(points) // FRAMES_EACH))
        centres = points.new_full((self.num_codes, points.shape[1]), FAR)
        centres[:num_clusters] = kmeans(points, num_clusters, seed, self.iterations)
        self.centres.copy_(centres)
        figures = self.set_prior(assigned(points, centres).bincount(minlength=self.num_codes)[None])
        two = [torch.cat(half) for half in halves if half]
        if len(two) == 2 and min(map(len, two)) >= num_clusters:
            labels = [assigned(points, kmeans(half, num_clusters, seed, self.iterations)) for half in two]
            figures["targets/stability"] = round(normalised_mutual_information(*labels), 3)
        return figures
