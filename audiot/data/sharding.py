"""Writing a prepared corpus as Lhotse Shar: tar files of FLAC, the labels beside them, and audiot's index over all of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
from tqdm import tqdm

from audiot.base.files import name_bytes, read_json, replacing, replacing_gzip, room, write_json
from audiot.data.audio import reason
from audiot.data.prepare import ALONE_S, PreparedCorpus, _Journal, start_worker, usable_cores
from audiot.data.shards import ARRAYS, FORMAT_VERSION, INDEX, Index
from audiot.data.sources import file_digest

DONE = ".done"  # folder of what is known of finished shards, while shards are written
SHARD_NAMES = ("recording.{:06d}.tar", "cuts.{:06d}.jsonl.gz")


class _Line(NamedTuple):
    """An utterance: its line in a prepared manifest, and its samples."""

    text: bytes
    num_samples: int


class _Job(NamedTuple):
    """A shard to write."""

    number: int
    key: str  # digest of all that its files depend on
    lines: list[bytes]
    source: Path
    folder: Path


def write_shards(
    corpus: PreparedCorpus, folder: Path, shard_hours: float = 1.0, num_jobs: int | None = None, progress: bool = True
) -> str:
    """Write a prepared corpus as shards: the same samples, labels, splits and content.

    The utterances of a split lie together, mixed by a hash of their ids, so that each shard is a sample of its split. A shard is
    written beside its place and renamed, and the index comes last. An interrupted run goes on after the shards that are done.
    The bytes do not depend on ``num_jobs`` or on interruptions.

    Args:
        corpus: Prepared corpus.
        folder: Folder of the shards. What another corpus left there is replaced.
        shard_hours: Hours of audio in a shard, at least one utterance.
        num_jobs: Worker processes; None: one per core, or none for less than an hour of audio.
        progress: Whether to show a progress bar.

    Returns:
        A summary in words.

    Raises:
        ValueError: the hours are not positive, or audio that is used in place has changed.
    """
    if not shard_hours > 0:
        raise ValueError(f"data.prepare.shard_hours must be a positive number of hours, found {shard_hours}")
    corpus.check_files("shards are made of")
    if corpus.content is None:
        raise ValueError(f"{corpus.directory} was prepared by an earlier audiot: prepare it anew before it is sharded")
    corpus.check_audio()
    with closing(_Journal(folder)) as journal:
        noted = {"corpus": corpus.content, "shard_hours": shard_hours}
        done = read_json(folder / INDEX, "index of shards") if (folder / INDEX).is_file() else {}
        if {name: done.get(name) for name in noted} != noted:
            (folder / INDEX).unlink(missing_ok=True)
            done = _write(corpus, folder, noted, num_jobs, progress)
        journal.remove()
    shards = done["shards"]
    size = sum(shard["recording"]["bytes"] for shard in shards)
    return f"{len(shards):,} shards, {size / 1e9:,.2f} GB of FLAC"


def _write(corpus: PreparedCorpus, folder: Path, noted: dict[str, Any], num_jobs: int | None, progress: bool) -> dict[str, Any]:
    lines, splits = _read(corpus)
    shards = _plan(lines, noted["shard_hours"] * 3600 * corpus.sample_rate)
    jobs = []
    for number, own in enumerate(shards):
        key = hashlib.sha256(json.dumps([noted, FORMAT_VERSION, number]).encode())
        for place in own:
            key.update(lines[place].text)
        texts = [lines[place].text for place in own]
        jobs.append(_Job(number, key.hexdigest(), texts, corpus.directory.absolute(), folder.absolute()))
    left = [job for job in jobs if not _is_done(job)]
    if num_jobs is None:
        num_jobs = usable_cores() if sum(line.num_samples for line in lines) > ALONE_S * corpus.sample_rate else 1
    with (
        tqdm(total=len(jobs), initial=len(jobs) - len(left), desc="shards", unit="shard", disable=not progress) as bar,
        closing(_write_all(left, min(num_jobs, len(left)))) as finished,
    ):
        for _ in finished:
            bar.update()
    written = [read_json(_done(folder, job.number), "note of a shard") for job in jobs]
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "shard", "offset", "size", "crc32", "num_samples")}
    for number, shard in enumerate(written):
        for name in columns.keys() - {"shard"}:
            columns[name] += shard["utterances"][name]
        columns["shard"] += [number] * len(shard["utterances"]["id"])
    places = {name: number for number, name in enumerate(columns["id"])}
    arrays = Index.of(columns, {split: sorted(places[name] for name in names) for split, names in splits.items()})
    Index(arrays, [shard["recording"]["bytes"] for shard in written], str(folder / ARRAYS)).save(folder / ARRAYS)
    listed = [
        {name: shard[name] for name in ("recording", "cuts", "hours")} | {"utterances": len(shard["utterances"]["id"])}
        for shard in written
    ]
    content = noted | {
        "format_version": FORMAT_VERSION,
        "sample_rate": corpus.sample_rate,
        "utterances": len(places),
        "hours": sum(line.num_samples for line in lines) / corpus.sample_rate / 3600,
        "task_splits": corpus.task_splits,
        "index": _file(folder / ARRAYS),
        "shards": listed,
    }
    write_json(folder / INDEX, content)
    _clean(folder, len(jobs))
    return content


def _read(corpus: PreparedCorpus) -> tuple[list[_Line], dict[str, list[str]]]:
    """All utterances in the order in which they are written, and the ids of each split."""
    lines: dict[str, _Line] = {}
    splits: dict[str, list[str]] = {}
    for split in corpus.counts:
        own: dict[str, _Line] = {}
        with gzip.open(corpus.directory / f"{split}.jsonl.gz", "rb") as stream:
            for text in stream:
                recording = json.loads(text)["recording"]
                own[recording["id"]] = _Line(text, recording["num_samples"])
        splits[split] = list(own)
        new = [name for name in own if name not in lines]
        lines |= {name: own[name] for name in sorted(new, key=lambda name: hashlib.sha256(name.encode()).digest())}
    return list(lines.values()), splits


def _plan(lines: Sequence[_Line], most: float) -> list[range]:
    """Places of each shard's utterances, in order, with at most so many samples unless it is a single one."""
    shards, start, samples = [], 0, 0
    for place, line in enumerate(lines):
        if samples and samples + line.num_samples > most:
            shards.append(range(start, place))
            start, samples = place, 0
        samples += line.num_samples
    return [*shards, range(start, len(lines))]


