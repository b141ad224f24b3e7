"""`audiot adapt` on a folder of tones and noises, on the CPU."""

from __future__ import annotations

import csv
import json
import shlex

import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf
from pages import Page, table_of
from test_cli import last_line, run, succeed

DEVICE = ["trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.enable_progress_bar=false", "data.num_workers=0"]
SMALL = ["model.embed_dim=24", "model.num_heads=2", "model.ffn_dim=48", "model.num_layers=1", "features.n_mels=20"]
SHORT = ["trainer.max_steps=6", "trainer.val_check_interval=3", "adapt.timed_steps=1", "plots=false"]
SOUNDS = {"low": 200, "high": 3000, "noise": None}


def sound(name, take):
    """Half a second of a tone or of noise, in noise."""
    generator = np.random.default_rng([take, len(name)])
    noise = generator.standard_normal(8000)
    tone = np.sin(2 * np.pi * (SOUNDS[name] or 0) * (1 + 0.01 * take) * np.arange(8000) / 16000)
    return 0.1 * (noise if SOUNDS[name] is None else tone + 0.05 * noise)


def make(folder, takes=8, more=()):
    """A folder ``sounds`` and its table ``labels.csv``."""
    (folder / "sounds").mkdir()
    rows = [{"path": f"{name}{take}.wav", "sound": name} for name in SOUNDS for take in range(takes)]
    for row in rows:
        name = row["sound"]
        soundfile.write(folder / "sounds" / row["path"], sound(name, int(row["path"][len(name) : -4])), 16000)
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "sound"])
        writer.writeheader()
        writer.writerows([*rows, *more])
    return ["data.root=sounds", "labels=labels.csv", *DEVICE, *SMALL, *SHORT]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUDIOT_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.slow
