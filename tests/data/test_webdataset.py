"""WebDataset: an index of tar files that others wrote, in which nothing is run and from which nothing is extracted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from webserver import Server

from audiot.data import storage
from audiot.data.corpora.webdataset import WebDatasetCorpus
from audiot.data.datamodule import SpeechDataModule, open_pieces
from audiot.data.storage import StorageError

RATE = 16000


def audio(seconds=1.0, rate=RATE, kind="wav", channels=1, seed=0):
    """An audio file, and its samples (N, channels) in float32."""
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels)).astype(np.float32)
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind)
    return stream.getvalue()


def write(path, members):
    """A tar of (name, content), or of ready ``TarInfo``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


@pytest.fixture
def root(tmp_path):
    """Three shards of twelve utterances each, with speakers and keywords."""
    for shard in range(3):
        members = []
        for number in range(12):
            key = f"part/s{shard}-{number:02d}"
            labels = {
                "speaker": f"v{number % 6}",
                "label": ["yes", "no"][number % 2],
                "text": "a word",
                "n": number,
                "x": {"y": 1},
            }
            members += [(f"{key}.flac", audio(0.5 + 0.05 * number, kind="flac", seed=20 * shard + number))]
            members += [(f"{key}.json", json.dumps(labels).encode())]
        write(tmp_path / "root" / f"shard-{shard}.tar", members)
    return tmp_path / "root"


def opened(root, directory, when="update", **options):
    return WebDatasetCorpus(root, **options).open(directory, {}, when)


def pieces_of(corpus, split="train"):
    return {piece.id: piece for piece in open_pieces(corpus.directory, split, corpus.content)}


def test_every_utterance_is_read_with_its_labels(root, tmp_path):
    corpus = opened(root, tmp_path / "opened", train="shard-[01].tar", valid="shard-2.tar", test="shard-2.tar")
    assert dict(corpus.counts) == {"train": 24, "valid": 12, "test": 12}
    for shard in range(3):
        with tarfile.open(root / f"shard-{shard}.tar") as tar:
            for member in tar:
                if member.name.endswith(".flac"):
                    piece = pieces_of(corpus, "valid" if shard == 2 else "train")[member.name.removesuffix(".flac")]
                    expected, _ = soundfile.read(tar.extractfile(member), dtype="int16")
                    assert np.array_equal(piece.read(np.empty(piece.num_samples, np.int16)), expected)
    cut = next(iter(corpus.cuts("valid")))
    (label,) = cut.supervisions
    assert (cut.id, label.speaker, label.text, label.custom) == (
        "part/s2-00",
        "v0",
        "a word",
        {"speaker": "v0", "label": "yes", "n": 0},
    )


def test_speakers_are_held_out_and_every_utterance_comes_once_an_epoch(root, tmp_path):
    corpus = opened(root, tmp_path / "opened", valid_fraction=0.1)
    module = SpeechDataModule(corpus, "pretrain", batch_s=3.0, crop_s=0.5, lengths=[4000, 8000], num_workers=2)
    split = corpus.split_for("pretrain", "train")
    seen = Counter()
    for batch in module.train_dataloader():
        if batch["position"][0]:
            break
        seen.update(batch["ids"])
    assert seen == dict.fromkeys(pieces_of(corpus, split), 1)
    speakers = {role: {cut.supervisions[0].speaker for cut in corpus.cuts(role)} for role in ("train", "valid", "test")}
    assert not speakers["train"] & speakers["valid"]
    assert not speakers["train"] & speakers["test"]


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (16000, 2), (44100, 1), (8000, 2)])
def test_other_rates_and_channels_give_what_librosa_decodes(tmp_path, kind, rate, channels):
    content = audio(1.0, rate, kind, channels)
    write(tmp_path / "root" / "a.tar", [(f"{name}.{kind}", content) for name in "abc"])
    corpus = opened(tmp_path / "root", tmp_path / "opened", valid_fraction=0.3)
    (piece,) = pieces_of(corpus).values()
    decoded, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    expected = librosa.resample(decoded.mean(axis=1), orig_sr=rate, target_sr=RATE, res_type="soxr_hq")[: piece.num_samples]
    assert abs(piece.num_samples - RATE) < 0.08 * RATE
    assert np.allclose(piece.floats()[: len(expected)], expected, atol=1e-4)
    part = piece._replace(begin=4000, num_samples=2000)
    assert np.allclose(part.floats(), expected[4000:6000], atol=1e-4)


