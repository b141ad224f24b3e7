from __future__ import annotations

import gzip
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from audiot.data.corpora.manifest import ManifestCorpus
from audiot.data.labels import CharacterLabels, UtteranceLabel
from audiot.data.manifests import Manifests
from audiot.data.prepare import prepare

SECONDS = 1.0
SAMPLE_RATE = 16000


def samples_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).uniform(-0.5, 0.5, round(SECONDS * SAMPLE_RATE))


def audio(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.flac" for number in range(count)]
    for number, path in enumerate(paths):
        soundfile.write(path, samples_of(number), SAMPLE_RATE)
    return paths


def nemo(path: Path, *entries: dict) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def cuts_of(manifests: Manifests) -> dict[str, list]:
    return {split: list(cuts) for split, cuts in manifests.splits.items()}


def all_cuts(corpus: ManifestCorpus) -> list:
    """Cuts of all splits by id."""
    return sorted(chain(*cuts_of(corpus.manifests(progress=False)).values()), key=lambda cut: cut.id)


def lhotse_cuts(paths: list[Path]) -> list:
    cuts = [Recording.from_file(path, recording_id=path.stem).to_cut() for path in paths]
    for cut in cuts:
        phones = [AlignmentItem("a", 0.25, 0.5)]
        cut.supervisions = [SupervisionSegment(f"s{cut.id}", cut.id, 0.25, 0.5, speaker="theo", alignment={"phone": phones})]
    return cuts


def prepared_audio(manifests: Manifests, directory: Path) -> dict[str, np.ndarray]:
    prepared = prepare(manifests, directory, num_jobs=1, progress=False)
    return {cut.id: cut.load_audio()[0] for split in prepared.counts for cut in prepared.cuts(split)}


def test_nemo_entries_give_audio_text_and_labels(tmp_path):
    audio(tmp_path / "wavs", 3)
    train = nemo(
        tmp_path / "train.json",
        {"audio_filepath": "wavs/0.flac", "duration": 1.0, "text": "null", "speaker": 7, "label": "zero"},
        {"audio_filepath": "wavs/1.flac", "duration": 0.98, "text": "one", "lang": "en"},
        {"audio_filepath": "wavs/2.flac", "offset": 0.25, "duration": 0.5},
    )
    valid = nemo(tmp_path / "valid.json", {"audio_filepath": str(audio(tmp_path / "more", 1)[0]), "offset": None})
    found = cuts_of(ManifestCorpus(train, valid, valid).manifests(progress=False))
    first, second, piece = found["train"]
    assert [cut.id for cut in found["train"]] == ["wavs/0", "wavs/1", "wavs/2@0.25+0.5"]
    assert [cut.id for cut in found["valid"]] == [cut.id for cut in found["test"]] == ["more/0"]
    assert (first.supervisions[0].text, first.supervisions[0].speaker) == ("null", "7")
    assert first.supervisions[0].custom == {"speaker": 7, "label": "zero"}
    assert second.supervisions[0].language == "en"
    assert second.duration == 1.0  # a duration rounded by hand doesn't cut samples off
    assert (piece.start, piece.duration) == (0.25, 0.5)
    heard = prepared_audio(ManifestCorpus(train, valid, valid).manifests(progress=False), tmp_path / "out")
    assert np.abs(heard["wavs/1"] - samples_of(1)).max() < 1e-4
    assert np.abs(heard["wavs/2@0.25+0.5"] - samples_of(2)[4000:12000]).max() < 1e-4


def test_nemo_paths_are_relative_to_root_where_it_is_given(tmp_path):
    audio(tmp_path / "data" / "wavs", 3)
    train = nemo(tmp_path / "train.json", *({"audio_filepath": f"wavs/{n}.flac"} for n in range(3)))
    manifests = ManifestCorpus(train, root=tmp_path / "data").manifests(progress=False)
    assert manifests.rejected == []
    assert sorted(len(cuts) for cuts in cuts_of(manifests).values()) == [1, 1, 1]


def test_nemo_entries_without_usable_audio_are_rejected(tmp_path):
    audio(tmp_path, 3)
    (tmp_path / "bad.wav").write_bytes(b"garbage")
    train = nemo(
        tmp_path / "train.json",
        *({"audio_filepath": f"{n}.flac"} for n in range(3)),
        {"audio_filepath": "gone.wav", "duration": 1.0},
        {"audio_filepath": "bad.wav", "duration": 1.0},
        {"audio_filepath": "0.flac", "duration": 2.0},
        {"audio_filepath": "0.flac", "offset": 1.5},
    )
    manifests = ManifestCorpus(train).manifests(progress=False)
    kinds = [(Path(path).name, reason.split(":")[0]) for path, reason in manifests.rejected]
    wrong = ("0.flac", "not as its manifest says")
    assert kinds == [("gone.wav", "missing"), ("bad.wav", "unreadable"), wrong, wrong]
    assert sum(map(len, cuts_of(manifests).values())) == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_lhotse_cuts_are_told_by_their_content_and_come_back_as_they_are(tmp_path, suffix):
    cuts = lhotse_cuts(audio(tmp_path / "wavs", 5))
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    content = (tmp_path / "cuts.jsonl").read_bytes()
    train = tmp_path / f"train{suffix}"
    train.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    found = cuts_of(ManifestCorpus(train, valid_fraction=0.2).manifests(progress=False))
    assert {split: len(part) for split, part in found.items()} == {"train": 3, "valid": 1, "test": 1}
    assert sorted(chain(*found.values()), key=lambda cut: cut.id) == cuts


def test_relative_paths_of_lhotse_cuts_start_at_root(tmp_path):
    cuts = lhotse_cuts(audio(tmp_path / "wavs", 3))
    cuts.append(cuts[0].append(cuts[1]).with_id("mixed"))
    for cut in cuts[:3]:
        cut.recording.sources[0].source = f"wavs/{cut.id}.flac"
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    manifests = ManifestCorpus(tmp_path / "cuts.jsonl", root=tmp_path).manifests(progress=False)
    heard = prepared_audio(manifests, tmp_path / "out")
    assert np.abs(heard["mixed"] - np.concatenate([samples_of(0), samples_of(1)])).max() < 1e-4
    assert np.abs(heard["2"] - samples_of(2)).max() < 1e-4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio_filepath": "0.flac"', "not JSON"),
        ("[1, 2]", "a JSON object was expected, found list"),
        ('{"id": "x"}', "neither a Lhotse cut"),
        ('{"id": "x", "sources": [], "sampling_rate": 8000}', "neither a Lhotse cut"),
        ('{"type": "MonoCut", "id": "x"}', "not a Lhotse cut"),
        ('{"audio_filepath": ["a.wav", "b.wav"]}', "audio_filepath must be one path"),
        ('{"audio_filepath": "0.flac", "duration": "long"}', "duration must be a number"),
        ('{"audio_filepath": "0.flac", "offset": -1}', "offset must be a number"),
        ('{"audio_filepath": "0.flac", "duration": NaN}', "duration must be a number"),
        ('{"audio_filepath": "0.flac", "duration": 0}', "duration must be a number of seconds above 0"),
        ('{"audio_filepath": "0.flac", "duration": true}', "duration must be a number"),
        ('{"audio_filepath": "0.flac", "offset": "0"}', "offset must be a number"),
        ('{"audio_filepath": "0.flac", "snr": NaN}', "snr must be a number, found nan: write null"),
        ('{"audio_filepath": "0.flac", "text": 7}', "text must be text, found 7: put it in quotes"),
        ('{"audio_filepath": "0.flac", "text": ["a"]}', "text must be text, found \\['a'\\]"),
        ('{"audio_filepath": "0.flac", "lang": true}', "lang must be text, found True"),
        ('{"audio_filepath": "0.flac", "speaker": 7.0}', "speaker must be text or a whole number, found 7.0"),
        ('{"audio_filepath": "0.flac", "label": {"a": 1}}', "label must be text or a whole number, found {'a': 1}"),
        ('{"audio_filepath": "0.flac", "label": "a", "label": "b"}', "label occurs twice"),
        ('{"audio_filepath": "caf\\xe9.flac"}', "not UTF-8"),
        ('{"audio_filepath": "0.flac"}', "the utterance '0' occurs a second time"),
    ],
)
def test_a_broken_line_is_reported_with_its_number(tmp_path, line, message):
    audio(tmp_path, 2)
    train = tmp_path / "train.json"
    content = '{"audio_filepath": "0.flac"}\n\n' + line + '\n{"audio_filepath": "1.flac"}\n'
    train.write_bytes(content.encode().replace(rb"\xe9", b"\xe9"))
    with pytest.raises(ValueError, match=rf"train\.json:3: .*{message}"):
        ManifestCorpus(train).manifests(progress=False)


