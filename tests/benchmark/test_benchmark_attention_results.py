"""Rows of the attention benchmark."""

from __future__ import annotations

import csv

import pytest
from timed_rows import PANEL, row

from audiot.base.files import write_csv
from audiot.benchmark.attention_results import Row, rows_of
from audiot.benchmark.measure import Failed, Measured
from audiot.benchmark.results import cells


def test_rows_hold_quartiles_speedup_and_real_frames_per_second():
    results = {
        "query_key": Measured([0.004, 0.002, 0.001, 0.003, 0.010], None),
        "fast": Measured([0.001] * 5, 3 * 2**20),
        "big": Failed("out of memory"),
    }
    base, fast, big = rows_of(results, "query_key", PANEL, 8, 4, 30, {"fast": {"parameters": 7}})
    assert (base.q25_ms, base.median_ms, base.q75_ms) == pytest.approx((2, 3, 4))
    assert (base.rounds, fast.rounds, big.rounds) == (5, 5, None)
    assert (base.speedup, base.frames_per_s) == pytest.approx((1, 10_000))
    assert (fast.speedup, fast.frames_per_s, fast.peak_mib, fast.parameters) == pytest.approx((3, 30_000, 3, 7))
    assert big == Row("big", "layer", "training", 8, 4, "fp32", False, note="out of memory")


def test_without_the_baseline_there_is_no_speedup():
    results = {"query_key": Failed("out of memory"), "fast": Measured([0.001], None)}
    _, fast = rows_of(results, "query_key", PANEL, 8, 4, 30, {})
    assert fast.median_ms == 1
    assert fast.speedup is None


def test_csv_has_a_line_per_measurement_and_blanks_for_unknown_values(tmp_path):
    rows = [row("query_key", 8, 1.5, speedup=1.0), Row("a, b", "layer", "training", 8, 2, "bf16", True, note="refused: x")]
    write_csv(tmp_path / "results.csv", map(cells, rows))
    with (tmp_path / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["median_ms"], first["speedup"], first["peak_mib"], first["note"]) == ("1.5", "1", "", "")
    assert (second["mechanism"], second["compiled"], second["median_ms"], second["note"]) == ("a, b", "True", "", "refused: x")
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
