from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from audiot.data.corpora import speech_commands
from audiot.data.corpora.published import Utterance
from audiot.data.corpora.speech_commands import SpeechCommandsCorpus, download
from audiot.data.prepare import prepare

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
WORDS = (*KEYWORDS, "bed", "cat", "zero")
NOISES = ("doing_the_dishes", "dude_miaowing", "exercise_bike", "pink_noise", "running_tap", "white_noise")
SPEAKERS = {
    "train": [f"{number:08x}" for number in range(14)],
    "valid": ["0132a06d", "e49428d9"],
    "test": ["3ff840aa", "9d171fee"],
}
RATE = 16000
NOISE_S = 15


def wav(seed: int = 0, seconds: float = 0.2) -> bytes:
    stream = io.BytesIO()
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE))
    soundfile.write(stream, samples, RATE, subtype="PCM_16", format="WAV")
    return stream.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_list(root: Path, name: str, split: str) -> None:
    (root / name).write_text("".join(f"{word}/{speaker}_nohash_0.wav\n" for word in WORDS for speaker in SPEAKERS[split]))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A whole miniature corpus of version 1, with its test set: their sizes are the published ones."""
    root, word = tmp_path / "speech_commands_v0.01", wav()
    for folder in WORDS:
        for speaker in chain(*SPEAKERS.values()):
            put(root / folder / f"{speaker}_nohash_0.wav", word)
    for seed, name in enumerate(NOISES):
        put(root / "_background_noise_" / f"{name}.wav", wav(seed + 1, NOISE_S))
    (root / "_background_noise_" / "README.md").touch()
    write_list(root, "validation_list.txt", "valid")
    write_list(root, "testing_list.txt", "test")
    test_set = tmp_path / "speech_commands_test_set_v0.01"
    for keyword in KEYWORDS:
        put(test_set / keyword / "9d171fee_nohash_0.wav", word)
    put(test_set / "_unknown_" / "bed_3ff840aa_nohash_0.wav.wav", word)
    put(test_set / "_silence_" / "104.wav", wav(9, 1.0))
    monkeypatch.setattr(speech_commands, "WORDS", {1: dict.fromkeys(WORDS, 18), 2: dict.fromkeys((*WORDS, "visual"), 18)})
    monkeypatch.setattr(speech_commands, "LISTED", {1: {"valid": 26, "test": 26}, 2: {"valid": 28, "test": 28}})
    monkeypatch.setattr(speech_commands, "TEST_SET", {1: 12, 2: 12})
    return root


def read(root, **options):
    return SpeechCommandsCorpus(root, **options).manifests(progress=False)


def classes(manifests):
    return {split: Counter(cut.supervisions[0].custom["keyword"] for cut in cuts) for split, cuts in manifests.splits.items()}


def words(split, among):
    return {f"{word}/{speaker}_nohash_0" for word in among for speaker in SPEAKERS[split]}


# The published numbers, from the paper and the archives.


def test_the_published_versions_have_64_721_and_105_829_words(monkeypatch):
    assert {version: (len(counts), sum(counts.values())) for version, counts in speech_commands.WORDS.items()} == {
        1: (30, 64721),
        2: (35, 105829),
    }
    listed = {version: sum(counts.values()) for version, counts in speech_commands.LISTED.items()}
    assert (64721 - listed[1], 105829 - listed[2]) == (51088, 84843)


@pytest.mark.parametrize(("version", "keywords", "published"), [(1, 2567, 3081), (2, 4074, 4890), (1, 18538, 22246)])
def test_unknown_and_silence_are_as_many_as_in_the_published_test_sets(tmp_path, version, keywords, published):
    recordings = {f"yes/{number}": Utterance(tmp_path, text="yes") for number in range(keywords)}
    recordings |= {f"bed/{number}": Utterance(tmp_path, text="bed") for number in range(2 * keywords)}
    corpus = SpeechCommandsCorpus(tmp_path, version, classes=12)
    assert len(corpus._twelve("test", recordings, {tmp_path: (60 * RATE, RATE)})) == published


# Splits and labels.


def test_twelve_classes_of_the_official_lists(root):
    found = classes(read(root))
    assert found == {
        "train": {**dict.fromkeys(KEYWORDS, 14), "_unknown_": 14, "_silence_": 14},
        "valid": {**dict.fromkeys(KEYWORDS, 2), "_unknown_": 2, "_silence_": 2},
        "test": {**dict.fromkeys(KEYWORDS, 2), "_unknown_": 2, "_silence_": 2},
    }
    manifests = read(root)
    for split in SPEAKERS:
        ids = {cut.id for cut in manifests.splits[split] if not cut.id.startswith("_silence_")}
        assert words(split, KEYWORDS) < ids < words(split, WORDS)
    assert manifests.task_splits == {"keyword": {"train": "train", "valid": "valid", "test": "test"}}


def test_speaker_word_and_class_become_labels(root):
    cuts = {cut.id: cut.supervisions[0] for cut in read(root, unknown=None).splits["valid"]}
    found = {name: (cuts[name].speaker, cuts[name].text, cuts[name].custom) for name in cuts if "@" not in name}
    assert found["go/e49428d9_nohash_0"] == ("e49428d9", "go", {"keyword": "go"})
    assert found["bed/e49428d9_nohash_0"] == ("e49428d9", "bed", {"keyword": "_unknown_"})
    silence = next(cuts[name] for name in cuts if "@" in name)
    assert (silence.speaker, silence.text, silence.custom) == (None, None, {"keyword": "_silence_"})


def test_which_words_are_unknown_depends_on_the_seed_alone(root):
    def unknown(**options):
        return [cut.id for cut in read(root, **options).splits["train"] if cut.supervisions[0].custom["keyword"] == "_unknown_"]

    assert unknown() == unknown() != unknown(seed=1)
    assert len(unknown(unknown=0.05)) == 7
    assert set(unknown(unknown=0.05)) < set(unknown())
    assert set(unknown(unknown=None)) == words("train", ("bed", "cat", "zero"))


def test_silence_is_a_second_of_noise_and_no_split_hears_anothers(root, tmp_path):
    manifests = read(root, silence=0.5)
    heard = {split: np.zeros((len(NOISES), NOISE_S * RATE), dtype=bool) for split in SPEAKERS}
    for split, cuts in manifests.splits.items():
        for cut in cuts:
            if cut.id.startswith("_silence_"):
                assert cut.duration == 1.0
                noise = NOISES.index(Path(cut.recording.sources[0].source).stem)
                heard[split][noise, round(cut.start * RATE) : round(cut.end * RATE)] = True
    for one, other in combinations(heard.values(), 2):
        assert not (one & other).any()
    assert all(noise.any() for noise in heard["train"])  # every recording is used
    # 70 pieces over the first 12 s of six recordings
    assert heard["train"].mean() > 0.7
    assert not heard["train"][:, 12 * RATE :].any()

    prepared = prepare(manifests, tmp_path / "prepared", num_jobs=1, progress=False)
    cut = next(cut for cut in prepared.cuts("valid") if cut.id.startswith("_silence_/running_tap@"))
    start = int(cut.id.partition("@")[2])
    original = soundfile.read(root / "_background_noise_" / "running_tap.wav", dtype="float32")[0]
    np.testing.assert_array_equal(cut.load_audio()[0], original[start : start + RATE])


def test_all_words_need_no_noise(root):
    for name in NOISES:
        (root / "_background_noise_" / f"{name}.wav").unlink()
    found = read(root, classes=13)
    assert classes(found) == {split: dict.fromkeys(WORDS, len(SPEAKERS[split])) for split in SPEAKERS}
    for split in SPEAKERS:
        assert {cut.id for cut in found.splits[split]} == words(split, WORDS)


def test_version_2_has_all_its_words_as_classes(root):
    put(root / "visual" / "00000000_nohash_0.wav", wav())
    assert classes(read(root, version=2, partial=True))["train"] == {**dict.fromkeys(WORDS, 14), "visual": 1}
    assert classes(read(root, version=2, classes=12, partial=True))["train"]["_unknown_"] == 14


# The test set.


def test_the_published_test_set_replaces_the_list(root, tmp_path):
    manifests = read(root, test_root=root / ".." / "speech_commands_test_set_v0.01")
    cuts = {cut.id: cut.supervisions[0] for cut in manifests.splits["test"]}
    found = {name: (cut.speaker, cut.text, cut.custom["keyword"]) for name, cut in cuts.items()}
    assert found == {
        **{f"test_set/{word}/9d171fee_nohash_0": ("9d171fee", word, word) for word in KEYWORDS},
        "test_set/_unknown_/bed_3ff840aa_nohash_0.wav": ("3ff840aa", "bed", "_unknown_"),
        "test_set/_silence_/104": (None, None, "_silence_"),
    }
    assert classes(manifests)["train"] == classes(read(root))["train"]


def test_a_training_utterance_in_the_test_set_is_refused(root):
    test_set = root.parent / "speech_commands_test_set_v0.01"
    put(test_set / "_unknown_" / "zero_00000003_nohash_0.wav.wav", wav())
    with pytest.raises(ValueError, match=r"zero_00000003.* of the test set is zero/00000003_nohash_0\.wav of the train split"):
        read(root, test_root=test_set)


def test_a_missing_or_incomplete_test_set_says_what_to_do(root):
    test_set = root.parent / "speech_commands_test_set_v0.01"
    (test_set / "_silence_" / "104.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"test set: 1 of 12 .* \(_silence_: all\): .*data\.test_root=null takes"):
        read(root, test_root=test_set)
    assert "_silence_" not in classes(read(root, test_root=test_set, partial=True))["test"]
    with pytest.raises(FileNotFoundError, match=r"there is no test set .*nowhere: data\.download=true"):
        read(root, test_root=root / "nowhere")


# What can be wrong with a tree.


def test_missing_recordings_are_counted_and_named(root):
    for name in ("go/00000001_nohash_0.wav", "go/9d171fee_nohash_0.wav", "zero/00000002_nohash_0.wav"):
        (root / name).unlink()
    expected = (
        r"Speech Commands v1: 3 of 234 recordings are missing in .*v0\.01 \(of the lists 1, go/9d171fee_nohash_0\.wav first, "
        r"go: 2 of 18, zero: 1 of 18\): data\.download=true gets it, or unpack http.*v0\.01\.tar\.gz there"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        read(root)
    assert classes(read(root, partial=True))["train"]["go"] == 13


def test_missing_noise_is_named(root):
    (root / "_background_noise_" / "white_noise.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"noise: 1 of 6 recordings .*_background_noise_/white_noise\.wav"):
        read(root)
    assert classes(read(root, partial=True))["train"]["_silence_"] == 14


def test_no_folder_or_list_says_how_to_get_it(root):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere: data\.download=true gets it"):
        read(root.parent / "nowhere")
    (root / "testing_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*/testing_list\.txt: data\.download=true gets it"):
        read(root, partial=True)


def test_the_other_version_is_recognised(root):
    with pytest.raises(ValueError, match=r"validation_list\.txt lists 26 recordings, that of version 2 has 28"):
        read(root, version=2)
    put(root / "visual" / "00000000_nohash_0.wav", wav())
    with pytest.raises(ValueError, match=r"v1 has no words visual \(data\.version=2 has them\)"):
        read(root)


def test_an_utterance_in_both_lists_is_refused(root):
    with (root / "testing_list.txt").open("a") as stream:
        stream.write("go/e49428d9_nohash_0.wav\n")
    with pytest.raises(ValueError, match=r"go/e49428d9_nohash_0\.wav is in both validation_list\.txt and testing_list\.txt"):
        read(root, partial=True)


@pytest.mark.parametrize("line", ["hello/00000000_nohash_0.wav", "go/e49428d9.wav", "e49428d9_nohash_0.wav"])
def test_a_broken_list_is_refused_with_its_line(root, line):
    with (root / "testing_list.txt").open("a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"testing_list\.txt:27: expected a path such as"):
        read(root)


def test_a_shortened_list_is_refused_unless_it_is_meant_to_be(root):
    (root / "testing_list.txt").write_text("go/9d171fee_nohash_0.wav\n")
    with pytest.raises(ValueError, match=r"testing_list\.txt lists 1 recordings, that of version 1 has 26: .*data\.partial=true"):
        read(root)
    assert classes(read(root, partial=True))["test"] == {"go": 1, "_silence_": 1}


def test_noise_too_short_for_a_second_of_each_split_is_refused(root):
    for name in NOISES:
        put(root / "_background_noise_" / f"{name}.wav", wav(0, 9.0))
    with pytest.raises(ValueError, match=r"the valid parts of _background_noise_ are shorter than a second"):
        read(root)


def test_other_names_and_bad_audio_are_rejected_and_the_rest_goes_on(root):
    put(root / "go" / "odd.wav", wav())
    put(root / "go" / "._00000000_nohash_0.wav", b"of another system")
    put(root / "go" / "00000000_nohash_0.wav", b"garbage")
    put(root / "_background_noise_" / "white_noise.wav", b"garbage")
    manifests = read(root)
    assert {Path(path).name: reason.split(":")[0] for path, reason in manifests.rejected} == {
        "odd.wav": "not named SPEAKER_nohash_NUMBER.wav",
        "00000000_nohash_0.wav": "unreadable",
        "white_noise.wav": "unreadable",
    }
    assert classes(manifests)["train"]["go"] == 13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, r"data\.version must be 1 or 2, found 3"),
        ({"classes": 35}, r"data\.classes must be 12 or, in version 1, 30, found 35"),
        ({"unknown": 0}, r"data\.unknown must be a positive number, found 0"),
        ({"silence": None}, r"data\.silence must be a positive number, found None"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SpeechCommandsCorpus(tmp_path, **options)


def test_the_config_makes_the_corpus(root, tmp_path):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("prepare", ["data=speech_commands", f"data.root={root}", "data.silence=0.2", "run_dir=run"])
    manifests = instantiate(cfg.data.corpus).manifests(progress=False)
    assert classes(manifests)["train"]["_silence_"] == 28
    assert len(manifests.splits["test"]) == 12
    # A test set may hold silence of zeros.
    put(root.parent / "speech_commands_test_set_v0.01" / "_silence_" / "104.wav", wav(0, 1.0)[:44] + bytes(2 * RATE))
    options = {"silence_dbfs": cfg.data.prepare.silence_dbfs, "num_jobs": 1, "progress": False}
    assert prepare(manifests, tmp_path / "prepared", **options).rejected == 0


# Downloading, from a folder.


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A published archive of 2 files: its path, and the folder to unpack it as."""
    archive = tmp_path / "web" / "speech_commands_v0.01.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in (("./go/00000000_nohash_0.wav", wav()), ("./testing_list.txt", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = archive.read_bytes()
    monkeypatch.setattr(speech_commands, "URL", f"{archive.parent.as_uri()}/")
    sizes = {"speech_commands_v0.01": (len(content), hashlib.sha256(content).hexdigest())}
    monkeypatch.setattr(speech_commands, "ARCHIVES", sizes)
    return archive, tmp_path / "data" / "corpus"


