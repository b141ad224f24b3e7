"""Labels of utterances and frames against slow loops, and the share of labelled utterances."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from audiot.data.batches import Crop, SpeechDataset
from audiot.data.datamodule import SpeechDataModule, open_cuts
from audiot.data.labels import (
    IGNORED,
    CharacterLabels,
    FrameLabels,
    PhoneSequence,
    SlotLabels,
    UtteranceLabel,
    read_lexicon,
    survey,
)
from audiot.features import LogMel


def made_up(items, name="cut", num_samples=8000, **supervision):
    """A cut of half a second with alignment items (symbol, begin, end) in samples."""
    alignment = {"phone": [AlignmentItem(symbol, begin / 16000, (end - begin) / 16000) for symbol, begin, end in items]}
    duration = num_samples / 16000
    segment = SupervisionSegment(name, name, 0.0, duration, alignment=alignment if items else None, **supervision)
    recording = Recording(name, [AudioSource("file", [0], "none.wav")], 16000, num_samples, duration)
    return MonoCut(name, 0.0, duration, 0, supervisions=[segment], recording=recording)


def by_loop(items, num_samples, index, begin=0):
    """Class of every 25 ms frame (one per 10 ms), from the sample in its middle. ``begin`` is the start of the cut."""
    classes = []
    for first in range(0, num_samples - 400 + 1, 160):
        label = IGNORED
        for symbol, start, end in items:
            if start <= begin + first + 200 < end:
                label = index[symbol]
        classes.append(label)
    return classes


INDEX = {"A": 0, "B": 1, "C": 2}
ITEMS = [("A", 0, 1000), ("B", 1000, 1960), ("A", 1960, 2100), ("C", 3000, 5130), ("B", 5130, 7000)]  # two gaps


def test_frame_labels_equal_a_loop_and_gaps_are_ignored():
    labels = FrameLabels("phone", LogMel()).encode(made_up(ITEMS), INDEX)
    expected = by_loop(ITEMS, 8000, INDEX)
    assert labels.tolist() == expected
    assert labels.dtype == torch.long
    assert {IGNORED, 0, 1, 2} == set(expected)


def test_frame_labels_do_not_depend_on_the_order_of_the_items():
    labels = FrameLabels("phone", LogMel())
    assert labels.encode(made_up(ITEMS[::-1]), INDEX).equal(labels.encode(made_up(ITEMS), INDEX))


def test_frame_labels_follow_the_front_end():
    features = LogMel(win_length=800, n_fft=1024, hop_length=320, stack=3)
    labels = FrameLabels("phone", features).encode(made_up(ITEMS), INDEX)
    assert len(labels) == (8000 - 800) // 320 + 1  # one a spectrogram frame, whatever the stacking
    for t, label in enumerate(labels.tolist()):
        found = [INDEX[symbol] for symbol, start, end in ITEMS if start <= 320 * t + 400 < end]
        assert label == (found[0] if found else IGNORED)


def test_frame_labels_of_a_crop_are_those_of_its_piece():
    rng = np.random.default_rng(0)
    for number in range(20):
        bounds = np.sort(rng.choice(np.arange(1, 16000), 12, replace=False)).tolist()
        items = [("ABC"[k % 3], begin, end) for k, (begin, end) in enumerate(pairwise(bounds)) if k != 5]
        crop = Crop(0.4, number, 0)(made_up(items, f"cut{number}", 16000))
        assert crop.num_samples == 6400
        labels = FrameLabels("phone", LogMel()).encode(crop, INDEX)
        assert labels.tolist() == by_loop(items, 6400, INDEX, begin=round(crop.start * 16000))


def test_phones_of_the_demo_corpus_equal_a_loop(demo_corpus):
    cuts = open_cuts(demo_corpus.directory, "valid")
    labels = FrameLabels("phone", LogMel())
    index = {name: number for number, name in enumerate(survey({"train": cuts}, labels))}
    for cut in cuts:
        items = [
            (item.symbol, round(item.start * 16000), round(item.end * 16000)) for item in cut.supervisions[0].alignment["phone"]
        ]
        expected = by_loop(items, cut.num_samples, index)
        assert labels.encode(cut, index).tolist() == expected
        assert IGNORED not in expected


def test_utterance_labels_are_the_speaker_or_a_custom_field():
    cut = made_up([], speaker="anna", custom={"keyword": "stop", "take": 3})
    assert UtteranceLabel("speaker").names(cut) == ["anna"]
    assert UtteranceLabel("keyword").names(cut) == ["stop"]
    assert UtteranceLabel("take").names(cut) == ["3"]
    assert UtteranceLabel("speaker").encode(cut, {"bert": 0, "anna": 1}).equal(torch.tensor(1))


def test_a_missing_label_names_the_utterance_and_what_there_is():
    cut = made_up([], name="utt7", custom={"keyword": "stop"})
    with pytest.raises(ValueError, match=r"utterance utt7 has no label 'speaker' \(its labels: keyword, speaker\)"):
        UtteranceLabel("speaker").names(cut)
    with pytest.raises(ValueError, match=r"utterance utt7 has no label 'accent'"):
        UtteranceLabel("accent").names(cut)
    cut.supervisions = []
    with pytest.raises(ValueError, match=r"utterance utt7 has no label 'speaker' \(its labels: none, it has no supervision\)"):
        UtteranceLabel("speaker").names(cut)
    with pytest.raises(ValueError, match="utterance utt7 has no alignment tier 'phone'"):
        FrameLabels("phone", LogMel()).names(cut)


def test_an_alignment_may_miss_the_audio_by_the_tolerance_and_no_more():
    # Half a second of audio; begin and end of the alignment in samples.
    for begin, end, fits in [
        (0, 8000, True),
        (790, 8000, True),
        (810, 8000, False),
        (0, 7210, True),
        (0, 7190, False),
        (0, 8790, True),
        (0, 8810, False),
        (-790, 8000, True),
        (-8000, 8000, True),  # what lies before the audio labels nothing
    ]:
        cut = made_up([("A", begin, 3000), ("B", 3000, end)], "utt7")
        labels = FrameLabels("phone", LogMel(), tolerance_s=0.05)
        if fits:
            labels.check(cut)
        else:
            with pytest.raises(
                ValueError,
                match=rf"the phone alignment of utterance utt7 goes from {begin / 16000:.3f} to {end / 16000:.3f} s, its audio "
                r"from 0.000 to 0.500 s: the alignment of another file\? .* raise downstream.labels.tolerance_s=0.05",
            ):
                labels.check(cut)
            FrameLabels("phone", LogMel(), tolerance_s=None).check(cut)


def test_the_alignment_of_a_piece_is_compared_with_the_piece():
    cut = made_up([("A", 0, 8000), ("B", 8000, 16000)], "long", 16000)
    piece = cut.truncate(offset=0.3, duration=0.4, preserve_id=True)
    short = made_up([("A", 0, 4000), ("B", 4000, 8000)], "long", 16000).truncate(offset=0.3, duration=0.4, preserve_id=True)
    labels = FrameLabels("phone", LogMel(), tolerance_s=None)
    labels.check(piece)
    FrameLabels("phone", LogMel(), tolerance_s=0.25).check(short)
    with pytest.raises(ValueError, match=r"utterance long goes from 0.000 to 0.500 s, its audio from 0.300 to 0.700 s"):
        FrameLabels("phone", LogMel(), tolerance_s=0.15).check(short)


@pytest.mark.parametrize("blank", [None, "", "  "])
@pytest.mark.parametrize("field", ["speaker", "keyword"])
def test_a_blank_label_is_missing_like_null_and_never_a_class(blank, field):
    def labelled(name, value):
        return made_up([], name, **({"speaker": value} if field == "speaker" else {"custom": {field: value}}))

    cuts = [labelled("one", "08"), labelled("two", "08 "), labelled("three", 8)]
    assert survey({"train": cuts}, UtteranceLabel(field)) == ["08", "8"]
    for role in ("train", "test"):
        with pytest.raises(ValueError, match=rf"utterance utt7 has no label '{field}'"):
            survey({"train": cuts} | {role: [labelled("utt7", blank)]}, UtteranceLabel(field))
    with pytest.raises(ValueError, match=rf"utterance utt7 has no label '{field}'"):
        SlotLabels([field]).names(labelled("utt7", blank))


@pytest.mark.parametrize("value", [True, 1.5, ["a"], {"a": 1}])
def test_a_label_that_is_neither_text_nor_a_whole_number_is_refused(value):
    cut = made_up([], "utt7", custom={"keyword": value})
    with pytest.raises(ValueError, match=r"label 'keyword' of utterance utt7 must be text or a whole number, found "):
        UtteranceLabel("keyword").names(cut)


def test_supervisions_that_differ_have_no_one_label():
    cut = made_up([], "utt7", speaker="bob", custom={"keyword": "yes", "action": "on"})
    first = SupervisionSegment("first", "utt7", -0.1, 0.3, speaker="amy", custom={"keyword": "yes "})
    cut.supervisions = [*cut.supervisions, first]
    assert UtteranceLabel("keyword").names(cut) == ["yes"]
    assert UtteranceLabel("action").names(cut) == ["on"]
    with pytest.raises(
        ValueError,
        match=r"utterance utt7 has the labels 'amy' and 'bob' for 'speaker', of different supervisions: make a cut of each with "
        r"Lhotse's CutSet\.trim_to_supervisions\(keep_overlapping=False\)",
    ):
        UtteranceLabel("speaker").names(cut)
    waveforms = SpeechDataset(None, UtteranceLabel("keyword"), {"yes": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("audiot.data.batches.load", lambda pieces: torch.zeros(1, 8000))
        assert waveforms[(0, 0), CutSet.from_cuts([cut])]["speakers"] == [None]


def test_a_blank_symbol_of_a_tier_is_a_silence():
    cut = made_up([("", 0, 4000), ("A", 4000, 8000)])
    assert survey({"train": [cut]}, FrameLabels("phone", LogMel())) == ["A", "SIL"]


# Slots


def test_slots_are_custom_fields_in_the_order_given():
    cut = made_up([], speaker="anna", custom={"action": "increase", "object": "heat", "location": "none"})
    labels = SlotLabels(["object", "action", "speaker"])
    assert labels.names(cut) == ["object=heat", "action=increase", "speaker=anna"]
    index = {"action=increase": 4, "object=heat": 7, "speaker=anna": 1, "object=music": 5}
    assert labels.encode(cut, index).tolist() == [7, 4, 1]
    assert labels.collate([labels.encode(cut, index)] * 2).tolist() == [[7, 4, 1]] * 2
    with pytest.raises(ValueError, match=r"utterance cut has no label 'place' \(its labels: action, location, object, speaker\)"):
        SlotLabels(["object", "place"]).names(cut)


@pytest.mark.parametrize("fields", [[], ["a", "a"], ["a=b"]])
def test_slots_need_different_names(fields):
    with pytest.raises(ValueError, match=r"downstream.labels.fields must be one or more different names without '='"):
        SlotLabels(fields)


# Characters


def spoken(text, name="utt7", num_samples=16000):
    return made_up([], name, num_samples, text=text)


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "Hello  World ", "HELLO WORLD"),
        ({"case": "lower"}, "Hello World", "hello world"),
        ({"case": None}, "Hello World", "Hello World"),
        ({"remove": ".,!"}, "Yes, no - maybe!", "YES NO - MAYBE"),
        ({"remove": "-", "case": None}, "Yes - no", "Yes no"),
        ({"case": "lower"}, "ÜBER dé", "über dé"),
    ],
)
def test_characters_of_a_transcript(options, text, expected):
    labels = CharacterLabels(LogMel(), **options)
    assert labels.names(spoken(text)) == list(expected)
    assert labels.words(spoken(text)) == expected.split()


def test_characters_are_encoded_and_padded():
    labels = CharacterLabels(LogMel())
    index = {" ": 0, "A": 1, "B": 2}
    rows = [labels.encode(spoken(text), index) for text in ("ab a", "b")]
    assert labels.collate(rows).tolist() == [[1, 2, 0, 1], [2, IGNORED, IGNORED, IGNORED]]


@pytest.mark.parametrize("text", [".,", " . "])
def test_a_transcript_of_punctuation_names_its_utterance(text):
    with pytest.raises(
        ValueError, match=rf"the transcript of utterance utt7 is empty \('{text.strip()}'\): correct it or leave the utterance"
    ):
        survey({"train": [spoken(text)]}, CharacterLabels(LogMel(), remove=".,"))


@pytest.mark.parametrize("text", [None, "", "  "])
def test_a_missing_transcript_names_its_utterance(text):
    with pytest.raises(ValueError, match="utterance utt7 has no transcript; choose another task or data"):
        CharacterLabels(LogMel()).names(spoken(text))


def test_texts_are_joined_in_the_order_of_time():
    cut = made_up([], "utt7", text="b")
    cut.supervisions += [
        SupervisionSegment(name, "utt7", start, duration, text=text)
        for name, start, duration, text in [
            ("e", 0.2, 0.3, " d "),
            ("d", 0.2, 0.2, "c"),
            ("n", -0.2, 1, ""),
            ("a", -0.1, 0.1, "a"),
        ]
    ]
    assert "".join(CharacterLabels().words(cut)) == "ABCD"


def test_a_text_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="the text of utterance utt7 must be text, found 7"):
        CharacterLabels().names(spoken(7))


def test_the_sign_between_words_is_no_character():
    with pytest.raises(ValueError, match=r"the transcript of utterance utt7 has '\|', which stands for the space between words"):
        survey({"train": [spoken("a|b")]}, CharacterLabels(LogMel()))
    assert CharacterLabels(remove="|").words(spoken("a|b | c")) == ["AB", "C"]
    with pytest.raises(ValueError, match=r"downstream\.labels\.alphabet has '\|', which stands for the space between words"):
        CharacterLabels(alphabet=" |AB")


@pytest.mark.parametrize("phone", ["|", "<blank>", "(none)", "a b"])
def test_a_phone_can_be_told_from_what_is_none(tmp_path, phone):
    with pytest.raises(ValueError, match=rf"utterance utt7 has the phone '{re.escape(phone)}': a phone must have no space"):
        survey({"train": [made_up([("A", 0, 100), (phone, 100, 8000)], "utt7")]}, PhoneSequence(LogMel()))
    (tmp_path / "lexicon.txt").write_text(f"\nYES Y\nNO N {phone}\n")
    if " " not in phone:
        with pytest.raises(ValueError, match=r"lexicon\.txt:3 has the phone "):
            read_lexicon(tmp_path / "lexicon.txt")


def test_an_unknown_case_is_refused():
    with pytest.raises(ValueError, match=r"downstream.labels.case must be upper, lower or null, found 'title'"):
        CharacterLabels(LogMel(), case="title")


def test_an_alphabet_gives_the_classes_and_refuses_other_characters():
    labels = CharacterLabels(LogMel(), alphabet="CBA A")
    assert survey({"train": [spoken("ab")], "test": [spoken("c", "two")]}, labels) == [" ", "A", "B", "C"]
    for role in ("train", "test"):
        cuts = {"train": [spoken("ab")]} | {role: [spoken("a bé?", "utt8")]}
        with pytest.raises(
            ValueError,
            match=rf"'\?' of utterance utt8 \({role} split\) is not in downstream.labels.alphabet: add it there, or to "
            "downstream.labels.remove",
        ):
            survey(cuts, labels)


def test_without_an_alphabet_the_classes_are_the_training_characters():
    labels = CharacterLabels(LogMel())
    assert survey({"valid": [spoken("ba", "two")], "train": [spoken("a b")]}, labels) == [" ", "A", "B"]
    with pytest.raises(ValueError, match=r"label 'C' of utterance two \(valid split\) does not occur in training"):
        survey({"valid": [spoken("abc", "two")], "train": [spoken("a b")]}, labels)


# Phones in their order


LEXICON = """YES Y EH1 S
YES Y AE S
NO\t0.98 0.3 1.0 N OW1
ne n 2 9

