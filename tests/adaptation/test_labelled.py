"""Which label of a folder is learnt, and what of a table can't be."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import soundfile

from audiot.adaptation.labelled import look
from audiot.data.corpora.folder import FolderCorpus


def folder_of(tmp_path, columns, rows):
    """A folder of silent files and a table, whose first column is the path; ``labels.csv`` in it."""
    root = tmp_path / "audio"
    root.mkdir()
    for row in rows:
        soundfile.write(root / row[0], np.zeros(800), 8000)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", *columns), *rows])
    return FolderCorpus(root, labels=tmp_path / "labels.csv")


def rows(*columns):
    return [(f"{number}.wav", *values) for number, values in enumerate(zip(*columns, strict=True))]


LABELS = list("aaabbb")
UNIQUE = [f"take {number}" for number in range(6)]
SPEAKERS = ["ann", "bob"] * 3


@pytest.mark.parametrize(
    ("columns", "values", "task", "label"),
    [
        (["sound"], [LABELS], "classification", "sound"),
        (["take", "sound"], [UNIQUE, LABELS], "classification", "sound"),
        (["room", "label"], [list("ababab"), LABELS], "classification", "label"),
        (["speaker", "sound"], [SPEAKERS, LABELS], "classification", "sound"),
        (["speaker", "text"], [SPEAKERS, UNIQUE], "transcription", "text"),
        (["speaker"], [SPEAKERS], "speakers", "speaker"),
        (["split", "sound"], [["train", "Dev", "test"] * 2, LABELS], "classification", "sound"),
    ],
)
def test_the_label_is_found(columns, values, task, label, tmp_path):
    found = look(folder_of(tmp_path, columns, rows(*values)))
    assert (found.task, found.label, found.files) == (task, label, 6)
    assert found.counts == ({"a": 3, "b": 3} if task == "classification" else {"ann": 3, "bob": 3} if task == "speakers" else {})
    assert found.speakers == (2 if "speaker" in columns else 0)
    assert found.splits == ({"train": ["train"], "valid": ["Dev"], "test": ["test"]} if "split" in columns else {})


def test_settings_choose_among_labels(tmp_path):
    corpus = folder_of(tmp_path, ["speaker", "sound", "text"], rows(SPEAKERS, LABELS, UNIQUE))
    assert look(corpus, label="speaker").task == "speakers"
    assert look(corpus, task="speakers").label == "speaker"
    assert look(corpus, task="transcription").characters == " 012345aekt"
    assert look(corpus, label="text").task == "transcription"


def test_files_without_a_label_do_not_count(tmp_path):
    found = look(folder_of(tmp_path, ["sound"], rows([*LABELS, "", " "])))
    assert (found.files, found.counts) == (6, {"a": 3, "b": 3})


@pytest.mark.parametrize(
    ("columns", "values", "settings", "expected"),
    [
        (["sound"], [LABELS], {"label": "digit"}, "has no label 'digit' (adapt.label): it has sound"),
        (["sound"], [["a"] * 6], {}, "fewer than two labels in sound: all 6 files have 'a'"),
        (["sound"], [list("aaabbc")], {}, "too few files in sound of 'b' (2), 'c' (1): each label needs 3"),
        (["sound"], [[""] * 6], {}, "fewer than two labels in sound: all files are without"),
        (["sound", "room"], [LABELS, LABELS], {}, "has several labels, sound, room: choose one, adapt.label=sound"),
        (["sound"], [LABELS], {"task": "transcription"}, "has no transcripts: adapt.task=transcription learns those of"),
        (["sound"], [LABELS], {"task": "speakers"}, "has no speakers: adapt.task=speakers learns those of a column"),
        (["split", "sound"], [["fold1"] * 6, LABELS], {}, "'fold1' in the column split is no split: expected train, valid"),
        (["split", "sound"], [["test"] * 6, LABELS], {}, "no file is for training, according to the column split"),
    ],
)
def test_what_can_not_be_learnt_is_told_in_one_line(columns, values, settings, expected, tmp_path):
    with pytest.raises(ValueError) as error:
        look(folder_of(tmp_path, columns, rows(*values)), **settings)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_of_other_files_is_told_with_the_first_reason(tmp_path):
    folder_of(tmp_path, ["sound"], rows(LABELS))
    (tmp_path / "labels.csv").write_text("path,sound\nelsewhere/0.wav,a\nelsewhere/1.wav,b\n")
    with pytest.raises(ValueError, match=r"has a label for none of the audio in .*: not listed in data.labels"):
        look(FolderCorpus(tmp_path / "audio", labels=tmp_path / "labels.csv"))


def test_a_folder_without_labels_is_told_what_gives_them(tmp_path):
    folder_of(tmp_path, ["sound"], rows(LABELS))
    with pytest.raises(ValueError, match="no labels: labels=FILE names a table"):
        look(FolderCorpus(tmp_path / "audio"))
