"""``audiot export-onnx`` as a user calls it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from test_cli import DATA, TRAINER, prepared, read, run, succeed
from untrained import write_runs

from audiot.checkpoint import AudioEncoder, save_encoder

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def encoder(tiny, tmp_path):
    """A folder with an encoder."""
    torch.manual_seed(0)
    save_encoder(tmp_path / "run" / "encoder", AudioEncoder(tiny["features"], tiny["model"]))
    return tmp_path / "run"


def refused(*arguments):
    """The one line that a command fails with."""
    result = run("export-onnx", *map(str, arguments))
    assert result.code == 1
    assert result.err.startswith("audiot: error: ")
    assert result.err.count("\n") == 1
    return result.err


def test_mistakes_are_told_in_one_line(encoder, tmp_path):
    assert "no folder nowhere: expected one of a run" in refused("nowhere")
    assert "--opset must be from 18 to 23, found 7" in refused(encoder, "--opset", "7")
    assert "--utterances must be at least 1, found 0" in refused(encoder, "--utterances", "0")
    assert "--int8 measures its loss by the test of a task, and" in refused(encoder, "--int8")
    (encoder / "model.onnx").touch()
    assert "model.onnx is there already: choose another name with -o, or remove it" in refused(encoder)
    (tmp_path / "empty").mkdir()
    assert "no fine-tuned model at" in refused(tmp_path / "empty")


def test_a_missing_extra_is_named(encoder, monkeypatch):
    for name in ("onnx_file", "int8"):
        monkeypatch.delitem(sys.modules, f"audiot.deployment.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "audiot.commands.export_onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    assert "pip install 'audiot[onnx]'" in refused(encoder)


def test_a_file_that_fails_its_check_leaves_nothing(encoder, monkeypatch):
    from audiot.commands import export_onnx

    monkeypatch.setattr(export_onnx, "write_onnx", lambda path, *_: path.write_bytes(b"half"))
    monkeypatch.setattr(export_onnx, "trace", lambda _: SimpleNamespace())
    monkeypatch.setattr(export_onnx, "OnnxModel", lambda _: None)
    monkeypatch.setattr(export_onnx, "check", lambda *_: (_ for _ in ()).throw(ValueError("the graph differs")))
    assert "the graph differs" in refused(encoder)
    assert sorted(path.name for path in encoder.iterdir()) == ["encoder"]


@pytest.mark.slow
def test_an_encoder_is_written_with_all_of_its_hidden_states(encoder):
    out = succeed("export-onnx", str(encoder), "--opset", "20")
    assert f"wrote   {encoder / 'model.onnx'}, " in out
    session = onnxruntime.InferenceSession(str(encoder / "model.onnx"))
    (hidden, _) = session.get_outputs()
    assert hidden.name == "hidden"
    assert hidden.shape == [3, "batch", "frames", 24]
    assert session.get_modelmeta().custom_metadata_map["kind"] == "encoder"


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22, 23])
def test_every_opset_can_be_written(tiny, tmp_path, opset):
    run = write_runs(tiny, tmp_path) / "keyword"
    succeed("export-onnx", str(run), "--opset", str(opset))


@pytest.mark.slow
def test_the_loss_of_int8_is_that_of_the_runs_own_test(tmp_path_factory, tmp_path, monkeypatch):
    made = prepared(tmp_path_factory.getbasetemp())
    monkeypatch.setenv("AUDIOT_DATA", str(made.data))
    monkeypatch.chdir(tmp_path)
    tuned = ["finetune", "downstream=speaker_utterance", f"upstream.path={made.encoder}", "hydra.run.dir=tuned", "plots=false"]
    succeed(*tuned, *DATA, *TRAINER)
    out = succeed("export-onnx", "tuned", "--int8")
    session = onnxruntime.InferenceSession("tuned/model-int8.onnx")
    about = session.get_modelmeta().custom_metadata_map
    found = json.loads(about["test"])
    assert about["weights"] == "int8"
    expected = read(tmp_path / "tuned" / "metrics.json")
    assert found["float32"]["metrics"]["accuracy"] == pytest.approx(expected["test/accuracy"], abs=1e-5)
    assert found["float32"]["metrics"]["macro_f1"] == pytest.approx(expected["test/macro_f1"], abs=1e-5)
    assert 0 <= found["int8"]["metrics"]["accuracy"] <= 1
    assert found["int8"]["bytes"] < found["float32"]["bytes"]
    assert 0 < found["largest_difference"] < 1
    assert f"test    {found['utterances']} of {found['utterances']} utterances" in out
    assert sorted(path.name for path in (tmp_path / "tuned").glob("*.onnx")) == ["model-int8.onnx"]
