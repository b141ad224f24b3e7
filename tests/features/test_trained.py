"""What every trained front end must keep: exact padding, one graph, gradients, and its place in files, training and tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from audiot.base.config import plain
from audiot.checkpoint import AudioEncoder, load_encoder, save_encoder
from audiot.data.labels import FrameLabels
from audiot.downstream.upstream import EncoderUpstream, FeaturesUpstream, rebuild, untrained
from audiot.features import Features, KaldiFbank, LogMel, Waveform
from audiot.features.base import scale_gradient
from audiot.model import length_mask
from audiot.pretraining import MaskedAcousticModel
from audiot.training.optimization import parameter_groups

LENGTHS = torch.tensor([9000, 4000, 7213, 1100])
CONFIGS = {
    "subsample 2": {"_target_": "audiot.features.LogMel", "n_mels": 20, "subsample": 2, "subsample_dim": 12},
    "subsample 4": {"_target_": "audiot.features.KaldiFbank", "num_mel_bins": 8, "subsample": 4, "subsample_dim": 12},
    "waveform": {"_target_": "audiot.features.Waveform", "channels": 12},
    "waveform, group": {"_target_": "audiot.features.Waveform", "channels": 12, "norm": "group"},
}
KINDS = {"Waveform": Waveform, "LogMel": LogMel, "KaldiFbank": KaldiFbank}
CODES = {"_target_": "audiot.objectives.best_rq.BestRQ", "num_codebooks": 2, "num_codes": 16, "span": 3}
TEACHING = {"_target_": "audiot.objectives.self_distillation.SelfDistillation", "num_codes": 8, "span": 3, "steps": 9}
CLUSTERS = {"_target_": "audiot.objectives.clusters.Clusters", "num_clusters": 8, "span": 3, "sample_s": 20.0}

each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: dict, dtype: torch.dtype = torch.float32) -> Features:
    torch.manual_seed(0)
    features = KINDS[config["_target_"].rsplit(".", 1)[1]](**{key: value for key, value in config.items() if key != "_target_"})
    with torch.no_grad():
        for parameter in features.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and scales matter
    return features.to(dtype)


def noise(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A batch whose padding is loud."""
    return 0.1 * torch.randn(len(LENGTHS), int(LENGTHS.max()), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def embedded(features: Features, waveforms: torch.Tensor, lengths: torch.Tensor | None = None) -> tuple:
    tokens, num_tokens = features(waveforms, lengths)
    valid = length_mask(num_tokens, tokens.shape[1])
    return features.embed(tokens, valid), num_tokens


@each
def test_an_utterance_gives_the_same_alone_and_in_any_batch(config):
    features, waveforms = build(config, torch.float64), noise(torch.float64)
    together, counts = embedded(features, waveforms, LENGTHS)
    assert together.shape == (4, counts.max(), features.embed_dim)
    others, _ = embedded(features, torch.cat([noise(torch.float64, 1)[:3], waveforms[3:]]), LENGTHS)
    for row, (length, count) in enumerate(zip(LENGTHS.tolist(), counts.tolist(), strict=True)):
        alone, _ = embedded(features, waveforms[row : row + 1, :length])
        torch.testing.assert_close(together[row, :count], alone[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(others[3, : counts[3]], together[3, : counts[3]], atol=1e-10, rtol=0)


@each
def test_what_stands_in_padded_tokens_changes_nothing(config):
    features = build(config, torch.float64)
    tokens, counts = features(noise(torch.float64), LENGTHS)
    valid = length_mask(counts, tokens.shape[1])
    loud = torch.where(valid[..., None], tokens, 1e3)
    torch.testing.assert_close(features.embed(loud, valid)[valid], features.embed(tokens, valid)[valid], atol=1e-10, rtol=0)


@each
def test_gradients_are_those_of_finite_differences(config):
    sizes = {"channels": 2} if "Waveform" in config["_target_"] else {"subsample_dim": 3}
    features = build(config | sizes, torch.float64)
    features.grad_scale = 1.0
    tokens, counts = features(noise(torch.float64)[:2, :2100], torch.tensor([2100, 1300]))
    valid = length_mask(counts, tokens.shape[1])
    names = [name for name, _ in features.named_parameters()]

    def output(*values):
        return torch.func.functional_call(_Embed(features), dict(zip(names, values, strict=True)), (tokens, valid))[valid]

    torch.autograd.gradcheck(output, list(features.parameters()), fast_mode=True)


class _Embed(torch.nn.Module):
    """A front end whose forward is its trained part."""

    def __init__(self, features):
        super().__init__()
        self.__dict__["features"] = features
        for name, part in features.named_children():
            self.add_module(name, part)

    def forward(self, tokens, valid):
        return self.features.embed(tokens, valid)


@each
def test_one_graph_holds_every_length_without_breaks(config):
    torch._dynamo.reset()
    features, graphs = build(config).double(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(features.embed, backend=backend, fullgraph=True, dynamic=True)
    for utterances, length in ((4, 9000), (3, 7213), (2, 5001)):
        lengths = LENGTHS[:utterances].clamp(max=length - 700).clone()
        tokens, counts = features(noise()[:utterances, :length], lengths)
        tokens, valid = tokens.double(), length_mask(counts, tokens.shape[1])
        torch.testing.assert_close(compiled(tokens, valid), features.embed(tokens, valid))
    assert len(graphs) == 1


@each
def test_half_precision_keeps_the_fixed_tokens_and_is_close(config):
    features, waveforms = build(config), noise()
    expected, counts = embedded(features, waveforms, LENGTHS)
    tokens, _ = features(waveforms, LENGTHS)
    valid = length_mask(counts, tokens.shape[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = features.embed(features(waveforms, LENGTHS)[0], valid)
    features.to(torch.bfloat16)
    assert {parameter.dtype for parameter in features.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(features(waveforms, LENGTHS)[0], tokens, atol=0, rtol=0)
    for half in (mixed, features.embed(tokens.bfloat16(), valid)):
        torch.testing.assert_close(half[valid].float(), expected[valid], atol=0.2, rtol=0)


def test_scaled_gradients_leave_the_values_as_they_are():
    values = torch.randn(100, requires_grad=True)
    scaled = scale_gradient(values, 0.1)
    assert torch.equal(scaled, values)
    scaled.square().sum().backward()
    torch.testing.assert_close(values.grad, 0.2 * values.detach())


@each
def test_grad_scale_reaches_the_convolutions(config):
    grads = []
    for scale in (1.0, 0.25):
        features = build(config | {"grad_scale": scale})
        output, _ = embedded(features, noise(), LENGTHS)
        output[:, 0].sin().sum().backward()
        grads.append([parameter.grad for name, parameter in features.named_parameters() if "convolutions" in name])
    assert grads[0]
    for whole, quarter in zip(*grads, strict=True):
        torch.testing.assert_close(quarter, 0.25 * whole)


# In a model


@each
def test_the_optimiser_a_random_control_and_an_exported_encoder_have_the_front_end(config, tiny, tmp_path):
    torch.manual_seed(0)
    encoder = AudioEncoder(config, tiny["model"]).eval()
    own = dict(encoder.features.named_parameters())
    grouped = {id(parameter) for group in parameter_groups(encoder, 0.1) for parameter in group["params"]}
    assert own
    assert {id(parameter) for parameter in own.values()} <= grouped
    save_encoder(tmp_path, encoder)
    hidden, counts = encoder(noise(), LENGTHS)
    loaded, loaded_counts = load_encoder(tmp_path)(noise(), LENGTHS)
    torch.testing.assert_close(loaded, hidden, atol=0, rtol=0)
    assert loaded_counts.tolist() == counts.tolist()
    half, _ = load_encoder(tmp_path, dtype="bfloat16")(noise(), LENGTHS)
    assert half.dtype == torch.bfloat16
    upstream = EncoderUpstream(encoder)
    fresh = untrained(upstream, seed=1)
    weight = next(name for name in upstream.state_dict() if "convolutions" in name)
    assert not torch.equal(fresh.state_dict()[weight], upstream.state_dict()[weight])
    copy = rebuild(upstream.config)
    copy.load_state_dict(upstream.state_dict())
    torch.testing.assert_close(copy.eval()(noise(), LENGTHS)[0], hidden, atol=0, rtol=0)


@each
@pytest.mark.parametrize("context", [1, 3])
def test_the_features_control_has_fixed_frames_of_10_ms(config, context):
    control = FeaturesUpstream(config, context=context, cmvn="none")
    assert not list(control.parameters())
    assert control.features.hop_length == 160
    assert control.features.cmvn == "none"
    states, counts = control(noise(), LENGTHS)
    assert counts.tolist() == [(length - 400) // 160 + 1 for length in LENGTHS.tolist()]
    assert states.shape[-1] == control.state_dim


def trained(pretraining, configs, folder, checkpoint=None):
    """A module after two steps, of which each is saved, or after what is left of them from a checkpoint on."""
    torch.manual_seed(0 if checkpoint is None else 1)  # other weights to begin with
    module, data = MaskedAcousticModel(**configs, seed=5), pretraining.data()
    if checkpoint is None:
        batches = [(batch["waveforms"], batch["lengths"]) for batch in data.ordered_loader("train")]
        module.objective.fit(module.model, lambda seconds: batches, 0)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pretraining.trainer(folder, [saving], max_steps=2, val_check_interval=2)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=None if checkpoint is None else False)
    return trainer, module


@pytest.mark.filterwarnings("ignore:::pytorch_lightning")
@pytest.mark.parametrize("objective", [CODES, CLUSTERS, TEACHING], ids=["best_rq", "clusters", "self_distillation"])
@pytest.mark.parametrize("name", ["subsample 4", "waveform"])
def test_a_run_trains_the_front_end_and_resumes_to_the_byte(pretraining, tiny, tmp_path, name, objective):
    configs = tiny | {"features": CONFIGS[name], "objective": objective}
    trainer, module = trained(pretraining, configs, tmp_path)
    assert trainer.callback_metrics["pretrain/val_cross_entropy"].isfinite()
    start = torch.load(tmp_path / "step=1.ckpt", weights_only=False)["state_dict"]
    front_end = {key: value for key, value in module.state_dict().items() if key.startswith("model.features.")}
    assert front_end
    assert not any(torch.equal(value, start[key]) for key, value in front_end.items())
    _, resumed = trained(pretraining, configs, tmp_path / "resumed", tmp_path / "step=1.ckpt")
    assert resumed.trained_steps == 1
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in resumed.state_dict().items())


@pytest.mark.filterwarnings("ignore:::pytorch_lightning")
def test_frames_are_reconstructed_from_subsampled_input(pretraining, tiny, tmp_path):
    trainer, module = trained(pretraining, tiny | {"features": CONFIGS["subsample 2"]}, tmp_path)
    assert 0.4 < trainer.callback_metrics["pretrain/val_l1"] < 1.2  # about what zeros get, 0.8
    batch = next(iter(pretraining.data().ordered_loader("valid")))
    with torch.no_grad():
        view = module.eval().view(batch)
    tokens, counts = LogMel(n_mels=20, stack=2)(batch["waveforms"], batch["lengths"])
    torch.testing.assert_close(view["target"], tokens.unflatten(-1, (2, 20)).flatten(1, 2))
    assert view["lengths"].tolist() == (2 * counts).tolist()
    module.objective.draw(view, "title", tmp_path / "picture.png")


def test_a_picture_of_samples_shows_their_spectrum(tiny):
    """A tone of 2 kHz is in bin 50 of 201 up to 8 kHz."""
    module = MaskedAcousticModel(**(tiny | {"features": CONFIGS["waveform"], "objective": CODES}), seed=5).eval()
    tone = torch.sin(2 * torch.pi * 2000 * torch.arange(8000) / 16000)[None]
    with torch.no_grad():
        view = module.view({"waveforms": tone, "lengths": torch.tensor([8000]), "keys": torch.tensor([1])})
    assert view["target"].shape == (1, 24, 201)
    assert set(view["target"].argmax(-1).flatten().tolist()) == {50}


# Time


class _Phones(FrameLabels):
    """Ten milliseconds of each of the phones 0, 1, 2, …"""

    def _intervals(self, cut):
        return [(n / 100, (n + 1) / 100, str(n)) for n in range(1000)]


@pytest.mark.parametrize(("name", "step"), [("waveform", 2), ("subsample 4", 1)])
def test_labels_stand_at_the_middles_of_frames(name, step):
    """A window of 25 ms from 0 ends in the middle of phone 1, 12.5 ms; the next frame is ``step`` phones later."""

    class Cut:
        start, num_samples = 0.0, 16000

    features = build(CONFIGS[name])
    labels = _Phones("phone", features).encode(Cut, {str(n): n for n in range(1000)})
    assert labels.tolist() == [1 + step * n for n in range(features.num_frames(16000))]
    assert features.num_frames(16000) == {1: 98, 2: 49}[step]


def test_the_targets_of_a_waveform_are_the_log_mel_frames_at_its_tokens(tiny):
    model = AudioEncoder(CONFIGS["waveform"], tiny["model"])
    module = MaskedAcousticModel(**(tiny | {"features": CONFIGS["waveform"], "objective": CODES}), seed=5)
    source = module.objective.source(model, noise(), LENGTHS, None)
    frames, _ = LogMel(n_fft=512)(noise(), LENGTHS)
    counts = model.features.num_tokens(LENGTHS)
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(source[row, :count], frames[row, : 2 * count : 2])  # 20 ms are two frames


def test_other_features_give_the_targets_nearest_in_time(tiny):
    slow = {"_target_": "audiot.features.LogMel", "n_mels": 20, "stack": 3}
    fast = {"_target_": "audiot.features.MFCC", "frame_length_ms": 20.0, "frame_shift_ms": 5.0, "cmvn": "global"}
    module = MaskedAcousticModel(**(tiny | {"features": slow, "objective": CODES | {"features": fast}}), seed=5)
    figures = module.objective.fit(module.model, lambda seconds: [(noise(), LENGTHS)], 0)
    assert figures["targets/used"] > 1
    assert module.objective.state_dict()["target_features.cmvn_mean"].isfinite().all()
    values, counts = module.objective.target_features(noise(), LENGTHS)
    source = module.objective.source(module.model, noise(), LENGTHS, module.model.features(noise(), LENGTHS)[0])
    own = np.arange(source.shape[1]) * 480 + 160 + 200  # middle of the middle one of three frames, in samples
    middles = np.arange(values.shape[1]) * 80 + 160
    for row, count in enumerate(module.model.features.num_tokens(LENGTHS).tolist()):
        for token in range(count):
            frame = min(np.abs(middles - own[token]).argmin(), counts[row] - 1)
            torch.testing.assert_close(source[row, token], values[row, frame])


# Errors


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LogMel, {"subsample": 3}, "subsample must be 2, 4 or null, found 3"),
        (LogMel, {"subsample": 2, "stack": 3}, "stack=3 and features.subsample=2 both join frames: set features.stack=1"),
        (LogMel, {"subsample": 2, "subsample_dim": 0}, "subsample_dim must be at least 1"),
        (LogMel, {"subsample_dim": 64}, "subsample_dim=64 has no effect without"),
        (LogMel, {"subsample": 2, "grad_scale": 0.0}, "grad_scale must be positive"),
        (Waveform, {"stack": 3}, "stack must be 1 with features=waveform"),
        (Waveform, {"norm": "batch"}, "norm must be layer or group"),
        (Waveform, {"kernels": [10, 3]}, "one number per convolution, 1 to 32 of them, found 2 and 7"),
        (Waveform, {"kernels": [10], "strides": [20]}, "strides must be at most 10, found 20"),
        (Waveform, {"kernels": [10, 9], "strides": [5, 1]}, "windows of 50 samples every 5: windows may be at most twice"),
    ],
)
def test_wrong_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("features", "objective", "message"),
    [
        ("waveform", {}, "those of Waveform are samples of the waveform: choose objective=clusters"),
        ("subsample 2", {"band_width": 4}, "band_width must be 0 where features are trained"),
        ("waveform", CODES | {"features": CONFIGS["subsample 2"]}, "objective.features must be fixed"),
        ("waveform", CODES | {"features": CONFIGS["waveform"]}, "objective.features must be fixed"),
        ("waveform", CODES | {"features": {"_target_": "audiot.features.LogMel", "sample_rate": 8000}}, "sample_rate must be"),
        ("waveform", CODES | {"features": {"_target_": "audiot.features.LogMel", "stack": 2}}, "needs 560 samples, more than"),
    ],
)
def test_objectives_refuse_features_that_do_not_suit(tiny, features, objective, message):
    chosen = objective if "_target_" in objective else tiny["objective"] | objective
    configs = tiny | {"features": CONFIGS[features], "objective": chosen}
    with pytest.raises(ValueError, match=message):
        MaskedAcousticModel(**configs, seed=5)


@pytest.mark.parametrize(
    "given", [["features=waveform"], ["features.subsample=4"], ["features=kaldi_fbank", "features.subsample=2"]]
)
def test_a_config_composes_with_the_targets_of_another_front_end(given):
    from hydra import compose, initialize_config_module

    from audiot.pretraining import build as build_module

    more = ["features.stack=1", "objective=clusters", "+features@objective.features=mfcc", "run_dir=run", "data_dir=data"]
    small = ["model.embed_dim=24", "model.num_heads=2", "model.ffn_dim=48", "data.crop_s=0.5"]
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("pretrain", [*given, *more, *small])
    features = build_module(cfg).model.features
    assert cfg.model.max_frames == features.num_tokens(8000)
    assert plain(cfg.objective.features)["_target_"] == "audiot.features.MFCC"
