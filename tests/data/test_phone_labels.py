from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

from audiot.data.corpora.phone_labels import aligned, phone_symbol, read_phone_labels, read_textgrid
from audiot.data.labels import FrameLabels
from audiot.features import KaldiFbank

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.5
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.5
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = ""
        intervals [2]:
            xmin = 0.25
            xmax = 1.2
            text = "a ""b"" c"
        intervals [3]:
            xmin = 1.2
            xmax = 1.5
            text = ""
    item [2]:
        class = "TextTier"
        name = "clicks"
        xmin = 0
        xmax = 1.5
        points: size = 1
        points [1]:
            number = 0.7
            mark = "click"
    item [3]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1.5
        intervals: size = 4
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = "sil"
        intervals [2]:
            xmin = 0.25
            xmax = 0.9
            text = "AH0"
        intervals [3]:
            xmin = 0.9
            xmax = 1.2
            text = "B"
        intervals [4]:
            xmin = 1.2
            xmax = 1.5
            text = ""
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
1.5
<exists>
3
"IntervalTier"
"words"
0
1.5
3
0
0.25
""
0.25
1.2
"a ""b"" c"
1.2
1.5
""
"TextTier"
"clicks"
0
1.5
1
0.7
"click"
"IntervalTier"
"phones" ! as Praat lets one comment, "so"
0
1.5
4
0 0.25 "sil"
0.25 0.9 "AH0"
0.9 1.2 "B"
1.2 1.5 ""
"""
WORDS = [(0, 0.25, ""), (0.25, 1.2, 'a "b" c'), (1.2, 1.5, "")]
LAST = "xmin = 1.2\n            xmax = 1.5"
PHONES = [(0, 0.25, "sil"), (0.25, 0.9, "AH0"), (0.9, 1.2, "B"), (1.2, 1.5, "")]


def cut(num_samples, name="84-1-0000"):
    duration = num_samples / 16000
    recording = Recording(name, [AudioSource("file", [0], "none.flac")], 16000, num_samples, duration)
    supervision = SupervisionSegment(name, name, 0.0, duration)
    return MonoCut(name, 0.0, duration, 0, supervisions=[supervision], recording=recording)


def items(cuts, path, tier="phone", **options):
    """Tier of the first cut: symbol, start, end of each interval."""
    tiers = read_phone_labels(path, cuts, **options)
    return [(item.symbol, item.start, item.end) for item in aligned(cuts[0], tiers).supervisions[0].alignment[tier]]


def write(tmp_path, content, name="84-1-0000.TextGrid"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return tmp_path


# One integer a frame


@pytest.mark.parametrize("difference", [-5, -1, 0, 1, 5])
def test_frame_t_gets_label_t(tmp_path, difference):
    features = KaldiFbank()
    generator = torch.Generator().manual_seed(difference + 5)
    index = {str(label): label for label in range(41)}
    cuts, written = [], {}
    for number in range(12):  # lengths with every kind of remainder
        num_samples = 3200 + 1607 * number + number
        name = f"84-1-{number:04d}"
        frames = features(torch.randn(1, num_samples, generator=generator))[0].shape[1]
        assert frames == 1 + (num_samples - 400) // 160
        written[name] = torch.randint(41, (frames + difference,), generator=generator).tolist()
        cuts.append(cut(num_samples, name))
    path = tmp_path / "converted_aligned_phones.txt"
    path.write_text("".join(f"{name} {' '.join(map(str, labels))}\n" for name, labels in written.items()))
    tiers = read_phone_labels(path, cuts)
    for one in cuts:
        labels = FrameLabels("phone", features)
        labelled = aligned(one, tiers)
        labels.check(labelled)
        expected = written[one.id]
        frames = features.num_frames(one.num_samples)
        # Frames behind the last label have that; labels behind the last frame have none.
        assert labels.encode(labelled, index).tolist() == (expected + [expected[-1]] * 5)[:frames]


def test_a_label_covers_the_ten_milliseconds_around_its_frame(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("84-1-0000 7 7 40 3\n")
    assert items([cut(400 + 3 * 160 + 80)], path) == [("7", 0.0, 0.0275), ("40", 0.0275, 0.0375), ("3", 0.0375, 0.06)]


def test_labels_behind_the_last_frame_and_frames_behind_the_last_label_end_with_the_audio(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("84-1-0000 1 2 3 4 5 6 7 8\n84-1-0001 1 2\n")
    cuts = [cut(400 + 3 * 160), cut(400 + 3 * 160, "84-1-0001")]
    assert [(symbol, end) for symbol, _, end in items(cuts, path)] == [("1", 0.0175), ("2", 0.0275), ("3", 0.0375), ("4", 0.055)]
    assert items(cuts[1:], path) == [("1", 0.0, 0.0175), ("2", 0.0175, 0.055)]


def test_cuts_without_labels_stay_as_they_are_and_other_lines_are_passed_over(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("84-1-0009 these are none\n\n84-1-0001 1 1\n")
    cuts = [cut(560), cut(560, "84-1-0001")]
    tiers = read_phone_labels(path, cuts)
    assert set(tiers) == {"84-1-0001"}
    assert aligned(cuts[0], tiers) is cuts[0]
    aligned(cuts[1], tiers)
    assert cuts[1].supervisions[0].alignment is None  # a copy got it


@pytest.mark.parametrize("count", [94, 105, 0])  # of 99 frames
def test_more_than_five_labels_too_many_or_too_few_are_refused(tmp_path, count):
    path = tmp_path / "labels.txt"
    path.write_text(f"84-1-0000 {'3 ' * (count - (count == 94))}\n")
    expected = rf"labels\.txt:1: utterance 84-1-0000 has {count - (count == 94)} labels and 99 frames of 10 ms \(16,080 samples"
    with pytest.raises(ValueError, match=expected):
        read_phone_labels(path, [cut(16080)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("84-1-0000 3 x 4", r"expected UTTERANCE and one integer phone per frame, found 'x'"),
        ("84-1-0000 3 -1 4", r"expected UTTERANCE and one integer phone per frame, found '-1'"),
        ("84-1-0000 3 1.5 4", r"expected UTTERANCE and one integer phone per frame, found '1\.5'"),
        ("84-1-0001 3 3 3", r"utterance 84-1-0001 occurs a second time"),
    ],
)
def test_a_broken_line_of_frame_labels_is_refused_by_its_number(tmp_path, line, message):
    path = tmp_path / "labels.txt"
    path.write_text(f"84-1-0001 1 2 3\n{line}\n")
    with pytest.raises(ValueError, match=rf"labels\.txt:2: {message}"):
        read_phone_labels(path, [cut(720), cut(720, "84-1-0001")])


def test_labels_that_are_not_there_say_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no phone labels at .*none\.txt: expected a file of lines UTTERANCE PHONE"):
        read_phone_labels(tmp_path / "none.txt", [])


def test_integers_have_no_stress_to_strip(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("84-1-0000 1\n")
    with pytest.raises(ValueError, match=r"data\.strip_stress is for TextGrids, but .*labels\.txt has one integer per frame"):
        read_phone_labels(path, [cut(400)], strip_stress=True)


# TextGrids


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("content", [LONG, SHORT], ids=["long", "short"])
def test_both_formats_in_every_encoding_give_the_same_intervals(tmp_path, content, encoding):
    path = tmp_path / "84-1-0000.TextGrid"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""  # Praat writes it
    path.write_bytes((mark + content.replace("B", "É")).encode(encoding))
    grid = read_textgrid(path)
    assert grid.end == 1.5
    assert grid.tiers == {"words": WORDS, "phones": [(start, end, text.replace("B", "É")) for start, end, text in PHONES]}


def test_a_textgrid_may_have_no_tiers_for_praat(tmp_path):
    write(tmp_path, 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1\n<absent>\n')
    assert read_textgrid(tmp_path / "84-1-0000.TextGrid") == (1.0, {})


@pytest.mark.parametrize("content", [LONG, SHORT, LONG.replace('"words"', '"84 - words"').replace('"phones"', '"84 - phones"')])
def test_phones_and_words_become_tiers(tmp_path, content):
    write(tmp_path, content, "dev-clean/84/1/84-1-0000.TextGrid")
    write(tmp_path, "not asked for", "dev-clean/84/1/84-1-0001.TextGrid")
    expected = [("SIL", 0.0, 0.25), ("AH0", 0.25, 0.9), ("B", 0.9, 1.2), ("SIL", 1.2, 1.5)]
    assert items([cut(24000)], tmp_path) == expected
    expected[1] = ("AH", 0.25, 0.9)
    assert items([cut(24000)], tmp_path, strip_stress=True) == expected
    assert items([cut(24000)], tmp_path, "word") == [("SIL", 0.0, 0.25), ('a "b" c', 0.25, 1.2), ("SIL", 1.2, 1.5)]


def test_arpabet_has_72_classes_and_41_without_stress():
    vowels = ["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"]
    consonants = ["CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH", *"BDFGKLMNPRSTVWYZ"]
    written = [f"{vowel}{stress}" for vowel in vowels for stress in "012"] + consonants + ["sil", "sp", "spn", "", " "]
    assert len({phone_symbol(text) for text in written}) == 72
    assert {phone_symbol(text, strip_stress=True) for text in written} == {*vowels, *consonants, "SIL", "SPN"}
    assert len({*vowels, *consonants, "SIL", "SPN"}) == 41


def test_time_without_an_interval_is_silence(tmp_path):
    write(tmp_path, LONG.replace("xmax = 0.9", "xmax = 0.8").replace(LAST, LAST.replace("1.5", "1.46")))
    found = items([cut(24000)], tmp_path)
    assert found == [("SIL", 0.0, 0.25), ("AH0", 0.25, 0.8), ("SIL", 0.8, 0.9), ("B", 0.9, 1.2), ("SIL", 1.2, 1.5)]
    one = aligned(cut(24000), read_phone_labels(tmp_path, [cut(24000)]))
    labels = FrameLabels("phone", KaldiFbank()).encode(one, {"SIL": 0, "AH0": 1, "B": 2})
    assert labels.tolist() == [
        next({"SIL": 0, "AH0": 1, "B": 2}[phone] for phone, _, end in found if center < end)
        for center in ((160 * t + 200) / 16000 for t in range(148))
    ]


def test_a_textgrid_may_begin_late_and_a_tier_end_early(tmp_path):
    """TextGrids as Praat extracts them with times preserved, and tiers that end with the last word."""
    late = LONG.replace("xmin = 0\n", "xmin = 0.2\n").replace(LAST, LAST.replace("1.5", "1.3"))
    write(tmp_path, late.replace('text = "sil"', 'text = "B"').replace('text = ""', 'text = "AH0"'))
    phones = [("SIL", 0.0, 0.2), ("B", 0.2, 0.25), ("AH0", 0.25, 0.9), ("B", 0.9, 1.2), ("AH0", 1.2, 1.3), ("SIL", 1.3, 1.5)]
    assert items([cut(24000)], tmp_path) == [(symbol, start, pytest.approx(end)) for symbol, start, end in phones]
    one = aligned(cut(24000), read_phone_labels(tmp_path, [cut(24000)]))
    FrameLabels("phone", KaldiFbank()).check(one)


@pytest.mark.parametrize("off", [-0.049, 0.049])
def test_a_textgrid_may_end_beside_the_audio_by_50_ms(tmp_path, off):
    write(tmp_path, LONG)
    num_samples = round((1.5 + off) * 16000)
    found = items([cut(num_samples)], tmp_path)
    assert found[-1] == ("SIL", 1.2, pytest.approx(1.5 + off))
    FrameLabels("phone", KaldiFbank()).check(aligned(cut(num_samples), read_phone_labels(tmp_path, [cut(num_samples)])))


@pytest.mark.parametrize("off", [-0.051, 0.051, 3.0])
def test_the_textgrid_of_another_file_is_refused_by_name(tmp_path, off):
    write(tmp_path, LONG)
    expected = rf"84-1-0000\.TextGrid ends at 1\.500 s, the audio of 84-1-0000 at {1.5 + off:.3f} s, .*TextGrid of another file"
    with pytest.raises(ValueError, match=expected):
        read_phone_labels(tmp_path, [cut(round((1.5 + off) * 16000))])


def test_intervals_behind_the_audio_are_those_of_another_file(tmp_path):
    write(tmp_path, LONG.replace(LAST, LAST.replace("1.5", "1.9")))
    with pytest.raises(ValueError, match=r"84-1-0000\.TextGrid ends at 1\.900 s, the audio of 84-1-0000 at 1\.500 s"):
        read_phone_labels(tmp_path, [cut(24000)])


# What is replaced, by what, the line that is blamed and for what.
BROKEN = {
    "cut off between intervals": (
        LONG[LONG.index("        intervals [3]:\n            xmin = 0.9") :],
        "",
        50,
        "where the start of",
    ),
    "cut off in a text": (LONG[LONG.index('H0"') :], "", 49, "the text in quotes that begins here does not end"),
    "cut off in the header": (LONG[LONG.index("xmax") :], "", 5, "the file ends where the end is expected"),
    "empty": (LONG, "", 1, "the file ends where ooTextFile is expected"),
    "another file": ('"TextGrid"', '"PitchTier"', 2, "expected a TextGrid in text format, found 'ooTextFile PitchTier'"),
    "a text for a number": ("xmax = 0.9", 'xmax = "0.9"', 48, "expected the end of an interval, a number, found '0.9'"),
    "a flag for a number": ("xmax = 0.9", "xmax = <none>", 48, "expected the end of an interval, a number, found '<none>'"),
    "a word for a number": ("xmax = 0.9", "xmax = 0.9s", 49, "expected the end of an interval, a number, found 'AH0'"),
    "a number for a text": ('"AH0"', "0.5", 49, "expected the text of an interval, a text in quotes, found '0.5'"),
    "too few intervals": ("size = 4", "size = 3", 55, "expected the end of the file, found '1.2'"),
    "too many intervals": ("size = 4", "size = 5", 58, "the file ends where the start of an interval is expected"),
    "infinity": ("xmax = 1.5", "xmax = 1e999", 5, "expected the end, a number, found 1e999, which is too large"),
    "infinitely many": ("size = 4", "size = 1e999", 41, "expected the number of intervals, a number, found 1e999"),
    "half an interval": ("size = 4", "size = 4.5", 41, "expected the number of intervals, found 4.5"),
    "overlap": ("xmin = 0.9", "xmin = 0.85", 52, "interval 3 of 'phones' begins at 0.85 s, the one before it ends at 0.9 s"),
    "backwards": ("xmax = 0.9", "xmax = 0.2", 48, "interval 2 of 'phones' goes from 0.25 to 0.2 s"),
    "no length": ("xmax = 0.9", "xmax = 0.25", 48, "interval 2 of 'phones' goes from 0.25 to 0.25 s"),
    "before the start": ("xmin = 0\n            xmax", "xmin = -1\n            xmax", 17, "interval 1 of 'words' begins at -1 s"),
    "unknown tier": ('"TextTier"', '"PointTier"', 28, "expected IntervalTier or TextTier, found 'PointTier'"),
    "two tiers of a name": ('"words"', '"phones"', 38, "there are two tiers 'phones'"),
    "neither exists nor absent": ("<exists>", "<maybe>", 6, "expected <exists> or <absent>, found '<maybe>'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_textgrid_is_refused_with_its_line(tmp_path, kind):
    old, new, line, message = BROKEN[kind]
    assert old in LONG
    write(tmp_path, LONG.replace(old, new))
    with pytest.raises(ValueError, match=rf"84-1-0000\.TextGrid:{line}: ") as error:
        read_phone_labels(tmp_path, [cut(24000)])
    assert message in str(error.value)


def test_a_textgrid_in_another_encoding_is_refused_by_name(tmp_path):
    (tmp_path / "84-1-0000.TextGrid").write_bytes(LONG.replace("B", "É").encode("latin-1"))
    with pytest.raises(ValueError, match=r"84-1-0000\.TextGrid:53: not UTF-8 \(byte 0xc9\): save the file as UTF-8"):
        read_phone_labels(tmp_path, [cut(24000)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LONG.replace('"phones"', '"segments"'), r"one tier 'phones' .* its tiers: 'words', 'segments'"),
        (LONG.replace('"phones"', '"84 - phones"').replace('"words"', '"61 - phones"'), r"one speaker; its tiers: '61 - ph"),
        (LONG[: LONG.index("size = 4")] + "size = 0\n", r"the tier 'phones' has no intervals"),
    ],
)
def test_a_textgrid_needs_the_phones_of_one_speaker(tmp_path, content, message):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=rf"84-1-0000\.TextGrid: .*{message}"):
        read_phone_labels(tmp_path, [cut(24000)])


def test_two_textgrids_of_an_utterance_are_refused(tmp_path):
    write(tmp_path, LONG, "a/84-1-0000.TextGrid")
    write(tmp_path, LONG, "b/84-1-0000.textgrid")
    with pytest.raises(ValueError, match=r"84-1-0000 has two TextGrids, .*a/84-1-0000\.TextGrid and .*b/84-1-0000\.textgrid"):
        read_phone_labels(tmp_path, [cut(24000)])


def test_intervals_follow_each_other(tmp_path):
    write(tmp_path, LONG.replace("xmin = 0.9", "xmin = 0.8996"))  # rounded otherwise than the end before
    found = items([cut(24000)], tmp_path)
    assert all(end == pytest.approx(start, abs=1e-8) for (_, _, end), (_, start, _) in pairwise(found))
