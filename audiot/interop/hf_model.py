"""audiot's encoders as models of Hugging Face transformers.

Importing this module registers `AudiotConfig`, `AudiotModel` and `AudiotFeatureExtractor` with the Auto classes, under the model
type "audiot": `AutoModel.from_pretrained` then loads what ``audiot export-hf`` or `save_pretrained` wrote, without remote code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from audiot.checkpoint import AudioEncoder, check_targets
from audiot.model import length_mask

try:
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedConfig, PreTrainedModel
    from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
    from transformers.feature_extraction_utils import BatchFeature
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.utils import logging

    from audiot.interop.hf_attention import _plain_tensors  # checks the version of transformers, too
except ImportError as error:
    message = "audiot.interop.hf_model needs transformers 5.16 or newer: pip install 'audiot[hf]'"
    raise ImportError(message, name=error.name) from error

log = logging.get_logger(__name__)


class AudiotConfig(PreTrainedConfig):
    """Config of an `AudiotModel`.

    Args:
        features: Config of the front end (``_target_`` and its parameters), a plain dict.
        model: Config of the encoder, likewise.
    """

    model_type = "audiot"

    features: dict[str, Any] | None = None
    model: dict[str, Any] | None = None

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden states."""
        return (self.model or {}).get("embed_dim")

    @property
    def num_hidden_layers(self) -> int | None:
        """Layers; `AudiotModel` gives one hidden state more."""
        return (self.model or {}).get("num_layers")

    @property
    def num_attention_heads(self) -> int | None:
        """Heads of each layer."""
        return (self.model or {}).get("num_heads")


