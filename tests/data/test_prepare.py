from __future__ import annotations

import csv
import gzip
import math
import os
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from lhotse.supervision import AlignmentItem

from audiot.data import audio
from audiot.data import prepare as module
from audiot.data.audio import BadAudioError
from audiot.data.manifests import Manifests
from audiot.data.prepare import PreparedCorpus, prepare


def tone(seconds: float = 0.5, sample_rate: int = 16000, frequency: float = 440.0, level: float = 0.3) -> np.ndarray:
    return level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * sample_rate)) / sample_rate)


def noise(num_samples: int = 8000, seed: int = 0, channels: int | None = None) -> np.ndarray:
    shape = num_samples if channels is None else (num_samples, channels)
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape)


def write(path: Path, samples: np.ndarray, sample_rate: int = 16000, **how: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, sample_rate, **how)
    return path


def whole(path: Path, utterance: str | None = None):
    return Recording.from_file(path, recording_id=utterance or path.name).to_cut()


def declared(path: Path, seconds: float = 0.5, sample_rate: int = 16000) -> MonoCut:
    """A cut of a file that was good when its manifest was made."""
    cut = whole(write(path.with_name(f"good-{path.stem}.wav"), tone(seconds, sample_rate), sample_rate), path.name)
    cut.recording.sources[0].source = str(path)
    return cut


def manifests(*cuts, **splits) -> Manifests:
    return Manifests({name: CutSet.from_cuts(part) for name, part in ({"train": cuts} if cuts else splits).items()})


def run(corpus, directory, **options) -> PreparedCorpus:
    return prepare(corpus, directory, **{"num_jobs": 1, "progress": False, **options})


def audio_of(prepared: PreparedCorpus, split: str = "train") -> dict[str, np.ndarray]:
    return {cut.id: cut.load_audio()[0] for cut in prepared.cuts(split)}


