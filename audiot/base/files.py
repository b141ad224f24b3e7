"""Reading and writing files. A reader never finds a half-written one."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml


def printable(name: str) -> str:
    """A file name as printable text: bytes that are not UTF-8 become ``\\xNN``, lone surrogates become ``\\uNNNN``."""
    try:
        return name_bytes(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate, which JSON may contain
        return name.encode("utf-8", "backslashreplace").decode()


def name_text(path: str | Path) -> str:
    """A path as UTF-8 text, whatever the locale's encoding. Bytes that are not UTF-8 become surrogates."""
    try:
        return os.fsencode(path).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # the text comes from a config or a manifest, not from this locale
        return str(path)


def name_bytes(path: str | Path) -> bytes:
    """The bytes of a path given as UTF-8 text, the form that manifests and `name_text` use."""
    return str(path).encode("utf-8", "surrogateescape")


@contextmanager
def replacing(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to. It becomes ``path`` when the block ends and is deleted if the block fails.

    Args:
        path: The file.
        durable: Whether to wait until its content and its name are on the disk, so that a power cut leaves the old file or the
            new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def finished(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder whose names match, sorted, without those that `replacing` still writes or left when it was killed."""
    return sorted(path for path in folder.glob(pattern) if path.name[0] != ".")


def room(folder: Path) -> str:
    """What is free on a folder's disk, in words for an error of writing there."""
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free on the disk of {folder}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_text(path: str | Path) -> Iterator[IO[str]]:
    """`replacing`, opened for UTF-8 text. Line ends stay as they are written."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        yield stream


@contextmanager
def replacing_gzip(path: str | Path) -> Iterator[gzip.GzipFile]:
    """`replacing`, opened for bytes to compress. It stores no name and no time, so equal content gives equal bytes."""
    with (
        replacing(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream,
    ):
        yield stream


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows that all have the same keys, below a header."""
    rows = list(rows)
    with replacing_text(path) as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, indented, keys in the order given, not-a-number refused."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object. ``what`` names the kind of file in errors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, or holds no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable {what}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a readable {what}: a JSON object was expected, found {type(found).__name__}")
    return found


MOST_YAML = 2**20  # bytes: a config has some thousand


class _Loader(yaml.SafeLoader):
    """YAML as Hydra reads it, of plain data alone: no tags, no aliases, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):  # which can make a few lines as large as one likes
            raise yaml.YAMLError(f"an alias in line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"the key {twice!r} twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # numbers such as 1e-3, which YAML 1.1 takes for text
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+([eE][-+]?[0-9]+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file of plain data; None where it is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or holds tags, aliases, a key twice, or more than a config can.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        if path.stat().st_size > MOST_YAML:
            raise ValueError(f"larger than {MOST_YAML:,} bytes")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable: {' '.join(str(error).split())[:300]}") from error