def test_a_download_is_checked_and_unpacked_once(published):
    archive, folder = published
    download("speech_commands_v0.01", folder)
    assert (folder / "go" / "00000000_nohash_0.wav").read_bytes() == wav()
    assert [path.name for path in folder.parent.iterdir()] == ["corpus"]
    archive.unlink()
    download("speech_commands_v0.01", folder)  # nothing to do


def test_an_incomplete_or_damaged_download_is_not_unpacked(published):
    archive, folder = published
    content = archive.read_bytes()
    archive.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"v0\.01\.tar\.gz is incomplete, .* bytes: run the command again to continue"):
        download("speech_commands_v0.01", folder)
    (folder.parent / archive.name).unlink()
    archive.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"v0\.01\.tar\.gz is damaged: its SHA-256 is \w+, expected \w+: delete it"):
        download("speech_commands_v0.01", folder)
    assert not folder.exists()


def test_an_archive_without_checksum_is_unpacked_to_its_end(published, monkeypatch):
    archive, folder = published
    monkeypatch.setattr(speech_commands, "ARCHIVES", {})
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"is damaged \(.*\): delete it and run again"):
        download("speech_commands_v0.01", folder)
    assert not folder.exists()


def test_a_download_that_fails_names_the_address(published):
    archive, folder = published
    archive.unlink()
    with pytest.raises(OSError, match=r"file://.*v0\.01\.tar\.gz can't be downloaded to .*data: "):
        download("speech_commands_v0.01", folder)


def test_the_corpus_downloads_itself_and_its_test_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(speech_commands, "download", lambda name, folder: asked.append((name, folder)))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read(tmp_path / "a", download=True, test_root=tmp_path / "b")
    assert asked == [("speech_commands_v0.01", tmp_path / "a"), ("speech_commands_test_set_v0.01", tmp_path / "b")]
