"""Which runs of a study take place at a time. No process is started."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from audiot.study.design import Job
from audiot.study.running import Running, Worker


def job(name, alone=False):
    return Job(name, "pretrain", (), (name,), alone=alone)


def worker(cards, at_a_time, running=()):
    """A worker that has runs at places already."""
    made = Worker.__new__(Worker)
    made.cards, made.at_a_time = cards, at_a_time
    made.running = [Running(each, None, ExitStack(), place) for each, place in running]
    return made


SHARED, ALONE = job("shared"), job("alone", alone=True)


@pytest.mark.parametrize(
    ("cards", "running", "new", "place"),
    [
        ([], [], ALONE, 0),
        ([], [(SHARED, 0)], SHARED, 1),
        ([], [(SHARED, 0)], ALONE, None),
        ([], [(ALONE, 0)], SHARED, None),
        (["0", "1"], [(ALONE, 0)], ALONE, 1),
        (["0", "1"], [(ALONE, 0)], SHARED, 1),
        (["0", "1"], [(ALONE, 0), (SHARED, 1)], SHARED, 3),
        (["0", "1"], [(ALONE, 0), (SHARED, 1)], ALONE, None),
        (["0", "1"], [(SHARED, number) for number in range(4)], SHARED, None),
    ],
)
def test_a_run_that_is_alone_shares_no_device(cards, running, new, place):
    assert worker(cards, 4, running)._place(new) == place