def test_blank_fields_are_missing_and_labels_have_no_blanks_around_them(tmp_path):
    audio(tmp_path, 3)
    entries = [
        {"audio_filepath": "0.flac", "label": "", "speaker": " ", "text": "", "keyword": None},
        {"audio_filepath": "1.flac", "label": "08 ", "speaker": " amy", "text": " one two "},
        {"audio_filepath": "2.flac", "label": "08"},
    ]
    train = tmp_path / "train.json"
    train.write_bytes("".join(json.dumps(entry) + "\r\n" for entry in entries).encode("utf-8-sig"))
    blank, padded, plain = all_cuts(ManifestCorpus(train))
    segment = blank.supervisions[0]
    assert (segment.text, segment.speaker, segment.custom) == (None, None, None)
    assert (padded.supervisions[0].text, padded.supervisions[0].speaker) == ("one two", "amy")
    assert UtteranceLabel("label").names(padded) == UtteranceLabel("label").names(plain) == ["08"]
    with pytest.raises(ValueError, match=r"utterance 0 has no label 'label' \(its labels: speaker\)"):
        UtteranceLabel("label").names(blank)


SEGMENT = {"id": "s", "recording_id": "r", "start": 0, "duration": 1}


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([SEGMENT, SEGMENT | {"text": 7}], r"supervisions\[1\]\.text must be text, found 7"),
        ([SEGMENT | {"speaker": ["amy"]}], r"supervisions\[0\]\.speaker must be text or a whole number, found \['amy'\]"),
        ([SEGMENT | {"language": 3}], r"supervisions\[0\]\.language must be text, found 3"),
        ([SEGMENT | {"custom": ["a"]}], r"not a Lhotse cut|supervisions\[0\]\.custom must be an object"),
        ([SEGMENT | {"start": True}], r"supervisions\[0\]\.start must be a number of seconds, found True"),
        ([SEGMENT | {"duration": -1}], r"supervisions\[0\]\.duration must be at least 0, found -1"),
        ([SEGMENT | {"duration": float("nan")}], r"supervisions\[0\]\.duration must be a number, found nan"),
        (
            [SEGMENT | {"alignment": {"phone": [[7, 0, 1]]}}],
            r"a symbol of supervisions\[0\]\.alignment\.phone must be text, found 7",
        ),
        (
            [SEGMENT | {"alignment": {"phone": [["a", "0", 1]]}}],
            r"a start of supervisions\[0\]\.alignment\.phone must be a number",
        ),
        (
            [SEGMENT | {"alignment": {"phone": [["a", 0, -1]]}}],
            r"a duration of supervisions\[0\]\.alignment\.phone must be at least 0",
        ),
        ([SEGMENT | {"alignment": {"phone": "abc"}}], r"not a Lhotse cut"),
        ([SEGMENT | {"alignment": {"phone": [[]]}}], r"not a Lhotse cut"),
        ("abc", r"not a Lhotse cut"),
        (None, r"not a Lhotse cut"),
    ],
)
def test_a_field_of_a_lhotse_cut_of_another_type_is_refused_with_its_line(tmp_path, segments, message):
    cut = lhotse_cuts(audio(tmp_path, 1))[0].to_dict() | {"supervisions": segments}
    (tmp_path / "cuts.jsonl").write_text(f"\n{json.dumps(cut)}\n")
    with pytest.raises(ValueError, match=rf"cuts\.jsonl:2: ({message})"):
        ManifestCorpus(tmp_path / "cuts.jsonl").manifests(progress=False)


