"""Inference with a fine-tuned model: its predictions, their order, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import groupby, pairwise

import numpy as np
import pytest
import soundfile
import torch
from lhotse.supervision import AlignmentItem
from torch import nn
from untrained import CLASSES, write_runs

import audiot
from audiot.commands import predict as command
from audiot.commands.arguments import parse
from audiot.data.audio import BadAudioError, read_audio
from audiot.data.labels import FrameLabels
from audiot.downstream.classifier import by_length, compute_with_fallback, load_classifier
from audiot.downstream.module import DownstreamModule


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A folder with a run of each task, untrained."""
    return write_runs(tiny, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def speech(demo_corpus):
    """Paths of seven utterances of different lengths."""
    cuts = list(demo_corpus.cuts("train"))[:7]
    assert len({cut.num_samples for cut in cuts}) == 7
    return [cut.recording.sources[0].source for cut in cuts]


def outputs_alone(run, path):
    """The head's outputs (frames, C) or (C,) for a file by itself, in plain steps, and its samples."""
    module = DownstreamModule.from_checkpoint(run / "checkpoints" / "best.ckpt")
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    with torch.no_grad():
        states, lengths = module.upstream(samples[None], torch.tensor([len(samples)]))
        mixed = (module.layers.logits.softmax(0)[:, None, None, None] * states).sum(0)
        return module.head(mixed, lengths)[0], len(samples)


def test_utterances_are_labelled_in_the_order_asked_as_each_is_alone(runs, speech):
    rows = load_classifier(runs / "keyword").predict(speech, batch_s=7.0)
    assert [row["file"] for row in rows] == [str(path) for path in speech]
    assert len({row["label"] for row in rows} | {round(row["score"], 3) for row in rows}) > 3
    for path, row in zip(speech, rows, strict=True):
        expected = outputs_alone(runs / "keyword", path)[0].softmax(0).tolist()
        assert [row["scores"][name] for name in CLASSES] == pytest.approx(expected, abs=1e-4)
        assert row["score"] == max(row["scores"].values())
        assert row["scores"][row["label"]] == row["score"]


def test_segments_cover_the_audio_and_read_back_as_the_best_class_of_each_frame(runs, speech, demo_corpus):
    classifier = load_classifier(runs / "phone")
    cut = next(iter(demo_corpus.cuts("train")))
    (row,) = classifier.predict(speech[:1])
    segments = row["segments"]
    outputs, num_samples = outputs_alone(runs / "phone", speech[0])
    assert segments[0]["start"] == 0
    assert segments[-1]["end"] == pytest.approx(num_samples / 16000, abs=1e-4)
    assert all(one["end"] == other["start"] and one["label"] != other["label"] for one, other in pairwise(segments))
    items = [AlignmentItem(part["label"], part["start"], part["end"] - part["start"]) for part in segments]
    cut.supervisions[0].alignment = {"phone": items}
    index = {name: number for number, name in enumerate(CLASSES)}
    encoded = FrameLabels("phone", classifier.features).encode(cut, index)
    assert encoded[: len(outputs)].tolist() == outputs.argmax(-1).tolist()
    first = outputs.softmax(-1).max(-1).values[: next(len(list(group)) for _, group in groupby(encoded.tolist()))]
    assert segments[0]["score"] == pytest.approx(first.mean().item(), abs=1e-4)


def test_ctc_gives_the_text_of_the_best_path(runs, speech):
    rows = load_classifier(runs / "asr").predict(speech)
    for path, row in zip(speech, rows, strict=True):
        best = outputs_alone(runs / "asr", path)[0].argmax(-1).tolist()
        assert row["text"].split() == [CLASSES[number - 1] for number, _ in groupby(best) if number]
        assert 0 < row["score"] <= 1


def test_slots_are_labelled_each_by_itself(runs, speech):
    rows = load_classifier(runs / "intent").predict(speech)
    for path, row in zip(speech, rows, strict=True):
        outputs = outputs_alone(runs / "intent", path)[0]
        what, where = outputs[:2].softmax(0), outputs[2:].softmax(0)
        assert row["label"] == f"{['lamp', 'music'][what.argmax()]} {['bath', 'hall'][where.argmax()]}"
        assert row["score"] == pytest.approx((what.max() * where.max()).item(), abs=1e-4)


def test_waveforms_give_what_their_files_give(runs, speech):
    classifier = audiot.load_classifier(str(runs / "keyword"))
    samples = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in speech[:2]]
    padded = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=0.3)
    rows = classifier(padded, torch.tensor([len(part) for part in samples]))
    for row, said in zip(classifier.predict(speech[:2]), rows, strict=True):
        assert row["label"] == said["label"]
        assert row["score"] == pytest.approx(said["score"], abs=1e-5)
    assert classifier(samples[0][None])[0]["score"] == pytest.approx(rows[0]["score"], abs=1e-4)
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


