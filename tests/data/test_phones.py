"""Phones by their class."""

from __future__ import annotations

from audiot.data.corpora.demo_phones import PHONES
from audiot.data.labels import NOTHING
from audiot.data.phones import by_phone_class


def test_all_phones_of_the_demo_corpus_have_a_class():
    groups = by_phone_class(PHONES)
    assert sorted(label for members in groups.values() for label in members) == sorted(PHONES)
    assert {name: len(members) for name, members in groups.items()} == {
        **{"vowels": 15, "stops": 6, "affricates": 2, "fricatives": 9, "nasals": 3, "liquids": 2, "glides": 2, "other": 1}
    }


def test_degrees_of_stress_stand_together_and_what_is_no_phone_comes_last():
    labels = ["AA0", "AA1", "B", "IY2", "M", NOTHING, "SIL", "spn"]
    assert by_phone_class(labels) == {
        **{"vowels": ["IY2", "AA0", "AA1"], "stops": ["B"], "nasals": ["M"], "other": ["SIL", "spn", NOTHING]}
    }


def test_other_labels_have_no_classes():
    for labels in (["yes", "no"], ["A", "B", "D"], ["p", "b"], ["SIL"], []):
        assert by_phone_class(labels) == {}
