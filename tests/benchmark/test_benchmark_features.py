"""The benchmark of front ends: beside torchaudio, and only where both compute the same."""

from __future__ import annotations

import csv

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from audiot.benchmark.features import FeatureBenchmark
from audiot.features import KaldiFbank


def made(**changes):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("benchmark", ["benchmark=features", "run_dir=run", "data_dir=data"])
    settings = (
        OmegaConf.to_container(cfg.benchmark) | {"utterances": 2, "duration_s": 0.3, "rounds": 2, "device": "cpu"} | changes
    )
    return FeatureBenchmark(**{name: value for name, value in settings.items() if name[0] != "_" and name != "compare"}, seed=0)


def test_every_front_end_is_measured_beside_torchaudio(tmp_path, capsys):
    made().report(tmp_path, {"device": "a CPU", "threads": 1})
    with (tmp_path / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["features"], row["channels"]) for row in rows] == [
        ("kaldi_fbank", "240"),
        ("mfcc", "13"),
        ("log_mel", "80"),
        ("spectrogram", "201"),
    ]
    for row in rows:
        ours, theirs = float(row["audiot_ms"]), float(row["torchaudio_ms"])
        assert float(row["ratio"]) == pytest.approx(theirs / ours, rel=0.1, abs=0.02)
        assert float(row["times_real_time"]) == pytest.approx(600 / ours, rel=0.1, abs=1)
    assert (tmp_path / "table.md").read_text().count("|\n") == 6


def test_a_front_end_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    frames = KaldiFbank.frames
    monkeypatch.setattr(KaldiFbank, "frames", lambda self, waveforms: torch.roll(frames(self, waveforms), 1, dims=-1))
    with pytest.raises(ValueError, match=r"kaldi_fbank is off by .* from torchaudio"):
        made(features=["kaldi_fbank"]).report(tmp_path, {"device": "a CPU", "threads": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ["fbank"]}, r"benchmark.features: no 'fbank' \(did you mean kaldi_fbank\?\)"),
        ({"rounds": 0}, "benchmark.rounds must be at least 1, found 0"),
        ({"features": ["waveform"]}, "benchmark.features=waveform is trained, and torchaudio has no such function: leave it out"),
        ({"duration_s": 0.03}, "benchmark.duration_s=0.03 is shorter than two frames of kaldi_fbank"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        made(**changes)
