"""Faults to inject, and how often."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from some import some

TRIES = 10
NAMESPACE = ("unshare", "--mount", "--map-root-user")


def tries(count: int = TRIES):
    """Parameters of a test that injects a fault: the gate takes the first, ``pytest -m slow`` the others."""
    return some(range(count), [0])


def private_disks():
    """Skip a test where this user may not mount a disk of its own, which no other process sees."""
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False) if shutil.which("unshare") else None
    if tried is None or tried.returncode:
        pytest.skip("did not run: it needs unshare and the right to a private mount namespace")


class SmallDisk:
    """A disk of its own for the commands of a test.

    Args:
        place: Empty folder where it lies; ``/dev/shm`` for a small shared memory.
        size: Its size, as ``mount`` takes it: ``600k``, say.
        kept: Folder outside of it, for what the commands print.
    """

    def __init__(self, place: Path, size: str, kept: Path) -> None:
        self.place, self.size, self.kept = place, size, kept
        self.lines: list[str] = []
        self.count = 0

    def run(self, *command: object) -> int:
        """Add a command; its number, for `told`."""
        self.count += 1
        name = shlex.quote(str(self.kept / f"{self.count}"))
        self.lines.append(f"{shlex.join(map(str, command))} >{name}.out 2>{name}.err; echo $? >{name}.code")
        return self.count

    def grow(self, size: str) -> None:
        """Make room."""
        self.lines.append(f"mount -o remount,size={size} {shlex.quote(str(self.place))}")

    def go(self, **environment: str) -> list[SimpleNamespace]:
        """Run all commands one after the other: ``code``, ``out`` and ``err`` of each."""
        script = "\n".join([f"mount -t tmpfs -o size={self.size} tmpfs {shlex.quote(str(self.place))} || exit 9", *self.lines])
        subprocess.run([*NAMESPACE, "sh", "-c", script], env=os.environ | environment, check=True, timeout=600)
        return [
            SimpleNamespace(
                code=int((self.kept / f"{number}.code").read_text()),
                **{name: (self.kept / f"{number}.{name}").read_text() for name in ("out", "err")},
            )
            for number in range(1, self.count + 1)
        ]
