"""The groups of the config: `audiot.conf` is the registry of everything that a command can choose."""

from __future__ import annotations

import difflib
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf


def groups() -> list[str]:
    """Names of the config groups."""
    return sorted(folder.name for folder in files("audiot.conf").iterdir() if folder.is_dir() and folder.name[0] != "_")


def options(group: str) -> list[str]:
    """Options of a config group."""
    if group not in groups():
        raise ValueError(f"no config group {group!r}{nearest(group, groups())}; groups: {', '.join(groups())}")
    names = sorted(entry.name for entry in (files("audiot.conf") / group).iterdir())
    return [name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name[0] != "_"]  # _… is a part of others


def described(group: str) -> dict[str, str]:
    """Option of a config group → the first line of its file, which says what it is."""
    found = {}
    for name in options(group):
        lines = (files("audiot.conf") / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        found[name] = next((line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line), "")
    return found


def read_option(group: str, name: str) -> dict[str, Any]:
    """The file of an option, or of a part of others, as plain dicts.

    Raises:
        ValueError: there is no such option.
    """
    file = files("audiot.conf") / group / f"{name}.yaml"
    known = options(group)
    if not file.is_file():
        raise ValueError(f"no {group} {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    content = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def nearest(name: str, known: list[str]) -> str:
    """What was probably meant, in words that follow an error; nothing where no name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