def test_a_folder_becomes_a_model_once(folder):
    given = make(folder, more=[{"path": "low0.wav.bak", "sound": "low"}, {"path": "gone.wav", "sound": "high"}])
    (folder / "sounds" / "torn.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "sounds" / "short.wav", np.zeros(100), 16000)
    out = succeed("adapt", *given, "trainer.max_steps=40", "trainer.val_check_interval=20")
    above = folder / "outputs" / "adapt" / "sounds"
    note = json.loads((above / "adapt.json").read_text())
    assert (note["task"], note["label"], note["labels"]) == ("classification", "sound", {"high": 8, "low": 8, "noise": 8})
    assert note["command"] == shlex.join(["audiot", "adapt", *given, "trainer.max_steps=40", "trainer.val_check_interval=20"])
    assert note["files"] == {"train": 18, "valid": 3, "test": 3}
    assert sum(note["rejected"].values()) == 4
    assert "choose  downstream.labels.field=sound: 3 labels" in out
    assert "time    about " in out
    metrics = json.loads((above / "model" / "metrics.json").read_text())
    assert metrics["steps"] == 40
    assert metrics["test/accuracy"] == 1, "three sounds that nobody confuses"
    model, majority = note["test"].values()
    assert model["accuracy"]["value"] == metrics["test/accuracy"]
    assert majority["accuracy"]["value"] == pytest.approx(1 / 3)
    page = Page((above / "report.html").read_text(encoding="utf-8"))
    figures = [float(each["attributes"]["value"]) for each in page.all("data", table_of(page, "Figures of the test"))]
    assert figures == pytest.approx([metrics["test/accuracy"], metrics["test/macro_f1"], 1 / 3])
    with (above / "results.csv").open(newline="") as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == figures
    left_out = table_of(page, "Files that are left out")["text"]
    for name in ("torn.wav", "short.wav", "gone.wav", "low0.wav.bak"):
        assert name in left_out.replace("\u200b", "")
    assert f"report  {above.relative_to(folder) / 'report.html'}" in out
    command = shlex.split(last_line(out).removeprefix("next:"))
    said = succeed(*command[1:])
    assert any(f"  {name} " in said for name in SOUNDS)

    before = {path: path.stat().st_mtime_ns for path in (above / "model").rglob("*") if path.is_file()}
    again = succeed("adapt", *given, "trainer.max_steps=40", "trainer.val_check_interval=20")
    assert "done    model is finished" in again
    assert "time    about" not in again
    assert {path: path.stat().st_mtime_ns for path in (above / "model").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_an_encoder_is_pretrained_and_trained_further(folder):
    given = [*make(folder), "adapt.pretrain=true", "adapt.pretrain_steps=4", "downstream.train_encoder=true", "optimizer.lr=2e-3"]
    out = succeed("adapt", *given)
    above = folder / "outputs" / "adapt" / "sounds"
    assert sorted(path.parent.name for path in above.glob("*/stage.json")) == ["features", "model", "pretrain"]
    metrics = json.loads((above / "model" / "metrics.json").read_text())
    assert metrics["fine_tuned"] is True
    assert metrics["upstream"] == "checkpoint"
    assert json.loads((above / "pretrain" / "summary.json").read_text())["steps"] == 4
    succeed("adapt", *given, "seed=1", "adapt.pretrain_settings=['optimizer.lr=5e-4']")  # other settings: stages of their own
    assert sorted(path.name for path in above.glob("*-2")) == ["features-2", "model-2", "pretrain-2"]
    stages = ("pretrain", "model", "pretrain-2", "model-2")
    assert [OmegaConf.load(above / name / "config.yaml").optimizer.lr for name in stages] == [1e-3, 2e-3, 5e-4, 2e-3]
    succeed(*shlex.split(last_line(out).removeprefix("next:"))[1:])
    further = ["init=outputs/adapt/sounds/pretrain/encoder", "hydra.run.dir=further"]
    succeed("adapt", *[each for each in given if not each.startswith(("adapt.pretrain=", "model.", "features."))], *further)
    assert (folder / "further" / "pretrain" / "encoder" / "model.safetensors").is_file()
    taken = ["upstream.path=outputs/adapt/sounds/pretrain/encoder", "hydra.run.dir=taken", "downstream.train_encoder=false"]
    succeed("adapt", *make_given(given), *taken)
    assert not (folder / "taken" / "pretrain").exists()


def make_given(given):
    """Without what makes an encoder."""
    return [each for each in given if not each.startswith(("adapt.pretrain", "model.", "downstream."))]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["labels=none.csv"], "labels=none.csv: there is no such file: a CSV with a column path"),
        (["adapt.label=digit"], "has no label 'digit' (adapt.label): it has sound"),
        (["data.root=nowhere"], "data.root: there is no folder nowhere"),
        (["adapt.pretrain=maybe"], "adapt.pretrain must be auto, true or false, found maybe"),
        (["upstream=hf"], "upstream=hf has no path: set upstream.path="),
        (["init=x", "upstream.path=y"], "init=x trains an encoder here, and upstream is given too"),
        (["adapt.task=tagging"], "adapt.task must be auto, classification, speakers or transcription, found tagging"),
        (["adapt.timed_steps=-1"], "adapt.timed_steps must be a whole number, at least 0, found -1"),
        (["data=demo"], "data=demo: audiot adapt is for a folder, data=folder"),
        (["resume=x"], "resume a run; adapt starts anew"),
    ],
)
def test_what_can_not_be_adapted_is_told_in_one_line(given, expected, folder):
    usual = make(folder)
    names = {each.split("=")[0] for each in given}
    left = [each for each in usual if each.split("=")[0] not in names and not (names == {"data"} and each.startswith("data."))]
    result = run("adapt", *left, *given)
    assert result.code == 1
    assert expected in result.err
    assert result.err.startswith("audiot: error: ")
    assert len(result.err.strip().splitlines()) == 1
    assert not (folder / "outputs").exists()


@pytest.mark.slow
def test_another_label_is_not_mixed_into_a_folder_that_holds_one(folder):
    given = make(folder)
    with (folder / "labels.csv").open(newline="") as file:
        rows = [row | {"take": str(number % 2)} for number, row in enumerate(csv.DictReader(file))]
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "sound", "take"])
        writer.writeheader()
        writer.writerows(rows)
    succeed("adapt", *given, "adapt.label=sound", "adapt.timed_steps=0")
    result = run("adapt", *given, "adapt.label=take", "adapt.timed_steps=0")
    assert result.code == 1
    assert "outputs/adapt/sounds holds the adaptation with label sound, now it is take: choose another folder" in result.err
