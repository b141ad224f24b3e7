"""A too small /dev/shm is reported in one line: its free size, the needed size and the remedy."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from test_cli import run

from audiot.data import shared_memory
from audiot.data.shared_memory import check_room, shared_memory_errors

MB = 2**20


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Sets the free size."""
    monkeypatch.setattr(shared_memory, "PLACE", tmp_path)

    def set_free(size):
        status = SimpleNamespace(f_bavail=size // 4096, f_frsize=4096)
        monkeypatch.setattr(shared_memory, "os", SimpleNamespace(statvfs=lambda path: status))

    return set_free


def test_loaders_that_fit_are_let_pass(small):
    small(64 * MB)
    check_room(7, 4, 2 * MB)  # 7 × 4 and 2 in use: 60 MB
    check_room(0, 4, 1000 * MB)  # no process, nothing to hand over


def test_loaders_that_do_not_fit_are_refused_with_what_would(small):
    small(64 * MB)
    with pytest.raises(ValueError, match=r"^/dev/shm has 64 MB free") as refused:
        check_room(8, 4, 2 * MB)
    assert str(refused.value) == (
        "/dev/shm has 64 MB free, but 8 loader processes need about 68 MB of it (4 batches of 2 MB each): "
        "docker run --shm-size=1g makes it larger, else set data.num_workers=7 or a smaller data.batch_s"
    )
    check_room(7, 4, 2 * MB)
    with pytest.raises(ValueError, match=r"2 × 7 loader processes need about 120 MB .* data\.num_workers=3 or"):
        check_room(7, 4, 2 * MB, training_processes=2)
    with pytest.raises(ValueError, match=r"--shm-size=40g .* --workers 0 or a smaller --batch-s"):
        check_room(8, 4, 600 * MB, remedy="--workers {workers} or a smaller --batch-s")


def test_a_system_without_shared_memory_files_has_nothing_to_look_at(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "PLACE", tmp_path / "nowhere")
    check_room(8, 4, 10**12)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="something else"), shared_memory_errors(1):
        raise RuntimeError("something else")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Arguments of a tiny pre-training run on four seconds of noise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wavs").mkdir()
    for number in range(8):
        samples = 0.1 * np.random.default_rng(number).standard_normal(8000)
        soundfile.write(tmp_path / "wavs" / f"{number}.wav", samples, 16000)
    return ["data=folder", "data.root=wavs", "data_dir=data", "data.batch_s=2", "model.num_layers=1", "trainer.accelerator=cpu"]


def test_training_is_refused_before_it_starts(corpus, small):
    small(100_000)
    error = run("pretrain", *corpus, "data.num_workers=1").err.splitlines()[-1]
    # 16-bit samples of 2 s at 16 kHz, 4 of them ahead and 2 in use.
    assert error.startswith("audiot: error: /dev/shm has 0.0938 MB free, but 1 loader processes need about 0.366 MB of it")
    assert error.endswith("else set data.num_workers=0 or a smaller data.batch_s")


def test_a_loader_that_finds_no_room_says_so(corpus, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Resource temporarily unavailable (11)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)  # inherited by the loader processes, which are forked
    result = run("pretrain", *corpus, "data.num_workers=1")
    assert result.code == 1
    error = result.err.splitlines()[-1]
    assert "free, but a loader process needs " in error
    assert error.endswith("makes it larger, else set data.num_workers=0 or a smaller data.batch_s")
    assert "Traceback" not in result.err
