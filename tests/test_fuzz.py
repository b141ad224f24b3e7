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
SOME = {"audio": 50, "manifest": 12, "textgrid": 12, "table": 12, "encoder": 8, "s3prl": 12, "run": 4}  # in the gate


def told(outcome):
    """A fault in words."""
    trace = outcome.get("trace", "")
    said = f"\n    {outcome['message']}" if "message" in outcome else ""
    return f"{outcome['kind']} {outcome['number']} ({outcome.get('what')}): {outcome['why']}{said}\n{trace}"


def tried(counts, folder):
    """Try the first cases of each kind, and say how many came to what; none may be a fault."""
    found = outcomes({kind: range(count) for kind, count in counts.items()}, folder)
    faults = [told(outcome) for outcome in found if outcome["fate"] == "fault"]
    fates = {kind: Counter(outcome["fate"] for outcome in found if outcome["kind"] == kind) for kind in counts}
    print(json.dumps(fates))
    assert not faults, f"{len(faults)} of {len(found)} cases:\n" + "\n".join(faults[:5])
    return fates


def test_some_damaged_files_are_accepted_or_refused_in_one_line(tmp_path):
    fates = tried(SOME, tmp_path)
    assert all(each["rejected"] for each in fates.values())  # the damage is noticed


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many_damaged_files_are_accepted_or_refused_in_one_line(kind, tmp_path):
    (fates,) = tried({kind: CASES[kind]}, tmp_path).values()
    assert fates["rejected"]
    assert fates["accepted"]  # and some damage does not matter
