"""What a run was made with: program, packages, machine, uncommitted changes, files that it starts from.

``RUN/environment.json`` has an entry for the start of the run, and one for each resume with what was different then.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import audiot
from audiot.base.console import say
from audiot.base.devices import find_device
from audiot.base.files import read_json, write_json, write_text
from audiot.base.lock import is_first_process
from audiot.base.quoting import quoted
from audiot.benchmark.machine import describe_machine
from audiot.data.sources import file_digest
from audiot.runs import ENVIRONMENT, PATCH

MOST_PATCH = 2**20  # bytes of uncommitted changes that are kept; of more, only the digest is
MOST_UNTRACKED = 20  # names of new files that are kept
CODE = ("audiot", "conf", "scripts")  # folders of a checkout whose changes matter
INPUTS = ("init", "objective.teacher", "upstream.path")  # keys that name what a training starts from
TREES = ("packages", "machine", "git", "inputs")  # what holds values by name
SITUATION = ("time", "step", "command")  # what belongs to one start alone


def note_environment(cfg: DictConfig, run: Path, step: int = 0) -> None:
    """Add an entry to the environment in a run's folder. For a run that goes on, say what is different now.

    Args:
        cfg: Config of the run.
        run: Its folder.
        step: The step that it goes on from; 0 if it starts.

    Raises:
        ValueError: the file that is there is damaged.
    """
    if not is_first_process():
        return
    starts = _starts(run) if step else []
    before = _merged(starts)
    now, patch = environment(cfg)
    if starts:
        # What goes on starts from its checkpoint: the encoder that it began with may be gone.
        now = {name: value for name, value in now.items() if before.get(name) != value and name != "inputs"}
        if changes := differences(before, before | now):
            told = ", ".join(f"{name} {new} (was {old})" for name, (old, new) in changes.items())
            say(f"changed {told}: the run goes on, but an unbroken one could have other figures")
    entry = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "command": _command_line(),
        **now,
    }
    if patch and "git" in now and len(patch.encode()) <= MOST_PATCH:
        name = PATCH if not starts else f"{Path(PATCH).stem}-{len(starts)}.patch"
        write_text(run / name, patch)
        entry["git"] = {**now["git"], "patch": name}
    write_json(run / ENVIRONMENT, {"starts": [*starts, entry]})


def _command_line() -> str:
    """The command that was given, as it may be pasted."""
    command = Path(sys.argv[0]).stem  # as `audiot.commands.launch.run` sets it; of a tool, the program's
    return " ".join(["audiot", *([command] if command in ("pretrain", "finetune") else []), *map(quoted, sys.argv[1:])])


def read_environment(run: Path) -> dict[str, Any]:
    """What a run was made with, as it is since its latest start; empty for a run of an earlier version.

    Raises:
        ValueError: the file is damaged.
    """
    return _merged(_starts(run))


def _starts(run: Path) -> list[dict[str, Any]]:
    path = run / ENVIRONMENT
    if not path.is_file():
        return []
    starts: Any = read_json(path, "environment of a run").get("starts")
    whole = isinstance(starts, list) and all(isinstance(entry, dict) for entry in starts)
    if not whole or not all(isinstance(entry.get(name) or {}, dict) for entry in starts for name in TREES):
        raise ValueError(f"{path} is not a readable environment of a run: expected a list of starts; delete it to go on without")
    return starts


def _merged(starts: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for entry in starts:
        merged |= {name: value for name, value in entry.items() if name not in SITUATION}
    if isinstance(merged.get("git"), dict):
        merged["git"] = {name: value for name, value in merged["git"].items() if name != "patch"}
    return merged


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What two environments differ in: name → both values in words, in the order in which they stand there."""
    first, second = (_flat(each) for each in (before, after))
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name, "-"), second.get(name, "-")) for name in names if first.get(name) != second.get(name)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        place = "" if name in ("packages", "machine") and not prefix else f"{prefix}{name} "
        if isinstance(value, Mapping):
            flat |= _flat(value, place)
        else:
            flat[f"{prefix}{name}"] = (
                value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value) else str(value)
            )
    return flat


