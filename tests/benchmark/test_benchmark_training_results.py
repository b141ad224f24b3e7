"""Rows of the training benchmark, and its tables and curves."""

from __future__ import annotations

import pytest

from audiot.benchmark.training_report import by_length, grid
from audiot.benchmark.training_results import Row, shares_of, with_speedups


def row(attention, frames=128, scope="step", **changes):
    what = {"median_ms": 2.0, "frames_per_s": 1000, "tflops": 100.0, "share_of_peak": 0.2, "flops_per_byte": 300.0}
    return Row("base", attention, "own", frames, 4, 0.1, 0.0, scope, True, "bf16-mixed", **(what | changes))


def test_shares_add_up_and_masking_and_targets_are_parts_of_forward():
    steps = [{"features": 1.0, "forward": 4.0, "backward": 3.0, "optimiser": 1.0, "between": 1.0}, {"forward": 10.0}]
    found = shares_of(steps, {"masking": 2.0, "targets": 1.0}, data_wait=0.02)
    expected = {"features": 1, "masking": 4, "targets": 2, "forward": 8, "backward": 3, "optimiser": 1, "data": 0.4, "other": 0.6}
    assert found == pytest.approx({f"share_{part}": value / 20 for part, value in expected.items()})
    assert "share_data" not in shares_of(steps, {"masking": 2.0})
    assert shares_of(steps, {"masking": 99.0})["share_forward"] == 0


def test_speedups_are_over_query_key_at_the_same_place():
    rows = [
        row("query_key"),
        row("fast", frames_per_s=1500),
        row("fast", 64),
        row("query_key", scope="encoder", frames_per_s=500),
    ]
    rows += [row("fast", scope="encoder"), row("none", note="refused: x", frames_per_s=None, median_ms=None)]
    assert [each.speedup for each in with_speedups(rows)] == [1, 1.5, None, 1, 2, None]
    lines = grid(with_speedups(rows))
    assert lines[2][:8] == ["base", "fast", "4 × 128", "0.1/0", "step", "2.00", "1,500", ""]
    assert lines[-1][5:] == ["refused", "", "", "", "100", "20.0%", "", ""]
    assert len({len(line) for line in lines}) == 1


def test_lengths_are_drawn_from_three_on():
    rows = [row("query_key", frames, frames_per_s=10**6 // frames, peak_mib=frames) for frames in (64, 32, 128)]
    panels = by_length(rows)
    assert {title.split(": ")[1] for title in panels} == {"ms per 1,000 frames", "peak memory, MiB per 1,000 frames"}
    times, peaks = panels.values()
    assert times["query_key"] == [(32, pytest.approx(32)), (64, pytest.approx(64)), (128, pytest.approx(128, rel=1e-3))]
    assert peaks["query_key"] == [(frames, 1000 * frames / (4 * frames)) for frames in (32, 64, 128)]
    assert by_length(rows[:2]) == {}
