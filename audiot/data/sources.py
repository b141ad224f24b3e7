"""The source files of a prepared corpus, as they were, and how they have changed since."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from audiot.base.files import name_bytes, printable, replacing_gzip

if TYPE_CHECKING:
    from audiot.data.manifests import Manifests

AT_A_TIME = 256  # files that a thread checks at a time; on a network disk each takes a while
NAMED = 3  # edited tables that are named; more are counted


@dataclass(frozen=True)
class Sources:
    """Files that a corpus reads, if they exist now.

    Args:
        audio: Recordings, compared by size and modification time.
        texts: Tables, lists, manifests, transcripts and alignments, compared by content.
    """

    audio: Collection[str | Path] = ()
    texts: Collection[str | Path] = ()


class Corpus(Protocol):
    """Interface of a corpus. Its arguments are in ``conf/data``. Arguments that are paths have a type that names ``Path``."""

    def manifests(self) -> Manifests:
        """The cuts. Missing data is downloaded or made, if the corpus can."""

    def sources(self) -> Sources:
        """The files that `manifests` reads. Files that only the cuts name may be left out. Nothing is downloaded or made."""


class File(NamedTuple):
    """State of a file when it was recorded.

    Args:
        size: Size in bytes; None: the file did not exist.
        mtime_ns: Modification time in nanoseconds since 1970.
        sha256: Digest of a text file; None for audio.
        in_place: Whether a prepared manifest refers to the file itself instead of a copy.
    """

    size: int | None
    mtime_ns: int = 0
    sha256: str | None = None
    in_place: bool = False

    @property
    def state(self) -> tuple[int, int] | None:
        """Size and modification time of a file that existed."""
        return None if self.size is None else (self.size, self.mtime_ns)


def places(corpus: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Absolute, resolved values of a corpus's arguments whose types name ``Path``. Null gives the default."""
    found = {}
    for name, parameter in inspect.signature(corpus).parameters.items():
        value = arguments.get(name)
        if value is None and parameter.default is not parameter.empty:
            value = parameter.default
        if value is not None and re.search(r"\bPath\b", str(parameter.annotation)):
            found[name] = _resolved(value) if isinstance(value, (str, Path)) else [_resolved(place) for place in value]
    return found


def _resolved(place: str | Path) -> str:
    if "://" in str(place):  # an address
        return str(place)
    return os.path.realpath(os.path.abspath(place))  # abspath first, so that a/../b is b even if a is a link


def is_prepared(names: Iterable[str] | Iterable[bytes]) -> bool:
    """Whether these names mark a folder as a prepared corpus, complete or not. It is then not a source of the tree around it."""
    there = set(map(os.fsdecode, names))
    return {"corpus.json", "rejected.csv"} <= there or "journal.jsonl" in there


def files_below(folder: str | Path, *suffixes: str) -> list[str]:
    """Sorted paths of files below a folder that have one of the suffixes.

    Names that begin with a dot and prepared corpora below the folder are skipped.
    """
    seen: set[tuple[int, int]] = set()

    def walk(place: str) -> Iterator[str]:
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            return
        is_top = not seen
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(place) as found:
            entries = list(found)
        if not is_top and is_prepared(entry.name for entry in entries):
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.endswith(suffixes):
                yield entry.path
            elif entry.is_dir():
                yield from walk(entry.path)

    return sorted(walk(os.path.abspath(folder))) if os.path.isdir(folder) else []


def snapshot(sources: Sources) -> dict[str, File]:
    """Current state of each source, by absolute path."""
    audio, texts = _absolute(sources.audio), _absolute(sources.texts)
    states = look([*audio, *texts])
    there = [path for path in texts if states[path]]
    with ThreadPoolExecutor(16) as pool:  # reading small files mostly waits for disks
        digests = dict(zip(there, pool.map(file_digest, there), strict=True))
    return {path: File(*state, digests.get(path)) if state else File(None) for path, state in states.items()}


def _absolute(paths: Iterable[str | Path]) -> list[str]:
    return [os.path.abspath(path) for path in paths]


