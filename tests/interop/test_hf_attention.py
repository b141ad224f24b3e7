"""audiot's attention inside models of transformers: tiny ones, drawn at random, without a network."""

from __future__ import annotations

import copy
import io
import json
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import audiot.interop.hf_attention as audiot_huggingface
from audiot.attention import AttentionMechanism, after_step, names
from audiot.interop.hf_attention import DEFAULT_MAX_FRAMES, AfterStep, ReplacedAttention, load, replace_self_attention
from audiot.interop.hf_attention import valid_frames as valid_frames_of

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = {**SIZE, "vocab_size": 30, "max_position_embeddings": 26}
CONV = {"conv_dim": (8, 8), "conv_kernel": (4, 2), "conv_stride": (4, 2)}  # a frame is 8 samples
AUDIO = {**SIZE, **CONV, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "vocab_size": 9}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "num_mel_bins": 5,
    "max_source_positions": 14,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
AST = {**SIZE, "num_mel_bins": 8, "max_length": 20, "patch_size": 4, "frequency_stride": 3, "time_stride": 4}
CONFIGS = {
    "Bert": TEXT,
    "Roberta": TEXT,
    "Hubert": AUDIO,
    "Wav2Vec2": {**AUDIO, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    "WavLM": {**AUDIO, "num_buckets": 8, "max_bucket_distance": 10},
    "Whisper": WHISPER,
    "ViT": {**SIZE, "image_size": (12, 8), "patch_size": 4},
    "AST": AST,
}
LONGEST = {"Bert": 26, "Roberta": 24, "Whisper": 14, "ViT": 7, "AST": 12}
every_model = pytest.mark.parametrize("kind", CONFIGS)
every_mechanism = pytest.mark.parametrize("name", names())


def make(kind, head="Model", seed=0, double=True, **options):
    """A model in evaluation mode whose weights differ from layer to layer."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**CONFIGS[kind], **options})
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double() if double else model


def inputs_of(kind, double=True, padded=True):
    """A batch for `make(kind)`; the second sequence is padded where the model has masks."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float64 if double else torch.float32
    mask = {"attention_mask": torch.tensor([[1] * 24, [1] * 9 + [0] * 15, [0] * 3 + [1] * 21])}
    if kind in ("Bert", "Roberta"):
        return {"input_ids": torch.randint(3, 30, (3, 24), generator=generator), **(mask if padded else {})}
    if kind in ("Hubert", "Wav2Vec2", "WavLM"):
        mask = {"attention_mask": torch.tensor([[1] * 128, [1] * 56 + [0] * 72])}
        return {"input_values": torch.randn(2, 128, generator=generator, dtype=dtype), **(mask if padded else {})}
    if kind == "Whisper":
        features = torch.randn(2, 5, 28, generator=generator, dtype=dtype)
        return {"input_features": features, "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
    name, shape = ("pixel_values", (3, 3, 12, 8)) if kind == "ViT" else ("input_values", (3, 20, 8))
    mask = {"attention_mask": mask["attention_mask"][:, : LONGEST[kind]]}
    return {name: torch.randn(*shape, generator=generator, dtype=dtype), **(mask if padded else {})}


def attentions(output):
    return output.encoder_attentions if "encoder_attentions" in output else output.attentions


def replaced(model):
    return [module for module in model.modules() if isinstance(module, ReplacedAttention)]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tolerance_of(kind, implementation):
    """The eager attention of these two rounds to float32."""
    return 1e-5 if kind in ("ViT", "AST") and implementation == "eager" else 1e-10


def gradients(model, inputs):
    torch.manual_seed(3)
    model.zero_grad()
    model(**inputs)[0].square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@every_model
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_query_key_equals_the_untouched_model(kind, implementation, padded):
    if kind == "WavLM" and implementation == "sdpa":
        pytest.skip("WavLM has one implementation only")
    model, inputs = make(kind, attn_implementation=implementation), inputs_of(kind, padded=padded)
    expected = model(**inputs)[0]
    model = replace_self_attention(model, "query_key")
    assert len(replaced(model)) == 2
    tolerance = tolerance_of(kind, implementation)
    close(model(**inputs)[0], expected, tolerance)
    if kind != "WavLM":
        model.set_attn_implementation(implementation)  # so that its masks are seen, too
        close(model(**inputs)[0], expected, tolerance)


@every_model
def test_query_key_gives_the_attention_weights_and_gradients_of_the_untouched_model(kind):
    model, inputs = make(kind, attn_implementation="eager"), inputs_of(kind)
    other = replace_self_attention(copy.deepcopy(model), "query_key")
    expected, got = attentions(model(**inputs, output_attentions=True)), attentions(other(**inputs, output_attentions=True))
    assert len(got) == 2
    for one, reference in zip(got, expected, strict=True):
        assert one.shape == reference.shape
        averaged = kind == "WavLM"  # which repeats the mean of the heads
        close(one.mean(1) if averaged else one, reference[:, 0] if averaged else reference, tolerance_of(kind, "eager"))
    expected = gradients(model, inputs)
    got = gradients(other, inputs)
    assert got.keys() == expected.keys()
    for name in got:
        close(got[name], expected[name], 10 * tolerance_of(kind, "eager"))


@every_model
@pytest.mark.parametrize("name", ["query_key", "shared_query_key", "synthesizer_dense", "synthesizer_random"])
def test_a_saved_model_comes_back_the_same(kind, name, tmp_path):
    if kind == "WavLM" and "query_key" not in name:
        pytest.skip("refused")
    model = replace_self_attention(make(kind, double=False), name, max_frames=30)
    inputs = inputs_of(kind, double=False)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    assert again.config.audiot_attention == model.config.audiot_attention
    close(again(**inputs)[0], model(**inputs)[0], 1e-6)
    assert [len(attentions(one(**inputs, output_attentions=True))) for one in (model, again)] == [2, 2]


@every_mechanism
@pytest.mark.parametrize("kind", ["Bert", "ViT"])  # ViT's weights have other names on disk
def test_every_mechanism_comes_back_the_same(kind, name, tmp_path):
    model = replace_self_attention(make(kind, double=False), name)
    for mechanism in (attention.mechanism for attention in replaced(model)):
        for tensor in (*mechanism.parameters(), *mechanism.buffers()):
            if tensor.is_floating_point():
                tensor.data += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(tmp_path)
    inputs = inputs_of(kind, double=False)
    close(load(tmp_path)(**inputs)[0], model(**inputs)[0], 1e-6)  # weights that lie elsewhere in memory may be summed otherwise


@every_mechanism
def test_every_mechanism_trains_every_parameter_and_ignores_padding(name):
    model = replace_self_attention(make("Bert"), name)
    inputs = inputs_of("Bert")
    grown = {"input_ids": torch.cat([inputs["input_ids"], inputs["input_ids"][:, :2]], 1)}
    grown["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 2))
    output = model(**inputs).last_hidden_state
    assert output.shape == (3, 24, 32)
    close(model(**grown).last_hidden_state[0, :24], output[0], 1e-8)
    close(model(inputs["input_ids"][1:2, :9]).last_hidden_state[0], output[1, :9], 1e-8)
    got = gradients(model.train(), inputs)
    for path, module in model.named_modules():
        if isinstance(module, ReplacedAttention):
            for key, _ in module.named_parameters():
                assert got[f"{path}.{key}"].isfinite().all()
    after_step(model)
    assert model(**inputs).last_hidden_state.isfinite().all()


@every_mechanism
def test_sequences_without_a_real_frame_stay_finite(name):
    model, inputs = replace_self_attention(make("Bert"), name), inputs_of("Bert")
    inputs["attention_mask"][1] = 0
    assert model(**inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("name", "gone", "new"),
    [
        ("query_key", [], []),
        ("shared_query_key", ["k_proj"], []),
        ("synthesizer_random", ["k_proj", "q_proj"], ["mechanism.logits"]),
    ],
)
def test_projections_that_the_mechanism_does_not_use_are_gone(name, gone, new):
    model = make("Hubert")
    before = {key for key, _ in model.encoder.layers[0].attention.named_parameters()}
    replace_self_attention(model, name)
    after = {key for key, _ in model.encoder.layers[0].attention.named_parameters()}
    assert after == {key for key in before if key.split(".")[0] not in gone} | set(new)


def test_only_the_named_layers_change():
    untouched, inputs = make("Bert"), inputs_of("Bert")
    model = replace_self_attention(copy.deepcopy(untouched), "synthesizer_random", layers=[-1])
    first, last = (layer.attention.self for layer in model.encoder.layer)
    assert not isinstance(first, ReplacedAttention)
    assert isinstance(last, ReplacedAttention)
    assert model.config.audiot_attention[0]["layers"] == [1]
    states = [one(**inputs, output_hidden_states=True).hidden_states for one in (model, untouched)]
    close(states[0][1], states[1][1])
    assert not torch.allclose(states[0][2], states[1][2])


def test_layers_may_have_different_mechanisms(tmp_path):
    model, inputs = make("Hubert", double=False), inputs_of("Hubert", double=False)
    replace_self_attention(model, "synthesizer_dense", layers=[1], bottleneck_dim=3, max_frames=40)
    replace_self_attention(model, "query_key", layers=[0], share_query_key=True, dropout=0.25)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    close(again(**inputs)[0], model(**inputs)[0], 1e-6)
    first, second = (attention.mechanism for attention in replaced(again))
    assert (first.share_query_key, first.dropout) == (True, 0.25)
    assert (second.bottleneck_dim, second.max_frames) == (3, 40)


@pytest.mark.parametrize(
    ("kind", "head"), [("Hubert", "ForCTC"), ("Bert", "ForMaskedLM"), ("Whisper", "ForConditionalGeneration")]
)
def test_models_with_a_head_come_back_the_same(kind, head, tmp_path):
    model, inputs = make(kind, head, double=False), inputs_of(kind, double=False)
    replace_self_attention(model, "synthesizer_random", max_frames=30)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load(tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    if kind == "Bert":
        assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight


def test_a_part_of_a_model_can_be_given():
    whole, part = make("Whisper"), make("Whisper")
    replace_self_attention(whole, "query_key")
    replace_self_attention(part.get_encoder(), "query_key")
    assert part.config.audiot_attention == whole.config.audiot_attention
    assert len(replaced(part.encoder)) == len(replaced(part)) == 2


def test_a_pretrained_model_loads_into_a_class_for_fine_tuning(tmp_path):
    model = replace_self_attention(make("Bert", "ForMaskedLM", double=False), "synthesizer_dense")
    model.save_pretrained(tmp_path)
    tuned = load(tmp_path, transformers.BertForSequenceClassification)
    inputs = inputs_of("Bert", double=False)
    assert torch.equal(tuned.bert(**inputs)[0], model.bert(**inputs)[0])
    assert tuned(**inputs).logits.shape == (3, 2)


def test_load_passes_arguments_on_and_keeps_the_saved_type(tmp_path):
    model = replace_self_attention(make("Bert", double=False).half(), "synthesizer_random")
    model.save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load(tmp_path).parameters()} == {torch.float16}
    wide = load(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert wide.config._attn_implementation == "eager"


def test_mechanisms_are_built_alike_when_loading(tmp_path, monkeypatch):
    def with_table(*args, **kwargs):
        made = torch.ones(1)
        assert (made.dtype, made.device.type) == (torch.float32, "cpu")
        mechanism = build(*args, **kwargs)
        mechanism.register_buffer("not_saved", torch.arange(5.0), persistent=False)
        return mechanism

    build = audiot_huggingface.build_mechanism
    monkeypatch.setattr(audiot_huggingface, "build_mechanism", with_table)
    replace_self_attention(make("Bert", double=False).half(), "query_key").save_pretrained(tmp_path)
    for attention in replaced(load(tmp_path)):
        assert torch.equal(attention.mechanism.not_saved, torch.arange(5.0).half())


def test_from_pretrained_reports_what_it_ignores(tmp_path):
    replace_self_attention(make("Bert", double=False), "query_key").save_pretrained(tmp_path)
    _, report = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report["unexpected_keys"] == {f"encoder.layer.{index}.attention.self.audiot_attention" for index in (0, 1)}


def test_a_replaced_model_can_be_pickled():
    model, inputs = replace_self_attention(make("Bert"), "synthesizer_random"), inputs_of("Bert")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("kind", ["Bert", "ViT"])
def test_projections_are_kept_or_drawn_as_the_model_draws_its_own(kind):
    def projections(model):
        attention = replaced(model)[0]
        return attention.kept_projections(model.encoder.layer[0].attention if kind == "Bert" else None)

    untouched = make(kind, initializer_range=0.5, double=False)
    kept = projections(replace_self_attention(copy.deepcopy(untouched), "query_key"))
    drawn = projections(replace_self_attention(copy.deepcopy(untouched), "query_key", reuse_weights=False))
    weights = {key: value for key, value in untouched.state_dict().items() if "0.attention" in key and "LayerNorm" not in key}
    expected = [value for key, value in weights.items() if key.endswith("weight")]
    assert len(kept) == len(drawn) == len(expected) == 4
    for old, new, reference in zip(kept, drawn, expected, strict=True):
        assert torch.equal(old.weight, reference)
        assert not torch.allclose(new.weight, reference)
        assert (new.bias == 0).all()
        assert new.weight.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(("kind", "name"), [*((kind, "query_key") for kind in CONFIGS), *(("Bert", name) for name in names())])
def test_attention_weights_times_values_are_the_output(kind, name):
    model, inputs = replace_self_attention(make(kind), name), inputs_of(kind)
    first, seen = replaced(model)[0], {}
    getattr(first, first.projections["value"]).register_forward_hook(lambda module, args, output: seen.update(value=output))
    if first.output is None:
        first.register_forward_hook(lambda module, args, output: seen.update(context=output[0]))
    else:
        getattr(first, first.output).register_forward_pre_hook(lambda module, args: seen.update(context=args[0]))
    weights = attentions(model(**inputs, output_attentions=True))[0]
    heads = seen["value"].unflatten(-1, (4, -1)).transpose(1, 2)
    # What padded frames get is up to each form of a mechanism.
    real = inputs["attention_mask"].bool() if kind == "Bert" else slice(None)
    close((weights @ heads).transpose(1, 2).flatten(2)[real], seen["context"][real])


@pytest.mark.parametrize("kind", ["Bert", "Hubert"])
def test_attention_weights_are_computed_only_when_asked(kind, monkeypatch):
    model, inputs = replace_self_attention(make(kind, attn_implementation="eager"), "query_key"), inputs_of(kind)
    calls = []
    weights = AttentionMechanism.weights
    monkeypatch.setattr(AttentionMechanism, "weights", lambda *args, **kwargs: calls.append(1) or weights(*args, **kwargs))
    assert model(**inputs).attentions is None
    assert not calls
    assert len(model(**inputs, output_attentions=True).attentions) == len(calls) == 2
    model.config.output_attentions = True
    assert len(model(**inputs).attentions) == 2
    assert not model(**inputs, output_attentions=False).attentions


class Weightless(AttentionMechanism):
    """The values, by other means than weights."""

    inputs = frozenset({"value"})
    has_weights = False

    def attend(self, value, valid):
        return value

    naive = attend


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_layer_without_weights_is_left_out_of_the_attentions(implementation, monkeypatch):
    build = audiot_huggingface.build_mechanism
    monkeypatch.setattr(
        audiot_huggingface,
        "build_mechanism",
        lambda name, *sizes, **given: Weightless(*sizes) if name == "none" else build(name, *sizes, **given),
    )
    model, inputs = (
        replace_self_attention(make("Bert", attn_implementation=implementation), "none", layers=[0]),
        inputs_of("Bert"),
    )
    replace_self_attention(model, "query_key", layers=[1])
    output = model(**inputs, output_attentions=True)
    close(output.last_hidden_state, model(**inputs).last_hidden_state, 0)
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 24, 24)]  # of the second layer alone


def test_attention_weights_are_recorded_also_if_they_were_before_the_replacement():
    model, inputs = make("Bert"), inputs_of("Bert")
    model(**inputs, output_attentions=True)
    replace_self_attention(model, "synthesizer_random")
    assert len(model(**inputs, output_attentions=True).attentions) == 2


@every_model
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = replace_self_attention(make(kind), "query_key" if kind == "WavLM" else "synthesizer_dense").train()
    model.config.layerdrop = 0.0
    inputs = inputs_of(kind)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    got = gradients(model, inputs)
    assert got.keys() == expected.keys()
    for key in got:
        close(got[key], expected[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_mechanism
def test_half_precision_models_stay_finite_and_keep_their_type(name, dtype):
    model = replace_self_attention(make("Bert", double=False).to(dtype), name)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {dtype}
    output = model(**inputs_of("Bert")).last_hidden_state
    assert output.dtype == dtype
    assert output.isfinite().all()


@every_model
def test_dropout_and_longest_sequence_are_the_models_own(kind):
    key = "attention_probs_dropout_prob" if "attention_probs_dropout_prob" in make(kind).config.to_dict() else "attention_dropout"
    name = "query_key" if kind == "WavLM" else "synthesizer_random"
    model = replace_self_attention(make(kind, **{key: 0.35}), name)
    assert [attention.mechanism.dropout for attention in replaced(model)] == [0.35, 0.35]
    assert model.config.audiot_attention[0]["max_frames"] == LONGEST.get(kind, DEFAULT_MAX_FRAMES)
    model(**inputs_of(kind))
    model = replace_self_attention(make(kind), name, dropout=0.2, max_frames=64)
    assert replaced(model)[0].mechanism.dropout == 0.2
    assert model.config.audiot_attention[0]["max_frames"] == 64


def test_the_longest_sequences_are_supported():
    for kind, length in (("Bert", 26), ("Roberta", 24)):
        model = replace_self_attention(make(kind), "synthesizer_dense")
        model(torch.full((1, length), 5))
    model = replace_self_attention(make("Hubert"), "synthesizer_dense", max_frames=15)
    with pytest.raises(ValueError, match="sequence has 16 frames but max_frames is 15"):
        model(**inputs_of("Hubert"))


@pytest.mark.parametrize("layers", [None, [1]])
def test_padding_masks_do_not_grow_with_the_square_of_the_length(layers):
    model, inputs = make("Bert"), inputs_of("Bert")
    expected = model(**inputs).last_hidden_state
    replace_self_attention(model, "query_key", layers)
    seen = []
    for layer in model.encoder.layer:
        layer.attention.self.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    close(model(**inputs).last_hidden_state, expected)
    assert [mask.shape for mask in seen] == [(3, 24), (3, 24)]


def test_only_the_sdpa_of_an_encoder_of_its_own_gets_other_masks():
    for kind, implementation, expected in (("Bert", "sdpa", "audiot"), ("Bert", "eager", "eager"), ("Whisper", "sdpa", "sdpa")):
        model = replace_self_attention(make(kind, attn_implementation=implementation), "query_key")
        assert model.config._attn_implementation == expected


VALID = torch.tensor([[True, True, False, True], [True, False, False, False]])
ADDED = torch.where(VALID, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    "mask",
    [
        VALID,
        VALID.long(),
        VALID.float(),
        VALID[:, None, None],
        VALID[:, None, None].expand(2, 1, 4, 4),
        VALID[:, None, None].expand(2, 3, 4, 4).contiguous(),
        ADDED[:, None, None],
        ADDED[:, None, None].expand(2, 1, 4, 4).contiguous(),
        torch.where(VALID, 0.0, -torch.inf)[:, None, None],
        torch.where(VALID, 0.0, -10000.0)[:, None, None].half(),
    ],
    ids=range(10),
)
def test_masks_of_all_kinds_mean_the_same(mask):
    valid = valid_frames_of(mask, torch.zeros(2, 4, 8))
    assert valid.dtype == torch.bool
    assert torch.equal(valid, VALID)


def test_one_mask_serves_a_whole_batch():
    assert torch.equal(valid_frames_of(VALID[:1, None, None], torch.zeros(2, 4, 8)), VALID[:1].expand(2, 4))
    assert valid_frames_of(None, torch.zeros(2, 4, 8)) is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 4).tril().bool()[None, None], "differs between queries"),
        (torch.where(torch.ones(4, 4).tril().bool(), 0.0, -torch.inf)[None, None], "differs between queries"),
        (
            VALID[:, None, None].expand(2, 3, 4, 4) & torch.tensor([1, 1, 0]).bool()[None, :, None, None],
            "differs between queries",
        ),
        (torch.tensor([0.0, -1.0, -2.0, -3.0])[None, None, None], "adds a bias"),
        (torch.ones(2, 7, dtype=torch.bool), "has 7 frames but the sequences have 4"),
        ("blocks", "the attention mask must be a tensor of 2 or 4 dimensions, found a str"),
    ],
)
def test_masks_that_mean_more_than_padding_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        valid_frames_of(mask, torch.zeros(2, 4, 8))


