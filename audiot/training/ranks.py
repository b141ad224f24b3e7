"""The processes of one training look after each other: one that has ended or stands still is named, and the others end.

Without that they would wait for it in a collective operation, on GPUs for ten minutes or for ever.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import socketserver
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from audiot.base.console import log
from audiot.data.batches import Batch
from audiot.runs import has_checkpoints, resume_command, whole_run
from audiot.training.watch import utterances

GRACE_S = 10  # seconds in which a process may tell of its error itself


class Sign(NamedTuple):
    """What a process says of itself, again and again.

    Args:
        number: Its number.
        pid: Its process id.
        host: Its machine.
        where: Where in the training it is, in words.
        left: Whether it has done its part.
    """

    number: int
    pid: int
    host: str
    where: str
    left: bool


class Board(socketserver.ThreadingTCPServer):
    """Where the first process keeps everybody's sign. A line of JSON ``[token, rank, sign]`` is answered with all signs.

    PyTorch's `TCPStore` would do, but that of a process that is stopped keeps its clients waiting without end.

    Args:
        host: Address on which it listens.
    """

    daemon_threads = True

    def __init__(self, host: str) -> None:
        super().__init__((host, 0), _Answers)
        self.token = secrets.token_hex()  # for the processes of this training alone
        self.signs: dict[int, list[Any]] = {}
        Thread(target=self.serve_forever, name="board", daemon=True).start()


class _Answers(socketserver.StreamRequestHandler):
    server: Board

    def handle(self) -> None:
        with suppress(OSError):  # whoever asks has ended, which its missing signs tell
            for line in self.rfile:
                if not line.endswith(b"\n"):  # it ended while it wrote
                    return
                token, rank, sign = json.loads(line)
                if token != self.server.token:
                    return
                self.server.signs[rank] = sign
                self.wfile.write(json.dumps(list(self.server.signs.items())).encode() + b"\n")


class BoardElsewhere:
    """The board of another process.

    Args:
        address: Host and port.
        token: Its token.
        timeout_s: Seconds to wait for an answer. It is asked a second time then: this process may have been stopped while it
            waited.
    """

    def __init__(self, address: tuple[str, int], token: str, timeout_s: float) -> None:
        self.address, self.token, self.timeout_s = address, token, timeout_s
        self._stream: Any = None

    def exchange(self, rank: int, sign: Sign) -> dict[int, Sign]:
        """Hand in a sign; everybody's.

        Raises:
            OSError: the board is gone, or its process stands still.
        """
        try:
            return self._exchange(rank, sign)
        except OSError:
            self._stream = None
            return self._exchange(rank, sign)

    def _exchange(self, rank: int, sign: Sign) -> dict[int, Sign]:
        if self._stream is None:
            with socket.create_connection(self.address, self.timeout_s) as connection:
                self._stream = connection.makefile("rwb")
        self._stream.write(json.dumps([self.token, rank, sign]).encode() + b"\n")
        self._stream.flush()
        answer = self._stream.readline()
        if not answer:
            raise ConnectionError("the board is gone")
        return {number: Sign(*found) for number, found in json.loads(answer)}


class RanksAlive(Callback):
    """End a training of several processes if one of them has ended or gives no sign for `look_s` · `patience` seconds.

    The one of lowest rank among the others tells which one that is, where it was, and how the run can go on. A process that is
    stopped, on the same machine, is killed, so that it keeps no memory. Looks are counted, not time: a training that is stopped
    as a whole (Ctrl-Z) goes on as if nothing had happened.

    Args:
        folder: Folder of the run.
        look_s: Seconds between two looks.
        patience: Looks without a sign after which a process is given up.
    """

    def __init__(self, folder: str, look_s: float = 1.0, patience: int = 40) -> None:
        for name, value in {"look_s": look_s, "patience": patience}.items():
            if value <= 0:
                raise ValueError(f"callbacks.ranks.{name} must be positive, found {value}")
        self.run = Path(folder)
        self.look_s, self.patience = look_s, patience
        self.rank = self.world_size = 0
        self.lost: dict[int, str] = {}  # rank → what is wrong with it
        self._board: Board | BoardElsewhere | None = None
        self._place = "before step 1"
        self._batch: Batch | None = None
        self._signed = 0
        self._left, self._found, self._telling = Event(), Event(), Event()
        self._thread: Thread | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to look. All processes must call it."""
        if trainer.world_size == 1:
            return
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        if self._board is None:
            host = os.environ.get("MASTER_ADDR", "localhost")
            mine = Board(host) if self.rank == 0 else None
            port, token = trainer.strategy.broadcast((mine.server_address[1], mine.token) if mine else (0, ""))
            self._board = mine or BoardElsewhere((host, port), token, self.look_s * self.patience / 2)
        self._left.clear()
        self._signed = 0
        self._exchange(self._board)
        trainer.strategy.barrier()  # everybody's sign is there
        self._thread = Thread(target=self._watch, args=(self._board, self._exchange(self._board)), name="ranks", daemon=True)
        self._thread.start()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Note the batch."""
        self._place, self._batch = f"at step {trainer.global_step + 1}", batch

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the batch."""
        self._place, self._batch = f"in the validation after step {trainer.global_step}", batch

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave it to the error to tell."""
        self._telling.set()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop looking, and say so."""
        self._left.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def told(self, error: BaseException) -> str:
        """What the error of a lost connection means, in words for a user.

        Raises:
            SystemExit: another process tells it.
        """
        self._telling.set()
        self._found.wait(GRACE_S)
        if not self.lost:
            words = " ".join(str(error).split())[-100:]
            return f"rank {self.rank} lost the connection to another process {self._place}: {words}"
        if not self._is_teller():
            raise SystemExit(1)
        return "; ".join(self.lost.values())

    def _is_teller(self) -> bool:
        return self.rank == min(set(range(self.world_size)) - self.lost.keys())

    def _exchange(self, board: Board | BoardElsewhere) -> dict[int, Sign]:
        """Hand in a sign; everybody's."""
        self._signed += 1
        where = self._place if self._batch is None else f"{self._place}, with {utterances(self._batch['ids'])}"
        sign = Sign(self._signed, os.getpid(), socket.gethostname(), where, self._left.is_set())
        if isinstance(board, BoardElsewhere):
            return board.exchange(self.rank, sign)
        board.signs[self.rank] = list(sign)
        return {rank: Sign(*found) for rank, found in list(board.signs.items())}

    def _watch(self, board: Board | BoardElsewhere, seen: dict[int, Sign]) -> None:
        """Look until this process has done its part or another one is lost."""
        silent = dict.fromkeys(range(self.world_size), 0)
        while not self.lost:
            self._left.wait(self.look_s)
            try:
                signs = self._exchange(board)
            except OSError:  # the board has ended with the first process, or stands still with it
                if not self._left.is_set():
                    self.lost[0] = self._wrong(0, seen[0])
                    break
            if self._left.is_set():
                return
            for rank, sign in signs.items():
                is_new = sign.number != seen[rank].number
                silent[rank] = 0 if is_new or sign.left else silent[rank] + 1
                seen[rank] = sign
                if silent[rank] >= self.patience or (silent[rank] > 1 and _state(sign) == "ended"):
                    self.lost[rank] = self._wrong(rank, sign)
        self._found.set()
        for rank in self.lost:
            if _state(seen[rank]) == "stopped":
                with suppress(OSError):
                    os.kill(seen[rank].pid, signal.SIGKILL)
        if not self._telling.wait(GRACE_S):
            self._tell()

    def _wrong(self, rank: int, sign: Sign) -> str:
        state = _state(sign)
        what = {
            "ended": "has ended; killed for want of memory perhaps",
            "stopped": f"has been stopped for {self.look_s * self.patience:g} seconds, and is killed now",
            "": f"has given no sign for {self.look_s * self.patience:g} seconds",
        }[state]
        return f"rank {rank} (process {sign.pid} on {sign.host}), {sign.where}, {what}"

    def _tell(self) -> None:
        """Tell what is wrong and end this process, whose training waits for what will not come."""
        if self._is_teller():
            say_how_to_go_on(self.run)
            sys.stderr.write(f"audiot: error: {'; '.join(self.lost.values())}\n")
            sys.stderr.flush()
        os._exit(1)


