"""`audiot tune` on a tiny demo corpus, on the CPU."""

from __future__ import annotations

import csv
import json
import shlex

import pytest
from test_cli import DATA, MODEL, last_line, made, run, succeed  # noqa: F401

DEVICE = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
QUICK = ["tune.batch.warmup=1", "tune.batch.steps=1", "tune.lr.steps=12", "tune.lr.repeats=2", "tune.lr.lowest=1e-4"]


@pytest.mark.slow  # the documented commands are run in test_readme.py
def test_one_command_finds_both_and_prints_a_command_that_runs(made, tmp_path):  # noqa: F811
    given = [*DATA[:-1], "data.batch_s=2", *MODEL, *DEVICE, "data.crop_s=1"]
    out = succeed("tune", *given, *QUICK, "seed=3", f"hydra.run.dir={tmp_path / 'tune'}")
    found = json.loads((tmp_path / "tune" / "tune.json").read_text())
    batch, lr = found["batch"], found["lr"]
    assert 15 < batch["largest_s"] <= 16, "8 times data.batch_s"
    assert [each["utterances"] for each in batch["tried"]][:3] == [1, 2, 4]
    assert batch["memory_probed"] is False
    assert "memory is not probed on this device" in out
    best = max(each["frames_per_s"] for each in batch["tried"])
    smallest = min(each["batch_s"] for each in batch["tried"] if each["frames_per_s"] >= 0.95 * best)
    assert batch["batch_s"] == smallest == lr["batch_s"]
    assert [test["seed"] for test in lr["tests"]] == [3, 4]
    assert 1e-4 <= min(test["suggested"] for test in lr["tests"]) <= lr["lr"] * 1.05
    with (tmp_path / "tune" / "tune.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["batch_s"]) for row in rows if row["what"] == "batch"] == [each["batch_s"] for each in batch["tried"]]
    steps = [row for row in rows if row["what"] == "lr" and row["seed"] == "4"]
    assert float(steps[0]["lr"]) == pytest.approx(1e-4)
    assert len(steps) == lr["tests"][1]["steps"]
    assert (tmp_path / "tune" / "tune.png").stat().st_size > 10_000
    command = shlex.split(last_line(out).removeprefix("next:"))
    assert command[:2] == ["audiot", "pretrain"]
    assert command[2:] == [
        *(each for each in given if not each.startswith("data.batch_s=")),
        "seed=3",
        f"data.batch_s={batch['batch_s']}",
        f"optimizer.lr={lr['lr']}",
    ]
    assert found["next"] == shlex.join(command)
    short = ["trainer.max_steps=1", "trainer.val_check_interval=1", "probe=false", "plots=false"]
    succeed(*command[1:], *short, f"hydra.run.dir={tmp_path / 'next'}")


@pytest.mark.slow
def test_the_rate_alone_is_a_function_of_the_seed(made, tmp_path):  # noqa: F811
    given = [*DATA, *MODEL, *DEVICE, *QUICK, "tune.batch.search=false", "tune.lr.repeats=1", "plots=false"]
    files = []
    for name in ("one", "two"):
        out = succeed("tune", *given, f"hydra.run.dir={tmp_path / name}")
        files.append((tmp_path / name / "tune.csv").read_bytes())
    assert files[0] == files[1]
    assert not list(tmp_path.rglob("*.png"))
    assert "data.batch_s=10 " in last_line(out), "the user's own"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["downstream=keyword", "upstream.path=x"],
            "downstream: audiot tune is for pre-training",
        ),
        (["tune.batch.search=false", "tune.lr.search=false"], "leave nothing to find"),
        (["tune.lr.lowest=1"], "tune.lr.lowest must be above 0 and below tune.lr.highest=1.0, found 1"),
        (["tune.batch.margin=1.5"], "tune.batch.margin must be a share in [0, 1), found 1.5"),
        (["tune.batch.largest_s=all"], "tune.batch.largest_s must be auto or a positive number of seconds, found all"),
        (["tune.lr.steps=3"], "tune.lr.steps must be a whole number, at least 10, found 3"),
        (["trainer=fsdp"], "audiot tune measures one device: set trainer=gpu"),
        (["trainer.accelerator=cpu", "trainer.devices=2"], "(trainer.devices=2 are 2)"),
        (["resume=x"], "resume a run; tune starts anew"),
    ],
)
def test_what_can_not_be_tuned_is_told_in_one_line(given, expected, tmp_path):
    result = run("tune", *given, f"hydra.run.dir={tmp_path / 'tune'}")
    assert result.code == 1
    assert expected in result.err
    assert result.err.startswith("audiot: error: ")
    assert len(result.err.strip().splitlines()) == 1
