"""Self-distillation with online clustering (DinoSR: Liu et al. 2023, arXiv:2305.10005)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from audiot.base import streams
from audiot.base.devices import attention_of_any_shape, to_host
from audiot.base.private import approach
from audiot.checkpoint import AudioEncoder
from audiot.model import length_mask
from audiot.objectives.codes import CodePrediction, perplexity_of
from audiot.objectives.kmeans import kmeans, nearest
from audiot.objectives.objective import Sample, View
from audiot.training.accumulation import Mean
from audiot.training.fsdp import local_part

PUBLISHED_STEPS = 400_000  # of the training that the published decays are for
SAMPLE_S = 300.0  # seconds of audio that the first codes are fitted on
ITERATIONS = 10  # of k-means for the first codes
DEAD = 0.01  # a code is dead below this part of an average code's share of the tokens
REVIVED = 0.1  # part of an average code's share that a code starts again with
APART = 0.01  # deviation of what is added to a copied code, whose channels have deviation 1
CHECK_EVERY = 50  # steps from one look for collapse to the next
WARM_UP = 100  # steps without a look
EPS = 1e-5


class SelfDistillation(CodePrediction):
    """Predict codes of what a teacher hears in the whole utterance, where the teacher is an average of the model itself.

    The teacher is an exponential moving average of the encoder's weights, without dropout, and hears clean, unmasked utterances.
    The front end is shared (data2vec, Baevski et al. 2022, arXiv:2202.03555). Each of the teacher's last layers has a codebook.
    A token's code is the one nearest to the layer's state, whose channels have mean 0 and deviation 1 over an utterance's time.
    The encoder's last state predicts the codes of all these layers at masked tokens.

    After each step of the optimiser, over all real tokens of all its batches and processes,

    - each code moves to the mean e = s / n of the states assigned to it, where s and n, their sum and their number, are moving
      averages with `codebook_decay`;
    - the teacher becomes d · teacher + (1 − d) · encoder. The decay d goes linearly from `decay` to `final_decay` in the first
      part `ramp` of the training, and is 1 from the part `freeze` on. These decays are for 400,000 steps. In a training of N
      steps they are taken to the power of 400,000 / N, so that the teacher forgets after the same part of the training.

    Differs from the paper:

    - First codes are centres of k-means of the untrained teacher's states, not random vectors.
    - A code that hardly any token has had lately starts again beside one of the most frequent codes, and the two share its tokens
      (as in the splitting of Linde, Buzo and Gray 1980). The paper leaves such codes where they are.
    - Each step counts alike in the moving averages, whatever its number of tokens.

    Training ends with an error when the teacher collapses: when the perplexity of a layer's codes, or the differences between the
    tokens of an utterance, vanish.

    Args:
        model: The model to train, whose encoder is the first teacher.
        num_layers: Number of layers that have a codebook, counted from the last; None: half of them, at least 3 if there are.
        num_codes: Codes V of each layer.
        decay: Decay of the teacher at the first step.
        final_decay: Decay of the teacher after the ramp.
        ramp: Part of the training in which the decay goes from the one to the other.
        freeze: Part of the training after which the teacher stays as it is.
        steps: Steps of the training. One that goes on after them starts the ramp again.
        codebook_decay: Decay of the sums and numbers that codes are made of.
        min_perplexity: Smallest perplexity of a layer's codes, as a part of their number, that is no collapse.
        min_variance: Smallest variance of the teacher's states over time, as a part of their energy, that is no collapse.
        options: Parameters of `CodePrediction`.
    """

    deciding: ClassVar[tuple[str, ...]] = (*CodePrediction.deciding, "num_layers", "num_codes")
    extras: ClassVar[Mapping[str, str]] = {
        **CodePrediction.extras,
        "teacher_perplexity": "perplexity of the codes in the latest steps, mean of the layers",
        "used_codes": "codes that are not dead, mean of the layers",
        "teacher_variance": "variance of the teacher's states over time, as a part of their energy",
    }

    codebook: Tensor
    variance: Tensor
    step: Tensor
    key: Tensor

    def __init__(
        self,
        model: AudioEncoder,
        num_layers: int | None = None,
        num_codes: int = 256,
        decay: float = 0.999,
        final_decay: float = 0.9999,
        ramp: float = 0.075,
        freeze: float = 0.575,
        steps: int = PUBLISHED_STEPS,
        codebook_decay: float = 0.9,
        min_perplexity: float = 0.05,
        min_variance: float = 0.001,
        **options: Any,
    ) -> None:
        there = model.encoder.num_layers
        layers = max(min(there, 3), math.ceil(there / 2)) if num_layers is None else num_layers
        if not 1 <= layers <= there:
            raise ValueError(f"objective.num_layers must be in 1…{there}, the layers of the model, found {layers}")
        for name, value in {"decay": decay, "final_decay": final_decay, "codebook_decay": codebook_decay}.items():
            if not 0 < value < 1:
                raise ValueError(f"objective.{name} must be between 0 and 1, found {value}")
        if not 0 <= ramp <= freeze:
            raise ValueError(f"objective.ramp must be in 0…objective.freeze, parts of the training, found {ramp} and {freeze}")
        if steps < 1:
            raise ValueError(f"objective.steps must be at least 1, found {steps}: set trainer.max_steps")
        for name, value in {"min_perplexity": min_perplexity, "min_variance": min_variance}.items():
            if not 0 <= value < 1:
                raise ValueError(f"objective.{name} must be in [0, 1), found {value}")
        if options.get("features") is not None:
            raise ValueError("objective.features: targets of self_distillation are of what its teacher hears; drop it")
        super().__init__(model, num_codebooks=layers, num_codes=num_codes, **options)
        self.target_features = None
        self.decay, self.final_decay, self.ramp, self.freeze, self.steps = decay, final_decay, ramp, freeze, steps
        self.codebook_decay, self.min_perplexity, self.min_variance = codebook_decay, min_perplexity, min_variance
        self.teacher = copy.deepcopy(model.encoder).requires_grad_(False).eval()
        width = model.encoder.embed_dim
        self.register_buffer("codebook", torch.randn(layers, num_codes, width))
        self.register_buffer("variance", torch.ones(layers))  # in the latest step
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("key", torch.zeros((), dtype=torch.long))  # of what dead codes start again with
        # Sums over the batches of a step. They are no buffers: DistributedDataParallel would overwrite those of the ranks with
        # rank 0's, and a checkpoint, which is made between steps, has no use for them.
        self._moments = torch.zeros(layers, num_codes, width + 1)  # of the states with each code, and their number
        self._spread = torch.zeros(layers + 1)  # variance times tokens, and tokens
        self._skipped = torch.zeros((), dtype=torch.bool)  # whether the current step changes nothing
        self._since = 0  # steps since the latest look
        self._looked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> SelfDistillation:
        super()._apply(fn, recurse)
        # Emptied, as memory may come without values.
        self._moments, self._spread = torch.zeros_like(fn(self._moments)), torch.zeros_like(fn(self._spread))
        self._skipped = torch.zeros_like(self._spread[0], dtype=torch.bool)
        return self

    def train(self, mode: bool = True) -> SelfDistillation:
        """Set training mode. The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def begin(self) -> None:
        """Begin the ramp of the decays anew."""
        self.step.zero_()

    def codes(self, source: Tensor, lengths: Tensor) -> Tensor:
        """The codes (B, T, G), which `loss` and `view` hand on as the source."""
        return source

    def targets(self, model: AudioEncoder, source: Tensor, lengths: Tensor, valid: Tensor | None) -> Tensor:
        """Codes (B, T, G) of the teacher's states."""
        return self._nearest(self._states(model, source, valid)[0])

    def loss(
        self, model: AudioEncoder, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor
    ) -> Mean:
        """Cross-entropy of the codes at masked tokens. In training, it also sums up what `after_step` needs."""
        states, shares = self._states(model, source, valid)
        codes = self._nearest(states)
        if self.training:
            self._record(states, shares, codes, lengths, valid)
        return super().loss(model, tokens, lengths, keys, valid, codes)

    def view(
        self, model: AudioEncoder, tokens: Tensor, lengths: Tensor, keys: Tensor, valid: Tensor | None, source: Tensor
    ) -> View:
        """Codes and their prediction at masked tokens.

        Returns:
            What `CodePrediction.view` does, and ``variance``: that of the teacher's states over time, as a part of their energy,
            (B, G).
        """
        states, shares = self._states(model, source, valid)
        view = super().view(model, tokens, lengths, keys, valid, self._nearest(states))
        return view | {"variance": shares}

    def _states(self, model: AudioEncoder, source: Tensor, valid: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """The teacher's states (B, T, d) of each layer with a codebook, normalised, and their variance (B, G)."""
        # Not under no_grad: autocast would keep weights in half precision that have no gradients.
        embedded = model.features.embed(source, valid).detach()
        with torch.no_grad():
            hidden = self.teacher(embedded, valid)[-self.num_codebooks :]
            with torch.autocast(embedded.device.type, enabled=False):
                pairs = [normalised_over_time(state.to(self.codebook.dtype), valid) for state in hidden]
        return [state for state, _ in pairs], torch.stack([share for _, share in pairs], dim=-1)

    @torch.no_grad()
    def _nearest(self, states: list[Tensor]) -> Tensor:
        return torch.stack([nearest(state, book) for state, book in zip(states, self.codebook, strict=True)], dim=-1)

    @torch.no_grad()
    def _record(self, states: list[Tensor], shares: Tensor, codes: Tensor, lengths: Tensor, valid: Tensor | None) -> None:
        """Add a batch's real tokens to the sums of the step."""
        with torch.autocast(shares.device.type, enabled=False):
            moments = []
            for state, code in zip(states, codes.unbind(-1), strict=True):
                # Products: sums by index have no order on a GPU.
                member = nn.functional.one_hot(code, self.num_codes).to(state.dtype)
                if valid is not None:
                    member = member * valid[..., None]
                counted = nn.functional.pad(state, (0, 1), value=1.0)
                moments.append(member.flatten(0, 1).T @ counted.flatten(0, 1))
            tokens = lengths.to(shares.dtype)
            self._moments.add_(torch.stack(moments))
            self._spread.add_(torch.cat([tokens @ shares, tokens.sum()[None]]))

    @torch.no_grad()
    def fit(self, model: AudioEncoder, sample: Sample, seed: int) -> dict[str, Any]:
        """Start the teacher as a copy of the encoder, and the codes as centres of k-means of its states.

        Returns:
            Codes, how many of them are used, and their perplexity, as means of the layers.

        Raises:
            ValueError: there are fewer tokens than codes.
        """
        device = model.encoder.input.weight.device
        self.teacher.load_state_dict(model.encoder.state_dict())
        self.key.fill_(streams.key("dead codes", seed))
        heard: list[list[Tensor]] = [[] for _ in range(self.num_codebooks)]
        for waveforms, lengths in sample(SAMPLE_S):
            waveforms = waveforms.to(device)
            tokens, num_tokens = model.features(waveforms, lengths)
            source = self.source(model, waveforms, lengths, tokens)
            valid = length_mask(num_tokens, tokens.shape[1], device)
            with attention_of_any_shape():
                states, _ = self._states(model, tokens if source is None else source, valid)
            for layer, state in zip(heard, states, strict=True):
                layer.append(state.flatten(0, 1) if valid is None else state[valid])
        counts = []
        for number, layer in enumerate(heard):
            points = torch.cat(layer)
            if len(points) < self.num_codes:
                raise ValueError(f"objective.num_codes={self.num_codes} needs as many tokens, found {len(points)}: lower it")
            self.codebook[number] = kmeans(points, self.num_codes, seed, ITERATIONS)
            counts.append(nearest(points, self.codebook[number]).bincount(minlength=self.num_codes))
        return self.set_prior(torch.stack(counts))

    @torch.no_grad()
    def after_step(self, model: AudioEncoder) -> None:
        """Move the codes by what the batches of the step had, on all processes together, and the teacher towards the encoder."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._moments)
            dist.all_reduce(self._spread)
        self._move_codes()
        self._revive_codes()
        self.variance.copy_(torch.where(self._spread[-1] > 0, self._spread[:-1] / self._spread[-1].clamp(min=1), self.variance))
        self._moments.zero_()
        self._spread.zero_()
        self._move_teacher(model)
        self.step.add_(~self._skipped)
        self._look_for_collapse()

    def discard(self, skipped: Tensor) -> None:
        """Empty the sums where the step is skipped, and let `after_step` leave codes, teacher and step as they are."""
        self._skipped.copy_(skipped)
        self._moments.masked_fill_(skipped, 0)
        self._spread.masked_fill_(skipped, 0)

    def _move_codes(self) -> None:
        """Take the step's tokens into the moving averages. ``prior`` is n, and ``codebook`` is s / n."""
        total = self._moments[..., -1].sum(1)[:, None, None].clamp(min=1)
        mean, share = self._moments[..., :-1] / total, self._moments[..., -1:] / total
        # Without tokens, or with undefined ones, as mixed precision skips them, all stays as it is.
        seen = (share.sum(1, keepdim=True) > 0) & mean.isfinite().all(dim=(1, 2), keepdim=True)
        before = self.codebook_decay * self.prior[..., None]
        after = before + (1 - self.codebook_decay) * share
        moved = (before * self.codebook + (1 - self.codebook_decay) * mean) / after
        self.codebook.copy_(torch.where(seen & (after > 1e-12), moved, self.codebook))
        self.prior.copy_(torch.where(seen, after, self.prior[..., None])[..., 0])

    def _revive_codes(self) -> None:
        """Start dead codes beside the most frequent ones: the rarest code beside the most frequent one, and so on."""
        average = 1 / self.num_codes
        order = self.prior.argsort(dim=1, stable=True)
        rare, frequent = order, order.flip(1)
        revived = (self.prior.gather(1, rare) < DEAD * average) & (self.prior.gather(1, frequent) > average) & ~self._skipped
        books = torch.arange(self.num_codebooks, device=order.device)
        noise = streams.normal(self.key + self.step * self.num_codebooks + books, self.codebook.shape[-1])
        beside = self.codebook[books[:, None], frequent] + APART * noise[:, None].to(self.codebook.dtype)
        own = self.codebook[books[:, None], rare]
        self.codebook[books[:, None], rare] = torch.where(revived[..., None], beside, own)
        self.prior.scatter_(1, rare, torch.where(revived, REVIVED * average, self.prior.gather(1, rare)))

    def _move_teacher(self, model: AudioEncoder) -> None:
        """Average the weights. Under FSDP, teacher and encoder share them out alike, so each process averages its own part."""
        pairs = zip(self.teacher.parameters(), model.encoder.parameters(), strict=True)
        ours, theirs = zip(*((local_part(one.data), local_part(other.data)) for one, other in pairs), strict=True)
        approach(ours, theirs, self.teacher_rate().to(ours[0].dtype))
        for one, other in zip(self.teacher.buffers(), model.encoder.buffers(), strict=True):
            one.copy_(other)

    def teacher_rate(self) -> Tensor:
        """Share 1 − d of the encoder that goes into the teacher after the current step, a scalar on the device; 0 if skipped."""
        done = (self.step % self.steps) / self.steps
        ramped = (done / self.ramp).clamp(max=1) if self.ramp else torch.ones_like(done)
        gap = (1 - self.decay) + ramped * (self.decay - self.final_decay)
        rate = -torch.expm1(torch.log1p(-gap) * (PUBLISHED_STEPS / self.steps))
        return torch.where((done < self.freeze) & ~self._skipped, rate, torch.zeros_like(rate))

    def perplexity(self) -> Tensor:
        """Perplexity of the codes of each layer in the latest steps (G,)."""
        return perplexity_of(self.prior / self.prior.sum(1, keepdim=True))

    def _figures(self) -> Tensor:
        return torch.cat([self.step[None].to(self.prior.dtype), self.perplexity(), self.variance])

    def _look_for_collapse(self) -> None:
        """Every so many steps, check the figures copied that many steps before, which have arrived by now on every process."""
        self._since = (self._since + 1) % CHECK_EVERY
        if self._since:
            return
        if self._looked is not None:
            figures, arrived = self._looked
            if arrived is not None:
                arrived.synchronize()
            self.check(figures)
        (figures,), arrived = to_host(self._figures())
        self._looked = figures, arrived

    def check(self, figures: Tensor) -> None:
        """Refuse to go on with a collapsed teacher.

        Args:
            figures: The step, the perplexity of each layer and the variance of each layer (2G + 1,), on the CPU.

        Raises:
            ValueError: a figure is too small.
        """
        step, *values = figures.tolist()
        if step < WARM_UP:
            return
        first, least = self.teacher.num_layers - self.num_codebooks + 1, self.min_perplexity * self.num_codes
        layers = zip(values[: self.num_codebooks], values[self.num_codebooks :], strict=True)
        for layer, (perplexity, variance) in enumerate(layers, start=first):
            found = None
            if perplexity < least:
                found = f"uses codes with a perplexity of {perplexity:.1f} of {self.num_codes}, at least {least:.1f} expected"
            elif variance < self.min_variance:
                found = f"has variance over time of {variance:.2g} of its energy, at least {self.min_variance:g} expected"
            if found:
                raise ValueError(
                    f"self-distillation collapsed by step {step:.0f}: layer {layer} of the teacher {found}: lower optimizer.lr, "
                    "or raise objective.decay or objective.codebook_decay"
                )

    def measures(self, view: View) -> dict[str, Mean]:
        """The metrics of `CodePrediction`, and the codes' perplexity and use and the states' variance, which tell of collapse.

        Raises:
            ValueError: the teacher has collapsed.
        """
        self.check(self._figures().cpu())
        one = torch.ones((), device=self.prior.device)
        return super().measures(view) | {
            "teacher_perplexity": Mean(self.perplexity().mean(), one),
            "used_codes": Mean((self.prior >= DEAD / self.num_codes).sum(1).to(self.prior.dtype).mean(), one),
            "teacher_variance": Mean(view["variance"].mean(), one * len(view["variance"])),
        }


def normalised_over_time(states: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """States with mean 0 and deviation 1 over time in each channel of each utterance.

    Args:
        states: (B, T, d).
        valid: Mask, bool (B, T); None where nothing is padded.

    Returns:
        States (B, T, d), zero where they are padded, and the variance over time as a part of the energy (B,).
    """
    inside = states.new_ones(1, states.shape[1], 1, dtype=torch.bool) if valid is None else valid[..., None]
    count = inside.sum(1, keepdim=True).clamp(min=1)
    states = torch.where(inside, states, 0)
    mean = states.sum(1, keepdim=True) / count
    centred = torch.where(inside, states - mean, 0)
    variance = centred.square().sum(1, keepdim=True) / count
    energy = (variance + mean.square()).mean((1, 2))
    return centred * (variance + EPS).rsqrt(), variance.mean((1, 2)) / energy.clamp(min=torch.finfo(energy.dtype).tiny)
