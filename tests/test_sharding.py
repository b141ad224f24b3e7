"""Parameters that are shared out among two processes train as they do in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).parent.parent / "scripts" / "pretrain.py"
TINY = [
    "data=folder",
    "data.valid_fraction=0.2",
    "data.num_workers=0",
    "data.prepare.num_jobs=1",
    "data.batch_s=2",
    "model.embed_dim=24",
    "model.num_heads=2",
    "model.ffn_dim=48",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "checkpoint.every_n_steps=2",
    "probe=false",
]


def pretrain(folder, name, *overrides):
    """The weights that `pretrain` exports to `folder`/`name`."""
    given = [*TINY, f"data.root={folder / 'audio'}", f"data_dir={folder / 'data'}", f"hydra.run.dir={folder / name}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, PROGRAM, *given], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / name / "encoder" / "model.safetensors")


def test_a_sharded_training_gives_the_encoder_of_one_process_that_adds_up_as_many_batches(tmp_path):
    noise = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for number in range(25):  # three validation batches, which two processes can't share evenly
        soundfile.write(tmp_path / "audio" / f"{number:02d}.wav", 0.1 * noise.standard_normal(16000), 16000)
    alone = pretrain(tmp_path, "alone", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4")
    sharded = pretrain(tmp_path, "sharded", "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert sharded.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=2e-5, msg=name)
