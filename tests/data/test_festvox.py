"""Voices in Festvox's layout, made of tones: the pitch of each phone is known, so labels can be compared with the audio."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from audiot.data.corpora.festvox import FestvoxCorpus, read_lab, read_prompts
from audiot.data.labels import FrameLabels, PhoneSequence
from audiot.data.prepare import PreparedCorpus, prepare
from audiot.features import LogMel

TONES = {"pau": 0, "a": 400, "ee": 900, "s": 2000}  # Hz


def phones_of(number: int) -> list[tuple[str, float]]:
    """Symbol and end in seconds of each phone of an utterance, 0.6 s in all."""
    one, other = ("a", "ee") if number % 2 else ("ee", "s")
    return [("pau", 0.1), (one, 0.25), (other, 0.5), ("pau", 0.6)]


def make_voice(folder: Path, numbers: range = range(30), rate: int = 16000, suffix: str = "wav") -> Path:
    """A voice that speaks in tones, `arctic_a0000` and so on."""
    for name in ("wav", "etc", "lab"):
        (folder / name).mkdir(parents=True)
    for number in numbers:
        name, begin, pieces = f"arctic_a{number:04d}", 0.0, []
        for phone, end in phones_of(number):
            times = np.arange(round((end - begin) * rate)) / rate
            pieces.append((0.3 if TONES[phone] else 0) * np.sin(2 * np.pi * TONES[phone] * times))
            begin = end
        soundfile.write(folder / "wav" / f"{name}.{suffix}", np.concatenate(pieces), rate)
        lines = "".join(f"{end:.5f} 125 {phone}\n" for phone, end in phones_of(number))
        (folder / "lab" / f"{name}.lab").write_text(f"#\n{lines}")
    texts = "".join(f'( arctic_a{number:04d} "Sentence {number}." )\n' for number in numbers)
    (folder / "etc" / "txt.done.data").write_text(texts)
    return folder


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    """A complete voice. Not to be changed."""
    return make_voice(tmp_path_factory.mktemp("voices") / "tones")


@pytest.fixture
def own(tmp_path):
    """A voice to change."""
    return make_voice(tmp_path / "own")


def cuts_of(manifests, *splits):
    return {cut.id: cut for split in splits or ("train", "valid", "test") for cut in manifests.splits[split]}


def ids(manifests):
    return {split: {cut.id for cut in cuts} for split, cuts in manifests.splits.items()}


def lab(tmp_path, content):
    path = tmp_path / "a.lab"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_phones_text_and_no_speaker_of_a_single_voice(voice):
    manifests = FestvoxCorpus(voice).manifests(progress=False)
    (supervision,) = cuts_of(manifests)["arctic_a0007"].supervisions
    assert (supervision.text, supervision.speaker, supervision.language) == ("Sentence 7.", None, None)
    found = [(item.symbol, item.start, item.duration) for item in supervision.alignment["phone"]]
    assert found == [("pau", 0.0, 0.1), ("a", 0.1, 0.15), ("ee", 0.25, 0.25), ("pau", 0.5, 0.1)]
    assert (manifests.rejected, manifests.task_splits) == ([], {})


def test_every_utterance_is_in_one_split_and_files_that_come_move_none(voice, tmp_path):
    few = ids(FestvoxCorpus(make_voice(tmp_path / "few", range(20))).manifests(progress=False))
    more = ids(FestvoxCorpus(voice).manifests(progress=False))
    assert sorted(name for names in more.values() for name in names) == [f"arctic_a{number:04d}" for number in range(30)]
    assert all(few[split] == {name for name in more[split] if name < "arctic_a0020"} for split in ("train", "valid", "test"))
    other = ids(FestvoxCorpus(voice, valid_fraction=0.2, seed=1).manifests(progress=False))
    assert other["test"] != more["test"]


def test_the_share_of_the_splits_is_about_what_was_asked_for(voice):
    corpus = FestvoxCorpus(voice, valid_fraction=0.15)
    roles = [corpus._role(f"utterance {number}") for number in range(4000)]
    assert [roles.count(role) / 4000 for role in ("train", "valid", "test")] == pytest.approx([0.7, 0.15, 0.15], abs=0.02)


def test_voices_in_a_folder_are_speakers_and_share_the_split_of_a_sentence(tmp_path):
    for name in ("cmu_us_bdl_arctic", "cmu_us_slt_arctic"):
        make_voice(tmp_path / name)
    (tmp_path / "notes").mkdir()
    manifests = FestvoxCorpus(tmp_path).manifests(progress=False)
    for cut in cuts_of(manifests).values():
        assert cut.supervisions[0].speaker == cut.id.partition("/")[0]
    found = ids(manifests)
    assert len(cuts_of(manifests)) == 60
    for names in found.values():
        speakers = {"cmu_us_bdl_arctic", "cmu_us_slt_arctic"}
        assert names == {f"{speaker}/{name.partition('/')[2]}" for speaker in speakers for name in names}
    alone = ids(FestvoxCorpus(tmp_path / "cmu_us_slt_arctic").manifests(progress=False))
    assert alone["test"] == {name.partition("/")[2] for name in found["test"]}


def test_frames_of_the_prepared_voice_have_the_tone_of_their_phone(tmp_path):
    """Also at another sample rate and in another format, from which preparation makes 16 kHz WAV."""
    root = make_voice(tmp_path / "voice", range(12), rate=22050, suffix="flac")
    corpus = FestvoxCorpus(root, valid_fraction=0.3)
    prepared = prepare(corpus.manifests(progress=False), tmp_path / "prepared", num_jobs=1, progress=False)
    features, symbols = LogMel(), sorted(TONES)
    labels = FrameLabels("phone", features)
    for split in ("train", "valid", "test"):
        for cut in prepared.cuts(split):
            samples = cut.load_audio()[0]
            assert cut.sampling_rate == 16000
            centers = features.frame_centers(features.num_frames(len(samples))).tolist()
            classes = labels.encode(cut, {symbol: place for place, symbol in enumerate(symbols)}).tolist()
            edges = np.array([0.1, 0.25, 0.5])
            for center, found in zip(centers, classes, strict=True):
                first = round(center) - 160
                piece = samples[max(first, 0) : first + 320]
                if len(piece) < 320 or np.abs(edges - center / 16000).min() < 0.012:
                    continue
                spectrum = np.abs(np.fft.rfft(piece * np.hanning(320)))
                tone = spectrum.argmax() * 50 if spectrum.max() > 1 else 0
                assert symbols[found] == next(symbol for symbol, pitch in TONES.items() if pitch == tone)


def test_silence_is_a_class_of_frames_but_no_phone_of_a_sequence(voice):
    cut = cuts_of(FestvoxCorpus(voice).manifests(progress=False))["arctic_a0007"]
    assert FrameLabels("phone", LogMel()).names(cut) == ["pau", "a", "ee", "pau"]
    assert PhoneSequence(LogMel()).names(cut) == ["a", "ee"]


def test_missing_and_broken_labels_are_named_and_the_utterances_stay(own, capsys):
    names = sorted(ids(FestvoxCorpus(own).manifests(progress=False))["train"])[:3]
    gone, broken, other = (own / "lab" / f"{name}.lab" for name in names)
    gone.unlink()
    broken.write_text("#\n0.1 125 pau\n0.05 125 a\n")
    other.write_text("#\n0.1 125 pau\n3.0 125 a\n")
    manifests = FestvoxCorpus(own).manifests(progress=False)
    assert dict(manifests.rejected) == {
        str(gone): "no phone labels: the file is missing",
        str(broken): f"bad phone labels: {broken}:3: a ends at 0.05 s, the phone before it at 0.1 s",
        str(other): f"bad phone labels: {other} ends at 3.000 s, the audio at 0.600 s, which may be 100 ms apart: labels of "
        "another file?",
    }
    assert len(cuts_of(manifests)) == 30
    assert {cut.id for cut in cuts_of(manifests).values() if not cut.supervisions[0].alignment} == set(names)
    roles = {role: f"phone_{role}" for role in ("train", "valid", "test")}
    assert manifests.task_splits == {"phone": roles, "phone_recognition": roles}
    found = ids(manifests)
    assert all(found[f"phone_{role}"] == found[role] - set(names) for role in roles)
    assert "27 of 30 utterances" in capsys.readouterr().out


def test_audio_without_a_transcript_is_used_and_one_that_is_only_listed_is_named(own, capsys):
    (own / "etc" / "txt.done.data").write_text("".join(f'( arctic_a{number:04d} "A." )\n' for number in range(1, 31)))
    manifests = FestvoxCorpus(own).manifests(progress=False)
    assert manifests.rejected == [(str(own / "wav" / "arctic_a0030.wav"), "missing: etc/txt.done.data lists it")]
    assert cuts_of(manifests)["arctic_a0000"].supervisions[0].text is None
    assert manifests.task_splits == {"asr": {role: f"text_{role}" for role in ("train", "valid", "test")}}
    assert "29 of 30 utterances" in capsys.readouterr().out


def test_without_lab_and_transcripts_there_is_audio_only(own, capsys):
    (own / "etc" / "txt.done.data").unlink()
    (own / "lab").rename(own / "elsewhere")
    manifests = FestvoxCorpus(own).manifests(progress=False)
    assert len(cuts_of(manifests)) == 30
    assert not manifests.task_splits
    assert not manifests.rejected
    out = capsys.readouterr().out
    assert f"no folder lab in {own}" in out
    assert f"no transcripts in {own / 'etc' / 'txt.done.data'}" in out


def test_bad_audio_is_rejected_and_does_not_stop_the_run(own, tmp_path):
    (own / "wav" / "arctic_a0003.wav").write_bytes(b"not audio")
    (own / "wav" / "arctic_a0004.wav").write_bytes(b"")
    (own / "wav" / "._arctic_a0005.wav").write_bytes(b"junk of another system")
    corpus = FestvoxCorpus(own)
    prepared = prepare(corpus.manifests, tmp_path / "out", sources=corpus.sources, num_jobs=1, progress=False)
    assert sum(prepared.counts.values()) == 28
    with open(tmp_path / "out" / "rejected.csv", encoding="utf-8") as stream:
        assert {Path(row["path"]).name for row in csv.DictReader(stream)} == {"arctic_a0003.wav", "arctic_a0004.wav"}


def test_an_edited_label_file_prepares_the_difference(own, tmp_path, capsys):
    def run() -> PreparedCorpus:
        corpus = FestvoxCorpus(own)
        return prepare(corpus.manifests, tmp_path / "out", sources=corpus.sources, num_jobs=1, progress=False)

    before = run().content
    path = own / "lab" / "arctic_a0007.lab"
    path.write_text(path.read_text().replace("ee", "oo"))
    assert run().content != before
    assert "arctic_a0007.lab edited" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        "#\n0.25 125 pau\n0.5 125 a\n",
        b"\xef\xbb\xbf#\r\n0.25 125 pau\r\n\r\n0.5 125 a\r\n\r\n",
        "separator ;\nnfields 1\n#\n  0.2500\t26 \tpau ; 0.9\n    0.5 26 a\n",
    ],
    ids=["plain", "mark, CRLF, blank lines", "header, tabs, fields after a semicolon"],
)
def test_a_label_file_is_read(content, tmp_path):
    tier = read_lab(lab(tmp_path, content), 0.5)
    assert (tier.symbols, list(tier.edges)) == (("pau", "a"), [0.0, 0.25, 0.5])


def test_phones_end_with_the_audio(tmp_path):
    path = lab(tmp_path, "#\n0.2 125 a\n0.45 125 ee\n0.5 125 pau\n")
    assert read_lab(path, 0.46).items()[-1].end == pytest.approx(0.46)
    late = read_lab(path, 0.42)
    assert (late.symbols, list(late.edges)) == (("a", "ee"), [0.0, 0.2, 0.42])
    assert list(read_lab(path, 0.55).edges) == [0.0, 0.2, 0.45, 0.5]  # nothing is known of what comes after


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "0 2500000 pau\n2500000 5000000 a\n",
            "a.lab: expected a line #, .* with seconds, found '0 2500000 pau', which HTS writes",
        ),
        ("0 2500000 x^x-pau+a=b@x_x\n", "a.lab: expected a line #, .*which HTS writes: BEGIN END PHONE in units of 100 ns"),
        ("0.25 125 pau\n", "a.lab: expected a line #, then lines END_TIME NUMBER PHONE with seconds, found '0.25 125 pau'$"),
        ("", "expected a line #, .*, found nothing"),
        ("#\n", "no phones after the line #"),
        ("#\n0.25 125\n", "a.lab:2: expected END_TIME NUMBER PHONE, found '0.25 125'"),
        ("#\nnan 125 a\n", "a.lab:2: expected END_TIME NUMBER PHONE"),
        ("#\n-0.1 125 a\n", "a.lab:2: expected END_TIME NUMBER PHONE"),
        ("#\n0.5 pau a\n", "a.lab:2: expected END_TIME NUMBER PHONE"),
        ("#\n0.5 125 a\n0.4 125 b\n", "a.lab:3: b ends at 0.4 s, the phone before it at 0.5 s"),
        ("#\n0.2 125 a\n", "ends at 0.200 s, the audio at 0.500 s"),
        (b"#\n0.5 125 \xe9\n", "a.lab:2: not UTF-8"),
    ],
)
def test_a_broken_label_file_is_refused_with_its_line(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_lab(lab(tmp_path, content), 0.5)


def test_labels_that_are_all_of_another_layout_are_refused(own):
    for path in (own / "lab").iterdir():
        path.write_text("0 6000000 pau\n")
    with pytest.raises(
        ValueError, match=r"none of 30 label files can be used, first bad phone labels: .*a0000.lab: .*HTS"
    ) as error:
        FestvoxCorpus(own).manifests(progress=False)
    assert "\n" not in str(error.value)


def test_transcripts_have_escaped_quotes_any_line_end_and_any_script(tmp_path):
    path = tmp_path / "txt.done.data"
    path.write_bytes(
        '\ufeff( a_1 "He said \\"no\\"." )\r\n\r\n(b "Она завела (прядь)." )\r\n( c "" )\r\n( d "a \\\\ b")\n'.encode()
    )
    assert read_prompts(path) == {"a_1": 'He said "no".', "b": "Она завела (прядь).", "c": "", "d": "a \\ b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('( a "one" )\n( b "two )\n', r"data:2: expected \( UTTERANCE \"TEXT\" \) in a line"),
        ('( a "one "two" three" )\n', r"data:1: expected .* with \\\" for a quote inside the text"),
        ("a one\n", "data:1: expected"),
        ('( a "one" )\n( a "two" )\n', "data:2: utterance a occurs a second time"),
    ],
)
def test_broken_transcripts_are_refused_with_the_line(content, message, tmp_path):
    path = tmp_path / "txt.done.data"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_what_makes_no_corpus_is_refused_in_one_line(own, tmp_path):
    (tmp_path / "empty" / "wav").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no folder wav in .*nowhere nor in the folders in it"):
        FestvoxCorpus(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no audio in .*empty/wav"):
        FestvoxCorpus(tmp_path / "empty").manifests(progress=False)
    with pytest.raises(ValueError, match=r"data.valid_fraction must be above 0 and below 0.5, found 0.5"):
        FestvoxCorpus(own, valid_fraction=0.5)
    with pytest.raises(ValueError, match=r"30 utterances of .*own leave none for valid: change data.valid_fraction=0.0001"):
        FestvoxCorpus(own, valid_fraction=0.0001).manifests(progress=False)
    soundfile.write(own / "wav" / "arctic_a0003.flac", np.zeros(1600), 16000)
    with pytest.raises(ValueError, match=r"arctic_a0003.flac and .*arctic_a0003.wav would be one utterance"):
        FestvoxCorpus(own).manifests(progress=False)


def test_the_config_makes_the_corpus(voice):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("pretrain", ["data=festvox", f"data.root={voice}", "data.valid_fraction=0.2", "run_dir=run"])
    corpus = instantiate(cfg.data.corpus)
    assert (corpus.root, corpus.valid_fraction, corpus.seed) == (voice, 0.2, 0)
    assert [name.split("/")[-1] for name in cfg.probes] == ["encoder", "random", "features"]


def test_the_real_voice_is_read_and_its_silences_are_silent(tmp_path):
    """Debian's festvox-ru 0.5: 620 utterances and 54,372 phones of 51 kinds, counted with grep and sort."""
    root = Path(os.environ.get("AUDIOT_TEST_DATA", tmp_path)) / "festvox-ru"
    if not root.is_dir():
        pytest.skip("AUDIOT_TEST_DATA has no festvox-ru")
    manifests = FestvoxCorpus(root).manifests(progress=False)
    cuts = cuts_of(manifests)
    tiers = {name: cut.supervisions[0].alignment["phone"] for name, cut in cuts.items()}
    assert not manifests.rejected
    assert len(cuts) == 620
    assert all(cut.supervisions[0].text for cut in cuts.values())
    assert sum(map(len, tiers.values())) == 54372
    assert len({item.symbol for tier in tiers.values() for item in tier}) == 51
    loud: dict[bool, list[float]] = {True: [], False: []}
    for name in list(cuts)[::31]:
        samples = cuts[name].load_audio()[0]
        for item in tiers[name]:
            piece = samples[round(item.start * 16000) : round(item.end * 16000)]
            loud[item.symbol == "pau"].append(10 * np.log10(np.square(piece).mean() + 1e-10))
    assert np.median(loud[True]) < np.median(loud[False]) - 30
