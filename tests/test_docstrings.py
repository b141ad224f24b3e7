"""Every argument and attribute in a docstring is described by what it is, not by a reference to something else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "audiot"
ROOMS = tuple(sorted(path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()))
SECTION = re.compile(r"( *)(Args|Attributes):")
ENTRY = re.compile(r"([\w*, ]+): (.*)")
REFERENCES = ("Of ", "See ", "Likewise", "As ")


def argument_lines(docstring: str) -> Iterator[tuple[str, str]]:
    """Names and first line of the description of each entry under ``Args:`` and ``Attributes:``."""
    indent = None  # of the entries of the current section
    for line in docstring.splitlines():
        if heading := SECTION.fullmatch(line):
            indent = len(heading[1]) + 4
        elif line.strip() and indent is not None:
            depth = len(line) - len(line.lstrip())
            if depth < indent:
                indent = None
            elif depth == indent and (entry := ENTRY.match(line.strip())):
                yield entry[1], entry[2]


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Name and docstring of each class and function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (found := ast.get_docstring(node)):
            yield node.name, found


def test_entries_are_told_from_their_continuation_and_from_other_sections():
    docstring = """Title.

    See: not an entry.

    Args:
        first, second: Of dropout.
            third: a continuation.
        *rest: Sizes.

    Raises:
        ValueError: See above.

    Attributes:
        fourth: As before.
    """
    found = list(argument_lines(docstring))
    assert found == [("first, second", "Of dropout."), ("*rest", "Sizes."), ("fourth", "As before.")]


@pytest.mark.parametrize("room", ROOMS)
def test_an_argument_is_described_by_what_it_is(room: str) -> None:
    place = PACKAGE / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    assert files
    references = [
        f"{path.relative_to(PACKAGE)}: {owner}: {names}: {text}"
        for path in files
        for owner, docstring in docstrings(path)
        for names, text in argument_lines(docstring)
        if text.startswith(REFERENCES)
    ]
    assert references == []
