"""Runs of ``audiot pretrain`` and ``audiot finetune`` as stages of a larger one: what is finished is not done again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from audiot.base.config import compose_command, parse, plain
from audiot.base.console import say
from audiot.base.files import read_json, write_json
from audiot.base.groups import groups
from audiot.base.quoting import override
from audiot.commands import finetune, pretrain
from audiot.commands.environment import input_digests
from audiot.data.prepare import PreparedCorpus
from audiot.runs import has_checkpoints, has_config, has_rounds, is_finished, record_start, resume

STAGE = "stage.json"
# What is no part of a result: where it is, who computes it, how it is logged. The corpus is known by its content, and what a
# training starts from by its digest.
APART = ("run_dir", "data_dir", "debug", "plots", "logger", "callbacks", "checkpoint", "resume", "trusted", "probe_jobs", "init")
APART_DATA = ("root", "labels", "corpus", "num_workers", "prepare", "name", "train", "valid", "test", "pattern")
APART_TRAINER = ("accelerator", "devices", "num_nodes", "strategy", "default_root_dir", "enable_progress_bar", "profiler")


@dataclass(frozen=True)
class Stage:
    """A run below another one.

    Args:
        name: Name of its folder, and the beginning of those of its repeats with other settings.
        command: ``pretrain`` or ``finetune``.
        overrides: Its overrides.
    """

    name: str
    command: str
    overrides: list[str]

    def config(self, folder: Path) -> DictConfig:
        """Its config in a folder."""
        return compose_command(self.command, [*self.overrides, override("run_dir", folder)])

    def run(self, above: Path, corpus: PreparedCorpus, again: str) -> Path:
        """Run it, or the rest of it, or nothing where it is finished.

        Args:
            above: Folder of the run that it belongs to.
            corpus: Its corpus.
            again: The command that goes on where this one is stopped.

        Returns:
            Its folder: of earlier runs with other settings or data, there is one each.
        """
        digest = self._digest(above, corpus)
        folder = place(above, self.name, digest)
        cfg = self.config(folder)
        say(f"\nstage   {self.name}, in {folder}")
        if has_checkpoints(folder) and is_finished(folder, cfg):
            say(f"done    {self.name} is finished: nothing is done again")
            return folder
        write_json(folder / STAGE, {"digest": digest, "command": f"audiot {self.command}"})
        record_start(folder, self.overrides, _options(self.overrides))
        resumed = None
        if has_config(folder) and (has_checkpoints(folder) or has_rounds(folder)):
            trusted = [each for each in self.overrides if each.startswith("trusted=")]
            resumed = resume(self.command, str(folder), trusted)
            cfg = resumed.config
        if self.command == "pretrain":
            pretrain.main(cfg, resumed, follow=False)
        else:
            finetune.noted(cfg, resumed)
        return folder

    def is_finished(self, above: Path, corpus: PreparedCorpus) -> bool:
        """Whether nothing of it is left to do."""
        folder = place(above, self.name, self._digest(above, corpus))
        return has_checkpoints(folder) and is_finished(folder, self.config(folder))

    def _digest(self, above: Path, corpus: PreparedCorpus) -> str:
        """What its results depend on."""
        cfg = self.config(above)
        tree: dict[str, Any] = {name: value for name, value in plain(cfg).items() if name not in APART}
        for part, names in (("data", APART_DATA), ("trainer", APART_TRAINER), ("upstream", ("path", "trusted"))):
            tree[part] = {name: value for name, value in tree.get(part, {}).items() if name not in names}
        started = input_digests(cfg)
        for name in ("upstream.path", "init"):  # a name on a hub stands for itself
            started.setdefault(name, str(OmegaConf.select(cfg, name)))
        content = [self.command, tree, started, corpus.content, corpus.sample_rate]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def place(above: Path, name: str, digest: str) -> Path:
    """The folder of a stage: its own from before, or the first that is free."""
    for number in count(1):
        folder = above / (name if number == 1 else f"{name}-{number}")
        if not (folder / STAGE).is_file() or read_json(folder / STAGE, "note of a stage").get("digest") == digest:
            return folder
    raise AssertionError("numbers end")


def _options(overrides: list[str]) -> dict[str, str]:
    """Group → option, of those that overrides choose."""
    known = groups()
    found = {}
    for each in parse(overrides):
        value = each.value()
        if each.key_or_group in known and isinstance(value, str):
            found[each.key_or_group] = value
    return found
