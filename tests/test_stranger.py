"""A mechanism from outside the package, by CONTRIBUTING.md alone, trains, is probed, analysed and exported; it has no weights."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from stranger import copy_example

from audiot.checkpoint import load_encoder
from audiot.interop.s3prl_upstream import UpstreamExpert

TINY = shlex.split(
    "data.hours=0.01 data.num_speakers=2 data.corpus.num_valid_speakers=1 data.corpus.num_test_speakers=1 "
    "data.corpus.heldout_utterances=4 data.corpus.speaker_utterances=2 data.prepare.num_jobs=1 data.num_workers=0 "
    "data.batch_s=10 model.embed_dim=24 model.num_heads=2 model.ffn_dim=48 model.num_layers=2 "
    "trainer.accelerator=cpu trainer.max_steps=2 trainer.val_check_interval=1"
)
PROBE = "probe/phone/encoder"


pytestmark = pytest.mark.slow  # the first of them pre-trains, in a process of its own


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A function that runs ``audiot ARGUMENTS`` beside the folder ``mine``, in a process of its own; its folder is ``cwd``."""
    pytest.importorskip("espeakng_loader")
    cwd = tmp_path_factory.mktemp("stranger")
    copy_example(cwd / "mine")
    (cwd / "mine" / "probes").mkdir()
    probe = f"[downstream=phone_linear, upstream=checkpoint, 'upstream.path=${{run_dir}}/encoder', {', '.join(TINY[-3:])}]"
    (cwd / "mine" / "probes" / "one.yaml").write_text(f"{PROBE}: {probe}\n")

    def run(*arguments, code=0):
        environment = os.environ | {"PYTHONPATH": "mine", "AUDIOT_DATA": str(cwd / "data")}
        command = [sys.executable, "-m", "audiot", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout if code == 0 else done.stderr

    run.cwd = cwd
    run.out = run("pretrain", "--config-dir", "mine", "attention=summary_mixing", *TINY, "probes=one", "hydra.run.dir=run")
    return run


def test_it_trains_and_is_probed_and_the_picture_of_attention_is_left_out(stranger):
    run = stranger.cwd / "run"
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert PROBE in json.loads((run / "summary.json").read_text())
    assert {path.name for path in (run / "plots").iterdir() if "step" not in path.name} == {
        "training.png",
        "codes.png",
        "probes.png",
    }
    assert "\nplots   no picture of attention: SummaryMixing has no weights\n" in stranger.out
    assert "failed" not in stranger.out


def test_what_is_said_to_run_next_runs(stranger):
    following = shlex.split(stranger.out.splitlines()[-1].removeprefix("next:   audiot "))
    out = stranger(*following, *TINY[-3:], "hydra.run.dir=next")
    stranger(*shlex.split(out.splitlines()[-1].removeprefix("next:   audiot ")))


def test_it_is_analysed_and_measured_again(stranger):
    out = stranger("analyze", "run=run", "trusted=[summary_mixing]").splitlines()
    assert "no picture of attention: SummaryMixing has no weights" in out
    assert "run/plots/training.png" in out
    stranger("evaluate", "run=run/probes/probe-phone-encoder", "trusted=[summary_mixing]")
    assert out[-1] == "next:   audiot evaluate run=run 'trusted=[summary_mixing]'"


def test_its_encoder_is_loaded_by_who_trusts_it(stranger, monkeypatch):
    monkeypatch.syspath_prepend(stranger.cwd / "mine")
    trusted = ("summary_mixing",)
    encoder = load_encoder(stranger.cwd / "run" / "encoder", trusted=trusted)
    hidden, _ = encoder(torch.zeros(1, 8000))
    assert hidden.isfinite().all()
    assert not encoder.encoder.has_weights
    states = UpstreamExpert(stranger.cwd / "run" / "encoder", trusted)([torch.zeros(8000)])["hidden_states"]
    torch.testing.assert_close(torch.stack(states), hidden)
    with pytest.raises(ValueError, match="trusted"):
        load_encoder(stranger.cwd / "run" / "encoder")


def test_it_is_a_model_of_hugging_face_without_attentions(stranger, monkeypatch, caplog):
    hf_model = pytest.importorskip("audiot.interop.hf_model")
    stranger("export-hf", "run", "hf", "--trust", "summary_mixing")
    monkeypatch.syspath_prepend(stranger.cwd / "mine")
    monkeypatch.setattr(hf_model.AudiotModel, "trusted", ("summary_mixing",))
    assert "AudiotModel.trusted += ('summary_mixing',)" in (stranger.cwd / "hf" / "README.md").read_text()
    model = hf_model.AudiotModel.from_pretrained(stranger.cwd / "hf").eval()
    output = model(torch.zeros(1, 8000), output_attentions=True)
    assert output.attentions is None
    assert torch.equal(output.last_hidden_state, model(torch.zeros(1, 8000)).last_hidden_state)


def test_s3prls_own_format_has_no_place_for_it(stranger):
    assert stranger("export-s3prl", "run/encoder", "x.ckpt", code=1).startswith("audiot: error: ")
    assert not (stranger.cwd / "x.ckpt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config-dir", "mine", "attention=sumary_mixing"],
            "attention=sumary_mixing: no such option (did you mean summary_mix",
        ),
        (["--config-dir=mine", "attention=summary_mixing", "attention.dropot=0"], "no config key 'attention.dropot' (did you me"),
        (["-cd", "mien", "attention=summary_mixing"], "-cd mien: there is no such folder; give one that holds "),
        (["--config-dir"], "--config-dir : there is no such folder; give one that holds "),
        (["attention=summary_mixing"], "attention=summary_mixing: no such option; options: "),
    ],
)
def test_mistakes_are_told_in_one_line(stranger, arguments, message):
    error = stranger("pretrain", *arguments, code=1)
    assert error.startswith(f"audiot: error: {message}")
    assert error.count("\n") == 1


