"""The log of a run: what is logged stays, whatever ends the run and whenever it goes on."""

from __future__ import annotations

import csv
import errno
import os
import re
import subprocess
import sys
import tracemalloc

import pytest
import torch

from audiot.training.csv_logger import RunCSVLogger


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def fill(folder, *steps):
    """A log with training rows, of which two share a step with a validation's."""
    logger = RunCSVLogger(folder)
    for step in steps:
        logger.log_metrics({"pretrain/train_l1": step / 8}, step)
    logger.log_metrics({"pretrain/val_l1": torch.tensor(0.25)}, steps[-1])
    return rows(folder)


def test_rows_are_there_once_they_are_logged_and_columns_are_sorted(tmp_path):
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"lr": 0.5}, 1)
    logger.log_metrics({"val": torch.tensor(0.25), "a": float("nan")}, 1)
    assert (tmp_path / "metrics.csv").read_bytes() == b"a,lr,step,val\r\n,0.5,1,\r\nnan,,1,0.25\r\n"
    logger.log_metrics({"lr": 2}, 3)
    assert (tmp_path / "metrics.csv").read_bytes().endswith(b"0.25\r\n,2,3,\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    with pytest.raises(ValueError, match="needs a step, found none"):
        logger.log_metrics({"lr": 2})


def test_a_resumed_run_that_stops_before_its_first_row_keeps_the_earlier_bytes(tmp_path):
    assert fill(tmp_path, 9) == [{"step": "9", "pretrain/train_l1": "1.125"}, {"step": "9", "pretrain/val_l1": "0.25"}]
    before = (tmp_path / "metrics.csv").read_bytes()
    second = RunCSVLogger(str(tmp_path))
    second.log_hyperparams({})
    second.go_on(4)
    second.save()
    second.finalize("failed")
    assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("told", [True, False])
def test_rows_after_the_checkpoint_go_with_the_first_row_and_those_of_its_step_stay(tmp_path, told):
    before = fill(tmp_path, 1, 3, 4, 5, 6)
    logger = RunCSVLogger(tmp_path)
    if told:
        logger.go_on(4)
    logger.log_metrics({"lr": 0.5}, 5 if told else 4)
    assert rows(tmp_path) == [*before[:3], {"step": "5" if told else "4", "lr": "0.5"}]


def test_a_figure_that_is_logged_again_replaces_the_one_from_before_the_resume(tmp_path):
    fill(tmp_path, 1, 4)
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"pretrain/train_l1": 7.0}, 4)
    logger.log_metrics({"pretrain/train_l1": 8.0}, 5)
    logger.log_metrics({"pretrain/train_l1": 9.0}, 5)
    assert rows(tmp_path) == [
        {"step": "1", "pretrain/train_l1": "0.125"},
        {"step": "4", "pretrain/val_l1": "0.25"},
        *({"step": step, "pretrain/train_l1": value} for step, value in (("4", "7.0"), ("5", "8.0"), ("5", "9.0"))),
    ]


@pytest.mark.parametrize(
    ("torn", "lines"),
    [
        (b"3,0.", "1 damaged line, which is"),  # as if it were 0.5
        (b"3,0.5,7\r\n4,0.\xff5\r\n5\r\n", "3 damaged lines, which are"),
        (b"\0" * 5_000_000, "5 damaged lines, which are"),
        (b"many,0.5\r\n\r\n3,0.\x005\r\n", "3 damaged lines, which are"),
    ],
)
def test_damaged_lines_are_left_out_and_told(tmp_path, caplog, torn, lines):
    whole = b"step,train\r\n1,0.5\r\n2,0.25\r\n"
    (tmp_path / "metrics.csv").write_bytes(whole + torn)
    with caplog.at_level("INFO", "audiot"):
        RunCSVLogger(tmp_path).log_metrics({"train": 0.125}, 3)
    assert (tmp_path / "metrics.csv").read_bytes() == whole + b"3,0.125\r\n"
    assert caplog.messages == [f"{tmp_path / 'metrics.csv'} had {lines} left out now"]


@pytest.mark.parametrize("header", [b"step,tra", b"\0\0\0\n1,2\n", b"a,b\r\n1,2\r\n", b"step,step\n1,2\n"])
def test_a_file_without_a_readable_header_is_kept_under_another_name(tmp_path, caplog, header):
    (tmp_path / "metrics.csv").write_bytes(header)
    with caplog.at_level("INFO", "audiot"):
        RunCSVLogger(tmp_path).log_metrics({"train": 0.125}, 3)
    assert rows(tmp_path) == [{"step": "3", "train": "0.125"}]
    assert (tmp_path / "metrics.damaged.csv").read_bytes() == header
    assert "has no readable header: it is called metrics.damaged.csv now" in caplog.text


def test_an_empty_or_deleted_file_is_begun_anew(tmp_path):
    (tmp_path / "metrics.csv").touch()
    logger = RunCSVLogger(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"train": 0.125}, step)
        assert rows(tmp_path) == [{"step": str(step), "train": "0.125"}]
        (tmp_path / "metrics.csv").unlink()
        logger.save()


@pytest.mark.slow
@pytest.mark.parametrize("new", [{"lr": 1.0}, {}])
def test_a_full_disk_loses_no_earlier_row_and_is_told_in_one_line(tmp_path, new):
    code = """
import resource, sys
from audiot.training.csv_logger import RunCSVLogger
logger = RunCSVLogger(sys.argv[1])
logger.log_metrics({"train": 0.5}, 0)
size = logger.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 12, size + 12))  # the first seven bytes of the third row
logger.log_metrics({"train": 0.5}, 1)
try:
    logger.log_metrics({"train": 0.123456789} | eval(sys.argv[2]), 2)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path, str(new)], capture_output=True, text=True, check=True)
    assert re.fullmatch(
        rf"can't write {tmp_path}/metrics.csv on the disk at /\S*: File too large; its earlier rows are kept: "
        "make room, then resume\n",
        done.stdout,
    )
    assert rows(tmp_path) == [{"step": "0", "train": "0.5"}, {"step": "1", "train": "0.5"}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_disk_that_fails_to_keep_the_rows_is_named_too(tmp_path, monkeypatch):
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"train": 0.5}, 0)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"metrics.csv on the disk at /.*: No space left on device; "):
        logger.finalize("success")


@pytest.mark.slow
def test_a_long_log_needs_little_memory_to_write_and_to_go_on(tmp_path):
    first = RunCSVLogger(tmp_path)
    first.log_metrics({f"figure{number}": 0.0 for number in range(10)}, 0)
    tracemalloc.start()
    try:
        for step in range(1, 20_000):
            first.log_metrics({f"figure{number}": step / 7 for number in range(10)}, step)
        second = RunCSVLogger(tmp_path)
        second.go_on(15_000)
        second.log_metrics({"new": 1.0}, 15_001)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    assert (tmp_path / "metrics.csv").stat().st_size > 2e6
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(15_002))
