"""Jobs of SLURM that are put back into the queue and start again with the same command."""

from __future__ import annotations

import os
import subprocess


def has_restarted() -> bool:
    """Whether this process belongs to a job that was put back into the queue and has started again."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def job() -> str | None:
    """Name of the job that this process belongs to, as ``scontrol`` takes it; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue(name: str) -> str:
    """Put a job back into the queue, which also ends it; what came of it, in words."""
    command = ["scontrol", "requeue", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{' '.join(command)} failed: {error.strerror}"
    if done.returncode:
        return f"{' '.join(command)} failed: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}"
    return f"job {name} is back in the queue"
