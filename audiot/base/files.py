"""Writing files so that a reader never finds half of one."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def printable(name: str) -> str:
    """A file name that isn't UTF-8 with its odd bytes as ``\\xNN``, and one that no file can have with ``\\uNNNN``."""
    try:
        return name_bytes(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, as JSON may have it
        return name.encode("utf-8", "backslashreplace").decode()


def name_text(path: str | Path) -> str:
    """A path as text in UTF-8; Python gives one in the locale's encoding. Bytes that are no UTF-8 become surrogates."""
    try:
        return os.fsencode(path).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # text that doesn't come from this locale, but from a config or a manifest
        return str(path)


def name_bytes(path: str | Path) -> bytes:
    """The bytes of a path that is text in UTF-8, as manifests and `name_text` have it."""
    return str(path).encode("utf-8", "surrogateescape")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it becomes ``path`` when the block ends, and goes away if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_text(path: str | Path) -> Iterator[IO[str]]:
    """`replacing`, open for text in UTF-8 whose line ends stay as they are written."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        yield stream


@contextmanager
def replacing_gzip(path: str | Path) -> Iterator[gzip.GzipFile]:
    """`replacing`, open for bytes to be compressed; no name and no time inside, so that the same content has the same bytes."""
    with (
        replacing(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream,
    ):
        yield stream


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of equal keys, a header first."""
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
    """Read a JSON object; ``what`` names the file's kind in errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or no object.
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
