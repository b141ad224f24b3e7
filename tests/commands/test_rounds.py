"""Pre-training in rounds, and on clusters of other encoders' hidden states."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_cli import TINY, made, run, succeed  # noqa: F401 (a fixture)

from audiot.runs import Interrupted
from audiot.training.callbacks import ConsumedBatches

pytestmark = [pytest.mark.usefixtures("blank_pictures"), pytest.mark.filterwarnings("ignore:::pytorch_lightning")]
CLUSTERS = [*TINY, "objective=clusters", "objective.num_clusters=8", "objective.span=3", "objective.sample_s=20", "probe=false"]


def files(folder):
    return {name: (folder / "encoder" / name).read_bytes() for name in ("model.safetensors", "objective.safetensors")}


@pytest.fixture
def unbroken(made, tmp_path):  # noqa: F811
    out = succeed("pretrain", *CLUSTERS, "objective.rounds=2", "objective.layer=1", "hydra.run.dir=unbroken")
    return out, tmp_path / "unbroken"


def test_two_rounds_train_on_the_first_encoders_states(unbroken):
    out, folder = unbroken
    first = load_file(folder / "rounds" / "1" / "encoder" / "model.safetensors")
    teacher = load_file(folder / "encoder" / "objective.safetensors")
    assert all(teacher[f"teacher.encoder.{name}"].equal(value) for name, value in first.items())
    lines = [line.split(None, 1)[0] for line in out.splitlines() if line.startswith(("round ", "targets"))]
    assert lines == ["round", "targets", "round", "targets"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["targets/codes"] == 8
    assert {"targets/used", "targets/perplexity", "targets/stability", "pretrain/val_accuracy"} <= summary.keys()
    assert summary["monitor"] == "pretrain/val_cross_entropy"
    assert "validation cross-entropy" in out


@pytest.mark.parametrize(("round_number", "step"), [(1, 1), (1, 3), (2, 3)])
def test_a_run_that_was_stopped_in_any_round_goes_on_to_the_same_bytes(unbroken, tmp_path, monkeypatch, round_number, step):
    consume, stopped = ConsumedBatches.on_train_batch_end, []

    def stop(self, trainer, *arguments):
        consume(self, trainer, *arguments)
        here = trainer.default_root_dir
        if not stopped and here.endswith("rounds/1") == (round_number == 1) and trainer.global_step == step:
            stopped.append(trainer.global_step)
            raise KeyboardInterrupt

    given = [*CLUSTERS, "objective.rounds=2", "objective.layer=1", "hydra.run.dir=broken", "checkpoint.every_n_steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(ConsumedBatches, "on_train_batch_end", stop)
        run("pretrain", *given)
    assert stopped
    assert not (tmp_path / "broken" / "summary.json").exists()
    refused = run("pretrain", *given)
    assert "broken holds a run already: resume=broken goes on with it" in refused.err
    succeed("pretrain", "resume=broken")
    assert files(tmp_path / "broken") == files(unbroken[1])
    assert "is finished: nothing to resume" in succeed("pretrain", "resume=broken")


def test_an_interrupt_in_an_earlier_round_names_the_whole_run(tmp_path):
    from audiot.runs import whole_run

    folder = tmp_path / "run" / "rounds" / "1"
    assert whole_run(folder) == tmp_path / "run"
    assert whole_run(folder / "rounds" / "1") == tmp_path / "run"
    assert str(Interrupted(3, folder / "checkpoints" / "step=3.ckpt")) == "interrupted after step 3"


def test_any_encoder_can_be_the_teacher(made, tmp_path):  # noqa: F811
    for name, teacher in (("run", made.run), ("encoder", made.encoder)):
        succeed("pretrain", *CLUSTERS, f"objective.teacher={teacher}", "objective.layer=0", f"hydra.run.dir={name}")
    assert files(tmp_path / "run") == files(tmp_path / "encoder")
    own = load_file(made.encoder / "model.safetensors")
    saved = load_file(tmp_path / "run" / "encoder" / "objective.safetensors")
    assert all(saved[f"teacher.encoder.{name}"].equal(value) for name, value in own.items())


def test_a_model_of_hugging_face_can_be_the_teacher(made, tmp_path):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.HubertModel(config).save_pretrained(tmp_path / "hubert")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "hubert")
    out = succeed("pretrain", *CLUSTERS, "objective.teacher=hubert", "hydra.run.dir=student")
    assert "targets 8 codes" in out
    given = [override for override in CLUSTERS if not override.startswith("model.")]  # the encoder has its own
    again = succeed("pretrain", *given, "init=student/encoder", "hydra.run.dir=again", "data.batch_s=12")
    assert "init    student/encoder, with its features, model and objective" in again
    assert "targets" not in again


def test_rounds_and_a_teacher_exclude_each_other(made):  # noqa: F811
    result = run("pretrain", *CLUSTERS, f"objective.teacher={made.encoder}", "objective.rounds=2", "hydra.run.dir=run")
    assert result.err.splitlines()[-1] == (
        "audiot: error: objective.rounds=2 trains its own teacher: drop objective.teacher, or set objective.rounds=1"
    )


def test_a_layer_that_the_teacher_lacks_is_refused(made):  # noqa: F811
    result = run("pretrain", *CLUSTERS, f"objective.teacher={made.encoder}", "objective.layer=3", "hydra.run.dir=run")
    assert "objective.layer=3: the teacher has the hidden states 0 to 2" in result.err
