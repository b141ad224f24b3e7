"""The training benchmark: a tiny run of all its scopes, and what it refuses. No time is asserted."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import audiot.benchmark.training
import audiot.commands.launch
from audiot.base.config import plain
from audiot.benchmark.roofline import Ceilings
from audiot.benchmark.training import TrainingBenchmark
from audiot.pretraining import build

TINY = ["model.embed_dim=16", "model.num_heads=2", "model.ffn_dim=32", "model.num_layers=2", "features.n_mels=8"]


@pytest.fixture
def hydra_started():
    with initialize_config_module("audiot.conf", version_base="1.3"):
        yield


def settings(**changes):
    """Settings of ``benchmark=training`` with changes."""
    config = plain(compose("benchmark", ["benchmark=training", "run_dir=run", "data_dir=data"]).benchmark)
    config.pop("compare")
    return {**config, "device": "cpu", **changes}


def made(**changes):
    return instantiate(settings(**changes), seed=0)


@pytest.fixture
def speech(tmp_path):
    """A folder of noise, longer than a crop."""
    rng = np.random.default_rng(0)
    for number in range(14):
        path = tmp_path / "audio" / f"{number:02d}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(6400), 16000)
    return tmp_path


def test_every_scope_has_a_row_and_all_files_are_written(speech, hydra_started):
    run = speech / "run"
    run.mkdir()
    data = [
        "data=folder",
        f"data.root={speech / 'audio'}",
        "data.valid_fraction=0.2",
        "data.num_workers=0",
        "data.prepare.num_jobs=1",
    ]
    what = made(
        attentions=["query_key"],
        shapes=[{"frames": 8, "batch": 2}],
        dropouts=[{"hidden": 0.1, "attention": 0.0}],
        steps=2,
        rounds=1,
        program_steps=2,
        warmup_steps=1,
        utterances=None,
        overrides=[*data, *TINY, "callbacks.progress.refresh_rate=0"],
        data_dir=str(speech / "data"),
    )
    machine = {"device": "a CPU", "threads": 1, "torch": "2.11", "command": "audiot benchmark"}
    what.report(run, machine)
    with (run / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["attention"], row["positions"], row["scope"], row["note"]) for row in rows] == [
        ("query_key", "rotary", scope, "") for scope in ("inference", "encoder", "step", "program")
    ]
    for row in rows:
        assert float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert float(row["tflops"]) == pytest.approx(
            float(row["share_of_peak"]) * machine["ceilings"]["flops_per_s"] / 1e12, rel=1e-3
        )
        assert row["steps"] == "2"
        shares = [float(value) for name, value in row.items() if name.startswith("share_") and name != "share_of_peak" and value]
        assert sum(shares) == (0 if row["scope"] in ("inference", "encoder") else pytest.approx(1, abs=0.02))
    forward, whole = (float(row["tflops"]) * float(row["median_ms"]) for row in rows[:2])
    assert whole == pytest.approx(3 * forward, rel=1e-3)
    for row in rows[:3]:  # B · T frames of the encoder, three spectrogram frames each
        assert float(row["frames_per_s"]) * float(row["median_ms"]) / 1000 == pytest.approx(48, rel=0.02)
    assert 0 < float(rows[3]["wall_frames_per_s"]) < float(rows[3]["frames_per_s"]) * 1.5
    assert float(rows[3]["validation_s"]) > 0
    report = (run / "table.md").read_text()
    assert "| small | query_key | 2 × 8 | 0.1/0 | program |" in report
    assert "12·T·d·layers" in report
    files = {"results.csv", "table.md", "steps.png", "roofline.png"}
    assert {path.name for path in run.iterdir()} == files  # the program's own folders are gone


def test_what_is_refused_and_what_crashes_are_rows_with_their_reason(hydra_started, tmp_path, monkeypatch):
    attentions = ["query_key", {"name": "synthesizer_random", "max_length": 4}]
    what = made(attentions=attentions, shapes=[{"frames": 8, "batch": 2}], scopes=["encoder"], steps=1, rounds=1, overrides=TINY)
    what.ceilings = Ceilings(1e9, 1e9, 8)
    ((query_key, synthesizer),) = what.run(tmp_path)
    assert (query_key.note, synthesizer.note) == ("", "refused: longer than max_length 4")
    assert synthesizer.frames_per_s is None

    def crash(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(what.calls, "encoder", crash)
    ((query_key, _),) = what.run(tmp_path)
    assert query_key.note == "failed: RuntimeError: no such kernel"
    monkeypatch.setattr(audiot.benchmark.training, "measure_ceilings", lambda *given: Ceilings(1e9, 1e9, 8))
    machine = {"device": "a CPU", "threads": 1, "torch": "2.11", "command": "audiot benchmark"}
    with pytest.raises(ValueError, match=r"1 of 2 measurements failed, see .*table.md; the first: small query_key 2 × 8"):
        what.report(tmp_path, machine)
    assert "no such kernel" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["bass"]}, r"benchmark.models: no 'bass' \(did you mean base\?\)"),
        (
            {"models": [{"name": "base", "shape": []}]},
            "is neither a name nor a mapping with name, overrides, shapes, dropouts, scopes",
        ),
        ({"attentions": ["query_kye"]}, r"benchmark.attentions: no attention 'query_kye' \(did you mean query_key\?\)"),
        ({"attentions": ["query_key"] * 2}, "2 entries are called 'query_key': give each a label"),
        ({"attentions": []}, "benchmark.attentions is empty"),
        ({"shapes": []}, "benchmark.shapes or benchmark.dropouts is empty"),
        ({"shapes": [{"frames": 8}]}, r"benchmark.shapes: \{'frames': 8\} is no mapping with frames and batch"),
        ({"shapes": [{"frames": 0, "batch": 1}]}, "benchmark.shapes: frames=0: expected at least 1"),
        ({"dropouts": [{"hidden": 1.0, "attention": 0}]}, "hidden=1.0: expected at least 0 and less than 1"),
        ({"precision": "bf16"}, r"benchmark.precision: no 'bf16'.*; there are 32-true, bf16-mixed"),
        ({"precision": "fp8"}, "trainer.precision=fp8 needs a GPU that multiplies float8 matrices"),
        ({"compile": "yes"}, "benchmark.compile=yes: expected auto, true or false"),
        ({"steps": 0}, "benchmark.steps must be at least 1, found 0"),
        ({"scopes": ["steps"]}, r"benchmark.scopes: no 'steps' \(did you mean step\?\)"),
        ({"experiment": "demo"}, "benchmark.experiment: no 'demo'"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(hydra_started, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainingBenchmark(**{name: value for name, value in settings(**changes).items() if name[0] != "_"}, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "places"), [("training", 1), ("training_gpu", 7), ("training_length", 6)])
def test_the_presets_compose_the_training_that_they_name(hydra_started, option, places):
    config = plain(compose("benchmark", [f"benchmark={option}", "run_dir=run", "data_dir=data"]).benchmark)
    config.pop("compare")
    what = instantiate({**config, "device": "cpu"}, seed=3)
    assert len(what.places) == places
    for place, _ in (what.places[0], what.places[-1]):
        cfg, positions = what.recipe.config(what.entries[-1], place, "run")
        features = instantiate(plain(cfg.features))
        assert features.num_tokens(round(cfg.data.crop_s * features.sample_rate)) == place.frames == cfg.model.max_frames
        assert cfg.data.batch_s / cfg.data.crop_s == pytest.approx(place.batch)
        assert (cfg.model.dropout, cfg.attention.dropout) == (place.dropout, place.attention_dropout)
        assert (cfg.trainer.precision, cfg.seed, cfg.probe) == (what.recipe.precision, 3, False)
        assert cfg.model.num_layers == (12 if place.model.name == "large" else 3)
        assert positions == "sinusoid"
        steps = cfg.trainer.max_steps
        assert what.recipe.warmup_steps < cfg.trainer.val_check_interval == cfg.checkpoint.every_n_steps < steps
        assert steps < 2 * cfg.trainer.val_check_interval  # one of each


def test_crops_of_other_lengths_have_speech_of_their_own(hydra_started):
    """A front end of convolutions has as many tokens of a crop that is 10 ms longer."""

    def corpus(*overrides):
        what = made(experiment="demo_gpu", shapes=[{"frames": 64, "batch": 4}], overrides=["objective=clusters", *overrides])
        cfg, _ = what.recipe.config(what.entries[0], what.places[0][0], "run")
        return cfg.data.corpus.root, cfg.data.crop_s

    (mel, mel_s), (waveform, waveform_s) = corpus(), corpus("features=waveform", "features.stack=1")
    assert waveform_s != mel_s
    assert waveform != mel


def test_a_step_has_the_head_on_the_frames_that_it_may_have_to_predict(hydra_started):
    what = made(overrides=["features.stack=1"])
    chosen = ["model=small", "attention=query_key", "features.stack=1", "data.crop_s=0.4", "run_dir=run", "data_dir=data"]
    chosen += ["objective=mockingjay"]
    module = build(compose("pretrain", chosen))
    place = SimpleNamespace(batch=3, frames=38)
    assert module.objective.predicted(38) == 6  # two spans of three frames
    head = what._work(module, place, "step").flops - what._work(module, place, "encoder").flops
    assert head == 2 * 3 * 6 * (192 * 192 + 192 * 80)
