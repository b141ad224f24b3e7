"""Preparation: decode a corpus once to checked 16-bit mono WAV files with Lhotse manifests."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import soundfile
from tqdm import tqdm

from audiot.base.files import name_text, printable, read_json, replacing_gzip, replacing_text, room, write_json
from audiot.data.audio import (
    MIN_DURATION_S,
    SHORTFALL_S,
    SILENCE_DBFS,
    AudioFile,
    BadAudioError,
    check_budget,
    check_duration,
    check_file,
    check_sound,
    reason,
    resample,
)
from audiot.data.shards import is_sharded, located_cuts
from audiot.data.sources import (
    Difference,
    File,
    Sources,
    compare,
    file_digest,
    look,
    read_lines,
    read_record,
    snapshot,
    write_record,
)

if TYPE_CHECKING:  # Lhotse imports PyTorch, which workers that decode WAV or FLAC do not need
    from lhotse import CutSet
    from lhotse.cut import Cut

    from audiot.data.manifests import Manifests

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1: without a record of the sources
WHEN = ("update", "check", "keep")
SOURCES, RESULTS = Path("record", "sources.jsonl.gz"), Path("record", "utterances.jsonl.gz")
ROLES = ("train", "valid", "test")
CHUNK = 16  # utterances sent to a worker at a time
WRITTEN = re.compile(r"\.?[A-Za-z0-9._-]*-[0-9a-f]{10}\.wav")  # names in audio/, with a leading dot while they are written
ALONE_S = 3600  # seconds of audio; less than this is decoded before worker processes have started


@dataclass(frozen=True)
class _Options:
    directory: Path
    sample_rate: int
    channel: str | int
    min_duration_s: float
    max_duration_s: float | None
    silence_dbfs: float
    copy: bool


@dataclass(frozen=True)
class _Job:
    """One utterance to decode: a part of a file, or a cut that only Lhotse can read (mixed, transformed, …).

    Args:
        files: Paths of its audio files.
        states: Size and modification time of each file before decoding.
    """

    id: str
    path: str
    sample_rate: int
    start: int
    num_samples: int
    channels: tuple[int, ...]
    file_samples: int = 0  # samples of the whole file, according to the manifest
    cut: Cut | None = None
    files: tuple[str, ...] = ()
    states: tuple[tuple[int, int] | None, ...] = ()

    def digest(self) -> str:
        """Digest of the job. It shows another piece or a changed file under the same id."""
        cut = self.cut and self.cut.drop_supervisions().to_dict()
        parts = (self.id, self.path, self.sample_rate, self.start, self.num_samples, self.channels, self.states, cut)
        return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()[:16]


def _files(cut: Cut) -> tuple[str, ...]:
    """Absolute paths of a cut's audio files."""
    parts = [track.cut for track in getattr(cut, "tracks", ())] or [cut]
    recordings = [recording for part in parts if (recording := getattr(part, "recording", None)) is not None]
    sources = [source for recording in recordings for source in recording.sources if source.type == "file"]
    return tuple(dict.fromkeys(os.path.abspath(source.source) for source in sources))


def _job(cut: Cut) -> _Job:
    from lhotse.cut import MonoCut, MultiCut

    if not cut.has_recording:
        raise ValueError(f"utterance {cut.id} has no recording: preparation needs audio, not features")
    start = file_samples = 0
    channels: Sequence[int] = range(cut.num_channels or 1)
    path, cut_to_load = "", cut
    if isinstance(cut, (MonoCut, MultiCut)):
        recording = cut.recording
        source = recording.sources[0]
        here = name_text(os.getcwd())
        path = os.path.normpath(os.path.join(here, source.source)) if source.type == "file" else f"({source.type})"
        channels = [cut.channel] if isinstance(cut.channel, int) else cut.channel
        if len(recording.sources) == 1 and source.type == "file" and not recording.transforms:
            start, cut_to_load = round(cut.start * cut.sampling_rate), None
            file_samples = recording.num_samples
            if missing := set(channels) - set(source.channels):
                raise ValueError(f"utterance {cut.id} has channel {min(missing)}, but its recording has {source.channels}")
            channels = [source.channels.index(channel) for channel in channels]  # a source may number its channels freely
    return _Job(cut.id, path, cut.sampling_rate, start, cut.num_samples, tuple(channels), file_samples, cut_to_load, _files(cut))


