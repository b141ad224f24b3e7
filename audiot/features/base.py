"""Waveform → features, on the device, as the first module of a model. So a checkpoint contains its front end.

Shapes: B utterances, N samples, F frames, C channels of a frame (deltas included), T tokens of `stack` frames each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from audiot.base.framing import Count, SpectrogramScale, num_frames
from audiot.base.tracing import can_be_read, first, is_recording

MOST_HZ, MOST_POINTS, MOST_CHANNELS = 1_000_000, 2**15, 2**12  # beyond all that features of sound are: a file may say anything
SelfFeatures = TypeVar("SelfFeatures", bound="Features")


class Features(nn.Module, ABC):
    """Base of the front ends: framing, deltas, mean and variance normalisation (CMVN), stacking and exact lengths.

    Nothing is padded at the ends. Frame t covers the samples [t·hop_length, t·hop_length + win_length), and samples that do not
    fill a frame are left out. With `center`, each utterance is first reflected at its own ends. So lengths are exact, and padding
    in a batch reaches no frame of an utterance.

    The order is level → frames → deltas → CMVN → stacking. Deltas repeat the utterance's own first and last frame. CMVN
    subtracts the mean and divides by the unbiased (n - 1) standard deviation. The deviation is at least `eps`, so a constant
    channel becomes zero. Padded tokens are zero.

    Features are computed without gradients, in float32 (float64 for a float64 waveform), whatever autocast or the
    model's dtype is. The buffers stay float32 in a half-precision model.

    A front end may go on with a trained part, `embed`, from these fixed tokens to the encoder's input. It is part of the model's
    compiled step and has gradients. Here it is a `Subsampling`: stacked frames are the tokens, and convolutions over the same
    frames are the encoder's input.

    Args:
        frame_channels: Channels that `frames` returns, before deltas.
        win_length: Samples in a frame.
        hop_length: Samples from one frame to the next.
        sample_rate: Sample rate in Hz. Waveforms must have it already.
        cmvn: ``"utterance"`` (mean and deviation of each channel over an utterance's own frames), ``"global"`` (over a corpus,
            see `fit`), ``"level"`` (one mean over all frames and channels of an utterance is subtracted, which takes its level
            away and leaves the speaker's spectrum; deltas have none) or ``"none"``.
        stack: Consecutive frames per token. Remaining frames of an utterance are dropped.
        eps: Smallest standard deviation that CMVN divides by.
        delta_order: Order of deltas: 0, 1 (first differences in time) or 2 (also their differences).
        delta_window: Frames that a delta is computed from, an odd number.
        center: Whether frame t is centred on sample t·hop_length and each utterance is reflected at its own ends, as torch.stft
            does by default. N samples then give N // hop_length + 1 frames.
        level_db: Root-mean-square level to which each utterance is scaled first, in dB of full scale; None keeps its level.
        subsample: Frames per token, 2 or 4, that trained convolutions make one input of the encoder of. It stands in place of
            `stack`. None: no trained part.
        subsample_dim: Channels of these convolutions; None: 256.
        grad_scale: Factor of the gradient that the trained part gets. It reaches all of its parameters.

    Attributes:
        num_channels: Channels C of a frame: frame_channels · (delta_order + 1).
        output_dim: Size of a token: num_channels · stack.
        embed_dim: Size of the encoder's input: output_dim, unless a trained part changes it.
        is_trained: Whether there is a trained part.
        spacing: How channels with a frequency are spaced, ``linear`` or ``mel``.
        spectra: Config of a fixed front end with a spectrum per frame, where the tokens have none: for targets of pre-training
            and for controls. None: the tokens have them.
    """

    is_trained = False
    spacing = "linear"
    spectra: dict[str, Any] | None = None

    def __init__(
        self,
        *,
        frame_channels: int,
        win_length: int,
        hop_length: int,
        sample_rate: int = 16000,
        cmvn: str = "utterance",
        stack: int = 1,
        eps: float = 1e-3,
        delta_order: int = 0,
        delta_window: int = 5,
        center: bool = False,
        level_db: float | None = None,
        subsample: int | None = None,
        subsample_dim: int | None = None,
        grad_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if subsample not in (None, 2, 4):
            raise ValueError(f"features.subsample must be 2, 4 or null, found {subsample!r}")
        if subsample is not None and stack != 1:
            raise ValueError(
                f"features.stack={stack} and features.subsample={subsample} both join frames: set features.stack=1, or "
                "features.subsample=null"
            )
        if subsample is None and subsample_dim is not None:
            raise ValueError(
                f"features.subsample_dim={subsample_dim} has no effect without convolutions: set features.subsample=2 or 4"
            )
        if grad_scale <= 0:
            raise ValueError(f"features.grad_scale must be positive, found {grad_scale}")
        stack = stack if subsample is None else subsample
        if cmvn not in ("utterance", "global", "level", "none"):
            raise ValueError(f"features.cmvn must be utterance, global, level or none, found {cmvn!r}")
        if delta_order not in (0, 1, 2):
            raise ValueError(f"features.delta_order must be 0, 1 or 2, found {delta_order}")
        if delta_window < 3 or delta_window % 2 == 0:
            raise ValueError(f"features.delta_window must be odd and at least 3, found {delta_window}")
        sizes = {"sample_rate": sample_rate, "win_length": win_length, "hop_length": hop_length, "stack": stack}
        most = {"sample_rate": MOST_HZ, "win_length": MOST_POINTS, "hop_length": MOST_POINTS, "stack": MOST_CHANNELS}
        for name, size in (sizes | {"delta_window": delta_window}).items():
            check_size(name, size, most.get(name, MOST_CHANNELS))
        check_size("channels", frame_channels, MOST_POINTS)
        if eps <= 0:
            raise ValueError(f"features.eps must be positive, found {eps}")
        self.sample_rate = sample_rate
        self.win_length = win_length
        self.hop_length = hop_length
        self.cmvn = cmvn
        self.stack = stack
        self.eps = eps
        self.delta_order = delta_order
        self.delta_window = delta_window
        self.center = center
        self.level_db = level_db
        self.reflected = (win_length - win_length // 2, win_length // 2) if center else (0, 0)  # samples at the start and the end
        self.num_channels = frame_channels * (delta_order + 1)
        self.frame_channels = frame_channels
        self.output_dim = self.num_channels * stack
        self.embed_dim = self.output_dim
        self.grad_scale = grad_scale
        self.subsampling: Subsampling | None = None
        if subsample is not None:
            self.embed_dim = 256 if subsample_dim is None else subsample_dim
            check_size("subsample_dim", self.embed_dim, MOST_CHANNELS)
            self.subsampling = Subsampling(self.num_channels, self.embed_dim, subsample)
            self.is_trained = True
        self.cmvn_mean: Tensor
        self.cmvn_std: Tensor
        if cmvn == "global":  # NaN until fitted, so that a forgotten fit raises an error
            self.register_buffer("cmvn_mean", torch.full((self.num_channels,), math.nan))
            self.register_buffer("cmvn_std", torch.full((self.num_channels,), math.nan))
        self._fitted = False  # avoids reading the statistics from the device in every step

    @abstractmethod
    def frames(self, waveforms: Tensor) -> Tensor:
        """Features of every full frame, before deltas: (B, N) → (B, F, frame_channels).

        The waveforms are float32 or float64, scaled and reflected already. The result has the same dtype.
        """

    @torch.no_grad()
    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute tokens and their number for each utterance.

        Args:
            waveforms: Samples (B, N), float in [-1, 1]. The padding at the end may have any value.
            lengths: Samples of each utterance, integers (B,); None when nothing is padded. Keep them on the CPU, as the data
                module does: only there are they checked, because a check on a GPU would wait for it. On a GPU, an utterance
                that is too short gets no tokens.

        Returns:
            Tokens (B, T, output_dim) with T = num_tokens(N), and lengths in tokens (B,) on the device of `lengths` (by default
            that of the waveforms).

        Raises:
            ValueError: an utterance is shorter than one token, a length exceeds N, a shape or dtype is wrong, or
                ``cmvn="global"`` has no statistics yet.
        """
        self._check(waveforms, lengths)
        frame_lengths = None if lengths is None else self._frame_lengths(lengths, waveforms)
        with torch.autocast(waveforms.device.type, enabled=False):
            channels = self._channels(self._prepared(waveforms, lengths), frame_lengths)
            tokens = self._stack(self._normalize(channels, frame_lengths))
        if lengths is None:
            return tokens, waveforms.new_full((len(waveforms),), tokens.shape[1], dtype=torch.long)
        if frame_lengths is not None:
            tokens = tokens.masked_fill(_padding(frame_lengths // self.stack, tokens.shape[1]), 0.0)
        return tokens, self.num_tokens(lengths)

    def embed(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """The encoder's input (B, T, embed_dim) from tokens (B, T, output_dim): the tokens, unless there is a trained part.

        ``valid`` is bool (B, T), or None where nothing is padded.
        """
        if self.subsampling is None:
            return tokens
        return scale_gradient(self.subsampling(self.unstack(tokens), valid), self.grad_scale)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Compute the global CMVN statistics in float64 from batches of (waveforms, lengths) as `forward` takes them.

        Call it before training, with the same batches on every rank. The statistics are part of the state dict.

        Raises:
            ValueError: ``cmvn`` is not ``"global"``, or the batches hold fewer than two frames.
        """
        if self.cmvn != "global":
            raise ValueError(f"features.fit needs features.cmvn=global, found {self.cmvn}")
        device = self.cmvn_mean.device
        count = 0
        total = torch.zeros(self.num_channels, dtype=torch.float64)
        squares = torch.zeros(self.num_channels, dtype=torch.float64)
        for waveforms, lengths in batches:
            self._check(waveforms, lengths)
            if lengths is None:
                lengths = torch.full((len(waveforms),), waveforms.shape[1])
            waveforms = waveforms.to(device)
            frame_lengths = self.num_frames(lengths).to(device)
            with torch.autocast(device.type, enabled=False):
                channels = self._channels(self._prepared(waveforms, lengths), frame_lengths)
            valid = ~_padding(frame_lengths, channels.shape[1]).squeeze(-1)
            frames = channels[valid].cpu().double()  # some devices lack float64
            count += len(frames)
            total += frames.sum(0)
            squares += frames.square().sum(0)
        if count < 2:
            raise ValueError(f"features.fit needs at least two frames, found {count}: give it more audio")
        mean = total / count
        variance = ((squares - count * mean.square()) / (count - 1)).clamp(min=0.0)
        self.cmvn_mean.copy_(mean)
        self.cmvn_std.copy_(variance.sqrt().clamp(min=self.eps))
        self._fitted = True

    @property
    def is_fitted(self) -> bool:
        """Whether there are global statistics, if they are needed."""
        return self.cmvn != "global" or not bool(self.cmvn_mean.isnan().any())

    def num_frames(self, num_samples: Count) -> Count:
        """Frames, before stacking, in so many samples."""
        enough = num_samples > self.reflected[0]  # to be reflected
        return num_frames(num_samples, self.win_length, self.hop_length, sum(self.reflected)) * enough

    def num_tokens(self, num_samples: Count) -> Count:
        """Tokens that `forward` makes of so many samples."""
        return self.num_frames(num_samples) // self.stack

    def num_samples(self, num_tokens: int) -> int:
        """Fewest samples that give a number of tokens. A crop has this length."""
        before, behind = self.reflected
        return max((num_tokens * self.stack - 1) * self.hop_length + self.win_length - before - behind, before + 1)

    def frame_centers(self, num_frames: int) -> Tensor:
        """Middle of each frame in samples (num_frames,), to look up labels: t·hop_length, plus half a window without `center`."""
        return torch.arange(num_frames) * self.hop_length + self._first_center

    @property
    def _first_center(self) -> int:
        return 0 if self.center else self.win_length // 2

    def unstack(self, tokens: Tensor) -> Tensor:
        """Undo stacking: (B, T, C·stack) → (B, T·stack, C), for any C."""
        if tokens.shape[-1] % self.stack:
            raise ValueError(f"tokens have {tokens.shape[-1]} channels, expected a multiple of stack = {self.stack}")
        return tokens.reshape(tokens.shape[0], tokens.shape[1] * self.stack, tokens.shape[2] // self.stack)

    def spectrogram(self, tokens: Tensor) -> Tensor:
        """What pictures show of tokens (B, T, output_dim): frames (B, T·stack, …)."""
        return self.unstack(tokens)

    def channel_hertz(self) -> tuple[float, ...] | None:
        """Frequency in Hz of each channel of `spectrogram`, deltas apart; None: channels have none."""
        return None

    @property
    def scale(self) -> SpectrogramScale:
        """Where frames and channels of `spectrogram` lie."""
        hertz = None if self.delta_order else self.channel_hertz()
        first_s, step_s = self._first_center / self.sample_rate, self.hop_length / self.sample_rate
        return SpectrogramScale(first_s, step_s, self.stack, hertz, self.spacing)

    def extra_repr(self) -> str:
        """Text that print(features) shows."""
        return (
            f"output_dim={self.output_dim}, sample_rate={self.sample_rate}, win_length={self.win_length}, "
            f"hop_length={self.hop_length}, delta_order={self.delta_order}, cmvn={self.cmvn}, stack={self.stack}"
        )

    def _framed(self, waveforms: Tensor) -> Tensor:
        """View of the waveforms as frames: (B, N) → (B, F, win_length)."""
        return waveforms.unfold(-1, self.win_length, self.hop_length)

    def _frame_lengths(self, lengths: Tensor, waveforms: Tensor) -> Tensor | None:
        """Frames of each utterance (B,), on the device of the waveforms; None if it is known that no frame is padding."""
        frame_lengths = self.num_frames(lengths)
        if can_be_read(lengths) and bool((frame_lengths == self.num_frames(waveforms.shape[1])).all()):
            return None
        return frame_lengths.to(waveforms.device, non_blocking=True)

    def _prepared(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """Waveforms in float32 or better, scaled and reflected: (B, N) → (B, N + reflected samples)."""
        waveforms = waveforms if waveforms.dtype == torch.float64 else waveforms.float()
        if self.level_db is None and not self.center:
            return waveforms
        if lengths is None:
            lengths = waveforms.new_full((waveforms.shape[0],), waveforms.shape[1], dtype=torch.long)
        ends = lengths.to(waveforms.device, non_blocking=True)[:, None]
        if self.level_db is not None:
            padded = torch.arange(waveforms.shape[1], device=waveforms.device) >= ends
            level = (waveforms.masked_fill(padded, 0.0).square().sum(1, keepdim=True) / ends.clamp(min=1)).sqrt()
            waveforms = waveforms * (10 ** (self.level_db / 20) / (level + 1e-10))  # silence stays silent
        if not self.center:
            return waveforms
        before, behind = self.reflected
        extended = nn.functional.pad(waveforms, (before, behind))
        extended[:, :before] = waveforms[:, 1 : before + 1].flip(1)
        beyond = torch.arange(behind, device=waveforms.device)
        mirrored = waveforms.gather(1, (ends - 2 - beyond).clamp(min=0))
        return extended.scatter_(1, before + ends + beyond, mirrored)

    def _channels(self, waveforms: Tensor, frame_lengths: Tensor | None) -> Tensor:
        """Frames with deltas, before CMVN, from prepared waveforms: (B, N) → (B, F, C)."""
        channels = [self.frames(waveforms)]
        for _ in range(self.delta_order):
            channels.append(_deltas(channels[-1], frame_lengths, self.delta_window))
        return torch.cat(channels, dim=-1) if self.delta_order else channels[0]

    def _normalize(self, channels: Tensor, frame_lengths: Tensor | None) -> Tensor:
        if self.cmvn == "none":
            return channels
        if self.cmvn == "global":
            self._check_fitted()
            return (channels - self.cmvn_mean) / self.cmvn_std
        if self.cmvn == "level":
            return self._levelled(channels, frame_lengths)
        if frame_lengths is None:
            count = torch.tensor(channels.shape[1])
            centred = channels - channels.sum(1, keepdim=True) / count
        else:
            count = frame_lengths[:, None, None]
            padded = _padding(frame_lengths, channels.shape[1])
            channels = channels.masked_fill(padded, 0.0)
            centred = (channels - channels.sum(1, keepdim=True) / count.clamp(min=1)).masked_fill_(padded, 0.0)
        variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)  # a single frame has deviation 0, not NaN
        return centred.div_(variance.sqrt().clamp(min=self.eps))

    def _levelled(self, channels: Tensor, frame_lengths: Tensor | None) -> Tensor:
        """Subtract the mean over an utterance's frames and channels, deltas apart."""
        static, deltas = channels.split([self.frame_channels, self.num_channels - self.frame_channels], dim=-1)
        if frame_lengths is None:
            mean = static.mean((1, 2), keepdim=True)
        else:
            inside = static.masked_fill(_padding(frame_lengths, static.shape[1]), 0.0)
            mean = inside.sum((1, 2), keepdim=True) / (frame_lengths[:, None, None] * self.frame_channels).clamp(min=1)
        return torch.cat([static - mean, deltas], dim=-1) if self.delta_order else static - mean

    def _stack(self, frames: Tensor) -> Tensor:
        num_tokens = frames.shape[1] // self.stack
        return first(frames, 1, num_tokens * self.stack).reshape(frames.shape[0], num_tokens, self.output_dim)

    def _check(self, waveforms: Tensor, lengths: Tensor | None) -> None:
        if waveforms.dim() != 2 or not waveforms.is_floating_point():
            raise ValueError(
                f"waveforms must be (batch, samples) of floats in [-1, 1], found {tuple(waveforms.shape)} "
                f"{waveforms.dtype}: use mono audio and divide 16-bit samples by 32768"
            )
        longest = waveforms.shape[1]
        if longest < self.num_samples(1):
            raise ValueError(f"every item of the batch is too short, with {longest} samples: {self._too_short}")
        if lengths is None:
            return
        if lengths.shape != waveforms.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be ({len(waveforms)},) integers, one per waveform, found {tuple(lengths.shape)} {lengths.dtype}"
            )
        if not can_be_read(lengths):
            return
        shortest = int(lengths.argmin())
        if int(lengths[shortest]) < self.num_samples(1):
            raise ValueError(f"item {shortest} of the batch has {int(lengths[shortest])} samples: {self._too_short}")
        if int(lengths.max()) > longest:
            raise ValueError(
                f"item {int(lengths.argmax())} of the batch has length {int(lengths.max())} but the waveforms have "
                f"{longest} samples: lengths count samples of the padded waveforms"
            )

    @property
    def _too_short(self) -> str:
        needed = self.num_samples(1)
        return f"one token needs {needed}, so leave out recordings shorter than {needed / self.sample_rate:.4g} s"

    def _check_fitted(self) -> None:
        if not self._fitted:
            self._fitted = self.is_fitted
        if not self._fitted:
            raise ValueError(
                "features.cmvn=global has no statistics yet: call features.fit(batches) before training, load a "
                "checkpoint, or set features.cmvn=utterance"
            )

    def _apply(self: SelfFeatures, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfFeatures:
        # In bfloat16 the filters would be rounded to three digits, so buffers follow the model's device but keep their dtype.
        # Trained parameters, which all are in modules inside, follow in both.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for part in self.children() if recurse else ():
            part._apply(fn)
        return super()._apply(keep_dtype, recurse=False)


class Subsampling(nn.Module):
    """Convolutions over frames, one or two of stride 2, as before the encoders of Conformer (Gulati et al. 2020,
    arXiv:2005.08100) and BEST-RQ (Chiu et al. 2022, arXiv:2202.01855).

    Each has a kernel of 3 frames and a GELU after it, and a LayerNorm ends the stack. The published ones go over time and
    frequency, with kernels of 3 × 3 and the same strides; these go over time and join all channels. The first one also hears
    the frame before a token, the second one what the first made of the two behind it. So the 3 or 7 frames that an output hears
    lie around its own 2 or 4.

    An utterance's outputs are the same alone and in a batch: what is beyond its end is zero for each convolution.

    Args:
        input_dim: Channels C of a frame.
        embed_dim: Channels d of the outputs, and between the convolutions.
        factor: Frames per output, 2 or 4.
    """

    def __init__(self, input_dim: int, embed_dim: int, factor: int) -> None:
        super().__init__()
        sizes = [input_dim] + [embed_dim] * (factor // 2)
        self.convolutions = nn.ModuleList(nn.Conv1d(size, embed_dim, 3, stride=2) for size in sizes[:-1])
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, frames: Tensor, valid: Tensor | None = None) -> Tensor:
        """Outputs (B, T, d) of frames (B, T·factor, C). ``valid`` is bool (B, T), or None where nothing is padded."""
        hidden = frames.transpose(1, 2)
        for index, convolution in enumerate(self.convolutions):
            if valid is not None:
                inside = valid.repeat_interleave(2 ** (len(self.convolutions) - index), dim=1)
                hidden = hidden.masked_fill(~inside[:, None], 0.0)
            hidden = nn.functional.gelu(convolution(nn.functional.pad(hidden, (1 - index, index))))
        return self.norm(hidden.transpose(1, 2))


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """The same values. The gradient that they hand on is multiplied by ``factor``."""
    return values if factor == 1 else torch.lerp(values.detach(), values, factor)


def power_spectrum(windowed: Tensor, n_fft: int) -> Tensor:
    """Power spectrum: (..., win_length) → (..., n_fft / 2 + 1)."""
    if is_recording():
        return _power_by_products(windowed, n_fft)
    spectrum = torch.fft.rfft(windowed, n=n_fft)
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)


def _power_by_products(windowed: Tensor, n_fft: int) -> Tensor:
    """`power_spectrum` as a matrix product with sines and cosines: not every runtime has complex numbers."""
    win_length = windowed.shape[-1]
    turns = torch.outer(torch.arange(win_length), torch.arange(n_fft // 2 + 1)) % n_fft
    angles = [2 * math.pi * step / n_fft for step in range(n_fft)]
    cos, sin = (
        torch.tensor([*map(function, angles)], dtype=windowed.dtype, device=windowed.device)[turns]
        for function in (math.cos, math.sin)
    )
    waves = torch.cat([cos, sin], dim=1)  # win_length, n_fft + 2
    real, imag = (windowed @ waves).chunk(2, dim=-1)
    return real.square() + imag.square()


def log_power(power: Tensor, floor: float, add_floor: bool) -> Tensor:
    """Natural logarithm of powers. The floor is a minimum, or is added to every power with ``add_floor``."""
    return (power + floor if add_floor else power.clamp(min=floor)).log()


def _deltas(frames: Tensor, frame_lengths: Tensor | None, window: int) -> Tensor:
    """Regression deltas, Σ n·(c[t+n] - c[t-n]) / (2·Σ n²). Each utterance's own first and last frame are repeated."""
    reach = (window - 1) // 2
    num_frames = frames.shape[1]
    final = frames[:, -1:]
    if frame_lengths is not None:
        last = (frame_lengths - 1).clamp(min=0)
        final = frames[torch.arange(frames.shape[0], device=frames.device), last].unsqueeze(1)
        frames = torch.where(_padding(frame_lengths, num_frames), final, frames)
    extended = torch.cat([frames[:, :1].expand(-1, reach, -1), frames, final.expand(-1, reach, -1)], dim=1)
    deltas = torch.zeros_like(frames)
    for n in range(1, reach + 1):
        later = extended[:, reach + n : reach + n + num_frames]
        earlier = extended[:, reach - n : reach - n + num_frames]
        deltas.add_(later - earlier, alpha=n)
    return deltas.div_(2 * sum(n * n for n in range(1, reach + 1)))


def _padding(lengths: Tensor, longest: int) -> Tensor:
    """Mask of the padding, (B,) → bool (B, longest, 1)."""
    return (torch.arange(longest, device=lengths.device) >= lengths[:, None]).unsqueeze(-1)


def check_size(name: str, size: int, most: int) -> None:
    """Refuse a size that is no whole number from 1 to ``most``."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"features.{name} must be at least 1, found {size}")
    if size > most:
        raise ValueError(f"features.{name} must be at most {most:,}, found {size:,}")


def check_n_fft(n_fft: int, win_length: int) -> None:
    """Refuse a Fourier transform of fewer points than a frame has."""
    check_size("n_fft", n_fft, MOST_POINTS)
    if n_fft < win_length:
        raise ValueError(f"features.n_fft must be at least win_length = {win_length}, found {n_fft}")


def check_band(low_name: str, low: float, high_name: str, high: float, sample_rate: int) -> None:
    """Refuse frequencies, in Hz, that are not a band below half the sample rate."""
    if not 0 <= low < high <= sample_rate / 2:
        raise ValueError(
            f"features.{low_name} = {low:g} and {high_name} = {high:g} Hz must be a band within 0 to "
            f"{sample_rate / 2:g} Hz, half of sample_rate"
        )