def _write_all(jobs: Sequence[_Job], num_jobs: int) -> Generator[None, None, None]:
    if num_jobs <= 1:
        yield from map(_write_shard, jobs)
        return
    pool = ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        yield from pool.map(_write_shard, jobs)
    except BrokenProcessPool:
        raise RuntimeError(
            f"a worker process ended abruptly, perhaps out of memory, while writing {jobs[0].folder}: "
            "run the command again with a smaller data.prepare.num_jobs to continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(job: _Job) -> None:
    """Write the two files of a shard, and then the note that it is done."""
    from lhotse.serialization import deserialize_item
    from lhotse.shar.utils import to_shar_placeholder
    from lhotse.shar.writers.tar import TarWriter

    recording, cuts = (job.folder / name.format(job.number) for name in SHARD_NAMES)
    found: dict[str, list[Any]] = {"id": [], "num_samples": [], "crc32": []}
    try:
        with replacing(recording) as temporary, replacing_gzip(cuts) as labels:
            with TarWriter(str(temporary), shard_size=None) as tar:
                for line in job.lines:
                    cut = deserialize_item(json.loads(line))
                    data = _flac(job.source / cut.recording.sources[0].source)
                    cut.recording = to_shar_placeholder(cut.recording)
                    tar.write(f"{cut.id}.flac", io.BytesIO(data))
                    described = json.dumps(cut.recording.to_dict()).encode()
                    tar.write(f"{cut.id}.json", io.BytesIO(described), count=False)
                    labels.write(json.dumps(cut.to_dict()).encode() + b"\n")
                    found["id"].append(cut.id)
                    found["num_samples"].append(cut.recording.num_samples)
                    found["crc32"].append(zlib.crc32(data))
            with tarfile.open(temporary, "r:") as written:
                members = [member for member in written if member.name.endswith(".flac")]
    except OSError as error:
        raise OSError(
            f"{recording} could not be written ({error}), {room(job.folder)}: the same command goes on from here"
        ) from error
    found |= {"offset": [member.offset_data for member in members], "size": [member.size for member in members]}
    hours = sum(found["num_samples"]) / cut.sampling_rate / 3600
    content = {"key": job.key, "hours": round(hours, 6), "recording": _file(recording), "cuts": _file(cuts), "utterances": found}
    write_json(_done(job.folder, job.number), content)


def _flac(path: Path) -> bytes:
    """The samples of a prepared file as FLAC, bit for bit."""
    try:
        samples, sample_rate = soundfile.read(name_bytes(path), dtype="int16")
    except soundfile.SoundFileError as error:
        raise OSError(f"{path} can't be read: {reason(error)}") from None
    stream = io.BytesIO()
    soundfile.write(stream, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}


def _done(folder: Path, number: int) -> Path:
    return folder / DONE / f"{number:06d}.json"


def _is_done(job: _Job) -> bool:
    """Whether a shard was written for the same job, and its files are as they were then."""
    if not _done(job.folder, job.number).is_file():
        return False
    found = read_json(_done(job.folder, job.number), "note of a shard")
    if found["key"] != job.key:
        return False
    files = [found[part] for part in ("recording", "cuts")]
    places = [job.folder / file["file"] for file in files]
    return all(place.is_file() and place.stat().st_size == file["bytes"] for place, file in zip(places, files, strict=True))


def _clean(folder: Path, count: int) -> None:
    """Delete the notes, shards of an earlier corpus that had more, and what killed runs left."""
    mine = {name.format(number) for number in range(count) for name in SHARD_NAMES} | {INDEX, ARRAYS}
    beginnings = ("recording.", "cuts.", ".recording.", ".cuts.", ".index.")
    for path in folder.iterdir():
        if path.name.startswith(beginnings) and path.name.endswith((".tar", ".gz", ".safetensors")) and path.name not in mine:
            path.unlink()
    for path in (folder / DONE).iterdir():
        path.unlink()
    os.rmdir(folder / DONE)
