"""audiot's encoders in transformers give the same states however they are loaded, and exports are documented."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")

import canary
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_formats import fields, planted
from torch import nn
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel
from transformers.utils import logging as hf_logging

import audiot.attention
from audiot.checkpoint import AudioEncoder, load_encoder, save_encoder
from audiot.commands import export_hf
from audiot.commands.arguments import parse
from audiot.interop.hf_model import AudiotConfig, AudiotFeatureExtractor, AudiotModel

hf_logging.disable_progress_bar()

LENGTHS = torch.tensor([16000, 9000])
MASK = (torch.arange(16000) < LENGTHS[:, None]).long()
POSITIONS = {"sinusoid": {}, "alibi": {}, "learned": {}, "relative_bias": {"max_offset": 20}, "rotary": {}, "none": {}}
TARGETS = {"sinusoid": "Sinusoid", "alibi": "ALiBi", "learned": "Learned", "relative_bias": "RelativeBias", "rotary": "Rotary"}
FRONT_ENDS = {
    "log_mel": {"_target_": "audiot.features.LogMel", "n_mels": 20, "stack": 3},
    "kaldi_fbank": {"_target_": "audiot.features.KaldiFbank", "num_mel_bins": 20, "cmvn": "global"},
    "spectrogram": {"_target_": "audiot.features.Spectrogram", "stack": 2},
    "mfcc": {"_target_": "audiot.features.MFCC", "delta_order": 2},
    "subsample": {"_target_": "audiot.features.LogMel", "n_mels": 20, "subsample": 4, "subsample_dim": 16},
    "waveform": {"_target_": "audiot.features.Waveform", "channels": 16, "norm": "group"},
}


def speech(dtype=torch.float32):
    return torch.randn(2, 16000, generator=torch.Generator().manual_seed(0), dtype=dtype).mul(0.1)


def build(features, model):
    torch.manual_seed(3)
    encoder = AudioEncoder(features, model).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases are no longer zero
    if encoder.features.cmvn == "global":
        encoder.features.fit([(speech(), LENGTHS)])
    return encoder


def saved(encoder, folder):
    AudiotModel.from_encoder(encoder).save_pretrained(folder)
    AudiotFeatureExtractor(sampling_rate=encoder.features.sample_rate).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def encoder(tiny):
    return build(tiny["features"], tiny["model"])


@pytest.fixture
def folder(encoder, tmp_path):
    return saved(encoder, tmp_path / "model")


def check_same(encoder, model):
    """States and all buffers, saved or not, equal the encoder's bit by bit."""
    expected, lengths = encoder(speech(), LENGTHS)
    output = model(speech(), attention_mask=MASK, output_hidden_states=True)
    assert torch.stack(output.hidden_states).equal(expected)
    assert output.last_hidden_state.equal(expected[-1])
    assert model._get_feat_extract_output_lengths(LENGTHS).equal(lengths)
    buffers = dict(model.encoder.named_buffers())
    assert buffers.keys() == dict(encoder.named_buffers()).keys()
    for name, buffer in encoder.named_buffers():
        assert buffers[name].equal(buffer), name


@pytest.mark.parametrize("name", audiot.attention.names())
def test_every_mechanism_survives_saving_and_loading(tiny, published_attention, tmp_path, name):
    encoder = build(tiny["features"], tiny["model"] | published_attention(name))
    model = AutoModel.from_pretrained(saved(encoder, tmp_path))
    assert type(model) is AudiotModel
    assert not model.training
    with torch.no_grad():
        check_same(encoder, model)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_every_front_end_survives_saving_and_loading(tiny, tmp_path, name):
    encoder = build(FRONT_ENDS[name], tiny["model"])
    with torch.no_grad():
        check_same(encoder, AutoModel.from_pretrained(saved(encoder, tmp_path)))


@pytest.mark.parametrize("name", TARGETS)
def test_all_positions_survive_saving_and_loading(tiny, tmp_path, name):
    positions = {"_target_": f"audiot.positions.{TARGETS[name]}"} | POSITIONS[name]
    shared = {"share_layers": name == "sinusoid", "norm": "pre" if name == "alibi" else "post"}
    encoder = build(tiny["features"], tiny["model"] | {"positions": positions} | shared)
    with torch.no_grad():
        check_same(encoder, AutoModel.from_pretrained(saved(encoder, tmp_path)))


