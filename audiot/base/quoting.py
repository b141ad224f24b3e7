"""Commands that run as printed: values quoted for Hydra's override grammar, and the whole for a POSIX shell."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, TypeAlias

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

Value: TypeAlias = "str | PurePath | bool | int | float | Sequence[Value] | None"


def override(key: str, value: Value) -> str:
    """``key=value`` in Hydra's grammar, one of a program's arguments: quoted only where it would else mean another thing.

    Args:
        key: Name of a config key or group.
        value: What the key is to hold. A text stays text: ``"12"`` is not the number 12, and ``${`` is no interpolation.
    """
    return f"{key}={_element(value)}"


def argument(key: str, value: Value) -> str:
    """`override`, ready to be pasted into a POSIX shell."""
    return quoted(override(key, value))


def path(name: str | os.PathLike[str]) -> str:
    """A path as an argument that is no ``key=value``, ready to be pasted: one that begins with a dash is no option."""
    text = os.fspath(name)
    return quoted(f"./{text}" if text.startswith("-") else text)


def quoted(text: str) -> str:
    """One word of a POSIX shell, in double quotes where it has apostrophes, which `shlex.quote` makes hard to read."""
    if "'" in text and not re.search(r"[$`\\!]", text):
        return '"' + text.replace('"', '\\"') + '"'
    return shlex.quote(text)


def parsed(text: str) -> Any:
    """The value of one ``key=value`` in Hydra's grammar, quotes taken off; None where it is no such text, or names several."""
    try:
        found = OverridesParser.create().parse_override(text)
        return None if found.is_sweep_override() else found.value()
    except HydraException:
        return None


def _element(value: Value) -> str:
    if isinstance(value, (str, PurePath)):
        # OmegaConf takes what stands between ${ and } for an interpolation, unless a backslash is before it.
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
        plain = parsed(f"key=[{text}]") == [text] and parsed(f"key={text}") == text
        return text if plain else QuotedString(text, Quote.double).with_quotes()
    if isinstance(value, Sequence):
        return f"[{','.join(map(_element, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
