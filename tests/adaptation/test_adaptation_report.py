"""The report of an adaptation: its numbers are those of the runs, and names from strangers stay text."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections import Counter

import numpy as np
import pytest
import soundfile
from pages import HOSTILE, Page, table_of

from audiot.adaptation.labelled import Labelled
from audiot.adaptation.outcome import Curves, Figure, Outcome, Scored, difference, majority
from audiot.adaptation.report import page, sentences, write_report
from audiot.adaptation.sounds import clip
from audiot.adaptation.survey import Survey
from audiot.base.files import write_csv, write_json

TEST = {"a": 4, "b": 2}
LABELS = ["a", "a", "a", "a", "b", "b"]
PREDICTIONS = ["a", "b", "a", "b", "b", "a"]
SCORES = [0.9, 0.6, 0.8, 0.95, 0.7, 0.5]


def survey_of(names, folder, task="classification", speakers=()):
    """A survey of six test files, whose labels have other names."""
    one, other = names
    counts = {"train": Counter({one: 8, other: 4}), "valid": Counter({one: 2}), "test": Counter({one: 4, other: 2})}
    found = Labelled(task, "sound", "one label per file, in sound", {one: 14, other: 6}, 20, 0, {})
    audio = {}
    for number in range(6):
        audio[f"{one}/{number}"] = str(folder / f"{number}.wav")
        soundfile.write(folder / f"{number}.wav", np.full(40_000, 0.1 * number), 8000)
    of_split = {role: frozenset(speakers) for role in counts}
    return Survey(
        found,
        {role: each.total() for role, each in counts.items()},
        {"train": 0.5, "valid": 0.1, "test": 0.25},
        counts,
        of_split,
        audio,
        dict.fromkeys(audio),
        {"unreadable": 1},
        ((f"sounds/{one}.wav", f"unreadable: {other}"),),
        "prepared/rejected.csv",
    )


def outcome_of(folder, names=("a", "b"), **changes):
    """What came of the predictions above."""
    name = dict(zip("ab", names, strict=True))
    rows = [
        {
            "utterance": f"{names[0]}/{number}",
            "label": name[label],
            "prediction": name[said],
            "right": label == said,
            "score": score,
        }
        for number, (label, said, score) in enumerate(zip(LABELS, PREDICTIONS, SCORES, strict=True))
    ]
    settings = {
        "title": f"The label {names[0]}",
        "survey": survey_of(names, folder),
        "tested": [
            Scored("an encoder, fine-tuned", {"accuracy": Figure(0.5, 0.2, 0.8), "macro_f1": Figure(0.45)}, "6 utterances"),
            Scored("a head on features alone", {"accuracy": Figure(1 / 3, 0.1, 0.6)}),
        ],
        "monitor": "accuracy",
        "difference": Figure(1 / 6, -0.1, 0.4),
        "curves": [Curves("Training", {"training": [(1, 2.0), (2, 1.0)]}, {"validation": [(1, 0.25), (2, 0.5)]}, "accuracy", 2)],
        "rows": rows,
        "chosen": [f"downstream.labels.field={names[0]}: 2 labels"],
        "commands": {"Predict": [f"audiot predict 'outputs/{names[0]}' x.wav"]},
        "facts": {"Command": f"audiot adapt adapt.label={names[1]}"},
    }
    return Outcome(**(settings | changes))


def cells(table, page):
    """Texts of a table's rows."""
    rows = [each for each in page.all("tr", table) if "tbody" in each["inside"]]
    inside = [each for each in page.elements if each["tag"] in ("th", "td")]
    return [[each["text"] for each in inside if id(row) in each["parents"]] for row in rows]


@pytest.fixture
def shown(tmp_path):
    return Page(page(outcome_of(tmp_path), clips=2, clip_s=1.0))