def test_a_batch_gives_what_each_waveform_gives_alone(encoder, folder):
    model, extractor = AutoModel.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder)
    waveforms = [speech()[0].numpy(), speech()[1, :9000].numpy()]
    inputs = extractor(waveforms, sampling_rate=16000, return_tensors="pt")
    assert inputs["attention_mask"].equal(MASK.to(inputs["attention_mask"].dtype))
    together = model(**inputs).last_hidden_state
    for number, waveform in enumerate(waveforms):
        alone = model(**extractor(waveform, sampling_rate=16000, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(together[number : number + 1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)
        assert not together[number, alone.shape[1] :].any()


def test_the_outputs_are_those_asked_for(encoder, folder):
    model = AutoModel.from_pretrained(folder)
    output = model(speech())
    assert list(output.keys()) == ["last_hidden_state"]
    assert output.last_hidden_state.equal(encoder(speech())[0][-1])
    assert [type(part) for part in model(speech(), return_dict=False)] == [torch.Tensor]
    model.config.output_hidden_states = True
    last, states = model(speech(), return_dict=False)
    assert len(states) == 3
    assert states[-1].equal(last)
    attentions = model(speech(), attention_mask=MASK, output_attentions=True).attentions
    tokens, _ = encoder.features(speech(), LENGTHS)
    valid = torch.arange(tokens.shape[1]) < encoder.features.num_tokens(LENGTHS)[:, None]
    for found, expected in zip(attentions, encoder.encoder.attention_weights(tokens, valid), strict=True):
        assert found.equal(expected)
        torch.testing.assert_close(found[1, :, :18].sum(-1), torch.ones(2, 18))
        assert not found[1, :, :, 18:].any()  # (9000 - 400) // 160 + 1 = 54 frames, three to a state


@pytest.mark.parametrize("bad", [[0, 1, 1], [1, 0, 1]])
def test_masks_of_anything_but_padding_at_the_end_are_refused(folder, bad):
    model = AutoModel.from_pretrained(folder)
    mask = torch.tensor(bad).repeat_interleave(5000)[None]
    with pytest.raises(ValueError, match=r"attention_mask has zeros before ones, .*: pad on the right"):
        model(speech()[:1, :15000], attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 10\) but input_values are \(1, 15000\)"):
        model(speech()[:1, :15000], attention_mask=mask[:, :10])


def test_gradients_reach_every_parameter(folder):
    model = AutoModel.from_pretrained(folder).train()
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == []
    model(speech(), attention_mask=MASK).last_hidden_state.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["query_key", "lsh_simple", "routing", "synthesizer_random"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_encoder_itself(tiny, published_attention, tmp_path, name, dtype):
    encoder = build(tiny["features"] | {"cmvn": "global"}, tiny["model"] | published_attention(name))
    folder = saved(encoder, tmp_path)
    loaded = AutoModel.from_pretrained(folder, dtype=dtype)
    cast = AutoModel.from_pretrained(folder).to(dtype)
    half = copy.deepcopy(encoder).to(dtype)
    for model in (loaded, cast):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        state = half.state_dict()
        assert all(value.equal(state[key]) for key, value in model.encoder.state_dict().items())
        assert model.encoder.features.filters.equal(encoder.features.filters)  # in float32
        assert model.encoder.features.cmvn_mean.equal(encoder.features.cmvn_mean)
    with torch.no_grad():
        output = loaded(speech(), attention_mask=MASK, output_hidden_states=True).hidden_states
        assert output[0].dtype == dtype
        again = cast(speech(), attention_mask=MASK, output_hidden_states=True).hidden_states
        assert torch.stack(output).equal(torch.stack(again))
        expected, _ = encoder(speech(), LENGTHS)
        assert (torch.stack(output).float() - expected).abs().mean() < 0.02
    loaded.save_pretrained(tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again").dtype == dtype


def test_a_model_of_ones_own_may_hold_an_encoder(encoder, folder, tmp_path):
    """Constants are correct even without audiot's from_pretrained."""

    class Classifier(PreTrainedModel):
        config_class = AudiotConfig
        base_model_prefix = "audiot"

        def __init__(self, config):
            super().__init__(config)
            self.audiot = AudiotModel(config)
            self.head = nn.Linear(config.hidden_size, 5)
            self.post_init()

    hf_logging.set_verbosity_error()
    model = Classifier.from_pretrained(folder)
    hf_logging.set_verbosity_warning()
    assert model.head.weight.isfinite().all()
    assert 0.005 < model.head.weight.std() < 0.05
    with torch.no_grad():
        check_same(encoder, model.audiot)
        model.save_pretrained(tmp_path / "classifier")
        again = Classifier.from_pretrained(tmp_path / "classifier")
        check_same(encoder, again.audiot)
    assert again.head.weight.equal(model.head.weight)
    fresh = AutoModel.from_config(model.config)
    assert not fresh(speech()).last_hidden_state.allclose(model.audiot(speech()).last_hidden_state)


def test_a_fresh_model_is_drawn_as_audiot_draws_it(tiny):
    torch.manual_seed(5)
    expected = AudioEncoder(tiny["features"], tiny["model"])
    torch.manual_seed(5)
    model = AudiotModel(AudiotConfig(features=tiny["features"], model=tiny["model"]))
    assert all(value.equal(expected.state_dict()[key]) for key, value in model.encoder.state_dict().items())
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.num_attention_heads) == (24, 2, 2)


def test_copies_are_independent(folder):
    model = AutoModel.from_pretrained(folder)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.encoder.encoder.input.weight.zero_()
    assert not other(speech()).last_hidden_state.allclose(model(speech()).last_hidden_state)


def test_missing_weights_are_refused(folder, tmp_path):
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights.pop("encoder.encoder.layers.1.ffn.0.weight")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of the audiot encoder \(encoder.layers.1.ffn.0.weight\): export it"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("target", ["os.system", "torch.nn.Linear", "audiot.base.files.write_json"])
def test_a_config_cannot_name_other_code(folder, tmp_path, target):
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["attention"] = {"_target_": target, "command": f"touch {tmp_path / 'marker'}"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"names {target}, "):
        AutoModel.from_pretrained(folder)
    assert not (tmp_path / "marker").exists()


def test_no_field_of_a_config_runs_anything(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for place in [place for place in fields(config) if place[0] in ("features", "model")]:
        for payload in canary.PAYLOADS:
            path.write_text(json.dumps(planted(config, place, payload)))
            with pytest.raises((ValueError, TypeError)):
                AutoModel.from_pretrained(folder)
            assert not canary.MARK.exists(), (place, payload)


def test_a_trusted_package_may_bring_its_own_mechanism(folder, tmp_path, monkeypatch):
    (tmp_path / "mechanisms_of_mine.py").write_text(
        "from audiot.attention.query_key import QueryKey\n\n\nclass Mine(QueryKey):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["attention"]["_target_"] = "mechanisms_of_mine.Mine"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names mechanisms_of_mine.Mine, .*`trusted`"):
        AutoModel.from_pretrained(folder)
    monkeypatch.setattr(AudiotModel, "trusted", ("audiot", "mechanisms_of_mine"))
    mechanism = AutoModel.from_pretrained(folder).encoder.encoder.layer(0).attention.mechanism
    assert type(mechanism).__name__ == "Mine"


def test_an_empty_config_is_refused():
    with pytest.raises(ValueError, match="needs `features` and `model`"):
        AudiotModel(AudiotConfig())


def test_the_feature_extractor_pads_and_nothing_else(folder, monkeypatch):
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert type(extractor) is AudiotFeatureExtractor
    one = speech()[0]
    for raw in (one, one.numpy(), one.tolist(), one.double().numpy(), [one], one[None].numpy()):
        batch = extractor(raw, sampling_rate=16000, return_tensors="pt")
        assert batch["input_values"].equal(one[None])
        assert batch["attention_mask"].sum() == 16000
    both = extractor([one, one[:100]], sampling_rate=16000, return_tensors="np", pad_to_multiple_of=512)
    assert both["input_values"].dtype == np.float32
    assert both["input_values"].shape == (2, 16384)
    assert both["attention_mask"].sum(1).tolist() == [16000, 100]
    assert not both["input_values"][1, 100:].any()
    short = extractor([one, one[:100]], sampling_rate=16000, max_length=50, truncation=True, padding="max_length")
    assert [len(values) for values in short["input_values"]] == [50, 50]
    with pytest.raises(ValueError, match="the waveforms are at 8000 Hz, but this model takes 16000 Hz: resample"):
        extractor(one, sampling_rate=8000)
    with pytest.raises(ValueError, match=r"waveform 0 must be floats in \[-1, 1\], found int16"):
        extractor(np.zeros(10, dtype=np.int16), sampling_rate=16000)
    with pytest.raises(ValueError, match=r"waveform 0 must have the shape \(samples,\), found \(2, 10\): mix"):
        extractor(np.zeros((1, 2, 10), dtype=np.float32), sampling_rate=16000)
    warned = []
    monkeypatch.setattr("audiot.interop.hf_model.log", SimpleNamespace(warning_once=warned.append))
    extractor(one)
    assert warned == ["no sampling_rate was given: 16000 Hz is assumed"]


SUMMARY = {
    "pretrain/val_l1": 0.5678,
    "pretrain/zero_l1": 0.8034,
    "pretrain/interpolation_l1": 0.6581,
    "probe/phone/encoder": 0.5641,
    "probe/phone/random": 0.5413,
    "finetune/phone/encoder": 0.6172,
    "frames_per_s": 26248,
    "parameters": 1380000,
    "steps": 1000,
    "wall_s": 365.2,
}
SETTINGS = {
    "data": {
        "name": "demo",
        "crop_s": 4.0,
        "batch_s": 50.0,
        "hours": 3.0,
        "pretrain": ["noise", "clean"],
        "corpus": {"root": "/somewhere/secret"},
    },
    "seed": 7,
    "init": None,
    "objective": {"_target_": "audiot.objectives.reconstruction.Reconstruction", "span": 3, "mask_proportion": 0.15},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": "${lr}", "betas": [0.9, 0.99]},
    "lr": 0.001,
    "trainer": {"precision": "32-true", "max_steps": 1000},
    "run_dir": "${hydra:runtime.output_dir}",
}


@pytest.fixture
def run(tiny, tmp_path):
    """The files of a pre-training run that the export reads."""
    folder = tmp_path / "run"
    save_encoder(folder / "encoder", build(tiny["features"] | {"cmvn": "global"}, tiny["model"]))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(SETTINGS), folder / ".hydra" / "config.yaml")
    (folder / ".hydra" / "overrides.yaml").write_text("- data=demo\n- data.hours=3\n- seed=7\n")
    choices = {"hydra": {"runtime": {"choices": {"objective": "mockingjay"}}}}
    OmegaConf.save(OmegaConf.create(choices), folder / ".hydra" / "hydra.yaml")
    probe = folder / "probes" / "probe-phone-encoder"
    probe.mkdir(parents=True)
    (probe / "metrics.json").write_text(json.dumps({"monitor": "accuracy", "train_utterances": 932}))
    return folder


def export(*arguments):
    export_hf.main(parse("export-hf", [str(argument) for argument in arguments]))


def test_a_run_stands_for_its_encoder(run, tmp_path, capsys):
    export(run, tmp_path / "one")
    export(run / "encoder", tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    assert "| steps | 1,000 |" in (tmp_path / "two" / "README.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"next:   audiot finetune downstream=phone_linear upstream=hf upstream.path={tmp_path / 'two'} data=demo data.hours=3"
        " data.corpus.root=/somewhere/secret"  # which the run's settings hold in place of what follows data.name
    )


@pytest.mark.slow
def test_an_export_loads_in_a_process_of_its_own(run, tmp_path):
    target = tmp_path / "hub" / "my-encoder"
    export(run, target)
    assert [path.name for path in target.parent.iterdir()] == ["my-encoder"]
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in target.iterdir()) == names
    code = f"""
import torch, audiot.interop.hf_model
from transformers import AutoFeatureExtractor, AutoModel
model = AutoModel.from_pretrained({str(target)!r})
extractor = AutoFeatureExtractor.from_pretrained({str(target)!r})
waveforms = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)).mul(0.1)
inputs = extractor([waveforms[0], waveforms[1, :9000]], sampling_rate=16000, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs, output_hidden_states=True)
torch.save(torch.stack(output.hidden_states), {str(tmp_path / "states.pt")!r})
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    with torch.no_grad():
        expected, _ = load_encoder(run / "encoder")(speech(), LENGTHS)
    torch.testing.assert_close(torch.load(tmp_path / "states.pt"), expected, rtol=0, atol=1e-5)


def test_exporting_again_gives_the_same_bytes(run, tmp_path):
    for name in ("one", "two"):
        export(run, tmp_path / name / "encoder")
    for path in (tmp_path / "one" / "encoder").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "encoder" / path.name).read_bytes()


def test_the_card_holds_the_runs_own_figures(run, tmp_path):
    export(run, tmp_path / "out", "--license", "cc-by-4.0")
    card = ModelCard.load(tmp_path / "out" / "README.md")  # the hub's own reader
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "audiot"
    assert {"audiot", "transformers", "masked-acoustic-model"} <= set(card.data.tags)
    results = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert results == {
        "L1 of the masked frames": ("l1", 0.5678),
        "phone, frozen: accuracy": ("accuracy", 0.5641),
        "phone, fine-tuned: accuracy": ("accuracy", 0.6172),
    }
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {
        ("demo", "validation"),
        ("demo", "test"),
    }
    for words in (
        "Validation L1 of the masked frames: 0.568 (zeros in their place 0.803, interpolation 0.658).",
        "| test, % | this encoder | untrained |",
        "| phone, frozen, accuracy, 932 training utterances | 56.4 | 54.1 |",
        "| phone, fine-tuned, accuracy | 61.7 |  |",
        "| attention | QueryKey |",
        "| positions | Rotary |",
        "| states | one every 30 ms |",
        "| corpus | demo (noise, clean), 3 h |",
        "| objective | mockingjay, Reconstruction (span 3, mask_proportion 0.15) |",
        "| optimiser | AdamW (lr 0.001) |",
        "| seed | 7 |",
        "| steps | 1,000 |",
        "spoken by eSpeak NG",
        "The weights are under the licence `cc-by-4.0`.",
    ):
        assert words in card.text, words
    assert "secret" not in card.content
    assert str(tmp_path) not in card.content


def test_the_card_names_the_mechanism_of_other_layers(tiny):
    uniform = {"_target_": "audiot.attention.controls.Uniform", "dropout": 0.1}
    mixed = {"positions": {"_target_": "audiot.positions.Sinusoid"}, "other_attention": uniform, "other_layers": [1]}
    encoder = AudioEncoder(tiny["features"], tiny["model"] | mixed)
    assert export_hf._description(encoder)["attention"] == "QueryKey; Uniform (dropout 0.1) in layer 2"


def test_no_licence_is_invented(run, tmp_path, capsys):
    export(run, tmp_path / "out")
    content = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in yaml.safe_load(content.split("---")[1])
    assert "The licence of these weights is not stated." in content
    assert "licence not stated" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--license=My own is no identifier of the hub, such as apache-2.0"):
        export(run, tmp_path / "other", "--license", "My own")


def test_the_cards_usage_runs(run, tmp_path, monkeypatch):
    export(run, tmp_path / "out")
    content = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(content.split("```python\n")[1].split("```")[0], scope)  # what a reader would paste
    assert scope["output"].last_hidden_state.shape == (2, 32, 24)
    assert len(scope["output"].hidden_states) == 3
    assert "(2, frames, 24); output.hidden_states has 3 of these" in content


def test_an_encoder_without_its_run_says_only_what_is_known(encoder, tmp_path):
    save_encoder(tmp_path / "alone" / "encoder", encoder)
    export(tmp_path / "alone" / "encoder", tmp_path / "out")
    content = (tmp_path / "out" / "README.md").read_text()
    for absent in ("Training", "Figures", "model-index", "masked", "demo", "eSpeak", "None"):
        assert absent not in content
    assert "| attention | QueryKey |" in content


def test_a_run_that_is_not_finished_has_no_figures(run, tmp_path):
    (run / "summary.json").unlink()
    export(run, tmp_path / "out")
    content = (tmp_path / "out" / "README.md").read_text()
    assert "| seed | 7 |" in content
    assert "Figures" not in content
    assert "None" not in content


def test_nothing_is_overwritten_and_nothing_half_is_left(run, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ValueError, match=r"used is there already, and not empty: give another folder, or remove it"):
        export(run, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError, match="no encoder folder at"):
        export(tmp_path / "nowhere", tmp_path / "out" / "deep")
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()

    def fail(*arguments):
        raise OSError("no space")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(export_hf, "card", fail)
    with pytest.raises(OSError, match="no space"):
        export(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("module", ["audiot.interop.hf_model", "audiot.interop.hf_upstream", "audiot.commands.export_hf"])
def test_without_transformers_the_remedy_is_named(module, monkeypatch):
    ours = ("audiot.interop.hf_model", "audiot.interop.hf_attention", module)
    for name in [name for name in sys.modules if name.startswith("transformers") or name in ours]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'audiot\[hf\]'"):
        __import__(module)
