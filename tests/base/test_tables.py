"""Tables as text."""

from __future__ import annotations

from audiot.base.tables import aligned, markdown


def test_markdown_has_a_ruler_below_the_header_and_values_to_the_right():
    assert markdown([["m", "T=1"], ["a", "2"]]) == "| m | T=1 |\n| --- | ---: |\n| a | 2 |"


def test_names_are_aligned_to_the_left_and_values_to_the_right():
    assert aligned([["m", "T=1"], ["abc", "2"]]) == "m    T=1\nabc    2"