def test_the_tables_have_what_was_measured(shown):
    assert cells(table_of(shown, "Figures of the test"), shown) == [
        ["an encoder, fine-tuned", "50.0 (20.0–80.0)", "45.0"],
        ["a head on features alone", "33.3 (10.0–60.0)", "–"],
    ]
    assert cells(table_of(shown, "Splits"), shown) == [
        ["training", "12", "0.5", "2"],
        ["validation", "2", "0.1", "1"],
        ["test", "6", "0.25", "2"],
    ]
    assert cells(table_of(shown, "Files of each sound"), shown) == [["a", "8", "2", "4"], ["b", "4", "0", "2"]]
    assert cells(table_of(shown, "Reasons"), shown) == [["unreadable", "1"]]
    assert cells(table_of(shown, "Test files of each label"), shown) == [
        ["a", "4", "2", "50.0", "66.7"],
        ["b", "2", "1", "50.0", "33.3"],
    ]
    assert cells(table_of(shown, "Labels that are confused most"), shown) == [["a", "b", "2"], ["b", "a", "1"]]


def test_the_surest_errors_can_be_heard(shown):
    rows = cells(table_of(shown, "Wrong test files"), shown)
    assert [[row[0], *row[2:]] for row in rows] == [["a/3", "a", "b", "0.95"], ["a/1", "a", "b", "0.60"]]
    sounds = shown.all("audio")
    assert [each["attributes"]["aria-label"] for each in sounds] == ["a/3", "a/1"]
    kind, content = sounds[0]["attributes"]["src"].split(",")
    assert kind == "data:audio/wav;base64"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert (len(samples), rate) == (8000, 8000), "the first second of five"
    assert samples == pytest.approx(0.3, abs=1e-4)
    policy = next(each for each in shown.all("meta") if "http-equiv" in each["attributes"])["attributes"]["content"]
    assert "media-src data:;" in policy
    assert "default-src 'none'" in policy


def test_every_figure_has_a_title_and_words(shown):
    figures = shown.all("svg")
    assert len(figures) == 4, "scores, loss, accuracy, confusions"
    for svg in figures:
        assert svg["attributes"]["role"] == "img"
        assert shown.all("title", svg)[0]["text"]
        assert re.search(r"\d", shown.all("desc", svg)[0]["text"])


def test_ids_are_unique_and_the_contents_lead_somewhere(shown):
    ids = Counter(each["attributes"]["id"] for each in shown.elements if "id" in each["attributes"])
    assert set(ids.values()) == {1}
    links = [each["attributes"]["href"] for each in shown.all("a")]
    assert {each[1:] for each in links if each.startswith("#")} <= ids.keys()


def test_the_sentences_say_whether_the_model_is_better(tmp_path):
    told = sentences(outcome_of(tmp_path))
    assert told[0] == "Accuracy 50.0% (95% interval 20.0–80.0) on 6 test files that training never heard."
    assert told[2] == (
        "On resampled tests it can't be told apart from features: the difference is +16.7 points (−10.0 to +40.0)."
    )
    better = outcome_of(tmp_path, difference=Figure(0.2, 0.1, 0.3))
    assert "it is better than features" in sentences(better)[2]
    worse = outcome_of(tmp_path, difference=Figure(-0.2, -0.3, -0.1))
    assert "it is worse than features: the difference is −20.0 points" in sentences(worse)[2]
    assert told[3].startswith("Speakers are not known")
    known = outcome_of(tmp_path, survey=survey_of(("a", "b"), tmp_path, speakers=("ann",)))
    assert sentences(known)[3].startswith("Speakers of the test are in training too")


@pytest.mark.parametrize("name", [*HOSTILE, "</textarea><img src=x onerror=alert(1)>", "' onmouseover='alert(1)"])
def test_names_of_strangers_stay_text(name, tmp_path):
    files = write_report(outcome_of(tmp_path, names=(name, f"{name}2")), tmp_path, 20, 1.0)
    found = Page(files[0].read_text(encoding="utf-8"))
    assert len(found.all("script")) == 1
    assert not found.all("img")
    assert not [each for each in found.elements for key in each["attributes"] if key.startswith("on")]
    assert cells(table_of(found, "Files of each sound"), found)[0][0] == name
    assert found.all("h1")[0]["text"] == f"The label {name}"
    with files[2].open(newline="", encoding="utf-8") as stream:
        assert {row["label"] for row in csv.DictReader(stream)} == {name, f"{name}2"}