def _decode(job: _Job, channel: str | int) -> tuple[np.ndarray, bool]:
    """Samples (N,) of the job in float32, and whether its file is 16-bit mono WAV without other content."""
    if job.cut is not None:
        check_budget(job.num_samples)
        for name in job.files:
            check_file(name)
        try:
            samples = job.cut.load_audio().T
        except Exception as error:  # a decoder, a command or a server may raise anything
            raise BadAudioError(f"unreadable: {reason(error)}") from None
        with np.errstate(invalid="ignore"):  # inf - inf gives NaN, which is refused later
            return samples[:, _chosen(job, channel)].mean(axis=1), False
    with AudioFile(job.path) as file:
        if file.sample_rate != job.sample_rate:
            raise BadAudioError(f"not as its manifest says: {file.sample_rate} Hz, not {job.sample_rate}")
        if max(job.channels) >= file.channels:
            raise BadAudioError(f"not as its manifest says: {file.channels} channels, not {max(job.channels) + 1}")
        channels = [job.channels[place] for place in _chosen(job, channel)]
        if (job.start, job.num_samples) != (0, job.file_samples):
            return file.read_mono(channels, job.start, job.num_samples), False
        mono = file.read_mono(channels)
        missing = (job.num_samples - len(mono)) / job.sample_rate
        if missing > SHORTFALL_S:
            raise BadAudioError(f"truncated: {len(mono)} samples of {job.num_samples}")
        if missing < -SHORTFALL_S:
            raise BadAudioError(f"not as its manifest says: {len(mono)} samples, not {job.num_samples}")
        return mono, file.format == ("WAV", "PCM_16") and file.channels == 1


def read_cut(cut: Cut) -> np.ndarray:
    """Samples (N,) of a cut in float32, averaged over its channels. They are decoded as in preparation.

    Raises:
        BadAudioError: the audio cannot be used. The message is the reason.
    """
    try:
        job = _job(cut)
    except ValueError as error:
        raise BadAudioError(f"not as its manifest says: {error}") from None
    return _decode(job, "average")[0]


def _chosen(job: _Job, channel: str | int) -> list[int]:
    """The job's channels that are averaged."""
    if channel == "average" or len(job.channels) == 1:
        return list(range(len(job.channels)))
    if channel not in job.channels:
        raise BadAudioError(f"no channel {channel}: it has {', '.join(map(str, job.channels))}")
    return [job.channels.index(int(channel))]


def _to_16_bit(mono: np.ndarray) -> tuple[np.ndarray, bool]:
    """Samples rounded to 16 bits without dither. Audio above full scale is scaled as a whole, since clipping would distort it."""
    scaled = mono.astype(np.float64) * 32768
    too_loud = bool(np.max(scaled) >= 32767.5 or np.min(scaled) < -32768.5)
    if too_loud:
        scaled *= 32767 / np.abs(scaled).max()
    return np.rint(scaled).astype(np.int16), too_loud


def _file_name(utterance: str) -> str:
    """A file name for any file system, in one of 256 folders. A digest keeps names apart that would become equal."""
    digest = hashlib.sha256(utterance.encode()).hexdigest()
    return f"audio/{digest[:2]}/{re.sub(r'[^A-Za-z0-9._-]+', '_', utterance)[-80:]}-{digest[2:12]}.wav"


def _process(job: _Job, options: _Options) -> dict[str, Any]:
    """Decode, check and write one utterance. Returns its line in the journal."""
    try:
        limits = options.min_duration_s, options.max_duration_s
        check_duration(job.num_samples, job.sample_rate, *limits)  # checked before a long file is read
        mono, is_plain = _decode(job, options.channel)
        check_duration(len(mono), job.sample_rate, *limits)
        check_sound(mono, options.silence_dbfs)
        # A path that is not UTF-8 cannot be written to a manifest.
        can_stay = is_plain and job.sample_rate == options.sample_rate and printable(job.path) == job.path
        if can_stay and not options.copy:
            return {"id": job.id, "job": job.digest(), "path": job.path, "num_samples": len(mono), "scaled": False}
        samples_16, scaled = _to_16_bit(resample(mono, job.sample_rate, options.sample_rate))
    except BadAudioError as error:
        return {"id": job.id, "job": job.digest(), "path": job.path, "reason": str(error)}
    name = _file_name(job.id)
    path = options.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary name is always the same, so the next run overwrites what an interrupted run leaves.
    temporary = path.with_name(f".{path.name}")
    try:
        soundfile.write(temporary, samples_16, options.sample_rate, subtype="PCM_16", format="WAV")
    except soundfile.LibsndfileError as error:  # its words for a full disk are "System error."
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written, {room(options.directory)}: make room there, and the same command goes on"
        ) from error
    os.replace(temporary, path)
    return {"id": job.id, "job": job.digest(), "path": name, "num_samples": len(samples_16), "scaled": scaled}


