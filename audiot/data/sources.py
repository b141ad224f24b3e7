"""What a prepared corpus was made from: its files as they were, and what has become of them since."""

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

AT_A_TIME = 256  # files that a thread looks at; on a network disk it waits for each
NAMED = 3  # so many edited tables are named, more are counted


@dataclass(frozen=True)
class Sources:
    """Files that a corpus reads, as far as they are there now.

    Args:
        audio: Recordings, which are compared by size and time of change.
        texts: Tables, lists, manifests, transcripts and alignments, which are compared by content.
    """

    audio: Collection[str | Path] = ()
    texts: Collection[str | Path] = ()


class Corpus(Protocol):
    """A corpus: a class whose arguments are in ``conf/data``. Arguments that are places say so: their types name ``Path``."""

    def manifests(self) -> Manifests:
        """Its cuts; gets or makes what is not there, where the corpus can."""

    def sources(self) -> Sources:
        """The files that `manifests` reads; those that only its cuts name may be left out. Gets and makes nothing."""


class File(NamedTuple):
    """A file as it was.

    Args:
        size: Bytes; None: it was not there.
        mtime_ns: When it was changed last, nanoseconds since 1970.
        sha256: Digest of a text; None: audio.
        in_place: A prepared manifest names it, rather than a copy.
    """

    size: int | None
    mtime_ns: int = 0
    sha256: str | None = None
    in_place: bool = False

    @property
    def state(self) -> tuple[int, int] | None:
        """Size and time, of a file that was there."""
        return None if self.size is None else (self.size, self.mtime_ns)


def places(corpus: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Absolute, resolved places among a corpus's arguments: those whose types name ``Path``; the default where one is null."""
    found = {}
    for name, parameter in inspect.signature(corpus).parameters.items():
        value = arguments.get(name)
        if value is None and parameter.default is not parameter.empty:
            value = parameter.default
        if value is not None and re.search(r"\bPath\b", str(parameter.annotation)):
            found[name] = _resolved(value) if isinstance(value, (str, Path)) else [_resolved(place) for place in value]
    return found


def _resolved(place: str | Path) -> str:
    return os.path.realpath(os.path.abspath(place))  # abspath first: with links, a/../b is b beside a


def is_prepared(names: Iterable[str] | Iterable[bytes]) -> bool:
    """Whether a folder with these names in it is a prepared corpus, or becomes one: it is no source of the tree around it."""
    there = set(map(os.fsdecode, names))
    return {"corpus.json", "rejected.csv"} <= there or "journal.jsonl" in there


def files_below(folder: str | Path, *suffixes: str) -> list[str]:
    """Paths of files with one of the suffixes below a folder, sorted.

    Names that begin with a dot are passed over, and so are prepared corpora below the folder.
    """
    seen: set[tuple[int, int]] = set()

    def walk(place: str) -> Iterator[str]:
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link leads back
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
    """Absolute path of each source → the file as it is."""
    audio, texts = _absolute(sources.audio), _absolute(sources.texts)
    states = look([*audio, *texts])
    there = [path for path in texts if states[path]]
    with ThreadPoolExecutor(16) as pool:  # reading small files is waiting for disks
        digests = dict(zip(there, pool.map(file_digest, there), strict=True))
    return {path: File(*state, digests.get(path)) if state else File(None) for path, state in states.items()}


def _absolute(paths: Iterable[str | Path]) -> list[str]:
    return [os.path.abspath(path) for path in paths]


def look(paths: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    """Path → size and time of change in nanoseconds; None where no file is."""
    paths = list(paths)
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(_look, (paths[at : at + AT_A_TIME] for at in range(0, len(paths), AT_A_TIME)))
        return dict(zip(paths, chain.from_iterable(parts), strict=True))


def _look(paths: list[str]) -> list[tuple[int, int] | None]:
    return [_state(path) for path in paths]


def _state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(name_bytes(path))
    except (OSError, ValueError):  # ValueError: a name that no file can have
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
    """Write files as they were, a JSON line each."""
    with replacing_gzip(path) as stream:
        for name, file in files.items():
            line = {key: value for key, value in file._asdict().items() if value is not None and value is not False}
            stream.write(json.dumps({"path": name, **line}).encode() + b"\n")


def read_record(path: Path) -> dict[str, File]:
    """Read what `write_record` wrote.

    Raises:
        ValueError: the file is broken.
    """
    return {line.pop("path"): File(line.pop("size", None), **line) for line in read_lines(path)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of gzipped JSON lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken.
    """
    try:
        with gzip.open(path, "rb") as stream:
            return [json.loads(line) for line in stream]
    except (EOFError, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete the prepared folder, which is then made anew") from error


@dataclass
class Difference:
    """What has become of the sources: paths of audio and of texts that were changed, added or removed."""

    audio: dict[str, list[str]] = field(default_factory=lambda: {"changed": [], "added": [], "removed": []})
    texts: dict[str, list[str]] = field(default_factory=lambda: {"edited": [], "added": [], "removed": []})
    missing: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(chain(self.audio.values(), self.texts.values()))

    def __str__(self) -> str:
        """3 files changed, 2 added, 1 removed, labels.csv edited; first: /corpora/a.wav."""
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
    """What has become of files since they were recorded. A text counts as edited when its content is another.

    Args:
        recorded: Path → the file as it was.
        sources: The files that the corpus would read now, called only if the recorded ones are not missing; None: the same.
        named: Places that settings name; where one of the files that were recorded is gone from there, it is ``missing``, as
            is all audio where none is left: a disk that is not mounted is no edit.
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