def test_the_csv_files_hold_the_figures_and_all_errors(tmp_path):
    report, results, errors = write_report(outcome_of(tmp_path), tmp_path, 1, 1.0)
    assert (report.name, results.name, errors.name) == ("report.html", "results.csv", "errors.csv")
    with results.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["model"], row["figure"], row["value"], row["low"]) for row in rows[:2]] == [
        ("an encoder, fine-tuned", "accuracy", "0.5", "0.2"),
        ("an encoder, fine-tuned", "macro_f1", "0.45", ""),
    ]
    with errors.open(newline="") as stream:
        assert [row["utterance"] for row in csv.DictReader(stream)] == ["a/3", "a/1", "a/5"]


def test_transcripts_have_no_confusions_and_the_worst_come_first(tmp_path):
    rows = [
        {"utterance": f"a/{number}", "label": "ONE TWO", "prediction": said, "right": not errors, "score": float(errors)}
        for number, (said, errors) in enumerate([("ONE TWO", 0), ("ONE", 4), ("", 7)])
    ]
    transcribed = survey_of(("a", "b"), tmp_path, task="transcription")
    tested = [Scored("an encoder, fine-tuned", {"wer": Figure(0.5), "cer": Figure(0.5)})]
    changes = {"survey": transcribed, "rows": rows, "tested": tested, "monitor": "wer", "difference": None, "curves": []}
    found = Page(page(outcome_of(tmp_path, **changes), 5, 1.0))
    assert not [each for each in found.all("h2") if each["text"] == "Confusions"]
    rows = cells(table_of(found, "Wrong test files"), found)
    assert [[row[0], *row[2:]] for row in rows] == [["a/2", "ONE TWO", "", "7"], ["a/1", "ONE TWO", "ONE", "4"]]


def test_no_error_is_said(tmp_path):
    rows = [{"utterance": "a/0", "label": "a", "prediction": "a", "right": True, "score": 1.0}]
    assert "No test file is wrong." in page(outcome_of(tmp_path, rows=rows), 5, 1.0)


def test_the_majority_is_the_most_frequent_label_of_training(tmp_path):
    outcome = outcome_of(tmp_path)
    metrics = {"bootstrap": {"unit": "utterance", "samples": 200, "seed": 0}}
    found = majority(outcome.survey, outcome.rows, metrics)
    assert found.title == "always a, the most frequent"
    figure = found.figures["accuracy"]
    assert figure.value == pytest.approx(4 / 6)
    assert 0.15 < figure.low < 4 / 6 < figure.high <= 1


def test_runs_of_the_same_tests_are_paired(tmp_path):
    generator = np.random.default_rng(0)
    draws = {"one": generator.uniform(0.5, 0.9, 500), "other": generator.uniform(0.2, 0.4, 500)}
    how = {"unit": "utterance", "samples": 500, "seed": 0, "test": "same"}
    for name, values in draws.items():
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "draws.csv", [{"test/accuracy": value} for value in values.tolist()])
        write_json(tmp_path / name / "metrics.json", {"test/accuracy": {"one": 0.7, "other": 0.3}[name], "bootstrap": how})
    found = difference(tmp_path / "one", tmp_path / "other", "accuracy")
    low, high = np.percentile(draws["one"] - draws["other"], [2.5, 97.5])
    assert found == pytest.approx((0.4, low, high))
    write_json(tmp_path / "other" / "metrics.json", {"test/accuracy": 0.3, "bootstrap": how | {"test": "another"}})
    assert difference(tmp_path / "one", tmp_path / "other", "accuracy") is None


def test_a_clip_of_a_high_rate_is_resampled(tmp_path):
    soundfile.write(tmp_path / "high.wav", np.zeros(48_000), 48_000)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(clip(tmp_path / "high.wav", 0.5).split(",")[1])))
    assert (len(samples), rate) == (8000, 16_000)
    with pytest.raises(OSError, match="can't be read"):
        clip(tmp_path / "none.wav", 1.0)
