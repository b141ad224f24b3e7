"""Whole commands on small disks, with little shared memory and with little memory."""

from __future__ import annotations

import csv
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import SmallDisk, private_disks, tries
from test_cli import DATA, MODEL

PRETRAIN = [*DATA, *MODEL, "trainer.accelerator=cpu", "trainer.max_steps=12", "trainer.val_check_interval=4", "probe=false"]
PRETRAIN += ["checkpoint.every_n_steps=1", "checkpoint.keep_last=1", "trainer.log_every_n_steps=1"]
AUDIOT = [sys.executable, "-m", "audiot"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder for ``AUDIOT_DATA`` with the demo speech of all tests here, and an exported encoder in ``run/encoder``."""
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("faults")
    given = [*AUDIOT, "pretrain", *PRETRAIN, f"data_dir={folder}", f"hydra.run.dir={folder / 'run'}"]
    subprocess.run(given, check=True, capture_output=True, timeout=600)
    return folder


@pytest.fixture
def small(tmp_path):
    """A function from a size to a disk."""
    private_disks()
    (tmp_path / "disk").mkdir()
    return lambda size, place=tmp_path / "disk": SmallDisk(place, size, tmp_path)


def errors(result):
    """What a command said of its error: one line."""
    assert "Traceback" not in result.err + result.out, result.err[-3000:]
    (line,) = [line for line in result.err.replace("\r", "\n").splitlines() if line.startswith("audiot: error: ")]
    return line


def sizes(folder):
    """Bytes of a checkpoint of a run, and of all else in it."""
    saved = max(path.stat().st_size for path in folder.glob("checkpoints/*"))
    return saved, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent.name != "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("attempt", tries())
def test_a_disk_that_fills_up_keeps_the_older_checkpoint_and_the_run_goes_on(corpus, small, tmp_path, attempt):
    saved, rest = sizes(corpus / "run")
    disk = small(f"{(3 * saved // 2 + (attempt + 1) * rest // 10) // 1024}k")
    run = tmp_path / "disk" / "run"
    kept = "import sys; from pathlib import Path; from audiot.runs import checkpoints, damage; "
    kept += "print(*[damage(path) for path in checkpoints(Path(sys.argv[1]) / 'checkpoints')])"
    disk.run(*AUDIOT, "pretrain", *PRETRAIN, f"data_dir={corpus}", f"hydra.run.dir={run}")
    disk.run(sys.executable, "-c", kept, run)
    disk.grow("1g")
    disk.run(*AUDIOT, "pretrain", f"resume={run}")
    disk.run("cat", run / "metrics.csv")
    full, damages, resumed, metrics = disk.go()
    assert full.code == 1
    assert str(tmp_path / "disk") in errors(full)
    assert "make room" in errors(full)
    assert f"resume:  audiot pretrain resume={run}" in full.out
    assert {*damages.out.split()} == {"None"}  # there are some, and all are whole
    assert resumed.code == 0, resumed.err
    assert losses(metrics.out) == losses((corpus / "run" / "metrics.csv").read_text())


def losses(text):
    rows = list(csv.DictReader(text.splitlines()))
    return {(row["step"], name): row[name] for row in rows for name in row if "cross_entropy" in name and row[name]}


@pytest.mark.slow
@pytest.mark.parametrize("attempt", tries())
def test_a_disk_that_fills_up_in_fine_tuning_keeps_the_older_checkpoint_too(corpus, small, tmp_path, attempt):
    disk = small(f"{130 + 7 * attempt}k")
    run = tmp_path / "disk" / "run"
    given = [*DATA, "trainer.accelerator=cpu", "trainer.max_steps=12", "trainer.val_check_interval=1", f"data_dir={corpus}"]
    given += [f"upstream.path={corpus / 'run' / 'encoder'}", "downstream.train_encoder=true", f"hydra.run.dir={run}"]
    disk.run(*AUDIOT, "finetune", *given)
    disk.grow("1g")
    disk.run(*AUDIOT, "finetune", f"resume={run}")
    full, resumed = disk.go()
    assert full.code == 1
    assert str(tmp_path / "disk") in errors(full)
    if "resume:" in full.out:
        assert resumed.code == 0, resumed.err
        assert "next:   audiot predict" in resumed.out


@pytest.mark.slow
@pytest.mark.parametrize("attempt", tries())
def test_a_disk_that_fills_up_in_preparation_is_named_and_the_same_command_goes_on(corpus, small, tmp_path, attempt):
    disk = small(f"{200 + 60 * attempt}k")
    given = [*AUDIOT, "prepare", *DATA[:-2], "data.num_workers=0", f"data_dir={tmp_path / 'disk'}"]
    disk.run(*given)
    disk.grow("1g")
    disk.run(*given)
    full, again = disk.go()
    assert full.code == 1
    assert "MiB are free on the disk of" in errors(full)
    assert again.code == 0, again.err


@pytest.mark.slow
@pytest.mark.parametrize("attempt", tries())
def test_little_shared_memory_is_told_before_training(corpus, small, tmp_path, attempt):
    disk = small(f"{64 + 64 * attempt}k", Path("/dev/shm"))
    given = [*PRETRAIN, "data.num_workers=1", f"data_dir={corpus}", f"hydra.run.dir={tmp_path / 'run'}"]
    disk.run(*AUDIOT, "pretrain", *given)
    disk.run(*AUDIOT, "pretrain", *given, "data.num_workers=0")
    little, without = disk.go()
    assert little.code == 1
    assert "/dev/shm has " in errors(little)
    assert "data.num_workers=0" in errors(little)
    assert without.code == 0, without.err


@pytest.mark.slow
@pytest.mark.parametrize("attempt", tries())
def test_little_memory_is_told_with_the_batch_and_what_to_lower(corpus, tmp_path, attempt):
    given = [*PRETRAIN, "data.batch_s=1000", "model.embed_dim=1024", "model.ffn_dim=16384", f"data_dir={corpus}"]
    given += [f"hydra.run.dir={tmp_path / 'run'}", "objective=mockingjay", "features.stack=1"]
    limit = 2**29 + attempt * 2**25  # bytes of data above those of an idle program

    def lower():
        resource.setrlimit(resource.RLIMIT_DATA, (2**30 + limit, 2**30 + limit))

    command = [*AUDIOT, "pretrain", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, preexec_fn=lower, check=False)
    assert done.returncode == 1
    assert "lower data.batch_s or data.crop_s" in errors(SimpleNamespace(out=done.stdout, err=done.stderr))