def rejected(directory: Path) -> dict[str, str]:
    with (directory / "rejected.csv").open(newline="", encoding="utf-8") as stream:
        return {row["utterance"]: row["reason"] for row in csv.DictReader(stream)}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_sixteen_bit_audio_keeps_every_sample(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 8000).astype(np.int16)
    samples[:2] = -32768, 32767
    flac = write(tmp_path / "a.flac", samples)
    prepared = run(manifests(whole(flac)), tmp_path / "out")
    cut = next(iter(prepared.cuts("train")))
    written, sample_rate = soundfile.read(cut.recording.sources[0].source, dtype="int16")
    assert sample_rate == 16000
    assert np.array_equal(written, samples)
    assert soundfile.info(cut.recording.sources[0].source).subtype == "PCM_16"
    assert prepared.scaled == 0


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_every_format_gives_what_librosa_decodes(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", noise(channels=2))
    expected = librosa.load(path, sr=None, mono=True)[0]
    heard = audio_of(run(manifests(whole(path)), tmp_path / "out"))[path.name]
    assert len(heard) == len(expected) == 8000
    assert np.abs(heard - expected).max() <= 0.5 / 32768 + 1e-6


@pytest.mark.parametrize("sample_rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_pitch_level_and_duration(tmp_path, sample_rate):
    path = write(tmp_path / "a.wav", tone(1.0, sample_rate), sample_rate)
    heard = audio_of(run(manifests(whole(path)), tmp_path / "out"))[path.name]
    assert len(heard) == 16000
    inside = slice(1600, -1600)  # the filter needs room
    assert np.abs(heard - tone(1.0, 16000))[inside].max() < 1e-3


def test_channels_are_averaged_or_chosen(tmp_path):
    samples = np.stack([tone(frequency=300), tone(frequency=700)], axis=1)
    path = write(tmp_path / "a.wav", samples)
    for channel, expected in [("average", samples.mean(axis=1)), (0, samples[:, 0]), (1, samples[:, 1])]:
        heard = audio_of(run(manifests(whole(path)), tmp_path / f"out-{channel}", channel=channel))[path.name]
        assert np.abs(heard - expected).max() < 1e-4
    with pytest.raises(ValueError, match="no channel 2"):
        run(manifests(whole(path)), tmp_path / "none", channel=2)


def test_audio_beyond_full_scale_is_scaled_and_not_clipped(tmp_path):
    loud = 3 * noise()
    loud[100] = -2.0  # the peak is a negative one
    path = write(tmp_path / "a.wav", loud, subtype="FLOAT")
    prepared = run(manifests(whole(path)), tmp_path / "out")
    heard = audio_of(prepared)[path.name]
    assert prepared.scaled == 1
    assert np.abs(heard - loud / np.abs(loud).max()).max() < 1e-4


def test_audio_that_is_good_as_it_lies_is_referenced_or_copied(tmp_path):
    path = write(tmp_path / "a.wav", noise())
    other = write(tmp_path / "b.wav", noise(), subtype="PCM_24")
    sources = {}
    for copy in (False, True):
        prepared = run(manifests(whole(path), whole(other)), tmp_path / f"out-{copy}", copy=copy)
        sources[copy] = [Path(cut.recording.sources[0].source) for cut in prepared.cuts("train")]
        heard = audio_of(prepared)
        assert np.abs(heard["a.wav"] - noise()).max() < 1e-4
    assert sources[False][0] == path
    assert sources[False][1].is_relative_to(tmp_path / "out-False" / "audio")
    assert sources[True][0].is_relative_to(tmp_path / "out-True" / "audio")


def test_a_piece_of_a_recording_is_cut_out_at_its_samples(tmp_path):
    samples = noise(16000)
    path = write(tmp_path / "a.wav", samples)
    piece = whole(path).truncate(offset=0.25, duration=0.5).with_id("piece")
    heard = audio_of(run(manifests(piece), tmp_path / "out"))["piece"]
    assert np.abs(heard - samples[4000:12000]).max() < 1e-4


def test_audio_that_only_lhotse_can_read_is_prepared_too(tmp_path):
    path = write(tmp_path / "a.wav", noise(16000))
    in_memory = whole(path).move_to_memory().with_id("memory")
    appended = whole(path).append(whole(path)).with_id("appended")
    heard = audio_of(run(manifests(in_memory, appended), tmp_path / "out"))
    assert np.abs(heard["memory"] - noise(16000)).max() < 1e-4
    assert np.abs(heard["appended"] - np.tile(noise(16000), 2)).max() < 1e-4


def test_supervisions_alignments_and_custom_fields_survive_with_their_times(tmp_path):
    path = write(tmp_path / "a.wav", noise(22050), 22050)
    cut = whole(path)
    phones = [AlignmentItem("a", 0.25, 0.25), AlignmentItem("b", 0.5, 0.125)]
    segment = SupervisionSegment(
        "s", cut.recording.id, 0.25, 0.5, text="ab", speaker="theo", custom={"take": "3"}, alignment={"phone": phones}
    )
    cut.supervisions, cut.custom = [segment], {"session": "x"}
    new = next(iter(run(manifests(cut), tmp_path / "out").cuts("train")))
    (kept,) = new.supervisions
    assert (kept.start, kept.duration, kept.text, kept.speaker) == (0.25, 0.5, "ab", "theo")
    assert kept.alignment == {"phone": phones}
    assert kept.custom == {"take": "3"}
    assert new.custom == {"session": "x"}
    assert kept.recording_id == new.recording.id == new.id
    assert (new.start, new.duration, new.sampling_rate) == (0, 1.0, 16000)


def test_the_alignment_of_a_window_ends_with_it(tmp_path):
    spoken = [AlignmentItem(symbol, number / 2, 0.5) for number, symbol in enumerate("abcd")]  # 0 to 2 s
    whole_cut = whole(write(tmp_path / "a.wav", tone(2.0)), "long")
    whole_cut.supervisions = [SupervisionSegment("s", whole_cut.recording.id, 0.0, 2.0, alignment={"phone": spoken})]
    cut = whole_cut.truncate(offset=0.75, duration=0.9).with_id("window")
    (kept,) = next(iter(run(manifests(cut), tmp_path / "out").cuts("train"))).supervisions
    found = [(item.symbol, round(item.start, 6), round(item.end, 6)) for item in kept.alignment["phone"]]
    assert found == [("b", 0.0, 0.25), ("c", 0.25, 0.75), ("d", 0.75, 0.9)]


def test_the_alignment_of_a_piece_counts_from_the_start_of_the_new_recording(tmp_path):
    path = write(tmp_path / "a.wav", noise(32000), 16000)
    cut = whole(path)
    spoken = [AlignmentItem("a", 0.75, 0.25), AlignmentItem("b", 1.0, 0.5)]  # in the recording, where the sound is
    cut.supervisions = [SupervisionSegment("s", cut.recording.id, 0.75, 0.75, alignment={"phone": spoken})]
    piece = cut.truncate(offset=0.5, duration=1.25)
    (kept,) = next(iter(run(manifests(piece), tmp_path / "out").cuts("train"))).supervisions
    assert kept.start == 0.25
    assert [(item.symbol, item.start, item.end) for item in kept.alignment["phone"]] == [("a", 0.25, 0.5), ("b", 0.5, 1.0)]


def test_a_supervision_of_the_whole_cut_never_outlasts_it(tmp_path):
    for num_samples in (4001, 4002, 4003, 12345):
        path = write(tmp_path / f"{num_samples}.wav", noise(num_samples), 22050)
        cut = whole(path)
        item = AlignmentItem("a", 0.0, cut.duration)
        cut.supervisions = [SupervisionSegment("s", cut.id, 0.0, cut.duration, alignment={"phone": [item]})]
        new = next(iter(run(manifests(cut), tmp_path / f"out-{num_samples}").cuts("train")))
        length = Fraction(num_samples * 16000, 22050)
        assert abs(new.num_samples - length) <= 1
        assert new.supervisions[0].end <= new.duration + 1e-9
        assert new.supervisions[0].alignment["phone"][0].end <= new.duration + 1e-9
        assert len(new.load_audio()[0]) == new.num_samples


def bad_files(folder: Path) -> dict[str, str]:
    """Make one file of each kind. Returns the kind of the expected reason by name."""
    folder.mkdir(parents=True)
    silent = 10 ** (-75 / 20) * math.sqrt(2) * tone(level=1.0)
    write(folder / "silent.wav", silent, subtype="FLOAT")
    write(folder / "zeros.wav", np.zeros(8000))
    write(folder / "nan.wav", np.where(np.arange(8000) == 17, np.nan, noise()), subtype="FLOAT")
    write(folder / "inf.wav", np.where(np.arange(8000) == 17, np.inf, noise()), subtype="FLOAT")
    write(folder / "no_samples.wav", np.zeros(0))
    write(folder / "rate.wav", noise(), 8000)
    (folder / "no_bytes.wav").touch()
    (folder / "garbage.wav").write_bytes(b"not audio" * 1000)
    (folder / "folder.wav").mkdir()
    for suffix in ("wav", "flac", "ogg", "mp3", "aiff", "w64", "au"):
        good = write(folder.parent / f"whole.{suffix}", noise(48000)).read_bytes()
        (folder / f"cut.{suffix}").write_bytes(good[: len(good) // 2])
    kinds = {"silent.wav": "silent", "zeros.wav": "silent", "nan.wav": "non-finite samples", "inf.wav": "non-finite samples"}
    kinds |= {"no_samples.wav": "empty", "no_bytes.wav": "empty", "garbage.wav": "unreadable", "folder.wav": "not a regular file"}
    kinds |= {f"cut.{suffix}": "truncated" for suffix in ("wav", "ogg", "mp3", "aiff", "w64", "au")}
    return kinds | {"cut.flac": "unreadable", "rate.wav": "not as its manifest says", "gone.wav": "missing"}


def test_every_kind_of_bad_file_is_reported_with_its_reason_and_the_rest_goes_on(tmp_path, capsys):
    kinds = bad_files(tmp_path / "in")
    cuts = [declared(tmp_path / "in" / name, 3.0 if name.startswith("cut") else 0.5) for name in kinds]
    short = whole(write(tmp_path / "in" / "short.wav", tone(0.05)))
    shorter = declared(tmp_path / "in" / "shorter.wav", 0.12)  # than declared, by less than a truncated file would be
    write(tmp_path / "in" / "shorter.wav", tone(0.09))
    long = whole(write(tmp_path / "in" / "long.wav", tone(4.0)))
    good = whole(write(tmp_path / "in" / "good.wav", tone(3.5)))
    prepared = run(manifests(*cuts, short, shorter, good, long), tmp_path / "out", max_duration_s=3.75)
    reasons = rejected(tmp_path / "out")
    expected = kinds | {"short.wav": "too short", "shorter.wav": "too short", "long.wav": "too long"}
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == expected
    assert list(reasons) == [*kinds, "short.wav", "shorter.wav", "long.wav"]  # in the order of the manifest
    assert "-75.0 dBFS" in reasons["silent.wav"]
    assert list(audio_of(prepared)) == ["good.wav"]
    assert prepared.rejected == len(expected)
    printed = capsys.readouterr().out
    assert f"rejected {len(expected)} of {len(expected) + 1} files" in printed
    assert "prepared 1 utterances" in printed


def test_a_wav_from_a_pipe_whose_header_gives_no_size_is_good(tmp_path):
    path = write(tmp_path / "a.wav", noise())
    cut = whole(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(audio_of(run(manifests(cut), tmp_path / "out"))["a.wav"]) == 8000


def test_nothing_but_bad_files_names_the_most_common_reason(tmp_path):
    cuts = [declared(tmp_path / name) for name in ("a.wav", "b.wav", "c.wav")]
    (tmp_path / "a.wav").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"most often because: missing \(2 of 3\).*rejected\.csv"):
        run(manifests(*cuts), tmp_path / "out")
    assert len(rejected(tmp_path / "out")) == 3
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_a_split_without_a_good_utterance_is_refused(tmp_path):
    good = whole(write(tmp_path / "good.wav", noise()))
    with pytest.raises(ValueError, match="split 'test' has no utterance left"):
        run(manifests(train=[good], test=[declared(tmp_path / "gone.wav")]), tmp_path / "out")


def test_what_the_corpus_rejected_is_reported_too(tmp_path):
    good = CutSet.from_cuts([whole(write(tmp_path / "good.wav", noise()))])
    prepared = run(Manifests({"train": good}, rejected=[("x/y.wav", "does not match")]), tmp_path / "out")
    assert prepared.rejected == 1
    assert (tmp_path / "out" / "rejected.csv").read_text() == "utterance,path,reason\n,x/y.wav,does not match\n"


def test_two_utterances_with_one_id_are_refused_but_splits_may_share_one(tmp_path):
    first, second = write(tmp_path / "a.wav", noise()), write(tmp_path / "b.wav", noise(seed=1))
    with pytest.raises(ValueError, match="two utterances have the id 'u'"):
        run(manifests(train=[whole(first, "u")], test=[whole(second, "u")]), tmp_path / "out")
    with pytest.raises(ValueError, match="two utterances have the id 'u'"):
        run(manifests(whole(first, "u"), whole(first, "u")), tmp_path / "out")
    prepared = run(manifests(train=[whole(first, "u")], test=[whole(first, "u")]), tmp_path / "out")
    assert prepared.counts == {"train": 1, "test": 1}


def test_ids_that_clean_up_to_the_same_file_name_stay_apart(tmp_path):
    ids = ["a/b", "a b", "ä/b", "ö/b", "../../b", "x" * 500, "日本/語"]
    cuts = [whole(write(tmp_path / f"{n}.flac", noise(seed=n)), name) for n, name in enumerate(ids)]
    heard = audio_of(run(manifests(*cuts), tmp_path / "out"))
    assert list(heard) == ids
    for number, name in enumerate(ids):
        assert np.abs(heard[name] - noise(seed=number)).max() < 1e-4
    assert all((tmp_path / "out" / "audio") in path.parents for path in tmp_path.rglob("*b-*.wav"))


def some_corpus(folder: Path) -> Manifests:
    """40 good utterances of several formats, 2 bad ones."""
    kinds = [("wav", 16000), ("flac", 8000), ("wav", 22050), ("ogg", 16000)]
    cuts = []
    for number in range(40):
        suffix, sample_rate = kinds[number % 4]
        path = folder / f"{number}.{suffix}"
        cuts.append(whole(path if path.exists() else write(path, noise(3000 + number, number), sample_rate)))
    gone = [declared(folder / name) for name in ("gone-1.wav", "gone-2.wav")]
    return manifests(train=[gone[0], *cuts[:30]], valid=[*cuts[30:], gone[1]])


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    for jobs in (1, 2):
        run(some_corpus(tmp_path / "in"), tmp_path / str(jobs), num_jobs=jobs)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) == 30 + 4 + 2  # a quarter of the audio stays where it is


def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path, monkeypatch):
    write, written = soundfile.write, []

    def some(path, *arguments, **options):
        written.append(path)
        if len(written) == 5:
            Path(path).write_bytes(b"RIFF")
            raise soundfile.LibsndfileError(2)  # "System error.", as on a full disk
        write(path, *arguments, **options)

    corpus = some_corpus(tmp_path / "in")
    monkeypatch.setattr(soundfile, "write", some)
    with pytest.raises(OSError, match=r"\.wav could not be written, [\d,.]+ MiB are free on the disk of .*: make room there"):
        run(corpus, tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".*.wav"))
    run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "unbroken")
    folders = [tmp_path / name for name in ("out", "unbroken")]
    one, other = ({path.relative_to(folder) for path in folder.rglob("*.wav")} for folder in folders)
    assert one == other != set()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_an_unbroken_one(tmp_path):
    run(some_corpus(tmp_path / "in"), tmp_path / "unbroken")
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import soundfile
        import test_prepare as tests
        write, count = soundfile.write, 0
        corpus = tests.some_corpus(Path({str(tmp_path / "in")!r}))
        def write_some(*args, **options):
            global count
            write(*args, **options)
            count += 1
            if count == 11:
                os.kill(os.getpid(), signal.SIGKILL)  # the file has its temporary name
        soundfile.write = write_some
        tests.run(corpus, {str(tmp_path / "killed")!r})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    journal = tmp_path / "killed" / "journal.jsonl"
    assert 10 <= len(journal.read_text().splitlines()) < 20
    with journal.open("a") as stream:
        stream.write('{"id": "half a li')
    with pytest.raises(FileNotFoundError, match="not completely prepared"):
        PreparedCorpus.load(tmp_path / "killed")
    with pytest.raises(ValueError, match=r"prepare\.sample_rate=16000, now it is 8000"):
        run(some_corpus(tmp_path / "in"), tmp_path / "killed", sample_rate=8000)
    run(some_corpus(tmp_path / "in"), tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def test_going_on_decodes_only_what_is_left_and_tries_mended_files_again(tmp_path, monkeypatch):
    corpus = some_corpus(tmp_path / "in")
    bad = tmp_path / "in" / "1.flac"
    good_bytes = bad.read_bytes()
    bad.write_bytes(good_bytes[:20])
    process = module._process
    decoded: list[list[str]] = []

    def process_five(job, options):
        if len(decoded[-1]) == 5:
            raise KeyboardInterrupt
        decoded[-1].append(job.id)
        return process(job, options)

    monkeypatch.setattr(module, "_process", process_five)
    for _ in range(3):
        decoded.append([])
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "out")
        with (tmp_path / "out" / "journal.jsonl").open("a") as stream:
            stream.write('{"id": "half a li')
    bad.write_bytes(good_bytes)
    decoded.append([])
    monkeypatch.setattr(module, "_process", lambda job, options: decoded[-1].append(job.id) or process(job, options))
    run(corpus, tmp_path / "out")
    assert [len(part) for part in decoded] == [5, 5, 5, 42 - 3 * 3]
    assert all(part[:2] == ["gone-1.wav", "1.flac"] for part in (decoded[1], decoded[2]))
    assert set(rejected(tmp_path / "out")) == {"gone-1.wav", "gone-2.wav"}
    run(corpus, tmp_path / "unbroken")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_the_order_in_which_workers_finish_does_not_show(tmp_path, monkeypatch):
    run(some_corpus(tmp_path / "in"), tmp_path / "forth")

    def backwards(jobs, options, num_jobs):
        yield from [module._prepare_one(job, options) for job in jobs][::-1]

    monkeypatch.setattr(module, "_process_all", backwards)
    run(some_corpus(tmp_path / "in"), tmp_path / "back")
    assert contents(tmp_path / "forth") == contents(tmp_path / "back")


