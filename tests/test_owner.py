"""Whole runs that are killed, started twice at once, or started without a folder."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from faults import tries
from omegaconf import OmegaConf

from audiot.base.config import launch_name
from audiot.base.lock import LOCK

TINY = [
    "data=folder",
    "data.root=audio",
    "data.valid_fraction=0.2",
    "data.num_workers=1",
    "data.prepare.num_jobs=1",
    "data.batch_s=4",
    "model.embed_dim=24",
    "model.num_heads=2",
    "model.ffn_dim=48",
    "model.num_layers=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=40",
    "trainer.val_check_interval=10",
    "trainer.log_every_n_steps=3",
    "checkpoint.every_n_steps=5",
    "probe=false",
    "logger=csv",
]


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A folder to run in, with audio and the prepared corpus."""
    folder = tmp_path_factory.mktemp("owner")
    noise = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for number in range(20):
        soundfile.write(folder / "audio" / f"{number:02d}.wav", 0.1 * noise.standard_normal(16000), 16000)
    return folder


@pytest.fixture
def start(where):
    """Starts a command in that folder; what still runs at the end is killed."""
    started = []

    def begin(*arguments):
        command = [sys.executable, "-m", "audiot", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=where, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def until(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < end
        time.sleep(0.005)


def rows(folder):
    """The rows of a log, of a run that may be writing it."""
    path = folder / "metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("attempt", tries())
def test_a_run_that_is_killed_twice_has_the_log_of_an_unbroken_one(where, start, attempt):
    unbroken = start("pretrain", *TINY, f"hydra.run.dir=unbroken{attempt}")
    folder = where / f"killed{attempt}"
    process = start("pretrain", *TINY, f"hydra.run.dir=killed{attempt}")
    until(
        lambda: (folder / "checkpoints" / "step=15.ckpt").exists() and any(row["step"] == "17" for row in rows(folder)), process
    )
    time.sleep(0.011 * attempt)
    process.kill()
    process.wait()
    assert (folder / LOCK).exists()
    before = (folder / "metrics.csv").read_bytes()
    log = (folder / "train.log").stat().st_size
    process = start("pretrain", f"resume=killed{attempt}")
    until(lambda: (folder / "train.log").stat().st_size > log, process)  # it starts
    process.kill()
    process.wait()
    assert (folder / "metrics.csv").read_bytes() == before
    with (folder / "metrics.csv").open("ab") as stream:
        stream.write(b"0.1,\0\0\0")  # as a machine leaves it that loses its power
    process = start("pretrain", f"resume=killed{attempt}")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "had 1 damaged line, which is left out now" in out
    assert not (folder / LOCK).exists()
    assert unbroken.wait(300) == 0

    def steady(run):  # all but how fast it was
        return [{name: value for name, value in row.items() if "per_s" not in name and "wait" not in name} for row in rows(run)]

    assert steady(folder) == steady(where / f"unbroken{attempt}")


@pytest.mark.slow
@pytest.mark.parametrize("attempt", tries())
def test_one_of_two_runs_that_start_at_once_in_a_folder_is_refused(where, start, attempt):
    folder = where / f"both{attempt}"
    both = [start("pretrain", *TINY, f"seed={seed}", f"hydra.run.dir={folder.name}") for seed in (1, 2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    refused = [process.returncode for process in both].index(1)
    owner = both[1 - refused]
    line = said[refused].splitlines()[-1]
    assert re.fullmatch(rf"audiot: error: {folder} is in use by process {owner.pid} on \S+ since .*", line)
    assert "Traceback" not in said[refused]
    assert OmegaConf.load(folder / "config.yaml").seed == 2 - refused
    assert f"seed={2 - refused}" in (folder / ".hydra" / "overrides.yaml").read_text()
    assert not (folder / LOCK).exists()
    assert (folder / "summary.json").is_file()


@pytest.mark.slow
def test_a_run_is_not_resumed_while_it_runs_nor_is_its_round(where, start):
    process = start("pretrain", *TINY, "trainer.max_steps=100000", "hydra.run.dir=running")
    until(lambda: (where / "running" / "checkpoints" / "step=5.ckpt").exists(), process)
    for place in ("resume=running", "hydra.run.dir=running", "hydra.run.dir=running/rounds/1"):
        second = start("pretrain", *([] if "resume" in place else TINY), place)
        err = second.communicate(timeout=120)[1]
        assert second.returncode == 1
        assert f"audiot: error: {where / 'running'} is in use by process {process.pid} on " in err
    assert process.poll() is None
    assert not (where / "running" / "rounds").exists()


@pytest.mark.slow
def test_runs_without_a_folder_have_folders_of_their_own_and_ranks_share_one(where, start):
    given = [*TINY, "trainer.max_steps=2", "trainer.val_check_interval=2"]
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_s=2"]
    for process in [start("pretrain", *given), start("pretrain", *given), start("pretrain", *given, *two)]:
        assert process.wait(300) == 0, process.communicate()[1][-2000:]
    runs = list((where / "outputs" / "pretrain").iterdir())
    assert len(runs) == 3
    assert all((run / "summary.json").is_file() and not (run / LOCK).exists() for run in runs)


def test_names_of_one_second_differ_and_tasks_of_one_slurm_step_share_theirs(monkeypatch):
    assert len({launch_name() for _ in range(5)}) > 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}", launch_name())
    for name, value in (("SLURM_NTASKS", "2"), ("SLURM_JOB_ID", "71"), ("SLURM_STEP_ID", "0")):
        monkeypatch.setenv(name, value)
    assert launch_name() == "slurm-71-0"
