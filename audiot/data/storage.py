"""Files of a folder, a web server or an object store, read whole or by ranges of bytes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from audiot.base.files import name_bytes, printable

SCHEMES = ("http", "https", "s3")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # of one folder; names come from others' lists
TRIES = 4  # of each read; a loader gives up on a process that is silent for 50 s
WAITS_S = (0.5, 1.0, 2.0)  # before each further try
TIMEOUT_S = 8  # without a connection, or without a byte
AT_A_TIME = 16  # ranges that are asked for together

Result = TypeVar("Result")


class StorageError(OSError):
    """A file that can't be read, or isn't what its index says. The message is one line that names the file and the remedy."""


class MissingError(StorageError):
    """A file is missing."""


# Trying again would not help.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, StorageError)


class Range(NamedTuple):
    """Bytes [start, start + size) of a file."""

    name: str
    start: int
    size: int


class Storage:
    """A folder, given by a path or as ``http(s)://HOST/PATH`` or ``s3://BUCKET/PATH``.

    Servers are asked through fsspec. What fails for a moment (a dropped connection, a timeout, an error of the server) is tried
    four times. Object stores take their settings from the environment, as ``AWS_ENDPOINT_URL`` or ``FSSPEC_S3``.

    Args:
        root: The folder.

    Raises:
        ValueError: the scheme is unknown.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/") or "/"
        scheme, found, _ = self.root.partition("://")
        self.scheme = scheme if found else ""
        if self.scheme and self.scheme not in SCHEMES:
            raise ValueError(f"data.root={self.root}: no scheme {scheme!r}; give a folder or {', '.join(SCHEMES)}://…")

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine's file systems."""
        return not self.scheme

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "scheme": self.scheme}  # connections stay with their process

    def place(self, name: str) -> str:
        """Path or address of a file."""
        return f"{self.root}/{name}"

    def read(self, name: str, size: int | None = None) -> bytes:
        """A whole file.

        Args:
            name: The file's name.
            size: Number of bytes that it must have; None takes any.

        Raises:
            StorageError: it can't be read, or has another size.
        """
        if self.is_local:
            with _told(self.place(name)):
                data = Path(os.fsdecode(name_bytes(self.place(name)))).read_bytes()
        else:
            data = self.again(self.place(name), lambda: self._remote.cat_file(self.place(name)))
        if size is not None and len(data) != size:
            raise self._wrong(name, f"has {len(data):,} bytes instead of {size:,}")
        return data

    def ranges(self, wanted: Sequence[Range]) -> list[bytes]:
        """The bytes of several ranges. A server is asked for 16 at a time.

        Raises:
            StorageError: one can't be read, or the file ends before it.
        """
        found = [self._pread(each) for each in wanted] if self.is_local else self._fetch(wanted)
        for each, data in zip(wanted, found, strict=True):
            if len(data) < each.size:
                what = f"ends {each.size - len(data):,} bytes too early for its index, which needs {each.start + each.size:,}"
                raise self._wrong(each.name, what)
            if len(data) > each.size:
                raise StorageError(
                    f"{printable(self.place(each.name))}: the server sends whole files where ranges of bytes are asked for: "
                    "take a server that answers ranges, or copy the shards to a folder"
                )
        return found

    def sizes(self) -> dict[str, tuple[int | None, str]]:
        """Size in bytes, where it is told, and state (a time or a tag that changes with the content) of each file by name."""
        if self.is_local:
            with _told(self.root), os.scandir(self.root) as entries:
                files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
            return {name: (status.st_size, str(status.st_mtime_ns)) for name, status in files if FILE_NAME.fullmatch(name)}

        def listed() -> list[dict[str, Any]]:
            self._remote.invalidate_cache()
            return self._remote.ls(f"{self.root}/", detail=True)

        found = {}
        for entry in self.again(self.root, listed):
            name = str(entry["name"]).partition("?")[0].rpartition("/")[2]
            if entry.get("type") == "file" and FILE_NAME.fullmatch(name):
                found[name] = (entry.get("size"), str(entry.get("ETag") or entry.get("LastModified") or ""))
        return found

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """A file to read and seek in.

        Raises:
            StorageError: it can't be opened.
        """
        place = self.place(name)
        if self.is_local:
            with _told(place):
                stream = open(name_bytes(place), "rb")  # noqa: SIM115 (closed below)
        else:
            stream = self.again(place, lambda: self._remote.open(place, "rb"))
        with stream:
            yield stream

    def _pread(self, wanted: Range) -> bytes:
        place = self.place(wanted.name)
        with _told(place), open(name_bytes(place), "rb", buffering=0) as stream:
            return os.pread(stream.fileno(), wanted.size, wanted.start)

    def _fetch(self, wanted: Sequence[Range]) -> list[bytes]:
        found: list[Any] = [None] * len(wanted)
        left = list(range(len(wanted)))
        for wait_s in (*WAITS_S, None):
            some = [wanted[number] for number in left]
            answers = self._remote.cat_ranges(
                [self.place(each.name) for each in some],
                [each.start for each in some],
                [each.start + each.size for each in some],
                batch_size=AT_A_TIME,
                on_error="return",
            )
            for number, answer in zip(left, answers, strict=True):
                found[number] = answer
            failed = [number for number in left if isinstance(found[number], BaseException)]
            final = [number for number in failed if wait_s is None or _is_final(found[number])]
            if final:
                raise _error(self.place(wanted[final[0]].name), found[final[0]]) from None
            if not failed:
                break
            left = failed
            time.sleep(wait_s or 0)
        return found

    def again(self, place: str, call: Callable[[], Result]) -> Result:
        """The result of a call, which is tried again while another try may help a server.

        Args:
            place: What it reads, for errors.
            call: Call without arguments.

        Raises:
            StorageError: it failed.
        """
        for wait_s in () if self.is_local else WAITS_S:
            try:
                return call()
            except Exception as error:  # of fsspec, of its clients, of what these are made of
                if _is_final(error):
                    raise _error(place, error) from None
            time.sleep(wait_s)
        try:
            return call()
        except Exception as error:
            raise _error(place, error) from None

    @property
    def _remote(self) -> Any:
        """fsspec's file system. Each process has its own, since connections are not for forks."""
        if self.__dict__.get("_owner") != os.getpid():
            self.__dict__.pop("_file_system", None)
            self._owner = os.getpid()
        return self._file_system

    @cached_property
    def _file_system(self) -> Any:
        import fsspec

        if self.scheme != "s3":
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
            return fsspec.filesystem(self.scheme, client_kwargs={"timeout": timeout}, skip_instance_cache=True)
        try:
            config = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S, "retries": {"max_attempts": 1}}
            return fsspec.filesystem("s3", config_kwargs=config, skip_instance_cache=True)
        except ImportError as error:
            raise ImportError(f"data.root={self.root} needs s3fs: pip install 'audiot[cloud]'") from error

    def _wrong(self, name: str, what: str) -> StorageError:
        return StorageError(f"{printable(self.place(name))} {what}: it is truncated or was replaced; copy it again")


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Turn an error of the operating system into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise _error(place, error) from None


def _is_final(error: BaseException) -> bool:
    status = getattr(error, "status", None)  # of aiohttp
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return refused or isinstance(error, FINAL)


def _error(place: str, error: BaseException) -> BaseException:
    """What a user reads of an error."""
    if isinstance(error, ImportError | StorageError):
        return error
    status = getattr(error, "status", None)
    name = printable(place)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingError(f"{name} is missing: copy it there, or check data.root")
    if isinstance(error, PermissionError) or status in (401, 403):
        return StorageError(f"{name} may not be read (access is denied): check the credentials, or the rights of the file")
    if status == 416:
        return StorageError(f"{name} ends before what its index names: it is truncated or was replaced; copy it again")
    what = " ".join(str(error).split())[:200] or type(error).__name__
    tries = "" if "://" not in place or _is_final(error) else f" after {TRIES} tries"
    return StorageError(f"{name} can't be read{tries}: {what}")
