"""Encoders of transformers as upstreams give, in any batch, the states that transformers gives for each utterance."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")

from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from transformers import (
    ASTConfig,
    AutoFeatureExtractor,
    AutoModel,
    BertConfig,
    Data2VecAudioConfig,
    HubertConfig,
    HubertForCTC,
    SeamlessM4TFeatureExtractor,
    SEWConfig,
    SEWDConfig,
    Speech2TextConfig,
    UniSpeechConfig,
    UniSpeechSatConfig,
    ViTConfig,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WavLMConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.utils import logging

from audiot.checkpoint import AudioEncoder, save_encoder
from audiot.deployment.graphs import Deployable, trace
from audiot.downstream.upstream import EncoderUpstream, checkpoint, rebuild
from audiot.interop.hf_attention import replace_self_attention
from audiot.interop.hf_model import AudiotModel
from audiot.interop.hf_upstream import FAMILIES, Frames, hf

logging.disable_progress_bar()

LENGTHS = torch.tensor([8000, 6321, 8000, 5100])
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
CONVOLUTIONS = {"conv_dim": [8] * 7, "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16}
WAVES = SIZES | CONVOLUTIONS
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
CONFIGS = {
    "wav2vec2": Wav2Vec2Config(**WAVES),
    "wav2vec2-layer": Wav2Vec2Config(**WAVES, **LAYER),
    "wav2vec2-adapter": Wav2Vec2Config(**WAVES, feat_extract_norm="layer", add_adapter=True),
    "hubert": HubertConfig(**WAVES),
    "hubert-layer": HubertConfig(**WAVES, **LAYER),
    "hubert-batch-norm": HubertConfig(**WAVES, **LAYER, conv_pos_batch_norm=True),
    "wavlm": WavLMConfig(**WAVES),
    "wavlm-layer": WavLMConfig(**WAVES, **LAYER),
    "unispeech-layer": UniSpeechConfig(**WAVES, **LAYER),
    "unispeech-sat": UniSpeechSatConfig(**WAVES),
    "unispeech-sat-layer": UniSpeechSatConfig(**WAVES, **LAYER),
    "data2vec-audio": Data2VecAudioConfig(**WAVES | {"num_conv_pos_embeddings": 3}, conv_pos_kernel_size=7),
    "wav2vec2-conformer": Wav2Vec2ConformerConfig(**WAVES, feat_extract_norm="layer", conv_depthwise_kernel_size=5),
    "sew": SEWConfig(**WAVES | {"conv_dim": [8] * 13}),
    "sew-d": SEWDConfig(**WAVES | {"conv_dim": [8] * 13}, max_position_embeddings=64, position_buckets=8),
    "wav2vec2-bert": Wav2Vec2BertConfig(**SIZES, feature_projection_input_dim=160, conv_depthwise_kernel_size=5),
    "whisper": WhisperConfig(
        d_model=16,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_source_positions=20,  # 0.4 s, so that these utterances take one or two windows
        vocab_size=30,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
}
MASKED = {"wav2vec2-layer", "wav2vec2-adapter", "hubert-layer", "wavlm-layer", "unispeech-layer", "unispeech-sat-layer"}


def extractor(config):
    if config.model_type == "whisper":
        return WhisperFeatureExtractor(feature_size=80, chunk_length=30)
    return SeamlessM4TFeatureExtractor() if config.model_type == "wav2vec2-bert" else Wav2Vec2FeatureExtractor(do_normalize=True)


def save(config, folder, model=None):
    """A model with weights that matter, and its feature extractor, in a folder."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config) if model is None else model
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "running_var" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))  # biases and statistics are no longer trivial
    model.save_pretrained(folder)
    extractor(config).save_pretrained(folder)
    return str(folder)


def speech(samples=8000, count=4):
    rng = np.random.default_rng(0)
    envelope = 0.1 + 0.1 * np.sin(np.arange(samples) / 500)
    return torch.from_numpy(rng.normal(size=(count, samples)) * envelope + 0.05).float()


def batch():
    """A padded batch with loud padding."""
    waveforms = speech()
    waveforms[torch.arange(8000) >= LENGTHS[:, None]] = 0.9
    return waveforms


