"""Common parts of published corpora: completeness, manifests of labelled files, archives."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, islice
from pathlib import Path
from typing import NamedTuple

from lhotse import CutSet, SupervisionSegment
from lhotse.cut import Cut
from tqdm import tqdm

from audiot.data.audio import BadAudioError
from audiot.data.corpora.folder import audio_cut
from audiot.data.manifests import Manifests
from audiot.data.sources import file_digest

ROLES = {"train": "train", "valid": "valid", "test": "test"}


class Utterance(NamedTuple):
    """Audio and labels of an utterance.

    Args:
        path: Path of the audio file.
        speaker: Name of the speaker.
        text: Spoken text.
        custom: Other labels.
        piece: First sample and number of samples, if the utterance is a part of the file.
        language: Language of the text; None if it is not known.
    """

    path: Path
    speaker: str | None = None
    text: str | None = None
    custom: Mapping[str, str] | None = None
    piece: tuple[int, int] | None = None
    language: str | None = "English"

    def cut(self, name: str) -> Cut:
        """The labelled cut with this id.

        Raises:
            BadAudioError: the file cannot be used.
        """
        cut = audio_cut(self.path, name)
        if self.piece is not None:
            rate = cut.sampling_rate
            cut = cut.truncate(offset=self.piece[0] / rate, duration=self.piece[1] / rate, preserve_id=True)
        labels = dict(self.custom) if self.custom else None
        cut.supervisions = [
            SupervisionSegment(name, name, 0.0, cut.duration, cut.channel, self.text, self.language, self.speaker, custom=labels)
        ]
        return cut


def check_complete(
    corpus: str, where: str | Path, count: int, expected: int, missing: Iterable[str], remedy: str, partial: bool
) -> None:
    """Refuse a corpus with missing files, unless ``partial`` allows them.

    Args:
        corpus: Name of the corpus.
        where: Folder that was searched.
        count: Number of missing recordings.
        expected: Number of recordings of a complete corpus.
        missing: Missing files. The first few are named.
        remedy: Advice for getting them.
        partial: Whether files may be missing. They are then reported.

    Raises:
        FileNotFoundError: files are missing and ``partial`` is False.
    """
    if not count:
        return
    first = list(islice(missing, 6))
    names = ", ".join([*first[:5], "…"] if first[5:] else first)
    lack = f"{corpus}: {count:,} of {expected:,} recordings are missing in {where} ({names})"
    if not partial:
        raise FileNotFoundError(f"{lack}: {remedy}; data.partial=true accepts an incomplete tree")
    print(f"{lack}; data.partial=true continues with the others", flush=True)


def labelled_manifests(
    corpus: str,
    splits: Mapping[str, Mapping[str, Utterance]],
    task_splits: Mapping[str, Mapping[str, str]],
    rejected: Iterable[tuple[str, str]],
    progress: bool,
) -> Manifests:
    """Manifests of a corpus, made from the headers of its files. Empty splits are left out.

    Args:
        corpus: Name of the corpus.
        splits: Utterances by split and id. An utterance may be in several splits, but not of one task.
        task_splits: Splits of each task, as in :class:`audiot.data.manifests.Manifests`.
        rejected: Path and reason of files that were left out before.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: an utterance is in two splits of a task.
    """
    splits = {split: utterances for split, utterances in splits.items() if utterances}
    tasks = {task: {role: split for role, split in roles.items() if split in splits} for task, roles in task_splits.items()}
    for task, roles in tasks.items():
        for first, second in combinations(roles.values(), 2):
            if shared := splits[first].keys() & splits[second].keys():
                raise ValueError(
                    f"{corpus}: {min(shared)} is in both {first} and {second} of task {task!r} ({len(shared):,} utterances are): "
                    "a test on training data is meaningless; correct the lists of the splits"
                )
    utterances = {name: utterance for split in splits.values() for name, utterance in split.items()}
    cuts: dict[str, Cut] = {}
    rejected = list(rejected)
    with ThreadPoolExecutor(16) as pool:  # reading headers mostly waits for disks
        read = pool.map(_read, utterances.items())
        bar = tqdm(read, total=len(utterances), desc="read headers", unit="utt", disable=not progress)
        for (name, utterance), found in zip(utterances.items(), bar, strict=True):
            if isinstance(found, BadAudioError):
                rejected.append((str(utterance.path), str(found)))
            else:
                cuts[name] = found
    if not cuts:  # preparation reports the error
        return Manifests({}, rejected=rejected)
    found_splits = {split: CutSet.from_cuts(cuts[name] for name in names if name in cuts) for split, names in splits.items()}
    return Manifests(found_splits, {task: roles for task, roles in tasks.items() if roles}, rejected)


def _read(item: tuple[str, Utterance]) -> Cut | BadAudioError:
    name, utterance = item
    try:
        return utterance.cut(name)
    except BadAudioError as error:
        return error


def check_sha256(path: Path, published: str) -> None:
    """Refuse a file that differs from the published one.

    Raises:
        ValueError: the file differs. The message has its path.
    """
    if (found := file_digest(path)) != published:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}, expected {published}: delete it and run again")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a gzipped tar archive into a new folder. Remains of an interrupted run are replaced.

    Raises:
        ValueError: the archive is damaged.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it and run again") from error