def test_labels_come_from_text_and_class_files_too(tmp_path):
    members = [(f"{name}.wav", audio()) for name in "abc"]
    members += [("a.txt", "ein Wört\n".encode()), ("b.cls", b"7"), ("c.json", b'{"speaker": 3, "text": " ", "label": null}')]
    write(tmp_path / "root" / "a.tar", members)
    names = {"train": "a.tar", "valid": "a.tar", "test": "a.tar"}
    with pytest.raises(ValueError, match=r"'a' is in the shards of data.train and of data.valid"):
        opened(tmp_path / "root", tmp_path / "opened", **names)
    for name in ("b", "c"):
        shutil.copy(write(tmp_path / f"{name}.tar", [(f"{name}{name}.wav", audio())]), tmp_path / "root")
    corpus = opened(tmp_path / "root", tmp_path / "opened", train="a.tar", valid="b.tar", test="c.tar")
    labels = {cut.id: cut.supervisions[0] for cut in corpus.cuts("train")}
    assert labels["a"].text == "ein Wört"
    assert labels["b"].custom == {"label": "7"}
    assert (labels["c"].speaker, labels["c"].text, labels["c"].custom) == ("3", None, {"speaker": 3})


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_nothing_is_run_and_nothing_escapes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    link = tarfile.TarInfo("link.wav")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("device.wav")
    device.type = tarfile.CHRTYPE
    bomb = pickle.dumps(Bomb())
    members = [link, device, ("../../up.wav", audio()), ("/abs/olute.wav", audio()), ("c.wav", audio())]
    members += [("c.pyd", bomb), ("c.pickle", bomb), ("c.json", json.dumps({"__reduce__": "x", "text": "t"}).encode())]
    write(tmp_path / "root" / "a.tar", members)
    before = {path for path in tmp_path.rglob("*")}
    corpus = opened(tmp_path / "root", tmp_path / "opened", valid_fraction=0.3)
    assert "passed over 4 members of other kinds (links and devices 2, .pyd 1, .pickle 1)" in capsys.readouterr().out
    ids = {piece for split in corpus.counts for piece in pieces_of(corpus, split)}
    assert ids == {"../../up", "abs/olute", "c"}
    for split in corpus.counts:
        assert all(len(piece.floats()) == RATE for piece in pieces_of(corpus, split).values())
        list(corpus.cuts(split))
    new = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(tmp_path / "opened") for path in new)


def test_an_index_is_built_once_and_again_for_what_has_changed(root, tmp_path, monkeypatch):
    read = []
    original = WebDatasetCorpus._read
    monkeypatch.setattr(WebDatasetCorpus, "_read", lambda self, name: read.append(name) or original(self, name))
    first = opened(root, tmp_path / "opened")
    assert sorted(read) == [f"shard-{number}.tar" for number in range(3)]
    assert opened(root, tmp_path / "opened").content == first.content
    assert len(read) == 3
    write(root / "shard-1.tar", [("new.wav", audio())])
    with pytest.raises(ValueError, match=r"have changed since .* was opened: audiot prepare looks into them anew"):
        opened(root, tmp_path / "opened", "check")
    assert opened(root, tmp_path / "opened", "keep").content == first.content
    second = opened(root, tmp_path / "opened")
    assert read[3:] == ["shard-1.tar"]
    assert second.utterances == 25
    assert second.content != first.content