def look(paths: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    """Size and modification time in nanoseconds of each path; None where there is no file."""
    paths = list(paths)
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(_look, (paths[at : at + AT_A_TIME] for at in range(0, len(paths), AT_A_TIME)))
        return dict(zip(paths, chain.from_iterable(parts), strict=True))


def _look(paths: list[str]) -> list[tuple[int, int] | None]:
    return [_state(path) for path in paths]


def _state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(name_bytes(path))
    except (OSError, ValueError):  # ValueError: an impossible file name
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(name_bytes(path), "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_record(path: Path, files: Mapping[str, File]) -> None:
    """Write the states of files, one JSON object per line."""
    with replacing_gzip(path) as stream:
        for name, file in files.items():
            line = {key: value for key, value in file._asdict().items() if value is not None and value is not False}
            stream.write(json.dumps({"path": name, **line}).encode() + b"\n")


def read_record(path: Path) -> dict[str, File]:
    """Read what `write_record` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    return {line.pop("path"): File(line.pop("size", None), **line) for line in read_lines(path)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of gzipped JSON lines.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
    """
    try:
        with gzip.open(path, "rb") as stream:
            return [json.loads(line) for line in stream]
    except (EOFError, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete the prepared folder to prepare it again") from error


@dataclass
class Difference:
    """Changes of the sources: paths of audio and of texts that were changed, added or removed."""

    audio: dict[str, list[str]] = field(default_factory=lambda: {"changed": [], "added": [], "removed": []})
    texts: dict[str, list[str]] = field(default_factory=lambda: {"edited": [], "added": [], "removed": []})
    missing: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(chain(self.audio.values(), self.texts.values()))

    def __str__(self) -> str:
        """Summary such as: 3 files changed, 2 added, 1 removed, labels.csv edited; first: /corpora/a.wav."""
        parts: list[str] = []
        for kind, paths in self.audio.items():
            if paths:
                files = "" if parts else "file " if len(paths) == 1 else "files "
                parts.append(f"{len(paths):,} {files}{kind}")
        for kind, paths in self.texts.items():
            names = [os.path.basename(path) for path in paths[:NAMED]] if len(paths) <= NAMED else [f"{len(paths):,} tables"]
            parts += [f"{name} {kind}" for name in names]
        first = next(path for paths in chain(self.audio.values(), self.texts.values()) for path in paths)
        return printable(f"{', '.join(parts)}; first: {first}")


def compare(recorded: Mapping[str, File], sources: Callable[[], Sources] | None, named: Collection[str] = ()) -> Difference:
    """Changes of files since they were recorded. A text counts as edited if its content differs.

    Args:
        recorded: State of each file by path.
        sources: Function that returns the files that the corpus would read now. It is called only if no recorded file is
            missing; None means the same files.
        named: Places that the settings name. A recorded file that is gone from one of them is ``missing``. So is all audio if
            none is left, because an unmounted disk is not an edit.
    """
    states = look(recorded)
    found = Difference()
    audio = [path for path, file in recorded.items() if file.sha256 is None and file.size is not None]
    gone = [path for path in audio if states[path] is None]
    lost = [path for path, file in recorded.items() if file.sha256 and states[path] is None and os.path.realpath(path) in named]
    if (audio and len(gone) == len(audio)) or lost:
        found.missing = lost or gone
        return found
    for path, file in recorded.items():
        before, after = file.state, states[path]
        if before == after or (before and after and file.sha256 and file_digest(path) == file.sha256):
            continue
        kinds = found.audio if file.sha256 is None else found.texts
        change = "added" if before is None else "removed" if after is None else "changed" if file.sha256 is None else "edited"
        kinds[change].append(path)
    if sources is not None:
        now = sources()
        for kinds, paths in ((found.audio, _absolute(now.audio)), (found.texts, _absolute(now.texts))):
            new = [path for path in paths if path not in recorded]
            kinds["added"] += [path for path, state in look(new).items() if state is not None]
    return found
