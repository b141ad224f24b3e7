"""Reading users' text: UTF-8 files, and the labels and transcripts in them. Errors name the file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any

LINE_END = re.compile(rb"\r\n|\r|\n")
# Signs of a non-finite number or a lone surrogate. JSON without them needs no further check.
ODD = ("NaN", "Infinity", "\\ud", "\\uD")
HUGE = re.compile(r"[eE]\+?[0-9]{3}")
MOST_S = 1e9  # 30 years; Lhotse's arithmetic fails far beyond this


def read_text(path: str | Path, utf_16: bool = False) -> str:
    """All text of a file, with ``\\n`` line ends.

    Args:
        path: UTF-8 file, with or without a byte order mark, plain or gzipped.
        utf_16: Whether UTF-16 with a byte order mark is accepted too.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8 text. The message has the line.
    """
    return "".join(line for _, line in _numbered(Path(path), utf_16))


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number and stripped content of each line that is not blank (see `read_text`)."""
    return ((number, content) for number, line in _numbered(Path(path)) if (content := line.strip()))


def rows(path: str | Path, columns: Sequence[str], delimiter: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table (RFC 4180) whose first row names the columns: line number, and a dict from name to stripped cell.

    Blank rows and columns with a blank name are left out.

    Args:
        path: File as `read_text` takes it.
        columns: Names of required columns.
        delimiter: Separator of the columns.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a column is missing or repeated, a row has another length, or a quote is not closed. The message has the line.
    """
    path = Path(path)
    header: list[str] | None = None
    for number, cells in _cells(path, delimiter):
        if header is None:
            header = cells
            between = "tabs" if delimiter == "\t" else f"{delimiter!r}"
            if lacking := [name for name in columns if name not in header]:
                raise ValueError(
                    f"{path}:{number}: no column {', '.join(lacking)}; found {', '.join(header)} "
                    f"(the first row must name the columns, with {between} between them)"
                )
            if doubled := [name for name, count in Counter(header).items() if name and count > 1]:
                raise ValueError(f"{path}:{number}: {doubled[0]} is the name of several columns: rename all but one")
        elif len(cells) != len(header):
            raise ValueError(
                f"{path}:{number}: expected {len(header)} values, one per column of the header, found {len(cells)} "
                "(a value that holds the separator needs quotes around it)"
            )
        else:
            yield number, {name: cell for name, cell in zip(header, cells, strict=True) if name}
    if header is None:
        raise ValueError(f"{path}: no column {', '.join(columns)}; found nothing, the file is empty")


def json_object(line: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: the line is not JSON (RFC 8259, without NaN), not an object, or has a name twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            doubled = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"{doubled} occurs twice in one object")
        return found

    try:
        found = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"a JSON object was expected, found {type(found).__name__}")
    if any(sign in line for sign in ODD) or HUGE.search(line):
        _check(found, "")
    return found


def as_label(value: object, what: str) -> str | None:
    """A label as stripped text, from a text or a whole number; None if it is missing, null or blank.

    Args:
        value: Value in a table or manifest.
        what: Name of the field, for the error.

    Raises:
        ValueError: the value has another type.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, Integral))):
        raise ValueError(f"{what} must be text or a whole number, found {_shown(value)}: put it in quotes, or leave it out")
    return None if value is None else str(value).strip() or None


def as_text(value: object, what: str) -> str | None:
    """Stripped text; None if it is missing, null or blank. Numbers are refused, because 7 could mean 'seven' or '7'.

    Raises:
        ValueError: the value is not text.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} must be text, found {_shown(value)}: put it in quotes, or leave it out")
    return None if value is None else value.strip() or None


def as_seconds(value: object, what: str) -> float:
    """A number of seconds, which may be negative.

    Raises:
        ValueError: the value is not a number, or at least 30 years.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MOST_S:
        raise ValueError(f"{what} must be a number of seconds, found {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    return repr(value)[:80]


def _check(value: Any, name: str) -> None:
    """Refuse values that JSON cannot hold: non-finite numbers and lone surrogates."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            _check(item, f"{name}[{place}]")
    elif isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{name} must be a number, found {value}: write null for a missing value")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} has a lone surrogate, half a character: {ascii(value)[:80]}") from None


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """First line number and cells of each row that is not blank."""
    reader = csv.reader((line for _, line in _numbered(path)), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = "a quote that is opened in this row is not closed" if "unexpected end" in str(error) else str(error)
            raise ValueError(f"{path}:{number}: {reason} (quotes go around a whole value, a quote inside is doubled)") from None
        if cells is None:
            return
        cells = [cell.strip() for cell in cells]
        if any(cells):
            yield number, cells


def _numbered(path: Path, utf_16: bool = False) -> Iterator[tuple[int, str]]:
    """Number and content of each line, with ``\\n`` as line end."""
    if not path.is_file():  # a pipe may never end
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as raw:
        opened = gzip.open if raw.read(2) == b"\x1f\x8b" else open
    number = 0
    try:
        with opened(path, "rb") as stream:
            mark = stream.read(2)
            stream.seek(0)
            wide = mark in (b"\xff\xfe", b"\xfe\xff")
            if wide and not utf_16:
                raise ValueError(f"{path} is UTF-16, according to its first bytes: save it as UTF-8")
            with io.TextIOWrapper(stream, encoding="utf-16" if wide else "utf-8-sig") as lines:
                for number, line in enumerate(lines, start=1):
                    if "\0" in line:
                        raise ValueError(f"{path}:{number}: a zero byte: not text, or not UTF-8: save it as UTF-8")
                    yield number, line
    except UnicodeDecodeError as error:
        if wide:
            raise ValueError(f"{path} begins like UTF-16 but is not: {error.reason}") from None
        raise _not_utf_8(path, opened) from None
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: unreadable after line {number}: {error}") from None


def _not_utf_8(path: Path, opened: Callable[..., Any]) -> ValueError:
    """The error of a file that is not UTF-8, with the line: the decoder only knows the position in its buffer."""
    try:
        with opened(path, "rb") as stream:
            content = stream.read()
        content.decode()
    except UnicodeDecodeError as error:
        line = len(LINE_END.findall(content[: error.start])) + 1
        return ValueError(f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}): save the file as UTF-8")
    except (EOFError, OSError, zlib.error) as error:
        return ValueError(f"{path}: not UTF-8, and unreadable: {error}")
    return ValueError(f"{path} changed while it was read")