@torch.no_grad()
def expected(folder, waveform):
    """States from transformers for one utterance, with its own feature extractor: (layers + 1, T, d)."""
    model, extract = AutoModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    if model.config.model_type == "whisper":
        size, states = 20 * 320, []
        for start in range(0, len(waveform), size):
            piece = np.zeros(size, dtype=np.float32)
            piece[: len(waveform) - start] = waveform[start : start + size]
            features = extract._torch_extract_fbank_features(piece[None])
            states.append(torch.stack(model.encoder(torch.from_numpy(features), output_hidden_states=True).hidden_states)[:, 0])
        return torch.cat(states, dim=1)[:, : (len(waveform) // 160 + 1) // 2]
    inputs = extract(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    inputs.pop("attention_mask", None)
    if model.config.model_type == "wav2vec2-bert":  # a frame that completes no pair is padding, masked in the model
        count = (len(waveform) - 400) // 160 + 1
        inputs["input_features"] = inputs["input_features"][:, : count // 2]
    model.adapter = None
    output = model(**inputs, output_hidden_states=True)
    states = list(output.hidden_states)
    if not model.config.model_type.startswith("sew"):
        states[-1] = output.last_hidden_state
    return torch.stack(states)[:, 0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Function of a name in CONFIGS: the folder of its model."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = save(CONFIGS[name], tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_a_graph_of_it_is_refused_in_words(saved, name):
    model = {"wav2vec2": "Wav2Vec2Model", "whisper": "WhisperEncoder"}[name]
    upstream = hf(saved(name))
    recorded = Deployable(upstream, upstream.features, "hidden", ("states", "batch", "frames", "channels"), {})
    with pytest.raises(
        ValueError, match=f"^the model can't be written as a graph: {model} of transformers asks for lengths [^\n]*$"
    ):
        trace(recorded)


@pytest.mark.parametrize("name", CONFIGS)
def test_states_are_those_of_transformers_for_each_utterance_alone(saved, name):
    upstream = hf(saved(name))
    assert not upstream.training
    with torch.no_grad():
        states, lengths = upstream(batch(), LENGTHS)
    total = upstream.features.num_frames(8000)
    assert states.shape == (4, 4, total, 16) == (upstream.num_states, 4, total, upstream.state_dim)
    assert upstream.stack == 1
    for row, length in enumerate(LENGTHS.tolist()):
        alone = expected(saved(name), speech()[row, :length])
        assert lengths[row] == alone.shape[1]
        torch.testing.assert_close(states[:, row, : lengths[row]], alone, rtol=1e-4, atol=1e-4)
        assert not states[:, row, lengths[row] :].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_does_not_change_valid_frames(saved, name):
    upstream = hf(saved(name))
    assert upstream.masks_padding == (name in MASKED | {"wav2vec2-bert", "whisper"})
    with torch.no_grad():
        together, lengths = upstream(batch(), LENGTHS)
        for row, length in enumerate(LENGTHS.tolist()):
            alone, (count,) = upstream(batch()[row : row + 1, :length], LENGTHS[row : row + 1])
            assert count == lengths[row] == alone.shape[2]
            torch.testing.assert_close(together[:, row, :count], alone[:, 0], rtol=1e-4, atol=1e-4)


def test_every_family_is_tested():
    assert {config.model_type for config in CONFIGS.values()} | {"unispeech"} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "hop", "window"), [("hubert", 320, 400), ("wavlm-layer", 320, 400), ("wav2vec2-bert", 320, 560), ("sew", 640, None)]
)
def test_frames_have_the_published_geometry(saved, name, hop, window):
    """Receptive fields of 25 ms every 20 ms (Baevski et al. 2020, arXiv:2006.11477, section 4.2); two frames 10 ms apart."""
    frames = hf(saved(name)).features
    assert (frames.sample_rate, frames.hop_length, frames.stack) == (16000, hop, 1)
    assert frames.frame_centers(5).diff().tolist() == [hop] * 4
    if window is not None:
        assert frames.frame_centers(1).tolist() == [window // 2]
        assert frames.num_samples(1) == window
    needed = frames.num_samples(3)
    assert (frames.num_frames(needed - 1), frames.num_frames(needed), frames.num_tokens(needed)) == (2, 3, 3)
    assert frames.num_frames(torch.tensor([10, needed])).tolist() == [0, 3]


CHAINS = [((10, 5, 0, 0), (3, 2, 1, 1), (8, 3, 2, 0)), ((400, 160, 0, 0), (2, 2, 0, 0)), ((9, 4, 4, 1),)]


@pytest.mark.parametrize("stages", CHAINS)
def test_frames_equal_a_chain_of_averages(stages):
    frames = Frames(16000, stages)
    for samples in (*range(frames.num_samples(1), 1000, 97), 1300):
        signal = torch.eye(samples)
        for window, stride, before, after in stages:
            signal = nn.functional.pad(signal, (before, after)).unfold(-1, window, stride).mean(-1)
        assert frames.num_frames(samples) == signal.shape[1]
    seen = [column.nonzero().flatten()[[0, -1]].tolist() for column in signal.T]
    whole = max(last - first for first, last in seen)  # frames at the ends see padding, too
    for (first, last), center in zip(seen, frames.frame_centers(len(seen)).tolist(), strict=True):
        assert center == (first + last + 1) // 2 or last - first < whole


def test_labels_can_be_built_on_these_frames(saved):
    """Hydra passes such an object on. It would turn a dataclass into a config."""
    frames = hf(saved("hubert")).features
    labels = instantiate({"_target_": "audiot.data.labels.FrameLabels", "tier": "phones"}, features=frames)
    assert labels.features is frames


def test_a_click_moves_the_states_around_its_frame(saved):
    """Whisper's state t is centred on sample 320 t."""
    upstream = hf(saved("whisper"))
    assert upstream.features.frame_centers(4).tolist() == [0, 320, 640, 960]
    quiet = speech(count=1)[:, :6000] * 0.01
    click = quiet.clone()
    click[0, 2560] += 0.001
    with torch.no_grad():
        lengths = torch.tensor([6000])
        moved = (upstream(click, lengths)[0] - upstream(quiet, lengths)[0])[0, 0].norm(dim=-1)
    assert moved.nonzero().flatten().tolist() == [7, 8, 9]


def test_whisper_windows_do_not_see_each_other(saved):
    upstream = hf(saved("whisper"))
    waveforms, lengths = speech(15000, 2), torch.tensor([15000, 3000])
    with torch.no_grad():
        states, counts = upstream(waveforms, lengths)
        assert counts.tolist() == [47, 9]  # ceil(floor(N / 160) / 2)
        second, (count,) = upstream(waveforms[:1, 6400:12800], torch.tensor([6400]))
        assert count == 20
        torch.testing.assert_close(states[:, :1, 20:40], second, rtol=1e-4, atol=1e-5)


def test_waveforms_that_do_not_fit_are_refused(saved):
    upstream = hf(saved("hubert"))
    with pytest.raises(ValueError, match=r"waveforms must be \(batch, samples\) of floats .*, found \(8000,\) torch.float32"):
        upstream(speech()[0], torch.tensor([8000]))
    with pytest.raises(ValueError, match=r"item 1 of the batch has length 8001 but the waveforms have 8000 samples"):
        upstream(speech(count=2), torch.tensor([8000, 8001]))
    with pytest.raises(ValueError, match=r"item 1 of the batch has 399 samples: one state needs 400, .* shorter than 0.025 s"):
        upstream(speech(count=2), torch.tensor([8000, 399]))
    states, lengths = upstream(speech(count=2), torch.tensor([8000, 400]))
    assert lengths.tolist() == [24, 1]
    assert states.isfinite().all()


@pytest.mark.parametrize(
    "name", ["hubert", "wav2vec2-layer", "wav2vec2-adapter", "unispeech-sat", "sew", "wav2vec2-bert", "whisper"]
)
def test_rebuild_needs_the_config_alone(saved, name):
    upstream = hf(saved(name))
    config = json.loads(json.dumps(upstream.config))  # plain: a checkpoint keeps it
    assert saved(name) not in json.dumps(config)
    torch.manual_seed(1)
    again = rebuild(config).eval()
    with torch.no_grad():
        assert not again(batch(), LENGTHS)[0].allclose(upstream(batch(), LENGTHS)[0], atol=1e-3)
        again.load_state_dict(upstream.state_dict())
        assert again(batch(), LENGTHS)[0].equal(upstream(batch(), LENGTHS)[0])
    assert json.loads(json.dumps(again.config)) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_trained_and_training_mode_is_reproducible(saved, name):
    """Only dropout acts in training mode, and every parameter has a gradient, which distributed training needs."""
    upstream = hf(saved(name)).train()

    def run(seed):
        torch.manual_seed(seed)
        np.random.seed(seed + 100)
        return upstream(batch(), LENGTHS)[0]

    first = run(3)
    assert first.shape[0] == 4
    torch.testing.assert_close(run(3), first, rtol=0, atol=0)
    first.square().sum().backward()
    lacking = [key for key, parameter in upstream.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert lacking == []


@pytest.mark.parametrize("name", ["hubert", "hubert-layer", "wav2vec2-conformer", "sew-d", "wav2vec2-bert", "whisper"])
def test_top_is_what_stands_above_the_lower_layers(saved, name):
    upstream = hf(saved(name))
    upstream.requires_grad_(False)
    for module in upstream.top(2):
        module.requires_grad_(True)
    trained = {key for key, value in upstream.named_parameters() if value.requires_grad}
    states, _ = upstream(batch(), LENGTHS)
    reached = []
    for number in range(4):
        upstream.zero_grad()
        states[number].square().sum().backward(retain_graph=True)
        reached.append({key for key, value in upstream.named_parameters() if value.grad is not None and value.grad.any()})
    assert reached[0] == reached[1] == set()
    assert reached[2] < reached[3] <= trained
    assert all(key.endswith("k_proj.bias") for key in trained - reached[3])  # the softmax takes no notice of these
    with pytest.raises(ValueError, match=r"downstream.top_layers must be between 1 and the upstream's 3 layers, found 4"):
        upstream.top(4)


def test_whisper_leaves_its_decoder_behind(saved):
    upstream = hf(saved("whisper"))
    assert not [name for name, _ in upstream.named_parameters() if "decoder" in name]


def test_checkpoints_with_a_head_give_their_encoder(tmp_path):
    for number, model in enumerate(
        (
            HubertForCTC(CONFIGS["hubert"]),
            Wav2Vec2ForCTC(CONFIGS["wav2vec2-layer"]),
            WhisperForConditionalGeneration(CONFIGS["whisper"]),
        )
    ):
        folder = save(model.config, tmp_path / str(number), model)
        upstream = hf(folder)
        inner = model.model.encoder if number == 2 else model.base_model
        assert dict(upstream.model.named_parameters()).keys() <= dict(inner.named_parameters()).keys()
        for name, parameter in upstream.model.named_parameters():
            assert parameter.equal(inner.get_parameter(name))


def test_a_processor_holds_the_feature_extractor_too(tmp_path):
    """Transformers saves models fine-tuned for speech recognition in this form."""
    folder = save(CONFIGS["hubert"], tmp_path)
    expected = hf(folder)(batch(), LENGTHS)[0]
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=True), tokenizer).save_pretrained(folder)
    assert not (tmp_path / "preprocessor_config.json").is_file()
    assert hf(folder)(batch(), LENGTHS)[0].equal(expected)


def test_half_precision_checkpoints_are_read_in_float32(tmp_path):
    torch.manual_seed(0)
    folder = save(CONFIGS["hubert"], tmp_path, AutoModel.from_config(CONFIGS["hubert"]).half())
    assert {parameter.dtype for parameter in hf(folder).parameters()} == {torch.float32}


def test_the_feature_extractor_says_whether_to_normalise(tmp_path):
    folder = save(CONFIGS["hubert-layer"], tmp_path)

    def difference():
        return (hf(folder)(speech() + 1, LENGTHS)[0] - hf(folder)(speech(), LENGTHS)[0]).abs().max()

    assert difference() < 1e-3
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    assert difference() > 0.1


def test_autocast_gives_states_for_batches_of_either_kind(saved):
    for name in ("hubert", "hubert-layer", "wav2vec2-bert", "whisper"):
        upstream = hf(saved(name))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            states, _ = upstream(batch(), LENGTHS)
            with torch.autocast("cpu", enabled=False):
                expected, _ = upstream(batch(), LENGTHS)
        # Random weights make much of rounding, and how much of it there is depends on the CPU; other states would be off by 1.4.
        assert (states.float() - expected).norm() < 0.5 * expected.norm()


def test_replaced_attention_comes_along(tmp_path):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS["wav2vec2-layer"])
    replace_self_attention(model, "synthesizer_random", layers=[0, 2], max_frames=40)
    folder = save(CONFIGS["wav2vec2-layer"], tmp_path, model)
    upstream = hf(folder)
    wanted = torch.stack(model.eval()(speech()[:1], output_hidden_states=True).hidden_states)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    torch.testing.assert_close(hf(folder)(speech()[:1], LENGTHS[:1])[0][:-1], wanted[:-1], rtol=1e-4, atol=1e-5)
    again = rebuild(json.loads(json.dumps(upstream.config))).eval()
    again.load_state_dict(upstream.state_dict())
    assert again(batch(), LENGTHS)[0].equal(upstream(batch(), LENGTHS)[0])
    alone, (count,) = upstream(batch()[1:2, : LENGTHS[1]], LENGTHS[1:2])
    torch.testing.assert_close(upstream(batch(), LENGTHS)[0][:, 1, :count], alone[:, 0], rtol=1e-4, atol=1e-4)


def test_an_exported_audiot_encoder_is_the_checkpoint_itself(tiny, tmp_path):
    torch.manual_seed(0)
    encoder = AudioEncoder(tiny["features"], tiny["model"]).eval()
    save_encoder(tmp_path / "encoder", encoder)
    AudiotModel.from_encoder(encoder).save_pretrained(tmp_path / "hf")
    one, other = checkpoint(str(tmp_path / "encoder")), hf(str(tmp_path / "hf"))
    assert isinstance(other, EncoderUpstream)
    assert not other.training
    assert other.config == one.config
    for a, b in zip(one(batch(), LENGTHS), other(batch(), LENGTHS), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "a model of type bert can't be an upstream, it takes input_ids, not audio: choose wav2vec2, .*whisper"),
        (ViTConfig(), "a model of type vit can't be an upstream, it takes pixel_values, not audio"),
        (ASTConfig(), "audio-spectrogram-transformer can't be an upstream, its states are patches of time and frequency"),
        (Speech2TextConfig(), "speech_to_text can't be an upstream, its division of audio into frames is not known here"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    check_refused(str(tmp_path), ValueError, message)


def check_refused(path, kind, message, **options):
    with pytest.raises(kind, match=message) as caught:
        hf(path, **options)
    assert "\n" not in str(caught.value)
    assert f"upstream.path={path}" in str(caught.value)


def test_missing_things_are_named(saved, tmp_path, monkeypatch):
    check_refused(str(tmp_path / "nowhere"), FileNotFoundError, r"no folder at upstream.path=.*nowhere: give one")
    check_refused("./nowhere", FileNotFoundError, r"no folder at")
    check_refused("outputs/run/encoder", FileNotFoundError, r"no folder at")
    check_refused(str(tmp_path), FileNotFoundError, "has no config.json")
    CONFIGS["hubert"].save_pretrained(tmp_path)
    check_refused(str(tmp_path), ValueError, r"preprocessor_config\.json is missing: also call save_pretrained")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    check_refused(str(tmp_path), ValueError, r"model\.safetensors")
    (tmp_path / "file").touch()
    check_refused(str(tmp_path / "file"), ValueError, "is a file: give the folder")
    check_refused("no such name", FileNotFoundError, "none on the hub .*check the name and the network")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files,\nand couldn't find them.")

    monkeypatch.setattr("transformers.configuration_utils.cached_file", offline)
    monkeypatch.setattr("transformers.configuration_utils.cached_files", offline, raising=False)
    check_refused("somebody/some-model", FileNotFoundError, "none on the hub .*couldn't connect .*the network")


def test_incomplete_or_broken_weights_are_refused(tmp_path):
    folder = save(CONFIGS["hubert"], tmp_path)
    path = tmp_path / "model.safetensors"
    content, weights = path.read_bytes(), load_file(path)
    save_file({name: value for name, value in weights.items() if ".layers.1." not in name}, path, {"format": "pt"})
    check_refused(folder, ValueError, r"\d+ weights are missing \(encoder.layers.1.*: it is not a complete hubert model")
    path.write_bytes(content[:-10])
    check_refused(folder, ValueError, "its weights are truncated or not safetensors")
    path.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 30}))
    check_refused(folder, ValueError, r"its weights do not match its config\.json")
    (tmp_path / "config.json").write_text("{")
    check_refused(folder, ValueError, "not a valid JSON file")


def test_code_of_the_model_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    code = "from transformers import HubertConfig as Own, HubertModel as OwnModel"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\n{code}\n")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    check_refused(str(tmp_path), ValueError, "the model has its own code, which is not run")
    assert not marker.exists()


def test_a_pickle_with_code_is_not_run(tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    folder = save(CONFIGS["hubert"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    hf(folder)
    torch.save(weights | {"evil": Evil()}, tmp_path / "pytorch_model.bin")
    check_refused(folder, ValueError, r"pytorch_model\.bin holds more than tensors and was not loaded: .* safetensors")
    assert not marker.exists()


def test_another_feature_extractor_is_refused(tmp_path):
    folder = save(CONFIGS["hubert"], tmp_path)
    WhisperFeatureExtractor().save_pretrained(folder)
    check_refused(folder, ValueError, "its feature extractor must be a Wav2Vec2FeatureExtractor, found WhisperFeatureExtractor")