def test_unusable_audio_is_listed(tmp_path, capsys):
    members = [(f"{name}.wav", audio()) for name in "abc"]
    members += [("short.wav", audio(0.05)), ("long.flac", audio(3.0, kind="flac")), ("noise.ogg", b"OggS no audio")]
    write(tmp_path / "root" / "a.tar", members)
    opened(tmp_path / "root", tmp_path / "opened", valid_fraction=0.3, max_duration_s=2.0)
    with (tmp_path / "opened" / "rejected.csv").open() as stream:
        reasons = {row["utterance"]: row["reason"].split(":")[0] for row in csv.DictReader(stream)}
    assert reasons == {"short": "too short", "long": "too long", "noise": "unreadable"}
    assert "rejected 3 utterances (" in capsys.readouterr().out
    write(tmp_path / "other" / "a.tar", members[3:])
    with pytest.raises(ValueError, match=r"no utterance of .*other can be used: see .*rejected.csv"):
        opened(tmp_path / "other", tmp_path / "other-opened", max_duration_s=2.0)


def damaged(path, how):
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2]
    if how == "in audio":
        path.write_bytes(content[: last.offset_data + 100])
    elif how == "between members":
        path.write_bytes(content[: last.offset])
    elif how == "header":
        path.write_bytes(content[: last.offset] + b"x" * 512 + content[last.offset + 512 :])
    elif how == "gzip":
        path.write_bytes(gzip.compress(content))
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"<html>not found</html>" * 100)


@pytest.mark.parametrize("how", ["in audio", "between members", "header", "gzip", "empty", "page"])
def test_a_damaged_tar_is_told_in_a_line(root, tmp_path, how):
    damaged(root / "shard-1.tar", how)
    with pytest.raises(StorageError, match=r"shard-1.tar is truncated or no plain tar file \([^\n]*\): copy it again$"):
        opened(root, tmp_path / "opened")


def test_audio_that_is_damaged_or_truncated_later_is_told_when_it_is_read(root, tmp_path):
    corpus = opened(root, tmp_path / "opened", train="shard-0.tar", valid="shard-1.tar", test="shard-2.tar")
    piece = pieces_of(corpus)["part/s0-03"]
    path = root / "shard-0.tar"
    content = path.read_bytes()
    start = int(piece.path.rpartition("@")[2].split("+")[0])
    path.write_bytes(content[:start] + b"\0" * 400 + content[start + 400 :])
    with pytest.raises(StorageError, match=rf"shard-0.tar is damaged at byte {start:,} \(.*\): copy it again"):
        piece.floats()
    path.write_bytes(content[: start + 100])
    with pytest.raises(StorageError, match=r"shard-0.tar ends [\d,]+ bytes too early for its index"):
        piece.floats()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.json", b"{")], r"root/a.tar: a.json: "),
        ([("a.json", b'{"text": 7}')], r"root/a.tar: a.json: text must be text"),
        ([("a.txt", b"\xff")], r"root/a.tar: a.txt: .*utf-8"),
        ([("a.json", b"[1]")], r"root/a.tar: a.json: "),
        ([("a.json", b" " * (2**20 + 1))], r"a.tar is truncated or no plain tar file \(a.json has 1,048,577 bytes"),
    ],
)
def test_broken_labels_are_told_with_their_shard_and_member(tmp_path, members, words):
    write(tmp_path / "root" / "a.tar", [(f"{name}.wav", audio()) for name in "abc"] + members)
    with pytest.raises((ValueError, StorageError), match=words):
        opened(tmp_path / "root", tmp_path / "opened")


def test_shards_that_are_not_there_and_ids_that_repeat_are_told(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root has no file test-\*.tar \(data.test\)"):
        opened(root, tmp_path / "opened", test="test-*.tar")
    shutil.copy(root / "shard-1.tar", root / "shard-3.tar")
    with pytest.raises(ValueError, match=r"two utterances have the id 'part/s1-00', the second in shard-3.tar: ids must be"):
        opened(root, tmp_path / "opened")


def test_shards_of_a_web_server_are_scanned_and_read(root, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "WAITS_S", (0.01, 0.01, 0.01))
    near = opened(root, tmp_path / "near")
    with Server(root) as server:
        server.faults["shard-1.tar"] = ["drop", "drop"]
        far = opened(server.root, tmp_path / "far")
        assert far.content == near.content
        for split in near.counts:
            here, there = pieces_of(near, split), pieces_of(far, split)
            assert here.keys() == there.keys()
            assert all(np.array_equal(here[name].floats(), there[name].floats()) for name in here)
        server.shutdown()
