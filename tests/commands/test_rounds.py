"""Pre-training in rounds, and on clusters of other encoders' hidden states."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY as TINY_CONFIGS
from safetensors.torch import load_file
from test_cli import TINY, made, run, succeed  # noqa: F401 (a fixture)

from audiot.checkpoint import AudioEncoder
from audiot.objectives.clusters import Clusters
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


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[(1, 1), (1, 3), (2, 1)], [(1, 1)], [(2, 3)]])
def test_a_run_that_was_stopped_in_any_round_goes_on_to_the_same_bytes(unbroken, tmp_path, monkeypatch, stops):
    consume, left = ConsumedBatches.on_train_batch_end, list(stops)

    def stop(self, trainer, *arguments):
        consume(self, trainer, *arguments)
        here = 1 if trainer.default_root_dir.endswith("rounds/1") else 2
        if left and (here, trainer.global_step) == left[0]:
            left.pop(0)
            trainer.save_checkpoint(f"{trainer.default_root_dir}/checkpoints/step={trainer.global_step}.ckpt")
            raise KeyboardInterrupt

    given = [*CLUSTERS, "objective.rounds=2", "objective.layer=1", "hydra.run.dir=broken"]
    with monkeypatch.context() as patch:
        patch.setattr(ConsumedBatches, "on_train_batch_end", stop)
        run("pretrain", *given)
        refused = run("pretrain", *given)
        assert "broken holds a run already: resume=broken goes on with it" in refused.err
        while left:
            run("pretrain", "resume=broken")
    assert not (tmp_path / "broken" / "summary.json").exists()
    succeed("pretrain", "resume=broken")
    assert files(tmp_path / "broken") == files(unbroken[1])
    both = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "broken", unbroken[1])]
    assert both[0]["targets/perplexity"] == both[1]["targets/perplexity"]
    assert "is finished: nothing to resume" in succeed("pretrain", "resume=broken")


def test_a_round_goes_on_with_the_schedule_that_it_began_with(made, tmp_path, monkeypatch):  # noqa: F811
    consume = ConsumedBatches.on_train_batch_end

    def stop(self, trainer, *arguments):
        consume(self, trainer, *arguments)
        trainer.save_checkpoint(f"{trainer.default_root_dir}/checkpoints/step={trainer.global_step}.ckpt")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConsumedBatches, "on_train_batch_end", stop)
        run("pretrain", *CLUSTERS, "objective.rounds=2", "hydra.run.dir=broken")
    result = run("pretrain", "resume=broken", "trainer.max_steps=8")
    assert result.err == (
        "audiot: error: trainer.max_steps=8 can't change before the last round of broken has begun: its rounds train alike\n"
    )


def test_a_start_that_failed_leaves_no_folder(made, tmp_path):  # noqa: F811
    result = run("pretrain", *CLUSTERS, "objective.rounds=2", "objective.span=0", "hydra.run.dir=run")
    assert "objective.span must be at least 1 frame, found 0" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_two_rounds(made, tmp_path):  # noqa: F811
    given = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "objective.rounds=2", "hydra.run.dir=run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "AUDIOT_DATA": str(made.data)}
    command = [sys.executable, "-m", "audiot", "pretrain", *CLUSTERS, *given, "data.batch_s=4"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "rounds" / "1" / "encoder" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


def test_an_interrupt_in_an_earlier_round_names_the_whole_run(tmp_path):
    from audiot.runs import whole_run

    folder = tmp_path / "run" / "rounds" / "1"
    assert whole_run(folder) == tmp_path / "run"
    assert whole_run(folder / "rounds" / "1") == tmp_path / "run"
    assert str(Interrupted(3, folder / "checkpoints" / "step=3.ckpt")) == "interrupted after step 3"


@pytest.mark.slow
def test_any_encoder_can_be_the_teacher(made, tmp_path):  # noqa: F811
    for name, teacher in (("run", made.run), ("encoder", made.encoder)):
        succeed("pretrain", *CLUSTERS, f"objective.teacher={teacher}", "objective.layer=0", f"hydra.run.dir={name}")
    assert files(tmp_path / "run") == files(tmp_path / "encoder")
    own = load_file(made.encoder / "model.safetensors")
    saved = load_file(tmp_path / "run" / "encoder" / "objective.safetensors")
    assert all(saved[f"teacher.encoder.{name}"].equal(value) for name, value in own.items())


@pytest.mark.slow
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
    where = ["init=student/encoder", "data.batch_s=12"]
    again = succeed("pretrain", *given, *where, "hydra.run.dir=again")
    assert "init    student/encoder, with its features, model and objective" in again
    assert "targets" not in again
    for number, other in enumerate(("objective.num_clusters=9", "objective.teacher=hubert")):
        anew = succeed("pretrain", *given, *where, other, f"hydra.run.dir=anew{number}")
        assert "init    student/encoder, with its features and model; the objective starts anew" in anew
        assert f"targets {9 if number == 0 else 8} codes" in anew


def test_a_teacher_that_is_not_there_is_named(made):  # noqa: F811
    result = run("pretrain", *CLUSTERS, "objective.teacher=runs/of/nobody", "hydra.run.dir=run")
    assert "objective.teacher=runs/of/nobody: there is nothing" in result.err


def test_a_teacher_in_a_file_brings_its_own_weights():
    teacher = {"_target_": "audiot.interop.hf_upstream.hf", "path": "somebody/model"}
    encoder = AudioEncoder(TINY_CONFIGS["features"], TINY_CONFIGS["model"])
    with pytest.raises(ValueError, match=r"objective.teacher: expected the config of a model .*, found a path"):
        Clusters(encoder, teacher=teacher)


def test_rounds_and_a_teacher_exclude_each_other(made):  # noqa: F811
    result = run("pretrain", *CLUSTERS, f"objective.teacher={made.encoder}", "objective.rounds=2", "hydra.run.dir=run")
    assert result.err.splitlines()[-1] == (
        "audiot: error: objective.rounds=2 trains its own teacher: drop objective.teacher, or set objective.rounds=1"
    )


def test_a_layer_without_a_teacher_is_refused(made):  # noqa: F811
    result = run("pretrain", *CLUSTERS, "objective.layer=1", "hydra.run.dir=run")
    assert "objective.layer=1 has no effect without objective.teacher or objective.rounds" in result.err


def test_a_layer_that_the_teacher_lacks_is_refused(made):  # noqa: F811
    result = run("pretrain", *CLUSTERS, f"objective.teacher={made.encoder}", "objective.layer=3", "hydra.run.dir=run")
    assert "objective.layer=3: the teacher has the hidden states 0 to 2" in result.err
