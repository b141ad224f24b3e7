"""Bad input at scale: damaged files of every kind end as accepted or as a refusal in one line, and nothing in them is run.

The gate tries some of each kind, ``pytest -m slow tests/test_fuzz.py`` tries all, in some ten minutes on one core. A case is
known by its kind and number, from which it is made again: ``PYTHONPATH=tests python -m fuzzing.harness KIND FOLDER NUMBER``, in
an empty folder.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from fuzzing.harness import outcomes

CASES = {"audio": 1000, "manifest": 200, "textgrid": 200, "table": 200, "encoder": 200, "s3prl": 200, "run": 200}
FEW = {"audio": 100, "run": 6}  # in the gate; of the others
FEW_OTHERS = 24


def told(outcome):
    """A fault in words."""
    trace = outcome.get("trace", "")
    said = f"\n    {outcome['message']}" if "message" in outcome else ""
    return f"{outcome['kind']} {outcome['number']} ({outcome.get('what')}): {outcome['why']}{said}\n{trace}"


def try_cases(kind, numbers, folder):
    """Try cases of a kind, and say how many came to what; none may be a fault."""
    found = outcomes(kind, numbers, folder)
    faults = [told(outcome) for outcome in found if outcome["fate"] == "fault"]
    fates = Counter(outcome["fate"] for outcome in found)
    print(f"{kind}: {json.dumps(fates)}, {max(outcome['mb'] for outcome in found)} MB")
    assert not faults, f"{len(faults)} of {len(numbers)} cases:\n" + "\n".join(faults[:5])
    assert fates["rejected"]  # the damage is noticed
    return fates


@pytest.mark.parametrize("kind", CASES)
def test_some_damaged_files(kind, tmp_path):
    try_cases(kind, range(FEW.get(kind, FEW_OTHERS)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many_damaged_files(kind, tmp_path):
    assert try_cases(kind, range(CASES[kind]), tmp_path)["accepted"]  # and some damage does not matter
