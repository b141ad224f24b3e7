"""Preparation: decode a corpus once into validated 16-bit mono WAV, with Lhotse manifests beside it."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import soundfile
from tqdm import tqdm

from audiot.data.audio import (
    MIN_DURATION_S,
    SHORTFALL_S,
    SILENCE_DBFS,
    AudioFile,
    BadAudioError,
    check_duration,
    check_sound,
    reason,
    resample,
)
from audiot.files import name_text, printable, read_json, replacing_gzip, replacing_text, write_json

if TYPE_CHECKING:  # Lhotse brings PyTorch, which a worker that decodes WAV or FLAC has no use for
    from lhotse import CutSet
    from lhotse.cut import Cut

    from audiot.data.manifests import Manifests

FORMAT_VERSION = 1
ROLES = ("train", "valid", "test")
CHUNK = 16  # utterances sent to a worker at a time
ALONE_S = 3600  # less audio than that is decoded sooner than worker processes start


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
    """One utterance to decode: a piece of a file, or a cut that only Lhotse can read (mixed, transformed, …)."""

    id: str
    path: str
    sample_rate: int
    start: int
    num_samples: int
    channels: tuple[int, ...]
    file_samples: int = 0  # of the whole file, as the manifest has it
    cut: Cut | None = None

    def digest(self) -> str:
        """Names what is decoded, so that a resumed run notices another piece under the same id."""
        parts = (self.id, self.path, self.sample_rate, self.start, self.num_samples, self.channels)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


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
                raise ValueError(f"utterance {cut.id} has channel {min(missing)}, its recording {source.channels}")
            channels = [source.channels.index(channel) for channel in channels]  # a source may number them as it likes
    return _Job(cut.id, path, cut.sampling_rate, start, cut.num_samples, tuple(channels), file_samples, cut_to_load)


def _decode(job: _Job, channel: str | int) -> tuple[np.ndarray, bool]:
    """Samples (N,) of the job in float32, and whether its file is 16-bit mono WAV that holds nothing else."""
    if job.cut is not None:
        try:
            samples = job.cut.load_audio().T
        except Exception as error:  # whatever a decoder, a command or a server may answer: it is the reason
            raise BadAudioError(f"unreadable: {reason(error)}") from None
        with np.errstate(invalid="ignore"):  # infinities that cancel make a NaN, which is refused later
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
    """Samples (N,) of a cut in float32, the average of its channels, decoded as for preparation.

    Raises:
        BadAudioError: they can't be used; the message is the reason.
    """
    return _decode(_job(cut), "average")[0]


def _chosen(job: _Job, channel: str | int) -> list[int]:
    """Which of the job's channels are averaged."""
    if channel == "average" or len(job.channels) == 1:
        return list(range(len(job.channels)))
    if channel not in job.channels:
        raise BadAudioError(f"no channel {channel}: it has {', '.join(map(str, job.channels))}")
    return [job.channels.index(int(channel))]


def _to_16_bit(mono: np.ndarray) -> tuple[np.ndarray, bool]:
    """Rounded to 16 bits, no dither; audio past full scale is scaled down as a whole: clipping would distort it."""
    scaled = mono.astype(np.float64) * 32768
    too_loud = bool(scaled.max() >= 32767.5 or scaled.min() < -32768.5)
    if too_loud:
        scaled *= 32767 / np.abs(scaled).max()
    return np.rint(scaled).astype(np.int16), too_loud


def _file_name(utterance: str) -> str:
    """A name that every file system takes, inside 256 folders; the digest keeps apart what the clean-up makes equal."""
    digest = hashlib.sha256(utterance.encode()).hexdigest()
    return f"audio/{digest[:2]}/{re.sub(r'[^A-Za-z0-9._-]+', '_', utterance)[-80:]}-{digest[2:12]}.wav"