def test_a_causal_mask_given_to_the_model_is_refused():
    model, inputs = replace_self_attention(make("Bert"), "synthesizer_random"), inputs_of("Bert")
    inputs["attention_mask"] = torch.ones(24, 24).tril().bool()[None, None]
    with pytest.raises(ValueError, match="like a causal mask"):
        model(**inputs)


@pytest.mark.parametrize("name", ["key_value_states", "cache", "past_key_values"])
def test_keys_from_elsewhere_are_refused(name):
    attention = replaced(replace_self_attention(make("Hubert"), "query_key"))[0]
    hidden = torch.zeros(1, 3, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"pass no {name}"):
        attention(hidden, **{name: hidden})


def decoder():
    return make("Bert", "LMHeadModel", is_decoder=True, add_cross_attention=True)


def gpt2():
    return transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=9, n_positions=8))


def dual():
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(make("ViT").config, make("Bert").config)
    return transformers.VisionTextDualEncoderModel(config)


def with_the_config_of_another():
    other = replace_self_attention(make("Bert"), "query_key")
    return transformers.BertModel(other.config)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: make("Bert"), {"name": "querykey"}, r"unknown attention 'querykey': did you mean 'query_key'\?"),
        (lambda: make("Bert"), {"dropuot": 0.1}, r"'query_key' has no parameter 'dropuot': did you mean 'dropout'\?"),
        (lambda: make("Bert"), {"dropout": 2.0}, r"attention dropout is 2.0: set it"),
        (lambda: make("Bert"), {"layers": [0, 2]}, "layer 2 does not exist: choose layers from -2 to 1"),
        (lambda: make("Bert"), {"layers": [-3]}, "layer -3 does not exist"),
        (lambda: make("Bert"), {"layers": []}, "layers is empty: give indices, or None for all"),
        (lambda: make("Bert"), {"max_frames": 0}, "max_frames is 0: set it to 1 or more"),
        (decoder, {}, "BertLMHeadModel is a decoder, but audiot's mechanisms are bidirectional: use the encoders of BERT"),
        (lambda: make("Whisper").decoder, {}, "WhisperDecoder is a decoder"),
        (gpt2, {}, "GPT2Model has no self-attention that audiot can replace: use the encoders of BERT"),
        (dual, {}, r"has several encoders \(ViTModel, BertModel\): pass one of them"),
        (lambda: nn.Linear(2, 2), {}, "model must be a model of transformers, .* found Linear"),
        (
            lambda: make("WavLM"),
            {"name": "synthesizer_random"},
            "WavLM adds a gated position bias .*: choose query_key or shared",
        ),
        (
            lambda: replace_self_attention(make("Bert"), "query_key"),
            {},
            "layer 0 already has audiot's QueryKey: choose other layers",
        ),
        (with_the_config_of_another, {}, "the config of this BertModel records audiot attention that the model does not have"),
    ],
)
def test_what_cannot_be_replaced_is_refused_in_one_line(model, options, message):
    model = model()
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        replace_self_attention(model, **{"name": "query_key", **options})
    assert "\n" not in str(caught.value)
    assert model.state_dict().keys() == untouched.keys()


