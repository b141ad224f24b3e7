"""The benchmark of data: every stage once, with figures that agree with each other."""

from __future__ import annotations

import csv
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import audiot.benchmark.data
from audiot.benchmark.data import DataBenchmark

MACHINE = {"device": "a CPU", "cpu": "a CPU", "threads": 1, "command": "audiot benchmark benchmark=data"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve recordings of 0.5 s at 8 kHz."""
    folder = tmp_path_factory.mktemp("audio")
    noise = np.random.default_rng(0)
    for number in range(12):
        soundfile.write(folder / f"{number}.wav", 0.1 * noise.standard_normal(4000), 8000)
    return folder


def made(folder, **changes):
    given = ["data=folder", f"data.root={folder}", "data.valid_fraction=0.2", "data.prepare.num_jobs=1", "data.batch_s=1.6"]
    given += ["data.crop_s=0.4", f"data_dir={folder.parent / 'data'}", "run_dir=run", "features.stack=2", "data.num_workers=1"]
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("benchmark", ["benchmark=data", *given])
    small = {"front_ends": ["log_mel", "mfcc"], "seconds": 0.0, "rounds": 1, "device": "cpu", "prepare_utterances": 5}
    settings = OmegaConf.to_container(cfg.benchmark, resolve=True) | small | changes
    return DataBenchmark(**{name: value for name, value in settings.items() if name[0] != "_" and name != "compare"}, seed=0)


def test_every_stage_is_measured(folder, tmp_path, capsys):
    made(folder).report(tmp_path, MACHINE)
    with (tmp_path / "results.csv").open() as stream:
        rows = {(row["what"], row["setting"]): row for row in csv.DictReader(stream)}
    assert list(rows) == [
        ("prepare", "one process"),
        ("sampling", "main process"),
        ("loading", "one worker"),
        ("loading", "data.num_workers"),
        ("transfer", "to floats"),
        ("front end", "log_mel"),
        ("front end", "mfcc"),
    ]
    for (what, _), row in rows.items():
        speed = float(row["times_real_time"])
        # 38 frames of 40 make 19 tokens of two, rounded to 16: 32 frames.
        seconds = 0.5 if what == "prepare" else (31 * 160 + 400) / 16000
        assert speed == pytest.approx(seconds * float(row["cuts_per_s"]), rel=0.02)
        assert float(row["us_per_cut"]) == pytest.approx(1e6 / float(row["cuts_per_s"]), rel=0.02)
        assert float(row["times_real_time_per_core"]) == pytest.approx(speed / int(row["cores"]), rel=0.02)
    loading = rows["loading", "data.num_workers"]
    assert float(loading["frames_per_s"]) == pytest.approx(16 * float(loading["cuts_per_s"]), rel=0.02)
    assert (tmp_path / "benchmark.png").read_bytes()[1:4] == b"PNG"
    assert f"1 loader processes feed training at {int(loading['frames_per_s']):,} frames/s" in (tmp_path / "table.md").read_text()
    assert not list(tmp_path.glob("tmp*"))  # what was prepared to be timed


def test_rates_are_what_was_given_by_the_time_it_took(folder, monkeypatch):
    ticks = count()  # each look at the clock is half a second after the one before
    monkeypatch.setattr(audiot.benchmark.data, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 2))
    batches = ([100, 50] if number % 2 else [150] for number in count())
    found = made(folder, seconds=2.0, rounds=3)._rates(batches, lambda batch: batch)
    assert found == (3.0, 300.0)  # two cuts or one, 150 samples, each half second
    assert list(islice(batches, 1)) == [[150]]  # 4 batches a round


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"front_ends": ["fbank"]}, r"benchmark.front_ends: no 'fbank' \(did you mean kaldi_fbank\?\)"),
        ({"rounds": 0}, "benchmark.rounds must be at least 1, found 0"),
        ({"prepare_utterances": 0}, "benchmark.prepare_utterances must be at least 1, found 0"),
        ({"seconds": -1.0}, "benchmark.seconds is -1.0: set it to 0 or more, and finite"),
    ],
)
def test_impossible_settings_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        made(folder, **changes)
