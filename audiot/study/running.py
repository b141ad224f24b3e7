"""Running a study: so many processes at a time, each with a run or with tasks of an encoder, beside others on the same folder."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from audiot.base.console import say
from audiot.base.files import write_text
from audiot.base.lock import owned
from audiot.base.quoting import override
from audiot.benchmark.machine import describe_machine
from audiot.data.prepare import start_worker, usable_cores
from audiot.runs import has_checkpoints
from audiot.study.design import Job, Task
from audiot.study.records import Record, Records, collect, travelling

CORPUS = "AUDIOT_STUDY_CORPUS"  # names a file that tells where the corpus is: a server is given nothing else than its environment
LOOK_S = 1.0  # between looks at what other processes have finished
STOPPED = 130  # exit status of a command that a signal has stopped


@dataclass
class Running:
    """Runs that go on in one process, one after the other.

    Args:
        jobs: What they are.
        process: Their process.
        claim: What keeps other processes from them.
        place: Number of its place among the processes.
    """

    jobs: list[Job]
    process: Any
    claim: ExitStack
    place: int


class Plan(Protocol):
    """What is to be run."""

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks of its runs, by name."""

    def jobs(self, records: Mapping[str, Record]) -> Iterable[Job]:
        """All runs that are known by now, each after what it needs, from the records of the finished ones by key."""