def _prepare_one(job: _Job, options: _Options) -> dict[str, Any]:
    """`_process`, with the digest of the file that the manifest will name."""
    result = _process(job, options)
    return result if "reason" in result else result | {"sha256": file_digest(options.directory / result["path"])}


def _process_chunk(jobs: list[_Job], options: _Options) -> list[dict[str, Any]]:
    return [_prepare_one(job, options) for job in jobs]


def start_worker() -> None:
    """Start of a pool worker: it ignores Ctrl-C and ends together with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # A killed parent cannot stop its workers. They would write at the same time as the resumed run.
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for_any([sentinel])
    os._exit(1)


def _process_all(jobs: Iterable[_Job], options: _Options, num_jobs: int) -> Generator[dict[str, Any], None, None]:
    """Results, in the order in which they are ready."""
    if num_jobs == 1:
        yield from (_prepare_one(job, options) for job in jobs)
        return
    rest = iter(jobs)
    pending: set[Future] = set()
    pool = ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        while True:
            for _ in range(2 * num_jobs - len(pending)):
                if chunk := list(islice(rest, CHUNK)):
                    pending.add(pool.submit(_process_chunk, chunk, options))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            f"a worker process ended abruptly, perhaps out of memory, while preparing {options.directory}: "
            "run the command again with a smaller num_jobs to continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _check_same_settings(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    here, now = _flat(found), _flat(wanted)
    for name in sorted({*here, *now}):
        before, after = here.get(name, "(not set)"), now.get(name, "(not set)")
        if before != after:
            raise ValueError(
                f"{directory} was prepared with {name}={before!r}, now it is {after!r}: "
                "choose another folder, or delete this one to prepare it again"
            )


class _Journal:
    """Record of finished utterances, one JSON line each, from which an interrupted run continues. It also locks the folder.

    Args:
        directory: Prepared folder.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "journal.jsonl"
        self._lock()
        while not self._is_there():  # the process that held the lock may have removed the file, and another may have made it
            self.close()
            self._lock()

    def _open(self) -> IO[bytes]:
        while True:
            self.directory.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # the process that updates the folder has just moved it
                return open(self.path, "a+b")

    def _lock(self) -> None:
        self.stream = self._open()
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process prepares {self.directory}: waiting for it", flush=True)
            fcntl.flock(self.stream, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            print(f"{self.directory} can't be locked ({error.strerror}): make sure that only one process prepares it", flush=True)

    def _is_there(self) -> bool:
        with suppress(FileNotFoundError):  # it may be removed at any time
            return os.path.samestat(os.fstat(self.stream.fileno()), os.stat(self.path))
        return False

    def read(self, settings: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
        """Results by utterance whose audio is in ``folder``. Rejected ones are tried again, because files may be repaired."""
        self.stream.seek(0)
        content = self.stream.read()
        whole = content[: content.rfind(b"\n") + 1]  # a killed run may have left an incomplete line
        header, *lines = [json.loads(line) for line in whole.splitlines()] or [{}]
        good = [line for line in lines if "reason" not in line and (folder / line["path"]).is_file()]
        if good and header["format_version"] == FORMAT_VERSION:
            _check_same_settings(self.directory, header["settings"], settings)
            self.stream.truncate(len(whole))
        else:  # nothing to keep, so settings may change
            good = []
            self.stream.truncate(0)
            self.append({"format_version": FORMAT_VERSION, "settings": settings})
        return {line["id"]: line for line in good}

    def append(self, line: Mapping[str, Any]) -> None:
        self.stream.write(json.dumps(line).encode() + b"\n")
        self.stream.flush()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        self.stream.close()


@dataclass(frozen=True)
class PreparedCorpus:
    """A complete prepared folder.

    Args:
        directory: Path of the folder. It can be moved, because manifests name its own audio relative to it.
        settings: Settings of the preparation: ``corpus`` (the caller's) and ``prepare``.
        counts: Number of utterances by split.
        hours: Hours of audio by split.
        rejected: Number of utterances left out; ``rejected.csv`` has them with reasons.
        scaled: Number of utterances whose level was lowered to fit 16 bits.
        task_splits: Task → role → split, as in :class:`~audiot.data.manifests.Manifests`.
        utterances: Number of different utterances; None in a folder of an earlier version.
        total_hours: Hours of audio of all different utterances.
        content: Digest of ids, labels and audio of all splits, independent of paths; None in a folder of an earlier version.
    """

    directory: Path
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    hours: Mapping[str, float]
    rejected: int
    scaled: int
    task_splits: Mapping[str, Mapping[str, str]]
    utterances: int | None = None
    total_hours: float | None = None
    content: str | None = None

    @classmethod
    def load(cls, directory: str | Path) -> PreparedCorpus:
        """Read corpus.json of a folder.

        Raises:
            FileNotFoundError: the folder is not prepared, or not completely.
            ValueError: corpus.json is damaged or has another format version.
        """
        directory = Path(directory)
        if not _is_complete(directory):
            if (directory / "journal.jsonl").is_file():
                raise FileNotFoundError(f"{directory} is not completely prepared: run the preparation again to continue")
            raise FileNotFoundError(f"{directory} holds no prepared corpus: prepare one, or name another folder")
        content = read_json(directory / "corpus.json", "description of a prepared corpus")
        version = content.get("format_version")
        if version not in READABLE_VERSIONS:
            raise ValueError(f"{directory} has format {version}, but this audiot reads {FORMAT_VERSION}: prepare it again")
        names = ("settings", "counts", "hours", "rejected", "scaled", "task_splits")
        totals: dict[str, Any] = {name: content.get(name) for name in ("utterances", "total_hours")}
        return cls(directory, **{name: content[name] for name in names}, content=content.get("content"), **totals)

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz."""
        return self.settings["prepare"]["sample_rate"]

    def split_for(self, task: str, role: str) -> str:
        """The split that a task uses in a role: ``train``, ``valid`` or ``test``.

        Raises:
            ValueError: the corpus has no such split.
        """
        split = self.task_splits.get(task, {}).get(role, role)
        if split not in self.counts:
            there = ", ".join(self.counts)
            raise ValueError(f"{self.directory} has no split {split!r} for {role} of task {task!r}: it has {there}")
        return split

    def cuts(self, split: str) -> CutSet:
        """Cuts of a split, streamed from disk.

        Raises:
            ValueError: the corpus has no such split.
        """
        from lhotse import CutSet

        if split not in self.counts:
            raise ValueError(f"{self.directory} has no split {split!r}: it has {', '.join(self.counts)}")
        if is_sharded(self.directory):
            return located_cuts(self.directory, split)
        cuts = CutSet.from_jsonl_lazy(self.directory / f"{split}.jsonl.gz")
        # Absolute paths (of audio that is used in place) are kept.
        return cuts.with_recording_path_prefix(self.directory.absolute())

    @property
    def is_sharded(self) -> bool:
        """Whether its audio lies in shards, perhaps of a server, and not in files."""
        return is_sharded(self.directory)

    def check_files(self, what: str) -> None:
        """Refuse a corpus in shards.

        Args:
            what: What needs files, as the begin of a sentence.

        Raises:
            ValueError: its audio is not in files.
        """
        if self.is_sharded:
            raise ValueError(f"{what} audio files, but {self.directory} has its audio in shards: take the corpus they are of")

    def check_audio(self) -> None:
        """Refuse audio that is used in place and has changed since preparation.

        Raises:
            ValueError: a file was changed or is gone. A folder of format 1 has no record, so nothing is checked.
        """
        if (self.directory / SOURCES).is_file():
            used = {path: file for path, file in read_record(self.directory / SOURCES).items() if file.in_place}
            states = look(used)
            if changed := [path for path, file in used.items() if states[path] != file.state]:
                what = "is gone" if states[changed[0]] is None else "was changed"
                raise ValueError(
                    f"{self.directory} uses audio in place, but {changed[0]} {what} since preparation ({len(changed):,} of "
                    f"{len(used):,} files were changed or are gone): run audiot prepare with the same options to prepare the "
                    "difference; data.prepare.copy=true makes a corpus with its own audio"
                )


def prepare(
    manifests: Manifests | Callable[[], Manifests],
    output_dir: str | Path,
    *,
    sample_rate: int = 16000,
    channel: str | int = "average",
    min_duration_s: float = MIN_DURATION_S,
    max_duration_s: float | None = None,
    silence_dbfs: float = SILENCE_DBFS,
    copy: bool = False,
    when: str = "update",
    sources: Callable[[], Sources] | None = None,
    num_jobs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PreparedCorpus:
    """Decode every cut once to 16-bit mono WAV, and write manifests of the good ones.

    Bad audio (missing, unreadable, truncated, empty, silent, non-finite, too short or too long) is listed in rejected.csv with
    its reason and never stops the run. An interrupted run continues where it was. A complete folder is returned at once, after
    a comparison of its sources' sizes and times.
    The written bytes do not depend on ``num_jobs`` or on interruptions. Supervisions keep their times. Features and video of a
    cut are dropped. An utterance that exceeds full scale after averaging and resampling is scaled down as a whole instead of
    clipped.

    ``when`` says what happens if the sources of a complete folder have changed:

    - ``update``, the default, reports the changes and prepares them, so that an edited label takes effect in the next run. Only
      changed and added audio is decoded. The new corpus replaces the old one when it is complete. No result changes silently,
      because runs record the data that they were trained on.
    - ``check`` refuses the corpus and reports the changes.
    - ``keep`` uses the folder as it is without looking at the sources, for sources that no longer exist.

    ``update`` and ``check`` refuse a folder whose sources are all missing, as on an unmounted disk.

    Args:
        manifests: Manifests of the corpus, or a function that returns them. It is called only if there is something to do.
        output_dir: Folder for corpus.json, SPLIT.jsonl.gz, rejected.csv, audio/ and record/.
        sample_rate: Sample rate of the written audio in Hz.
        channel: ``average``, or the number of the channel to keep of multi-channel cuts.
        min_duration_s: Shortest utterance in seconds; shorter ones are rejected.
        max_duration_s: Longest utterance in seconds; longer ones are rejected. None means no limit.
        silence_dbfs: Lowest RMS; quieter utterances are rejected. A full-scale square wave has 0.
        copy: Whether to write even audio that could be used in place: whole 16-bit mono WAV files at the right rate.
        when: Treatment of changed sources: ``update``, ``check`` or ``keep``.
        sources: Function that returns the files that the corpus reads now; None: only the audio of its cuts.
        num_jobs: Worker processes; None: one per core, or none for less than an hour of audio.
        settings: Settings that made the corpus. They are recorded, and compared with those of an existing folder.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: the sources of a complete folder are missing.
        ValueError: an argument is out of range, the folder was prepared with other settings or (with ``check``) from other
            sources, two different utterances have one id, every utterance is bad, or a split is empty.
    """
    prepare_settings: dict[str, Any] = {
        "sample_rate": sample_rate,
        "channel": channel,
        "min_duration_s": min_duration_s,
        "max_duration_s": max_duration_s,
        "silence_dbfs": silence_dbfs,
        "copy": copy,
    }
    if sample_rate <= 0:
        raise ValueError(f"prepare.sample_rate must be a positive number of Hz, found {sample_rate}")
    if channel != "average" and (not isinstance(channel, int) or channel < 0):
        raise ValueError(f"prepare.channel must be 'average' or the number of a channel, found {channel!r}")
    if num_jobs is not None and num_jobs < 1:
        raise ValueError(f"prepare.num_jobs must be at least 1, found {num_jobs}")
    if when not in WHEN:
        raise ValueError(f"prepare.when must be {', '.join(WHEN[:-1])} or {WHEN[-1]}, found {when!r}")
    directory = Path(output_dir)
    # As JSON returns them, with lists for tuples.
    wanted = json.loads(json.dumps({"corpus": dict(settings or {}), "prepare": prepare_settings}, default=str))

    prepared, _ = _as_it_is(directory, wanted, when, sources)
    if prepared is not None:
        return prepared
    with closing(_Journal(directory)) as journal:
        _finish_update(directory)
        prepared, change = _as_it_is(directory, wanted, when, sources)  # checked again under the lock
        if prepared is None:
            if change:
                print(f"{directory}: {change}: preparing the difference", flush=True)
            options = _Options(directory.absolute(), **prepare_settings)
            summary = _prepare(manifests, sources, options, wanted, journal, num_jobs, progress)
            print(f"prepared {summary}: {directory}", flush=True)
            prepared = PreparedCorpus.load(directory)
        journal.remove()
    return prepared


def _prepare(
    manifests: Manifests | Callable[[], Manifests],
    sources: Callable[[], Sources] | None,
    options: _Options,
    settings: dict[str, Any],
    journal: _Journal,
    num_jobs: int | None,
    progress: bool,
) -> str:
    """Fill a folder. If it holds a complete corpus, decode the difference to ``update/`` and swap it in. Returns a summary."""
    directory = journal.directory
    work, old = directory, {}
    if _is_complete(directory):
        work = directory / "update"
        lines = read_lines(directory / RESULTS) if (directory / RESULTS).is_file() else []
        old = {line["id"]: line for line in lines if _still_holds(line, directory)}
    new = journal.read(settings, work)

    # The state before reading is recorded, so a file that changes while it is read counts as changed the next time.
    seen = {path: file for path, file in _snapshot(sources).items() if file.size is not None}
    corpus = manifests() if callable(manifests) else manifests
    _check_manifests(corpus)
    jobs = _all_jobs(corpus)
    files = _snapshot(sources) | seen
    named = [*(path for job in jobs for path in job.files), *(os.path.abspath(path) for path, _ in corpus.rejected)]
    files |= snapshot(Sources([path for path in dict.fromkeys(named) if path not in files]))
    jobs = [replace(job, states=tuple(files[path].state for path in job.files)) for job in jobs]

    digests = {job.id: job.digest() for job in jobs}
    old, new = ({id: line for id, line in lines.items() if line["job"] == digests.get(id)} for lines in (old, new))
    left = [job for job in jobs if job.id not in old and job.id not in new]
    workers = min(num_jobs or _cores(left), math.ceil(len(left) / CHUNK) or 1)
    with (
        tqdm(total=len(jobs), initial=len(jobs) - len(left), desc="prepare", unit="utt", disable=not progress) as bar,
        closing(_process_all(left, replace(options, directory=work.absolute()), workers)) as results,
    ):
        for result in results:
            journal.append(result)
            new[result["id"]] = result
            bar.update()
    _keep_only(work / "audio", {work / result["path"] for result in new.values()})
    summary = _write(corpus, [(old | new)[job.id] for job in jobs], files, directory, work, settings)
    if work == directory:
        return summary
    _finish_update(directory)
    return f"{summary}, {len(left):,} decoded anew"


def _still_holds(line: Mapping[str, Any], directory: Path) -> bool:
    """Whether a result holds while its sources are the same. Errors of permissions, memory or time may not recur."""
    return not line["reason"].startswith("unreadable") if "reason" in line else (directory / line["path"]).is_file()


def _keep_only(folder: Path, used: Collection[Path]) -> None:
    """Delete written audio in a folder that is not used. Files whose names `_file_name` cannot make are kept."""
    for inside in folder.glob("[0-9a-f][0-9a-f]"):
        if not inside.is_dir():
            continue
        for path in inside.iterdir():
            if WRITTEN.fullmatch(path.name) and path not in used and path.is_file():
                path.unlink()
        if not any(inside.iterdir()):
            inside.rmdir()


def _is_complete(directory: Path) -> bool:
    return (directory / "corpus.json").is_file()


def _snapshot(sources: Callable[[], Sources] | None) -> dict[str, File]:
    return {} if sources is None else snapshot(sources())


def _as_it_is(
    directory: Path, wanted: Mapping[str, Any], when: str, sources: Callable[[], Sources] | None
) -> tuple[PreparedCorpus | None, str]:
    """A complete folder that may be used as it is, or None; and what has changed if it may not.

    Raises:
        FileNotFoundError: the sources are missing.
        ValueError: the folder was prepared with other settings or (with ``check``) from other sources.
    """
    if not _is_complete(directory):
        return None, ""
    prepared = PreparedCorpus.load(directory)
    _check_same_settings(directory, prepared.settings, wanted)
    if when == "keep":
        return prepared, ""
    if not (directory / SOURCES).is_file():
        change: Difference | str = "an earlier audiot prepared it and recorded no sources"
    else:
        named = {value for value in _flat(wanted["corpus"]).values() if isinstance(value, str)}
        change = compare(read_record(directory / SOURCES), sources, named)
        if change.missing:
            raise FileNotFoundError(
                f"{directory} was prepared from files that are missing, {printable(change.missing[0])} first "
                f"({len(change.missing):,} in all): is a disk not mounted? data.prepare.when=keep uses the prepared corpus"
            )
        if not change:
            return prepared, ""
    if when == "check":
        raise ValueError(
            f"{directory} does not match its sources: {change}: audiot prepare with data.prepare.when=update prepares the "
            "difference, data.prepare.when=keep uses it as it was"
        )
    return None, str(change)


def _finish_update(directory: Path) -> None:
    """Replace the corpus by a complete update. It continues if it was interrupted."""
    work = directory / "update"
    if not _is_complete(work):
        return
    (directory / "corpus.json").unlink(missing_ok=True)  # it is written last
    for folder, _, names in os.walk(work):
        for name in names:
            path = Path(folder, name)
            if path != work / "corpus.json":
                target = directory / path.relative_to(work)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    for path in directory.glob("*.jsonl.gz"):
        if path.name.removesuffix(".jsonl.gz") not in PreparedCorpus.load(work).counts:
            path.unlink()
    os.replace(work / "corpus.json", directory / "corpus.json")
    shutil.rmtree(work)
    _keep_only(directory / "audio", {directory / line["path"] for line in read_lines(directory / RESULTS)})


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores(jobs: Sequence[_Job]) -> int:
    if sum(job.num_samples / job.sample_rate for job in jobs) < ALONE_S:
        return 1
    return usable_cores()


def _check_manifests(corpus: Manifests) -> None:
    for split in corpus.splits:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", split):
            raise ValueError(f"split {split!r} can't name a file: use letters, digits, '.', '_' and '-'")
    for task, roles in corpus.task_splits.items():
        for role, split in roles.items():
            if role not in ROLES or split not in corpus.splits:
                there = f"the splits are {', '.join(corpus.splits)}, the roles {', '.join(ROLES)}"
                raise ValueError(f"task {task!r} uses split {split!r} as {role!r}: {there}")


def _all_jobs(corpus: Manifests) -> list[_Job]:
    """All utterances once, in order. Splits may share utterances, but one split must not repeat any."""
    jobs: dict[str, _Job] = {}
    for split, cuts in corpus.splits.items():
        in_split: set[str] = set()
        for cut in cuts:
            job = _job(cut)
            if cut.id in in_split or jobs.setdefault(cut.id, job).digest() != job.digest():
                second = f"{job.path} in split {split!r}"
                raise ValueError(f"two utterances have the id {cut.id!r} (the second: {second}): ids must be unique")
            in_split.add(cut.id)
    return list(jobs.values())


def _prepared_cut(cut: Cut, result: Mapping[str, Any], sample_rate: int) -> Cut:
    """The cut with its new recording."""
    from lhotse import Recording
    from lhotse.audio import AudioSource
    from lhotse.cut import MonoCut
    from lhotse.utils import fastcopy

    duration = result["num_samples"] / sample_rate
    supervisions = []
    for supervision in cut.supervisions:
        if (
            supervision.alignment and cut.start
        ):  # in Lhotse, supervisions count from the cut's start, alignments from the recording's
            shifted = {name: [item.with_offset(-cut.start) for item in tier] for name, tier in supervision.alignment.items()}
            supervision = fastcopy(supervision, alignment=shifted)
        if supervision.alignment and cut.has_recording and isinstance(cut, MonoCut) and cut.duration < cut.recording.duration:
            # The cut is a window into a longer recording. Speech outside it is not in the new recording.
            inside = {
                name: [item.trim(duration) for item in tier if item.start < duration and item.end > 0]
                for name, tier in supervision.alignment.items()
            }
            supervision = fastcopy(supervision, alignment={name: tier for name, tier in inside.items() if tier} or None)
        if 0 <= supervision.start < duration < supervision.end <= cut.duration + 1e-6:
            # It ended with the cut, which is now shorter by a fraction of a sample or by a decoder's last frame.
            tiers = supervision.alignment or {}
            inside = {name: [item for item in items if item.start < duration] for name, items in tiers.items()}
            supervision = fastcopy(supervision, alignment=inside or None).trim(duration)
        supervisions.append(fastcopy(supervision, recording_id=cut.id, channel=0))
    source = AudioSource("file", [0], result["path"])
    recording = Recording(cut.id, [source], sample_rate, result["num_samples"], duration, channel_ids=[0])
    custom = getattr(cut, "custom", None) or None
    return MonoCut(cut.id, 0.0, duration, 0, supervisions, recording=recording, custom=custom)


def _write(
    corpus: Manifests,
    results: list[dict[str, Any]],
    files: Mapping[str, File],
    directory: Path,
    work: Path,
    settings: dict[str, Any],
) -> str:
    """Write manifests, rejected.csv and the record to ``work``, and last corpus.json. Returns a summary."""
    sample_rate = settings["prepare"]["sample_rate"]
    rejected = [("", printable(path), reason) for path, reason in corpus.rejected]
    rejected += [(line["id"], printable(line["path"]), line["reason"]) for line in results if "reason" in line]
    good = {result["id"]: result for result in results if "reason" not in result}
    report = work / "rejected.csv"
    with replacing_text(report) as stream:
        csv.writer(stream, lineterminator="\n").writerows([("utterance", "path", "reason"), *rejected])
    kinds = Counter(reason.split(":")[0] for _, _, reason in rejected).most_common()
    if not good:
        most = f"{kinds[0][0]} ({kinds[0][1]} of {len(rejected)}), see {report}" if kinds else "the corpus is empty"
        raise ValueError(f"no utterance can be used, most often because: {most}")

    counts, hours, digest = {}, {}, hashlib.sha256()
    for split, cuts in corpus.splits.items():
        counts[split] = num_samples = 0
        with replacing_gzip(work / f"{split}.jsonl.gz") as stream:
            for cut in cuts:
                if result := good.get(cut.id):
                    line = _prepared_cut(cut, result, sample_rate).to_dict()
                    stream.write(json.dumps(line).encode() + b"\n")  # ASCII, because Lhotse reads in the locale's encoding
                    matter = (split, cut.id, result["sha256"], line["supervisions"], line.get("custom"))
                    digest.update(json.dumps(matter).encode() + b"\n")
                    counts[split] += 1
                    num_samples += result["num_samples"]
        if counts[split] == 0:
            raise ValueError(f"split {split!r} has no utterance left: see {report}, or choose other splits")
        hours[split] = num_samples / sample_rate / 3600
    if rejected:  # after an error above, the report of an update stays in its folder
        why = ", ".join(f"{count} {kind}" for kind, count in kinds)
        print(
            f"rejected {len(rejected):,} of {len(good) + len(rejected):,} files ({why}): see {directory / report.name}",
            flush=True,
        )
    task_splits = {task: dict(roles) for task, roles in corpus.task_splits.items()}
    scaled = sum(result["scaled"] for result in good.values())
    total_hours = sum(result["num_samples"] for result in good.values()) / sample_rate / 3600
    in_place = {result["path"] for result in good.values()}
    write_record(work / SOURCES, {path: file._replace(in_place=path in in_place) for path, file in files.items()})
    with replacing_gzip(work / RESULTS) as stream:
        stream.writelines(json.dumps(result).encode() + b"\n" for result in results)
    content = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "counts": counts,
        "hours": hours,
        "rejected": len(rejected),
        "scaled": scaled,
        "task_splits": task_splits,
        "utterances": len(good),
        "total_hours": total_hours,
        "content": digest.hexdigest(),
    }
    write_json(work / "corpus.json", content)
    parts = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    lowered = f", {scaled:,} lowered in level" if scaled else ""
    return f"{len(good):,} utterances, {total_hours:.2f} h ({parts}), {len(rejected):,} rejected{lowered}"
