"""Which mechanisms a benchmark measures, and what those without weights are compared with."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import pytest
from small_settings import SMALL
from stranger import copy_example

from audiot.attention import build_mechanism, names
from audiot.base import groups
from audiot.benchmark.attention import AttentionBenchmark, Entry

SMALLER = SMALL | {"mechanisms": ["all"], "lengths": [6], "frames": 12, "padded": 0.3, "rounds": 1}


def test_all_stands_for_those_that_no_other_entry_names():
    limited = {"name": "synthesizer_random", "max_length": 9}
    entries = Entry.all_of([limited, "all", {"name": "local", "overrides": {"window": 3}}])
    labels = [entry.label for entry in entries]
    assert labels[0] == "synthesizer_random"
    assert labels[1:-1] == [name for name in names() if name not in ("synthesizer_random", "local")]
    assert labels[-1] == "local window=3"
    assert entries[0].max_length == 9
    assert {entry.name for entry in Entry.all_of(["all"])} == set(names())


def test_subquadratic_stands_for_those_that_say_so():
    cheap = {entry.name for entry in Entry.all_of(["query_key", "subquadratic"])} - {"query_key"}
    assert {"local", "sparse_fixed", "routing", "uniform"} <= cheap
    assert not cheap & {"query_key", "shared_query_key", "synthesizer_random", "synthesizer_dense"}
    assert {entry.name for entry in Entry.all_of(["local", "subquadratic"])} == cheap


def test_a_word_that_is_none_of_these_is_a_name():
    with pytest.raises(ValueError, match=r"^benchmark.attentions: no attention 'every'"):
        Entry.all_of(["every"], "benchmark.attentions")


@pytest.fixture
def weightless(tmp_path, monkeypatch):
    """The registry with SummaryMixing among the mechanisms; its class."""
    copy_example(tmp_path)
    group = Path(str(resources.files("audiot.conf") / "attention"))
    for name in ("query_key", "synthesizer_random"):
        shutil.copy(group / f"{name}.yaml", tmp_path / "attention")
    monkeypatch.syspath_prepend(tmp_path)
    real = groups._places
    monkeypatch.setattr(groups, "_places", lambda group: [tmp_path / "attention"] if group == "attention" else real(group))
    return type(build_mechanism("summary_mixing", 8, 2, 8))


def test_a_mechanism_without_weights_is_compared_with_its_naive_form(weightless, monkeypatch):
    def measured():
        rows = [row for rows in AttentionBenchmark(**SMALLER).run() for row in rows]
        assert {row.mechanism for row in rows} == {"query_key", "summary_mixing", "synthesizer_random"}
        return {row.note for row in rows if row.mechanism == "summary_mixing"}

    assert measured() == {""}
    attend = weightless.attend
    monkeypatch.setattr(weightless, "attend", lambda self, **inputs: attend(self, **inputs) + 0.1)
    (note,) = measured()
    assert note.startswith("wrong: its output in fp32 differs from its naive form by ")
