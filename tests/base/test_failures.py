"""What a run can do without."""

from __future__ import annotations

import logging

import pytest

from audiot.base.failures import Failures, reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("x is 3:\n  set it to 4"), "x is 3: set it to 4"),
        (FileNotFoundError("no encoder at a"), "no encoder at a"),
        (KeyError("name"), "KeyError: 'name'"),
        (RuntimeError(), "RuntimeError"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_reason_is_one_line_for_users_and_names_the_kind_of_what_only_programmers_understand(error, words):
    assert reason(error) == words


def test_what_fails_is_told_at_the_end_and_the_rest_goes_on(caplog):
    failures, done = Failures(), []
    with failures.noted("a.png"):
        raise RuntimeError("no ink")
    with failures.noted("b.png"):
        done.append("b")
    other = Failures()
    with other.noted("c.csv"):
        raise OSError("disk full")
    failures.update(other)
    assert done == ["b"]
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        failures.tell(debug=False)
    assert caplog.messages == ["failed  a.png: RuntimeError: no ink", "failed  c.csv: disk full"]
    with caplog.at_level(logging.INFO):
        failures.tell(debug=True)
    assert "Traceback" in caplog.messages[2]
    assert caplog.messages[2].endswith("failed  a.png: RuntimeError: no ink")


def test_ctrl_c_is_no_failure():
    failures = Failures()
    with pytest.raises(KeyboardInterrupt), failures.noted("a.png"):
        raise KeyboardInterrupt
    assert not failures.reasons
