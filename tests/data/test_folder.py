from __future__ import annotations

import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiot.data.corpora.folder import FolderCorpus, PathPattern, SplitExpression
from audiot.data.corpora.held_out import hold_out
from audiot.data.manifests import Manifests
from audiot.data.prepare import BadAudioError, prepare


def fill(root: Path, *names: str, channels: int = 1) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = np.random.default_rng(number).uniform(-0.5, 0.5, (4000, channels))
        soundfile.write(path, samples, 8000)
    return root


def ids(manifests: Manifests) -> dict[str, list[str]]:
    return {split: [cut.id for cut in cuts] for split, cuts in manifests.splits.items()}


def reasons(manifests: Manifests) -> dict[str, str]:
    return {Path(path).name: reason for path, reason in manifests.rejected}


def takes(text: str, **labels: str) -> bool:
    return SplitExpression("data.test", text, labels)(labels)


def test_the_spoken_digits_are_labelled_split_and_prepared(tmp_path):
    if "AUDIOT_TEST_DATA" not in os.environ:
        pytest.skip("AUDIOT_TEST_DATA is not set")
    digits = Path(os.environ["AUDIOT_TEST_DATA"]) / "fsdd"
    root = tmp_path / "in"
    root.mkdir()
    names = [f"{digit}_jackson_{take}.wav" for digit in (0, 7) for take in (0, 4, 5, 6, 40)]
    for number, name in enumerate(names):
        (root / name).symlink_to(digits / name) if number % 2 else shutil.copy(digits / name, root / name)
    corpus = FolderCorpus(root, "{keyword}_{speaker}_{take}", test="take<5", valid="take>=40")
    prepared = prepare(corpus.manifests(progress=False), tmp_path / "out", num_jobs=1, progress=False)
    assert prepared.counts == {"train": 4, "valid": 2, "test": 4}
    for split, wanted in {"train": {"5", "6"}, "valid": {"40"}, "test": {"0", "4"}}.items():
        for cut in prepared.cuts(split):
            (supervision,) = cut.supervisions
            keyword, speaker, take = cut.id.split("_")
            assert take in wanted
            assert supervision.speaker == speaker == "jackson"
            assert supervision.custom == {"keyword": keyword, "speaker": speaker, "take": take}
            heard = cut.load_audio()[0]
            original = soundfile.read(digits / f"{cut.id}.wav")[0]
            assert len(heard) == 2 * len(original)
            assert np.corrcoef(heard[::2], original)[0, 1] > 0.99


def test_files_are_found_below_in_order_whatever_the_case_of_their_suffix(tmp_path):
    root = fill(tmp_path, "b/2.WAV", "b/10.flac", "a.Ogg", "b.wav", ".hidden.wav", ".cache/x.wav", "c/d/e.aiff")
    (root / "notes.txt").touch()
    manifests = FolderCorpus(root, train="path != ''", valid="path == 'a.Ogg'", test="path == 'b.wav'").manifests(False)
    assert ids(manifests) == {"train": ["b/10", "b/2", "c/d/e"], "valid": ["a"], "test": ["b"]}
    assert manifests.rejected == []


def test_links_that_lead_back_do_not_trap_the_search(tmp_path):
    root = fill(tmp_path / "in", *(f"a/{n}.wav" for n in range(3)))
    (root / "a" / "up").symlink_to(root)
    (root / "b").symlink_to(fill(tmp_path / "elsewhere", "x.wav"))
    assert sum(map(len, ids(FolderCorpus(root).manifests(False)).values())) == 4


