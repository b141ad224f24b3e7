"""Extracted hidden states equal those of each utterance alone, whatever was batched, interrupted or distributed."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.cut import MonoCut

import audiot
from audiot.base.parts import resolved
from audiot.checkpoint import AudioEncoder, load_encoder, save_encoder
from audiot.cli import main as audiot_main
from audiot.commands import extract as command
from audiot.commands.arguments import parse
from audiot.data.corpora.folder import FolderCorpus
from audiot.data.loaders import LoaderStoppedError
from audiot.data.prepare import prepare
from audiot.extraction.extract import Extractor
from audiot.extraction.states import write_shard
from audiot.interop.s3prl import export_s3prl

SECONDS = {"b": 0.9, "a": 0.31, "deep/er/c": 1.7, "d": 0.5, "e": 1.2, "f": 0.31}


@pytest.fixture(scope="module")
def encoder(tiny, tmp_path_factory):
    """Folder of an encoder, in a run's folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "encoder"
    save_encoder(folder, AudioEncoder(tiny["features"], tiny["model"]))
    return folder


@pytest.fixture
def audio(tmp_path):
    """A tree of noise, one file of it in stereo at 8 kHz."""
    generator = np.random.default_rng(0)
    for name, seconds in SECONDS.items():
        path = tmp_path / "audio" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        rate, shape = (8000, (2,)) if name == "d" else (16000, ())
        soundfile.write(path, 0.1 * generator.standard_normal((round(seconds * rate), *shape)), rate, subtype="FLOAT")
    return tmp_path / "audio"


def extract(encoder, data, out, *options):
    command.main(
        parse("extract", [str(data), str(out), "--encoder", str(encoder), "--device", "cpu", "--workers", "0", *options])
    )
    return audiot.read_states(out)