class AudiotModel(PreTrainedModel):
    """An audiot encoder, with its front end: waveforms → hidden states.

    Loading builds nothing but modules of the packages in `trusted`: add your own there for your own mechanisms, before
    `from_pretrained`. The features stay in float32 in a model of half precision.

    Args:
        config: What to build; the weights are drawn as audiot draws them.

    Raises:
        ValueError: the config lacks features or model, or names code of other packages.
    """

    config_class = AudiotConfig
    base_model_prefix = "audiot"
    main_input_name = "input_values"
    input_modalities = "audio"

    trusted: ClassVar[tuple[str, ...]] = ("audiot",)
    """Packages whose classes a config may name."""

    config: AudiotConfig

    def __init__(self, config: AudiotConfig) -> None:
        super().__init__(config)
        if not config.features or not config.model:
            raise ValueError("the config of an audiot model needs `features` and `model`: load one that audiot wrote")
        where: Any = config.name_or_path or "the config"
        check_targets({"features": config.features, "model": config.model}, self.trusted, where)
        with _plain_tensors():
            self.encoder = AudioEncoder(config.features, config.model)
        self.encoder.to(torch.get_default_dtype())  # the one that from_pretrained was asked for
        self._is_loading = torch.empty(0).is_meta  # by from_pretrained, on whose meta device nothing has values
        # It empties the buffers that are no part of the weights (windows, filters, slopes, …) and calls _init_weights.
        self._constants: dict[nn.Module, dict[str, Tensor]] = {}
        for module in self.encoder.modules():
            saved = module.state_dict()
            own = {name: value.clone() for name, value in module.named_buffers(recurse=False) if name not in saved}
            self._constants[module] = own
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: AudioEncoder) -> AudiotModel:
        """A model with a copy of the encoder's weights, in evaluation mode as far as the encoder is."""
        model = cls(AudiotConfig(features=encoder.config["features"], model=encoder.config["model"]))
        model.encoder.load_state_dict(encoder.state_dict())
        return model.train(encoder.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for modules with tensors that no checkpoint has filled.

        Raises:
            ValueError: these are weights of the encoder, which transformers alone would draw anew.
        """
        if module not in self._constants:
            super()._init_weights(module)
            return
        if self._is_loading:
            tensors = self.encoder.state_dict(keep_vars=True)
            missing = sorted(name for name, value in tensors.items() if not getattr(value, "_is_hf_initialized", False))
            if missing:
                named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
                where = self.config.name_or_path or "the checkpoint"
                raise ValueError(f"{where} lacks {len(missing)} weights of the audiot encoder ({named}): export it again")
        for name, value in self._constants[module].items():
            module.get_buffer(name).copy_(value)

    def _get_feat_extract_output_lengths(self, input_lengths: Any) -> Any:
        """Hidden states of so many samples; the name that the models of transformers give it."""
        return self.encoder.features.num_tokens(input_lengths)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode waveforms. A waveform gives the same states alone and in a batch.

        Args:
            input_values: (B, N) in [-1, 1] at the front end's sample rate, not normalised.
            attention_mask: (B, N), 1 for real samples and 0 behind them; None: nothing is padded.
            output_hidden_states: Give all hidden states; None: as the config says.
            output_attentions: Give attention weights, computed beside the output by the mechanism's plain dense form, before
                dropout; None: as the config says. A mechanism without weights gives none, as a warning says.
            return_dict: False: a tuple.

        Returns:
            `last_hidden_state` (B, T, d), zero behind an utterance's end; `hidden_states`, layers + 1 of them; `attentions`
            (B, H, T, T) of each layer, None where the mechanism has no weights.

        Raises:
            ValueError: the mask has zeros before ones, or an utterance is too short for one state.
        """
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attend = self.config.output_attentions if output_attentions is None else output_attentions
        if attend and not self.encoder.encoder.has_weights:
            kind = type(self.encoder.encoder.layer(0).attention.mechanism).__name__
            log.warning_once(f"{kind} has no attention weights: output_attentions gives none")
            attend = False
        lengths = _lengths(input_values, attention_mask)
        tokens, num_tokens = self.encoder.features(input_values, lengths)
        tokens = tokens.to(self.encoder.encoder.input.weight.dtype)
        valid = length_mask(num_tokens, tokens.shape[1], tokens.device)
        hidden = self.encoder.encoder(tokens, valid)
        if valid is not None:
            hidden = [state * valid[..., None] for state in hidden]
        output = BaseModelOutput(
            last_hidden_state=hidden[-1],
            hidden_states=tuple(hidden) if states else None,
            attentions=tuple(self.encoder.encoder.attention_weights(tokens, valid)) if attend else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class AudiotFeatureExtractor(SequenceFeatureExtractor):
    """Pads waveforms to a batch; the features proper are computed inside `AudiotModel`.

    Args:
        feature_size: 1: a sample is one number.
        sampling_rate: Of the waveforms, in Hz.
        padding_value: Behind the end of the shorter ones.
        kwargs: See `SequenceFeatureExtractor`.
    """

    model_input_names: ClassVar[list[str]] = ["input_values", "attention_mask"]

    def __init__(self, feature_size: int = 1, sampling_rate: int = 16000, padding_value: float = 0.0, **kwargs: Any) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)

    def __call__(
        self,
        raw_speech: Any,
        *,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Make a batch.

        Args:
            raw_speech: One mono waveform (N,) in [-1, 1] or several: arrays, tensors or lists of floats.
            sampling_rate: Of these, checked against the model's; without it nothing can be checked, as a warning says.
            padding: True pads to the longest; see `SequenceFeatureExtractor.pad`, as for the others.
            max_length: Likewise, in samples.
            truncation: Likewise.
            pad_to_multiple_of: Likewise.
            return_attention_mask: Likewise.
            return_tensors: ``"pt"`` or ``"np"``.

        Returns:
            `input_values` (B, N) in float32 and `attention_mask` (B, N).

        Raises:
            ValueError: another sample rate, several channels, or integers.
        """
        if sampling_rate is None:
            log.warning_once(f"no sampling_rate was given, so that {self.sampling_rate} Hz is taken on trust")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the waveforms are at {sampling_rate} Hz, but this model takes {self.sampling_rate} Hz: resample them first"
            )
        return self.pad(
            BatchFeature({"input_values": _as_waveforms(raw_speech)}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from transformers, and errors alone in its log."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _lengths(waveforms: Tensor, mask: Tensor | None) -> Tensor:
    """Samples of each utterance (B,), on the CPU, from a mask (B, N)."""
    if mask is None:
        return torch.full((len(waveforms),), waveforms.shape[-1])
    if mask.shape != waveforms.shape:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)} but input_values are {tuple(waveforms.shape)}: give one value a sample"
        )
    lengths = mask.bool().sum(-1)
    if not torch.equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise ValueError("attention_mask has zeros before ones, but audiot's models take padding at the end: pad on the right")
    return lengths.cpu()


def _as_waveforms(raw: Any) -> list[np.ndarray]:
    """Float32 waveforms (N,) from one or several of any kind."""
    several = np.ndim(raw[0]) > 0 if isinstance(raw, (list, tuple)) and len(raw) else np.ndim(raw) > 1
    waveforms = [np.asarray(waveform) for waveform in (raw if several else [raw])]
    for number, waveform in enumerate(waveforms):
        if waveform.ndim != 1:
            raise ValueError(f"waveform {number} is {waveform.shape}, but (samples,) was expected: mix its channels to one")
        if not np.issubdtype(waveform.dtype, np.floating):
            raise ValueError(
                f"waveform {number} is {waveform.dtype}, but floats in [-1, 1] were expected: divide by its full scale"
            )
    return [waveform.astype(np.float32, copy=False) for waveform in waveforms]


AutoConfig.register("audiot", AudiotConfig, exist_ok=True)
AutoModel.register(AudiotConfig, AudiotModel, exist_ok=True)
AutoFeatureExtractor.register(AudiotConfig, feature_extractor_class=AudiotFeatureExtractor, exist_ok=True)