@pytest.mark.parametrize(("field", "value"), [("id", 3), ("id", " "), ("start", -1), ("duration", 0), ("duration", "1.0")])
def test_id_and_times_of_a_lhotse_cut_are_checked(tmp_path, field, value):
    cut = lhotse_cuts(audio(tmp_path, 1))[0].to_dict() | {field: value}
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut))
    with pytest.raises(ValueError, match=rf"cuts\.jsonl:1: .*{field}"):
        ManifestCorpus(tmp_path / "cuts.jsonl").manifests(progress=False)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sampling_rate", 0, r"recording\.sampling_rate must be a whole number above 0, found 0"),
        ("sampling_rate", "16000", r"recording\.sampling_rate must be a whole number above 0, found '16000'"),
        ("num_samples", None, r"recording\.num_samples must be a whole number above 0, found None"),
        ("duration", True, r"recording\.duration must be a number of seconds, found True"),
        ("sources", [], r"recording\.sources is empty"),
        ("sources", [{"type": "file", "channels": [0], "source": 7}], r"recording\.sources: source must be one path, found 7"),
        (
            "sources",
            [{"type": "file", "channels": [[0]], "source": "a"}],
            r"recording\.sources: channels must be a list of whole",
        ),
    ],
)
def test_a_recording_of_a_lhotse_cut_is_checked(tmp_path, field, value, message):
    cut = lhotse_cuts(audio(tmp_path, 1))[0]
    for entry in (cut.to_dict(), cut.append(cut).with_id("mixed").to_dict()):
        (entry if "recording" in entry else entry["tracks"][0]["cut"])["recording"][field] = value
        (tmp_path / "cuts.jsonl").write_text(json.dumps(entry))
        with pytest.raises(ValueError, match=rf"cuts\.jsonl:1: {message}"):
            ManifestCorpus(tmp_path / "cuts.jsonl").manifests(progress=False)


