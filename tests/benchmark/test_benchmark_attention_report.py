"""Tables and pictures of the attention benchmark."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread
from timed_rows import line, row

from audiot.benchmark.attention_report import draw, grid, markdown_report, memory_grid, notes
from audiot.benchmark.attention_results import Row


def test_grid_has_a_line_per_mechanism_and_a_column_per_length():
    rows = [
        row("query_key", 512, 123.4, speedup=1.0),
        row("a", 512, 10.24, speedup=12.05, recall=0.86, peak_mib=1234.6),
        row("query_key", 2048, 2000.0, speedup=1.0),
        Row("a", "layer", "training", 2048, 2, "fp32", False, note="refused: too long"),
    ]
    assert grid(rows) == [
        ["mechanism", "T=512", "T=2,048"],
        ["query_key", "123 (×1.00)", "2,000 (×1.00)"],
        ["a", "10.2 (×12.1, recall 0.86)", "refused"],
    ]
    assert memory_grid(rows)[1:] == [["query_key", "", ""], ["a", "1,235", ""]]
    assert memory_grid(rows[:1]) == []
    assert notes(rows) == ["a, T = 2,048: refused: too long"]


def pictured(rows, tmp_path):
    names = draw(rows, "query_key", "Attention", tmp_path)
    pictures = [imread(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for pixels in pictures:
        assert len(np.unique(pixels[::3, ::3, :3].reshape(-1, 3), axis=0)) > 50
    return names, [pixels.shape[:2] for pixels in pictures]


def everywhere(rows):
    """The rows in all four tables of a precision."""
    places = [{"scope": scope, "direction": kind} for scope in ("operator", "layer") for kind in ("inference", "training")]
    return [Row(**{**vars(row), **place}) for place in places for row in rows]


def test_a_picture_has_a_panel_per_table_and_another_for_memory(tmp_path):
    rows = [*line("query_key", [2, 2, 2]), *line("fast", [4, 1, 1])]
    rows = [Row(**{**vars(row), "frames_per_s": 1000 / row.median_ms}) for row in rows]
    assert pictured(everywhere(rows), tmp_path) == (["benchmark.png"], [(int(110 * 8.9), 2200)])
    rows = [Row(**{**vars(row), "peak_mib": 3.0 if row.mechanism == "fast" else 0.0}) for row in rows]
    rows.append(Row("never", "layer", "training", 100, 2, "fp32", False, note="out of memory"))
    assert pictured(everywhere(rows), tmp_path) == (["benchmark.png"], [(int(110 * 17.3), 2200)])


def test_rings_lie_where_the_curves_of_a_mechanism_and_the_baseline_meet(tmp_path, drawn):
    rows = [*line("query_key", [2, 2, 4]), *line("fast", [4, 1, 1]), *line("nothing", [1e-6] * 3)]
    rows = [Row(**{**vars(row), "frames_per_s": 1e6 / row.median_ms}) for row in rows]
    draw(rows, "query_key", "Attention", tmp_path)
    (axis,) = drawn[0].axes
    lines = {line.get_label(): line for line in axis.lines}
    assert {"query_key", "fast: faster from T ≈ 200", "nothing: faster"} <= lines.keys()
    assert lines["query_key"].get_ydata().tolist() == pytest.approx([2, 2, 4])
    (ring,) = (line for line in axis.lines if line.get_markersize() == 10)
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx((200, 2))
    assert ring.get_color() == lines["fast: faster from T ≈ 200"].get_color()
    assert axis.get_ylim()[0] == pytest.approx(2 / 50)  # what costs nothing is out of sight


def test_curves_are_time_and_memory_per_frame(tmp_path, drawn):
    rows = [row("query_key", length, 2.0, frames_per_s=1000.0, peak_mib=3.0) for length in (100, 400)]
    draw(rows, "query_key", "Attention", tmp_path)
    times, peaks = (axis.lines[0].get_ydata().tolist() for axis in drawn[0].axes)
    assert times == pytest.approx([1000, 1000])
    assert peaks == pytest.approx([3 * 1024 / 200, 3 * 1024 / 800])  # two sequences per batch
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["µs per frame", "peak memory, KiB per frame"]


def test_each_precision_has_a_picture_of_its_own(tmp_path):
    rows = [row("query_key", length, 2.0, frames_per_s=1000.0) for length in (100, 400)]
    rows += [Row(**{**vars(row), "precision": "bf16", "compiled": True}) for row in rows]
    assert pictured(rows, tmp_path) == (["benchmark.png", "benchmark-bf16-compiled.png"], [(517, 1100)] * 2)


def test_the_report_has_every_table(tmp_path):
    rows = [*line("query_key", [2, 2, 2]), *line("fast", [4, 1, 1])]
    rows.append(Row("fast", "layer", "training", 6400, 2, "fp32", False, note="refused: long"))
    text = markdown_report(everywhere(rows), "query_key", ["What it is."])
    for title in ("operator, inference", "operator, training", "layer, inference", "layer, training"):
        assert f"## {title}, fp32, ms\n\n| mechanism | T=100 | T=400 | T=1,600 | T=6,400 |\n" in text
    assert text.count("- fast passes query_key at about T = 200\n") == 4
    assert text.count("- fast, T = 6,400: refused: long\n") == 4