def _process(job: _Job, options: _Options) -> dict[str, Any]:
    """Decode, check and write one utterance; what the journal keeps of it."""
    try:
        limits = options.min_duration_s, options.max_duration_s
        check_duration(job.num_samples, job.sample_rate, *limits)  # before an hours-long file is read
        mono, is_plain = _decode(job, options.channel)
        check_duration(len(mono), job.sample_rate, *limits)
        check_sound(mono, options.silence_dbfs)
        # A path that is not UTF-8 can't be written to a manifest.
        can_stay = is_plain and job.sample_rate == options.sample_rate and printable(job.path) == job.path
        if can_stay and not options.copy:
            return {"id": job.id, "job": job.digest(), "path": job.path, "num_samples": len(mono), "scaled": False}
        samples_16, scaled = _to_16_bit(resample(mono, job.sample_rate, options.sample_rate))
    except BadAudioError as error:
        return {"id": job.id, "job": job.digest(), "path": job.path, "reason": str(error)}
    name = _file_name(job.id)
    path = options.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same temporary name, so that an interrupted run leaves nothing that the next one doesn't overwrite.
    temporary = path.with_name(f".{path.name}")
    soundfile.write(temporary, samples_16, options.sample_rate, subtype="PCM_16", format="WAV")
    os.replace(temporary, path)
    return {"id": job.id, "job": job.digest(), "path": name, "num_samples": len(samples_16), "scaled": scaled}


def _process_chunk(jobs: list[_Job], options: _Options) -> list[dict[str, Any]]:
    return [_process(job, options) for job in jobs]