def test_unicode_names_become_ids_and_names_that_are_no_text_are_rejected(tmp_path):
    root = fill(tmp_path / "in", "зал/Ünï\u202fcode 音.wav", "b.wav", "c.wav")
    shutil.copy(root / "b.wav", os.fsencode(root) + b"/caf\xe9.wav")
    manifests = FolderCorpus(root, "{name}").manifests(False)
    found = {cut.id: cut for cuts in manifests.splits.values() for cut in cuts}
    assert set(found) == {"зал/Ünï\u202fcode 音", "b", "c"}
    assert [reason for _, reason in manifests.rejected] == ["its name is not UTF-8: rename it"]
    prepared = prepare(manifests, tmp_path / "out", num_jobs=1, progress=False)
    assert prepared.rejected == 1
    assert "caf\\xe9.wav" in (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8")
    cuts = {cut.id: cut for split in prepared.counts for cut in prepared.cuts(split)}
    assert cuts["зал/Ünï\u202fcode 音"].supervisions[0].custom == {"name": "Ünï\u202fcode 音"}
    assert cuts["зал/Ünï\u202fcode 音"].load_audio().shape == (1, 8000)


def test_two_files_that_differ_in_suffix_only_are_refused(tmp_path):
    root = fill(tmp_path, "x/a.wav", "x/a.flac", "x/b.wav")
    with pytest.raises(ValueError, match=r"a\.wav and .*a\.flac differ in their suffix only"):
        FolderCorpus(root).manifests(False)
    fill(tmp_path, "c.wav", "d.wav")
    manifests = FolderCorpus(root, extensions=[".WAV"]).manifests(False)
    assert sorted(chain(*ids(manifests).values())) == ["c", "d", "x/a", "x/b"]


def test_files_that_cannot_be_used_are_rejected_and_the_rest_goes_on(tmp_path):
    root = fill(tmp_path, "a_1.wav", "a_2.wav", "a_3.wav", "odd.wav", "a_b_4.wav")
    (root / "a_5.wav").write_bytes(b"garbage")
    (root / "a_6.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    (root / "a_7.wav").touch()
    manifests = FolderCorpus(root, "{speaker}_{take}").manifests(False)
    assert {name: reason.split(":")[0] for name, reason in reasons(manifests).items()} == {
        "odd.wav": "does not match data.pattern",
        "a_b_4.wav": "matches data.pattern in more than one way",
        "a_5.wav": "unreadable",
        "a_6.m4a": "unreadable",
        "a_7.wav": "empty",
    }
    assert sorted(chain(*ids(manifests).values())) == ["a_1", "a_2", "a_3"]


@pytest.mark.parametrize("suffix", ["wav", "ogg", "aiff", "au", "w64"])
def test_a_file_that_was_cut_off_is_seen_though_its_header_still_opens(tmp_path, suffix):
    root = fill(tmp_path, "a.wav", "b.wav", "c.wav")
    long = np.random.default_rng(0).uniform(-0.5, 0.5, 48000)
    soundfile.write(root / f"long.{suffix}", long, 16000)
    content = (root / f"long.{suffix}").read_bytes()
    (root / f"long.{suffix}").write_bytes(content[: len(content) * 3 // 4])
    found = reasons(FolderCorpus(root).manifests(False))
    assert {name: reason.split(":")[0] for name, reason in found.items()} == {f"long.{suffix}": "truncated"}


def test_nothing_but_bad_files_is_reported_by_preparation(tmp_path):
    root = fill(tmp_path / "in", "a.wav", "b.wav")
    with pytest.raises(ValueError, match=r"does not match data\.pattern \(2 of 2\)"):
        prepare(FolderCorpus(root, "{speaker}_{take}").manifests(False), tmp_path / "out", num_jobs=1, progress=False)


@pytest.mark.parametrize(
    ("pattern", "path", "fields"),
    [
        ("{keyword}_{speaker}_{take}", "any/where/7_theo_12", {"keyword": "7", "speaker": "theo", "take": "12"}),
        (
            "{speaker}/{chapter}/{utterance}",
            "19/198/19-198-0001",
            {"speaker": "19", "chapter": "198", "utterance": "19-198-0001"},
        ),
        ("rec.{take}(x)", "rec.5(x)", {"take": "5"}),
        ("{{{take}}}", "{5}", {"take": "5"}),
        ("{speaker}", "a_b-c", {"speaker": "a_b-c"}),
    ],
)
def test_a_pattern_gives_the_fields_of_a_path(pattern, path, fields):
    assert PathPattern(pattern).match(path) == fields


@pytest.mark.parametrize(
    ("pattern", "path"),
    [("{a}_{b}", "x"), ("{a}_{b}", "x_y_z"), ("{a}/{b}", "x/y/z"), ("rec.{take}", "recX5"), ("{a}_{b}", "x_")],
)
def test_a_path_that_does_not_fit_a_pattern_is_bad_audio(pattern, path):
    with pytest.raises(BadAudioError, match=r"data\.pattern"):
        PathPattern(pattern).match(path)


@pytest.mark.parametrize("pattern", ["{a}{b}", "{a}_{a}", "nothing", "{}", "{a", "{a!r}", "{a:3}", "{a.b}", "{path}"])
def test_a_pattern_without_meaning_is_refused(pattern):
    with pytest.raises(ValueError, match=r"data\.pattern"):
        PathPattern(pattern)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("take<5", False),
        ("take < 13", True),  # as text, '12' < '13' and '12' < '5'
        ("take == 12", True),
        ("take == 12.0", True),
        ("take == '12'", True),
        ("take == '012'", False),
        ("take > '5'", True),
        ("take == 5 or speaker=='theo'", True),
        ("take == 12 and speaker!='theo'", False),
        ("not take == 12", False),
        ("10 <= take < 12", False),
        ("10 <= take <= 12", True),
        ("speaker in ('theo', 'lucas')", True),
        ("speaker not in ['theo']", False),
        ("take in (11, 12)", True),
        ("gain == -1.5", True),
        ("gain < -1", True),
        ("speaker == 5", False),
        ("speaker != 5", True),
        ("speaker < 'u'", True),
        ("take > gain", True),
    ],
)
def test_expressions_mean_what_they_say(text, expected):
    assert takes(text, take="12", speaker="theo", gain="-1.5") is expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__ == 1",
        "take.__class__ == 1",
        "take == (lambda: 1)()",
        "[x for x in (1, 2)] == 1",
        "take == f'{take}'",
        "take == 2 ** 10 ** 10",
        "take == open('x')",
        "(take := 5) == 5",
        "take in take",
        "take in range(5)",
        "take[0] == '1'",
        "take is 5",
        "take == None",
        "take == True",
        "take == b'1'",
        "take",
        "5",
        "'theo'",
        "take = 5",
        "take == 5; take == 6",
        "take <",
        "",
        "take == 5 if take else 6",
        "take == -speaker",
        "(" * 3000,
        "not " * 400 + "take",
        "take == 5\0",
    ],
)
def test_anything_but_comparisons_of_labels_is_refused(text):
    with pytest.raises(ValueError, match=r"^data\.test: .* is not a condition on labels"):
        takes(text, take="12", speaker="theo")


