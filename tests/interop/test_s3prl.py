"""Reading and writing S3PRL's checkpoints, compared with a plain computation, and with S3PRL's results if available."""

import argparse
import builtins
import math
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import nn
from torchaudio.compliance import kaldi

from audiot.checkpoint import AudioEncoder, load_encoder, save_encoder, save_objective
from audiot.commands import export_s3prl as export_command
from audiot.commands import import_s3prl as import_command
from audiot.commands.arguments import parse
from audiot.downstream.upstream import rebuild
from audiot.interop.s3prl import export_s3prl, import_s3prl
from audiot.interop.s3prl_upstream import UpstreamExpert, audiot_local, register
from audiot.objectives.reconstruction import Reconstruction
from audiot.pretraining import build

NAMES = ["kaldi_fbank80", "kaldi_fbank240", "logmel80", "audioalbert_fbank240", "prenorm_fbank240"]
FBANK = {"num_mel_bins": 20, "frame_length": 25.0, "frame_shift": 10.0, "use_log_fbank": True}


@pytest.fixture(scope="module")
def given():
    """The folder of S3PRL's own checkpoints and what its code computes from them."""
    if "AUDIOT_TEST_DATA" not in os.environ:
        pytest.skip("AUDIOT_TEST_DATA is not set")
    return Path(os.environ["AUDIOT_TEST_DATA"]) / "s3prl"