def test_help_and_hydras_own_flags_know_the_folder(stranger):
    assert "_target_: summary_mixing.SummaryMixing" in stranger(
        "pretrain", "--config-dir", "mine", "attention=summary_mixing", "-h"
    )
    shown = stranger("pretrain", "--config-dir", "mine", "attention=summary_mixing", "--cfg", "job")
    assert "_target_: summary_mixing.SummaryMixing" in shown


def test_an_installed_package_brings_config_groups_by_an_entry_point(tmp_path):
    copy_example(tmp_path)
    (tmp_path / "mine_conf" / "attention").mkdir(parents=True)
    (tmp_path / "mine_conf" / "__init__.py").touch()
    (tmp_path / "attention" / "summary_mixing.yaml").rename(tmp_path / "mine_conf" / "attention" / "summary_mixing.yaml")
    (tmp_path / "mine-1.0.dist-info").mkdir()
    (tmp_path / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (tmp_path / "mine-1.0.dist-info" / "entry_points.txt").write_text("[audiot.conf]\nmine = mine_conf\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def told(*arguments):
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=True).stdout

    assert "summary_mixing" in told("-m", "audiot", "list", "attention")
    assert "_target_: summary_mixing.SummaryMixing" in told(
        "-m", "audiot", "pretrain", "attention=summary_mixing", "--cfg", "job"
    )
    code = """
import pytest
from audiot.base.parts import foreign, named, resolved
config = {"_target_": "summary_mixing.SummaryMixing"}
assert named(config) == {"part": "attention/summary_mixing"}
assert foreign(config) == foreign(named(config)) == ["summary_mixing"]
with pytest.raises(ValueError, match="names attention/summary_mixing, which is not audiot's: add summary_mixing to `trusted`"):
    resolved(named(config), "file", place="attention")
assert resolved(named(config), "file", ["summary_mixing"], "attention") == config
"""
    told("-c", code)
