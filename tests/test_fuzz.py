"""Bad input at scale: damaged files of every kind end as accepted or as a refusal in one line, and nothing in them is run.

The gate tries some of each kind, ``pytest -m slow tests/test_fuzz.py`` tries all, in some ten minutes on one core. A case is
known by its kind and number, from which ``PYTHONPATH=tests python -m fuzzing.harness EMPTY_FOLDER '{"KIND": [NUMBER]}'`` makes
it again.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from fuzzing.harness import outcomes

CASES = {"audio": 1000, "manifest": 200, "textgrid": 200, "table": 200, "encoder": 200, "s3prl": 200, "run": 200}
SOME = {"audio": 12, "manifest": 4, "textgrid": 4, "table": 4, "encoder": 4, "s3prl": 4, "run": 3}  # in the gate
WRONG = (  # what is said of each of `fuzzing.kinds.Wrong.READERS` behind the third
    "an error that no command turns into a line",
    "its refusal names none of x.txt",
    "its refusal names none of x.txt",
    "its refusal takes 11,006 characters",
    "a traceback was printed",
    "something in it was run",
    "it did what no file may: os.system",
    "it did what no file may: open ",
    "it did what no file may: os.mkdir ",
    "an error that no command turns into a line",  # memory
    "the process died (3)",
)


def told(outcome):
    """A fault in words."""
    trace = outcome.get("trace", "")
    said = f"\n    {outcome['message']}" if "message" in outcome else ""
    return f"{outcome['kind']} {outcome['number']} ({outcome.get('what')}): {outcome['why']}{said}\n{trace}"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the cases of the gate came to, and the readers that do what none may."""
    wanted = {kind: range(count) for kind, count in SOME.items()}
    return outcomes(wanted | {"wrong": range(3 + len(WRONG))}, tmp_path_factory.mktemp("fuzz"))


def tried(found, counts):
    """How many cases of each kind came to what; none may be a fault."""
    found = [outcome for outcome in found if outcome["kind"] in counts]
    faults = [told(outcome) for outcome in found if outcome["fate"] == "fault"]
    fates = {kind: Counter(outcome["fate"] for outcome in found if outcome["kind"] == kind) for kind in counts}
    print(json.dumps(fates))
    assert not faults, f"{len(faults)} of {len(found)} cases:\n" + "\n".join(faults[:5])
    return fates


def test_some_damaged_files_are_accepted_or_refused_in_one_line(found):
    fates = tried(found, SOME)
    assert all(each["rejected"] for each in fates.values())  # the damage is noticed


def test_a_reader_that_does_what_none_may_is_noticed(found):
    whys = [outcome.get("why", outcome["fate"]) for outcome in found if outcome["kind"] == "wrong"]
    assert whys[:3] == ["accepted", "rejected", "rejected"]
    for why, words in zip(whys[3:], WRONG, strict=True):
        assert words in why


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many_damaged_files_are_accepted_or_refused_in_one_line(kind, tmp_path):
    (fates,) = tried(outcomes({kind: range(CASES[kind])}, tmp_path), [kind]).values()
    assert fates["rejected"]
    assert fates["accepted"]  # and some damage does not matter