class Worker:
    """Runs of a study until none is left that can run.

    Several may work on one folder, on several machines that share it: a run is claimed by a lock, which ends with its process.

    Args:
        study: The study, or another plan.
        folder: Its folder.
        at_a_time: Runs at a time. They share out the cores, and the GPUs where there are several. A run that measures costs has
            its GPU (or the machine) to itself, as far as this process can tell.
        command: Function that runs a command with its arguments, in a process of its own.
        corpus: Function that prepares the corpus of the runs, and gives its folder; None where they have several.
        data_dir: Folder of the corpora.
        modules: What that function imports. It is imported once for all processes.
        name: What the progress bar is called.
        resumes: Whether a run that was killed goes on from its last checkpoint, and does not begin anew.
    """

    def __init__(
        self,
        study: Plan,
        folder: Path,
        at_a_time: int,
        command: Callable[[str, list[str]], None],
        corpus: Callable[[], Path] | None,
        data_dir: str,
        modules: Sequence[str],
        name: str = "study",
        resumes: bool = False,
    ) -> None:
        self.study, self.folder, self.at_a_time, self.command = study, folder, at_a_time, command
        self.corpus, self.data_dir, self.name, self.resumes = corpus, data_dir, name, resumes
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.cards = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        self.records = Records(folder)
        self.failed: dict[str, tuple[Job, str]] = {}
        self.running: list[Running] = []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__, *modules, "audiot.study.opened"])
        self.told = (folder / f".corpus-{uuid.uuid4().hex}").absolute()  # other workers may share the folder

    def work(self) -> None:
        """Run all that is left. What fails is in `failed`, with the reason.

        Raises:
            KeyboardInterrupt: by Ctrl-C; what had not finished runs anew next time.
        """
        records = self.records.load()
        try:
            if any(job.key not in records for job in self.study.jobs(records)):
                self._serve()
            with tqdm(desc=self.name, unit="run", smoothing=0) as bar:
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
                        self._end(each)
        finally:
            self.told.unlink(missing_ok=True)
            for each in self.running:
                each.process.terminate()
                each.process.join(20)
                each.process.kill()
                each.claim.close()

    def _serve(self) -> None:
        """Start the server from which the runs fork. It imports all they need, and reads their corpus once it is prepared."""
        if self.corpus is not None:
            self.told.touch()
            os.environ[CORPUS] = str(self.told)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server inherits it: Ctrl-C is for this process
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
            os.environ.pop(CORPUS, None)
        if self.corpus is not None:
            write_text(self.told, str(self.corpus().absolute()))

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
            if heard is not None and not (heard.key in records and (self.folder / heard.folder / "encoder").is_dir()):
                left.setdefault(heard.key, heard)  # it goes on still; or its record is there, and its encoder is elsewhere
            else:
                left.setdefault(key, job)
        return list(left.values())

    def _start(self, left: list[Job]) -> None:
        """Start as many runs as there are places. One that must be alone waits for a free device, and the others for it."""
        busy = {job.key for each in self.running for job in each.jobs}
        idle = [job for job in left if job.key not in busy]
        for job in idle:
            if job.key in busy:  # it has just started with another
                continue
            place = self._place(job)
            if place is None:
                return
            claims = ExitStack()
            jobs = [each for each in self._together(job, idle, busy) if self._claimed(each, claims)]
            if not jobs:
                continue
            busy |= {each.key for each in jobs}
            shared_by = self.num_devices if job.alone else self.at_a_time
            threads = max(1, usable_cores() // shared_by)
            environment = dict(os.environ)  # that of the server, from which it forks, may be older
            if self.cards:
                environment["CUDA_VISIBLE_DEVICES"] = self.cards[place % self.num_devices]
            given = (self.command, [self._run(each) for each in jobs], self.folder, threads, environment)
            process = self.context.Process(target=_run_all, args=given)
            process.start()
            self.running.append(Running(jobs, process, claims, place))

    def _together(self, job: Job, idle: Sequence[Job], busy: Collection[str]) -> list[Job]:
        """A run, and those that follow it in its process, which need not start again: as many as leave work for all places.

        After a task come others of its encoder, after a run that has its device to itself others that will have it.
        """
        waiting = [each for each in idle if each.key not in busy]
        if job.alone:
            alike = [each for each in waiting if each.alone]
            return alike[: max(1, len(alike) // self.num_devices)]
        if job.encoder is None:
            return [job]
        most = max(1, len(waiting) // self.at_a_time)
        return [each for each in waiting if each.encoder is not None and each.encoder.key == job.encoder.key][:most]

    def _run(self, job: Job) -> Run:
        """What a process must know of a run."""
        place = [override("hydra.run.dir", self.folder / job.folder), override("data_dir", self.data_dir)]
        return Run(job, [*job.arguments(self.folder), *place], self.study.tasks[job.task].figure if job.task else "")

    @property
    def num_devices(self) -> int:
        """Number of devices that the runs share."""
        return max(1, len(self.cards))

    def _place(self, job: Job) -> int | None:
        """A free place for a run; None where there is none by now."""
        taken = {each.place for each in self.running}
        on_device: list[list[Job]] = [[] for _ in range(self.num_devices)]
        for each in self.running:
            on_device[each.place % self.num_devices] += each.jobs
        for place in range(self.at_a_time):
            others = on_device[place % self.num_devices]
            if place not in taken and not (others and (job.alone or any(other.alone for other in others))):
                return place
        return None

    def _claimed(self, job: Job, claims: ExitStack) -> bool:
        """Claim a run; False where another process has it, or has just finished it."""
        with ExitStack() as claim:
            try:
                claim.enter_context(owned(self.folder / "claims" / job.key))
            except ValueError:
                return False
            encoder_is_gone = job.command == "pretrain" and not (self.folder / job.folder / "encoder").is_dir()
            if (self.folder / "results" / f"{job.key}.json").is_file() and not encoder_is_gone:
                return False
            if not (self.resumes and has_checkpoints(self.folder / job.folder)):
                shutil.rmtree(self.folder / job.folder, ignore_errors=True)  # what an earlier process left unfinished
            claims.push(claim.pop_all())
        return True

    def _elsewhere(self, left: list[Job]) -> bool:
        """Whether another process works on something that is left."""
        return any((self.folder / "claims" / job.key).is_dir() for job in left)

    def _end(self, each: Running) -> None:
        """Note how the runs of a process ended. Those that it had not begun are left for another.

        One that ends before its first run counts as that run's failure: it would end so again and again.
        """
        self.running.remove(each)
        each.process.join()
        records = self.records.load()
        each.claim.close()
        outputs = {job.key: self.folder / job.folder / "output.txt" for job in each.jobs}
        begun = [job for job in each.jobs if job.key in records or outputs[job.key].is_file()] or each.jobs[:1]
        with tqdm.external_write_mode():
            for job in begun:
                if job.key in records:
                    say(f"{job.name}: {_told(records[job.key])}")
                else:
                    why = _reason(outputs[job.key], each.process.exitcode)
                    self.failed[job.key] = job, why
                    say(f"{job.name} failed: {why}")


def runs_at_a_time(jobs: int | str, automatic: Callable[[], int], alone: str) -> int:
    """Runs at a time, as the key ``jobs`` says.

    Args:
        jobs: ``auto``, a number, or 0 to run nothing.
        automatic: What stands for ``auto``.
        alone: What is written without a run, in a word.

    Raises:
        ValueError: it is no number of runs.
    """
    if jobs == "auto":
        return automatic()
    if isinstance(jobs, int) and jobs >= 0:
        return jobs
    raise ValueError(f"jobs must be auto, a number, or 0 for the {alone} alone, found {jobs}")


def _told(record: Record) -> str:
    names = [name for name in ("value", "validation", "frames_per_s") if name in record.figures]
    return ", ".join(f"{name} {record.figures[name]:.4g}" for name in names) or f"{len(record.figures)} figures"


def _reason(output: Path, code: int | None) -> str:
    """Why a run failed, in its own last words."""
    if not output.is_file():
        return f"its process ended with {code} before the run began"
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.split("audiot: error: ", 1)[1] for line in lines if "audiot: error: " in line]
    if told:
        return told[-1]
    return f"its process ended with {code}; {output} has what it said"


@dataclass(frozen=True)
class Run:
    """A run as its process knows it.

    Args:
        job: What it is.
        arguments: Its command line.
        figure: Name of the figure of its task in ``metrics.json``.
    """

    job: Job
    arguments: list[str]
    figure: str


def _run_all(
    command: Callable[[str, list[str]], None], runs: Sequence[Run], study: Path, threads: int, environment: dict[str, str]
) -> None:
    """Run commands in this process, one after the other. One that fails does not keep the others from it."""
    start_worker()
    multiprocessing.set_start_method("fork", force=True)  # of its loaders
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
    failed = False
    for run in runs:
        try:
            _run(command, run, study)
        except SystemExit as stop:
            if stop.code == STOPPED:
                raise
            failed |= stop.code not in (None, 0)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except Exception:
            failed = True
            traceback.print_exc()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


def _run(command: Callable[[str, list[str]], None], run: Run, study: Path) -> None:
    """Run a command, and keep its record. Its checkpoints have served then, and take most of its room."""
    job, folder, begin = run.job, study / run.job.folder, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [override("resume", folder)] if has_checkpoints(folder) else run.arguments
    with (folder / "output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    command(job.command, arguments)
    figures, draws = collect(job.command, folder, run.figure, job.alone)
    figures["wall_s"] = round(time.monotonic() - begin, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = {name: str(value) for name, value in describe_machine(device).items()}
    record = Record(job.name, job.folder, (job.command, *run.arguments), figures, draws, machine)
    Records(study).write(job.key, record, travelling(folder) if job.command == "analyze" else None)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