def test_a_complete_folder_is_returned_without_looking_at_the_corpus(tmp_path):
    options = {"settings": {"name": "folder", "root": Path("/x"), "splits": ("a", "b")}}
    first = run(some_corpus(tmp_path / "in"), tmp_path / "out", **options)
    before = contents(tmp_path / "out")

    def never():
        raise AssertionError("the corpus was asked")

    assert run(never, tmp_path / "out", **options) == first == PreparedCorpus.load(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"corpus\.name='folder', now it is 'other'"):
        run(never, tmp_path / "out", settings={**options["settings"], "name": "other"})
    with pytest.raises(ValueError, match=r"prepare\.min_duration_s=0\.1, now it is 0\.2"):
        run(never, tmp_path / "out", **options, min_duration_s=0.2)


def test_counts_and_hours_are_those_of_the_audio(tmp_path):
    train = [whole(write(tmp_path / f"{n}.wav", noise(16000, n), 8000)) for n in range(3)]
    test = [whole(write(tmp_path / "t.wav", noise(8000), 8000))]
    corpus = Manifests({"train": CutSet.from_cuts(train), "test": CutSet.from_cuts(test)}, {"speaker": {"valid": "test"}})
    prepared = run(corpus, tmp_path / "out")
    assert prepared.counts == {"train": 3, "test": 1}
    assert prepared.hours == pytest.approx({"train": 6 / 3600, "test": 1 / 3600})
    assert prepared.sample_rate == 16000
    assert prepared.split_for("speaker", "valid") == "test"
    assert prepared.split_for("speaker", "train") == "train"
    with pytest.raises(ValueError, match="no split 'valid' for valid of task 'phone'"):
        prepared.split_for("phone", "valid")
    with pytest.raises(ValueError, match="no split 'dev'"):
        prepared.cuts("dev")