def say_how_to_go_on(run: Path) -> None:
    """Say how a run goes on that has a checkpoint, whichever process says it."""
    if has_checkpoints(run):
        log.info(f"\nresume:  {resume_command(whole_run(run))}")


def _state(sign: Sign) -> str:
    """What the operating system says of a process: ended, stopped, or nothing in particular, as of one elsewhere."""
    if sign.host != socket.gethostname():
        return ""
    try:
        os.kill(sign.pid, 0)
    except ProcessLookupError:
        return "ended"
    except PermissionError:
        return ""
    try:
        state = Path(f"/proc/{sign.pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:  # no Linux
        return ""
    return {"Z": "ended", "X": "ended", "T": "stopped", "t": "stopped"}.get(state, "")


def ranks_of(trainer: pl.Trainer) -> RanksAlive | None:
    """The watch over the ranks among a trainer's callbacks."""
    return next((each for each in trainer.callbacks if isinstance(each, RanksAlive)), None)  # type: ignore[attr-defined]


def watch_children(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """End this process with those that it has started as its ranks, if one of them ends before it with an error.

    Lightning's own watch kills all at once without a word. This one leaves time to tell.

    Args:
        processes: Those of ranks 1, 2, …
    """
    Thread(target=_watch_children, args=(processes,), name="children", daemon=True).start()


def _watch_children(processes: Sequence[subprocess.Popen[Any]]) -> None:
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return
        failed = [(number, code) for number, code in enumerate(codes, 1) if code]
        if failed:
            break
        time.sleep(0.5)
    time.sleep(3 * GRACE_S)
    rank, code = failed[0]
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    log.info(f"rank {rank} (process {processes[rank - 1].pid}) has ended with {how}, and so all others end")
    for process in processes:
        process.kill()
    os._exit(1)
