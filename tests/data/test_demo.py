from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audiot.data.corpora import demo
from audiot.data.corpora.demo import ACCENTS, VARIANTS, DemoCorpus
from audiot.data.corpora.demo_phones import PHONES, phone_spans
from audiot.data.corpora.demo_texts import KEYWORDS, WORDS, sentences

SPLITS = ("train", "valid", "test", "speaker_valid", "speaker_test")
VOWELS = {"AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"}
TINY: dict[str, Any] = {
    "hours": 15 / 3600,
    "num_speakers": 3,
    "num_valid_speakers": 1,
    "num_test_speakers": 1,
    "heldout_utterances": 3,
    "speaker_utterances": 2,
}


def tree(root: Path) -> dict[str, str]:
    """Path → digest of every file."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    root = tmp_path_factory.mktemp("corpora") / "demo"
    DemoCorpus(root, **TINY, num_jobs=1).manifests(progress=False)
    return root


@pytest.fixture(scope="module")
def cuts(root):
    splits = DemoCorpus(root, **TINY).manifests(progress=False).splits
    return {split: list(splits[split]) for split in SPLITS}


@pytest.mark.slow
def test_speech_does_not_depend_on_the_time_of_day():
    pytest.importorskip("espeakng_loader")
    program = (
        "from audiot.data.corpora.espeak import Espeak;"
        "print(Espeak('en-us', 'f3', 50, 50, 175).speak('measure the mirage')[0].tobytes().hex())"
    )

    def speak() -> str:
        return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout

    first = speak()
    time.sleep(1.1)  # of itself eSpeak takes a new seed every second
    assert len(first) > 1000
    assert hashlib.sha256(speak().encode()).digest() == hashlib.sha256(first.encode()).digest()


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_workers(root, tmp_path):
    DemoCorpus(tmp_path / "demo", **TINY, num_jobs=2).manifests(progress=False)
    assert tree(tmp_path / "demo") == tree(root)


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    DemoCorpus(tmp_path / "demo", **TINY).manifests(progress=False)
    assert not list((tmp_path / "temporary").iterdir())


def test_a_second_call_speaks_nothing_and_needs_no_espeak(root, monkeypatch):
    before = tree(root), {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    DemoCorpus(root, **TINY).manifests(progress=False)
    assert before == (tree(root), {path: path.stat().st_mtime_ns for path in root.rglob("*")})


@pytest.mark.slow
def test_an_interrupted_corpus_is_continued_with_the_same_bytes(root, tmp_path, monkeypatch):
    corpus = DemoCorpus(tmp_path / "demo", **TINY, num_jobs=1)
    spoken = demo._spoken
    asked: list[set[str]] = []

    def interrupted(jobs, num_jobs, root):
        asked.append({job["speaker"] for job in jobs})
        for number, speaker in enumerate(spoken(jobs, num_jobs, root)):
            if number == 2 and len(asked) == 1:
                raise InterruptedError
            yield speaker

    monkeypatch.setattr(demo, "_spoken", interrupted)
    with pytest.raises(InterruptedError):
        corpus.manifests(progress=False)
    assert not (tmp_path / "demo" / "corpus.json").exists()
    with pytest.raises(ValueError, match=r"seed=0 there, 1 asked for"):
        DemoCorpus(tmp_path / "demo", **TINY, seed=1).manifests(progress=False)

    corpus.manifests(progress=False)
    assert asked[0] == set(corpus.speakers())
    assert asked[1] < asked[0]
    assert len(asked[1]) <= len(asked[0]) - 3  # those that were told as done
    assert tree(tmp_path / "demo") == tree(root)


@pytest.mark.slow
def test_more_hours_and_speakers_keep_the_utterances_that_were_there(root, tmp_path):
    parameters = {**TINY, "hours": 2 * TINY["hours"], "num_speakers": 4}
    DemoCorpus(tmp_path / "demo", **parameters).manifests(progress=False)
    small, large = ({k: v for k, v in tree(path).items() if k.endswith(".wav")} for path in (root, tmp_path / "demo"))
    assert len(large) > len(small)
    assert small == {name: large[name] for name in small}


@pytest.mark.parametrize("change", [{"hours": 1.0}, {"num_speakers": 4}, {"seed": 7}])
def test_a_corpus_of_other_parameters_is_refused(root, change):
    with pytest.raises(ValueError, match=f"other parameters .{next(iter(change))}="):
        DemoCorpus(root, **{**TINY, **change}).manifests(progress=False)


def test_a_moved_corpus_can_still_be_read(root, tmp_path):
    shutil.copytree(root, tmp_path / "elsewhere")
    splits = DemoCorpus(tmp_path / "elsewhere", **TINY).manifests(progress=False).splits
    source = splits["test"][0].recording.sources[0].source
    assert Path(source).is_relative_to(tmp_path / "elsewhere")
    assert splits["test"][0].load_audio().shape == (1, splits["test"][0].num_samples)


def test_missing_espeak_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'audiot[demo]'")):
        DemoCorpus(tmp_path / "demo", **TINY).manifests(progress=False)
    assert not (tmp_path / "demo").exists()


def test_a_speaker_that_fails_stops_the_corpus_with_the_reason(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    monkeypatch.setattr(demo, "VARIANTS", ("nobody",) * len(VARIANTS))
    with pytest.raises(RuntimeError, match=r"speaker \w+ failed: ValueError: eSpeak NG has no voice variant 'nobody'"):
        DemoCorpus(tmp_path / "demo", **TINY).manifests(progress=False)


@pytest.mark.parametrize("argument", [{"hours": 0}, {"num_test_speakers": -1}, {"seed": -1}, {"num_jobs": 0}])
def test_arguments_out_of_range_are_refused(tmp_path, argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        DemoCorpus(tmp_path, **argument)


def test_split_sizes_and_speakers(cuts):
    speakers = {split: {cut.supervisions[0].speaker for cut in cuts[split]} for split in SPLITS}
    assert {split: len(speakers[split]) for split in SPLITS} == {
        "train": 3,
        "valid": 1,
        "test": 1,
        "speaker_valid": 3,
        "speaker_test": 3,
    }
    assert speakers["speaker_valid"] == speakers["speaker_test"] == speakers["train"]
    assert not speakers["train"] & speakers["valid"]
    assert not (speakers["train"] | speakers["valid"]) & speakers["test"]
    assert [len(cuts[split]) for split in SPLITS[1:]] == [3, 3, 6, 6]
    assert 15 <= sum(cut.duration for cut in cuts["train"]) <= 15 + 3 * 4


def test_splits_share_no_sentence(cuts):
    texts = {split: {cut.supervisions[0].text for cut in cuts[split]} for split in SPLITS}
    train, valid, test = texts["train"], texts["valid"] | texts["speaker_valid"], texts["test"] | texts["speaker_test"]
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_default_speakers_differ_and_held_out_voices_are_never_trained_on(tmp_path):
    speakers = DemoCorpus(tmp_path, num_speakers=500).speakers()
    assert len({tuple(voice.values()) for voice in speakers.values()}) == 500 + 4 + 8
    variants = {role: {voice["variant"] for name, voice in speakers.items() if name.startswith(role)} for role in SPLITS[:3]}
    assert len(variants["valid"]) == 4
    assert len(variants["test"]) == 8
    assert not variants["train"] & (variants["valid"] | variants["test"])
    assert not variants["valid"] & variants["test"]
    assert {voice["accent"] for voice in speakers.values()} == set(ACCENTS)


def test_recordings_are_16_khz_mono_16_bit_and_as_long_as_stated(cuts):
    for cut in itertools.chain(*cuts.values()):
        with wave.open(cut.recording.sources[0].source) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
            assert file.getnframes() == cut.num_samples
        assert 1.5 <= cut.duration <= 4.0
        assert 0.01 < np.abs(cut.load_audio()).max() < 1.0


def test_each_text_has_its_keyword_and_no_other(cuts):
    for cut in itertools.chain(*cuts.values()):
        supervision = cut.supervisions[0]
        words = re.findall(r"\w+", supervision.text)
        assert [word for word in words if word in KEYWORDS] == [supervision.custom["keyword"]]
        assert supervision.language == "English"
        assert supervision.custom["accent"] in ACCENTS.values()


def check_cover(phones, duration):
    """Phones follow each other from 0 to the end, with silence at both ends and no two silences in a row."""
    assert phones[0].symbol == phones[-1].symbol == "SIL"
    assert phones[0].start == 0.0
    assert phones[-1].end == pytest.approx(duration, abs=1e-6)
    for phone, following in itertools.pairwise(phones):
        assert phone.end == pytest.approx(following.start, abs=1e-6)
        assert phone.duration > 0
        assert phone.symbol != "SIL" or following.symbol != "SIL"


def test_phones_cover_each_cut_without_gap_or_overlap(cuts):
    for cut in itertools.chain(*cuts.values()):
        phones = cut.supervisions[0].alignment["phone"]
        assert {phone.symbol for phone in phones} <= set(PHONES)
        check_cover(phones, cut.duration)
        # Silence at either end is short.
        assert 0.02 <= phones[0].duration < 0.12
        assert 0.02 <= phones[-1].duration < 0.16


def test_sound_agrees_with_the_phones(cuts):
    """Silence and closures are quiet, sibilants hiss, vowels are loud and low."""
    levels: dict[str, list[float]] = {}
    hiss: dict[str, list[float]] = {}
    closure = []
    for cut in itertools.chain(*cuts.values()):
        audio = cut.load_audio()[0].astype(np.float64)
        for phone in cut.supervisions[0].alignment["phone"]:
            samples = audio[round(phone.start * 16000) : round(phone.end * 16000)]
            power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) ** 2
            high = power[np.fft.rfftfreq(len(samples), 1 / 16000) > 3500].sum() / power.sum()
            kind = "vowel" if phone.symbol in VOWELS else phone.symbol
            levels.setdefault(kind, []).append(10 * np.log10(np.mean(samples**2) / np.mean(audio**2)))
            hiss.setdefault(kind, []).append(high)
            if phone.symbol in ("T", "K") and len(samples) > 0.07 * 16000:
                first, rest = np.split(samples, [len(samples) // 3])
                closure.append(10 * np.log10(np.mean(first**2) / np.mean(rest**2)))
    assert np.median(levels["vowel"]) > np.median(levels["SIL"]) + 20
    assert np.percentile(levels["vowel"], 5) > np.percentile(levels["SIL"], 90)
    assert np.mean(hiss["S"]) > 0.7
    assert np.mean(hiss["vowel"]) < 0.05
    assert np.mean(hiss["S"]) > np.mean(hiss["SH"]) > np.mean(hiss["ZH"])
    assert np.median(closure) < -6


def test_late_liquids_get_the_end_of_their_vowel():
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 1000, 6000).astype(np.int16)
    samples[5000:] = 0
    events = [("b", 0), ("ˈɔː", 1000), ("l", 5000), ("", 5000), ("", 6000)]
    assert phone_spans(events, samples, 22050) == [
        ("B", 0, 1000),
        ("AO", 1000, 3400),
        ("L", 3400, 5000),
        ("SIL", 5000, 6000),
    ]
    samples[5000:] = 1000  # an l with a sound of its own is on time
    assert phone_spans([*events[:3], ("z", 5800)], samples, 22050)[2] == ("L", 5000, 5800)


def test_closures_belong_to_their_stop_and_pauses_do_not():
    samples = np.full(8000, 1000, dtype=np.int16)
    samples[1900:3000] = 20  # in the vowel's time, before the release at 3000
    samples[5000:7000] = 0
    events = [("ˈæ", 0), ("p", 3000), ("ə", 4000), ("", 5000), ("", 7000), ("t", 7000)]
    spans = phone_spans(events, samples, 22050)
    assert [span.phone for span in spans] == ["AE", "P", "AH", "SIL", "T"]
    assert spans[0].end == spans[1].start == pytest.approx(1900, abs=110)
    assert spans[4] == ("T", 7000, 8000)


def test_a_nameless_glide_between_vowels_is_y():
    samples = np.full(4000, 1000, dtype=np.int16)
    spans = phone_spans([("ð", 0), ("ɪ", 1000), ("", 2000), ("ˈæ", 3000)], samples, 22050)
    assert [span.phone for span in spans] == ["DH", "IH", "Y", "AE"]


def test_an_unknown_phone_is_named():
    with pytest.raises(ValueError, match="'ø'"):
        phone_spans([("ˈø", 0)], np.zeros(10, dtype=np.int16), 22050)


def test_every_word_in_every_accent_has_phones_and_all_phones_occur():
    pytest.importorskip("espeakng_loader")
    from audiot.data.corpora.espeak import Espeak

    words = sorted({*KEYWORDS, *itertools.chain(*WORDS.values())})
    heard = set()
    for accent in ACCENTS:
        espeak = Espeak(accent, "m1", pitch=50, pitch_range=50, rate=400)
        for i in range(0, len(words), 8):
            samples, events = espeak.speak(" ".join(words[i : i + 8]))
            heard |= {span.phone for span in phone_spans(events, samples, espeak.sample_rate)}
    assert heard == set(PHONES)
    assert len(PHONES) == 40


def test_all_voice_variants_exist():
    loader = pytest.importorskip("espeakng_loader")
    assert set(VARIANTS) <= {path.name for path in (Path(loader.get_data_path()) / "voices" / "!v").iterdir()}
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert not {"whisper", "whisperf", "UniRobot", "shelby"} & set(VARIANTS)


def test_sentences_are_distinct_and_keywords_balanced():
    drawn = {split: list(itertools.islice(sentences(split, "seed"), 600)) for split in ("train", "valid", "test")}
    texts = {split: {text for text, _ in pairs} for split, pairs in drawn.items()}
    assert [len(texts[split]) for split in texts] == [600, 600, 600]
    assert len(set().union(*texts.values())) == 1800
    for pairs in drawn.values():
        assert Counter(keyword for _, keyword in pairs) == dict.fromkeys(KEYWORDS, 50)
    assert not set(KEYWORDS) & set(itertools.chain(*WORDS.values()))
    assert list(itertools.islice(sentences("train", "seed"), 50)) == drawn["train"][:50]


def test_utterance_lists_name_the_voice_of_no_other_speaker(root):
    for path in (root / "speakers").iterdir():
        for utterance in json.loads(path.read_text()):
            assert utterance["id"].startswith(f"{path.stem}-{utterance['split']}-")
            assert (root / "audio" / path.stem / f"{utterance['id']}.wav").is_file()