def test_a_model_that_version_1_saved_is_read(tmp_path):
    own = {"form": "relative", "rank": 8, "anchor": "max_frames"}  # beside today's, as version 1 had them
    model = replace_self_attention(make("Bert", double=False), "synthesizer_relative").eval()
    model.config.audiot_attention[0]["name"] = "synthesizer_random"
    model.config.audiot_attention[0]["parameters"] |= own
    model.save_pretrained(tmp_path)
    again, inputs = load(tmp_path), inputs_of("Bert")
    with torch.no_grad():
        close(again(**inputs)[0], model(**inputs)[0], 1e-6)


def test_load_refuses_what_does_not_fit(tmp_path):
    make("Bert", double=False).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain records no attention of audiot .*: read it with from_pretrained"):
        load(tmp_path / "plain")
    folder = tmp_path / "replaced"
    replace_self_attention(make("Bert", double=False), "synthesizer_random").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    lost = "encoder.layer.1.attention.self.mechanism.logits"
    save_file({key: value for key, value in weights.items() if key != lost}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing: {lost}; unexpected: none"):
        load(folder)
    with pytest.raises(ValueError, match=f"missing: bert.{lost}; unexpected: none"):
        load(folder, transformers.BertForSequenceClassification)
    save_file({**weights, "another": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="missing: none; unexpected: another"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OwnModel"]}))
    with pytest.raises(ValueError, match="saved by the class 'OwnModel', unknown to transformers: pass model_class"):
        load(folder)


def test_after_step_reaches_each_mechanism_once(monkeypatch):
    model = replace_self_attention(make("Bert"), "query_key")
    calls = []
    monkeypatch.setattr(AttentionMechanism, "after_step", lambda mechanism: calls.append(mechanism))
    mechanisms = [attention.mechanism for attention in replaced(model)]
    after_step(model)
    assert calls == mechanisms
    AfterStep().on_optimizer_step(None, None, None, model=model, optimizer=None)
    assert calls == 2 * mechanisms


@pytest.mark.parametrize(("name", "implementation"), [("query_key", "eager"), ("synthesizer_random", "audiot")])
def test_a_replaced_model_compiles_without_graph_breaks(name, implementation):
    model, inputs = replace_self_attention(make("Bert"), name), inputs_of("Bert")
    model.set_attn_implementation(implementation)
    torch._dynamo.reset()
    close(torch.compile(model, backend="eager", fullgraph=True)(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
