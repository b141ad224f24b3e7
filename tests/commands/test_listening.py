"""``audiot predict --microphone`` with a stand-in for the microphone: blocks that the tests choose."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import soundfile
import torch
from untrained import write_runs

from audiot.commands import predict as command
from audiot.commands.arguments import parse
from audiot.data.microphone import Block
from audiot.downstream.classifier import Classifier, load_classifier

RATE = 44100  # of the microphone; the models' is 16 kHz
WINDOW = ("--window", "3")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    return write_runs(tiny, tmp_path_factory.mktemp("runs"))


def sound(*bursts, seconds=6.0):
    """Noise of a quiet room with tones ``(start, end, Hz)`` in it."""
    times = np.arange(round(seconds * RATE)) / RATE
    samples = 1e-4 * np.random.default_rng(0).standard_normal(len(times))
    for start, end, hertz in bursts:
        samples += np.where((times >= start) & (times < end), 0.3 * np.sin(2 * np.pi * hertz * times), 0)
    return samples.astype(np.float32)


TWO = sound((1, 2, 300), (3.5, 4.2, 2000))


def blocks(samples, size=3001, lost=()):
    """Blocks whose size divides no window; before those in ``lost`` sound is missing."""
    for number, start in enumerate(range(0, len(samples), size)):
        yield Block(samples[start : start + size], number in lost)


@pytest.fixture
def microphone(monkeypatch):
    """A function that makes the microphone give blocks."""

    def give(content):
        class Stand:
            name, sample_rate = "stand-in", RATE

            def __init__(self, name):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def __iter__(self):
                return iter(content)

        monkeypatch.setattr("audiot.data.microphone.Microphone", Stand)

    return give


def heard(capsys, *arguments):
    """Lines of the output and of the errors."""
    command.main(parse("predict", [str(argument) for argument in arguments]))
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def spoken(tmp_path, lines):
    """Files of what the lines say was spoken in `TWO`, by their times."""
    paths = []
    for start, end in (map(float, line.split()[:2]) for line in lines):
        paths.append(tmp_path / f"{start}.wav")
        soundfile.write(paths[-1], TWO[round(start * RATE) : round(end * RATE)], RATE, subtype="FLOAT")
    return paths


def test_each_utterance_gets_what_its_file_gets(runs, microphone, tmp_path, capsys):
    microphone(blocks(TWO))
    lines, said = heard(capsys, runs / "keyword", "--microphone", "--top", 2, *WINDOW)
    assert [[*map(float, line.split()[:2])] for line in lines] == [
        pytest.approx([0.8, 2.2], abs=0.021),
        pytest.approx([3.3, 4.4], abs=0.021),
    ]
    classifier = load_classifier(runs / "keyword")
    for line, row in zip(lines, classifier.predict(spoken(tmp_path, lines)), strict=True):
        ranked = sorted(row["scores"].items(), key=lambda item: -item[1])[:2]
        assert line.split()[2:] == [part for label, score in ranked for part in (label, f"{score:.2f}")]
    assert said == ["audiot: listening to stand-in; Ctrl-C ends", "audiot: heard 6.0 s, 2 utterances"]


def test_json_has_times_from_the_beginning(runs, microphone, tmp_path, capsys):
    microphone(blocks(TWO, lost=(20,)))  # in the first utterance
    lines, said = heard(capsys, runs / "phone", "--microphone", "--json", *WINDOW)
    rows = [json.loads(line) for line in lines]
    expected = load_classifier(runs / "phone").predict(spoken(tmp_path, [f"{row['start']} {row['end']}" for row in rows]))
    for row, own in zip(rows, expected, strict=True):
        assert [part["label"] for part in row["segments"]] == [part["label"] for part in own["segments"]]
        times = [part["start"] for part in row["segments"]] + [row["end"]]
        assert times == pytest.approx([row["start"] + part["start"] for part in own["segments"]] + [row["end"]], abs=2e-4)
        assert row["segments"][-1]["end"] == pytest.approx(row["end"], abs=2e-3)
    assert [row.get("lost") for row in rows] == [True, None]
    assert said[-1].startswith("audiot: heard 6.0 s, 2 utterances, sound was lost 1 time: ")


def test_silence_has_no_predictions_and_a_time_ends_it(runs, microphone, capsys):
    microphone(blocks(np.zeros(20 * RATE, np.float32)))
    assert heard(capsys, runs / "keyword", "--microphone", "--seconds", 2.5)[1][-1] == "audiot: heard 2.5 s, 0 utterances"
    microphone(blocks(TWO))
    lines, said = heard(capsys, runs / "keyword", "--microphone", "--seconds", 1.5)
    assert [*map(float, lines[0].split()[:2])] == pytest.approx([0.8, 1.5], abs=0.021)  # what was being said
    assert said[-1] == "audiot: heard 1.5 s, 1 utterance"


@pytest.mark.parametrize("error", [ValueError("the microphone stand-in gives no sound any more"), KeyboardInterrupt()])
def test_a_microphone_that_is_gone_and_ctrl_c_end_with_the_summary(runs, microphone, capsys, error):
    def stop():
        yield from blocks(TWO[: 4 * RATE])
        raise error

    microphone(stop())
    with pytest.raises(type(error)):
        command.main(parse("predict", [str(runs / "keyword"), "--microphone"]))
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2  # the second one was being spoken
    assert captured.err.splitlines()[-1] == "audiot: heard 4.0 s, 2 utterances"


def test_voices_are_compared_with_those_of_files(runs, microphone, tmp_path, capsys):
    for name, hertz in (("low", 300), ("high", 2000)):
        soundfile.write(tmp_path / f"{name}.wav", sound((0.2, 1, hertz), seconds=1.2), RATE)
    files = [tmp_path / "low.wav", tmp_path / "high.wav"]
    microphone(blocks(TWO))
    lines, _ = heard(capsys, runs / "verification", *files, "--microphone", "--top", 2, *WINDOW)
    classifier = load_classifier(runs / "verification")
    known, own = ([row["embedding"] for row in classifier.predict(paths)] for paths in (files, spoken(tmp_path, lines)))
    cosines = torch.tensor(own) @ torch.tensor(known).T
    for line, row in zip(lines, cosines.tolist(), strict=True):
        shown = dict(zip(line.split()[2::2], map(float, line.split()[3::2]), strict=True))
        assert shown == {str(path): pytest.approx(cosine, abs=0.006) for path, cosine in zip(files, row, strict=True)}
    microphone(blocks(TWO))
    rows = [json.loads(line) for line in heard(capsys, runs / "verification", "--microphone", "--json", *WINDOW)[0]]
    assert [row["embedding"] for row in rows] == [pytest.approx(each, abs=1e-4) for each in own]
    for wrong, reason in (
        ([runs / "verification"], "name a file of each voice that is known"),
        ([runs / "keyword", files[0]], "takes files or --microphone, found both"),
    ):
        microphone([])
        with pytest.raises(ValueError, match=reason):
            heard(capsys, *wrong, "--microphone")


def test_an_utterance_that_a_model_cannot_take_is_refused_before_it_is_spoken(runs, microphone, capsys, monkeypatch):
    def short(self, waveforms, lengths=None):
        if waveforms.shape[1] > 10 * 16000:
            raise ValueError("sequence has 1333 frames but max_frames is 333")
        return [{"label": "up", "score": 1.0}]

    monkeypatch.setattr(Classifier, "forward", short)
    microphone([])
    heard(capsys, runs / "keyword", "--microphone")  # the default
    with pytest.raises(ValueError, match=r"can't use utterances of --window 40 s: .*max_frames"):
        heard(capsys, runs / "keyword", "--microphone", "--window", 40)


def test_a_terminal_shows_level_and_what_was_said_so_far(runs, microphone, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    microphone(blocks(TWO, 4410))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lines, said = heard(capsys, runs / "asr", "--microphone", *WINDOW)
    shown = [each.removeprefix("\033[K") for each in said]  # each begins by clearing the line
    assert all(len(each) < 70 for each in shown if "dBFS" in each)
    assert any(re.match(r"    0\.5 s  -80 dBFS \[ {20}\]", each) for each in shown)
    first = lines[0].split()[3:]
    assert first
    partial = [each.split("] ")[1].split() for each in shown if re.match(r"    1\.[3-9] s  -13 dBFS \[#{16} {4}\] \S", each)]
    assert partial
    assert all(set(each) <= {"down", "left", "stop", "up"} or each[0][0] == "…" for each in partial)
    assert said[-1].endswith("audiot: heard 6.0 s, 2 utterances")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "nothing to predict: name audio, audiot predict RUN FILE …, or give --microphone"),
        (["a.wav", "--seconds", "3"], "--seconds is for --microphone, which is not given"),
        (["a.wav", "--input", "3"], "--input is for --microphone"),
        (["--microphone", "--window", "0"], r"--window must be from 0.1 to 3600 seconds, found 0"),
        (["--microphone", "--window", "nan"], "--window must be"),
        (["--microphone", "--seconds", "-1"], "--seconds must be above 0, found -1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        parse("predict", ["RUN", *given])
