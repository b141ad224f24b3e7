"""A folder's lock: one owner, free again however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from audiot.base.lock import LOCK, owned

HOLD = """
import os, sys, time
from pathlib import Path
from audiot.base.lock import owned
with owned(Path(sys.argv[1])):
    child = os.fork() if len(sys.argv) > 2 else 1
    if child == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    elif len(sys.argv) < 3:
        print("owned", flush=True)
    time.sleep(600)
"""
RANKS = ("LOCAL_RANK", "RANK", "NODE_RANK", "SLURM_PROCID")


@pytest.fixture
def holder(tmp_path):
    """Starts a process that owns a folder; what it prints first."""
    started = []

    def start(folder, *arguments):
        process = subprocess.Popen([sys.executable, "-c", HOLD, folder, *arguments], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_an_owned_folder_is_made_and_taken_away_again_where_nothing_came_of_it(tmp_path):
    folder = tmp_path / "a" / "b"
    with owned(folder):
        host, process, started, rest = (folder / LOCK).read_text().split("\n")
        assert (host, process, rest) == (socket.gethostname(), str(os.getpid()), "")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", started)
        with owned(tmp_path / "a" / "." / "b"):  # the owner goes on owning it
            pass
        assert (folder / LOCK).is_file()
    assert not any(tmp_path.iterdir())
    with owned(folder):
        (folder / "config.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_second_process_is_told_who_owns_the_folder_and_changes_nothing(tmp_path, holder):
    process, _ = holder(tmp_path)
    text = (tmp_path / LOCK).read_text()
    said = (
        rf"{tmp_path} is in use by process {process.pid} on {re.escape(socket.gethostname())} since 20\S+ \S+: wait for its end, "
    )
    with pytest.raises(ValueError, match=said + "or stop it; another hydra.run.dir starts a run of its own$"), owned(tmp_path):
        pytest.fail("two owners")
    assert (tmp_path / LOCK).read_text() == text
    process.kill()
    process.wait()
    assert (tmp_path / LOCK).read_text() == text  # nobody could delete it
    with owned(tmp_path):
        assert (tmp_path / LOCK).read_text().split("\n")[1] == str(os.getpid())


def test_a_child_that_outlives_the_owner_does_not_go_on_owning(tmp_path, holder):
    process, child = holder(tmp_path, "fork")
    try:
        with pytest.raises(ValueError, match=f"process {process.pid} "), owned(tmp_path):
            pytest.fail("two owners")
        process.kill()
        process.wait()
        os.kill(int(child), 0)  # it lives
        with owned(tmp_path):
            pass
    finally:
        os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("name", RANKS)
def test_the_other_processes_of_a_run_take_no_lock(tmp_path, holder, monkeypatch, name):
    holder(tmp_path)
    monkeypatch.setenv(name, "1")
    with owned(tmp_path):
        pass
    monkeypatch.setenv(name, "0")
    with pytest.raises(ValueError, match="is in use by"), owned(tmp_path):
        pytest.fail("two owners")


def test_a_lock_that_its_owner_deletes_in_between_is_taken_anew(tmp_path, monkeypatch):
    lock, left = fcntl.flock, [1]

    def late(descriptor, how):
        if left:
            left.pop()
            (tmp_path / LOCK).unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with owned(tmp_path):
        assert (tmp_path / LOCK).read_text().split("\n")[1] == str(os.getpid())


def test_an_owner_that_has_not_written_who_it_is_is_another_process(tmp_path):
    with (tmp_path / LOCK).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by another process: "), owned(tmp_path):
            pytest.fail("two owners")


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys, number):
    def refuse(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with owned(Path(tmp_path)):
        pass
    said = f"audiot: warning: {tmp_path} can't be locked ({os.strerror(number)}): start no second run in it\n"
    assert capsys.readouterr().err == said
    assert not any(tmp_path.iterdir())
