"""audiot's attention inside models of the transformers library.

    model = replace_self_attention(HubertModel.from_pretrained("facebook/hubert-base-ls960"), "synthesizer_random")
    model.save_pretrained("swapped")
    model = load("swapped")

Works with the encoders of BERT, RoBERTa, HuBERT, wav2vec 2.0, WavLM, Whisper, ViT and AST, and with everything that
transformers builds on them. Decoders and cross-attention stay as they are.

Only `load` reads such a model. The `from_pretrained` of transformers builds the model without the replacement, and only warns
about the weights that do not fit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from audiot.attention import after_step, build_mechanism, parameters
from audiot.attention.mechanism import AttentionMechanism
from audiot.base.former import translate_record
from audiot.positions import Positions

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer import ASTAttention
    from transformers.models.bert.modeling_bert import BertSelfAttention
    from transformers.models.hubert.modeling_hubert import HubertAttention
    from transformers.models.roberta.modeling_roberta import RobertaSelfAttention
    from transformers.models.vit.modeling_vit import ViTAttention
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention
    from transformers.models.whisper.modeling_whisper import WhisperAttention
    from transformers.trainer_callback import TrainerCallback
    from transformers.utils.versions import require_version

    require_version("transformers>=5.16")  # older releases have other interfaces between layers
except ImportError as error:
    message = "audiot.interop.hf_attention needs transformers 5.16 or newer: pip install 'audiot[hf]'"
    raise ImportError(message, name=error.name) from error

SUPPORTED = "the encoders of BERT, RoBERTa, HuBERT, wav2vec 2.0, WavLM, Whisper, ViT and AST"
RECORD = "audiot_attention"
"""Key of the replacement's record in a model's config. `save_pretrained` writes it without further code."""
DEFAULT_MAX_FRAMES = 1500
"""For models without a limit: 30 s of the 20 ms frames of HuBERT, wav2vec 2.0 and WavLM, as much as Whisper takes."""


def replace_self_attention(
    model: PreTrainedModel,
    name: str,
    layers: Iterable[int] | None = None,
    reuse_weights: bool = True,
    max_frames: int | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """Replace the self-attention of a model's encoder by a mechanism of audiot, in place.

    The model keeps its own positions; rotary positions and biases are not added. The new layers keep the value and output
    projections, and those of the query and key projections that the mechanism uses. Parameters that only the mechanism has
    start untrained. Call `audiot.attention.after_step` after each step of the optimiser (`AfterStep` does so in a `Trainer`).
    Build the optimiser with `audiot.training.optimization.parameter_groups`, because some parameters must not decay.

    Padding masks: a model with "sdpa", the default of transformers, is switched to "audiot", whose masks are (B, T). Masks of
    "sdpa" and "eager" are (B, 1, T, T). They work too, but every layer must check them.

    Attention weights: with `output_attentions=True`, the layers also compute the mechanism's plain dense weights before
    dropout. In WavLM they are per head, where the original averages. Layers that keep their attention return none unless the
    model is set to "eager". A mechanism without weights never returns any; the output's `attentions` then lack these layers.

    Args:
        model: Model with a supported encoder.
        name: Mechanism, one of `audiot.attention.names()`. WavLM accepts only query_key and shared_query_key, because its gated
            position bias is added to the scores between all frames.
        layers: Indices of encoder layers. Negative ones count from the last. None means all.
        reuse_weights: Whether to keep the weights of the projections. Otherwise they are initialised as in the model.
        max_frames: Longest supported sequence, with special tokens. None takes the model's limit, or `DEFAULT_MAX_FRAMES` if it
            has none (HuBERT, wav2vec 2.0, WavLM). The tables of synthesizers grow with it.
        overrides: Parameters of the mechanism. The default dropout is the model's attention dropout.

    Returns:
        The model.

    Raises:
        ValueError: nothing in the model can be replaced, or a name, parameter or layer is unknown.
    """
    found = _encoder_layers(model)
    chosen = _chosen(layers, found)
    if hasattr(model.config, RECORD) and not any(isinstance(layer.attention, ReplacedAttention) for layer in found):
        raise ValueError(
            f"the config of this {type(model).__name__} records audiot attention that the model does not have; perhaps another "
            "model shares it: build the model from a copy of its config, or read it with load"
        )
    config = found[0].owner.config
    options = parameters(name)
    if "dropout" in options:
        options["dropout"] = _attention_dropout(config)
    if max_frames is None:
        max_frames = REPLACEMENTS[type(found[chosen[0]].attention)].longest(config)
    replacement = {"name": name, "layers": chosen, "max_frames": max_frames, "parameters": {**options, **overrides}}
    _replace(model, replacement)
    if not reuse_weights:
        for index in chosen:
            attention, parent, owner = found[index]
            for projection in attention.kept_projections(parent):
                _draw_anew(projection, owner)
    setattr(model.config, RECORD, [*getattr(model.config, RECORD, []), replacement])
    return model


def load(folder: str | os.PathLike[str], model_class: type[PreTrainedModel] | None = None, **options: Any) -> PreTrainedModel:
    """Read, in evaluation mode, a model saved by `save_pretrained` after `replace_self_attention`.

    Args:
        folder: Argument of `from_pretrained`, usually a folder.
        model_class: Class of the model; None means the saved class. Another class, such as one for fine-tuning, may lack weights
            outside the replaced attention. They are initialised, and transformers reports it.
        options: Further arguments of `from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        ValueError: the folder records no attention of audiot, or its weights do not match the record.
    """
    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, RECORD):
        raise ValueError(f"{folder} records no attention of audiot ({RECORD} in config.json): read it with from_pretrained")
    saved_class = (config.architectures or [""])[0]
    if model_class is None:
        model_class = getattr(transformers, saved_class, None)
        if model_class is None:
            raise ValueError(f"{folder} was saved by the class {saved_class!r}, unknown to transformers: pass model_class")
    constants: dict[str, Tensor] = {}
    loaded: Any = _replacing(model_class, constants).from_pretrained(folder, output_loading_info=True, **options)
    model, report = loaded
    model.__class__ = model_class
    for key, value in constants.items():
        model.get_buffer(key).copy_(value)
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if model_class.__name__ != saved_class:
        replaced = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, ReplacedAttention))
        missing, unexpected = [key for key in missing if key.startswith(replaced)], []
    if missing or unexpected:
        raise ValueError(
            f"the weights in {folder} do not fit the attention that its config.json records "
            f"(missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}): save the model again"
        )
    return model


class AfterStep(TrainerCallback):
    """Callback that makes a `Trainer` call `audiot.attention.after_step` after each step of the optimiser."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `after_step` on the model."""
        after_step(kwargs["model"])


class ReplacedAttention(nn.Module):
    """Self-attention of a model with a mechanism of audiot.

    It is mixed into the model's own class, by which transformers finds the modules whose attention weights to record.
    """

    projections: ClassVar[dict[str, str]] = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    """Name of each input projection in the model."""
    output: ClassVar[str | None] = "out_proj"
    """Name of the output projection; None if it is `output.dense` of the parent module."""
    mechanisms: ClassVar[tuple[str, ...] | None] = None
    """Names of the mechanisms that the model accepts; None means all."""

    config: Any
    mechanism: AttentionMechanism

    @staticmethod
    def longest(config: PreTrainedConfig) -> int:
        """Number of frames of the longest sequence that the model supports."""
        return DEFAULT_MAX_FRAMES

    def kept_projections(self, parent: Any) -> list[Any]:
        """The linear layers around the mechanism. All are in this module or in its parent, `parent`."""
        inputs = [getattr(self, name) for role, name in self.projections.items() if role in self.mechanism.inputs]
        return [*inputs, parent.output.dense if self.output is None else getattr(self, self.output)]

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Compute self-attention.

        Args:
            hidden_states: Frames (B, T, d).
            attention_mask: Mask as transformers passes it, see `valid_frames`.
            args: Ignored.
            kwargs: Options, of which only `output_attentions` is used.

        Returns:
            Frames (B, T, d), and the attention weights (B, H, T, T), or None if they were not requested or there are none.
        """
        return self._attend(hidden_states, attention_mask, kwargs)

    def _attend(
        self, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any], positions: Positions | None = None
    ) -> tuple[Tensor, Tensor | None]:
        for name in ("key_value_states", "cache", "past_key_values"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(self.mechanism).__name__} is self-attention over whole sequences: pass no {name}")
        inputs: dict[str, Any] = {"hidden": hidden, "valid": valid_frames(mask, hidden), "positions": positions}
        for role, name in self.projections.items():
            if role in self.mechanism.inputs:
                inputs[role] = getattr(self, name)(hidden).unflatten(-1, (self.mechanism.num_heads, -1)).transpose(1, 2)
        context = self.mechanism(**inputs).transpose(1, 2).flatten(2)
        if self.output is not None:
            context = getattr(self, self.output)(context)
        asked = kwargs.get("output_attentions")
        if not (self.config.output_attentions if asked is None else asked) or not self.mechanism.has_weights:
            return context, None
        inputs.pop("value", None)
        return context, self.mechanism.weights(**inputs)


class ReplacedBert(ReplacedAttention, BertSelfAttention):
    """BERT's self-attention with a mechanism of audiot."""

    projections: ClassVar[dict[str, str]] = {"query": "query", "key": "key", "value": "value"}
    output = None

    @staticmethod
    def longest(config: PreTrainedConfig) -> int:
        """One frame per position."""
        return config.max_position_embeddings


class ReplacedRoberta(ReplacedAttention, RobertaSelfAttention):
    """RoBERTa's self-attention with a mechanism of audiot."""

    projections: ClassVar[dict[str, str]] = {"query": "query", "key": "key", "value": "value"}
    output = None

    @staticmethod
    def longest(config: PreTrainedConfig) -> int:
        """One frame per position, counted from pad_token_id + 1."""
        return config.max_position_embeddings - config.pad_token_id - 1


class ReplacedHubert(ReplacedAttention, HubertAttention):  # type: ignore[misc]  # the mask is passed by name
    """HuBERT's self-attention with a mechanism of audiot."""


class ReplacedWav2Vec2(ReplacedAttention, Wav2Vec2Attention):  # type: ignore[misc]  # the mask is passed by name
    """wav2vec 2.0's self-attention with a mechanism of audiot."""


class ReplacedWavLM(ReplacedAttention, WavLMAttention):
    """WavLM's self-attention with a mechanism of audiot, to whose scores the gated position bias is added."""

    mechanisms = ("query_key", "shared_query_key")

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_bias: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Compute self-attention with the gated relative position bias of Chen et al. 2022 (arXiv:2110.13900).

        Args:
            hidden_states: Frames (B, T, d).
            attention_mask: Mask, bool (B, T) or None.
            position_bias: Position bias (B·H, T, T); None in the first layer, which computes it.
            args: Ignored.
            kwargs: Options as in `ReplacedAttention.forward`.

        Returns:
            Frames (B, T, d), the attention weights or None, and the position bias for the next layer.
        """
        num_sequences, num_frames, _ = hidden_states.shape
        if position_bias is None:
            position_bias = self.compute_bias(num_frames, num_frames).repeat(num_sequences, 1, 1)
        heads = hidden_states.unflatten(-1, (self.mechanism.num_heads, -1)).transpose(1, 2)
        update, reset = self.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1, keepdim=True).sigmoid().unbind(-2)
        gate = update * (reset * self.gru_rel_pos_const - 1) + 2  # B, H, T, 1
        bias = GatedBias(gate * position_bias.unflatten(0, (num_sequences, -1)))
        output, weights = self._attend(hidden_states, attention_mask, kwargs, bias)
        return output, weights, position_bias


class ReplacedWhisper(ReplacedAttention, WhisperAttention):
    """Self-attention of Whisper's encoder with a mechanism of audiot."""

    @staticmethod
    def longest(config: PreTrainedConfig) -> int:
        """One frame per position."""
        return config.max_source_positions


class ReplacedViT(ReplacedAttention, ViTAttention):
    """ViT's self-attention with a mechanism of audiot."""

    output = "o_proj"

    @staticmethod
    def longest(config: PreTrainedConfig) -> int:
        """All patches of an image and one special token."""
        height, width = _pair(config.image_size)
        patch_height, patch_width = _pair(config.patch_size)
        return (height // patch_height) * (width // patch_width) + 1


class ReplacedAST(ReplacedAttention, ASTAttention):
    """The Audio Spectrogram Transformer's self-attention with a mechanism of audiot."""

    output = "o_proj"

    @staticmethod
    def longest(config: PreTrainedConfig) -> int:
        """All patches of a spectrogram and two special tokens."""
        bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        return bands * ((config.max_length - config.patch_size) // config.time_stride + 1) + 2


REPLACEMENTS: dict[type[nn.Module], type[ReplacedAttention]] = {
    BertSelfAttention: ReplacedBert,
    RobertaSelfAttention: ReplacedRoberta,
    HubertAttention: ReplacedHubert,
    Wav2Vec2Attention: ReplacedWav2Vec2,
    WavLMAttention: ReplacedWavLM,
    WhisperAttention: ReplacedWhisper,
    ViTAttention: ReplacedViT,
    ASTAttention: ReplacedAST,
}


class GatedBias(Positions):
    """WavLM's position bias for one batch. Each frame gates it, so it depends on more than the offset.

    Args:
        value: Bias (B, H, T, T) of the scores between all frames.
    """

    has_bias = True

    def __init__(self, value: Tensor) -> None:
        super().__init__(1, 1, 1)
        self.value = value

    def bias(self, offset: Tensor) -> Tensor:
        """The bias. It exists only for the offsets between all frames."""
        return self.value


def valid_frames(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Mask of real frames, bool (B, T), or None if all frames are real.

    Args:
        mask: Mask in a form that attention layers of transformers get: None; (B, T), zero or False on padded frames ("audiot",
            flash attention, WavLM); or (B or 1, 1 or H, 1 or T, T), bool ("sdpa") or 0 and a very negative number added to the
            scores of padded frames ("eager").
        hidden: Frames (B, T, d).

    Raises:
        ValueError: the mask has another form or differs between queries.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            f"the attention mask must be a tensor of 2 or 4 dimensions, found a {type(mask).__name__}: "
            "call model.set_attn_implementation('sdpa')"
        )
    if mask.shape[-1] != hidden.shape[1]:
        raise ValueError(
            f"the attention mask has {mask.shape[-1]} frames but the sequences have {hidden.shape[1]}: pass no cache"
        )
    if mask.dim() == 4:
        row = mask[:, 0, 0]
        # A graph of torch.compile cannot depend on values. The models themselves only make valid masks.
        if not torch.compiler.is_compiling():
            _check_rows(mask, row)
        mask = row >= 0 if row.dtype.is_floating_point else row
    return mask.to(torch.bool).expand(len(hidden), -1)


def _check_rows(mask: Tensor, row: Tensor) -> None:
    """Raise ValueError unless `mask` (B, H, T, T) hides the same keys, `row` (B, T), from all queries."""
    if mask.shape[1:3] != (1, 1) and not (mask == row[:, None, None]).all():
        raise ValueError(
            "the attention mask differs between queries, like a causal mask, but audiot's mechanisms only support padding: "
            "pass a mask of shape (sequences, frames)"
        )
    if row.dtype.is_floating_point and not ((row == 0) | (row <= -1e4)).all():
        raise ValueError("the attention mask adds a bias, but audiot's mechanisms only support padding: pass 0 and -inf")


def _padding_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Mask of the "audiot" implementation: bool (B, T), or None if nothing is padded."""
    if attention_mask is None or (not torch.compiler.is_compiling() and attention_mask.all()):
        return None
    return attention_mask


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The "audiot" implementation for layers that keep their attention: "sdpa" with the mask of `_padding_mask`."""
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("audiot", _sdpa)
AttentionMaskInterface.register("audiot", _padding_mask)


class _Layer(NamedTuple):
    """Self-attention of one layer of an encoder."""

    attention: Any
    parent: nn.Module
    owner: PreTrainedModel  # the innermost model that contains the layer


def _encoder_layers(model: PreTrainedModel) -> list[_Layer]:
    """The self-attention of all layers of a model's encoder."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a model of transformers, such as one of {SUPPORTED}, found {type(model).__name__}")
    found: dict[nn.Module, _Layer] = {}
    decoders = False
    for owner in model.modules():
        if not isinstance(owner, PreTrainedModel):
            continue
        for parent in owner.modules():
            for module in parent.children():
                if isinstance(module, (ReplacedAttention, *REPLACEMENTS)):
                    if getattr(module, "is_decoder", False):
                        decoders = True
                    else:
                        found[module] = _Layer(module, parent, owner)
    kind = type(model).__name__
    if not found and decoders:
        raise ValueError(f"{kind} is a decoder, but audiot's mechanisms are bidirectional: use {SUPPORTED}")
    if not found:
        raise ValueError(f"{kind} has no self-attention that audiot can replace: use {SUPPORTED}")
    owners = {id(layer.owner.config): type(layer.owner).__name__ for layer in found.values()}
    if len(owners) > 1:
        raise ValueError(f"{kind} has several encoders ({', '.join(owners.values())}): pass one of them")
    return list(found.values())


def _chosen(layers: Iterable[int] | None, found: list[_Layer]) -> list[int]:
    """The indices `layers`, counted from 0, sorted and without repetitions."""
    total = len(found)
    given = list(range(total) if layers is None else layers)
    for layer in given:
        if not -total <= layer < total:
            raise ValueError(f"layer {layer} does not exist: choose layers from {-total} to {total - 1}")
    chosen = sorted({layer % total for layer in given})
    if not chosen:
        raise ValueError("layers is empty: give indices, or None for all")
    for layer in chosen:
        attention = found[layer].attention
        if isinstance(attention, ReplacedAttention):
            kind = type(attention.mechanism).__name__
            raise ValueError(f"layer {layer} already has audiot's {kind}: choose other layers, or start from the original model")
    return chosen


def _replace(model: PreTrainedModel, replacement: dict[str, Any]) -> None:
    """Apply one record of a model's config."""
    found = _encoder_layers(model)
    config = found[0].owner.config
    chosen = [found[index].attention for index in replacement["layers"]]
    name, allowed = replacement["name"], REPLACEMENTS[type(chosen[0])].mechanisms
    if allowed is not None and name not in allowed:
        raise ValueError(
            f"WavLM adds a gated position bias to the scores between all frames, which {name!r} does not compute: "
            f"choose {' or '.join(allowed)}, or a HuBERT or wav2vec 2.0 model"
        )
    sizes = (config.hidden_size, config.num_attention_heads, replacement["max_frames"])
    with _plain_tensors():
        mechanisms = [build_mechanism(name, *sizes, **replacement["parameters"]) for _ in chosen]
    for attention, mechanism in zip(chosen, mechanisms, strict=True):
        # The class is changed in place, so hooks and other attributes of the module are kept.
        attention.__class__ = REPLACEMENTS[type(attention)]
        weight = getattr(attention, attention.projections["value"]).weight
        attention.config = config
        attention.mechanism = mechanism.to("cpu" if weight.is_meta else weight.device, weight.dtype).train(attention.training)
        # A mechanism may have no weights. Then from_pretrained would silently ignore it, but it reports this buffer.
        attention.register_buffer(RECORD, torch.ones(1, dtype=torch.uint8, device=weight.device))
        for role, projection in attention.projections.items():
            if role not in mechanism.inputs:
                delattr(attention, projection)
    # The masks of a shared config are kept, since a decoder's are causal. Whisper's encoder gets none anyway.
    if config._attn_implementation == "sdpa" and not config.is_encoder_decoder:
        config._attn_implementation = "audiot"


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Create new tensors in float32, even while transformers builds a half-precision model on the meta device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)


def _attention_dropout(config: PreTrainedConfig) -> float:
    """The model's own attention dropout."""
    return config.attention_probs_dropout_prob if hasattr(config, "attention_probs_dropout_prob") else config.attention_dropout


def _draw_anew(projection: nn.Linear, owner: PreTrainedModel) -> None:
    """Initialise the weights of a projection as its model does."""
    fresh = nn.Linear(projection.in_features, projection.out_features, bias=projection.bias is not None)
    owner._init_weights(fresh)
    projection.load_state_dict(fresh.state_dict())


def _replacing(model_class: type[PreTrainedModel], constants: dict[str, Tensor]) -> type[PreTrainedModel]:
    """`model_class` whose constructor applies the replacements recorded in its config, before weights are read.

    Args:
        model_class: Class of transformers.
        constants: Dict that receives the unsaved buffers, which `from_pretrained` overwrites.
    """

    def construct(model: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(model, config, *args, **kwargs)
        for replacement in getattr(config, RECORD):
            mechanism, own = translate_record(replacement["name"], replacement["parameters"])
            _replace(model, replacement | {"name": mechanism, "parameters": own})
        for name, module in model.named_modules():
            if isinstance(module, AttentionMechanism):
                saved = module.state_dict()
                constants.update({f"{name}.{key}": b.clone() for key, b in module.named_buffers() if key not in saved})

    # transformers uses name and module to find how to rename weights and which outputs to record.
    return type(model_class.__name__, (model_class,), {"__init__": construct, "__module__": model_class.__module__})


def _pair(size: Any) -> tuple[int, int]:
    """Height and width, from one number or two."""
    return (size, size) if isinstance(size, int) else tuple(size)
