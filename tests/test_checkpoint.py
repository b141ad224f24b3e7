"""Exported encoders: exact, reproducible, and refused with one line where something is wrong."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import audiot
from audiot.base.files import read_json, replacing, write_json
from audiot.base.parts import make
from audiot.checkpoint import AudioEncoder, load_encoder, load_objective, save_encoder, save_objective

LENGTHS = torch.tensor([16000, 9000, 4000])


def build(tiny, seed=0, **features):
    torch.manual_seed(seed)
    encoder = AudioEncoder(tiny["features"] | features, tiny["model"]).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases are no longer zero
    return encoder


def speech(dtype=torch.float32):
    return torch.randn(3, 16000, generator=torch.Generator().manual_seed(0), dtype=dtype).mul(0.1)


@pytest.fixture
def saved(tiny, tmp_path):
    """An encoder, its objective, and the folder that both are in."""
    encoder = build(tiny)
    objective = make(tiny["objective"], encoder)
    save_encoder(tmp_path / "encoder", encoder)
    save_objective(tmp_path / "encoder", tiny["objective"], objective)
    return encoder, objective, tmp_path / "encoder"


def same(one, other):
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_loaded_encoder_equals_the_saved_one(saved, tiny):
    encoder, objective, folder = saved
    loaded = load_encoder(folder)
    assert not loaded.training
    assert same(loaded, encoder)
    config, state = load_objective(folder)
    assert config == tiny["objective"]
    again = make(config, loaded)
    again.load_state_dict(state)
    assert same(again, objective)
    assert loaded.config == encoder.config
    hidden, lengths = encoder(speech(), LENGTHS)
    for again in (loaded, audiot.load_encoder(str(folder))):
        hidden_again, lengths_again = again(speech(), LENGTHS)
        assert hidden_again.equal(hidden)
        assert lengths_again.equal(lengths)


def test_saving_again_gives_the_same_bytes(saved, tiny):
    _, objective, folder = saved
    save_encoder(folder.parent / "again", load_encoder(folder))
    save_objective(folder.parent / "again", tiny["objective"], objective)
    os.utime(folder / "config.json", (0, 0))
    names = ["config.json", "model.safetensors", "objective.json", "objective.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (folder.parent / "again" / name).read_bytes()


def test_files_hold_nothing_but_the_configs_and_the_weights(saved, tiny):
    encoder, objective, folder = saved
    content = json.loads((folder / "config.json").read_text())
    features = {"part": "features/log_mel", "n_mels": 20, "stack": 3}
    model = tiny["model"] | {
        "part": "model/encoder", "attention": {"part": "attention/query_key"}, "positions": {"part": "positions/rotary"}
    }  # fmt: skip
    del model["_target_"]
    assert content == {"format_version": 2, "features": features, "model": model}
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == encoder.state_dict().keys()
    assert load_file(folder / "objective.safetensors").keys() == objective.state_dict().keys()
    content = json.loads((folder / "objective.json").read_text())
    assert content == {"format_version": 2, "objective": {"part": "objective/mockingjay", "span": 3}}
    for name in ("config.json", "model.safetensors", "objective.json", "objective.safetensors"):
        assert str(folder.parent).encode() not in (folder / name).read_bytes()
    size = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((folder / "model.safetensors").read_bytes()[8 : 8 + size])
    assert header.keys() == weights.keys()  # no metadata


def test_global_statistics_travel_with_the_encoder(tiny, tmp_path):
    encoder = build(tiny, cmvn="global")
    encoder.features.fit([(speech(), LENGTHS)])
    save_encoder(tmp_path, encoder)
    assert load_encoder(tmp_path)(speech(), LENGTHS)[0].equal(encoder(speech(), LENGTHS)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_waveform_gives_the_same_states_alone_and_in_a_batch(tiny, dtype, tolerance):
    encoder = build(tiny).to(dtype)
    waveforms = speech(dtype)
    waveforms[torch.arange(16000) >= LENGTHS[:, None]] = 0.9  # whatever lies behind the end
    together, lengths = encoder(waveforms, LENGTHS)
    assert together.shape == (3, 3, 32, 24)  # layers + 1, utterances, ((16000 - 400) // 160 + 1) // 3 frames, width
    for number, length in enumerate(LENGTHS.tolist()):
        alone, (count,) = encoder(waveforms[number : number + 1, :length])
        assert count == lengths[number] == ((length - 400) // 160 + 1) // 3
        torch.testing.assert_close(together[:, number, :count], alone[:, 0], rtol=tolerance, atol=tolerance)
        assert not together[:, number, count:].any()


@pytest.mark.parametrize(
    ("waveforms", "found"),
    [
        (torch.zeros(16000), r"one of the shape \(16000,\) and float32"),
        (torch.zeros(1, 1, 16000), r"one of the shape \(1, 1, 16000\)"),
        (torch.zeros(1, 16000, dtype=torch.int16), r"one of the shape \(1, 16000\) and int16"),
        (np.zeros((1, 16000), np.float32), "a ndarray"),
        ([0.0] * 16000, "a list"),
    ],
)
def test_what_is_no_batch_of_waveforms_is_told_what_is_expected(tiny, waveforms, found):
    message = rf"waveforms must be a tensor \(batch, samples\) of floats in \[-1, 1\], found {found}.*x\[None\]"
    with pytest.raises(ValueError, match=message):
        build(tiny)(waveforms)


def test_a_truncated_file_is_refused(saved):
    path = saved[2] / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 5, 200, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated or not a safetensors file") as caught:
            load_encoder(saved[2])
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_things_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no encoder folder at .*nowhere"):
        load_encoder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no encoder config at .*empty"):
        load_encoder(tmp_path / "empty")
    (saved[2] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights at .*model.safetensors"):
        load_encoder(saved[2])


def test_a_training_checkpoint_and_a_run_folder_are_refused(saved, tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "step=3.ckpt")
    with pytest.raises(ValueError, match=r"step=3.ckpt is a file, but an encoder is a folder"):
        load_encoder(tmp_path / "step=3.ckpt")
    with pytest.raises(ValueError, match=r"is a run's folder: its encoder is .*encoder"):
        load_encoder(tmp_path)


def change(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {}}', '"text"'])
def test_other_json_is_refused(saved, content):
    (saved[2] / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json is (not|no) .*encoder") as caught:
        load_encoder(saved[2])
    assert "\n" not in str(caught.value)


def test_another_format_version_is_refused(saved):
    change(saved[2], lambda content: content.update(format_version=3))
    with pytest.raises(ValueError, match="has format_version 3, this audiot reads 1 to 2: "):
        load_encoder(saved[2])


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.nn.Linear",
        "audiots.model.Encoder",
        "audiot.base.files.os.system",
        "audiot.base.files.write_json",
        "audiot.objectives.reconstruction.Reconstruction",
        "audiot.model",
    ],
)
def test_code_that_is_not_a_module_of_a_trusted_package_is_refused(saved, target, tmp_path):
    marker = tmp_path / "marker"
    foreign = {"_target_": target, "command": f"touch {marker}", "path": str(marker), "content": 1}
    change(saved[2], lambda content: content["model"].update(attention=foreign))
    with pytest.raises(ValueError, match=f"(names {target}, |can't be {target}: expected attention)") as caught:
        load_encoder(saved[2])
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_class_that_does_not_exist_is_named(saved):
    change(saved[2], lambda content: content["model"]["attention"].update(_target_="audiot.attention.nothing.Nothing"))
    with pytest.raises(ValueError, match=r"names audiot.attention.nothing.Nothing, which") as caught:
        load_encoder(saved[2])
    assert "\n" not in str(caught.value)


def test_an_encoder_with_another_mechanism_in_some_layers_is_saved_and_loaded(tiny, tmp_path):
    uniform = {"_target_": "audiot.attention.controls.Uniform", "dropout": 0.0}
    mixed = {"positions": {"_target_": "audiot.positions.Sinusoid"}, "other_attention": uniform, "other_layers": [1]}
    encoder = build({**tiny, "model": tiny["model"] | mixed})
    save_encoder(tmp_path, encoder)
    assert read_json(tmp_path / "config.json", "config")["model"]["other_attention"] == {
        "part": "attention/uniform",
        "dropout": 0.0,
    }
    loaded = load_encoder(tmp_path)
    assert [type(mechanism).__name__ for mechanism in loaded.encoder.mechanisms][1] == "Uniform"
    assert loaded(speech(), LENGTHS)[0].equal(encoder(speech(), LENGTHS)[0])


def test_a_trusted_package_may_bring_its_own_mechanism(saved, tmp_path, monkeypatch):
    (tmp_path / "my_mechanisms.py").write_text(
        "from audiot.attention.query_key import QueryKey\n\n\nclass Mine(QueryKey):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    change(saved[2], lambda content: content["model"]["attention"].update(_target_="my_mechanisms.Mine"))
    with pytest.raises(ValueError, match=r"names my_mechanisms.Mine, .*`trusted`"):
        load_encoder(saved[2])
    loaded = load_encoder(saved[2], trusted=["my_mechanisms"])
    assert type(loaded.encoder.layer(0).attention.mechanism).__name__ == "Mine"


def test_weights_of_another_shape_are_refused(saved):
    change(saved[2], lambda content: content["model"].update(ffn_dim=50))
    with pytest.raises(ValueError, match=r"do not fit the model: encoder.layers.0.ffn.0.bias is 48, by the config 50 ") as caught:
        load_encoder(saved[2])
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    write_json(tmp_path / "results.json", {"b": 1, "a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "results.json", {"b": float("nan")})

    def fail():
        with replacing(tmp_path / "results.json") as temporary:
            temporary.write_text("half")
            raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        fail()
    assert read_json(tmp_path / "results.json", "results") == {"b": 1, "a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), (torch.float16, 0.004)])
def test_half_precision_is_close_and_silence_stays_finite(saved, dtype, tolerance):
    expected, lengths = load_encoder(saved[2])(speech(), LENGTHS)
    low = load_encoder(saved[2], dtype=dtype)
    states, low_lengths = low(speech(), LENGTHS)
    assert states.dtype == low.encoder.input.weight.dtype == getattr(torch, str(dtype).split(".")[-1])
    assert low.features.filters.dtype == torch.float32
    assert low_lengths.equal(lengths)
    assert not states[:, 2, lengths[2] :].any()
    assert (states.float() - expected).norm() < tolerance * expected.norm()
    assert low(torch.zeros(1, 4000))[0].isfinite().all()


def test_no_dtype_and_no_device_leave_the_weights_as_they_were_saved(saved):
    assert {value.dtype for value in load_encoder(saved[2]).state_dict().values()} == {torch.float32}
    for options, message in (({"dtype": "int8"}, "dtype must be one of .*, found int8"), ({"device": "nowhere"}, "no device")):
        with pytest.raises(ValueError, match=message):
            load_encoder(saved[2], **options)


def test_one_compilation_serves_all_batches_and_changes_no_module(saved, monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=count, **options))
    plain, compiled = load_encoder(saved[2]), load_encoder(saved[2], compile=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [*map(type, compiled.modules())] == [*map(type, plain.modules())]
    with torch.inference_mode():
        for size, num_samples, padded in [(2, 4000, 0), (5, 9000, 0), (3, 12345, 0), (2, 4000, 1), (7, 6400, 1), (3, 16001, 1)]:
            waveforms, lengths = speech().new_ones(size, num_samples).cumsum(1).sin(), torch.full((size,), num_samples)
            lengths[0] -= padded * 1500
            torch.testing.assert_close(compiled(waveforms, lengths)[0], plain(waveforms, lengths)[0])
            assert len(graphs) == 1 + padded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_encode_alike(tiny):
    encoder = build(tiny)
    here, _ = encoder(speech(), LENGTHS)
    there, _ = encoder.cuda()(speech().cuda(), LENGTHS)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[1]", "a JSON object was expected, found list"), (b'{"a": "\xe9"}', "codec"), (b"[" * 100_000, "recursion")],
    ids=["list", "latin-1", "deep"],
)
def test_json_that_holds_no_object_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"summary\.json is not a readable summary: .*{message}"):
        read_json(tmp_path / "summary.json", "summary")
