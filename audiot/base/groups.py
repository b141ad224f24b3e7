"""The config groups. They are the registry of everything that a command can choose."""

from __future__ import annotations

import difflib
from importlib.resources import files


def groups() -> list[str]:
    """Names of the config groups."""
    return sorted(folder.name for folder in files("audiot.conf").iterdir() if folder.is_dir() and folder.name[0] != "_")


def options(group: str) -> list[str]:
    """Options of a config group."""
    if group not in groups():
        raise ValueError(f"no config group {group!r}{nearest(group, groups())}; groups: {', '.join(groups())}")
    names = sorted(entry.name for entry in (files("audiot.conf") / group).iterdir())
    # Files with a leading underscore are parts of other files.
    return [name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name[0] != "_"]


def described(group: str) -> dict[str, str]:
    """Options of a config group, each with the first comment line of its file, which describes it."""
    found = {}
    for name in options(group):
        lines = (files("audiot.conf") / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        found[name] = next((line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line), "")
    return found


def nearest(name: str, known: list[str]) -> str:
    """The name that was probably meant, as words to append to an error; empty when no known name is similar."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
