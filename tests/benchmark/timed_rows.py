"""Rows of the attention benchmark with given times, for its tests."""

from __future__ import annotations

from audiot.benchmark.attention_results import Panel, Row

PANEL = Panel("fp32", False, "layer", "training")


def row(mechanism, length, median, spread=0.0, **changes):
    where = {**PANEL._asdict(), "length": length, "batch": 2}
    times = {"rounds": 5, "median_ms": median, "q25_ms": median - spread, "q75_ms": median + spread}
    return Row(mechanism, **where | times | changes)


def line(mechanism, medians, spread=0.0):
    return [row(mechanism, length, median, spread) for length, median in zip([100, 400, 1600], medians, strict=True)]