def test_a_lhotse_cut_without_a_recording_is_refused_with_its_line(tmp_path):
    cut = lhotse_cuts(audio(tmp_path, 1))[0].to_dict()
    del cut["recording"]
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut))
    with pytest.raises(ValueError, match=r"cuts\.jsonl:1: the cut has no recording: audio is needed, not features"):
        ManifestCorpus(tmp_path / "cuts.jsonl").manifests(progress=False)


def test_supervisions_are_joined_in_the_order_of_time_and_several_speakers_said(tmp_path, capsys):
    cuts = lhotse_cuts(audio(tmp_path, 3))
    for cut in cuts:
        cut.supervisions = [
            SupervisionSegment(f"{cut.id}b", cut.id, 0.5, 0.4, text="world", speaker="bob"),
            SupervisionSegment(f"{cut.id}c", cut.id, 0.5, 0.5, text=" "),
            SupervisionSegment(f"{cut.id}a", cut.id, 0.0, 0.4, text="hello", speaker="amy"),
        ]
    cuts[2].supervisions[0].speaker = "amy "
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    path = tmp_path / "cuts.jsonl"
    found = all_cuts(ManifestCorpus(path))
    assert CharacterLabels().words(found[0]) == ["HELLO", "WORLD"]
    assert UtteranceLabel("speaker").names(found[2]) == ["amy"]
    message = (
        r"utterance 0 has the labels 'amy' and 'bob' for 'speaker', .*CutSet\.trim_to_supervisions\(keep_overlapping=False\)"
    )
    with pytest.raises(ValueError, match=message):
        UtteranceLabel("speaker").names(found[0])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{path}: 2 of 3 cuts have several speakers, 0 first (amy, bob): their texts are joined")
    single = CutSet.from_cuts(found[:1]).trim_to_supervisions(keep_overlapping=False)  # as the message says
    assert sorted(UtteranceLabel("speaker").names(cut)[0] for cut in single if cut.supervisions[0].speaker) == ["amy", "bob"]


def test_a_gzip_file_that_ends_early_is_reported(tmp_path):
    rng = np.random.default_rng(0)
    lines = "".join(json.dumps({"audio_filepath": rng.bytes(30).hex()}) + "\n" for _ in range(200))
    path = tmp_path / "train.json.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-3000])
    with pytest.raises(ValueError, match=r"train\.json\.gz: unreadable after line \d+"):
        ManifestCorpus(path).manifests(progress=False)