def start_worker() -> None:
    """What a process of a pool begins with: Ctrl-C is for its parent, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    # A killed parent can't stop its workers, and they would write beside the run that resumes.
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for_any([sentinel])
    os._exit(1)


def _process_all(jobs: Iterable[_Job], options: _Options, num_jobs: int) -> Generator[dict[str, Any], None, None]:
    """Results in the order in which they get ready."""
    if num_jobs == 1:
        yield from (_process(job, options) for job in jobs)
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
            f"a worker process ended abruptly, out of memory perhaps, while preparing {options.directory}: "
            "run the command again to go on, with a smaller num_jobs"
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
                "choose another folder, or delete this one to prepare it anew"
            )


class _Journal:
    """What is done so far, a JSON line an utterance, for an interrupted run to go on from; also the folder's lock."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "journal.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self.stream: IO[bytes] = open(self.path, "a+b")  # noqa: SIM115 (closed by `close`)
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process prepares {directory}: waiting for it", flush=True)
            fcntl.flock(self.stream, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            print(f"{directory} can't be locked ({error.strerror}): see that only one process prepares it", flush=True)

    def read(self, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Utterance → result, of those whose audio is there. A rejected one is tried again: its file may be mended."""
        self.stream.seek(0)
        content = self.stream.read()
        whole = content[: content.rfind(b"\n") + 1]  # a killed run may have left half a line
        header, *lines = [json.loads(line) for line in whole.splitlines()] or [{}]
        good = [line for line in lines if "reason" not in line and (self.directory / line["path"]).is_file()]
        if good:
            if header["format_version"] != FORMAT_VERSION:
                raise ValueError(f"{self.path} is of format {header['format_version']}: delete it to prepare anew")
            _check_same_settings(self.directory, header["settings"], settings)
            self.stream.truncate(len(whole))
        else:  # nothing worth keeping, so that wrong settings can be put right
            self.stream.truncate(0)
            self.append({"format_version": FORMAT_VERSION, "settings": settings})
        return {line["id"]: line for line in good}

    def append(self, line: Mapping[str, Any]) -> None:
        self.stream.write(json.dumps(line).encode() + b"\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


@dataclass(frozen=True)
class PreparedCorpus:
    """A prepared folder, complete.

    Args:
        directory: Where it lies. It can be moved: the manifests name its own audio relative to it.
        settings: What it was prepared with: ``corpus`` (the caller's) and ``prepare``.
        counts: Split → utterances.
        hours: Split → hours of audio.
        rejected: Utterances left out; ``rejected.csv`` says which and why.
        scaled: Utterances whose level was lowered to fit 16 bits.
        task_splits: Task → role → split, as in :class:`~audiot.data.manifests.Manifests`.
        utterances: How many there are in all, each counted once; None in a folder of an earlier version.
        total_hours: Of all of them.
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

    @classmethod
    def load(cls, directory: str | Path) -> PreparedCorpus:
        """Read a folder's corpus.json.

        Raises:
            FileNotFoundError: nothing was prepared there, or not to the end.
            ValueError: corpus.json is broken, or of another version of the format.
        """
        directory = Path(directory)
        if not (directory / "corpus.json").is_file():
            if (directory / "journal.jsonl").is_file():
                raise FileNotFoundError(f"{directory} is not prepared to the end: run the preparation again to go on")
            raise FileNotFoundError(f"{directory} holds no prepared corpus: prepare one, or name another folder")
        content = read_json(directory / "corpus.json", "description of a prepared corpus")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{directory} is of format {version}, this audiot reads {FORMAT_VERSION}: prepare it anew")
        names = ("settings", "counts", "hours", "rejected", "scaled", "task_splits")
        totals: dict[str, Any] = {name: content.get(name) for name in ("utterances", "total_hours")}
        return cls(directory, **{name: content[name] for name in names}, **totals)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.settings["prepare"]["sample_rate"]

    def split_for(self, task: str, role: str) -> str:
        """The split that a task uses as ``train``, ``valid`` or ``test``.

        Raises:
            ValueError: the corpus has no such split.
        """
        split = self.task_splits.get(task, {}).get(role, role)
        if split not in self.counts:
            there = ", ".join(self.counts)
            raise ValueError(f"{self.directory} has no split {split!r} for {role} of task {task!r}: it has {there}")
        return split

    def cuts(self, split: str) -> CutSet:
        """Cuts of a split, read from disk as they are iterated.

        Raises:
            ValueError: the corpus has no such split.
        """
        from lhotse import CutSet

        if split not in self.counts:
            raise ValueError(f"{self.directory} has no split {split!r}: it has {', '.join(self.counts)}")
        cuts = CutSet.from_jsonl_lazy(self.directory / f"{split}.jsonl.gz")
        # Absolute paths (of audio that was good as it lay) stay what they are.
        return cuts.with_recording_path_prefix(self.directory.absolute())


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
    num_jobs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PreparedCorpus:
    """Decode every cut once into 16-bit mono WAV, and write manifests of what is good.

    Bad audio (missing, unreadable, truncated, empty, silent, non-finite, too short or long) goes to rejected.csv with
    its reason and never stops the run. An interrupted run goes on where it was; a complete folder is returned at once.
    The bytes written do not depend on ``num_jobs`` or on interruptions. Supervisions keep their times; features and
    video of a cut are not carried over. An utterance that exceeds full scale after averaging and resampling is scaled
    down as a whole rather than clipped.

    Args:
        manifests: Of the corpus, or a function that returns them, called only when there is something to do.
        output_dir: Gets corpus.json, SPLIT.jsonl.gz, rejected.csv and audio/.
        sample_rate: Hz of the audio written.
        channel: ``average``, or the number of the channel to keep of cuts with several.
        min_duration_s: Shorter utterances are rejected.
        max_duration_s: Longer ones too, unless None.
        silence_dbfs: So is one with an RMS below this; a full-scale square wave has 0.
        copy: Also write audio that could be used where it lies: whole 16-bit mono WAV files of the right rate.
        num_jobs: Worker processes; None: one a core, or none for less than an hour of audio.
        settings: What the corpus was made with; recorded, and compared when the folder is there already.
        progress: Show a bar.

    Raises:
        ValueError: an argument is out of range, the folder was prepared with other settings, two different utterances
            have one id, every utterance is bad, or a split has none left.
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
    directory = Path(output_dir)
    # As JSON will give them back, tuples as lists.
    wanted = json.loads(json.dumps({"corpus": dict(settings or {}), "prepare": prepare_settings}, default=str))

    if (directory / "corpus.json").is_file():
        return _load_same(directory, wanted)
    journal = _Journal(directory)
    try:
        if (directory / "corpus.json").is_file():  # by the process that we waited for
            journal.path.unlink(missing_ok=True)
            return _load_same(directory, wanted)
        done = journal.read(wanted)
        corpus = manifests() if callable(manifests) else manifests
        _check_manifests(corpus)
        jobs = _all_jobs(corpus)
        digests = {job.id: job.digest() for job in jobs}
        results = {id: result for id, result in done.items() if result["job"] == digests.get(id)}
        options = _Options(directory.absolute(), **prepare_settings)
        left = [job for job in jobs if job.id not in results]
        workers = min(num_jobs or _cores(left), math.ceil(len(left) / CHUNK) or 1)
        with (
            tqdm(total=len(jobs), initial=len(results), desc="prepare", unit="utt", disable=not progress) as bar,
            closing(_process_all(left, options, workers)) as new_results,
        ):
            for result in new_results:
                journal.append(result)
                results[result["id"]] = result
                bar.update()
        prepared = _write(corpus, [results[job.id] for job in jobs], directory, wanted)
        journal.path.unlink()
    finally:
        journal.close()
    return prepared


def _cores(jobs: Sequence[_Job]) -> int:
    if sum(job.num_samples / job.sample_rate for job in jobs) < ALONE_S:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_same(directory: Path, settings: Mapping[str, Any]) -> PreparedCorpus:
    prepared = PreparedCorpus.load(directory)
    _check_same_settings(directory, prepared.settings, settings)
    return prepared


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
    """Every utterance once, in order; a split may share utterances with another, but not repeat its own."""
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
    """The cut over its new recording."""
    from lhotse import Recording
    from lhotse.audio import AudioSource
    from lhotse.cut import MonoCut
    from lhotse.utils import fastcopy

    duration = result["num_samples"] / sample_rate
    supervisions = []
    for supervision in cut.supervisions:
        if supervision.alignment and cut.start:  # Lhotse counts a supervision's time from the cut's start, an alignment's not
            shifted = {name: [item.with_offset(-cut.start) for item in tier] for name, tier in supervision.alignment.items()}
            supervision = fastcopy(supervision, alignment=shifted)
        if supervision.alignment and cut.has_recording and isinstance(cut, MonoCut) and cut.duration < cut.recording.duration:
            # A window into a longer recording: what is said before and behind it is not in the new one.
            heard = {
                name: [item.trim(duration) for item in tier if item.start < duration and item.end > 0]
                for name, tier in supervision.alignment.items()
            }
            supervision = fastcopy(supervision, alignment={name: tier for name, tier in heard.items() if tier} or None)
        if 0 <= supervision.start < duration < supervision.end <= cut.duration + 1e-6:
            # It ended with the cut, which is a fraction of a sample shorter now, or a decoder's last frame.
            tiers = supervision.alignment or {}
            inside = {name: [item for item in items if item.start < duration] for name, items in tiers.items()}
            supervision = fastcopy(supervision, alignment=inside or None).trim(duration)
        supervisions.append(fastcopy(supervision, recording_id=cut.id, channel=0))
    source = AudioSource("file", [0], result["path"])
    recording = Recording(cut.id, [source], sample_rate, result["num_samples"], duration, channel_ids=[0])
    custom = getattr(cut, "custom", None) or None
    return MonoCut(cut.id, 0.0, duration, 0, supervisions, recording=recording, custom=custom)


def _write(corpus: Manifests, results: list[dict[str, Any]], directory: Path, settings: dict[str, Any]) -> PreparedCorpus:
    """Manifests and rejected.csv, then corpus.json, which makes the folder complete."""
    sample_rate = settings["prepare"]["sample_rate"]
    rejected = [("", printable(path), reason) for path, reason in corpus.rejected]
    rejected += [(line["id"], printable(line["path"]), line["reason"]) for line in results if "reason" in line]
    good = {result["id"]: result for result in results if "reason" not in result}
    report = directory / "rejected.csv"
    with replacing_text(report) as stream:
        csv.writer(stream, lineterminator="\n").writerows([("utterance", "path", "reason"), *rejected])
    kinds = Counter(reason.split(":")[0] for _, _, reason in rejected).most_common()
    if rejected:
        why = ", ".join(f"{count} {kind}" for kind, count in kinds)
        print(f"rejected {len(rejected):,} of {len(good) + len(rejected):,} files ({why}): see {report}", flush=True)
    if not good:
        most = f"{kinds[0][0]} ({kinds[0][1]} of {len(rejected)}), see {report}" if kinds else "the corpus has none"
        raise ValueError(f"no utterance can be used, most often because: {most}")

    counts, hours = {}, {}
    for split, cuts in corpus.splits.items():
        counts[split] = num_samples = 0
        with replacing_gzip(directory / f"{split}.jsonl.gz") as stream:
            for cut in cuts:
                if result := good.get(cut.id):
                    # In ASCII, as Lhotse reads text in the encoding of the locale.
                    line = json.dumps(_prepared_cut(cut, result, sample_rate).to_dict())
                    stream.write(line.encode() + b"\n")
                    counts[split] += 1
                    num_samples += result["num_samples"]
        if counts[split] == 0:
            raise ValueError(f"split {split!r} has no utterance left: see {report}, or choose other splits")
        hours[split] = num_samples / sample_rate / 3600
    task_splits = {task: dict(roles) for task, roles in corpus.task_splits.items()}
    scaled = sum(result["scaled"] for result in good.values())
    total_hours = sum(result["num_samples"] for result in good.values()) / sample_rate / 3600
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
    }
    write_json(directory / "corpus.json", content)
    parts = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    lowered = f", {scaled:,} lowered in level" if scaled else ""
    summary = f"{len(good):,} utterances, {total_hours:.2f} h ({parts}), {len(rejected):,} rejected{lowered}"
    print(f"prepared {summary}: {directory}", flush=True)
    return PreparedCorpus.load(directory)
