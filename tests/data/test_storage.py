"""Reading files and ranges of bytes of a folder and of a web server that misbehaves."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
from pathlib import Path

import pytest
from webserver import Server

from audiot.data import storage as module
from audiot.data.storage import Range, Storage, StorageError

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.tar").write_bytes(CONTENT)
    (tmp_path / "files" / "b.tar").write_bytes(CONTENT[::-1])
    return tmp_path / "files"


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(module, "WAITS_S", (0.01, 0.01, 0.01))
    with Server(folder) as server:
        yield server
        server.shutdown()


@pytest.fixture(params=["folder", "server"])
def storage(request, folder):
    if request.param == "folder":
        return Storage(folder)
    return Storage(request.getfixturevalue("server").root)


WANTED = [Range("a.tar", 100, 50), Range("b.tar", 0, 1), Range("a.tar", 10000, 240)]


def test_ranges_and_whole_files_are_read(storage):
    assert storage.ranges(WANTED) == [CONTENT[100:150], CONTENT[-1:], CONTENT[10000:]]
    assert storage.ranges([]) == []
    assert storage.read("a.tar", len(CONTENT)) == CONTENT
    assert sorted(storage.sizes()) == ["a.tar", "b.tar"]
    with storage.opened("b.tar") as stream:
        stream.seek(-3, 2)
        assert stream.read() == CONTENT[:3][::-1]


def test_what_is_missing_or_ends_early_is_told_in_a_line(storage):
    for call in (lambda: storage.read("c.tar"), lambda: storage.ranges([*WANTED, Range("c.tar", 0, 1)])):
        with pytest.raises(StorageError, match=r"/c.tar is missing: copy it there, or check data.root$"):
            call()
    with pytest.raises(StorageError, match=r"/a.tar ends 60 bytes too early for its index, which needs 10,300: it is truncated"):
        storage.ranges([Range("a.tar", 10000, 300)])
    with pytest.raises(StorageError, match=r"/a.tar has 10,240 bytes instead of 5"):
        storage.read("a.tar", 5)


def test_a_range_behind_the_end_is_told(storage):
    with pytest.raises(StorageError, match=r"/a.tar ends .*: it is truncated or was replaced; copy it again"):
        storage.ranges([Range("a.tar", 20000, 3)])


def test_a_server_that_refuses_is_told_and_not_asked_again(server):
    for status in (401, 403):
        server.faults["a.tar"] = [status]
        with pytest.raises(StorageError, match=r"/data/a.tar may not be read \(access is denied\): check the credentials"):
            Storage(server.root).ranges(WANTED[:1])
    assert server.asked == {"a.tar": 2}
    server.faults["a.tar"] = [404]
    with pytest.raises(StorageError, match="is missing"):
        Storage(server.root).read("a.tar")
    assert server.asked == {"a.tar": 3}


@pytest.mark.parametrize("fault", ["drop", 500, 503, 429])
def test_a_server_that_fails_for_a_moment_is_asked_again(server, fault):
    server.faults["a.tar"] = [fault, fault]
    storage = Storage(server.root)
    assert storage.ranges(WANTED) == [CONTENT[100:150], CONTENT[-1:], CONTENT[10000:]]
    assert server.asked == {"a.tar": 4, "b.tar": 1}, "only what failed"
    server.faults["a.tar"] = [fault]
    assert storage.read("a.tar") == CONTENT


@pytest.mark.parametrize("fault", ["drop", 500])
def test_a_server_that_goes_on_failing_ends_in_a_line(server, fault):
    server.faults["a.tar"] = [fault] * 20
    for call in (lambda: Storage(server.root).ranges(WANTED[:1]), lambda: Storage(server.root).read("a.tar")):
        with pytest.raises(StorageError, match=r"^http://127.0.0.1:\d+/data/a.tar can't be read after 4 tries: [^\n]+$"):
            call()
    assert server.asked == {"a.tar": 8}


def test_a_server_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(module, "WAITS_S", (0.01, 0.01, 0.01))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        root = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(StorageError, match=r"/a.tar can't be read after 4 tries: .*[Cc]onnect"):
        Storage(root).ranges([Range("a.tar", 0, 1)])


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "WAITS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(module, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        root = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StorageError, match=r"/a.tar can't be read after 4 tries: .*[Tt]imeout"):
            Storage(root).ranges([Range("a.tar", 0, 1)])


def test_tries_end_before_a_loader_gives_up():
    from audiot.data.loaders import PATIENCE_S

    assert len(module.WAITS_S) + 1 == module.TRIES
    assert module.TRIES * module.TIMEOUT_S + sum(module.WAITS_S) < PATIENCE_S


def test_a_server_without_ranges_is_told(server):
    server.faults["a.tar"] = ["whole"]
    with pytest.raises(StorageError, match=r"a.tar: the server sends whole files where ranges of bytes are asked for"):
        Storage(server.root).ranges(WANTED[:1])


def test_forked_and_pickled_storage_has_its_own_connections(server):
    storage = Storage(server.root)
    assert storage.ranges(WANTED[:1]) == [CONTENT[100:150]]
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    workers = [fork.Process(target=lambda: answers.put(storage.ranges(WANTED[:1])), daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
        assert answers.get() == [CONTENT[100:150]]
    assert pickle.loads(pickle.dumps(storage)).ranges(WANTED[:1]) == [CONTENT[100:150]]


def test_an_unknown_scheme_and_a_missing_package_are_told(monkeypatch):
    for root in ("ftp://host/data", "github://a:b@c/d", "reference://x"):
        with pytest.raises(ValueError, match=f"data.root={root}: no scheme '{root.split(':')[0]}'; give a folder or http, https"):
            Storage(root)
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ImportError, match=r"data.root=s3://b/c needs s3fs: pip install 'audiot\[cloud\]'"):
        Storage("s3://b/c").read("a.tar")


def test_a_folder_name_of_any_bytes_is_read(tmp_path):
    folder = Path(tmp_path, "é \udce9")
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"abc")
    from audiot.base.files import name_text

    assert Storage(name_text(folder)).ranges([Range("a.tar", 1, 2)]) == [b"bc"]
    assert Storage(name_text(folder)).read("a.tar") == b"abc"
