"""The config groups. They are the registry of everything that a command can choose."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

ENTRY_POINTS = "audiot.conf"  # group of entry points whose values are packages of config files


@cache
def packages() -> list[str]:
    """Packages of config files: audiot's own, then those that installed packages bring by the entry point ``audiot.conf``."""
    return ["audiot.conf", *sorted({point.value for point in entry_points(group=ENTRY_POINTS)} - {"audiot.conf"})]


def groups() -> list[str]:
    """Names of the config groups, and of those inside them: ``attention``, ``attention/search``."""
    return list(_groups(*packages()))


@cache
def _groups(*packages: str) -> list[str]:
    return sorted({group for package in packages for group in _folders(files(package), "")})


def _folders(folder: Any, above: str) -> Iterator[str]:
    for each in folder.iterdir():
        if each.is_dir() and each.name[0] != "_":
            yield above + each.name
            yield from _folders(each, f"{above}{each.name}/")


def key_of(group: str) -> str:
    """The config key where the choice of a group lands: ``attention.search`` of ``attention/search``."""
    return group.replace("/", ".")


def options(group: str) -> list[str]:
    """Options of a config group."""
    if group not in groups():
        raise ValueError(f"no config group {group!r}{nearest(group, groups())}; groups: {', '.join(groups())}")
    names = sorted({entry.name for folder in _places(group) for entry in folder.iterdir()})
    # Files with a leading underscore are parts of other files.
    return [name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name[0] != "_"]


def described(group: str) -> dict[str, str]:
    """Options of a config group, each with the first comment line of its file, which describes it."""
    found = {}
    for name in options(group):
        lines = _file(group, name).read_text(encoding="utf-8").splitlines()
        found[name] = next((line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line), "")
    return found


def read_option(group: str, name: str) -> dict[str, Any]:
    """The file of an option, or of a part of others, as plain dicts.

    Raises:
        ValueError: there is no such option.
    """
    file, known = _file(group, name), options(group)
    if file is None:
        raise ValueError(f"no {group} {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    content = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _places(group: str) -> list[Any]:
    """Folders of a group, one per package that has it."""
    return [folder for package in packages() if (folder := files(package) / group).is_dir()]


def _file(group: str, name: str) -> Any:
    """The file of an option; None if there is none."""
    found = [file for folder in _places(group) if (file := folder / f"{name}.yaml").is_file()]
    return found[0] if found else None


def nearest(name: str, known: list[str]) -> str:
    """The name that was probably meant, as words to append to an error; empty when no known name is similar."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
