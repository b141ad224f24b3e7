"""Audio files are read completely, whatever their header says, or rejected with a reason."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiot.data import audio as module
from audiot.data.audio import AudioFile, BadAudioError, as_mono, audio_files, find_audio, read_audio
from audiot.data.corpora.folder import FolderCorpus
from audiot.data.prepare import prepare

RATE = 16000
LENGTH = 3 * RATE


def sound(num_samples: int = LENGTH, seed: int = 0) -> np.ndarray:
    """A swelling tone in noise. No two parts are equal, and a variable bit rate really varies."""
    times = np.arange(num_samples) / RATE
    noise = 0.02 * np.random.default_rng(seed).standard_normal(num_samples)
    return 0.3 * np.sin(2 * np.pi * 440 * times) * np.abs(np.sin(2 * times + seed)) + noise


def encoded(kind: str, subtype: str | None = None, samples: np.ndarray | None = None, rate: int = RATE) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, sound() if samples is None else samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(content), dtype="float32")[0]


def put(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


# MP3


def mpeg_frames(content: bytes) -> list[int]:
    """Positions of the frames of a 16 kHz MP3, computed from the size in each header."""
    kbit_per_s = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160]
    places, at = [], 0
    while at < len(content):
        assert content[at] == 0xFF
        assert content[at + 1] >> 1 == 0b1111001  # MPEG 2, layer III
        assert content[at + 2] >> 2 & 3 == 2  # 16 kHz
        places.append(at)
        at += 72 * kbit_per_s[content[at + 2] >> 4] * 1000 // 16000 + (content[at + 2] >> 1 & 1)
    return places


def mp3_with_count(count: Callable[[int], int]) -> bytes:
    content = encoded("MP3")
    at = content.index(b"Xing") + 8
    (frames,) = struct.unpack(">I", content[at : at + 4])
    return patched(content, at, struct.pack(">I", count(frames)))


def mp3_without_tag() -> bytes:
    content = encoded("MP3")
    return content[mpeg_frames(content)[1] :]


def test_an_mp3_without_a_tag_is_decoded_to_its_last_frame(tmp_path):
    content = mp3_without_tag()
    there = 576 * len(mpeg_frames(content))
    assert soundfile.info(io.BytesIO(content)).frames < 0.6 * there  # what a decoder believes
    with AudioFile(put(tmp_path, "a.mp3", content)) as file:
        samples, num_samples = file.read_mono(), file.num_samples
    assert there - 576 <= len(samples) == num_samples <= there
    # An encoder's delay of 1105 samples comes first, of which the decoder takes away its own 529.
    assert np.abs(samples[576 : 576 + LENGTH - 1000] - decoded(encoded("MP3"))[:-1000]).max() < 1e-5


@pytest.mark.parametrize("count", [lambda frames: frames // 3, lambda frames: 0, lambda frames: frames - 1])
def test_a_tag_that_counts_too_few_frames_is_not_believed(tmp_path, count):
    samples = read_audio(put(tmp_path, "a.mp3", mp3_with_count(count)), RATE)
    assert np.abs(samples - decoded(encoded("MP3"))).max() < 1e-5


@pytest.mark.parametrize("between", [b"", b"TAG" + bytes(125), b"ID3\4\0\0\0\0\1\0" + bytes(128), b"xy" * 3000])
def test_joined_mp3s_are_both_heard(tmp_path, between):
    first, second = encoded("MP3"), encoded("MP3", samples=sound(20000, seed=1))
    with AudioFile(put(tmp_path, "a.mp3", first + between + second)) as file:
        samples = file.read_mono()
        piece = file.read_mono(start=LENGTH - 500, num_samples=1000)
    assert np.abs(samples - np.concatenate([decoded(first), decoded(second)])).max() < 1e-5
    assert np.abs(piece - samples[LENGTH - 500 : LENGTH + 500]).max() < 1e-3  # a decoder needs the frames before


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_of_any_kind_keeps_its_length(tmp_path, rate, channels):
    samples = np.stack([sound()] * channels, 1)
    content = encoded("MP3", samples=samples, rate=rate)
    joined = put(tmp_path, "joined.mp3", content + content)
    with AudioFile(joined) as file:
        assert (file.num_samples, file.sample_rate, file.channels) == (2 * LENGTH, rate, channels)
        assert len(file.read_mono()) == 2 * LENGTH
    no_tag = content[content.index(b"Xing") :]  # in the middle of the first frame, which is junk then
    start = no_tag.index(content[:2])
    with AudioFile(put(tmp_path, "no_tag.mp3", no_tag[start:])) as file:
        assert LENGTH - 0.1 * rate < len(file.read_mono()) == file.num_samples < LENGTH + 0.3 * rate


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: mp3_with_count(lambda frames: 2**31 - 1), "truncated: its header says 2147483647 frames"),
        (lambda: encoded("MP3")[:4000], "truncated"),
        (lambda: encoded("MP3") + encoded("MP3")[:4000], "truncated"),
        (lambda: encoded("MP3") + encoded("MP3", rate=44100), "joined of unlike parts: 16000 Hz, 1 channels, then 44100 Hz"),
        (lambda: encoded("MP3") + encoded("MP3", samples=np.stack([sound()] * 2, 1)), "joined of unlike parts"),
        (lambda: b"\xff\xf3\x08\xc0" * 500, "unreadable"),  # free format: no header tells a frame's size
    ],
)
def test_an_mp3_that_cannot_be_read_to_its_end_says_why(tmp_path, content, reason):
    with pytest.raises(BadAudioError, match=reason):
        read_audio(put(tmp_path, "a.mp3", content()), RATE)


# Ogg


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("behind", [b"", b"TAG" + bytes(125)])
def test_all_streams_of_a_chained_ogg_are_heard(tmp_path, subtype, behind):
    first, second = encoded("OGG", subtype), encoded("OGG", subtype, sound(20000, seed=1))
    assert soundfile.info(io.BytesIO(first + second)).frames == LENGTH  # what a decoder believes
    with AudioFile(put(tmp_path, "a.ogg", first + second + behind)) as file:
        samples, num_samples = file.read_mono(), file.num_samples
    assert len(samples) == num_samples == LENGTH + 20000
    assert np.abs(samples - np.concatenate([decoded(first), decoded(second)])).max() < 1e-5


def ogg_with_position(position: int) -> bytes:
    """An Ogg whose last page says that it ends at this sample."""
    content = encoded("OGG", "VORBIS")
    at = content.rindex(b"OggS")
    page = patched(patched(content[at:], 6, struct.pack("<q", position)), 22, bytes(4))
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum >> 31 else 0)) & 0xFFFFFFFF
    return content[:at] + patched(page, 22, struct.pack("<I", checksum))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: encoded("OGG")[:-5], "truncated"),
        (lambda: encoded("OGG")[: encoded("OGG").rindex(b"OggS")] + encoded("OGG"), "truncated"),
        (lambda: encoded("OGG")[:-5] + encoded("OGG"), "unreadable: no Ogg page at byte"),
        (lambda: encoded("OGG") + encoded("OGG", rate=8000), "joined of unlike parts"),
        (lambda: ogg_with_position(1000), "unreadable: the Ogg page at byte .* has a decreasing position"),
        (lambda: ogg_with_position(LENGTH + 10000), f"truncated: .* samples of {LENGTH + 10000}"),
        (lambda: ogg_with_position(2**61), "truncated"),
    ],
)
def test_an_ogg_that_cannot_be_read_to_its_end_says_why(tmp_path, content, reason):
    with pytest.raises(BadAudioError, match=reason):
        read_audio(put(tmp_path, "a.ogg", content()), RATE)


# FLAC


def flac_of(num_samples: int, content: bytes | None = None) -> bytes:
    """A FLAC whose header gives this number of samples."""
    content = encoded("FLAC", "PCM_16") if content is None else content
    return patched(content, 21, bytes([content[21] & 0xF0 | num_samples >> 32]) + struct.pack(">I", num_samples & 0xFFFFFFFF))


@pytest.mark.parametrize(("start", "num_samples"), [(0, None), (0, 1000), (20000, 1000), (LENGTH - 10, 10)])
def test_a_flac_of_unknown_length_is_decoded_to_its_end(tmp_path, start, num_samples):
    expected = np.rint(sound() * 32768) / 32768
    with AudioFile(put(tmp_path, "a.flac", flac_of(0))) as file:
        assert file.num_samples == LENGTH
        samples = file.read_mono(start=start, num_samples=num_samples)
    assert np.abs(samples - expected[start:][:num_samples]).max() < 2**-15


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: flac_of(2**36 - 1), "truncated: its header says 68719476735 samples"),
        (lambda: flac_of(100 * LENGTH), f"truncated: {LENGTH} samples of {100 * LENGTH}"),
        (lambda: flac_of(1000), "longer than its header says"),
        (lambda: encoded("FLAC") + encoded("FLAC"), "longer than its header says"),
        (lambda: flac_of(0) + encoded("FLAC"), "unreadable"),
        (lambda: encoded("FLAC")[:20000], "unreadable"),
    ],
)
def test_a_flac_that_is_not_as_its_header_says_is_refused(tmp_path, content, reason):
    with pytest.raises(BadAudioError, match=reason):
        read_audio(put(tmp_path, "a.flac", content()), RATE)


@pytest.mark.parametrize("kind", ["FLAC", "WAV", "MP3"])
def test_a_tag_behind_the_audio_does_no_harm(tmp_path, kind):
    path = put(tmp_path, "a", encoded(kind) + b"TAG" + b"title".ljust(125))
    assert np.abs(read_audio(path, RATE) - decoded(encoded(kind))).max() < 1e-6


# Plain samples


SIZES = {"WAV": (b"data", "<I"), "AIFF": (b"SSND", ">I"), "CAF": (b"data", ">q"), "W64": (b"data", "<q"), "AU": (b".snd", ">I")}


def with_size(kind: str, share: float) -> bytes:
    """A file whose header gives another size of the audio."""
    content = encoded(kind, "PCM_16")
    name, form = SIZES[kind]
    at = content.rindex(name) + {"W64": 16, "AU": 8}.get(kind, 4)
    (size,) = struct.unpack(form, content[at : at + struct.calcsize(form)])
    return patched(content, at, struct.pack(form, int(size * share) // 8 * 8))


@pytest.mark.parametrize("kind", SIZES)
def test_a_header_that_says_less_or_more_than_there_is_is_noticed(tmp_path, kind):
    assert len(read_audio(put(tmp_path, "good", encoded(kind, "PCM_16")), RATE)) == LENGTH
    with pytest.raises(BadAudioError, match="longer than its header says"):
        read_audio(put(tmp_path, "less", with_size(kind, 1 / 3)), RATE)
    with pytest.raises(BadAudioError, match="truncated"):
        read_audio(put(tmp_path, "more", with_size(kind, 2)), RATE)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "CAF", "W64", "AU", "RF64"])
def test_a_joined_or_cut_file_is_refused(tmp_path, kind):
    content = encoded(kind, "PCM_16")
    with pytest.raises(BadAudioError, match=r"longer than its header says|unreadable"):
        read_audio(put(tmp_path, "joined", content + content), RATE)
    with pytest.raises(BadAudioError, match="truncated"):
        read_audio(put(tmp_path, "cut", content[: len(content) // 2]), RATE)


def test_a_chunk_behind_the_audio_is_no_audio(tmp_path):
    content = encoded("WAV") + b"LIST" + struct.pack("<I", 50000) + bytes(50000)
    assert len(read_audio(put(tmp_path, "a.wav", content), RATE)) == LENGTH


@pytest.mark.parametrize(
    ("at", "new", "reason"),
    [
        (24, struct.pack("<I", 0), "unreadable"),
        (24, struct.pack("<I", 1), "absurd sample rate: 1 Hz"),
        (24, struct.pack("<I", 10**9), "absurd sample rate: 1000000000 Hz"),
        (22, struct.pack("<H", 0), "unreadable"),
        (22, struct.pack("<H", 65535), "unreadable"),
        (20, struct.pack("<H", 12345), "unreadable"),
    ],
)
def test_an_absurd_header_is_refused(tmp_path, at, new, reason):
    with pytest.raises(BadAudioError, match=reason):
        AudioFile(put(tmp_path, "a.wav", patched(encoded("WAV", "PCM_16"), at, new)))


# Budgets and errors


def test_decoding_ends_at_the_budget_whatever_keeps_coming(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_SAMPLES", LENGTH - 1)
    path = put(tmp_path, "a.flac", flac_of(0))
    monkeypatch.setattr(module, "BLOCK", 1000)
    with AudioFile(path) as file, pytest.raises(BadAudioError, match="too long: more than 47,999 samples"):
        file.read_mono()
    with pytest.raises(BadAudioError, match="too long"):
        AudioFile(put(tmp_path, "a.wav", encoded("WAV")))
    monkeypatch.setattr(module, "MAX_SAMPLES", LENGTH)
    monkeypatch.setattr(module, "MAX_DECODE_S", -1.0)
    with AudioFile(path) as file, pytest.raises(BadAudioError, match="decoding takes longer"):
        file.read_mono()


@pytest.mark.parametrize("error", [MemoryError(), ValueError("array is too big"), RuntimeError("odd"), OSError(5, "I/O error")])
def test_whatever_a_decoder_raises_rejects_its_file_alone(tmp_path, monkeypatch, error):
    names = ["a.wav", "b.flac", "c.wav", "d.wav"]
    for number, name in enumerate(names):
        put(tmp_path / "in", name, encoded(name[2:].upper(), samples=sound(8000, number)))
    corpus = FolderCorpus(tmp_path / "in").manifests(False)
    read = soundfile.SoundFile.read

    def broken(self, *arguments, **options):
        if self.format == "FLAC":
            raise error
        return read(self, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", broken)
    prepared = prepare(corpus, tmp_path / "out", num_jobs=1, progress=False)
    assert sum(prepared.counts.values()) == 3
    with (tmp_path / "out" / "rejected.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["utterance"] == "b"
    assert row["reason"].startswith("unreadable: ")


def test_an_error_of_the_disk_is_not_taken_for_the_end(tmp_path, monkeypatch):
    path = put(tmp_path, "a.mp3", mp3_without_tag())
    pread, calls = os.pread, iter(range(10**6))

    def broken(*arguments):
        if next(calls) > 60:
            raise OSError(5, "Input/output error")
        return pread(*arguments)

    with AudioFile(path) as file:
        monkeypatch.setattr(os, "pread", broken)
        with pytest.raises(BadAudioError, match=r"unreadable: .*Input/output error"):
            file.read_mono()


def test_prepare_predict_and_extract_hear_the_whole_of_a_lying_file(tmp_path):
    folder = tmp_path / "in"
    put(folder, "joined.mp3", encoded("MP3") + encoded("MP3"))
    put(folder, "chained.ogg", encoded("OGG") + encoded("OGG"))
    put(folder, "open.flac", flac_of(0))
    put(folder, "claims.flac", flac_of(2**36 - 1))
    put(folder, "plain.wav", encoded("WAV"))
    prepared = prepare(FolderCorpus(folder).manifests(False), tmp_path / "out", num_jobs=1, progress=False)
    cuts = {cut.id: cut for split in prepared.counts for cut in prepared.cuts(split)}
    lengths = {"joined": 2 * LENGTH, "chained": 2 * LENGTH, "open": LENGTH, "plain": LENGTH}
    assert {name: cut.num_samples for name, cut in cuts.items()} == lengths
    assert all(cut.supervisions[0].duration == pytest.approx(cut.duration) for cut in cuts.values())
    for name, length in lengths.items():
        (path,) = folder.glob(f"{name}.*")
        heard = read_audio(path, RATE)
        assert len(heard) == length
        assert np.abs(heard - cuts[name].load_audio()[0]).max() < 1e-4


# Only regular files


@pytest.fixture
def odd(tmp_path, monkeypatch) -> Path:
    """A folder with a good file, and a pipe, a socket, a link to a device and a folder of such names."""
    folder = put(tmp_path / "in", "good.wav", encoded("WAV")).parent
    for number in range(2):
        put(folder, f"more{number}.wav", encoded("WAV"))
    os.mkfifo(folder / "pipe.wav")
    (folder / "device.wav").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(folder)  # the path of a socket must be short
        made.bind("socket.wav")
    put(folder / "folder.wav", "inside.wav", encoded("WAV"))
    return folder


def test_only_regular_files_are_opened(odd):
    for name in ("pipe.wav", "device.wav", "socket.wav", "folder.wav"):
        with pytest.raises(BadAudioError, match="not a regular file"):
            AudioFile(odd / name)
    for name in ("gone.wav", "good.wav/a.wav", "a\0b.wav", "a\ud800.wav"):
        with pytest.raises(BadAudioError, match=r"missing|null character|surrogates not allowed"):
            AudioFile(odd / name)
    corpus = FolderCorpus(odd).manifests(False)
    reasons = {Path(path).name: reason for path, reason in corpus.rejected}
    assert reasons == dict.fromkeys(["device.wav", "pipe.wav", "socket.wav"], "not a regular file")
    assert sorted(cut.id for cuts in corpus.splits.values() for cut in cuts) == ["folder.wav/inside", "good", "more0", "more1"]


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    path = put(tmp_path, "a.wav", encoded("WAV"))
    regular = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(module.os, "stat", lambda name: regular)
    found = []

    def look():
        try:
            AudioFile(path)
        except BadAudioError as error:
            found.append(str(error))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(30)
    assert found == ["not a regular file"]


# Finding


def test_links_are_followed_once_and_names_that_begin_with_a_dot_are_passed_over(tmp_path):
    content = encoded("WAV", samples=sound(2000))
    for name in ("b/1.WAV", "b/._1.wav", "a.flac", ".hidden/2.wav", "notes.txt"):
        put((tmp_path / "in" / name).parent, Path(name).name, content)
    put(tmp_path / "elsewhere", "3.wav", content)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "b" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    expected = ["a.flac", "again/3.wav", "b/1.WAV", "gone.wav"]
    assert find_audio(tmp_path / "in") == expected
    assert audio_files(tmp_path / "in") == [str(tmp_path / "in" / name) for name in expected]
    assert audio_files(tmp_path / "in" / "notes.txt") == [str(tmp_path / "in" / "notes.txt")]
    with pytest.raises(FileNotFoundError, match="no audio files"):
        find_audio(tmp_path / "in" / "b", ["mp3"])


@pytest.mark.slow
def test_names_are_the_same_where_the_locale_is_ascii(tmp_path):
    folder = tmp_path / "Töne"
    for name in ("café.wav", "日本.wav", "plain.wav"):
        put(folder, name, encoded("WAV", "PCM_16"))
    (folder / os.fsdecode(b"latin-\xe9.wav")).write_bytes(encoded("WAV"))
    code = """
        import json, sys
        from audiot.data.audio import audio_files, read_audio
        from audiot.data.corpora.folder import FolderCorpus
        from audiot.data.batches import Piece
        from audiot.data.prepare import prepare
        import numpy as np
        corpus = FolderCorpus(sys.argv[1]).manifests(False)
        prepared = prepare(corpus, "out", num_jobs=1, progress=False)
        pieces = [Piece.of(cut) for split in prepared.counts for cut in prepared.cuts(split)]
        read = [int(np.abs(piece.read(np.zeros(piece.num_samples, np.int16))).max() > 0) for piece in pieces]
        direct = [len(read_audio(path, 16000)) for path in audio_files(sys.argv[1])]
        print(json.dumps([sorted(piece.id for piece in pieces), read, direct, [reason for _, reason in corpus.rejected]]))
    """
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    expected = [["café", "plain", "日本"], [1, 1, 1], [LENGTH] * 4, ["its name is not UTF-8: rename it"]]
    assert json.loads(answer.stdout.splitlines()[-1]) == expected


# Arrays


@pytest.mark.parametrize(
    ("samples", "rate", "reason"),
    [
        (np.zeros((2, 3, 4), np.float32), RATE, r"\(N,\) or \(N, channels\).*found the shape \(2, 3, 4\)"),
        (np.zeros((2, 1000), np.float32), RATE, r"found the shape \(2, 1000\)"),
        (np.zeros(1000, np.int32), RATE, "16-bit integers, found int32"),
        (np.array(["a", "b"]), RATE, "16-bit integers, found <U1"),
        (np.full(1000, 3000.0), RATE, "found values up to 3000"),
        (np.zeros(1000), 0, "sample rate must be a whole number of Hz"),
        (np.zeros(1000), 16000.5, "sample rate must be a whole number of Hz"),
        (np.zeros(1000), "16000", "sample rate must be a whole number of Hz"),
    ],
)
def test_an_array_that_is_no_audio_is_told_what_is_expected(samples, rate, reason):
    with pytest.raises(BadAudioError, match=reason):
        as_mono(samples, rate)


def test_arrays_of_floats_and_of_integers_are_one_thing():
    samples = np.stack([sound(1000), sound(1000, seed=1)], 1)
    expected = samples.mean(axis=1)
    assert np.abs(as_mono(samples, RATE) - expected).max() < 1e-6
    assert np.abs(as_mono(np.rint(samples * 32768).astype(np.int16), RATE) - expected).max() < 2**-15
