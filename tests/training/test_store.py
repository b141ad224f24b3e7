"""Checkpoints: whole or not there, damaged ones noticed, which ones are kept, and the validation that was due."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import zipfile

import pytest
import torch
from faults import tries
from pytorch_lightning.callbacks import Callback

from audiot.data import loaders
from audiot.data.loaders import LoaderStoppedError
from audiot.pretraining import MaskedAcousticModel
from audiot.runs import Interrupted, checkpoints, damage, newest_checkpoint
from audiot.training.csv_logger import RunCSVLogger
from audiot.training.interrupt import GracefulInterrupt
from audiot.training.store import CheckpointStore, WholeFiles

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")


def run(pretraining, folder, *callbacks, resume=False, **options):
    """Nine steps, with a validation after every third; the module and the store."""
    store = CheckpointStore(folder / "checkpoints", options.pop("every_n_steps", 2), options.pop("keep_last", 2))
    interrupt = GracefulInterrupt(folder / "checkpoints")
    module = pretraining.module()
    options |= {"logger": [RunCSVLogger(folder)], "log_every_n_steps": 1, "plugins": [WholeFiles()]}
    trainer = pretraining.trainer(folder, [*callbacks, interrupt, store], **options)
    path = newest_checkpoint(folder) if resume else None
    trainer.fit(module, pretraining.data(), ckpt_path=path, weights_only=True if resume else None)
    return module, store


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        found = {}
        for row in csv.DictReader(stream):
            found.setdefault(int(row["step"]), {}).update({name: value for name, value in row.items() if value})
    return found


def steps(folder):
    return [int(path.stem.split("=")[1]) for path in checkpoints(folder / "checkpoints")]


class Signal(Callback):
    """Send this process a signal in a hook, at a step."""

    def __init__(self, hook, step, number=signal.SIGTERM):
        self.step, self.number = step, number
        setattr(self, hook, self.send)

    def send(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def unbroken(pretraining, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    module, store = run(pretraining, folder)
    return module, store, folder


def test_the_latest_and_the_best_are_kept(pretraining, unbroken, tmp_path, monkeypatch):
    _, store, folder = unbroken
    assert steps(folder) == sorted({9, 8, store.best_step}, reverse=True)  # 2, 4, 6 and 8, and before each validation 3, 6 and 9
    losses = {step + 1: float(row["pretrain/val_l1"]) for step, row in rows(folder).items() if "pretrain/val_l1" in row}
    assert store.best_step == min(losses, key=losses.get)

    class WorseEachTime(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("worse", float(trainer.global_step))

    monkeypatch.setattr(MaskedAcousticModel, "monitor", "worse")
    _, store = run(pretraining, tmp_path, WorseEachTime())
    assert store.best_step == 3
    assert steps(tmp_path) == [9, 8, 3]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_validation_that_was_due_takes_place_when_the_run_goes_on(pretraining, unbroken, tmp_path, hook, number):
    module, store, folder = unbroken
    words = "in the validation after step 6" if "validation" in hook else "interrupted after step 6"
    with pytest.raises(Interrupted, match=words) as stop:
        run(pretraining, tmp_path, Signal(hook, 6, number))
    assert stop.value.checkpoint == tmp_path / "checkpoints" / "step=6.ckpt"
    assert "pretrain/val_l1" not in rows(tmp_path)[5]
    resumed, again = run(pretraining, tmp_path, resume=True)
    for one, other in zip(resumed.state_dict().values(), module.state_dict().values(), strict=True):
        assert one.equal(other)
    assert rows(tmp_path) == rows(folder)
    assert (again.best_step, again.best_score) == (store.best_step, store.best_score)
    assert steps(tmp_path) == steps(folder)


def test_weights_that_are_not_finite_replace_nothing(pretraining, tmp_path, caplog):
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                with torch.no_grad():
                    next(pl_module.parameters()).fill_(torch.nan)

    caplog.set_level("INFO", "audiot")
    run(pretraining, tmp_path, Break())
    assert steps(tmp_path)[:2] == [4, 3]
    (line,) = (record.message for record in caplog.records if "not finite" in record.message)
    assert "after step 6 are not finite and are not saved" in line
    assert "step=4.ckpt stays" in line


# Damage


def flip(path, offset, bit):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def zero(path, offset):
    content = bytearray(path.read_bytes())
    content[offset : offset + 4096] = bytes(len(content[offset : offset + 4096]))
    path.write_bytes(content)


def tensor_bytes(path):
    """Where in a checkpoint's file the bytes of its tensors lie."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        for part in archive.infolist():
            stream.seek(part.header_offset + 26)
            name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
            if "/data/" in part.filename and part.file_size > 64:
                begin = part.header_offset + 30 + name + extra
                yield from range(begin, begin + part.file_size)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("harm", ["bit", "block", "cut", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_stands_in(unbroken, tmp_path, harm, seed, caplog):
    caplog.set_level("INFO", "audiot")
    source = unbroken[2] / "checkpoints"
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for path in checkpoints(source):
        (folder / path.name).write_bytes(path.read_bytes())
    newest, before, *_ = checkpoints(folder)
    assert newest_checkpoint(tmp_path) == newest
    draw = random.Random(seed)
    if harm == "bit":
        flip(newest, draw.choice(list(tensor_bytes(newest))), draw.randrange(8))
    elif harm == "block":
        content = newest.read_bytes()
        zero(newest, draw.choice([place for place in tensor_bytes(newest) if content[place]]))
    else:
        newest.write_bytes(newest.read_bytes()[: 0 if harm == "empty" else draw.randrange(newest.stat().st_size)])
    assert newest_checkpoint(tmp_path) == before
    assert any(f"damaged {newest}" in record.message and before.name in record.message for record in caplog.records)
    for path in checkpoints(folder)[1:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"step=9\.ckpt is damaged: "):
        newest_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_older_checkpoint_and_is_named(pretraining, tmp_path, monkeypatch):
    import resource

    class Full(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:  # as a full disk does, writing fails amid the file
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match=r"step=6.ckpt could not be written, .* MiB are free .*step=4.ckpt is as it was"):
            run(pretraining, tmp_path, Full())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert steps(tmp_path)[0] == 4
    assert damage(newest_checkpoint(tmp_path)) is None
    assert not list((tmp_path / "checkpoints").glob(".*"))  # nothing half-written is left


@pytest.mark.parametrize("attempt", tries())
def test_a_loader_that_stops_in_training_leaves_a_checkpoint(pretraining, unbroken, tmp_path, monkeypatch, attempt):
    class Kill(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)

    data = pretraining.data
    monkeypatch.setattr(loaders, "LOOK_S", 1)
    monkeypatch.setattr(pretraining, "data", lambda: data(num_workers=1))
    with pytest.raises(LoaderStoppedError, match=r"batch \d+ of epoch \d+: process \d+ \(SIGKILL\) ended"):
        run(pretraining, tmp_path, Kill(), max_steps=200, val_check_interval=300)
    saved = newest_checkpoint(tmp_path)
    assert damage(saved) is None
    assert steps(tmp_path)[0] >= 5
