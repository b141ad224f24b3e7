"""ONNX files as a user of onnxruntime alone finds them, against PyTorch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from untrained import CLASSES, write_runs

from audiot.commands.arguments import parse
from audiot.downstream.classifier import load_classifier

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from audiot.commands import export_onnx  # noqa: E402
from audiot.deployment.int8 import measure, quantise  # noqa: E402
from audiot.deployment.onnx_file import OnnxModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A folder with a run of each task, untrained."""
    return write_runs(tiny, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def keyword(runs):
    """A session of the exported model of a keyword task."""
    path = runs / "keyword.onnx"
    export_onnx.main(parse("export-onnx", [str(runs / "keyword"), "-o", str(path)]))
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def waveforms_of(lengths):
    """Noise that grows, with other noise as padding: float32 (B, N)."""
    draw = np.random.default_rng(len(lengths))
    waveforms = draw.uniform(-0.5, 0.5, (len(lengths), max(lengths))).astype(np.float32)
    for row, length in zip(waveforms, lengths, strict=True):
        row[:length] *= np.linspace(0.05, 1, length, dtype=np.float32)
    return waveforms


@pytest.mark.parametrize("lengths", [[1700], [16000, 9001], [30000, 29999, 2000, 15000, 800]])
def test_a_classifier_gives_each_utterance_of_any_batch_what_pytorch_gives_it_alone(runs, keyword, lengths):
    waveforms = waveforms_of(lengths)
    logits, num_frames = keyword.run(["logits", "num_frames"], {"waveforms": waveforms, "lengths": np.array(lengths)})
    classifier = load_classifier(runs / "keyword")
    for row, length, count, waveform in zip(logits, lengths, num_frames, waveforms, strict=True):
        expected, frames = classifier.outputs(torch.from_numpy(waveform[None, :length]))
        np.testing.assert_allclose(row, expected[0].numpy(), rtol=1e-4, atol=1e-4)
        assert count == frames.item()


def test_the_file_says_what_it_takes_and_gives(keyword):
    assert [(value.name, value.shape, value.type) for value in (*keyword.get_inputs(), *keyword.get_outputs())] == [
        ("waveforms", ["batch", "samples"], "tensor(float)"),
        ("lengths", ["batch"], "tensor(int64)"),
        ("logits", ["batch", 4], "tensor(float)"),
        ("num_frames", ["batch"], "tensor(int64)"),
    ]
    found = keyword.get_modelmeta().custom_metadata_map
    assert json.loads(found["labels"]) == CLASSES
    assert found["sample_rate"] == "16000"
    assert found["kind"] == "classifier"
    assert json.loads(found["features"]) == {"part": "features/log_mel", "n_mels": 20, "stack": 3}
    assert json.loads(found["model"])["attention"] == {"part": "attention/query_key"}
    assert json.loads(found["min_samples"]) <= 2 * 3 * 160 + 400
    assert "max_samples" not in found  # rotary positions and this attention have no limit


def test_the_file_says_nothing_of_the_machine_and_names_nodes_by_their_modules(runs, keyword):
    proto = onnx.load(runs / "keyword.onnx")
    names = [node.name for node in proto.graph.node]
    assert any(name.startswith("upstream.encoder.encoder.layers.1.ffn.2/") for name in names)
    assert len(set(names)) == len(names)
    content = (runs / "keyword.onnx").read_bytes()
    assert b"/graphs.py" not in content
    assert b"/model.py" not in content
    assert str(runs).encode() not in content


@pytest.fixture(scope="module")
def quantised(runs, keyword):
    """The file of the keyword model in int8."""
    quantise(runs / "keyword.onnx", runs / "int8.onnx")
    return runs / "int8.onnx"


def test_all_products_with_weights_but_those_of_the_features_are_of_eight_bits(quantised):
    nodes = onnx.load(quantised).graph.node
    whole = [node.name.rpartition("/")[0] for node in nodes if node.op_type in ("MatMul", "Gemm")]
    eight = [node for node in nodes if node.op_type == "MatMulInteger"]
    assert len(eight) == 1 + 2 * (4 + 2) + 1  # input, two layers of four projections and two of the feed-forward network, head
    assert sorted(set(whole)) == [  # spectrum and filters, and products of queries, keys and values
        "upstream.encoder.encoder.layers.0.attention",
        "upstream.encoder.encoder.layers.1.attention",
        "upstream.encoder.features",
    ]
    assert len(whole) == 2 + 2 * 2


def test_the_test_of_both_files_counts_what_each_gets_right(runs, quantised):
    classifier = load_classifier(runs / "keyword")
    files = {"float32": OnnxModel(runs / "keyword.onnx"), "int8": OnnxModel(quantised)}
    batches, right = [], dict.fromkeys(files, 0)
    for number, lengths in enumerate(([9000, 4000, 7000], [12000, 11000, 3000, 6000])):
        waveforms, labels = torch.from_numpy(waveforms_of(lengths)), torch.tensor([0, 1, 2, 3][: len(lengths)])
        batch = {"waveforms": waveforms, "lengths": torch.tensor(lengths), "labels": labels}
        batches.append(batch | {"ids": [f"{number}-{row}" for row in range(len(lengths))], "speakers": ["one"] * len(lengths)})
        for name, compute in files.items():
            for row, length in enumerate(lengths):
                logits = compute.session.run(
                    ["logits"], {"waveforms": waveforms[row : row + 1, :length].numpy(), "lengths": np.array([length])}
                )
                right[name] += int(logits[0][0].argmax() == labels[row])
                expected, _ = classifier.outputs(waveforms[row : row + 1, :length])
                difference = np.abs(logits[0] - expected.numpy()).max() / expected.abs().max().item()
                assert difference < (1e-4 if name == "float32" else 0.2)
                assert name == "float32" or difference > 1e-5  # it is not the same model
    results = measure(files, classifier.objective, 16000, batches)
    for name, result in results.items():
        assert result.metrics["accuracy"] == pytest.approx(right[name] / 7)
        assert result.seconds_per_second > 0
    assert classifier.objective.rows == []


def test_a_test_without_utterances_is_refused(runs):
    with pytest.raises(ValueError, match="the test has no utterances"):
        measure({}, load_classifier(runs / "keyword").objective, 16000, [])
