"""Audio encoders of Hugging Face transformers as upstreams for downstream tasks."""

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

from audiot.base.former import translate_record
from audiot.base.framing import Count, num_frames
from audiot.base.tracing import is_recording
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
    "clap": "it makes one embedding per clip, from windows over time and frequency",
    "clap_audio_model": "it makes one embedding per clip, from windows over time and frequency",
}
"""Audio models without one state per frame, by model type, with the reason."""


class Frames:
    """How a model divides audio into frames: a chain of stages that each reduce the rate.

    Args:
        sample_rate: Sample rate in Hz.
        stages: (window, stride, padding before, padding after) of each stage, in units of its input. The first input is samples.
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
        """Fewest samples that give a number of hidden states."""
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
    """Hidden states of an audio encoder of transformers (see `hf`).

    The states of an utterance do not depend on the batch. If padding reaches real frames in spite of the mask, utterances of
    different lengths are encoded separately. SpecAugment and LayerDrop, which act in training mode, and adapters behind the last
    layer are off. The last state is the model's output, after its final normalisation if it has one.

    Args:
        model: Encoder of transformers.
        preprocessor: Settings of the model's feature extractor that the front end needs, see `settings`.
    """

    extractor: ClassVar[type]
    """Class of the feature extractor."""
    settings: ClassVar[tuple[str, ...]]
    """Names of its settings that are used here."""

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
        """The encoder for a config, with random weights."""
        return AutoModel.from_config(config)

    @staticmethod
    def encoder_of(model: Any) -> Any:
        """The encoder inside the model that AutoModel loads."""
        return model

    @staticmethod
    @abstractmethod
    def _stages(config: Any, preprocessor: Mapping[str, Any]) -> tuple[tuple[int, int, int, int], ...]:
        """Stages of `Frames`."""

    @property
    def masks_padding(self) -> bool:
        """Whether `encode` gives an utterance the same states in a padded batch as alone."""
        return True

    @abstractmethod
    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states (layers + 1, B, T, d). States on padding may have any value.

        Args:
            waveforms: Samples (B, N).
            lengths: Samples of each utterance (B,), on the CPU; all equal to N unless `masks_padding`.
        """

    @property
    def transformer_layers(self) -> nn.ModuleList:
        """The transformer layers, from the bottom up."""
        return self.model.encoder.layers

    @property
    def final_norm(self) -> nn.Module | None:
        """The final normalisation after the last layer."""
        return self.model.encoder.layer_norm if getattr(self.model.config, "do_stable_layer_norm", False) else None

    def top(self, num_layers: int) -> list[nn.Module]:
        """The top layers and the final normalisation."""
        check_top(num_layers, len(self.transformer_layers))
        norm = [] if self.final_norm is None else [self.final_norm]
        return [*list(self.transformer_layers)[-num_layers:], *norm]

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (layers + 1, B, T, d), zero on padding, and lengths (B,).

        Raises:
            ValueError: an utterance is too short for one state, a length exceeds N, or the waveforms have a wrong shape or type;
                or a graph is recorded.
        """
        if is_recording():
            model = type(self.model).__name__
            reason = f"{model} of transformers asks for lengths while it computes, which a graph can't"
            raise ValueError(f"{reason}; audiot predict and audiot serve use the model as it is")
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
        """All hidden states of the model (layers + 1, B, T, d). The last one is normalised."""
        output = self.model(**inputs, output_hidden_states=True)
        return torch.stack(output.hidden_states if squeezed else [*output.hidden_states[:-1], output.last_hidden_state])


class WaveformUpstream(HFUpstream):
    """Models on waveforms: wav2vec 2.0 and similar ones.

    If the feature extractor normalises, each utterance gets mean 0 and variance 1 over its own samples. Padding is masked for
    wav2vec 2.0, HuBERT, WavLM, UniSpeech and UniSpeech-SAT if their front end has a LayerNorm in each layer. In other models
    padding would leak: through the GroupNorm over time (wav2vec2-base, hubert-base: feat_extract_norm "group"), the stacked
    convolutions of data2vec-audio and the conformer, the pooling of SEW and SEW-D, or a BatchNorm of positions. There,
    utterances of different lengths run one after the other. The states of SEW have the rate of its layers, one per 40 ms.
    """

    extractor = Wav2Vec2FeatureExtractor
    settings = ("sampling_rate", "do_normalize")
    MASKED = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")

    def __init__(self, model: Any, preprocessor: Mapping[str, Any]) -> None:
        super().__init__(model, preprocessor)
        self.normalize = preprocessor["do_normalize"]
        self.squeezed = hasattr(model.config, "squeeze_factor")
        if self.squeezed:
            model.encoder.upsample = nn.Identity()  # acts after the states
        if model.config.model_type == "wav2vec2-conformer":
            model.encoder.pos_conv_embed = None  # transformers never calls it

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
        """The final normalisation after the last layer."""
        conformer = self.model.config.model_type == "wav2vec2-conformer"
        return self.model.encoder.layer_norm if conformer else super().final_norm

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Implements `HFUpstream.encode`."""
        valid = length_mask(lengths, waveforms.shape[1], waveforms.device)
        if self.normalize:
            waveforms = _normalised(waveforms, valid)
        if valid is not None:
            waveforms = waveforms.masked_fill(~valid, 0.0)
        mask = None if valid is None else valid.long()
        return self._states(squeezed=self.squeezed, input_values=waveforms.to(self.model.dtype), attention_mask=mask)


