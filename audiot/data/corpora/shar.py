"""Corpora in shards: Lhotse Shar with audiot's index, in a folder, on a web server or in an object store."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from audiot.base.files import read_json, replacing, write_json
from audiot.data.manifests import Manifests
from audiot.data.prepare import ROLES, PreparedCorpus, _Journal
from audiot.data.shards import ARRAYS, FORMAT_VERSION, INDEX, SHARDS, Index, checked, file_of, files_of, is_count, open_shards
from audiot.data.sources import Sources
from audiot.data.storage import MissingError, Storage


class SharCorpus:
    """Shards that `audiot.data.sharding.write_shards` wrote. They are streamed, so there is nothing to prepare.

    Args:
        root: Folder of the shards: a path, ``http(s)://…`` or ``s3://…``.
        sample_rate: Sample rate in Hz that the features need.
        verify: Whether to read all shards and compare their SHA-256 when the corpus is opened.
    """

    def __init__(self, root: str | Path, sample_rate: int = 16000, verify: bool = False) -> None:
        self.storage = Storage(root)
        self.sample_rate = sample_rate
        self.verify = verify

    def manifests(self) -> Manifests:
        """Refuse, since nothing is decoded anew.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"data=shar: the corpus in {self.storage.root} is prepared already; only its shards are streamed")

    def sources(self) -> Sources:
        """No files: the index says what has changed."""
        return Sources()

    def open(self, directory: Path, settings: Mapping[str, Any], when: str = "update") -> PreparedCorpus:
        """Bring the index to a local folder, unless it is there.

        Args:
            directory: Local folder of the corpus.
            settings: Settings of the corpus, which are recorded.
            when: Treatment of shards that have changed since: ``update``, ``check`` or ``keep``, as in `prepare`.

        Raises:
            StorageError: a file is missing, damaged, or can't be read.
            ValueError: the index is damaged, has another sample rate, or (with ``check``) has changed.
        """
        with opening(directory):
            return self._open(directory, settings, when)

    def _open(self, directory: Path, settings: Mapping[str, Any], when: str) -> PreparedCorpus:
        complete = (directory / "corpus.json").is_file()
        if complete and when == "keep":
            return PreparedCorpus.load(directory)
        try:
            data = self.storage.read(INDEX)
        except MissingError as error:
            raise MissingError(f"{error} (data=webdataset reads tar files without an index)") from None
        digest = hashlib.sha256(data).hexdigest()
        known = read_json(directory / SHARDS, "list of shards").get("digest") if complete else None
        if known != digest:
            if known is not None and when == "check":
                raise ValueError(
                    f"the shards in {self.storage.root} have changed since {directory} was opened: audiot prepare opens them "
                    "anew, data.prepare.when=keep uses the index as it was"
                )
            self._fetch(data, digest, directory, settings)
        open_shards(directory.absolute()).check(self.verify)
        return PreparedCorpus.load(directory)

    def _fetch(self, data: bytes, digest: str, directory: Path, settings: Mapping[str, Any]) -> None:
        place = self.storage.place(INDEX)
        content = self._parsed(data, place)
        recordings, _ = files_of(content, place)
        arrays = file_of(content.get("index"), place)
        for name in ("corpus.json", SHARDS):
            (directory / name).unlink(missing_ok=True)
        for path in directory.glob("*.jsonl.gz"):
            path.unlink()
        shutil.rmtree(directory / "cuts", ignore_errors=True)
        with replacing(directory / ARRAYS) as temporary:
            temporary.write_bytes(checked(self.storage, arrays))
        index = Index.read(directory / ARRAYS, [file.size for file in recordings])
        note_shards(directory, self.storage, self.sample_rate, digest, content["shards"])
        write_corpus(directory, index, self.sample_rate, settings, checked_tasks(content, index, place), content.get("corpus"))

    def _parsed(self, data: bytes, place: str) -> dict[str, Any]:
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is no index of shards: {error}") from None
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            version = content.get("format_version") if isinstance(content, dict) else None
            raise ValueError(f"{place} has format {version!r}, but this audiot reads {FORMAT_VERSION}: write the shards anew")
        rate = content.get("sample_rate")
        if not is_count(rate) or not re.fullmatch("[0-9a-f]{64}", str(content.get("corpus"))):
            raise ValueError(f"{place} is damaged (sample_rate or corpus): write the shards anew")
        if rate != self.sample_rate:
            raise ValueError(
                f"{self.storage.root} holds audio at {rate} Hz and data.prepare.sample_rate is {self.sample_rate}: set "
                f"features.sample_rate={rate}, or shard the corpus at {self.sample_rate} Hz"
            )
        return content


def leave_no_empty_folder(directory: Path) -> None:
    """Delete a folder in which nothing is, as of a corpus that could not be opened."""
    with suppress(OSError):  # something is in it
        directory.rmdir()


@contextmanager
def opening(directory: Path) -> Iterator[None]:
    """Around the opening of a corpus in a local folder, which one process does at a time."""
    with closing(_Journal(directory)) as journal:
        try:
            yield
        finally:
            journal.remove()
            leave_no_empty_folder(directory)


def note_shards(directory: Path, storage: Storage, sample_rate: int, digest: str, shards: Any) -> None:
    """Write which shards an opened corpus has.

    Args:
        directory: Its local folder.
        storage: Where they are.
        sample_rate: Sample rate in Hz.
        digest: What it is known by that they have changed.
        shards: Names and sizes of their files.
    """
    root = str(Path(storage.root).absolute()) if storage.is_local else storage.root
    write_json(directory / SHARDS, {"root": root, "sample_rate": sample_rate, "digest": digest, "shards": shards})
    open_shards.cache_clear()


def checked_tasks(content: Mapping[str, Any], index: Index, place: str) -> dict[str, dict[str, str]]:
    """Splits of each task that an index names.

    Raises:
        ValueError: it names other roles, or splits that it has not.
    """
    tasks = content.get("task_splits")
    good = isinstance(tasks, dict) and all(
        isinstance(roles, dict) and all(role in ROLES and split in index.splits for role, split in roles.items())
        for roles in tasks.values()
    )
    if not good:
        raise ValueError(f"{place} is damaged (task_splits): write the shards anew")
    return {task: dict(roles) for task, roles in tasks.items()}  # type: ignore[union-attr]


def write_corpus(
    directory: Path,
    index: Index,
    sample_rate: int,
    settings: Mapping[str, Any],
    task_splits: Mapping[str, Mapping[str, str]],
    content: Any,
) -> None:
    """Write the corpus.json of an opened corpus, which comes last."""
    samples = index.arrays["num_samples"]
    order = ("train", "valid", "test")
    splits = sorted(index.splits, key=lambda split: (order.index(split) if split in order else len(order), split))
    hours = {split: float(samples[index.splits[split]].sum(dtype="int64")) / sample_rate / 3600 for split in splits}
    write_json(
        directory / "corpus.json",
        {
            "format_version": 2,
            "settings": {"corpus": dict(settings), "prepare": {"sample_rate": sample_rate}},
            "counts": {split: len(index.splits[split]) for split in splits},
            "hours": hours,
            "rejected": 0,
            "scaled": 0,
            "task_splits": task_splits,
            "utterances": len(index),
            "total_hours": float(samples.sum(dtype="int64")) / sample_rate / 3600,
            "content": content,
        },
    )
