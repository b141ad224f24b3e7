"""Which runs of a study take place at a time. No process is started."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from audiot.study import opened
from audiot.study.design import Job
from audiot.study.records import Records
from audiot.study.running import Running, Worker


def job(name, alone=False):
    return Job(name, "pretrain", (), (name,), alone=alone)


def worker(cards, at_a_time, running=()):
    """A worker that has runs at places already."""
    made = Worker.__new__(Worker)
    made.cards, made.at_a_time = cards, at_a_time
    made.running = [Running([each], None, ExitStack(), place) for each, place in running]
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


def test_tasks_of_an_encoder_follow_each_other_while_there_are_enough_for_all_places():
    encoders = [job(f"encoder {number}") for number in range(3)]
    tasks = [
        Job(f"{heard.name}, task {number}", "finetune", (), (f"{heard.name}{number}",), heard)
        for heard in encoders
        for number in range(4)
    ]
    two = worker([], 2)
    assert two._together(tasks[0], tasks, set()) == tasks[:4]
    assert two._together(tasks[5], tasks, {tasks[4].key}) == tasks[5:8]
    assert worker([], 6)._together(tasks[0], tasks, set()) == tasks[:2]
    assert two._together(tasks[8], tasks[8:10], set()) == [tasks[8]]
    assert two._together(SHARED, [SHARED, *tasks], set()) == [SHARED]


@pytest.mark.parametrize(("cards", "together"), [([], 4), (["0"], 4), (["0", "1"], 2), (["0", "1", "2", "3", "4"], 1)])
def test_runs_that_are_alone_follow_each_other_on_each_device(cards, together):
    alone = [job(f"alone {number}", alone=True) for number in range(4)]
    assert worker(cards, 8)._together(alone[0], [*alone, SHARED], set()) == alone[:together]
    assert worker(cards, 8)._together(alone[3], [SHARED, *alone], {each.key for each in alone[:3]}) == alone[3:]


class Ended:
    """A process that has ended."""

    exitcode = -9

    def join(self):
        pass


@pytest.mark.parametrize(
    ("begun", "failed"),
    [
        ([], {"0": "its process ended with -9 before the run began"}),
        (["0"], {"0": "no room"}),
        (["0", "1"], {"0": "no room", "1": "no room"}),
    ],
)
def test_what_a_process_was_at_when_it_ended_has_failed_and_the_rest_is_left(tmp_path, begun, failed):
    jobs = [job(name) for name in "012"]
    for name in begun:
        (tmp_path / job(name).folder).mkdir(parents=True)
        (tmp_path / job(name).folder / "output.txt").write_text("audiot: error: no room\n")
    made = worker([], 2)
    made.folder, made.records, made.failed = tmp_path, Records(tmp_path), {}
    made.running = [Running(jobs, Ended(), ExitStack(), 0)]
    made._end(made.running[0])
    assert {found.name: why for found, why in made.failed.values()} == failed
    assert not made.running


def test_the_server_of_a_study_waits_for_the_folder_of_its_corpus(tmp_path):
    told = tmp_path / "told"
    told.touch()
    writer = threading.Timer(0.2, told.write_text, [str(tmp_path / "corpus")])
    writer.start()
    assert opened.prepared(told) == tmp_path / "corpus"
    writer.join()


def test_the_server_of_a_study_waits_no_longer_than_the_study_does(tmp_path, monkeypatch):
    told = tmp_path / "told"
    assert opened.prepared(told) is None
    told.touch()
    parents = iter([7, 7, 7, 1])
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    assert opened.prepared(told) is None
