"""What docstrings say of arguments: every line begins with a noun phrase that says what the argument is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import audiot

ROOT = Path(audiot.__file__).parent
ROOMS = ("attention", "kernels", "positions.py")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py") if (ROOT / room).is_dir() else [ROOT / room])]
RIDDLE = re.compile(r"(Of|See|Likewise)\b", re.IGNORECASE)


def arguments(docstring):
    """The first line of each argument in a docstring without indentation: its name and what the line says."""
    section = re.search(r"^Args:\n((?: {4}.*(?:\n|$)|\n)+)", docstring, re.MULTILINE)
    return [] if section is None else re.findall(r"^ {4}(\w[\w, ]*): (.*)$", section[1], re.MULTILINE)


def riddles(source):
    """Arguments that a docstring of a module describes with a riddle, in order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return [name for text in docstrings if text for name, line in arguments(text) if RIDDLE.match(line)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_an_argument_is_described_by_what_it_is(path):
    assert not riddles(path.read_text(encoding="utf-8"))


def test_riddles_are_found():
    source = '''
class Thing:
    """A thing.

    Args:
        first: Of dropout.
        second, third: Likewise,
            see there.
        fourth: Of course not; but it begins so.
        fifth: Offset of a frame: see there.

    Raises:
        sixth: See below.
    """

    def method(self):
        """Do it.

        Args:
            first: See `Thing`.
            eighth: Seed.
        """
'''
    assert riddles(source) == ["first", "second, third", "fourth", "first"]
