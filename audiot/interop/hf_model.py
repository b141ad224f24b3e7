"""audiot's encoders as models of Hugging Face transformers.

Importing this module registers `AudiotConfig`, `AudiotModel` and `AudiotFeatureExtractor` with the Auto classes, under the model
type "audiot". Then `AutoModel.from_pretrained` loads what ``audiot export-hf`` or `save_pretrained` wrote, without remote code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from audiot.base.parts import named
from audiot.checkpoint import AudioEncoder, part_of
from audiot.model import length_mask

try:
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedConfig, PreTrainedModel
    from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
    from transformers.feature_extraction_utils import BatchFeature
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.utils import logging

    from audiot.interop.hf_attention import _plain_tensors  # also checks the version of transformers
except ImportError as error:
    message = "audiot.interop.hf_model needs transformers 5.16 or newer: pip install 'audiot[hf]'"
    raise ImportError(message, name=error.name) from error

log = logging.get_logger(__name__)


class AudiotConfig(PreTrainedConfig):
    """Config of an `AudiotModel`.

    Args:
        features: Config of the front end (``_target_`` and its parameters), a plain dict.
        model: Config of the encoder (``_target_`` and its parameters), a plain dict.
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
        """Number of layers. `AudiotModel` gives one hidden state more."""
        return (self.model or {}).get("num_layers")

    @property
    def num_attention_heads(self) -> int | None:
        """Number of heads in each layer."""
        return (self.model or {}).get("num_heads")


class AudiotModel(PreTrainedModel):
    """An audiot encoder with its front end, from waveforms to hidden states.

    Loading builds only modules of the packages in `trusted`. For your own mechanisms, add your package there before
    `from_pretrained`. Features stay in float32 in a half-precision model.

    Args:
        config: Config of the model. Weights are initialised as in audiot.

    Raises:
        ValueError: the config lacks features or model, or names code from other packages.
    """

    config_class = AudiotConfig
    base_model_prefix = "audiot"
    main_input_name = "input_values"
    input_modalities = "audio"

    trusted: ClassVar[tuple[str, ...]] = ()
    """Packages from outside audiot whose classes a config may name."""

    config: AudiotConfig

    def __init__(self, config: AudiotConfig) -> None:
        super().__init__(config)
        if not config.features or not config.model:
            raise ValueError("the config of an audiot model needs `features` and `model`: load one that audiot wrote")
        where: Any = config.name_or_path or "the config"
        parts = {name: part_of(getattr(config, name), where, self.trusted, name) for name in ("features", "model")}
        with _plain_tensors():
            self.encoder = AudioEncoder(**parts)
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
        model = cls(AudiotConfig(**named(encoder.config)))
        model.encoder.load_state_dict(encoder.state_dict())
        return model.train(encoder.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for modules with tensors that a checkpoint has not filled.

        Raises:
            ValueError: they are weights of the encoder, which transformers would initialise randomly.
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
        """Number of hidden states for a number of samples. The name is that of transformers."""
        return self.encoder.features.num_tokens(input_lengths)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode waveforms. The states of a waveform do not depend on the batch.

        Args:
            input_values: Samples (B, N) in [-1, 1] at the front end's sample rate, not normalised.
            attention_mask: Mask (B, N), 1 for real samples and 0 for padding at the end; None if nothing is padded.
            output_hidden_states: Whether to return all hidden states; None follows the config.
            output_attentions: Whether to return attention weights, computed separately in the mechanism's plain dense form and
                before dropout; None follows the config. A mechanism without weights gives none, and a warning says so.
            return_dict: Whether to return a model output; False returns a tuple.

        Returns:
            `last_hidden_state` (B, T, d), zero on padding; `hidden_states`, layers + 1 of them; `attentions`
            (B, H, T, T) of each layer, None if the mechanism has no weights.

        Raises:
            ValueError: the mask has zeros before ones, or an utterance is too short for one state.
        """
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attend = self.config.output_attentions if output_attentions is None else output_attentions
        if attend and not self.encoder.encoder.has_weights:
            lacking = next(each for each in self.encoder.encoder.mechanisms if not each.has_weights)
            log.warning_once(f"{type(lacking).__name__} has no attention weights: output_attentions gives none")
            attend = False
        lengths = _lengths(input_values, attention_mask)
        tokens, num_tokens = self.encoder.features(input_values, lengths)
        tokens = tokens.to(self.encoder.encoder.input.weight.dtype)
        valid = length_mask(num_tokens, tokens.shape[1], tokens.device)
        tokens = self.encoder.features.embed(tokens, valid)
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
    """Pads waveforms to a batch. The features themselves are computed inside `AudiotModel`.

    Args:
        feature_size: Size of a sample, always 1.
        sampling_rate: Sample rate in Hz.
        padding_value: Value of the padding at the end.
        kwargs: Further arguments of `SequenceFeatureExtractor`.
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
            sampling_rate: Sample rate of the waveforms in Hz, checked against the model's. Without it, a warning says that it is
                unchecked.
            padding: Padding mode of `SequenceFeatureExtractor.pad`; True pads to the longest waveform.
            max_length: Length in samples to pad or truncate to, as in `SequenceFeatureExtractor.pad`.
            truncation: Whether to cut longer waveforms, as in `SequenceFeatureExtractor.pad`.
            pad_to_multiple_of: Divisor of the padded length, as in `SequenceFeatureExtractor.pad`.
            return_attention_mask: Whether to return the mask, as in `SequenceFeatureExtractor.pad`.
            return_tensors: Type of the result, ``"pt"`` or ``"np"``.

        Returns:
            `input_values` (B, N) in float32 and `attention_mask` (B, N).

        Raises:
            ValueError: the sample rate differs, or a waveform has several channels or integers.
        """
        if sampling_rate is None:
            log.warning_once(f"no sampling_rate was given: {self.sampling_rate} Hz is assumed")
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
    """Context without progress bars of transformers, and with only errors in its log."""
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
            f"attention_mask is {tuple(mask.shape)} but input_values are {tuple(waveforms.shape)}: give one value per sample"
        )
    lengths = mask.bool().sum(-1)
    if not torch.equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise ValueError("attention_mask has zeros before ones, but audiot's models need padding at the end: pad on the right")
    return lengths.cpu()


def _as_waveforms(raw: Any) -> list[np.ndarray]:
    """Float32 waveforms (N,), from one waveform or several of any type."""
    several = np.ndim(raw[0]) > 0 if isinstance(raw, (list, tuple)) and len(raw) else np.ndim(raw) > 1
    waveforms = [np.asarray(waveform) for waveform in (raw if several else [raw])]
    for number, waveform in enumerate(waveforms):
        if waveform.ndim != 1:
            raise ValueError(f"waveform {number} must have the shape (samples,), found {waveform.shape}: mix its channels to one")
        if not np.issubdtype(waveform.dtype, np.floating):
            raise ValueError(f"waveform {number} must be floats in [-1, 1], found {waveform.dtype}: divide by its full scale")
    return [waveform.astype(np.float32, copy=False) for waveform in waveforms]


AutoConfig.register("audiot", AudiotConfig, exist_ok=True)
AutoModel.register(AudiotConfig, AudiotModel, exist_ok=True)
AutoFeatureExtractor.register(AudiotConfig, feature_extractor_class=AudiotFeatureExtractor, exist_ok=True)