THE DH AH0
"""


@pytest.fixture
def lexicon(tmp_path):
    (tmp_path / "lexicon.txt").write_text(LEXICON, encoding="utf-8")
    return str(tmp_path / "lexicon.txt")


def test_phones_are_those_of_the_tier_in_order_without_silences():
    items = [("SIL", 0, 100), ("B", 500, 700), ("A", 100, 500), ("sp", 700, 800), ("B", 800, 900), ("", 900, 1000)]
    cut = made_up(items)
    assert PhoneSequence(LogMel()).names(cut) == ["A", "B", "B"]
    assert PhoneSequence(LogMel(), silences=["B"]).names(cut) == ["SIL", "A", "sp", "SIL"]  # a blank is a silence
    with pytest.raises(ValueError, match="utterance cut has no alignment tier 'word'"):
        PhoneSequence(LogMel(), tier="word").names(cut)
    with pytest.raises(ValueError, match="utterance quiet has no phone: correct its transcript or alignment"):
        PhoneSequence(LogMel()).names(made_up([("SIL", 0, 100)], "quiet"))


def test_phones_are_those_of_the_first_pronunciation_of_each_word(lexicon):
    assert read_lexicon(lexicon) == {
        "YES": ("Y", "EH1", "S"),
        "NO": ("N", "OW1"),
        "ne": ("n", "2", "9"),  # X-SAMPA has digits
        "THE": ("DH", "AH0"),
    }
    phones = PhoneSequence(LogMel(), lexicon=lexicon).names(spoken("yes the NO Ne"))
    assert " ".join(phones) == "Y EH1 S DH AH0 N OW1 n 2 9"
    marked = PhoneSequence(LogMel(), lexicon=lexicon).names(spoken('"Yes," no... the ?'))
    assert " ".join(marked) == "Y EH1 S N OW1 DH AH0"
    stripped = PhoneSequence(LogMel(), lexicon=lexicon, strip_stress=True)
    assert stripped.names(spoken("YES the no")) == ["Y", "EH", "S", "DH", "AH", "N", "OW"]
    silent = PhoneSequence(LogMel(), lexicon=lexicon, silences=["S"])
    assert silent.names(spoken("yes")) == ["Y", "EH1"]


def test_stress_is_stripped_from_a_tier_too():
    items = [("AH0", 0, 100), ("SIL", 100, 200), ("N", 200, 300), ("OW2", 300, 400)]
    assert PhoneSequence(LogMel(), strip_stress=True).names(made_up(items)) == ["AH", "N", "OW"]


def test_a_word_that_the_lexicon_has_not_is_named(lexicon):
    with pytest.raises(ValueError, match=f"the word 'maybe' of utterance utt7 is not in the lexicon {lexicon}: add it"):
        PhoneSequence(LogMel(), lexicon=lexicon).names(spoken("yes maybe"))


def test_a_missing_or_broken_lexicon_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no lexicon at {tmp_path}/none.txt: lines of WORD PHONE PHONE"):
        PhoneSequence(LogMel(), lexicon=str(tmp_path / "none.txt"))
    (tmp_path / "broken.txt").write_text("YES Y EH S\nNO 0.5\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/broken.txt:2: the word 'NO' has no phones"):
        read_lexicon(tmp_path / "broken.txt")


# Targets and inputs


@pytest.mark.parametrize("stack", [1, 3])
def test_a_target_is_refused_exactly_where_no_path_of_frames_spells_it(stack):
    """PyTorch's CTC loss is infinite if no path exists."""
    rng = np.random.default_rng(0)
    labels = CharacterLabels(LogMel(stack=stack))
    index = {"A": 0, "B": 1}
    outcomes = []
    for _ in range(200):
        text = "".join(rng.choice(list("AB"), rng.integers(1, 9)))
        frames = stack * int(rng.integers(1, 13 // stack))
        left_over = int(rng.integers(0, stack))  # frames that fill no state
        cut = spoken(text, num_samples=400 + 160 * (frames + left_over - 1) + int(rng.integers(0, 160)))
        target = labels.encode(cut, index)[None] + 1
        scores = torch.zeros(frames, 1, 3).log_softmax(-1)
        loss = torch.nn.functional.ctc_loss(scores, target, torch.tensor([frames]), torch.tensor([len(text)]))
        outcomes.append(bool(loss.isfinite()))
        if outcomes[-1]:
            labels.check(cut)
        else:
            with pytest.raises(ValueError, match="is longer than its input"):
                labels.check(cut)
    assert 20 < sum(outcomes) < 180


def test_a_target_longer_than_its_input_says_how_long_both_are():
    with pytest.raises(
        ValueError,
        match=r"the target of utterance utt7 is longer than its input: 4 tokens and 2 blanks between equal ones, 5 frames "
        r"\(0.07 s\): the transcript of another file\? Correct it or leave the utterance out",
    ):
        CharacterLabels(LogMel()).check(spoken("aabb", num_samples=400 + 4 * 160))
    with pytest.raises(ValueError, match=r": 6 tokens, 5 frames"):
        CharacterLabels(LogMel()).check(spoken("ababab", num_samples=400 + 4 * 160))


def test_labels_of_frames_say_that_they_need_frames():
    with pytest.raises(ValueError, match="CharacterLabels needs `features`, the front end whose frames it labels"):
        CharacterLabels().check(spoken("a"))


# All cuts of a task


def voices(*names):
    """Cuts named after their speakers, ``anna1`` of anna."""
    return [made_up([], name, speaker=name.rstrip("0123456789")) for name in names]


def test_classes_are_those_of_training_sorted_and_without_repeats():
    cuts = CutSet.from_cuts([made_up([*ITEMS, ("A", 7000, 8000)], "one"), made_up([("Z", 0, 9), ("A", 9, 8000)], "two")])
    assert survey({"train": cuts}, FrameLabels("phone", LogMel())) == ["A", "B", "C", "Z"]
    # Whatever the order of the roles.
    assert survey({"valid": voices("anna9"), "train": voices("bert1", "anna1")}, UtteranceLabel("speaker")) == ["anna", "bert"]


def test_a_label_that_training_never_saw_names_itself_and_its_utterance():
    cuts = [made_up([], "one", speaker="anna"), made_up([], "two", speaker="bert")]
    survey({"train": cuts[:1], "valid": voices("anna1")}, UtteranceLabel("speaker"))
    with pytest.raises(
        ValueError, match=r"label 'bert' of utterance two \(test split\) does not occur in training \(1 labels do\)"
    ):
        survey({"test": cuts[1:], "train": cuts[:1]}, UtteranceLabel("speaker"))


def test_an_unknown_phone_names_itself_and_its_utterance():
    train, test = made_up([("A", 0, 8000)], "one"), made_up([("A", 0, 4000), ("Q", 4000, 8000)], "two")
    for labels in (FrameLabels("phone", LogMel()), PhoneSequence(LogMel())):
        with pytest.raises(ValueError, match=r"label 'Q' of utterance two \(test split\) does not occur in training"):
            survey({"train": [train], "test": [test]}, labels)


@pytest.mark.parametrize("roles", [("train", "test"), ("train", "valid"), ("valid", "test")])
def test_an_utterance_in_two_splits_is_refused(roles):
    cuts = {"train": voices("anna1", "bert1"), "valid": voices("anna2"), "test": voices("anna3")}
    survey(cuts, UtteranceLabel("speaker"))
    for role in roles:
        cuts[role] = [*cuts[role], *voices("anna7")]
    with pytest.raises(
        ValueError,
        match=rf"utterance anna7 is in the {roles[0]} split and in the {roles[1]} split: results would be meaningless",
    ):
        survey(cuts, UtteranceLabel("speaker"))


def test_every_split_is_checked_against_its_audio():
    good, bad = (made_up([("A", 0, end)], f"to{end}") for end in (8000, 4000))
    for role in ("train", "valid", "test"):
        cuts = {"train": [good], "valid": [], "test": []}
        cuts[role] = [*cuts[role], bad]
        with pytest.raises(ValueError, match=r"alignment of utterance to4000 goes from 0.000 to 0.250 s"):
            survey(cuts, FrameLabels("phone", LogMel()))


def test_new_speakers_must_be_new():
    labels = UtteranceLabel("speaker", open_set=True)
    cuts = {"train": voices("anna1", "bert1"), "valid": voices("carl1"), "test": voices("dora1", "carl2")}
    assert survey(cuts, labels, new_speakers=True) == ["anna", "bert"]
    for role in ("valid", "test"):
        overlapping = cuts | {role: voices("emil1", "bert2")}
        survey(overlapping, labels)
        with pytest.raises(
            ValueError,
            match=rf"speaker bert of utterance bert2 \({role} split\) is in training too \(bert1\), and this task is about new "
            "speakers: leave them out of one, or set downstream.new_speakers=false",
        ):
            survey(overlapping, labels, new_speakers=True)


def test_an_open_set_ignores_labels_that_training_never_saw():
    labels = UtteranceLabel("speaker", open_set=True)
    classes = survey({"train": voices("bert1", "anna1"), "test": voices("carl1")}, labels)
    index = {name: number for number, name in enumerate(classes)}
    assert [labels.encode(cut, index).item() for cut in voices("carl1", "anna1", "bert1")] == [IGNORED, 0, 1]


def test_a_data_module_refuses_unseen_labels_and_knows_its_classes(demo_corpus):
    speakers = SpeechDataModule(demo_corpus, "speaker", batch_s=8.0, labels=UtteranceLabel("speaker"))
    assert speakers.classes == ["train000", "train001"]
    assert speakers.index == {"train000": 0, "train001": 1}
    with pytest.raises(ValueError, match=r"label 'valid000' of utterance valid000.* \(valid split\) does not occur in training"):
        SpeechDataModule(demo_corpus, "phone", batch_s=8.0, labels=UtteranceLabel("speaker"))


def test_smaller_label_fractions_are_part_of_larger_ones(demo_corpus):
    def chosen(fraction, seed=0):
        return set(SpeechDataModule(demo_corpus, "phone", batch_s=8.0, label_fraction=fraction, seed=seed).training_cuts().ids)

    count = len(chosen(1.0))
    sizes = []
    larger = chosen(1.0)
    for fraction in (0.9, 0.5, 0.3, 0.1, 0.001):
        smaller = chosen(fraction)
        assert smaller < larger or (smaller == larger and len(smaller) == 1)
        assert smaller == chosen(fraction)
        sizes.append(len(smaller))
        larger = smaller
    assert sizes == [int(np.ceil(fraction * count)) for fraction in (0.9, 0.5, 0.3, 0.1, 0.001)]
    assert sizes[-1] == 1
    assert any(chosen(0.3, seed) != chosen(0.3) for seed in (1, 2, 3))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")  # Lhotse's, about so few utterances
def test_a_label_fraction_leaves_classes_and_test_data_alone(demo_corpus):
    labels = FrameLabels("phone", LogMel())
    whole = SpeechDataModule(demo_corpus, "phone", batch_s=8.0, num_workers=0, labels=labels)
    few = SpeechDataModule(demo_corpus, "phone", batch_s=8.0, num_workers=0, labels=labels, label_fraction=0.1)
    assert few.classes == whole.classes
    for role in ("valid", "test"):
        one, other = ([batch["ids"] for batch in source.ordered_loader(role)] for source in (few, whole))
        assert one == other
    assert sorted(name for batch in few.ordered_loader("train") for name in batch["ids"]) == sorted(few.training_cuts().ids)
