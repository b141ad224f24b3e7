"""A process of a training that dies or stands still is named by another one, with its batch, and the run can go on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import tries
from test_distributed import PROGRAM, alone, options  # noqa: F401
from test_store import checkpoints

from audiot.training.ranks import Board, BoardElsewhere, Sign

HANG_S = 120  # seconds after which a test gives up


def until(true, *arguments):
    """Wait until something is so."""
    for _ in range(10 * HANG_S):
        if true(*arguments):
            return
        time.sleep(0.1)
    raise TimeoutError(f"still not so after {HANG_S} s: {true.__name__} {arguments}")


def ranks(process):
    """Process ids of rank 0, and of rank 1 once it has been started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process.pid, *(int(child) for child in children if b"pretrain.py" in Path(f"/proc/{child}/cmdline").read_bytes())


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except OSError:
        return True


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=TWO_GPUS)])
def both(request, alone, tmp_path):  # noqa: F811
    """A training of two processes that has saved a checkpoint."""
    folder = tmp_path / "run"
    given = [*options(alone[0], "run"), f"hydra.run.dir={folder}", "trainer=ddp", f"trainer.accelerator={request.param}"]
    given += ["trainer.devices=2"]
    given += ["trainer.max_steps=100000", "callbacks.ranks.look_s=0.3", "callbacks.ranks.patience=15"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, PROGRAM, *given]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: checkpoints(folder / "checkpoints") or process.poll() is not None)
            yield process, folder
        finally:
            for pid in ranks(process) if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)


def lines(text):
    """Lines without progress bars."""
    return [line for line in (line.rpartition("\r")[2].strip() for line in text.splitlines()) if line]


FAULTS = {"killed": (signal.SIGKILL, "has ended"), "stopped": (signal.SIGSTOP, "has been stopped for 4.5 seconds, and is killed")}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("attempt", tries())
@pytest.mark.parametrize(
    ("rank", "fault"),
    [(1, "killed"), (0, "stopped"), (1, "stopped"), (0, "killed")],
)
def test_a_process_that_is_lost_is_named_and_all_end(both, rank, fault, attempt):
    process, folder = both
    number, words = FAULTS[fault]
    pids = ranks(process)
    os.kill(pids[rank], number)
    for pid in pids:
        until(is_gone, pid)
    out, err = process.communicate(timeout=HANG_S)
    (error,) = [line for line in lines(err) if line.startswith("audiot: error: ")]
    where = r"(before step 1|(at step|in the validation after step) \d+, with \d+ utterances?: \d\d.*)"
    assert re.fullmatch(rf"audiot: error: rank {rank} \(process {pids[rank]} on .+\), {where}, {words}.*", error)
    assert "Traceback" not in err
    assert f"resume:  audiot pretrain resume={folder}" in lines(out)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_training_that_is_stopped_as_a_whole_goes_on(both):
    process, folder = both
    for pid in ranks(process):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(10)  # twice the patience
    latest = checkpoints(folder / "checkpoints")[0]
    for pid in ranks(process):
        os.kill(pid, signal.SIGCONT)
    until(lambda: checkpoints(folder / "checkpoints")[0] != latest)
    assert process.poll() is None


def test_the_board_hands_out_all_signs_and_takes_none_of_strangers():
    board = Board("localhost")
    try:
        signs = {rank: Sign(rank, 100 + rank, "here", "at step 1, with 1 utterance: é\n", False) for rank in (1, 2)}
        host, port = board.server_address[:2]
        clients = {rank: BoardElsewhere((host, port), board.token, 5.0) for rank in signs}
        for rank, client in clients.items():
            found = client.exchange(rank, signs[rank])
        assert found == signs
        stranger = BoardElsewhere((host, port), "guessed", 5.0)
        with pytest.raises(ConnectionError):
            stranger.exchange(3, signs[1])
        assert clients[1].exchange(1, signs[1]).keys() == {1, 2}
    finally:
        board.shutdown()
        board.server_close()


@pytest.mark.parametrize("written", [b"", b'["tok', b'["token", 1, [1, 1, "here", "", false]]\n'])
def test_whoever_ends_amid_an_exchange_leaves_the_board_silent(written, capfd):
    board = Board("localhost")
    try:
        for _ in range(3):
            with socket.create_connection(board.server_address[:2]) as connection:
                connection.sendall(written.replace(b"token", board.token.encode()))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets, as a kill may do
        client = BoardElsewhere(board.server_address[:2], board.token, 5.0)
        assert 2 in client.exchange(2, Sign(1, 1, "here", "", False))
    finally:
        board.shutdown()
        board.server_close()
    assert capfd.readouterr().err == ""


def test_a_board_that_stands_still_is_an_error_and_not_a_wait():
    with socket.create_server(("localhost", 0)) as silent:
        client = BoardElsewhere(silent.getsockname()[:2], "token", 0.2)
        with pytest.raises(OSError, match="timed out"):
            client.exchange(1, Sign(1, 1, "here", "", False))
        asked, _ = silent.accept()
        with asked, asked.makefile() as stream:
            assert json.loads(stream.readline())[:2] == ["token", 1]