def speech(num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(num_samples) / 16000
    voice = torch.stack([torch.sin(2 * math.pi * 110 * k * time) / k for k in range(1, 20)]).sum(0)
    return 0.1 * voice * (0.6 + 0.4 * torch.sin(20 * time)) + 0.02 * torch.randn(num_samples, generator=generator)


# A checkpoint in S3PRL's layout, and S3PRL's computation step by step.


def kaldi_audio(kind="fbank", order=0, use_cmvn=True, **options):
    settings = FBANK if kind == "fbank" else {"num_ceps": 13, "frame_length": 25.0, "frame_shift": 10.0}
    return {
        "kaldi": {"feat_type": kind, kind: settings | options},
        "delta": {"order": order, "win_length": 5},
        "cmvn": {"use_cmvn": use_cmvn},
    }


def stft_audio(kind="mel", delta=0, cmvn=True, **options):
    heard = {"feat_type": kind, "channel": 0, "log": True, "delta": delta, "cmvn": cmvn}
    sizes = {"target_level": -25, "win_ms": 25, "hop_ms": 10, "n_freq": 201, "n_mels": 20, "n_mfcc": 13}
    return sizes | {"input": heard, "target": heard} | options


def checkpoint(audio, num_channels, layers=2, shared=False, pre=False, sequence_length=1500, seed=0, **transformer):
    """Random weights of a transformer, 16 wide."""
    generator = torch.Generator().manual_seed(seed)
    weights = OrderedDict()

    def linear(name, inputs, outputs, into):
        into[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        into[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    def norm(name, into, like=None):
        into[f"{name}.weight"] = 1 + 0.1 * torch.randn(16, generator=generator) if like is None else into[f"{like}.weight"]
        into[f"{name}.bias"] = 0.1 * torch.randn(16, generator=generator) if like is None else into[f"{like}.bias"]

    linear("input_representations.spec_transform", num_channels, 16, weights)
    norm("input_representations.LayerNorm", weights)
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        if shared and index:
            first = [(name, value) for name, value in weights.items() if name.startswith("encoder.layer.0.")]
            weights |= {name.replace("layer.0.", f"layer.{index}."): value for name, value in first}
            continue
        for projection in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{projection}", 16, 16, weights)
        linear(f"{layer}.attention.output.dense", 16, 16, weights)
        norm(f"{layer}.attention.output.LayerNorm", weights)
        if pre:
            norm(f"{layer}.attention.LayerNorm", weights, f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 16, 24, weights)
        linear(f"{layer}.output.dense", 24, 16, weights)
        norm(f"{layer}.output.LayerNorm", weights)
        if pre:
            norm(f"{layer}.LayerNorm", weights, f"{layer}.output.LayerNorm")
    if pre:
        for index in range(layers + 1):
            norm(f"encoder.LayerNorm.{index}", weights)
    head = OrderedDict()
    linear("dense", 16, 16, head)
    norm("LayerNorm", head)
    linear("output", 16, num_channels, head)
    options = {
        "input_dim": -1,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "share_layer": shared,
        "pre_layer_norm": pre,
    }
    config = {"transformer": options | transformer, "task": {"sequence_length": sequence_length}, "audio": audio}
    return {
        "Optimizer": {},
        "Step": 1,
        "Config": {"runner": {}},
        "Upstream_Config": config,
        "Transformer": weights,
        "SpecHead": head,
    }


def plain_features(audio, waveform):
    """Features of one waveform (T, C)."""
    if "kaldi" in audio:
        kind = audio["kaldi"]["feat_type"]
        frames = getattr(kaldi, kind)(waveform[None], sample_frequency=16000, **audio["kaldi"][kind])
        order, use_cmvn = audio["delta"]["order"], audio["cmvn"]["use_cmvn"]
    else:
        waveform = waveform * 10 ** (audio["target_level"] / 20) / waveform.square().mean().sqrt()
        spectrum = torch.stft(waveform, 400, 160, window=torch.hann_window(400), pad_mode="reflect", return_complex=True)
        power = spectrum.abs().square()
        if audio["input"]["feat_type"] == "mel":
            power = torchaudio.transforms.MelScale(audio["n_mels"])(power)
        frames = (power + 1e-10).log().T
        order, use_cmvn = audio["input"]["delta"], audio["input"]["cmvn"]
    parts = [frames.T]
    for _ in range(order):
        parts.append(torchaudio.functional.compute_deltas(parts[-1]))
    frames = torch.cat(parts).T
    return (frames - frames.mean(0)) / frames.std(0) if use_cmvn else frames


def plain_states(content, waveform):
    """Hidden states of one waveform, in chunks where it is long (layers + 1, T, d)."""
    config = content["Upstream_Config"]
    features = plain_features(config["audio"], waveform)
    longest = config["task"]["sequence_length"] or len(features)
    chunks = features.chunk(math.ceil(len(features) / longest))
    return torch.cat([plain_states_of(content, chunk) for chunk in chunks], dim=1)


def plain_states_of(content, features):
    weights, options = content["Transformer"], content["Upstream_Config"]["transformer"]
    eps, pre, heads = float(options["layer_norm_eps"]), options["pre_layer_norm"], options["num_attention_heads"]
    width = options["hidden_size"]

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    angles = torch.arange(len(features))[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    hidden = norm("input_representations.LayerNorm", linear("input_representations.spec_transform", features) + positions)
    states = [hidden]
    for index in range(options["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        heard = norm(f"{layer}.attention.LayerNorm", hidden) if pre else hidden
        query, key, value = (linear(f"{layer}.attention.self.{part}", heard) for part in ("query", "key", "value"))
        query, key, value = (part.chunk(heads, -1) for part in (query, key, value))
        mixed = [(q @ k.T / q.shape[1] ** 0.5).softmax(-1) @ v for q, k, v in zip(query, key, value, strict=True)]
        hidden = hidden + linear(f"{layer}.attention.output.dense", torch.cat(mixed, -1))
        hidden = hidden if pre else norm(f"{layer}.attention.output.LayerNorm", hidden)
        heard = norm(f"{layer}.LayerNorm", hidden) if pre else hidden
        inner = linear(f"{layer}.intermediate.dense", heard)
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        hidden = hidden + linear(f"{layer}.output.dense", inner)
        hidden = hidden if pre else norm(f"{layer}.output.LayerNorm", hidden)
        states.append(hidden)
    return torch.stack([norm(f"encoder.LayerNorm.{index}", state) if pre else state for index, state in enumerate(states)])


def saved(content, folder, **options):
    path = folder / "x.ckpt"
    torch.save(content, path, **options)
    return path


@torch.no_grad()
def states(encoder, waveform):
    return encoder(waveform[None])[0][:, 0]


# Import


@pytest.mark.parametrize("name", NAMES)
def test_imported_checkpoints_give_s3prls_features_and_hidden_states(given, name):
    encoder, head = import_s3prl(given / f"{name}.ckpt")
    stored = {key: torch.from_numpy(value) for key, value in np.load(given / f"{name}.npz").items()}
    features, _ = encoder.features(stored["wav0"][None])
    torch.testing.assert_close(features[0], stored["features0"], atol=1e-4, rtol=0)
    for number in (0, 1):
        hidden = states(encoder, stored[f"wav{number}"])
        torch.testing.assert_close(hidden, stored[f"hidden_alone{number}"][:, 0], atol=1e-4, rtol=0)
    assert head is not None
    weights = torch.load(given / f"{name}.ckpt")["SpecHead"]
    assert head.output.weight.equal(weights["output.weight"])
    assert head.norm.bias.equal(weights["LayerNorm.bias"])


@pytest.mark.parametrize("name", NAMES)
def test_imported_checkpoints_give_a_waveform_the_same_states_in_a_batch_as_alone(given, name):
    encoder, _ = import_s3prl(given / f"{name}.ckpt")
    waveforms = [speech(9000, seed=1), speech(16000)]
    with torch.no_grad():
        together, lengths = encoder(nn.utils.rnn.pad_sequence(waveforms, batch_first=True), torch.tensor([9000, 16000]))
    for number, waveform in enumerate(waveforms):
        torch.testing.assert_close(together[:, number, : lengths[number]], states(encoder, waveform), atol=1e-5, rtol=0)


VARIANTS = {
    "fbank": (kaldi_audio(), 20, {}),
    "fbank_deltas": (kaldi_audio(order=2), 60, {}),
    "fbank_options": (kaldi_audio(use_cmvn=False, low_freq=60.0, high_freq=-400.0, frame_length=20.0), 20, {}),
    "mfcc": (kaldi_audio("mfcc", order=1), 26, {}),
    "log_mel": (stft_audio(), 20, {}),
    "log_mel_deltas": (stft_audio(delta=2, cmvn=False, target_level=-10), 60, {}),
    "linear": (stft_audio("linear"), 201, {}),
    "shared": (kaldi_audio(), 20, {"shared": True, "layers": 3}),
    "pre": (kaldi_audio(), 20, {"pre": True}),
    "pre_shared": (kaldi_audio(), 20, {"pre": True, "shared": True}),
    "layer_norm_eps": (kaldi_audio(), 20, {"layer_norm_eps": "1e-2"}),  # as YAML reads it
    "chunks": (stft_audio(), 20, {"sequence_length": 30}),
    "whole": (kaldi_audio(), 20, {"sequence_length": 0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_supported_setting_equals_a_plain_computation(variant, tmp_path):
    audio, num_channels, options = VARIANTS[variant]
    content = checkpoint(audio, num_channels, **options)
    encoder, head = import_s3prl(saved(content, tmp_path))
    for waveform in (speech(13000), speech(1700)):
        torch.testing.assert_close(states(encoder, waveform), plain_states(content, waveform), atol=1e-4, rtol=0)
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    weights = content["SpecHead"]
    inner = nn.functional.gelu(nn.functional.linear(hidden, weights["dense.weight"], weights["dense.bias"]))
    inner = nn.functional.layer_norm(inner, (16,), weights["LayerNorm.weight"], weights["LayerNorm.bias"], 1e-12)
    torch.testing.assert_close(head(hidden), nn.functional.linear(inner, weights["output.weight"], weights["output.bias"]))


def test_long_and_short_waveforms_of_a_batch_are_chunked_as_alone(tmp_path):
    content = checkpoint(kaldi_audio(), 20, sequence_length=30)
    encoder, _ = import_s3prl(saved(content, tmp_path))
    waveforms = [speech(num_samples, seed=num_samples) for num_samples in (13000, 2000, 9000)]
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    with torch.no_grad():
        together, num_states = encoder(nn.utils.rnn.pad_sequence(waveforms, batch_first=True), lengths)
    for number, waveform in enumerate(waveforms):
        expected = plain_states(content, waveform)
        assert num_states[number] == expected.shape[1]
        torch.testing.assert_close(together[:, number, : num_states[number]], expected, atol=1e-4, rtol=0)
        assert not together[:, number, num_states[number] :].any()


def test_digital_silence_is_no_feature(tmp_path):
    for audio in (kaldi_audio(), stft_audio()):
        encoder, _ = import_s3prl(saved(checkpoint(audio, 20), tmp_path))
        features, _ = encoder.features(torch.zeros(2, 16000), torch.tensor([16000, 15700]))
        assert features.abs().max() < 0.05  # nothing but rounding, which S3PRL would scale up to 1


def test_old_files_are_read(tmp_path, monkeypatch):
    """The format before zip archives, the config under another key, TensorFlow's names, and objects of its optimisers."""
    content = checkpoint(kaldi_audio(), 20)
    expected = plain_states(content, speech(5000))
    content["Config"] = content.pop("Upstream_Config")
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for part in ("Transformer", "SpecHead"):
        for new, old in renamed.items():
            content[part] = OrderedDict((name.replace(new, old), value) for name, value in content[part].items())
    optimizers = types.ModuleType("optimizers")
    optimizers.WarmupLinearSchedule = type("WarmupLinearSchedule", (), {"__module__": "optimizers"})
    monkeypatch.setitem(sys.modules, "optimizers", optimizers)
    schedule = optimizers.WarmupLinearSchedule()
    schedule.warmup = 0.07
    content |= {"Args": argparse.Namespace(seed=1337), "Optimizer": {"param_groups": [{"schedule": schedule}]}}
    path = saved(content, tmp_path, _use_new_zipfile_serialization=False)
    monkeypatch.delitem(sys.modules, "optimizers")
    encoder, head = import_s3prl(path)
    torch.testing.assert_close(states(encoder, speech(5000)), expected, atol=1e-4, rtol=0)
    assert head is not None


def test_a_head_for_another_target_is_left_out(tmp_path):
    content = checkpoint(stft_audio(), 20)
    content["SpecHead"] |= {"output.weight": torch.zeros(201, 16), "output.bias": torch.zeros(201)}
    assert import_s3prl(saved(content, tmp_path))[1] is None
    del content["SpecHead"]
    assert import_s3prl(saved(content, tmp_path))[1] is None


# Refusals


class Code:
    """Object that is pickled as a function call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("function", ["system", "eval", "exec"])
def test_code_in_a_file_is_refused_and_never_run(function, form, tmp_path):
    ran = tmp_path / "ran"
    code = {
        "system": Code(os.system, f"touch {ran}"),
        "eval": Code(builtins.eval, f"open({str(ran)!r}, 'w')"),
        "exec": Code(builtins.exec, f"open({str(ran)!r}, 'w')"),
    }[function]
    content = checkpoint(kaldi_audio(), 20) | {"Args": code}
    path = tmp_path / "x.ckpt"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(code, protocol=2))
    else:
        saved(content, tmp_path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=rf"x\.ckpt is refused: it names the code \S*{function},.*nothing was run"):
        import_s3prl(path)
    assert not ran.exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "x.ckpt"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*x\.ckpt"):
        import_s3prl(path)
    with pytest.raises(ValueError, match="is a folder, but an S3PRL checkpoint is a file"):
        import_s3prl(tmp_path)
    for content in (b"", b"these are words\n" * 100, bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.ckpt is truncated or not a PyTorch checkpoint"):
            import_s3prl(path)
    for zipped in (True, False):
        whole = saved(checkpoint(kaldi_audio(), 20), tmp_path, _use_new_zipfile_serialization=zipped).read_bytes()
        for share in (0.1, 0.5, 0.99):
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ValueError, match=r"x\.ckpt is truncated or not a PyTorch checkpoint"):
                import_s3prl(path)


def test_checkpoints_of_another_kind_are_named(tmp_path):
    apc = {"Config": {"model": {"paras": {}}}, "Upstream_Config": {"model": {}, "data": {}}, "model": {"rnn": torch.zeros(2)}}
    found = "is no Mockingjay, TERA or AudioALBERT of S3PRL: expected Transformer and a transformer's config, found"
    with pytest.raises(ValueError, match=f"{found} Config, Upstream_Config, model"):
        import_s3prl(saved(apc, tmp_path))
    with pytest.raises(ValueError, match=f"{found} Tensor"):
        import_s3prl(saved(torch.zeros(2), tmp_path))
    content = checkpoint(kaldi_audio(), 20)
    del content["Upstream_Config"]["audio"]
    with pytest.raises(ValueError, match="reads features from files"):
        import_s3prl(saved(content, tmp_path))


@pytest.mark.parametrize(
    ("audio", "transformer", "message"),
    [
        (kaldi_audio(), {"hidden_act": "relu"}, "transformer.hidden_act is relu, but audiot's feed-forward networks have gelu"),
        (kaldi_audio(), {"num_attention_heads": 3}, "embed_dim 16 is not a multiple of num_heads 3"),
        (kaldi_audio(), {"num_hidden_layers": None}, "S3PRL could not read the config in"),
        (kaldi_audio("spectrogram"), {}, "audio.kaldi.feat_type is spectrogram, but audiot only reproduces fbank or mfcc"),
        (kaldi_audio(use_energy=True), {}, "audio.kaldi.fbank.use_energy is True, but audiot only reproduces False"),
        (kaldi_audio(dither=1.0), {}, "audio.kaldi.fbank.dither is 1.0"),
        (kaldi_audio(order=3), {}, "delta_order must be 0, 1 or 2, found 3"),
        (kaldi_audio() | {"delta": {"mode": "constant"}}, {}, "audio.delta.mode is constant"),
        (kaldi_audio() | {"cmvn": {"use_cmvn": True, "eps": 0.1}}, {}, "its CMVN adds eps=0.1 to deviations"),
        (kaldi_audio() | {"cmvn": {}}, {}, "the config in .* lacks 'use_cmvn'"),
        (kaldi_audio() | {"kaldi": 80}, {}, "S3PRL could not read the config in"),
        (stft_audio("phase"), {}, "audio.input.feat_type is phase, but audiot only reproduces mel or linear"),
        (stft_audio(input={"feat_type": "mel", "log": False}), {}, "audio.input.log is False, but audiot only reproduces True"),
    ],
)
def test_settings_that_audiot_cannot_reproduce_are_named(audio, transformer, message, tmp_path):
    content = checkpoint(audio, 20)
    content["Upstream_Config"]["transformer"] |= transformer
    with pytest.raises(ValueError, match=message) as caught:
        import_s3prl(saved(content, tmp_path))
    assert "x.ckpt" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights: weights.pop("encoder.layer.1.output.dense.bias"), "1 missing .encoder.layer.1.output.*, 0 unknown"),
        (lambda weights: weights.update({"encoder.layer.2.LayerNorm.bias": torch.zeros(16)}), "0 missing .*, 1 unknown"),
        (
            lambda weights: weights.update({"encoder.layer.1.output.dense.bias": torch.zeros(9)}),
            "differs from weights that must be equal",
        ),
        (
            lambda weights: weights.update({"input_representations.spec_transform.bias": torch.zeros(9)}),
            "do not fit the model: encoder.input.bias is 9, by the config 16",
        ),
        (
            lambda weights: weights.update({"input_representations.spec_transform.bias": 0.0}),
            "expected tensors by their names, found input_representations.spec_transform.bias, a float",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_named(damage, message, tmp_path):
    content = checkpoint(kaldi_audio(), 20, shared=True)
    damage(content["Transformer"])
    with pytest.raises(ValueError, match=message) as caught:
        import_s3prl(saved(content, tmp_path))
    assert "x.ckpt" in str(caught.value)


# Export


def structure(value):
    """Keys in their order, shapes and types."""
    if isinstance(value, dict):
        return type(value), [(name, structure(part)) for name, part in value.items()]
    return (value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value)


def save_with_head(folder, encoder, head):
    save_encoder(folder, encoder)
    if head is not None:
        objective = Reconstruction(encoder)
        objective.head.load_state_dict(head.state_dict())
        save_objective(folder, MOCKINGJAY, objective)


@pytest.mark.parametrize("name", NAMES)
def test_given_checkpoints_come_back_from_a_round_trip(given, name, tmp_path):
    encoder, head = import_s3prl(given / f"{name}.ckpt")
    save_with_head(tmp_path / "encoder", encoder, head)
    export_s3prl(tmp_path / "encoder", tmp_path / "x.ckpt")
    original, back = torch.load(given / f"{name}.ckpt"), torch.load(tmp_path / "x.ckpt")
    assert structure(back) == structure(original)
    assert back["Upstream_Config"] == original["Upstream_Config"]
    again, _ = import_s3prl(tmp_path / "x.ckpt")
    waveform = torch.from_numpy(np.load(given / f"{name}.npz")["wav0"])
    assert states(again, waveform).equal(states(encoder, waveform))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_supported_setting_comes_back_from_a_round_trip(variant, tmp_path):
    audio, num_channels, options = VARIANTS[variant]
    encoder, head = import_s3prl(saved(checkpoint(audio, num_channels, **options), tmp_path))
    save_with_head(tmp_path / "encoder", encoder, head)
    export_s3prl(tmp_path / "encoder", tmp_path / "y.ckpt")
    again, head_again = import_s3prl(tmp_path / "y.ckpt")
    assert again.config == encoder.config
    assert states(again, speech(13000)).equal(states(encoder, speech(13000)))
    hidden = torch.randn(3, 16)
    assert head_again(hidden).equal(head(hidden))


def audiot_encoder(features=None, **model):
    settings = {
        "_target_": "audiot.model.Encoder",
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 24,
        "max_frames": 100,
        "attention": {"_target_": "audiot.attention.query_key.QueryKey"},
        "positions": {"_target_": "audiot.positions.Sinusoid"},
    }
    torch.manual_seed(0)
    encoder = AudioEncoder({"_target_": "audiot.features.KaldiFbank", "num_mel_bins": 20} | (features or {}), settings | model)
    with torch.no_grad():
        for parameter in encoder.parameters():  # norms and biases too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


MOCKINGJAY = {"_target_": "audiot.objectives.reconstruction.Reconstruction"}
LOG_MEL = {"_target_": "audiot.features.LogMel", "n_mels": 20, "center": True, "add_floor": True, "level_db": -25.0}


@pytest.mark.parametrize("model", [{}, {"share_layers": True}, {"norm": "pre", "norm_states": True}, {"norm_eps": 1e-3}])
def test_an_encoder_of_audiots_own_is_s3prls_with_the_same_hidden_states(model, tmp_path):
    encoder = audiot_encoder(**model)
    save_encoder(tmp_path / "encoder", encoder)
    save_objective(tmp_path / "encoder", MOCKINGJAY, Reconstruction(encoder))
    export_s3prl(tmp_path / "encoder", tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt")
    waveform = speech(20000)  # longer than max_frames
    torch.testing.assert_close(states(encoder, waveform), plain_states(content, waveform), atol=1e-4, rtol=0)
    options = {"shared": model.get("share_layers", False), "pre": "norm" in model}
    expected = checkpoint(kaldi_audio(), 60, **options)
    for part in ("Transformer", "SpecHead"):
        assert structure(content[part]) == structure(expected[part])
    assert content["Upstream_Config"]["transformer"].keys() == expected["Upstream_Config"]["transformer"].keys()


def test_an_encoder_without_a_head_is_exported_and_equal_weights_give_equal_bytes(tmp_path):
    save_encoder(tmp_path / "encoder", audiot_encoder())
    for name in ("x.ckpt", "y.ckpt"):
        export_s3prl(tmp_path / "encoder", tmp_path / name)
    assert "SpecHead" not in torch.load(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_bytes() == (tmp_path / "y.ckpt").read_bytes()


ROTARY = {"positions": {"_target_": "audiot.positions.Rotary"}}
DENSE = {"attention": {"_target_": "audiot.attention.synthesizer_dense.SynthesizerDense"}}
SHARED = {"attention": {"_target_": "audiot.attention.query_key.QueryKey", "share_query_key": True}}
MIXED = {"other_attention": {"_target_": "audiot.attention.query_key.QueryKey", "share_query_key": True}, "other_layers": [0]}
SCALED = {"positions": {"_target_": "audiot.positions.Sinusoid", "scale": 0.1}}


@pytest.mark.parametrize(
    ("features", "model", "message"),
    [
        ({}, ROTARY, r"its positions are Rotary\(\), S3PRL's Sinusoid with scale 1"),
        ({}, SCALED, r"its positions are Sinusoid\(scale=0.1\)"),
        ({}, DENSE, r"its attention is SynthesizerDense\(\), S3PRL's QueryKey"),
        ({}, SHARED, r"its attention is QueryKey\(share_query_key=True\)"),
        ({}, MIXED, "its layers have two mechanisms"),
        ({}, {"norm": "pre"}, r"a LayerNorm on every hidden state \(model.norm_states=true\)"),
        ({"stack": 3}, {}, "features.stack is 3, S3PRL's 1"),
        ({"subsample": 2}, {}, "features.subsample is 2, S3PRL's None"),
        ({"eps": 0.1}, {}, "features.eps is 0.1"),
        ({"sample_rate": 8000}, {}, "features.sample_rate is 8000, S3PRL's 16000"),
    ],
)
def test_encoders_that_s3prl_lacks_are_refused_with_the_reason_and_a_remedy(features, model, message, tmp_path):
    save_encoder(tmp_path / "encoder", audiot_encoder(features, **model))
    with pytest.raises(ValueError, match=message) as caught:
        export_s3prl(tmp_path / "encoder", tmp_path / "x.ckpt")
    assert "audiot.s3prl_upstream" in str(caught.value)
    assert not (tmp_path / "x.ckpt").exists()


def test_trained_convolutions_on_samples_are_refused(tmp_path):
    model = audiot_encoder().config["model"]
    save_encoder(tmp_path / "encoder", AudioEncoder({"_target_": "audiot.features.Waveform", "channels": 8}, model))
    with pytest.raises(ValueError, match="its features are Waveform"):
        export_s3prl(tmp_path / "encoder", tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"center": False}, "features.center is False, S3PRL's True"),
        ({"add_floor": False}, "features.add_floor is False, S3PRL's True"),
        ({"level_db": None}, "features.level_db is None"),
        ({"mel_scale": "slaney"}, "features.mel_scale is slaney, S3PRL's htk"),
        ({"n_fft": 512}, "features.n_fft is 512, S3PRL's 400"),
    ],
)
def test_log_mel_features_that_s3prl_lacks_are_refused(option, message, tmp_path):
    model = audiot_encoder().config["model"]
    save_encoder(tmp_path / "encoder", AudioEncoder(LOG_MEL | option, model))
    with pytest.raises(ValueError, match=message):
        export_s3prl(tmp_path / "encoder", tmp_path / "x.ckpt")


# What an imported encoder is good for


def test_the_upstream_gives_the_states_and_is_rebuilt_from_its_config(tmp_path):
    content = checkpoint(stft_audio(), 20, pre=True)
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("finetune", ["upstream=s3prl", f"upstream.path={saved(content, tmp_path)}", "run_dir=run", "data_dir=data"])
    upstream = instantiate(cfg.upstream)
    expected = plain_states(content, speech(6000))
    assert (upstream.num_states, upstream.state_dim, upstream.stack) == (3, 16, 1)
    again = rebuild(upstream.config)
    again.load_state_dict(upstream.state_dict())
    for one in (upstream, again.eval()):
        hidden, lengths = one(speech(6000)[None], torch.tensor([6000]))
        torch.testing.assert_close(hidden[:, 0], expected, atol=1e-4, rtol=0)
        assert lengths.tolist() == [expected.shape[1]]
    hidden.sum().backward()  # fine-tuning reaches the input
    assert upstream.encoder.encoder.num_layers == 2
    assert again.encoder.encoder.input.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("pre", [False, True])
def test_the_import_command_writes_an_encoder_that_pretraining_goes_on_from(pre, tmp_path, capsys):
    content = checkpoint(stft_audio(), 20, pre=pre)
    import_command.main(parse("import-s3prl", [str(saved(content, tmp_path)), str(tmp_path / "encoder")]))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next:   audiot finetune downstream=phone_linear upstream.path={tmp_path / 'encoder'}"
    expected = plain_states(content, speech(6000))
    torch.testing.assert_close(states(load_encoder(tmp_path / "encoder"), speech(6000)), expected, atol=1e-4, rtol=0)
    with initialize_config_module("audiot.conf", version_base="1.3"):
        module = build(
            compose("pretrain", [f"init={tmp_path / 'encoder'}", "objective=mockingjay", "run_dir=run", "data_dir=data"])
        )
    assert module.objective.head.output.weight.equal(content["SpecHead"]["output.weight"])
    module.log = lambda *arguments, **options: None  # there is no trainer
    lengths = torch.tensor([16000, 12000])
    batch = {"waveforms": torch.randn(2, 16000), "lengths": lengths, "keys": torch.tensor([1, 2]), "position": (0, 0)}
    module.train().training_step(batch, 0).backward()
    idle = [name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle  # DistributedDataParallel would wait for them
    with pytest.raises(FileExistsError, match="is there already"):
        import_command.main(parse("import-s3prl", [str(tmp_path / "x.ckpt"), str(tmp_path / "encoder")]))


def test_the_import_command_says_where_no_head_is_kept(tmp_path, capsys):
    content = checkpoint(stft_audio(), 20)
    del content["SpecHead"]
    import_command.main(parse("import-s3prl", [str(saved(content, tmp_path)), str(tmp_path / "encoder")]))
    assert "head    none for this input: continued pre-training begins with a new one" in capsys.readouterr().out


def test_the_export_command_writes_a_file_and_never_over_another(tmp_path, capsys):
    save_encoder(tmp_path / "encoder", audiot_encoder())
    export_command.main(parse("export-s3prl", [str(tmp_path / "encoder"), str(tmp_path / "x.ckpt")]))
    assert capsys.readouterr().out.splitlines()[-1].startswith("next:   in S3PRL: ")
    assert import_s3prl(tmp_path / "x.ckpt")[1] is None
    with pytest.raises(FileExistsError, match="is there already"):
        export_command.main(parse("export-s3prl", [str(tmp_path / "encoder"), str(tmp_path / "x.ckpt")]))


# audiot's encoders in S3PRL


def test_s3prl_hears_each_waveform_as_the_encoder_does_alone(tmp_path):
    encoder = audiot_encoder({"stack": 2}, **ROTARY)
    save_encoder(tmp_path / "encoder", encoder)
    expert = audiot_local(ckpt=tmp_path / "encoder", model_config=None, refresh=False).eval()
    waveforms = [speech(8000), speech(12345, seed=1), speech(600, seed=2)]
    with torch.no_grad():
        result = expert(waveforms)
    assert expert.get_downsample_rates("hidden_states") == 320
    assert len(result["hidden_states"]) == 3
    assert result["last_hidden_state"].equal(result["hidden_states"][-1])
    for number, waveform in enumerate(waveforms):
        expected = states(encoder, waveform)
        assert expected.shape[1] == encoder.features.num_tokens(len(waveform))
        for state, alone in zip(result["hidden_states"], expected, strict=True):
            torch.testing.assert_close(state[number, : len(alone)], alone, atol=1e-5, rtol=0)
            assert not state[number, len(alone) :].any()


def test_s3prl_gets_one_state_of_what_is_too_short(tmp_path):
    encoder = audiot_encoder({"stack": 2})
    save_encoder(tmp_path / "encoder", encoder)
    expert = UpstreamExpert(tmp_path / "encoder").eval()
    short = speech(100)
    with torch.no_grad():
        hidden = torch.stack(expert([short])["hidden_states"])
    torch.testing.assert_close(hidden[:, 0], states(encoder, nn.functional.pad(short, (0, 460))), atol=1e-6, rtol=0)


def test_s3prls_entry_refuses_a_config_and_another_sample_rate(tmp_path):
    save_encoder(tmp_path / "encoder", audiot_encoder({"sample_rate": 8000}))
    with pytest.raises(ValueError, match="takes no config"):
        audiot_local(tmp_path / "encoder", model_config="model.yaml")
    with pytest.raises(ValueError, match="takes audio at 8000 Hz, but S3PRL's is at 16000"):
        audiot_local(tmp_path / "encoder")
    with pytest.raises(FileNotFoundError, match="no encoder folder"):
        audiot_local(tmp_path / "nothing")


def test_register_makes_the_entry_an_attribute_of_s3prls_hub(monkeypatch):
    package, hub = types.ModuleType("s3prl"), types.ModuleType("s3prl.hub")
    package.hub = hub
    monkeypatch.setitem(sys.modules, "s3prl", package)
    monkeypatch.setitem(sys.modules, "s3prl.hub", hub)
    register()
    assert hub.audiot_local is audiot_local


# Files that were made to harm


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "tensors, which can't be those of num_hidden_layers=1000000000"),
        ({"hidden_size": 2**30}, "do not fit the model"),
        ({"intermediate_size": 2**40}, "do not fit the model"),
        ({"hidden_dropout_prob": float("inf")}, "x.ckpt"),
    ],
)
def test_sizes_that_the_weights_do_not_justify_are_refused_before_anything_is_allocated(change, words, tmp_path):
    content = checkpoint(kaldi_audio(), 20)
    content["Upstream_Config"]["transformer"] |= change
    with pytest.raises(ValueError, match=words):
        import_s3prl(saved(content, tmp_path))


@pytest.mark.parametrize("part", ["Transformer", "SpecHead"])
def test_one_number_can_not_stand_for_many(part, tmp_path):
    content = checkpoint(kaldi_audio(), 20)
    name = "output.bias" if part == "SpecHead" else "input_representations.spec_transform.bias"
    content[part][name] = torch.zeros(1).expand(20 if part == "SpecHead" else 2**40)
    with pytest.raises(ValueError, match=rf"x.ckpt: {name} has [\d,]+ numbers, of which the file holds only a part"):
        import_s3prl(saved(content, tmp_path))


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x.ckpt is not a regular file"):
        import_s3prl(tmp_path / "x.ckpt")