def test_a_prepared_folder_can_be_moved(tmp_path):
    path = write(tmp_path / "a.flac", noise())
    run(manifests(whole(path)), tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert np.abs(audio_of(PreparedCorpus.load(tmp_path / "moved"))["a.flac"] - noise()).max() < 1e-4
    assert str(tmp_path).encode() not in gzip.decompress((tmp_path / "moved" / "train.jsonl.gz").read_bytes())


def test_a_failure_leaves_no_setting_behind_that_could_not_be_put_right(tmp_path):
    with pytest.raises(ValueError, match="no utterance can be used"):
        run(manifests(declared(tmp_path / "gone.wav")), tmp_path / "out", settings={"root": "wrong"})
    run(manifests(whole(write(tmp_path / "a.wav", noise()))), tmp_path / "out", settings={"root": "right"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "prepare.sample_rate"),
        ({"channel": "left"}, "prepare.channel"),
        ({"num_jobs": 0}, "prepare.num_jobs"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(manifests(whole(write(tmp_path / "a.wav", noise()))), tmp_path / "out", **options)


def test_a_worker_does_not_import_pytorch():
    code = "import sys, audiot.data.prepare; sys.exit('torch' in sys.modules or 'lhotse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_cut_with_a_channel_that_its_source_lacks_is_bad_audio(tmp_path):
    cut = whole(write(tmp_path / "a.wav", noise()))
    cut.channel = 1
    with pytest.raises(
        BadAudioError, match=r"not as its manifest says: utterance a\.wav has channel 1, but its recording has \[0\]"
    ):
        module.read_cut(cut)


def test_lhotse_is_given_regular_files_within_the_budget_alone(tmp_path, monkeypatch):
    cut = whole(write(tmp_path / "a.wav", noise())).mix(whole(write(tmp_path / "b.wav", noise())))
    with monkeypatch.context() as patch:
        patch.setattr(audio, "MAX_SAMPLES", 7999)
        with pytest.raises(BadAudioError, match="too long: more than 7,999 samples"):
            module.read_cut(cut)
    assert len(module.read_cut(cut)) == 8000
    (tmp_path / "b.wav").unlink()
    os.mkfifo(tmp_path / "b.wav")
    with pytest.raises(BadAudioError, match="not a regular file"):
        module.read_cut(cut)


def test_a_name_that_no_file_can_have_is_reported_with_the_others(tmp_path):
    cuts = [whole(write(tmp_path / "a.wav", noise())), declared(tmp_path / "b.wav")]
    cuts[1].recording.sources[0].source = str(tmp_path / "b\ud800.wav")
    run(manifests(*cuts), tmp_path / "out")
    assert rejected(tmp_path / "out")["b.wav"].startswith("unreadable")
    assert r"b\ud800.wav" in (tmp_path / "out" / "rejected.csv").read_text()


def test_an_update_that_fails_names_its_own_report(tmp_path, capsys):
    paths = [write(tmp_path / name, noise()) for name in ("a.flac", "b.flac")]
    cuts = {"train": [whole(paths[0])], "test": [whole(paths[1])]}
    run(manifests(**cuts), tmp_path / "out")
    capsys.readouterr()
    paths[1].write_bytes(b"")
    with pytest.raises(ValueError, match="split 'test' has no utterance left: see ") as error:
        run(manifests(**cuts), tmp_path / "out")
    report = tmp_path / "out" / "update" / "rejected.csv"
    assert str(report) in str(error.value)
    assert "b.flac" in report.read_text()
    assert "rejected.csv" not in capsys.readouterr().out
