"""Pictures of the training benchmark."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from audiot.analysis.plots import log_slope, plot_lengths, plot_roofline, plot_step_parts


def test_slope_is_that_of_the_longer_half():
    assert log_slope([1, 2, 4, 8, 16], [7, 7, 7, 14, 28]) == pytest.approx(1)
    assert log_slope([10, 1000], [3, 300]) == pytest.approx(1)
    assert log_slope([10], [3]) is None


def test_bars_are_as_long_as_the_parts_and_stand_one_behind_the_other(tmp_path, drawn):
    plot_step_parts(
        {"one": {"forward": 2.0, "backward": 3.0}, "two": {"forward": 1.0}},
        ("data", "forward", "backward"),
        "t",
        tmp_path / "a.png",
    )
    bars = [(bar.get_x(), bar.get_width()) for bar in drawn[0].axes[0].patches]
    assert bars == [(0, 2), (2, 3), (0, 1), (1, 0)]
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["forward", "backward"]
    assert imread(tmp_path / "a.png").shape[1] == 1320


def test_the_roof_is_the_lower_of_both_ceilings(tmp_path, drawn):
    points = [("a", "query_key", "step", 500.0, 300.0), ("b", "fast", "encoder", 40.0, 90.0)]
    plot_roofline(points, 700.0, 2.8, "t", tmp_path / "a.png")
    roof, *marks = drawn[0].axes[0].lines
    assert roof.get_xdata()[1] == pytest.approx(250)
    np.testing.assert_allclose(roof.get_ydata(), np.minimum(700, 2.8 * np.asarray(roof.get_xdata())))
    assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [(500, 300), (40, 90)]
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert "a: 300 TFLOP/s, 43%" in texts


def test_curves_have_their_slopes_in_the_legend(tmp_path, drawn):
    lines = {"query_key": [(1, 1.0), (2, 2.0), (4, 4.0)], "local": [(1, 1.0), (2, 1.0), (4, 1.0)]}
    plot_lengths({"ms": lines, "MiB": {"local": lines["local"]}}, "query_key", "t", tmp_path / "a.png")
    first, second = ([text.get_text() for text in axis.get_legend().get_texts()] for axis in drawn[0].axes)
    assert first == ["query_key: slope +1.00", "local: slope +0.00"]
    assert second == ["local: slope +0.00"]