def test_an_unknown_field_is_answered_with_the_nearest(tmp_path):
    root = fill(tmp_path, "a_1.wav", "b_2.wav")
    with pytest.raises(ValueError, match="unknown field speeker: did you mean speaker"):
        FolderCorpus(root, "{speaker}_{take}", test="speeker=='a'")
    with pytest.raises(ValueError, match=r"data\.valid.*unknown field a: .*The fields are path, speaker, take"):
        FolderCorpus(root, "{speaker}_{take}", valid="speaker==a")


def test_a_label_that_is_no_number_is_not_ordered_among_numbers(tmp_path):
    root = fill(tmp_path, "a_1.wav", "a_two.wav")
    with pytest.raises(ValueError, match=r"'two' \(of a_two\.wav\) is not a number"):
        FolderCorpus(root, "{speaker}_{take}", test="take<5").manifests(False)


def test_test_takes_first_then_valid_then_train(tmp_path, capsys):
    root = fill(tmp_path, *(f"a_{take}.wav" for take in range(10)))
    manifests = FolderCorpus(root, "{s}_{take}", train="take<8", valid="take<4", test="take<2").manifests(False)
    assert ids(manifests) == {"train": ["a_4", "a_5", "a_6", "a_7"], "valid": ["a_2", "a_3"], "test": ["a_0", "a_1"]}
    assert "2 of 10 utterances are in no split" in capsys.readouterr().out


@pytest.mark.parametrize(("role", "text"), [("test", "take>50"), ("valid", "take>50"), ("train", "take>50"), ("test", "take>=0")])
def test_a_split_without_utterances_is_refused(tmp_path, role, text):
    root = fill(tmp_path, *(f"a_{take}.wav" for take in range(4)))
    with pytest.raises(ValueError, match=r"is left for (test|valid|train)"):
        FolderCorpus(root, "{s}_{take}", **{role: text}).manifests(False)


