"""Entries of lists of mechanisms."""

from __future__ import annotations

from audiot.benchmark.entries import Entry


def test_entries_are_names_or_mappings():
    assert Entry.of("query_key") == Entry("query_key", "query_key")
    given = {"name": "synthesizer_random", "overrides": {"init": "normal"}}
    assert Entry.of(given) == Entry("synthesizer_random", "synthesizer_random init=normal", {"init": "normal"})
    assert Entry.of(given | {"label": "mine", "max_length": 9}) == Entry("synthesizer_random", "mine", {"init": "normal"}, 9)


def test_an_entry_is_chosen_by_overrides_of_pretraining():
    entry = Entry.of({"name": "lsh_simple", "overrides": {"search": "chunked", "num_bits": None}})
    assert entry.arguments == ["attention=lsh_simple", "attention/search=chunked", "attention.num_bits=null"]