@pytest.mark.parametrize(
    ("suffix", "rate", "channels"), [("wav", 16000, 1), ("flac", 44100, 2), ("ogg", 48000, 1), ("wav", 8000, 3)]
)
def test_audio_of_any_kind_is_read_as_mono_at_the_rate_of_the_model(tmp_path, suffix, rate, channels):
    times = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * times)
    parts = [tone * (1 + place - (channels - 1) / 2) / 4 for place in range(channels)]  # their average: tone / 4
    soundfile.write(tmp_path / f"tone.{suffix}", np.stack(parts, 1), rate)
    samples = read_audio(tmp_path / f"tone.{suffix}", 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 4
    assert samples.dtype == np.float32
    assert len(samples) == pytest.approx(16000, abs=1)
    assert np.abs(samples[500:15500] - expected[500:15500]).max() < 0.01


def bad_files(folder):
    """Expected reason by path."""
    soundfile.write(folder / "short.wav", np.full(500, 0.1), 16000)
    soundfile.write(folder / "endless.wav", np.array([0.1, np.inf] * 8000), 16000, subtype="FLOAT")
    (folder / "words.wav").write_text("not audio")
    soundfile.write(folder / "zeros.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "hum.wav", np.sqrt(2) * 10 ** (-75 / 20) * np.sin(np.arange(16000)), 16000, subtype="FLOAT")
    os.mkfifo(folder / "pipe.wav")
    return {
        folder / "short.wav": "too short: 0.031 s",
        folder / "endless.wav": "non-finite",
        folder / "words.wav": "unreadable",
        folder / "zeros.wav": "silent: all zeros, silence_dbfs is -70",
        folder / "hum.wav": "silent: -75.0 dBFS",
        folder / "pipe.wav": "not a regular file",
        folder / "none.wav": "missing",
    }


def test_a_bad_file_gets_its_reason_and_the_others_their_answers(runs, speech, tmp_path):
    classifier = load_classifier(runs / "keyword")
    bad = bad_files(tmp_path)
    paths = [part for pair in zip(bad, speech, strict=True) for part in pair]
    rows = classifier.predict(paths, keep_going=True)
    answers = classifier.predict(speech)
    for path, row in zip(paths, rows, strict=True):
        if path in bad:
            assert row["error"].startswith(bad[path])
            assert row.keys() == {"file", "error"}
    for row, answer in zip(rows[1::2], answers, strict=True):
        assert row["label"] == answer["label"]
        assert row["score"] == pytest.approx(answer["score"], abs=1e-4)
    for path, reason in bad.items():
        with pytest.raises(ValueError, match=f"{path.name}: {reason}"):
            classifier.predict([speech[0], path])


def test_silence_counts_where_that_is_asked_for(runs, tmp_path):
    soundfile.write(tmp_path / "zeros.wav", np.zeros(16000), 16000)
    (row,) = load_classifier(runs / "keyword").predict([tmp_path / "zeros.wav"], silence_dbfs=-math.inf)
    assert row["label"] in CLASSES


def test_arrays_with_a_rate_give_what_their_files_give(runs, speech, tmp_path):
    classifier = load_classifier(runs / "keyword")
    floats = [soundfile.read(path, dtype="float32")[0] for path in speech[:2]]
    integers = soundfile.read(speech[0], dtype="int16")[0]
    stereo = np.stack([floats[0], np.zeros_like(floats[0])], 1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 8000, subtype="FLOAT")
    items = [(floats[0], 16000), speech[1], (torch.from_numpy(floats[1]), 16000), (integers, 16000), (floats[0].tolist(), 16000)]
    rows = classifier.predict([*items, (stereo, 8000), tmp_path / "stereo.wav"])
    assert [row["file"] for row in rows[:4]] == ["item 0", speech[1], "item 2", "item 3"]
    first, second = classifier.predict(speech[:2])
    for row, said in zip(rows, [first, second, second, first, first, rows[6], rows[6]], strict=True):
        assert row["label"] == said["label"]
        assert row["score"] == pytest.approx(said["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ((np.zeros(16000), 16000), "silent: all zeros"),
        ((np.full(16000, np.nan), 16000), "non-finite samples"),
        ((np.full(800, 0.1), 16000), "too short: 0.050 s"),
        ((np.zeros(0), 16000), "empty"),
        ((np.zeros((1, 2, 3)), 16000), r"samples must be \(N,\) or \(N, channels\).*found the shape \(1, 2, 3\)"),
        ((np.full(16000, 5000), 16000), "found int64"),
        (np.zeros(16000), r"a path or a pair \(samples, sample_rate\), found ndarray"),
        (None, "found NoneType"),
        (([[0.1, 0.2], [0.3]], 16000), "samples are not an array: "),
        ((torch.full((16000,), 0.1, dtype=torch.bfloat16), 16000), "samples are not an array: .*BFloat16"),
        ((torch.full((16000,), 0.1).to_sparse(), 16000), "samples are not an array: "),
    ],
)
def test_an_array_that_cannot_be_used_says_why(runs, speech, item, reason):
    classifier = load_classifier(runs / "keyword")
    good, bad = classifier.predict([speech[0], item], keep_going=True)
    assert "label" in good
    assert re.search(reason, bad["error"])
    with pytest.raises(ValueError, match=f"item 1: .*{reason}"):
        classifier.predict([speech[0], item])


def test_one_path_is_not_taken_for_a_list_of_letters(runs):
    with pytest.raises(ValueError, match=r"takes a list of files, found one: \['a.wav'\]"):
        load_classifier(runs / "keyword").predict("a.wav")


def test_what_is_too_long_for_a_model_does_not_take_its_batch_with_it():
    def squares(items):
        if max(items) > 9:
            raise ValueError(f"sequence has {max(items)} frames but\nmax_frames is 9")
        return [item * item for item in items]

    assert compute_with_fallback([1, 2, 3], squares) == [1, 4, 9]
    assert compute_with_fallback([1, 12, 3], squares) == [1, "sequence has 12 frames but max_frames is 9", 9]
    assert compute_with_fallback([], squares) == []


def test_batches_hold_every_file_once_within_the_budget():
    seconds = {number: 0.5 + (number * 37 % 41) for number in range(60)}
    batches = by_length(seconds, 30.0)
    assert sorted(number for batch in batches for number in batch) == sorted(seconds)
    assert all(len(batch) == 1 or len(batch) * max(seconds[number] for number in batch) <= 30 for batch in batches)
    lengths = [seconds[number] for batch in batches for number in batch]
    assert lengths == sorted(lengths)


# What is no fine-tuned model


def test_a_pretraining_run_is_refused_with_the_command_that_makes_a_classifier_of_it(runs, tmp_path):
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"whose encoder is not a classifier: fine-tune it with audiot finetune .*run/encoder"):
        load_classifier(tmp_path / "run")
    shutil.copytree(runs / "keyword", tmp_path / "run" / "probes" / "mine")
    with pytest.raises(ValueError, match=r"not a classifier.*below it: .*run/probes/mine"):
        load_classifier(tmp_path / "run")
    assert load_classifier(tmp_path / "run" / "probes" / "mine").classes == CLASSES


def test_a_folder_without_a_model_names_those_below_it(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no fine-tuned model at .*/nowhere: expected"):
        load_classifier(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"below it: .*asr, .*intent, .*keyword"):
        load_classifier(runs)


def changed(runs, folder, change):
    """A run whose checkpoint is a copy of another one, changed by ``change``."""
    content = torch.load(runs / "keyword" / "checkpoints" / "best.ckpt", weights_only=True)
    change(content)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content, folder / "checkpoints" / "best.ckpt")
    return folder


class Malicious:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_loading_runs_no_code_of_the_checkpoint(runs, tmp_path):
    trap = str(tmp_path / "trapped")
    with pytest.raises(ValueError, match="holds more than weights and settings"):
        load_classifier(changed(runs, tmp_path / "pickle", lambda content: content.update(extra=Malicious(trap))))
    target = {"_target_": "os.mkdir", "path": trap}
    with pytest.raises(ValueError, match=r"names os\.mkdir"):
        load_classifier(changed(runs, tmp_path / "target", lambda content: content["hyper_parameters"].update(objective=target)))
    assert not os.path.exists(trap)


def test_damaged_and_foreign_checkpoints_are_named(runs, tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint of audiot: expected hyper_parameters"):
        load_classifier(changed(runs, tmp_path / "foreign", lambda content: content.pop("hyper_parameters")))
    whole = (runs / "keyword" / "checkpoints" / "best.ckpt").read_bytes()
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    (tmp_path / "cut" / "checkpoints" / "best.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_classifier(tmp_path / "cut")
    with pytest.raises(ValueError, match="no device 'tpu9'"):
        load_classifier(runs / "keyword", device="tpu9")


def test_a_verifier_loads_without_the_trials_it_was_tested_with(runs, tmp_path):
    shutil.copytree(runs / "verification", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["objective"]["trials"] = str(tmp_path / "moved.txt")
    torch.save(content, path)
    assert load_classifier(tmp_path / "run").objective.trials is None


# The command


def printed(capsys, *arguments):
    command.main(parse("predict", [str(argument) for argument in arguments]))
    return capsys.readouterr().out.splitlines()


def test_the_command_prints_a_line_a_file(runs, speech, capsys):
    (best,) = printed(capsys, runs / "keyword", speech[0], "--device", "cpu")
    scores = outputs_alone(runs / "keyword", speech[0])[0].softmax(0)
    order = scores.argsort(descending=True).tolist()
    assert best.split() == [speech[0], CLASSES[order[0]], f"{scores[order[0]]:.2f}"]
    (three,) = printed(capsys, runs / "keyword", speech[0], "--top", "3")
    assert three.split()[1::2] == [CLASSES[number] for number in order[:3]]
    (text,) = printed(capsys, runs / "asr", speech[0])
    assert text.endswith(load_classifier(runs / "asr").predict(speech[:1])[0]["text"])
    (intent,) = printed(capsys, runs / "intent", speech[0], "--top", "2")
    assert {"what:", "lamp", "music", "where:", "bath", "hall"} <= set(intent.split())
    file, *segments = printed(capsys, runs / "phone", speech[0])
    assert file == speech[0]
    assert segments[0].split()[0] == "0.000"
    assert len(segments) == len(load_classifier(runs / "phone").predict(speech[:1])[0]["segments"])


def test_the_command_prints_json_lines_with_the_best_labels(runs, speech, capsys):
    lines = [json.loads(line) for line in printed(capsys, runs / "keyword", *speech[:3], "--json", "--top", "2")]
    assert [line["file"] for line in lines] == [str(path) for path in speech[:3]]
    for line in lines:
        assert line["top"][0]["label"] == line["label"]
        assert len(line["top"]) == 2
        assert "scores" not in line
    (intent,) = [json.loads(line) for line in printed(capsys, runs / "intent", speech[0], "--json")]
    assert intent["slots"].keys() == {"what", "where"}


def test_the_command_prints_how_alike_each_pair_of_files_is(runs, speech, capsys):
    lines = printed(capsys, runs / "verification", *speech[:3])
    embeddings = [outputs_alone(runs / "verification", path)[0] for path in speech[:3]]
    expected = [float(torch.cosine_similarity(embeddings[one], embeddings[two], dim=0)) for one, two in ((0, 1), (0, 2), (1, 2))]
    assert [line.split()[:2] for line in lines] == [[speech[0], speech[1]], [speech[0], speech[2]], [speech[1], speech[2]]]
    assert [float(line.split()[2]) for line in lines] == pytest.approx(expected, abs=2e-3)
    with pytest.raises(ValueError, match="one file makes no pair"):
        command.main(parse("predict", [str(runs / "verification"), speech[0]]))
    (line,) = [json.loads(line) for line in printed(capsys, runs / "verification", speech[0], "--json")]
    assert math.hypot(*line["embedding"]) == pytest.approx(1, abs=1e-5)


def test_the_command_takes_folders_and_ends_with_the_bad_files_and_exit_code_1(runs, speech, tmp_path, capsys):
    for folder in ("a", "b/c", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(speech[0], tmp_path / folder / "good.WAV")
    (tmp_path / "b" / "notes.txt").write_text("no audio")
    (tmp_path / "b" / "movie.m4a").write_text("no audio that soundfile reads")
    with pytest.raises(SystemExit) as stop:
        command.main(parse("predict", [str(runs / "keyword"), str(tmp_path), str(tmp_path / "gone.wav")]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / "a" / "good.WAV"), str(tmp_path / "b" / "c" / "good.WAV")]
    heading, *reasons = str(stop.value).splitlines()
    assert heading == "audiot: error: 2 of 4 files can't be used:"
    assert reasons[0].startswith(f"  {tmp_path / 'b' / 'movie.m4a'}: unreadable")
    assert reasons[1] == f"  {tmp_path / 'gone.wav'}: missing"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no audio files"):
        command.main(parse("predict", [str(runs / "keyword"), str(tmp_path / "empty")]))


def test_importing_audiot_does_not_wait_for_pytorch():
    code = "import audiot, sys; assert callable(audiot.load_classifier); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reading_a_truncated_file_says_so(tmp_path):
    soundfile.write(tmp_path / "whole.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 32000), 16000)
    content = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadAudioError, match=r"truncated|unreadable"):
        read_audio(tmp_path / "cut.flac", 16000)
