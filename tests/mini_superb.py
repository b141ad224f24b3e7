"""Miniature trees of the four corpora of SUPERB's tasks, in their published layouts: noise, and a few utterances a class."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
INTENTS = (("Turn on the lights", "activate", "lights", "kitchen"), ("Volume up", "increase", "volume", "none"))
SENTENCES = ("A BAD CAB", "CAB A DAB")
LEXICON = "A AH0\nBAD B AE1 D\nCAB K AE1 B\nDAB D AE1 B\n"


def noise(path: Path, seed: int, seconds: float = 0.4) -> None:
    """A file of noise, the same for a seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE))
    soundfile.write(path, samples, RATE, subtype="PCM_16")


def librispeech(root: Path) -> list[str]:
    """Two readers to train on, one each to validate and to test; the overrides of phone recognition, with a lexicon."""
    readers = {"103": "train-clean-100", "1034": "train-clean-100", "84": "dev-clean", "61": "test-clean"}
    for number, (reader, subset) in enumerate(readers.items()):
        place = root / subset / reader / "1"
        ids = [f"{reader}-1-{index:04d}" for index in range(4)]
        for index, name in enumerate(ids):
            noise(place / f"{name}.flac", 10 * number + index)
        text = [f"{name} {SENTENCES[index % 2]}\n" for index, name in enumerate(ids)]
        (place / f"{reader}-1.trans.txt").write_text("".join(text))
    lines = [f"{reader:<5}| F | {subset:<17}| 25.00 | Reader {reader}\n" for reader, subset in readers.items()]
    (root / "SPEAKERS.TXT").write_text(";ID  |SEX| SUBSET           |MINUTES| NAME\n" + "".join(lines))
    (root.parent / "lexicon.txt").write_text(LEXICON)
    return [f"downstream.labels.lexicon={root.parent / 'lexicon.txt'}"]


def speech_commands(root: Path) -> None:
    """Version 1, with its test set of twelve classes."""
    speakers = {"train": ("00000001", "00000002"), "validation": ("00000003",), "testing": ("00000004",)}
    listed: dict[str, list[str]] = {part: [] for part in speakers}
    for number, word in enumerate((*KEYWORDS, "bed")):
        for part, voices in speakers.items():
            for voice in voices:
                name = f"{word}/{voice}_nohash_0.wav"
                noise(root / name, number)
                listed[part].append(f"{name}\n")
    for part in ("validation", "testing"):
        (root / f"{part}_list.txt").write_text("".join(listed[part]))
    noise(root / "_background_noise_" / "white_noise.wav", 99, 15)
    test_set = root.parent / "speech_commands_test_set_v0.01"
    for number, word in enumerate(KEYWORDS):
        noise(test_set / word / "00000004_nohash_0.wav", number)
    noise(test_set / "_unknown_" / "bed_00000004_nohash_0.wav.wav", 10)
    noise(test_set / "_silence_" / "1.wav", 98, 1.0)


def fluent_speech_commands(root: Path) -> None:
    """Two intents of three slots."""
    speakers = {"train": ("2BqVo8kVB2Skwgyb", "4BrX8aDqK2cLZRYl"), "valid": ("V4ZbwLm9G5irobWn",), "test": ("d2waAp3pEjiWgrDEY",)}
    (root / "data").mkdir(parents=True)
    for part, voices in speakers.items():
        rows = []
        for voice in voices:
            for number, intent in enumerate(INTENTS):
                path = f"wavs/speakers/{voice}/{number}.wav"
                noise(root / path, number)
                rows.append([len(rows), path, voice, *intent])
        with (root / "data" / f"{part}_data.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["", "path", "speakerId", "transcription", "action", "object", "location"], *rows])


def voxceleb1(root: Path) -> None:
    """Five speakers to train on and two of the official test's, three videos each."""
    speakers = ("id10001", "id10002", "id10269", "id10310", "id11251", "id10270", "id10309")
    lines = []
    for number, speaker in enumerate(speakers):
        for part, video in enumerate(("1zcIwhmdeo4", "-z8KsBjdNkU", "J9lHsKG98U8"), 1):
            for index in (1, 2):
                name = f"{speaker}/{video}/{index:05d}.wav"
                noise(root / "wav" / name, number)
                lines.append(f"{part} {name}\n")
    (root / "iden_split.txt").write_text("".join(lines))
    one, video, other = "id10270", "1zcIwhmdeo4", "id10309"
    trials = (f"1 {one}/{video}/00001.wav {one}/{video}/00002.wav\n", f"0 {one}/{video}/00001.wav {other}/{video}/00001.wav\n")
    (root / "veri_test2.txt").write_text("".join(trials))
