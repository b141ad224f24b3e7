"""Mean weights of a run's checkpoints against a plain mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from audiot.checkpoint import load_encoder
from audiot.commands import average
from audiot.commands.arguments import parse
from audiot.pretraining import MaskedAcousticModel
from audiot.training.store import CheckpointStore

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")


@pytest.fixture(scope="module")
def run(pretraining, tmp_path_factory):
    """A run with checkpoints of its steps 1 to 4."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    store = CheckpointStore(folder / "checkpoints", 1, 4)
    pretraining.trainer(folder, [store], max_steps=4, val_check_interval=100).fit(pretraining.module(), pretraining.data())
    return folder


def states(run, steps):
    return [torch.load(run / "checkpoints" / f"step={step}.ckpt", weights_only=True)["state_dict"] for step in steps]


@pytest.mark.slow
def test_the_encoder_and_its_objective_have_the_mean_of_the_last_checkpoints(run, tmp_path, capsys):
    output = tmp_path / "mean"
    average.main(parse("average", [str(run), str(output), "--last", "3"]))
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["mean    of the weights after steps 2, 3, 4", f"wrote   {output}"]
    assert f"upstream.path={output}" in out[2]
    saved = {f"model.{name}": value for name, value in load_file(output / "model.safetensors").items()}
    saved |= {f"objective.{name}": value for name, value in load_file(output / "objective.safetensors").items()}
    averaged = states(run, (2, 3, 4))
    assert saved.keys() == averaged[0].keys()
    buffers = dict(MaskedAcousticModel.from_checkpoint(run / "checkpoints" / "step=4.ckpt").named_buffers())
    trained = [name for name in saved if name not in buffers]
    for name in trained:
        expected = np.stack([state[name].double().numpy() for state in averaged]).mean(0)
        np.testing.assert_allclose(saved[name].numpy(), expected, rtol=1e-7, atol=1e-12)
    assert sum(not averaged[0][name].equal(averaged[2][name]) for name in trained) > 10
    assert load_encoder(output).training is False
    MaskedAcousticModel.from_encoder(output)


def test_buffers_are_the_newest(run, monkeypatch):
    read = MaskedAcousticModel.from_checkpoint

    def with_buffer(path, trusted=()):
        module = read(path, trusted)
        module.register_buffer("seed", torch.tensor(int(path.stem[5:])))
        return module

    monkeypatch.setattr(MaskedAcousticModel, "from_checkpoint", with_buffer)
    paths = [run / "checkpoints" / f"step={step}.ckpt" for step in (4, 2)]
    assert average.mean(paths).seed == 4


def test_what_can_not_be_averaged_is_refused(run, tmp_path):
    expected = "has 4 checkpoints of a run, step=N.ckpt, and 5 are wanted: lower --last, or train with checkpoint.keep_last=5"
    with pytest.raises(ValueError, match=expected):
        average.main(parse("average", [str(run), str(tmp_path / "mean"), "--last=5"]))
    (tmp_path / "mean").write_text("")
    with pytest.raises(FileExistsError, match="is there already"):
        average.main(parse("average", [str(run), str(tmp_path / "mean")]))
    with pytest.raises(ValueError, match="--last must be at least 1, found 0"):
        parse("average", ["run", "out", "--last=0"])