class FbankUpstream(HFUpstream):
    """Wav2Vec2-BERT: Kaldi's filter bank of 16-bit samples, normalised per utterance, two frames per state, padding masked."""

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
        """Implements `HFUpstream.encode`."""
        tokens, num_tokens = self.fbank(waveforms * 2**15, lengths)
        valid = length_mask(num_tokens, tokens.shape[1], tokens.device)
        mask = None if valid is None else valid.long()
        return self._states(input_features=tokens.to(self.model.dtype), attention_mask=mask)


class WhisperUpstream(HFUpstream):
    """Whisper's encoder, which always encodes 30 s: the log-mel of an utterance and zeros, with one state per 20 ms.

    A longer utterance is cut into windows of 30 s. Each is encoded separately and their states are joined. States of the zeros
    are dropped, so padding in the batch changes nothing.
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
        """The final normalisation after the last layer."""
        return self.model.layer_norm

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Implements `HFUpstream.encode`."""
        num_states = self.model.config.max_source_positions
        size = num_states * self.features.hop_length
        valid = length_mask(lengths, waveforms.shape[1], waveforms.device)
        if valid is not None:
            waveforms = waveforms.masked_fill(~valid, 0.0)
        windows = nn.functional.pad(waveforms, (0, -waveforms.shape[1] % size)).unflatten(1, (-1, size))  # B, W, size
        # A window that begins after an utterance's last state holds nothing of it.
        used = torch.arange(windows.shape[1]) * num_states < self.features.num_frames(lengths)[:, None]
        used = used.to(windows.device)
        found = self._states(input_features=self._log_mel(windows[used]).to(self.model.dtype))
        states = found.new_zeros(len(found), *used.shape, num_states, self.state_dim)
        states[:, used] = found
        return states.flatten(2, 3)[:, :, : self.features.num_frames(waveforms.shape[1])]

    @torch.no_grad()
    def _log_mel(self, windows: Tensor) -> Tensor:
        """Whisper's log-mel spectrogram, at most 8 powers of ten below its maximum: (W, size) → (W, n_mels, frames)."""
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
"""Supported models by model type, besides audiot's own."""


