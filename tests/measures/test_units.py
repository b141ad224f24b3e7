"""Units of item files, alignments and recordings."""

import pytest
from lhotse import MonoCut, SupervisionSegment
from lhotse.supervision import AlignmentItem

from audiot.measures.abx import Unit
from audiot.measures.units import item_units, recording_units, tier_units

HEADER = "#file onset offset #phone prev-phone next-phone speaker\n"


def cut(name="u", symbols=("SIL", "AH", "sp", "B"), **custom):
    items = [AlignmentItem(symbol, round(0.1 * place, 1), 0.1) for place, symbol in enumerate(symbols)]
    said = SupervisionSegment(name, name, 0, 0.4, speaker="ann", custom=custom or None, alignment={"phone": items})
    return MonoCut(name, 0, 0.4, 0, supervisions=[said])


def test_units_of_a_tier_have_neighbours_and_silences_at_both_ends():
    found = tier_units([cut(), cut("v", ("AH", "B"))], "phone", {"SIL", "sp"})
    assert [(unit.utterance, unit.before, unit.phone, unit.after, unit.silent) for unit in found] == [
        ("u", "SIL", "SIL", "AH", True),
        ("u", "SIL", "AH", "SIL", False),
        ("u", "AH", "SIL", "B", True),
        ("u", "SIL", "B", "SIL", False),
        ("v", "SIL", "AH", "B", False),
        ("v", "AH", "B", "SIL", False),
    ]
    assert (found[1].onset, found[1].offset, found[1].speaker) == (0.1, pytest.approx(0.2), "ann")


def test_a_tier_that_is_missing_is_told():
    with pytest.raises(ValueError, match="no alignment tier 'word'"):
        tier_units([cut()], "word", ())


def test_recordings_are_units():
    assert recording_units([cut(keyword="seven")], "keyword") == [Unit("u", 0, 0.4, "seven", "", "", "ann")]
    with pytest.raises(ValueError, match="no label 'keyword'"):
        recording_units([cut()], "keyword")


def test_a_corpus_that_names_no_speaker_is_one_of_a_single_speaker():
    nameless = [cut(name, keyword="seven") for name in "uv"]
    for each in nameless:
        each.supervisions[0].speaker = None
    assert {unit.speaker for unit in tier_units(nameless, "phone", ())} == {"the only one"}
    assert {unit.speaker for unit in recording_units(nameless, "keyword")} == {"the only one"}
    with pytest.raises(ValueError, match="v has no label 'speaker'"):
        tier_units([cut("u"), nameless[1]], "phone", ())


def test_an_item_file_is_read(tmp_path):
    (tmp_path / "x.item").write_text(HEADER + "a/b 0.10 0.2 AH SIL B ann\n\na/b 0.2 0.3 SIL AH B ann\n")
    assert item_units(tmp_path / "x.item", {"SIL"}) == [
        Unit("a/b", 0.1, 0.2, "AH", "SIL", "B", "ann"),
        Unit("a/b", 0.2, 0.3, "SIL", "AH", "B", "ann", silent=True),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#file onset offset #phone speaker\n", r"x.item:1: the header lacks prev-phone next-phone"),
        (HEADER + "a 0 1 AH SIL B\n", r"x.item:2: 7 values were expected, as the header has, found 6"),
        (HEADER + "a 1 0.5 AH SIL B ann\n", r"x.item:2: onset and offset must be seconds.*found 1 0.5"),
        (HEADER + "a zero 0.5 AH SIL B ann\n", r"x.item:2: onset and offset must be seconds.*found zero 0.5"),
        (HEADER + "a 0 inf AH SIL B ann\n", r"x.item:2: onset and offset must be seconds.*found 0 inf"),
        (HEADER, r"x.item has no unit"),
        ("", r"x.item has no unit"),
    ],
)
def test_a_broken_item_file_is_told(tmp_path, text, message):
    (tmp_path / "x.item").write_text(text)
    with pytest.raises(ValueError, match=message):
        item_units(tmp_path / "x.item")


def test_a_missing_item_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no item file at"):
        item_units(tmp_path / "x.item")