def test_held_out_utterances_are_a_function_of_seed_and_id_alone(tmp_path):
    names = [f"{n:03}" for n in range(100)]
    split = hold_out(names, 0.05, 0, ["valid", "test"])
    backwards = hold_out(names[::-1], 0.05, 0, ["valid", "test"])
    assert {role: len(part) for role, part in split.items()} == {"train": 90, "valid": 5, "test": 5}
    assert sorted(chain(*split.values())) == names
    assert {role: set(part) for role, part in split.items()} == {role: set(part) for role, part in backwards.items()}
    assert hold_out(names, 0.05, 1, ["valid", "test"]) != split
    assert len(hold_out(names[:3], 0.05, 0, ["valid", "test"])["train"]) == 1
    with pytest.raises(ValueError, match="2 utterances are too few"):
        hold_out(names[:2], 0.05, 0, ["valid", "test"])
    with pytest.raises(ValueError, match="valid_fraction"):
        hold_out(names, 0.5, 0, ["valid"])


def test_only_what_no_expression_names_is_held_out(tmp_path):
    root = fill(tmp_path, *(f"a_{take:02}.wav" for take in range(20)))
    found = ids(FolderCorpus(root, "{s}_{take}", test="take<5", valid_fraction=0.2).manifests(False))
    assert found["test"] == [f"a_{take:02}" for take in range(5)]
    assert (len(found["valid"]), len(found["train"])) == (3, 12)
    assert not set(found["valid"]) & set(found["train"])


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_labels_come_from_a_table(tmp_path, suffix, separator):
    root = fill(tmp_path / "in", "a/1.wav", "a/2.wav", "b.flac", "new.wav")
    rows = [
        "path,speaker,text,part",
        "a/1.wav,theo,one two,train",
        "./a/2.wav,lucas,,train",
        "b.flac,,x,test",
        "gone.wav,x,y,train",
    ]
    table = tmp_path / f"labels{suffix}"
    table.write_text("\ufeff" + "\n".join(rows).replace(",", separator), encoding="utf-8")
    manifests = FolderCorpus(root, labels=table, test="part=='test'", valid="speaker=='lucas'").manifests(False)
    assert ids(manifests) == {"train": ["a/1"], "valid": ["a/2"], "test": ["b"]}
    (supervision,) = next(iter(manifests.splits["train"])).supervisions
    assert (supervision.speaker, supervision.text) == ("theo", "one two")
    assert supervision.custom == {"speaker": "theo", "text": "one two", "part": "train"}
    assert next(iter(manifests.splits["test"])).supervisions[0].speaker is None
    assert reasons(manifests) == {"gone.wav": "missing: data.labels lists it", "new.wav": "not listed in data.labels"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,speaker\na.wav,x\n", r"labels.csv:1: no column path; found file, speaker \(the first row must name the columns"),
        ("path;speaker\na.wav;x\n", r"labels.csv:1: no column path; found path;speaker .*, with ',' between them"),
        ("", "labels.csv: no column path; found nothing, the file is empty"),
        ("path,speaker\n ,x\n", "labels.csv:2: nothing in column path"),
        ("path,speaker\na.wav,x\na.wav,y\n", r"labels.csv:3: the path a.wav occurs a second time"),
        ("path,speaker\na.wav,x,y\n", r"labels.csv:2: expected 2 values"),
        ("path,speaker\na.wav\n", r"labels.csv:2: expected 2 values"),
    ],
)
def test_a_table_that_is_not_as_described_is_refused(tmp_path, content, message):
    root = fill(tmp_path, "a.wav")
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        FolderCorpus(root, labels=tmp_path / "labels.csv")


def test_blank_cells_are_no_labels_and_blanks_around_labels_none_of_them(tmp_path):
    root = fill(tmp_path, *(f"{number}.wav" for number in range(4)))
    table = tmp_path / "labels.csv"
    lines = ["path,keyword,speaker,text,part", "0.wav,08 ,amy, one ,", "1.wav,08,,,", "2.wav, ,,,x", "3.wav,é,,,y", ",,,,"]
    table.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    manifests = FolderCorpus(root, labels=table, train="part==''", valid="part=='x'", test="part=='y'").manifests(False)
    segments = {cut.id: cut.supervisions[0] for cuts in manifests.splits.values() for cut in cuts}
    assert {name: segment.custom for name, segment in segments.items()} == {
        "0": {"keyword": "08", "speaker": "amy", "text": "one"},
        "1": {"keyword": "08"},
        "2": {"part": "x"},
        "3": {"keyword": "é", "part": "y"},
    }
    assert [(segments[name].speaker, segments[name].text) for name in "012"] == [("amy", "one"), (None, None), (None, None)]