def test_an_utterance_in_training_and_in_another_split_is_refused(tmp_path):
    audio(tmp_path, 3)
    train = nemo(tmp_path / "train.json", *({"audio_filepath": f"{n}.flac"} for n in range(3)))
    test = nemo(tmp_path / "test.json", {"audio_filepath": "2.flac"})
    with pytest.raises(ValueError, match=r"'2' is in both .*train\.json and .*test\.json"):
        ManifestCorpus(train, test=test).manifests(progress=False)


def test_missing_and_empty_manifests_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.train: there is no manifest"):
        ManifestCorpus(tmp_path / "none.json")
    (tmp_path / "empty.json").touch()
    with pytest.raises(ValueError, match=r"empty\.json has no utterance"):
        ManifestCorpus(tmp_path / "empty.json").manifests(progress=False)


def test_fields_that_are_no_labels_are_left_alone(tmp_path):
    others = [{"verified": True}, {"snr": 3.5}, {"verified": "yes", "snr": 3}, {"tags": ["a"]}, {"word": 1}]
    audio(tmp_path, len(others))
    entries = [{"audio_filepath": f"{number}.flac", "speaker": "amy", **other} for number, other in enumerate(others)]
    cuts = all_cuts(ManifestCorpus(nemo(tmp_path / "train.json", *entries)))
    assert sorted(map(str, (cut.supervisions[0].custom for cut in cuts))) == sorted(
        str({"speaker": "amy", **other}) for other in others
    )


# Sources that are no files


def command_cut(folder):
    """A cut whose audio is what a shell command prints."""
    (path,) = audio(folder / "audio", 1)
    cut = lhotse_cuts([path])[0].to_dict()
    cut["recording"]["sources"][0] |= {"type": "command", "source": f"touch {folder}/fired; cat {path}"}
    return cut


def planted(folder, where):
    """The line of a manifest with such a source in another place than usual."""
    bad, (path,) = command_cut(folder), audio(folder / "good", 1)
    good = lhotse_cuts([path])[0].to_dict()
    if where == "recording":
        return bad
    if where == "track":
        return {"id": "mixed", "type": "MixedCut", "tracks": [{"cut": good, "offset": 0.0}, {"cut": bad, "offset": 0.0}]}
    if where == "transform":
        good["recording"]["transforms"] = [{"name": "ReverbWithImpulseResponse", "kwargs": {"rir": bad["recording"]}}]
        return good
    return good | {"custom": {"target_recording": bad["recording"]}}


@pytest.mark.parametrize("where", ["recording", "track", "transform", "custom"])
def test_a_command_in_a_manifest_is_refused_wherever_it_stands(tmp_path, where):
    (tmp_path / "cuts.jsonl").write_text(json.dumps(planted(tmp_path, where)) + "\n")
    with pytest.raises(
        ValueError, match=r"cuts.jsonl:1: an audio source is of the kind 'command', which a shell would run: not "
    ):
        ManifestCorpus(tmp_path / "cuts.jsonl").manifests(progress=False)
    assert not (tmp_path / "fired").exists()


def test_a_command_that_was_asked_for_is_run(tmp_path):
    lines = [command_cut(tmp_path)] + [cut.to_dict() for cut in lhotse_cuts(audio(tmp_path / "more", 5)[1:])]
    (tmp_path / "cuts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = ManifestCorpus(tmp_path / "cuts.jsonl", sources=["file", "command"])
    found = prepared_audio(corpus.manifests(progress=False), tmp_path / "prepared")
    np.testing.assert_allclose(found["0"], samples_of(0), atol=1e-4)
    assert (tmp_path / "fired").exists()
    with pytest.raises(ValueError, match=r"data\.sources: no kind 'shell'"):
        ManifestCorpus(tmp_path / "cuts.jsonl", sources=["shell"])


def test_a_prepared_folder_runs_no_commands(tmp_path):
    from lhotse.serialization import deserialize_item

    from audiot.data.batches import Piece

    with pytest.raises(ValueError, match="the cut 0 has a source of the kind 'command'"):
        Piece.of(deserialize_item(command_cut(tmp_path)))
    assert not (tmp_path / "fired").exists()
