"""Callbacks in small trainings: Ctrl-C, throughput, pictures, and the rows of a resumed run."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint

from audiot.runs import Interrupted
from audiot.training.callbacks import (
    ObjectivePictures,
    ProgressBar,
    Throughput,
)
from audiot.training.csv_logger import RunCSVLogger
from audiot.training.interrupt import AnyProcess, GracefulInterrupt

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")
PNG = b"\x89PNG\r\n\x1a\n"


class Send(Callback):
    """Send this process a signal in the middle of a batch."""

    def __init__(self, number, batch):
        self.number = number
        self.batch = batch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.fit_loop.epoch_loop.batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


def state(module):
    return torch.cat([tensor.flatten() for tensor in module.state_dict().values() if tensor.is_floating_point()])


@pytest.fixture(scope="module")
def unbroken(pretraining, tmp_path_factory):
    """Weights of an unbroken run of nine steps, and its folder with metrics.csv."""
    folder = tmp_path_factory.mktemp("unbroken")
    model = pretraining.module()
    pretraining.trainer(folder, [LearningRateMonitor("step")], logger=[RunCSVLogger(folder)], log_every_n_steps=2).fit(
        model, pretraining.data()
    )
    return state(model), folder


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 2), (signal.SIGINT, 3), (signal.SIGTERM, 5)])
def test_an_interrupted_run_finishes_its_step_and_resumes_exactly(pretraining, unbroken, tmp_path, number, step):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    trainer = pretraining.trainer(tmp_path, [Send(number, step - 1), GracefulInterrupt(tmp_path / "checkpoints")])
    with pytest.raises(Interrupted, match=f"interrupted after step {step}") as caught:
        trainer.fit(pretraining.module(), pretraining.data())
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert caught.value.checkpoint == tmp_path / "checkpoints" / f"step={step}.ckpt"
    assert caught.value.checkpoint.is_file()
    model = pretraining.module(seed=1)
    resumed = pretraining.trainer(tmp_path, [GracefulInterrupt(tmp_path / "checkpoints")])
    resumed.fit(model, pretraining.data(), ckpt_path=caught.value.checkpoint, weights_only=False)
    assert state(model).equal(unbroken[0])


def test_an_interrupt_amid_accumulation_waits_for_the_step(pretraining, tmp_path):
    options = {"accumulate_grad_batches": 3, "max_steps": 3, "val_check_interval": 4}
    whole = pretraining.module()
    pretraining.trainer(tmp_path, **options).fit(whole, pretraining.data())

    class SendEarly(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:  # the first of the second step's three
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="after step 2") as caught:
        pretraining.trainer(tmp_path, [SendEarly(), GracefulInterrupt(tmp_path)], **options).fit(
            pretraining.module(), pretraining.data()
        )
    model = pretraining.module(seed=1)
    pretraining.trainer(tmp_path, **options).fit(model, pretraining.data(), ckpt_path=caught.value.checkpoint, weights_only=False)
    assert state(model).equal(state(whole))


def test_without_a_folder_nothing_is_saved(pretraining, tmp_path):
    with pytest.raises(Interrupted) as caught:
        pretraining.trainer(tmp_path, [Send(signal.SIGINT, 0), GracefulInterrupt(None)], enable_checkpointing=False).fit(
            pretraining.module(), pretraining.data()
        )
    assert caught.value.checkpoint is None
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_second_interrupt_stops_at_once_and_a_second_termination_waits(pretraining, tmp_path):
    interrupt, before = GracefulInterrupt(None), signal.getsignal(signal.SIGINT)
    trainer, model = pretraining.trainer(tmp_path), pretraining.module()
    interrupt.on_train_start(trainer, model)
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupt.teardown(trainer, model, "fit")
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpus_whether_any_process_was_interrupted_is_known_a_step_later(tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    try:
        anywhere = AnyProcess()
        assert [anywhere.ask(flag, trainer) for flag in (False, True, False, False)] == [False, False, True, False]
    finally:
        torch.distributed.destroy_process_group()


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("crash", [4, 5, 6])  # rows of training: steps 1, 3, 5, 7 (counted from 0); of validation: 2, 5, 8
@pytest.mark.parametrize("saved", [2, 3])
def test_metrics_of_a_resumed_run_are_those_of_an_unbroken_one(pretraining, unbroken, tmp_path, saved, crash):
    class Crash(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == crash:
                raise RuntimeError("crash")

    def trainer(*callbacks):
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=saved, save_top_k=-1)
        return pretraining.trainer(
            tmp_path,
            [LearningRateMonitor("step"), *callbacks, keep],
            logger=[RunCSVLogger(tmp_path)],
            log_every_n_steps=2,
        )

    with pytest.raises(RuntimeError, match="crash"):
        trainer(Crash()).fit(pretraining.module(), pretraining.data())
    assert len(rows(tmp_path)) > 0
    trainer().fit(pretraining.module(), pretraining.data(), ckpt_path=tmp_path / f"step={saved}.ckpt", weights_only=False)
    assert rows(tmp_path) == rows(unbroken[1])


def test_throughput_counts_the_real_frames_of_every_step_but_the_first(pretraining, tmp_path):
    throughput = Throughput()
    pretraining.trainer(tmp_path, [throughput], max_steps=5, log_every_n_steps=2).fit(pretraining.module(), pretraining.data())
    expected = 0
    for number, batch in enumerate(pretraining.data().train_dataloader()):
        if number == 5:
            break
        if number:
            expected += sum(((length - 400) // 160 + 1) // 3 * 3 for length in batch["lengths"].tolist())
    assert throughput.total_frames == expected


def test_throughput_and_energy_leave_validation_out(pretraining, tmp_path, monkeypatch):
    class Clock(Callback):
        """A training batch takes 1 s, a validation batch 100 s. The first training batch isn't counted."""

        now = 0.0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.now += 1.0

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            self.now += 100.0

    clock, throughput = Clock(), Throughput()
    monkeypatch.setattr("audiot.training.callbacks.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("audiot.training.callbacks.energy_counter", lambda device: lambda: 500.0 * clock.now)  # 500 W
    trainer = pretraining.trainer(tmp_path, [clock, throughput], max_steps=5, val_check_interval=2)
    model, source = pretraining.module(), pretraining.data()
    trainer.fit(model, source)
    assert clock.now > 300
    assert throughput.total_s == 4.0
    clock.now += 50.0
    trainer.validate(model, source, verbose=False)  # none of training's time
    assert throughput.total_s == 4.0
    assert throughput.average == throughput.total_frames / 4.0
    assert throughput.energy_wh == pytest.approx(500.0 * 4.0 / 3600)


def test_no_energy_is_told_where_it_was_not_counted_from_the_beginning():
    throughput = Throughput()
    throughput.load_state_dict({"frames": 10, "seconds": 1.0})  # of a checkpoint from before energy was counted
    assert throughput.energy_wh is None
    throughput.load_state_dict({"frames": 10, "seconds": 1.0, "joules": 7200.0})
    assert throughput.energy_wh == 2.0


def test_every_validation_draws_one_picture(pretraining, tmp_path, drawn):
    trainer = pretraining.trainer(tmp_path, [ObjectivePictures(tmp_path / "plots")], max_steps=4, val_check_interval=2)
    trainer.fit(pretraining.module(), pretraining.data())
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == ["reconstruction-step000002.png", "reconstruction-step000004.png", "reconstruction.png"]
    contents = {name: (tmp_path / "plots" / name).read_bytes() for name in pictures}
    assert all(content.startswith(PNG) for content in contents.values())
    assert contents["reconstruction.png"] == contents["reconstruction-step000004.png"]
    assert contents["reconstruction.png"] != contents["reconstruction-step000002.png"]
    overall = float(trainer.callback_metrics["pretrain/val_l1"])
    assert drawn[1].get_suptitle().endswith(f", step 4; L1 of masked frames {overall:.3f} in validation")


def test_pictures_can_be_left_out(pretraining, tmp_path):
    pictures = ObjectivePictures(tmp_path / "plots", enabled=False)
    pretraining.trainer(tmp_path, [pictures], max_steps=2, val_check_interval=2).fit(pretraining.module(), pretraining.data())
    assert not (tmp_path / "plots").exists()


def test_pictures_change_nothing_in_training(pretraining, unbroken, tmp_path):
    model = pretraining.module()
    pretraining.trainer(tmp_path, [ObjectivePictures(tmp_path), Throughput()]).fit(model, pretraining.data())
    assert state(model).equal(unbroken[0])


def test_progress_bar_counts_all_batches_under_short_names(pretraining, tmp_path):
    bar = ProgressBar(refresh_rate=0)
    trainer = pretraining.trainer(tmp_path, [bar], enable_progress_bar=True, max_steps=2, accumulate_grad_batches=2)
    trainer.fit(pretraining.module(), pretraining.data())
    assert bar.total_train_batches == 4
    assert {"loss", "val_l1"} <= bar.get_metrics(trainer, trainer.lightning_module).keys()


class Written(io.StringIO):
    """What a program writes, to a terminal or to a file."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize(("terminal", "drawn"), [(True, {1, 2, 3, 4, 5, 6, 7, 8, 9}), (False, {1, 9})])
def test_a_file_gets_few_progress_bars(pretraining, tmp_path, monkeypatch, terminal, drawn):
    out = Written(terminal)
    monkeypatch.setattr(sys, "stdout", out)
    trainer = pretraining.trainer(tmp_path, [ProgressBar(refresh_rate=1)], enable_progress_bar=True, val_check_interval=100)
    trainer.fit(pretraining.module(), pretraining.data())
    assert {int(number) for number in re.findall(r" (\d+)/9 \[", out.getvalue())} - {0} == drawn
