"""Running a study: so many runs at a time, each in a process of its own, beside other processes that work on the same folder."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from audiot.base.console import say
from audiot.base.lock import owned
from audiot.base.quoting import override
from audiot.benchmark.machine import describe_machine
from audiot.data.prepare import start_worker, usable_cores
from audiot.study import opened
from audiot.study.design import Job, Study
from audiot.study.records import Record, Records, collect, travelling

LOOK_S = 1.0  # between looks at what other processes have finished


@dataclass
class Running:
    """A run that goes on.

    Args:
        job: What it is.
        process: Its process.
        claim: What keeps other processes from it.
        place: Number of its place among the runs at a time.
    """

    job: Job
    process: Any
    claim: ExitStack
    place: int


class Worker:
    """Runs of a study until none is left that can run.

    Several may work on one folder, on several machines that share it: a run is claimed by a lock, which ends with its process.

    Args:
        study: The study.
        folder: Its folder.
        at_a_time: Runs at a time. They share out the cores, and the GPUs where there are several. A run that measures costs has
            its GPU (or the machine) to itself, as far as this process can tell.
        command: Function that runs a command with its arguments, in a process of its own.
        corpus: Function that prepares the corpus of the runs, and gives its folder.
        data_dir: Folder of the corpora.
        modules: What that function imports. It is imported once for all processes.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        at_a_time: int,
        command: Callable[[str, list[str]], None],
        corpus: Callable[[], Path],
        data_dir: str,
        modules: Sequence[str],
    ) -> None:
        self.study, self.folder, self.at_a_time, self.command = study, folder, at_a_time, command
        self.corpus, self.data_dir = corpus, data_dir
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.cards = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        self.records = Records(folder)
        self.failed: dict[str, tuple[Job, str]] = {}
        self.running: list[Running] = []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__, opened.__name__, *modules])

    def work(self) -> None:
        """Run all that is left. What fails is in `failed`, with the reason.

        Raises:
            KeyboardInterrupt: by Ctrl-C; what had not finished runs anew next time.
        """
        records = self.records.load()
        if any(job.key not in records for job in self.study.jobs(records)):
            self._serve()
        with tqdm(desc="study", unit="run", smoothing=0) as bar:
            try:
                while True:
                    left = self._left(bar)
                    self._start(left)
                    if not self.running and not left:
                        return
                    if self.running:
                        wait([each.process.sentinel for each in self.running], LOOK_S)
                    elif not self._elsewhere(left):
                        return  # the rest needs what has failed
                    else:
                        time.sleep(LOOK_S)
                    for each in [each for each in self.running if not each.process.is_alive()]:
                        self._end(each, bar)
            finally:
                for each in self.running:
                    each.process.terminate()
                    each.process.join(20)
                    each.process.kill()
                    each.claim.close()

    def _serve(self) -> None:
        """Start the server from which the runs fork, with all that they import and read."""
        os.environ[opened.VARIABLE] = str(self.corpus())
        forkserver.ensure_running()
        del os.environ[opened.VARIABLE]

    def _left(self, bar: tqdm) -> list[Job]:
        """What is not finished, has not failed, and does not wait for what has failed; each once, and what it needs before it."""
        records = self.records.load()
        known = {job.key: job for job in self.study.jobs(records)}
        bar.total, bar.n = len(known), sum(key in records for key in known)
        bar.refresh()
        left: dict[str, Job] = {}
        for key, job in known.items():
            if key in records or key in self.failed:
                continue
            heard = job.encoder
            if heard is not None and heard.key in self.failed:
                continue
            if heard is not None and not (self.folder / heard.folder / "encoder").is_dir():
                left.setdefault(heard.key, heard)  # its record is there, and its encoder is elsewhere
            else:
                left.setdefault(key, job)
        return list(left.values())

    def _start(self, left: list[Job]) -> None:
        """Start as many runs as there are places. One that must be alone waits for a free device, and the others for it."""
        busy = {each.job.key for each in self.running}
        for job in left:
            if job.key in busy:
                continue
            place = self._place(job)
            if place is None:
                return
            claim = self._claimed(job)
            if claim is None:
                continue
            run = self.folder / job.folder
            shutil.rmtree(run, ignore_errors=True)  # what an earlier process left unfinished
            run.mkdir(parents=True)
            shared_by = self.num_devices if job.alone else self.at_a_time
            threads = max(1, usable_cores() // shared_by)
            arguments = [*job.arguments(self.folder), override("hydra.run.dir", run), override("data_dir", self.data_dir)]
            figure = self.study.tasks[job.task].figure if job.task else ""
            environment = dict(os.environ)  # that of the server, from which it forks, may be older
            if self.cards:
                environment["CUDA_VISIBLE_DEVICES"] = self.cards[place % self.num_devices]
            given = (self.command, job, arguments, self.folder, figure, threads, environment)
            process = self.context.Process(target=_run, args=given)
            process.start()
            self.running.append(Running(job, process, claim, place))

    @property
    def num_devices(self) -> int:
        """Number of devices that the runs share."""
        return max(1, len(self.cards))

    def _place(self, job: Job) -> int | None:
        """A free place for a run; None where there is none by now."""
        taken = {each.place for each in self.running}
        on_device: list[list[Job]] = [[] for _ in range(self.num_devices)]
        for each in self.running:
            on_device[each.place % self.num_devices].append(each.job)
        for place in range(self.at_a_time):
            others = on_device[place % self.num_devices]
            if place not in taken and not (others and (job.alone or any(other.alone for other in others))):
                return place
        return None

    def _claimed(self, job: Job) -> ExitStack | None:
        """A claim on a run; None where another process has it, or has just finished it."""
        stack = ExitStack()
        try:
            stack.enter_context(owned(self.folder / "claims" / job.key))
        except ValueError:
            return None
        encoder_is_gone = job.command == "pretrain" and not (self.folder / job.folder / "encoder").is_dir()
        if (self.folder / "results" / f"{job.key}.json").is_file() and not encoder_is_gone:
            stack.close()
            return None
        return stack

    def _elsewhere(self, left: list[Job]) -> bool:
        """Whether another process works on something that is left."""
        return any((self.folder / "claims" / job.key).is_dir() for job in left)

    def _end(self, each: Running, bar: tqdm) -> None:
        """Note how a run ended."""
        self.running.remove(each)
        each.process.join()
        record = self.records.load().get(each.job.key)
        each.claim.close()
        if each.process.exitcode == 0 and record is not None:
            with tqdm.external_write_mode():
                say(f"{each.job.name}: {_told(record)}")
            return
        why = _reason(self.folder / each.job.folder / "output.txt", each.process.exitcode)
        self.failed[each.job.key] = each.job, why
        with tqdm.external_write_mode():
            say(f"{each.job.name} failed: {why}")


def _told(record: Record) -> str:
    names = [name for name in ("value", "validation", "frames_per_s") if name in record.figures]
    return ", ".join(f"{name} {record.figures[name]:.4g}" for name in names) or f"{len(record.figures)} figures"


def _reason(output: Path, code: int | None) -> str:
    """Why a run failed, in its own last words."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.is_file() else []
    told = [line.split("audiot: error: ", 1)[1] for line in lines if "audiot: error: " in line]
    if told:
        return told[-1]
    return f"its process ended with {code}; {output} has what it said"


def _run(
    command: Callable[[str, list[str]], None],
    job: Job,
    arguments: list[str],
    study: Path,
    figure: str,
    threads: int,
    environment: dict[str, str],
) -> None:
    """Run a command in this process, and keep its record. Its checkpoints have served then, and take most of its room."""
    run = study / job.folder
    with (run / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    start_worker()
    multiprocessing.set_start_method("fork", force=True)  # of its loaders
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
    command(job.command, arguments)
    figures, draws = collect(job.command, run, figure, job.alone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = {name: str(value) for name, value in describe_machine(device).items()}
    record = Record(job.name, job.folder, (job.command, *arguments), figures, draws, machine)
    Records(study).write(job.key, record, travelling(run) if job.command == "analyze" else None)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
