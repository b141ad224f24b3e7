"""Graphs of models against the models themselves: other batches and lengths than the recorded ones, padding, limits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from some import some
from torch import nn
from untrained import CLASSES, HEADS, save, write_runs

from audiot.attention import names
from audiot.base.groups import options, read_option
from audiot.checkpoint import AudioEncoder, save_encoder
from audiot.commands import export_torch
from audiot.commands.arguments import parse
from audiot.deployment.graphs import Deployable, check, largest_difference, open_run, trace
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import random_encoder
from audiot.features.base import _power_by_products

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")
LENGTHS = ([1700], [16000, 9001, 400], [30000, 1, 29999, 2000, 15000])
QUICK = ("synthesizer_random", "local")
HASHING = tuple(name for name in names() if "lsh" in name)


@pytest.fixture
def encoder_of(tiny):
    """Maker of a tiny random encoder, whose configs differ from the usual one's."""

    def make(features=None, **model):
        torch.manual_seed(0)
        return AudioEncoder(features or tiny["features"], tiny["model"] | model).eval().requires_grad_(False)

    return make


def deployable(encoder):
    return Deployable(encoder, encoder.features, "hidden", ("states", "batch", "frames", "channels"), {})


def agrees(encoder, compute, lengths, tolerance=1e-4):
    """Hidden states of a batch, whose padding is noise, are those of each utterance alone."""
    draw = torch.Generator().manual_seed(len(lengths))
    waveforms = torch.randn(len(lengths), max(lengths), generator=draw) * torch.linspace(0.01, 0.3, max(lengths))
    hidden, counts = compute(waveforms, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        count = encoder.features.num_tokens(length)
        assert counts[row] == count
        assert (hidden[:, row, count:] == 0).all()
        if count:
            expected, _ = encoder(waveforms[row : row + 1, :length])
            torch.testing.assert_close(hidden[:, row, :count], expected[:, 0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", some(names(), QUICK))
def test_a_mechanism_computes_in_a_graph_what_its_fast_form_does(encoder_of, published_attention, name):
    encoder = encoder_of(**published_attention(name))
    model = deployable(encoder)
    compute = trace(model).module()
    assert model.description["min_samples"] <= 1700
    limit = encoder.encoder.mechanisms[0].max_frames
    if limit is None:
        assert model.description.get("max_samples", 10**7) >= 10**7
    else:
        assert encoder.features.num_tokens(model.description["max_samples"]) == limit
    if name in HASHING:  # a hash may change with rounding, and the frame with it
        hidden = [call(0.1 * torch.randn(1, 9000, generator=torch.Generator().manual_seed(0)), torch.tensor([9000]))[0]
                  for call in (compute, encoder)]  # fmt: skip
        assert ((hidden[0] - hidden[1]).abs() < 1e-4).float().mean() > 0.9
        return
    for lengths in LENGTHS:
        agrees(encoder, compute, lengths)


POSITIONS = [name for name in options("positions") if name != "rotary"]  # rotary ones are those of the classifier below


@pytest.mark.slow
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_in_the_graph(encoder_of, name):
    encoder = encoder_of(positions=read_option("positions", name))
    compute = trace(deployable(encoder)).module()
    for lengths in LENGTHS:
        agrees(encoder, compute, lengths)


FRONT_ENDS = {
    "log_mel": {"center": True, "level_db": -25.0, "cmvn": "level", "add_floor": True, "stack": 3},
    "kaldi_fbank": {"stack": 2},
    "mfcc": {"delta_order": 1, "center": True},
    "spectrogram": {"cmvn": "none", "n_fft": 512, "stack": 5},
    "waveform": {"channels": 16},
    "waveform of groups": {"channels": 16, "norm": "group"},
    "log_mel with convolutions": {"subsample": 4, "subsample_dim": 24},
}


@pytest.mark.parametrize("kind", some(FRONT_ENDS, ["kaldi_fbank"]))
def test_features_are_in_the_graph(encoder_of, kind):
    encoder = encoder_of(features=read_option("features", kind.split()[0]) | FRONT_ENDS[kind])
    compute = trace(deployable(encoder)).module()
    for lengths in ([3000], [16000, 9001, 1500], [30000, 2000, 29999]):
        agrees(encoder, compute, lengths)


@pytest.mark.parametrize(("win_length", "n_fft"), [(400, 400), (400, 512), (25, 32), (7, 9)])
def test_the_power_spectrum_by_products_is_that_of_the_fourier_transform(win_length, n_fft):
    frames = torch.randn(2, 5, win_length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.fft.rfft(frames, n=n_fft).abs().square()
    torch.testing.assert_close(_power_by_products(frames, n_fft), expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A folder with a run of each task, untrained."""
    return write_runs(tiny, tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "axes"),
    [
        ("phone", ("batch", "frames", "labels")),
        ("asr", ("batch", "frames", "labels")),
        ("intent", ("batch", "labels")),
        ("verification", ("batch", "embedding")),
    ],
)
def test_a_task_in_a_file_of_pytorch_gives_what_its_model_gives(runs, tmp_path, capsys, task, axes):
    path = tmp_path / "model.pt2"
    export_torch.main(parse("export-torch", [str(runs / task), "-o", str(path)]))
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"wrote   {path}, ")
    read = {"metadata.json": ""}
    compute = torch.export.load(path, extra_files=read).module()
    found, model = json.loads(read["metadata.json"]), open_run(runs / task)
    assert model.axes == axes
    assert found["kind"] == "classifier"
    if task == "asr":
        assert found["labels"] == ["<blank>", *CLASSES]
    if task == "phone":
        assert found["labels"] == CLASSES
        assert (found["first_frame_s"], found["frame_step_s"]) == (0.0125, 0.01)  # 25 ms every 10 ms
    module = DownstreamModule.from_checkpoint(runs / task / "checkpoints" / "best.ckpt").eval()
    lengths = torch.tensor([12000, 20000, 7000])
    waveforms = 0.1 * torch.randn(3, 20000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, counts = module({"waveforms": waveforms, "lengths": lengths})
    outputs, num_frames = compute(waveforms, lengths)
    assert num_frames.tolist() == counts.tolist()
    if task == "verification":
        expected = expected / expected.norm(dim=1, keepdim=True)
    for row, count in zip(range(3), counts, strict=True):
        rows = slice(None, int(count)) if "frames" in axes else slice(None)
        torch.testing.assert_close(outputs[row][rows], expected[row][rows], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_pytorch_loads_a_graph_without_audiot(encoder_of, tmp_path):
    save_encoder(tmp_path / "run" / "encoder", encoder_of())
    export_torch.main(parse("export-torch", [str(tmp_path / "run")]))
    code = (
        "import sys; sys.modules['audiot'] = None; import torch; "
        "hidden, counts = torch.export.load('run/model.pt2').module()(torch.zeros(2, 9000), torch.tensor([9000, 5000])); "
        "print(*hidden.shape, *counts.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "2", "18", "24", "18", "9"]


class Wrong(nn.Module):
    """The hidden states of a model, with a small mistake in the last utterance of a batch of three and more."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, waveforms, lengths):
        hidden, counts = self.encoder(waveforms, lengths)
        hidden[-1, -1, 0, 0] += 2e-4 * (len(lengths) > 2)
        return hidden, counts


def test_a_graph_that_differs_is_refused(encoder_of):
    encoder = encoder_of()
    model = deployable(encoder)
    model.description["min_samples"] = 1200
    assert largest_difference(model, encoder) < 1e-5  # of a batch to its utterances alone
    with pytest.raises(ValueError, match=r"^the graph differs from the model by \d\.\de-04, and 0\.0001 is allowed: nothing is"):
        check(model, Wrong(encoder))


def test_what_no_graph_can_hold_is_refused_in_one_line(tiny, tmp_path):
    upstream = random_encoder(0, features=tiny["features"], model=tiny["model"])
    head = {"_target_": HEADS + "RecurrentClassifier", "hidden_dim": 8, "num_layers": 1, "projector_dim": None}
    objective = {"_target_": "audiot.downstream.ctc.CTC", "unit": "phone"}
    save(
        DownstreamModule(upstream.config, head, objective, CLASSES, "last", False, tiny["optimizer"], tiny["scheduler"]), tmp_path
    )
    with pytest.raises(ValueError, match=r"^the model can't be written as a graph: RecurrentClassifier packs the frames [^\n]*$"):
        trace(open_run(tmp_path))


@pytest.mark.parametrize("given", ["nowhere", "empty", "model.pt2"])
def test_a_wrong_folder_or_file_is_refused_before_anything_is_written(runs, tmp_path, given):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pt2").touch()
    arguments, message = {
        "nowhere": ([str(tmp_path / "nowhere")], "no folder "),
        "empty": ([str(tmp_path / "empty")], "no fine-tuned model at "),
        "model.pt2": (
            [str(runs / "keyword"), "-o", str(tmp_path / "model.pt2")],
            "is there already: choose another name with -o",
        ),
    }[given]
    with pytest.raises(OSError, match=message):
        export_torch.main(parse("export-torch", arguments))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "model.pt2"]
