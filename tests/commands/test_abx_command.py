"""`audiot abx` on a tiny demo corpus, on recordings as units, and on an item file."""

from __future__ import annotations

import csv
import json
import shlex

import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf
from test_cli import DATA, MODEL, last_line, made, run, succeed  # noqa: F401

from audiot.commands.abx import matched, next_command
from audiot.extraction.extract import Utterance
from audiot.measures.abx import Unit
from audiot.study.records import collect

PLAIN = ["upstream=features", "upstream.cmvn=none"]  # normalising by utterance would take a steady tone away
QUICK = ["codes=12", "bootstrap.samples=100", "device=cpu", "context=any"]


def read(folder):
    return json.loads((folder / "abx.json").read_text())


def test_every_layer_is_measured_beside_the_features(made, tmp_path):  # noqa: F811
    upstream = ["upstream=random", f"upstream.path={made.encoder}"]
    out = succeed("abx", *DATA, *MODEL, *QUICK, *upstream, f"hydra.run.dir={tmp_path / 'abx'}")
    found = read(tmp_path / "abx")
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    assert "across" not in found["layers"][0]  # the test split has one speaker
    assert "no triple across speakers, so that is not measured" in out
    for row in [*found["layers"], found["features"]]:
        assert 0 < row["within"]["error"] < 0.6
        assert row["within"]["low"] is None  # of one speaker without contexts
        assert 0 < row["pnmi"] < 1
    assert found["settings"]["context"] == "any"
    with (tmp_path / "abx" / "abx.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["features", "0", "1", "2"]
    assert float(rows[2]["within"]) == found["layers"][1]["within"]["error"]
    assert (tmp_path / "abx" / "abx.png").stat().st_size > 10_000
    command = shlex.split(last_line(out).removeprefix("next:"))
    best = min(found["layers"], key=lambda row: row["within"]["error"])["layer"]
    assert command[:3] == ["audiot", "finetune", "downstream=phone_linear"]
    assert {*upstream} <= {*command}
    assert f"downstream.layers=[{best}]" in command
    short = ["trainer.max_steps=1", "trainer.val_check_interval=1", "trainer.accelerator=cpu", "hydra.run.dir=next"]
    succeed(*command[1:], *short)


@pytest.mark.slow
def test_the_same_command_gives_the_same_files(made, tmp_path):  # noqa: F811
    given = [*DATA, *MODEL, *QUICK, f"upstream.path={made.encoder}", "compare=false", "speaker=within", "layers=[-1]"]
    for name in ("one", "two"):
        succeed("abx", *given, "plots=false", f"hydra.run.dir={tmp_path / name}")
    assert (tmp_path / "one" / "abx.json").read_bytes() == (tmp_path / "two" / "abx.json").read_bytes()
    assert [row["layer"] for row in read(tmp_path / "one")["layers"]] == [2]
    assert not list((tmp_path / "one").rglob("*.png"))


@pytest.mark.slow
def test_draws_are_kept_of_every_layer_and_the_features(made, tmp_path):  # noqa: F811
    """What a study reads of them is the mean of the best layer's."""
    speakers = ["data.corpus.num_test_speakers=8", f"data_dir={tmp_path / 'data'}"]
    given = [*DATA, *MODEL, *speakers, *QUICK, "plots=false", f"upstream.path={made.encoder}", "bootstrap.keep=true"]
    out = succeed("abx", *given, f"hydra.run.dir={tmp_path / 'abx'}")
    with (tmp_path / "abx" / "draws.csv").open(newline="") as file:
        draws = list(csv.DictReader(file))
    names = [f"{layer}/{speaker}" for layer in ("features", 0, 1, 2) for speaker in ("within", "across")]
    assert list(draws[0]) == names
    assert len(draws) == 100
    found = read(tmp_path / "abx")
    rows = {"features": found["features"], **{row["layer"]: row for row in found["layers"]}}
    for name in names:
        layer, speaker = name.split("/")
        row = rows[layer if layer == "features" else int(layer)][speaker]
        assert [row["low"], row["high"]] == pytest.approx(np.quantile([float(draw[name]) for draw in draws], [0.025, 0.975]))
    assert "in brackets 95%, 8 speakers resampled 100 times: the test has at least 8\n" in out
    assert f"({100 * row['low']:.2f} to {100 * row['high']:.2f})" in out
    means = {row["layer"]: (row["within"]["error"] + row["across"]["error"]) / 2 for row in found["layers"]}
    best = min(means, key=means.get)
    figures, kept = collect("abx", tmp_path / "abx")
    assert figures == {"value": means[best]}
    assert kept["value"] == [(float(draw[f"{best}/within"]) + float(draw[f"{best}/across"])) / 2 for draw in draws]
    path = tmp_path / "abx" / "draws.csv"
    path.write_text(path.read_text().replace(f"{best}/across", "another"))
    assert collect("abx", tmp_path / "abx") == (figures, {})  # kept none


@pytest.fixture
def tones(tmp_path):
    """A folder of recordings named DIGIT_SPEAKER_TAKE, tones of the digit's own pitch."""
    draw = np.random.default_rng(0)
    for digit in range(3):
        for place, speaker in enumerate(("ann", "bob")):
            for take in range(20):
                tone = np.sin(2 * np.pi * (200 + 300 * digit + 40 * place) * np.arange(2400) / 8000)
                (tmp_path / "audio").mkdir(exist_ok=True)
                soundfile.write(
                    tmp_path / "audio" / f"{digit}_{speaker}_{take}.wav", 0.1 * tone + 0.02 * draw.normal(size=2400), 8000
                )
    return tmp_path / "audio"


@pytest.mark.slow
def test_recordings_are_units_by_a_label(tones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["data=fsdd", f"data.root={tones}", "data.partial=true", "data.prepare.num_jobs=1", "field=keyword"]
    out = succeed("abx", *data, *QUICK, *PLAIN, f"hydra.run.dir={tmp_path / 'abx'}")
    (row,) = read(tmp_path / "abx")["layers"]
    assert row["within"]["error"] < 0.1
    assert row["across"]["error"] < 0.1
    assert read(tmp_path / "abx")["compared"]["units"] == 30
    assert last_line(out).startswith("next:   audiot finetune downstream=keyword upstream=features upstream.cmvn=none data=fsdd")


@pytest.mark.slow
def test_an_item_file_says_what_the_units_are(tones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{digit}_{speaker}_{take}" for digit in range(3) for speaker in ("ann", "bob") for take in range(3)]
    rows = [f"{name} 0.05 0.25 {name[0]} x y {name[2:5]}" for name in names]
    item = tmp_path / "x.item"
    item.write_text("\n".join(["#file onset offset #phone prev-phone next-phone speaker", *rows]))
    given = ["abx", f"item={item}", f"audio={tones}", *PLAIN, *QUICK[:3]]
    out = succeed(*given, f"hydra.run.dir={tmp_path / 'abx'}")
    found = read(tmp_path / "abx")
    assert found["compared"]["utterances"] == 18
    assert found["layers"][0]["within"]["triples"] == 2 * 6 * 3 * 2 * 3  # speakers, pairs, X, A, B
    assert found["layers"][0]["across"]["triples"] == 2 * 6 * 3 * 3 * 3
    assert found["layers"][0]["within"]["error"] < 0.1
    assert last_line(out) == f"next:   audiot pretrain data=folder data.root={tones}"
    item.write_text(item.read_text() + "\nnobody 0 1 0 x y ann\n")
    assert run(*given).err.endswith(f"the item file names the utterance 'nobody', which is not there ({tones})\n")


def test_utterances_are_found_by_the_last_part_of_their_path():
    unit = Unit("b", 0, 1, "a", "", "", "s")
    there = [Utterance("x/b", "", 1, 1), Utterance("x/c", "", 1, 1)]
    assert matched([unit], there, "audio", {})[0].utterance == "x/b"
    with pytest.raises(ValueError, match="'b', which is there 2 times"):
        matched([unit], [*there, Utterance("y/b", "", 1, 1)], "audio", {})
    with pytest.raises(ValueError, match="'b', which can't be used: too short"):
        matched([unit], there[1:], "audio", {"x/b.wav": "too short"})


def test_settings_that_exclude_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, message in (
        (["audio=x"], "audio=x is for an item file, which says what is in it: set item=FILE, or choose data=…"),
        (["item=x", "field=keyword"], "item and field both say what the units are: set one of them"),
        (["item=x"], "no item file at x: lines of #file onset offset #phone prev-phone next-phone speaker are expected there"),
        (["layers=[7]"], "layers=7: the encoder has the hidden states 0 to 0, or -1 to -1"),
        (["codes=0"], "codes must be at least 1, found 0"),
    ):
        result = run("abx", "upstream=features", *given)
        assert result.err == f"audiot: error: {message}\n"
        assert not list(tmp_path.iterdir())


def test_states_of_an_item_files_audio_are_extracted_next(tmp_path):
    cfg = OmegaConf.create(
        {
            "run_dir": str(tmp_path),
            "item": "x",
            "audio": "speech",
            "field": None,
            "upstream": {"path": "enc", "trusted": ["mine"]},
        }
    )
    assert next_command(cfg, 2, None, None) == f"audiot extract speech {tmp_path}/states --encoder enc --layers=2 --trust mine"