def alone(encoder, path):
    """All hidden states (layers + 1, T, d) of a file, in plain steps."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(1)
    if rate != 16000:
        import soxr

        mono = soxr.resample(mono, rate, 16000)
    with torch.no_grad():
        return load_encoder(encoder)(torch.from_numpy(mono)[None])[0][:, 0]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("batch_s", "shard_mb"), [("120", "1000"), ("0.1", "0.01"), ("2", "0.015")])
def test_every_utterance_has_the_states_that_it_has_alone(encoder, audio, tmp_path, batch_s, shard_mb):
    options = ("--layers=all", "--dtype", "float32", "--batch-s", batch_s, "--shard-mb", shard_mb)
    states = extract(encoder, audio, tmp_path / "out", *options)
    assert list(states) == sorted(SECONDS)  # the order of the files, not of the batches
    for name, tensor in states.items():
        expected = alone(encoder, audio / f"{name}.wav")
        assert (tensor.dtype, tensor.shape) == (torch.float32, expected.shape)
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)
        assert states.frames[name] == expected.shape[1]
        assert states.seconds[name] == pytest.approx(SECONDS[name], abs=1e-4)
    shards = list((tmp_path / "out").glob("shard-*.safetensors"))
    assert len(shards) == states.config["num_shards"]
    assert shard_mb == "1000" or len(shards) > 2


def test_chosen_layers_come_in_the_order_asked_and_one_has_no_dimension_of_layers(encoder, audio, tmp_path):
    expected = alone(encoder, audio / "e.wav")
    for number, (layers, wanted) in enumerate({"last": -1, "1": 1, "-1,0": [-1, 0]}.items()):
        states = extract(encoder, audio / "e.wav", tmp_path / str(number), f"--layers={layers}", "--dtype", "float32")
        torch.testing.assert_close(states["e"], expected[wanted], atol=1e-5, rtol=1e-5)
    assert states.config["layers"] == [2, 0]


def test_stored_and_computed_precision(encoder, audio, tmp_path):
    exact = extract(encoder, audio, tmp_path / "exact", "--dtype", "float32")
    half = extract(encoder, audio, tmp_path / "half")
    assert all(half[name].equal(exact[name].half()) for name in exact)
    for dtype, tolerance in {"bfloat16": 0.02, "float16": 0.003}.items():
        states = extract(encoder, audio, tmp_path / dtype, "--dtype", dtype, "--compute-dtype", dtype)
        for name, tensor in states.items():
            assert tensor.dtype == getattr(torch, dtype)
            error = (tensor.float() - exact[name]).norm() / exact[name].norm()
            assert 0 < error < tolerance


def test_the_middle_of_a_state_is_where_the_config_says(encoder, audio, tmp_path):
    states = extract(encoder, audio / "e.wav", tmp_path / "out")
    # Three frames of 25 ms every 10 ms: 0 to 45 ms, then 30 to 75 ms.
    assert (states.config["first_frame_ms"], states.config["frame_shift_ms"]) == (22.5, 30)
    assert len(states["e"]) == 39  # the last one ends at 1,185 ms of 1,200


def test_a_manifest_and_a_prepared_corpus_give_the_states_of_their_cuts(encoder, audio, demo_corpus, tmp_path):
    recording = Recording.from_file(audio / "deep" / "er" / "c.wav", recording_id="long")
    cuts = [MonoCut(f"cut{start}", start, 0.6, 0, recording=recording) for start in (0.0, 0.7)]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    states = extract(encoder, tmp_path / "cuts.jsonl.gz", tmp_path / "cuts", "--dtype", "float32")
    samples = torch.from_numpy(soundfile.read(audio / "deep" / "er" / "c.wav", dtype="float32")[0])
    for name, start in {"cut0.0": 0, "cut0.7": 11200}.items():
        with torch.no_grad():
            expected = load_encoder(encoder)(samples[None, start : start + 9600])[0][-1, 0]
        torch.testing.assert_close(states[name], expected, atol=1e-5, rtol=1e-5)
    corpus = extract(encoder, demo_corpus.directory, tmp_path / "corpus", "--dtype", "float32")
    ids = {split: [cut.id for cut in demo_corpus.cuts(split)] for split in demo_corpus.counts}
    assert list(corpus) == list(dict.fromkeys(name for names in ids.values() for name in names))
    valid = extract(encoder, demo_corpus.directory / "valid.jsonl.gz", tmp_path / "valid", "--dtype", "float32")
    assert list(valid) == ids["valid"]
    path = next(iter(demo_corpus.cuts("valid"))).recording.sources[0].source
    for found in (corpus, valid):
        torch.testing.assert_close(found[ids["valid"][0]], alone(encoder, path)[-1], atol=1e-5, rtol=1e-5)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(encoder, audio, tmp_path, monkeypatch):
    options = ("--shard-mb", "0.002", "--batch-s", "1")
    extract(encoder, audio, tmp_path / "whole", *options)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 5 + 2  # shards, index.csv, config.json
    written = []

    def dies(folder, number, *rest):
        if len(written) == 2:
            raise OSError("no power")
        written.append(number)
        write_shard(folder, number, *rest)

    monkeypatch.setattr("audiot.extraction.extract.write_shard", dies)
    with pytest.raises(OSError, match="no power"):
        extract(encoder, audio, tmp_path / "out", *options)
    with pytest.raises(FileNotFoundError, match="is not extracted to the end: run audiot extract again"):
        audiot.read_states(tmp_path / "out")
    before = contents(tmp_path / "out")
    assert sum(name.startswith("shard") for name in before) == 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    monkeypatch.undo()
    extract(encoder, audio, tmp_path / "out", *options)
    assert contents(tmp_path / "out") == whole
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # what was there was kept
    moved = shutil.move(audio, tmp_path / "moved")
    extract(encoder, moved, tmp_path / "out", *options)
    assert contents(tmp_path / "out") == whole


def test_parts_make_the_whole_in_any_order_and_the_last_writes_the_index(encoder, audio, tmp_path, capsys):
    options = ["--encoder", str(encoder), "--device", "cpu", "--workers", "0", "--shard-mb", "0.002", "--batch-s", "1"]
    command.main(parse("extract", [str(audio), str(tmp_path / "whole"), *options]))
    for part, last in (("2/2", False), ("1/2", True)):
        command.main(parse("extract", [str(audio), str(tmp_path / "out"), *options, "--part", part]))
        assert (tmp_path / "out" / "index.csv").is_file() == last
        assert ("3 of 5 shards, to other parts" in capsys.readouterr().out) == (not last)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    command.main(parse("extract", [str(audio), str(tmp_path / "out"), *options, "--part", "7/9"]))  # nothing to do
    assert "0 utterances" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers=0"], r"was extracted with layers \[2\], now it is \[0\]"),
        (["--dtype", "float32"], "was extracted with dtype float16, now it is float32"),
        (["--compute-dtype", "bfloat16"], "compute_dtype float32, now it is bfloat16"),
        (["--shard-mb", "7"], "shard_mb 1000.0, now it is 7.0"),
    ],
)
def test_a_folder_of_other_settings_is_refused(encoder, audio, tmp_path, options, message):
    extract(encoder, audio, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as caught:
        extract(encoder, audio, tmp_path / "out", *options)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before


def test_a_folder_of_another_encoder_or_of_other_data_is_refused(encoder, audio, tiny, tmp_path):
    extract(encoder.parent, audio, tmp_path / "out")  # the run's folder names its encoder
    torch.manual_seed(1)
    save_encoder(tmp_path / "other", AudioEncoder(tiny["features"], tiny["model"]))
    with pytest.raises(ValueError, match=r"extracted with encoder.digest [0-9a-f]+, now it is "):
        extract(tmp_path / "other", audio, tmp_path / "out")
    extract(shutil.copytree(encoder, tmp_path / "copy"), audio, tmp_path / "out")
    (audio / "b.wav").unlink()
    with pytest.raises(ValueError, match=r"data.utterances 6, now it is 5: choose another folder"):
        extract(encoder, audio, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"a.wav is a file: the last argument is the folder to write"):
        extract(encoder, audio, audio / "a.wav")


def test_what_cannot_be_used_is_listed_and_the_rest_is_done(encoder, audio, tmp_path, monkeypatch, capsys):
    (audio / "broken.wav").write_bytes(b"RIFF nothing")
    soundfile.write(audio / "short.wav", np.zeros(100), 16000)
    samples = 0.1 * np.random.default_rng(1).standard_normal(16000)
    samples[5] = np.nan
    soundfile.write(audio / "nan.wav", samples, 16000, subtype="FLOAT")
    soundfile.write(audio / "long.wav", 0.1 * np.random.default_rng(2).standard_normal(16000 * 6), 16000)
    soundfile.write(audio / "silent.wav", np.zeros(16000), 16000)
    os.mkfifo(audio / "pipe.wav")
    limited = json.loads((encoder / "config.json").read_text())
    limited["model"]["positions"] = {"part": "positions/learned"}  # up to 140 states, 4.2 s
    torch.manual_seed(0)
    parts = {name: resolved(limited[name], "limited", place=name) for name in ("features", "model")}
    save_encoder(tmp_path / "limited", AudioEncoder(**parts))
    for _ in range(2):  # the second time, all that is there is kept, and the rest is tried again
        with pytest.raises(SystemExit) as stop:
            extract(tmp_path / "limited", audio, tmp_path / "out")
        message = str(stop.value)
        assert message.startswith("audiot: error: 6 utterances can't be used:\n")
        for name, reason in {
            str(audio / "broken.wav"): "unreadable: ",
            str(audio / "pipe.wav"): "not a regular file",
            "silent": "silent: all zeros, silence_dbfs is -70",
            "short": "too short: 0.006 s",
            "nan": "non-finite samples",
            "long": "sequence has 199 frames but max_frames is 140",
        }.items():
            assert f"\n  {name}: {reason}" in message
        states = audiot.read_states(tmp_path / "out")
        assert list(states) == sorted(SECONDS)
        for name in states:  # also of the batch that was too long in one of its utterances
            expected = alone(tmp_path / "limited", audio / f"{name}.wav")[-1]
            torch.testing.assert_close(states[name].float(), expected, atol=3e-3, rtol=3e-3)
    soundfile.write(audio / "nan.wav", np.nan_to_num(samples), 16000, subtype="FLOAT")
    with pytest.raises(SystemExit, match="5 utterances can't be used"):
        extract(tmp_path / "limited", audio, tmp_path / "out")
    assert list(audiot.read_states(tmp_path / "out")) == sorted([*SECONDS, "nan"])


def test_a_prepared_corpus_gives_all_that_preparation_accepted(encoder, tmp_path):
    corpus = tmp_path / "in"
    corpus.mkdir()
    for number in range(4):
        soundfile.write(corpus / f"{number}.wav", np.zeros(1500 if number else 16000), 16000)
    manifests = FolderCorpus(corpus).manifests(False)
    prepare(manifests, tmp_path / "prepared", min_duration_s=0.05, silence_dbfs=-10000, num_jobs=1, progress=False)
    assert len(extract(encoder, tmp_path / "prepared", tmp_path / "out")) == 4


def test_a_cut_of_a_manifest_is_read_as_preparation_reads_it(encoder, audio, tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    soundfile.write(tmp_path / "chained.ogg", noise, 16000)
    cuts = CutSet.from_cuts(Recording.from_file(path).to_cut() for path in (tmp_path / "chained.ogg", audio / "a.wav"))
    cuts.to_file(tmp_path / "cuts.jsonl")
    (tmp_path / "chained.ogg").write_bytes((tmp_path / "chained.ogg").read_bytes() * 2)
    with pytest.raises(SystemExit, match="not as its manifest says: 32000 samples, not 16000"):
        extract(encoder, tmp_path / "cuts.jsonl", tmp_path / "out")


def test_states_beyond_the_range_of_float16_are_refused_by_name(encoder, audio, tiny, tmp_path):
    torch.manual_seed(0)
    large = AudioEncoder(tiny["features"], tiny["model"])
    with torch.no_grad():
        large.encoder.layers[1].ffn_norm.weight.fill_(1e6)
    save_encoder(tmp_path / "large", large)
    with pytest.raises(SystemExit, match=r"6 utterances can't be used:\n  .*take another --dtype"):
        extract(tmp_path / "large", audio, tmp_path / "out")
    assert len(extract(tmp_path / "large", audio, tmp_path / "wide", "--dtype", "bfloat16")) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers=3"], "hidden states 0 to 2, or -1 to -3"),
        (["--layers=2,-1"], "names a hidden state twice"),
        (["--layers=top"], "must be last, all or numbers"),
        (["--part", "3/2"], "must be K/N"),
        (["--batch-s", "0"], "--batch-s must be above 0"),
        (["--device", "nowhere"], "no device 'nowhere' here"),
    ],
)
def test_wrong_options_are_told_in_one_line_and_write_nothing(encoder, audio, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        extract(encoder, audio, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_files_of_one_name_and_missing_ones_are_refused(encoder, audio, tmp_path):
    soundfile.write(audio / "a.flac", np.zeros(16000), 16000)
    with pytest.raises(ValueError, match="two utterances have the id 'a'"):
        extract(encoder, audio, tmp_path / "out")
    with pytest.raises(ValueError, match="no utterance can be used, the first because: missing"):
        extract(encoder, tmp_path / "nothing.wav", tmp_path / "out")


def test_the_command_says_what_it_wrote_and_how_to_read_it(encoder, audio, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("audiot.extraction.extract.ALONE_S", 0)  # worker processes
    audiot_main(["extract", str(audio), str(tmp_path / "out"), f"--encoder={encoder}", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"wrote   {tmp_path / 'out'}: 6 utterances, 0.00 h, ")
    program = "import audiot\n" + "\n".join(line[8:] for line in lines[-2:-1]) + "\nfound = " + lines[-1][8:]
    names: dict = {}
    exec(program, names)
    assert names["found"].shape == (9, 24)
    with (tmp_path / "out" / "index.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0] == {"utterance": "a", "shard": "0", "frames": "9", "seconds": "0.31"}
    assert pickle.loads(pickle.dumps(names["states"]))["a"].equal(names["states"]["a"])


def test_code_is_generated_for_our_own_encoders_where_that_is_asked_for(encoder, audio, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(AudioEncoder, "compile", lambda self: compiled.append(self))
    extract(encoder, audio, tmp_path / "cpu")
    assert not compiled  # not by default
    extract(encoder, audio, tmp_path / "out", "--compile")
    assert len(compiled) == 1


def test_a_checkpoint_of_s3prl_gives_the_states_of_the_encoder_that_it_is(audio, tiny, tmp_path):
    positions = {"positions": {"_target_": "audiot.positions.Sinusoid"}}
    torch.manual_seed(0)
    features = {"_target_": "audiot.features.KaldiFbank", "num_mel_bins": 20}
    save_encoder(tmp_path / "encoder", AudioEncoder(features, tiny["model"] | positions))
    export_s3prl(tmp_path / "encoder", tmp_path / "mockingjay.ckpt")
    ours = extract(tmp_path / "encoder", audio / "e.wav", tmp_path / "ours", "--dtype", "float32")
    theirs = extract(tmp_path / "mockingjay.ckpt", audio / "e.wav", tmp_path / "theirs", "--dtype", "float32", "--upstream=s3prl")
    torch.testing.assert_close(theirs["e"], ours["e"], atol=1e-4, rtol=1e-4)


def test_a_loader_process_that_is_killed_ends_it_in_one_line(encoder, audio, tmp_path, monkeypatch):
    encode, others = Extractor._encode, set(multiprocessing.active_children())

    def kill(extractor, batch):
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        return encode(extractor, batch)

    monkeypatch.setattr(Extractor, "_encode", kill)
    options = ("--workers", "1", "--batch-s", "0.1")
    with pytest.raises(
        LoaderStoppedError, match=r"^the loader of data stopped after the batch with \S+: process \d+ \(SIGKILL\)"
    ) as stop:
        extract(encoder, audio, tmp_path / "out", *options)
    assert str(stop.value).endswith("ended; for want of memory perhaps: lower --workers or --batch-s")
    monkeypatch.undo()
    assert set(extract(encoder, audio, tmp_path / "out", *options)) == set(SECONDS)  # it goes on
