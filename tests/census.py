"""A callback that counts what a long training must not gather: memory, objects, open files, threads, processes."""

from __future__ import annotations

import gc
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytorch_lightning as pl


class Census(pl.Callback):
    """Count every so many steps, and append a line of JSON.

    Args:
        path: File of the lines.
        every: Steps between two counts.
        objects_every: Steps between two counts of Python's objects.
    """

    def __init__(self, path: str, every: int, objects_every: int) -> None:
        self.path = Path(path)
        self.every, self.objects_every = every, objects_every
        self.since = 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Count, where it is time."""
        step = trainer.global_step
        if step % self.every:
            return
        now = time.monotonic()
        found = counts() | {"step": step, "epoch": batch["position"][0], "since_s": now - self.since}
        if step % self.objects_every == 0:
            kinds = Counter(type(each).__name__ for each in gc.get_objects())
            found |= {"objects": kinds.total(), "kinds": dict(kinds)}
        with self.path.open("a") as stream:
            stream.write(json.dumps(found) + "\n")
        self.since = time.monotonic()


def counts() -> dict[str, int]:
    """What this process has: resident bytes, open files, threads, processes below it."""
    me = Path("/proc/self")
    children = [(task / "children").read_text().split() for task in (me / "task").iterdir()]
    return {
        "resident": int((me / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir(me / "fd")),
        "threads": len(children),
        "processes": sum(map(len, children)),
    }
