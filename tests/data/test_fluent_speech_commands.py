from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from audiot.data.corpora import fluent_speech_commands
from audiot.data.corpora.fluent_speech_commands import FluentSpeechCommandsCorpus
from audiot.data.prepare import prepare

HEADER = ("", "path", "speakerId", "transcription", "action", "object", "location")
INTENTS = (
    ("Turn on the lights in the kitchen", "activate", "lights", "kitchen"),
    ("Set my phone's language to German", "change language", "German", "none"),
    ("Volume up, please", "increase", "volume", "none"),
)
SPEAKERS = {"train": ("2BqVo8kVB2Skwgyb", "4BrX8aDqK2cLZRYl"), "valid": ("V4ZbwLm9G5irobWn",), "test": ("d2waAp3pEjiWgrDEY",)}

Row = tuple[str, ...]


def rows_of(split: str) -> list[Row]:
    speakers = SPEAKERS[split]
    return [
        (f"wavs/speakers/{speaker}/{number}.wav", speaker, *intent)
        for speaker in speakers
        for number, intent in enumerate(INTENTS)
    ]


def write_table(root: Path, split: str, rows: Sequence[Row], header: Row = HEADER) -> None:
    (root / "data").mkdir(exist_ok=True)
    with (root / "data" / f"{split}_data.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *((str(number), *row) for number, row in enumerate(rows))])


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A whole miniature corpus: its sizes are the published ones."""
    for split in SPEAKERS:
        for number, (path, *_) in enumerate(rows_of(split)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(tmp_path / path, np.random.default_rng(number).uniform(-0.5, 0.5, 3200), 16000)
        write_table(tmp_path, split, rows_of(split))
    monkeypatch.setattr(fluent_speech_commands, "COUNTS", {split: len(rows_of(split)) for split in SPEAKERS})
    return tmp_path


def read(root, **options):
    return FluentSpeechCommandsCorpus(root, **options).manifests(progress=False)


def test_the_published_tables_list_30_043_utterances():
    assert sum(fluent_speech_commands.COUNTS.values()) == 30043


def test_the_tables_give_splits_and_three_slots(root, tmp_path):
    manifests = read(root)
    assert {split: [cut.id for cut in cuts] for split, cuts in manifests.splits.items()} == {
        "train": [f"{speaker}/{number}" for speaker in SPEAKERS["train"] for number in range(3)],
        "valid": [f"V4ZbwLm9G5irobWn/{number}" for number in range(3)],
        "test": [f"d2waAp3pEjiWgrDEY/{number}" for number in range(3)],
    }
    german = list(manifests.splits["test"])[1].supervisions[0]
    assert (german.speaker, german.text) == ("d2waAp3pEjiWgrDEY", "Set my phone's language to German")
    slots = {"action": "change language", "object": "German", "location": "none"}
    assert german.custom == slots | {"intent": "change language|German|none"}
    assert manifests.task_splits == {"intent": {"train": "train", "valid": "valid", "test": "test"}}
    prepared = prepare(manifests, tmp_path / "prepared", num_jobs=1, progress=False)
    assert prepared.counts == {"train": 6, "valid": 3, "test": 3}


def test_missing_recordings_are_counted_and_named(root):
    (root / "wavs/speakers/2BqVo8kVB2Skwgyb/1.wav").unlink()
    expected = r"1 of 12 recordings are missing in .* \(wavs/speakers/2BqVo8kVB2Skwgyb/1\.wav\): get it from https://fluent\.ai"
    with pytest.raises(FileNotFoundError, match=expected):
        read(root)
    assert len(read(root, partial=True).splits["train"]) == 5


@pytest.mark.parametrize("partial", [False, True])
def test_a_missing_table_is_named(root, partial):
    (root / "data" / "valid_data.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*data/valid_data\.csv: get it from https://fluent\.ai"):
        read(root, partial=partial)


def test_a_shortened_table_is_refused_unless_it_is_meant_to_be(root):
    write_table(root, "test", rows_of("test")[:2])
    with pytest.raises(ValueError, match=r"test_data\.csv lists 2 utterances, the published one 3: .*data\.partial=true"):
        read(root)
    assert len(read(root, partial=True).splits["test"]) == 2


def test_an_utterance_in_two_splits_is_refused(root):
    write_table(root, "test", [*rows_of("test")[:2], rows_of("train")[0]])
    with pytest.raises(ValueError, match=r"2BqVo8kVB2Skwgyb/0 is in both train and test of task 'intent'"):
        read(root)


def test_a_speaker_in_two_splits_is_refused_by_name(root):
    path, _, *rest = rows_of("test")[0]
    write_table(root, "test", [*rows_of("test")[1:], (path, "V4ZbwLm9G5irobWn", *rest)])
    with pytest.raises(ValueError, match=r"speaker V4ZbwLm9G5irobWn is in both valid_data\.csv and test_data\.csv"):
        read(root)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            rows_of("test"),
            tuple(name.replace("transcription", "text") for name in HEADER),
            "no column transcription; found , path",
        ),
        ([(*rows_of("test")[0][:2], " ", *rows_of("test")[0][3:])], HEADER, r"test_data\.csv:2: nothing in column transcription"),
        ([rows_of("test")[0][:-1]], HEADER, r"test_data\.csv:2: expected 7 values, one per column of the header, found 6"),
        ([(*rows_of("test")[0], "more")], HEADER, r"test_data\.csv:2: expected 7 values, one per column of the header, found 8"),
        ([rows_of("test")[0]] * 2, HEADER, r"test_data\.csv:3: wavs/speakers/d2waAp3pEjiWgrDEY/0\.wav occurs a second time"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(root, rows, header, message):
    write_table(root, "test", rows, header)
    with pytest.raises(ValueError, match=message):
        read(root, partial=True)


def test_bad_audio_is_rejected_and_the_rest_goes_on(root):
    path = root / "wavs/speakers/2BqVo8kVB2Skwgyb/1.wav"
    path.write_bytes(b"garbage")
    manifests = read(root)
    assert [(name, reason.split(":")[0]) for name, reason in manifests.rejected] == [(str(path), "unreadable")]
    assert len(manifests.splits["train"]) == 5


def test_the_config_makes_the_corpus(root):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        overrides = ["data=fluent_speech_commands", f"data.root={root}", "data.partial=true", "run_dir=run"]
        cfg = compose("prepare", overrides)
    corpus = instantiate(cfg.data.corpus)
    assert (corpus.root, corpus.partial) == (root, True)
