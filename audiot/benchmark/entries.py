"""Entries of a benchmark's list of attention mechanisms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from audiot.attention import build_mechanism, command_line, names, parameters
from audiot.attention.mechanism import check_type
from audiot.base.groups import nearest
from audiot.base.quoting import override

EVERY = ("all", "subquadratic")  # words in a list of mechanisms, see `Entry.all_of`
BASELINE = "query_key"  # of all speed-ups


@dataclass(frozen=True)
class Entry:
    """A mechanism to measure.

    Args:
        name: Name of its file in `conf/attention`.
        label: Name in tables and pictures.
        overrides: Parameters that replace those of the file.
        max_length: Longest sequence to measure it at. None means that there is no limit.
    """

    name: str
    label: str
    overrides: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None

    @classmethod
    def all_of(cls, configs: Sequence[str | Mapping[str, Any]], where: str = "benchmark.mechanisms") -> list[Entry]:
        """The entries of the config's list `where`.

        ``all`` stands for all of conf/attention that no other entry names, as their files have them; ``subquadratic`` for those
        of them that say so of themselves.
        """
        own = [cls.of(config, where) for config in configs if config not in EVERY]
        left = [name for name in names() if name not in {entry.name for entry in own}]
        entries: list[Entry] = []
        for config in configs:
            if config in EVERY:
                entries += [cls(name, name) for name in left if config == "all" or build_mechanism(name, 8, 2, 8).subquadratic]
            else:
                entries.append(own.pop(0))
        return entries

    @classmethod
    def of(cls, config: str | Mapping[str, Any], where: str = "benchmark.mechanisms") -> Entry:
        """An entry of the config's list `where`: a name, or a mapping with some of these keys."""
        if not isinstance(config, (str, Mapping)):
            raise ValueError(f"{where}: {config!r} is neither a name nor {{name: …, overrides: …}}")
        given: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
        known = ["name", "label", "overrides", "max_length"]
        for key in given:
            if key not in known:
                raise ValueError(f"{where}: no key {key!r}{nearest(str(key), known)}; keys: {', '.join(known)}")
        name = str(given.get("name"))
        if name not in names():
            raise ValueError(f"{where}: no attention {name!r}{nearest(name, names())}; there are {', '.join(names())}")
        overrides, max_length = given.get("overrides") or {}, given.get("max_length")
        if not isinstance(overrides, Mapping):
            raise ValueError(f"{where}: overrides of {name} are {overrides!r}: expected {{parameter: value}}")
        known = list(parameters(name))
        for key in overrides:
            if key not in known:
                near = nearest(str(key), known)
                raise ValueError(f"{where}: {name} has no parameter {key!r}{near}; there are {', '.join(known)}")
        if max_length is not None:
            check_type(int, **{f"{where}: max_length of {name}": max_length})
            if max_length < 1:
                raise ValueError(f"{where}: max_length of {name} is {max_length}: set it to at least 1")
        overrides = dict(overrides)
        label = str(given.get("label") or "") or " ".join([name, *(f"{key}={value}" for key, value in overrides.items())])
        return cls(name, label, overrides, max_length)

    @property
    def arguments(self) -> list[str]:
        """Overrides of ``audiot pretrain`` that choose this mechanism, in Hydra's grammar."""
        return [override(key, value) for key, value in command_line(self.name, self.overrides).items()]


def check_labels(entries: Sequence[Entry], where: str) -> None:
    """Raise ValueError if two entries of the config's list `where` have the same label."""
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{where}: {labels.count(label)} entries are called {label!r}: give each a label")