def environment(cfg: DictConfig) -> tuple[dict[str, Any], str]:
    """What a run of this config is made with here and now, and the uncommitted changes of audiot's checkout."""
    git, patch = git_state(Path(audiot.__file__).parents[1])
    return {
        "seed": cfg.seed,
        "audiot": version("audiot"),
        "packages": package_versions(),
        "machine": _machine(str(cfg.trainer.accelerator)),
        "git": git,
        "inputs": input_digests(cfg),
    }, patch


def package_versions() -> dict[str, str]:
    """Versions of the packages that audiot and its extras require, where they are installed; tests and documents need others."""
    needed = [each for each in requires("audiot") or [] if not re.search("extra == .(test|docs)", each)]
    names = sorted({re.split(r"[\s\[<>=!~;(]", each, maxsplit=1)[0] for each in needed})
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # of an extra
            continue
    return found


def _machine(accelerator: str) -> dict[str, Any]:
    """The machine, with the device that a training takes; ``python`` and ``torch`` stand elsewhere."""
    kind = accelerator if accelerator in ("cpu", "cuda", "mps") else "auto"
    described = describe_machine(find_device(kind, f"trainer.accelerator={accelerator}"))
    del described["torch"]
    driver = Path("/proc/driver/nvidia/version")
    lines = driver.read_text(encoding="utf-8", errors="replace").splitlines() if driver.is_file() else []
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", lines[0]) if lines else None
    return described | {"gpus": torch.cuda.device_count(), "driver": found[0] if found else None}


def git_state(checkout: Path) -> tuple[dict[str, Any] | None, str]:
    """State of the checkout that audiot runs from, and its uncommitted changes as a patch; None where it is none.

    Returns:
        ``commit``, ``changed``, and where something is changed ``changes_sha256`` and ``untracked``, or else ``unknown``, the
        reason why git does not say.
    """
    if not (checkout / ".git").exists():
        return None, ""

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, check=True, timeout=60, stdin=subprocess.DEVNULL
        )
        return done.stdout.decode(errors="backslashreplace")

    try:
        commit = ask("rev-parse", "HEAD").strip()
        patch = ask("diff", "HEAD", "--no-ext-diff", "--no-color", "--", *CODE)
        new = ask("ls-files", "--others", "--exclude-standard", "--", *CODE).splitlines()
    except (OSError, subprocess.SubprocessError) as error:  # git is missing, or refuses a checkout of someone else
        said = getattr(error, "stderr", None)
        return {"unknown": " ".join((said or str(error).encode()).decode(errors="replace").split())[:200]}, ""
    state: dict[str, Any] = {"commit": commit, "changed": bool(patch or new)}
    if patch:
        state["changes_sha256"] = hashlib.sha256(patch.encode()).hexdigest()
    if new:
        digests = {name: file_digest(checkout / name) for name in new[:MOST_UNTRACKED] if (checkout / name).is_file()}
        state |= {"untracked": digests} | ({"more_untracked": len(new) - len(digests)} if len(new) > len(digests) else {})
    return state, patch


def input_digests(cfg: DictConfig) -> dict[str, str]:
    """Digest of each file or folder that a training starts from, by config key. What is on a hub has none."""
    found = {}
    for name in INPUTS:
        path = OmegaConf.select(cfg, name)
        if isinstance(path, str) and Path(path).exists():
            found[name] = _digest(Path(path))
    return found


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of all files in a folder."""
    if path.is_file():
        return file_digest(path)
    files = sorted((each.relative_to(path).as_posix(), each) for each in path.rglob("*") if each.is_file())
    return hashlib.sha256(repr([(name, file_digest(each)) for name, each in files]).encode()).hexdigest()