def test_pattern_and_table_may_not_name_the_same_label(tmp_path):
    root = fill(tmp_path, "a.wav")
    (tmp_path / "labels.csv").write_text("path,speaker\na.wav,x\n")
    with pytest.raises(ValueError, match=r"speaker is a field of data\.pattern and a column of data\.labels"):
        FolderCorpus(root, "{speaker}", labels=tmp_path / "labels.csv")


def test_channels_of_stereo_are_left_to_average_or_one_is_chosen(tmp_path):
    root = fill(tmp_path / "in", "a.wav", "b.wav", "c.flac", channels=2)
    original = soundfile.read(root / "a.wav")[0]
    for channel, expected in [("average", original.mean(axis=1)), (1, original[:, 1])]:
        corpus = FolderCorpus(root, channel=channel, test="path=='a.wav'")
        prepared = prepare(corpus.manifests(False), tmp_path / str(channel), sample_rate=8000, num_jobs=1, progress=False)
        heard = next(iter(prepared.cuts("test"))).load_audio()[0]
        assert np.abs(heard - expected).max() < 1e-4
    manifests = FolderCorpus(root, channel=2).manifests(False)
    assert set(reasons(manifests).values()) == {"no channel 2: it has 0, 1"}


def test_a_folder_without_audio_or_no_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root"):
        FolderCorpus(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no audio files"):
        FolderCorpus(tmp_path).manifests(False)
    with pytest.raises(FileNotFoundError, match=r"data\.labels"):
        FolderCorpus(tmp_path, labels=tmp_path / "labels.csv")


def test_blanks_around_a_field_of_a_path_are_no_part_of_it(tmp_path):
    fill(tmp_path, *(f"{speaker} _{take}.wav" for speaker in "ab" for take in range(3)))
    manifests = FolderCorpus(tmp_path, "{speaker}_{take}", train="speaker=='a'", valid="speaker=='b' and take<1", test="take==1")
    assert ids(manifests.manifests(False)) == {"train": ["a _0", "a _2"], "valid": ["b _0"], "test": ["a _1", "b _1"]}


def test_the_table_is_read_when_the_manifests_are(tmp_path):
    root = fill(tmp_path / "in", *(f"{take}.wav" for take in range(4)))
    table = tmp_path / "labels.csv"
    for word in ("old", "new"):
        table.write_text("path,word\n" + "".join(f"{take}.wav,{word}\n" for take in range(4)))
        if word == "old":
            corpus = FolderCorpus(root, labels=table)
    cuts = corpus.manifests(False).splits["train"]
    assert {cut.supervisions[0].custom["word"] for cut in cuts} == {"new"}


def test_a_label_that_is_needed_rejects_files_without_it_and_divides_the_others(tmp_path):
    names = [f"{number}.wav" for number in range(12)]
    fill(tmp_path, *names)
    values = ["", *["b"] * 4, *["a"] * 7]
    table = "".join(f"{name},{value}\n" for name, value in zip(names, values, strict=True))
    (tmp_path / "labels.csv").write_text(f"path,sound\n{table}")
    manifests = FolderCorpus(tmp_path, labels=tmp_path / "labels.csv", label="sound").manifests(progress=False)
    assert reasons(manifests) == {"0.wav": "without a label: nothing in sound"}
    for role, counts in {"train": {"a": 5, "b": 2}, "valid": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}.items():
        found = [values[int(name)] for name in ids(manifests)[role]]
        assert {value: found.count(value) for value in found} == counts
    with pytest.raises(ValueError, match=r"no label 'noise' in data.labels or data.pattern: there are sound"):
        FolderCorpus(tmp_path, labels=tmp_path / "labels.csv", label="noise")


def test_speakers_need_not_be_held_out(tmp_path):
    speakers = "abcdef"
    fill(tmp_path, *(f"{speaker}_{take}.wav" for speaker in speakers for take in range(5)))
    for by_speaker in (True, False):
        found = FolderCorpus(tmp_path, pattern="{speaker}_{take}", by_speaker=by_speaker, valid_fraction=0.2).manifests(False)
        tested, trained = ({name[0] for name in ids(found)[role]} for role in ("test", "train"))
        assert (not tested & trained) == by_speaker
