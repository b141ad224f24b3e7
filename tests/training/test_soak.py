"""A long run of the real command needs no more of anything at its end than near its start."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

TESTS = Path(__file__).parents[1]
MIB = 2**20
LOG_EVERY, SAVE_EVERY = 10, 100
SMALL = [
    "data=folder",
    "data.root=audio",
    "data.valid_fraction=0.2",
    "data.prepare.num_jobs=1",
    "data.batch_s=2",
    "data.crop_s=1",
    "model.embed_dim=16",
    "model.num_heads=2",
    "model.ffn_dim=16",
    "model.num_layers=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    f"trainer.log_every_n_steps={LOG_EVERY}",
    f"checkpoint.every_n_steps={SAVE_EVERY}",
    "probe=false",
]


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A folder with 20 s of audio, in which commands run."""
    folder = tmp_path_factory.mktemp("soak")
    (folder / "audio").mkdir()
    noise = np.random.default_rng(0)
    for number in range(20):
        soundfile.write(folder / "audio" / f"{number:02d}.wav", 0.1 * noise.standard_normal(16000), 16000)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("steps", "workers", "most_growth"),
    [
        pytest.param(2000, 1, 16 * MIB, id="2,000 steps with a loader process"),
        pytest.param(20_000, 0, 8 * MIB, id="20,000 steps"),
    ],
)
def test_a_long_run_gathers_nothing(where, steps, workers, most_growth):
    run = where / f"run-{steps}"
    every = steps // 20  # steps between two validations, and between two counts
    census = {"_target_": "census.Census", "path": "'${run_dir}/census.jsonl'"}
    census |= {"every": every, "objects_every": 5 * every}
    command = [sys.executable, "-m", "audiot", "pretrain", *SMALL, f"hydra.run.dir={run}"]
    command += [f"+callbacks.census.{name}={value}" for name, value in census.items()]
    command += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={every}", f"data.num_workers={workers}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    with (where / f"said-{steps}").open("w") as said:
        subprocess.run(command, cwd=where, env=environment, stdout=said, stderr=subprocess.STDOUT, check=True)

    counted = [json.loads(line) for line in (run / "census.jsonl").read_text().splitlines()]
    settled, last = (next(each for each in counted if each["step"] == step) for step in (steps // 4, steps))
    for each in counted:
        print(", ".join(f"{name} {value:,}" for name, value in each.items() if name != "kinds"))
    print(f"{1000 * sum(each['since_s'] for each in counted[1:]) / (steps - every):.2f} ms per step")
    grown = {name: count - settled["kinds"].get(name, 0) for name, count in last["kinds"].items()}
    print({name: count for name, count in grown.items() if count})

    assert last["epoch"] > settled["epoch"] > 0
    for what in ("files", "threads", "processes"):
        assert len({each[what] for each in counted if each["step"] >= settled["step"]}) == 1, what
    assert last["objects"] - settled["objects"] < 0.01 * settled["objects"], grown
    assert last["resident"] - settled["resident"] < most_growth

    with (run / "metrics.csv").open(newline="") as stream:
        rows = sum(1 for _ in csv.DictReader(stream))
    assert rows <= 2 * steps // LOG_EVERY + steps // every + 1  # of figures and of rates; the last validation
    assert len(list((run / "checkpoints").iterdir())) <= 3  # the latest two and the best
    assert (run / "train.log").stat().st_size < 4096
    assert (where / f"said-{steps}").stat().st_size < 100_000  # the progress bar, in a file
