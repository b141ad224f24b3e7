"""Commands that can be pasted: values are quoted for Hydra's override grammar, arguments for a POSIX shell."""

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
    """``key=value`` in Hydra's grammar, as one argument of a program. Quotes are added only where the meaning needs them.

    Args:
        key: Name of a config key or group.
        value: Value of the key. A text stays text: ``"12"`` is not the number 12, and ``${`` starts no interpolation.
    """
    return f"{key}={_element(value)}"


def argument(key: str, value: Value) -> str:
    """`override`, quoted for a POSIX shell."""
    return quoted(override(key, value))


def path(name: str | os.PathLike[str]) -> str:
    """A path as an argument that is not ``key=value``, quoted for a POSIX shell. A leading dash does not make it an option."""
    text = os.fspath(name)
    return quoted(f"./{text}" if text.startswith("-") else text)


def quoted(text: str) -> str:
    """One word of a POSIX shell. Words with apostrophes get double quotes, since `shlex.quote` makes them hard to read."""
    if "'" in text and not re.search(r"[$`\\!]", text):
        return '"' + text.replace('"', '\\"') + '"'
    return shlex.quote(text)


def parsed(text: str) -> Any:
    """The unquoted value of one ``key=value`` in Hydra's grammar; None if the text is not one or names several values."""
    try:
        found = OverridesParser.create().parse_override(text)
        return None if found.is_sweep_override() else found.value()
    except HydraException:
        return None


def _element(value: Value) -> str:
    if isinstance(value, (str, PurePath)):
        # OmegaConf reads text between ${ and } as an interpolation unless a backslash precedes it.
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
        plain = parsed(f"key=[{text}]") == [text] and parsed(f"key={text}") == text
        return text if plain else QuotedString(text, Quote.double).with_quotes()
    if isinstance(value, Sequence):
        return f"[{','.join(map(_element, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