def hf(path: str, revision: str | None = None) -> Upstream:
    """Load an audio encoder of Hugging Face transformers: one of `FAMILIES`, or one that ``audiot export-hf`` wrote.

    Models after `audiot.interop.hf_attention.replace_self_attention` work too. The model's own code is never run. Weights are
    read from safetensors if there are such files.

    Args:
        path: Folder that ``save_pretrained`` wrote, with the feature extractor's ``preprocessor_config.json``, or the name of a
            model on the hub.
        revision: Branch, tag or commit on the hub; None means its main branch.

    Returns:
        The encoder in float32 and evaluation mode. For an audiot encoder, the same as from upstream=checkpoint.

    Raises:
        FileNotFoundError: the folder or model does not exist.
        ValueError: the model is of another kind or gives no frames, or weights are missing.
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
            raise ValueError("preprocessor_config.json is missing: also call save_pretrained of the model's feature extractor")
        extractor = AutoFeatureExtractor.from_pretrained(path, **where)
        if not isinstance(extractor, family.extractor):
            raise ValueError(f"its feature extractor must be a {family.extractor.__name__}, found {type(extractor).__name__}")
        model = family.encoder_of(_load(path, config, where))
    return family(model, {name: getattr(extractor, name) for name in family.settings}).eval()


CODE = ("attn_implementation", "auto_map", "quantization_config", "trust_remote_code")  # keys that can name code to fetch


def untrained_model(model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> HFUpstream:
    """A model with random weights, of the configs of a model and of its feature extractor; needs no network."""
    hf_config = AutoConfig.for_model(**{name: value for name, value in model.items() if name not in CODE})
    replacements = hf_config.__dict__.pop(RECORD, [])  # the model gets it again below
    family = FAMILIES[hf_config.model_type]
    built = family.build(hf_config)
    for replacement in replacements:
        options = {"layers": replacement["layers"], "max_frames": replacement["max_frames"]}
        name, parameters = translate_record(replacement["name"], replacement["parameters"])
        replace_self_attention(built, name, **options, **parameters)
    return family(built, preprocessor)


def _family(config: PreTrainedConfig) -> type[HFUpstream]:
    """The upstream class for a config.

    Raises:
        ValueError: there is no such class.
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
        reason = "its division of audio into frames is not known here"
    raise ValueError(
        f"a model of type {kind} can't be an upstream, {reason}: choose {', '.join(FAMILIES)}, or what audiot export-hf wrote"
    )


def _load(path: str, config: PreTrainedConfig, where: Mapping[str, Any]) -> Any:
    """The complete model with its weights."""
    if hasattr(config, RECORD):
        model_class: Any = transformers.MODEL_MAPPING[type(config)]
        return load(path, model_class=model_class, dtype=torch.float32, revision=where["revision"])
    loaded: Any = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **where)
    model, report = loaded
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(UNUSED))
    if missing:
        raise ValueError(
            f"{len(missing)} weights are missing ({', '.join(missing[:3])}, …): it is not a complete {config.model_type} model"
        )
    return model


UNUSED = ("masked_spec_embed", "adapter.", "intermediate_ffn.")
"""Weights that the hidden states of a model do not depend on."""


def _strip(model: Any) -> None:
    """Switch off what acts in training mode besides dropout, and delete what no hidden state depends on."""
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
    model.layerdrop = 0.0  # Whisper's encoder has its own copy


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as a plain dict, without the place that it came from."""
    return {name: value for name, value in config.to_dict().items() if name[0] != "_" and name != "transformers_version"}


def _normalised(waveforms: Tensor, valid: Tensor | None) -> Tensor:
    """Mean 0 and variance 1 over each utterance's own samples, in float32, as in Wav2Vec2FeatureExtractor."""
    waveforms = waveforms.float()
    weight = torch.ones_like(waveforms) if valid is None else valid.float()
    count = weight.sum(1, keepdim=True)
    centred = (waveforms - (waveforms * weight).sum(1, keepdim=True) / count) * weight
    return centred / (centred.square().sum(1, keepdim=True) / count + 1e-7).sqrt()


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Turn errors of transformers into one line with the name of the model."""
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
            f"upstream.path={path}: its pytorch_model.bin holds more than tensors and was not loaded: convert it to safetensors"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"upstream.path={path}: its weights are truncated or not safetensors ({error}): download them again"
        ) from error
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(
            f"upstream.path={path}: its weights do not match its config.json ({words}): get both from one source"
        ) from error
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())
        if "trust_remote_code" in words:
            words = "the model has its own code, which is not run: choose a model that transformers contains"
        if folder.is_dir() or not isinstance(error, OSError):
            raise ValueError(f"upstream.path={path}: {words}") from error
        raise FileNotFoundError(
            f"upstream.path={path}: no such folder here, and none on the hub ({words[:200]}): check the name and the network"
        ) from error
