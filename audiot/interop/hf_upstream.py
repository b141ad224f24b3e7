"""Audio encoders of Hugging Face transformers as upstreams."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from audiot.base.framing import Count, num_frames
from audiot.downstream.upstream import EncoderUpstream, Upstream, check_top
from audiot.features import KaldiFbank
from audiot.model import length_mask

try:
    import transformers
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        PreTrainedConfig,
        SeamlessM4TFeatureExtractor,
        Wav2Vec2FeatureExtractor,
        WhisperFeatureExtractor,
    )
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from audiot.interop.hf_attention import RECORD, load, replace_self_attention
    from audiot.interop.hf_model import AudiotModel, quiet
except ImportError as error:
    raise ImportError("upstream=hf needs transformers 5.16 or newer: pip install 'audiot[hf]'", name=error.name) from error

NO_FRAMES = {
    "audio-spectrogram-transformer": "its states are patches of time and frequency of a spectrogram of fixed length",
    "clap": "it makes one embedding of a clip, by windows over time and frequency",
    "clap_audio_model": "it makes one embedding of a clip, by windows over time and frequency",
}
"""Audio models without one state a frame, by model type, and why."""


class Frames:
    """How a model cuts audio into the frames of its states, as a chain of stages that each reduce the rate.

    Args:
        sample_rate: In Hz.
        stages: (window, stride, padding before, padding after) of each, in units of its input, from the samples on.
    """

    stack = 1

    def __init__(self, sample_rate: int, stages: Sequence[tuple[int, int, int, int]]) -> None:
        self.sample_rate = sample_rate
        self.stages = tuple(stages)

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        hop = 1
        for _, stride, _, _ in self.stages:
            hop *= stride
        return hop

    def num_frames(self, num_samples: Count) -> Count:
        """Frames of so many samples."""
        count = num_samples
        for window, stride, before, after in self.stages:
            count = num_frames(count, window, stride, before + after)
        return count

    def num_tokens(self, num_samples: Count) -> Count:
        """Hidden states of so many samples: one a frame."""
        return self.num_frames(num_samples)

    def num_samples(self, num_tokens: int) -> int:
        """Fewest samples that give so many hidden states."""
        count = num_tokens
        for window, stride, before, after in reversed(self.stages):
            count = (count - 1) * stride + window - before - after
        return count

    def frame_centers(self, num_frames: int) -> Tensor:
        """Middle of each frame in samples (num_frames,)."""
        first, hop = 0.5, 1
        for window, stride, before, _ in self.stages:
            first += ((window - 1) / 2 - before) * hop
            hop *= stride
        return torch.arange(num_frames) * hop + int(first)


class HFUpstream(Upstream):
    """Hidden states of an audio encoder of transformers; see `hf`.

    An utterance gives the same states alone and in a batch. Where padding would reach real frames in spite of a mask, the
    utterances of each length run apart. SpecAugment and LayerDrop, which would act in training mode, and adapters behind the
    last layer are off. The last state is the model's output, behind its final normalisation if it has one.

    Args:
        model: The encoder.
        preprocessor: What the front end needs to know of the model's feature extractor, see `settings`.
    """

    extractor: ClassVar[type]
    """Class of the feature extractor."""
    settings: ClassVar[tuple[str, ...]]
    """Its settings that matter here."""

    stack = 1

    def __init__(self, model: Any, preprocessor: Mapping[str, Any]) -> None:
        super().__init__()
        _strip(model)
        self.model = model
        self.features = Frames(preprocessor["sampling_rate"], self._stages(model.config, preprocessor))
        self.num_states = model.config.num_hidden_layers + 1
        self.state_dim = model.config.hidden_size
        target = "audiot.interop.hf_upstream.untrained_model"
        self.config = {"_target_": target, "model": _plain(model.config), "preprocessor": dict(preprocessor)}

    @staticmethod
    def build(config: Any) -> Any:
        """The encoder of a config, with random weights."""
        return AutoModel.from_config(config)

    @staticmethod
    def encoder_of(model: Any) -> Any:
        """The encoder inside the model that AutoModel loads."""
        return model

    @staticmethod
    @abstractmethod
    def _stages(config: Any, preprocessor: Mapping[str, Any]) -> tuple[tuple[int, int, int, int], ...]:
        """See `Frames`."""

    @property
    def masks_padding(self) -> bool:
        """Whether `encode` gives an utterance in a padded batch the states that it has alone."""
        return True

    @abstractmethod
    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states (layers + 1, B, T, d); those behind an utterance's end may be anything.

        Args:
            waveforms: (B, N).
            lengths: (B,) samples, on the CPU; all N unless `masks_padding`.
        """

    @property
    def transformer_layers(self) -> nn.ModuleList:
        """The transformer layers, from the bottom up."""
        return self.model.encoder.layers

    @property
    def final_norm(self) -> nn.Module | None:
        """The normalisation behind the last layer."""
        return self.model.encoder.layer_norm if getattr(self.model.config, "do_stable_layer_norm", False) else None

    def top(self, num_layers: int) -> list[nn.Module]:
        """The top layers, and the normalisation behind them."""
        check_top(num_layers, len(self.transformer_layers))
        norm = [] if self.final_norm is None else [self.final_norm]
        return [*list(self.transformer_layers)[-num_layers:], *norm]

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (layers + 1, B, T, d), zero after an utterance's end, and lengths (B,).

        Raises:
            ValueError: an utterance is too short for one state, a length exceeds N, or the waveforms are no batch of floats.
        """
        lengths = lengths.cpu()
        self._check(waveforms, lengths)
        num_frames, total = self.features.num_frames(lengths), self.features.num_frames(waveforms.shape[1])
        if self.masks_padding or bool((lengths == waveforms.shape[1]).all()):
            states = self.encode(waveforms, lengths)
        else:
            alike = [(lengths == length).nonzero().flatten() for length in lengths.unique()]
            found = [self.encode(waveforms[rows.to(waveforms.device), : lengths[rows[0]]], lengths[rows]) for rows in alike]
            states = found[0].new_zeros(self.num_states, len(waveforms), total, self.state_dim)
            for rows, part in zip(alike, found, strict=True):
                states[:, rows.to(states.device), : part.shape[2]] = part
        valid = length_mask(num_frames, total, states.device)
        return states if valid is None else states.masked_fill(~valid[..., None], 0.0), num_frames

    def _check(self, waveforms: Tensor, lengths: Tensor) -> None:
        if waveforms.dim() != 2 or not waveforms.is_floating_point():
            raise ValueError(
                f"waveforms must be (batch, samples) of floats in [-1, 1], found {tuple(waveforms.shape)} {waveforms.dtype}"
            )
        shortest, needed = int(lengths.argmin()), self.features.num_samples(1)
        if int(lengths[shortest]) < needed:
            raise ValueError(
                f"item {shortest} of the batch has {int(lengths[shortest])} samples: one state needs {needed}, so leave out "
                f"recordings shorter than {needed / self.features.sample_rate:.4g} s"
            )
        if int(lengths.max()) > waveforms.shape[1]:
            raise ValueError(
                f"item {int(lengths.argmax())} of the batch has length {int(lengths.max())} but the waveforms have "
                f"{waveforms.shape[1]} samples: lengths count samples of the padded waveforms"
            )

    def _states(self, *, squeezed: bool = False, **inputs: Tensor | None) -> Tensor:
        """All hidden states of the model (layers + 1, B, T, d), the last one normalised."""
        output = self.model(**inputs, output_hidden_states=True)
        return torch.stack(output.hidden_states if squeezed else [*output.hidden_states[:-1], output.last_hidden_state])


class WaveformUpstream(HFUpstream):
    """Models over waveforms: wav2vec 2.0 and its kin.

    Where the feature extractor normalises, each utterance gets mean 0 and variance 1 over its own samples. Padding is masked
    for wav2vec 2.0, HuBERT, WavLM, UniSpeech and UniSpeech-SAT whose front end has a LayerNorm in each layer. It would leak
    through the GroupNorm over time of the others (wav2vec2-base, hubert-base: feat_extract_norm "group"), the stacked
    convolutions of data2vec-audio, the conformer's, the pooling of SEW and SEW-D, and a BatchNorm of positions; there,
    utterances of different lengths run one after the other. SEW's states come at the rate of its layers, 40 ms.
    """

    extractor = Wav2Vec2FeatureExtractor
    settings = ("sampling_rate", "do_normalize")
    MASKED = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")

    def __init__(self, model: Any, preprocessor: Mapping[str, Any]) -> None:
        super().__init__(model, preprocessor)
        self.normalize = preprocessor["do_normalize"]
        self.squeezed = hasattr(model.config, "squeeze_factor")
        if self.squeezed:
            model.encoder.upsample = nn.Identity()  # acts behind the states
        if model.config.model_type == "wav2vec2-conformer":
            model.encoder.pos_conv_embed = None  # transformers builds it and never calls it

    @staticmethod
    def _stages(config: Any, preprocessor: Mapping[str, Any]) -> tuple[tuple[int, int, int, int], ...]:
        squeeze = getattr(config, "squeeze_factor", 1)
        convolutions = [(kernel, stride, 0, 0) for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True)]
        return (*convolutions, *([(squeeze, squeeze, 0, 0)] if squeeze > 1 else []))

    @property
    def masks_padding(self) -> bool:
        """Whether padding can be masked."""
        config = self.model.config
        by_layer = getattr(config, "feat_extract_norm", None) == "layer"
        return config.model_type in self.MASKED and by_layer and not getattr(config, "conv_pos_batch_norm", False)

    @property
    def transformer_layers(self) -> nn.ModuleList:
        """The transformer layers, from the bottom up."""
        encoder = self.model.encoder
        return encoder.encoder.layer if self.model.config.model_type == "sew-d" else encoder.layers

    @property
    def final_norm(self) -> nn.Module | None:
        """The normalisation behind the last layer."""
        conformer = self.model.config.model_type == "wav2vec2-conformer"
        return self.model.encoder.layer_norm if conformer else super().final_norm

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """See `HFUpstream.encode`."""
        valid = length_mask(lengths, waveforms.shape[1], waveforms.device)
        if self.normalize:
            waveforms = _normalised(waveforms, valid)
        if valid is not None:
            waveforms = waveforms.masked_fill(~valid, 0.0)
        mask = None if valid is None else valid.long()
        return self._states(squeezed=self.squeezed, input_values=waveforms.to(self.model.dtype), attention_mask=mask)


class FbankUpstream(HFUpstream):
    """Wav2Vec2-BERT: Kaldi's filter bank of 16-bit samples, normalised by utterance, two frames to a state. Padding is masked."""

    extractor = SeamlessM4TFeatureExtractor
    settings = ("sampling_rate", "num_mel_bins", "stride")

    def __init__(self, model: Any, preprocessor: Mapping[str, Any]) -> None:
        super().__init__(model, preprocessor)
        rate, bins, stride = (preprocessor[name] for name in self.settings)
        self.fbank = KaldiFbank(num_mel_bins=bins, sample_rate=rate, stack=stride, delta_order=0, eps=1e-7**0.5)

    @staticmethod
    def _stages(config: Any, preprocessor: Mapping[str, Any]) -> tuple[tuple[int, int, int, int], ...]:
        rate, stride = preprocessor["sampling_rate"], preprocessor["stride"]
        return ((rate // 40, rate // 100, 0, 0), (stride, stride, 0, 0))  # 25 ms every 10 ms

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """See `HFUpstream.encode`."""
        tokens, num_tokens = self.fbank(waveforms * 2**15, lengths)
        valid = length_mask(num_tokens, tokens.shape[1], tokens.device)
        mask = None if valid is None else valid.long()
        return self._states(input_features=tokens.to(self.model.dtype), attention_mask=mask)


class WhisperUpstream(HFUpstream):
    """The encoder of Whisper, which always sees 30 s: log-mel of an utterance and zeros, a state every 20 ms.

    A longer utterance is cut into windows of 30 s, each encoded by itself; the states of all stand one after the other. The
    states of the zeros are dropped, so that padding to the batch's length changes nothing.
    """

    extractor = WhisperFeatureExtractor
    settings = ("sampling_rate", "feature_size", "n_fft", "hop_length")

    def __init__(self, model: Any, preprocessor: Mapping[str, Any]) -> None:
        super().__init__(model, preprocessor)
        self.n_fft = preprocessor["n_fft"]
        self.mel_hop = preprocessor["hop_length"]
        filters = torch.from_numpy(WhisperFeatureExtractor(**preprocessor).mel_filters).float()
        self.filters: Tensor
        self.window: Tensor
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)  # n_mels, n_fft / 2 + 1
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    @staticmethod
    def build(config: Any) -> Any:
        """The encoder without the decoder."""
        return WhisperEncoder(config)

    @staticmethod
    def encoder_of(model: Any) -> Any:
        """The encoder without the decoder."""
        return model.encoder

    @staticmethod
    def _stages(config: Any, preprocessor: Mapping[str, Any]) -> tuple[tuple[int, int, int, int], ...]:
        window, hop = preprocessor["n_fft"], preprocessor["hop_length"]
        half = window // 2  # the spectrogram's first frame is centred on sample 0, and its last frame is dropped
        return ((window, hop, half, window - half - hop), (3, 1, 1, 1), (3, 2, 1, 1))

    @property
    def transformer_layers(self) -> nn.ModuleList:
        """The transformer layers, from the bottom up."""
        return self.model.layers

    @property
    def final_norm(self) -> nn.Module:
        """The normalisation behind the last layer."""
        return self.model.layer_norm

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """See `HFUpstream.encode`."""
        num_states = self.model.config.max_source_positions
        size = num_states * self.features.hop_length
        valid = length_mask(lengths, waveforms.shape[1], waveforms.device)
        if valid is not None:
            waveforms = waveforms.masked_fill(~valid, 0.0)
        windows = nn.functional.pad(waveforms, (0, -waveforms.shape[1] % size)).unflatten(1, (-1, size))  # B, W, size
        # A window that begins behind an utterance's last state holds nothing of it.
        used = torch.arange(windows.shape[1]) * num_states < self.features.num_frames(lengths)[:, None]
        used = used.to(windows.device)
        found = self._states(input_features=self._log_mel(windows[used]).to(self.model.dtype))
        states = found.new_zeros(len(found), *used.shape, num_states, self.state_dim)
        states[:, used] = found
        return states.flatten(2, 3)[:, :, : self.features.num_frames(waveforms.shape[1])]

    @torch.no_grad()
    def _log_mel(self, windows: Tensor) -> Tensor:
        """Whisper's log-mel spectrogram, of at most 8 powers of ten below its maximum: (W, size) → (W, n_mels, frames)."""
        with torch.autocast(windows.device.type, enabled=False):
            spectrum = torch.stft(windows.float(), self.n_fft, self.mel_hop, window=self.window.float(), return_complex=True)
            mel = (self.filters.float() @ spectrum[..., :-1].abs().square()).clamp(min=1e-10).log10()
            return (mel.maximum(mel.amax((1, 2), keepdim=True) - 8) + 4) / 4


FAMILIES: dict[str, type[HFUpstream]] = {
    "wav2vec2": WaveformUpstream,
    "hubert": WaveformUpstream,
    "wavlm": WaveformUpstream,
    "data2vec-audio": WaveformUpstream,
    "unispeech": WaveformUpstream,
    "unispeech-sat": WaveformUpstream,
    "wav2vec2-conformer": WaveformUpstream,
    "sew": WaveformUpstream,
    "sew-d": WaveformUpstream,
    "wav2vec2-bert": FbankUpstream,
    "whisper": WhisperUpstream,
}
"""Supported models by model type; audiot's own come beside them."""


def hf(path: str, revision: str | None = None) -> Upstream:
    """An audio encoder of Hugging Face transformers: one of `FAMILIES`, or one that ``audiot export-hf`` wrote.

    Also models whose self-attention `audiot.interop.hf_attention.replace_self_attention` replaced. No code of the model's own
    is run, and weights are read from safetensors where there are such.

    Args:
        path: Folder that ``save_pretrained`` wrote, with the feature extractor's ``preprocessor_config.json``, or the name of a
            model on the hub.
        revision: Branch, tag or commit on the hub; None: its main branch.

    Returns:
        The encoder, in float32 and evaluation mode; an audiot encoder as upstream=checkpoint gives it.

    Raises:
        FileNotFoundError: there is no such folder or model.
        ValueError: the model is of another kind or gives no frames, or its weights are incomplete.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    with _named_errors(path), quiet():
        config = AutoConfig.from_pretrained(path, **where)
        if config.model_type == "audiot":
            encoder = AudiotModel.from_pretrained(path, revision=revision or "main", dtype=torch.float32).encoder
            return EncoderUpstream(encoder).eval()
        family = _family(config)
        saved = [(Path(path) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")]
        if Path(path).is_dir() and not any(saved):
            raise ValueError("preprocessor_config.json is missing: call save_pretrained of the model's feature extractor, too")
        extractor = AutoFeatureExtractor.from_pretrained(path, **where)
        if not isinstance(extractor, family.extractor):
            raise ValueError(
                f"its feature extractor is a {type(extractor).__name__}, but {family.extractor.__name__} was expected"
            )
        model = family.encoder_of(_load(path, config, where))
    return family(model, {name: getattr(extractor, name) for name in family.settings}).eval()


def untrained_model(model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> HFUpstream:
    """A model with random weights, of the configs of a model and of its feature extractor; needs no network."""
    hf_config = AutoConfig.for_model(**model)
    replacements = hf_config.__dict__.pop(RECORD, [])  # the model gets it again below
    family = FAMILIES[hf_config.model_type]
    built = family.build(hf_config)
    for replacement in replacements:
        options = {"layers": replacement["layers"], "max_frames": replacement["max_frames"]}
        replace_self_attention(built, replacement["name"], **options, **replacement["parameters"])
    return family(built, preprocessor)


def _family(config: PreTrainedConfig) -> type[HFUpstream]:
    """The class for a config.

    Raises:
        ValueError: there is none.
    """
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    model_class = transformers.MODEL_MAPPING.get(type(config), None)
    takes = getattr(model_class, "main_input_name", "input_values")
    if kind in NO_FRAMES:
        reason = NO_FRAMES[kind]
    elif takes in ("input_ids", "pixel_values"):
        reason = f"it takes {takes}, not audio"
    else:
        reason = "how it cuts audio into frames is not known here"
    raise ValueError(
        f"a model of type {kind} is no upstream, {reason}: choose {', '.join(FAMILIES)}, or what audiot export-hf wrote"
    )


def _load(path: str, config: PreTrainedConfig, where: Mapping[str, Any]) -> Any:
    """The whole model with its weights."""
    if hasattr(config, RECORD):
        model_class: Any = transformers.MODEL_MAPPING[type(config)]
        return load(path, model_class=model_class, dtype=torch.float32, revision=where["revision"])
    loaded: Any = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **where)
    model, report = loaded
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(UNUSED))
    if missing:
        raise ValueError(
            f"{len(missing)} weights are missing ({', '.join(missing[:3])}, …): it is no whole {config.model_type} model"
        )
    return model


UNUSED = ("masked_spec_embed", "adapter.", "intermediate_ffn.")
"""Weights of a model that its hidden states don't depend on."""


def _strip(model: Any) -> None:
    """Switch off what acts in training mode beside dropout, and drop what no hidden state depends on."""
    for name in ("mask_time_prob", "mask_feature_prob", "layerdrop", "encoder_layerdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    for name in ("add_adapter", "use_intermediate_ffn_before_adapter"):
        if hasattr(model.config, name):
            setattr(model.config, name, False)
    for name in ("adapter", "intermediate_ffn"):
        if hasattr(model, name):
            setattr(model, name, None)
    if hasattr(model, "masked_spec_embed"):
        del model.masked_spec_embed
    model.layerdrop = 0.0  # Whisper's encoder keeps its own


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as a plain dict, without the place that it came from."""
    return {name: value for name, value in config.to_dict().items() if name[0] != "_" and name != "transformers_version"}


def _normalised(waveforms: Tensor, valid: Tensor | None) -> Tensor:
    """Mean 0 and variance 1 over each utterance's own samples, in float32, as Wav2Vec2FeatureExtractor has it."""
    waveforms = waveforms.float()
    weight = torch.ones_like(waveforms) if valid is None else valid.float()
    count = weight.sum(1, keepdim=True)
    centred = (waveforms - (waveforms * weight).sum(1, keepdim=True) / count) * weight
    return centred / (centred.square().sum(1, keepdim=True) / count + 1e-7).sqrt()


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Errors of transformers in one line that names the model."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"upstream.path={path} is a file: give the folder that save_pretrained wrote")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"upstream.path={path} has no config.json: give the folder that save_pretrained wrote")
    elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"no folder at upstream.path={path}: give one that save_pretrained wrote, or a name on the hub")
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"upstream.path={path}: its pytorch_model.bin holds more than tensors, which is not run: convert it to safetensors"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"upstream.path={path}: its weights are truncated or not safetensors ({error}): get them again"
        ) from error
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(
            f"upstream.path={path}: its weights do not fit its config.json ({words}): get both from one place"
        ) from error
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())
        if "trust_remote_code" in words:
            words = "the model brings code of its own, which is not run: choose one that transformers has built in"
        if folder.is_dir() or not isinstance(error, OSError):
            raise ValueError(f"upstream.path={path}: {words}") from error
        raise FileNotFoundError(
            f"upstream.path={path}: no such folder here, and none from the hub ({words[:200]}): check the name and the network"
        ) from error
