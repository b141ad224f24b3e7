"""The convolutional front end of wav2vec 2.0 and HuBERT, on the waveform itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from audiot.base.framing import receptive_field
from audiot.features.base import MOST_CHANNELS, MOST_POINTS, Features, check_size, log_power, power_spectrum, scale_gradient

MOST_CONVOLUTIONS = 32
VARIANCE_FLOOR = 1e-7  # as in the published preparation of waveforms


class Waveform(Features):
    """Trained convolutions on samples (wav2vec 2.0: Baevski et al. 2020, arXiv:2006.11477; HuBERT: Hsu et al. 2021,
    arXiv:2106.07447).

    With the published sizes a token hears 400 samples and the next one is 320 samples later: 25 and 20 ms at 16 kHz. The fixed
    tokens are these windows of the waveform. `embed` joins them to the waveform again, without loss, and computes the
    convolutions, each with its norm and a GELU, and a LayerNorm at the end.

    Args:
        channels: Channels of every convolution.
        kernels: Kernel size of each convolution, the first one in samples.
        strides: Stride of each, at most its kernel size.
        norm: ``layer``: every convolution has a bias, and a LayerNorm over its channels (wav2vec 2.0 Large, HuBERT Large).
            ``group``: no bias, and a norm of each channel over time, after the first convolution alone (Base). Its statistics are
            of an utterance's own samples, those that fill no window left out, so they change with how an utterance is cropped.
        normalize: Whether each utterance is scaled to mean 0 and variance 1 first.
        grad_scale: Factor of the convolutions' gradient: 0.1 as in the Base models of wav2vec 2.0 and HuBERT; the Large ones have
            1.
        sample_rate: Sample rate in Hz.
        stack: Always 1: the strides say how long a token is.
    """

    is_trained = True

    def __init__(
        self,
        *,
        channels: int = 512,
        kernels: Sequence[int] = (10, 3, 3, 3, 3, 2, 2),
        strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2),
        norm: str = "layer",
        normalize: bool = True,
        grad_scale: float = 0.1,
        sample_rate: int = 16000,
        stack: int = 1,
    ) -> None:
        check_size("channels", channels, MOST_CHANNELS)
        if not 1 <= len(kernels) == len(strides) <= MOST_CONVOLUTIONS:
            raise ValueError(
                f"features.kernels and features.strides must have one number per convolution, 1 to {MOST_CONVOLUTIONS} of them, "
                f"found {len(kernels)} and {len(strides)}"
            )
        for kernel, stride in zip(kernels, strides, strict=True):
            check_size("kernels", kernel, MOST_POINTS)
            check_size("strides", stride, kernel)
        if norm not in ("layer", "group"):
            raise ValueError(f"features.norm must be layer or group, found {norm!r}")
        if stack != 1:
            raise ValueError(
                f"features.stack must be 1 with features=waveform, whose strides say how long a token is, found {stack}: set "
                "features.stack=1"
            )
        win_length, hop_length = receptive_field(kernels, strides)
        if win_length > 2 * hop_length:
            raise ValueError(
                f"features.kernels={list(kernels)} and features.strides={list(strides)} make windows of {win_length} samples "
                f"every {hop_length}: windows may be at most twice as long as their shift, so take smaller kernels"
            )
        super().__init__(
            frame_channels=win_length,
            win_length=win_length,
            hop_length=hop_length,
            sample_rate=sample_rate,
            cmvn="none",
            grad_scale=grad_scale,
        )
        self.normalize = normalize
        self.embed_dim = channels
        window = round(0.025 * sample_rate)
        self.spectra = {
            "_target_": "audiot.features.LogMel",
            "sample_rate": sample_rate,
            "win_length": window,
            "n_fft": 1 << (window - 1).bit_length(),
            "hop_length": round(0.01 * sample_rate),
        }
        self.kernels, self.strides = tuple(kernels), tuple(strides)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(1 if index == 0 else channels, channels, kernel, stride, bias=norm == "layer")
            for index, (kernel, stride) in enumerate(zip(kernels, strides, strict=True))
        )
        for name, parameter in self.convolutions.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(parameter)
        norms = [nn.LayerNorm(channels) for _ in kernels] if norm == "layer" else [NormOverTime(channels)]
        self.norms = nn.ModuleList(norms)
        self.output_norm = nn.LayerNorm(channels)

    def frames(self, waveforms: Tensor) -> Tensor:
        """Windows of the waveform: (B, N) → (B, F, win_length)."""
        return self._framed(waveforms).contiguous()

    def embed(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Outputs of the convolutions (B, T, channels) for windows (B, T, win_length)."""
        hidden = self.joined(tokens, valid)[:, None]
        for index, convolution in enumerate(self.convolutions):
            hidden = convolution(hidden)
            if index < len(self.norms):
                norm = self.norms[index]
                if isinstance(norm, NormOverTime):
                    hidden = norm(hidden, self._first_outputs(valid))
                else:
                    hidden = norm(hidden.transpose(1, 2)).transpose(1, 2)
            hidden = nn.functional.gelu(hidden)
        return self.output_norm(scale_gradient(hidden, self.grad_scale).transpose(1, 2))

    def joined(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """The waveform that windows (B, T, win_length) are of: (B, (T - 1)·hop_length + win_length), zero after an utterance."""
        heads, tails = tokens.split([self.hop_length, self.win_length - self.hop_length], dim=-1)
        # Block t of the waveform begins window t. Behind the last window of an utterance, the rest of that window stands.
        heads = nn.functional.pad(heads, (0, 0, 0, 1))
        tails = nn.functional.pad(tails, (0, self.hop_length - tails.shape[-1], 1, 0))
        if valid is None:
            blocks = torch.cat([heads[:, :-1], tails[:, -1:]], dim=1)
        else:
            inside = nn.functional.pad(valid, (0, 1))
            before = nn.functional.pad(valid, (1, 0))
            blocks = torch.where(inside[..., None], heads, torch.where(before[..., None], tails, 0.0))
        return blocks.flatten(1)[:, : tokens.shape[1] * self.hop_length + self.win_length - self.hop_length]

    def spectrogram(self, tokens: Tensor) -> Tensor:
        """Log power spectrum of every window, for pictures: (B, T, win_length / 2 + 1)."""
        window = torch.hann_window(self.win_length, dtype=tokens.dtype, device=tokens.device)
        return log_power(power_spectrum(tokens * window, self.win_length), 1e-10, False)

    def channel_hertz(self) -> tuple[float, ...]:
        """Frequency of each bin of `spectrogram`, in Hz."""
        return tuple(bin_number * self.sample_rate / self.win_length for bin_number in range(self.win_length // 2 + 1))

    def _first_outputs(self, valid: Tensor | None) -> Tensor | None:
        """Outputs of the first convolution (B,) that an utterance's windows reach."""
        if valid is None:
            return None
        samples = (valid.sum(1) - 1) * self.hop_length + self.win_length
        return (samples - self.kernels[0]) // self.strides[0] + 1

    def _prepared(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        waveforms = super()._prepared(waveforms, lengths)
        if not self.normalize:
            return waveforms
        if lengths is None:
            centred = waveforms - waveforms.mean(1, keepdim=True)
            return centred / (centred.square().mean(1, keepdim=True) + VARIANCE_FLOOR).sqrt()
        ends = lengths.to(waveforms.device, non_blocking=True)[:, None].clamp(min=1)
        padded = torch.arange(waveforms.shape[1], device=waveforms.device) >= ends
        mean = waveforms.masked_fill(padded, 0.0).sum(1, keepdim=True) / ends
        centred = (waveforms - mean).masked_fill(padded, 0.0)
        return centred / (centred.square().sum(1, keepdim=True) / ends + VARIANCE_FLOOR).sqrt()


class NormOverTime(nn.Module):
    """Normalise each channel over the time of an utterance: GroupNorm with a group per channel, and padding left out.

    Args:
        channels: Number of channels.
        eps: Constant added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Normalise (B, channels, L), of which ``lengths`` (B,) are an utterance's own; None: all. The others have any value."""
        if lengths is None:
            return nn.functional.group_norm(hidden, len(self.weight), self.weight, self.bias, self.eps)
        values = hidden if hidden.dtype == torch.float64 else hidden.float()
        count = lengths.clamp(min=1)[:, None, None]
        inside = torch.arange(hidden.shape[2], device=hidden.device) < lengths[:, None, None]
        centred = values - values.masked_fill(~inside, 0.0).sum(2, keepdim=True) / count
        variance = centred.masked_fill(~inside, 0.0).square().sum(2, keepdim=True) / count
        normalised = centred * (variance + self.eps).rsqrt()
        return (normalised * self.weight[:, None] + self.bias[:, None]).to(hidden.dtype)
