"""The handcrafted patterns against slow loops and the reference numbers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from audiot.attention import patterns
from audiot.attention.patterns import legacy_patterns, offset_patterns


def slow_pattern(name, num_frames):
    """Row by row, as published."""
    rows = []
    for i in range(num_frames):
        allowed = {
            "current": lambda j, i=i: float(j == i),
            "previous": lambda j, i=i: float(j == i - 1),
            "next": lambda j, i=i: float(j == i + 1),
            "left": lambda j, i=i: float((j + 1) ** 3) if j <= i - 2 else 0.0,
            "right": lambda j, i=i: float((num_frames - j) ** 3) if j >= i + 2 else 0.0,
            "start": lambda j: float((num_frames - j) ** 3),
            "end": lambda j: float((j + 1) ** 3),
        }[name]
        row = [allowed(j) for j in range(num_frames)]
        if sum(row) == 0:
            row = [float(j == i) for j in range(num_frames)]
        rows.append([entry / sum(row) for entry in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 7, 24])
def test_patterns_equal_the_slow_definition(num_frames):
    found = patterns(num_frames)
    assert list(found) == ["current", "previous", "next", "left", "right", "start", "end"]
    for name, pattern in found.items():
        torch.testing.assert_close(pattern, slow_pattern(name, num_frames))


def test_fewer_heads_take_the_first_patterns_and_more_take_seven():
    assert list(patterns(5, 3)) == ["current", "previous", "next"]
    assert len(patterns(5, 12)) == 7


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 7, 24])
def test_patterns_by_offset_equal_the_slow_definition(num_frames):
    found = offset_patterns(num_frames)
    assert list(found) == ["current", "previous", "next", "left", "right"]
    for name, pattern in found.items():
        row = []
        for offset in range(1 - num_frames, num_frames):
            cube = float((num_frames - abs(offset)) ** 3)
            row.append(
                {
                    "current": float(offset == 0),
                    "previous": float(offset == -1),
                    "next": float(offset == 1),
                    "left": cube if offset <= -2 else 0.0,
                    "right": cube if offset >= 2 else 0.0,
                }[name]
            )
        if sum(row) == 0:
            row[num_frames - 1] = 1.0  # the frame itself
        torch.testing.assert_close(pattern, torch.tensor(row, dtype=torch.float64) / sum(row))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 7, 24])
def test_patterns_by_offset_equal_the_absolute_ones_in_the_row_that_sees_most(num_frames):
    absolute, by_offset = patterns(num_frames), offset_patterns(num_frames)
    for name in ("previous", "left"):
        torch.testing.assert_close(by_offset[name][:num_frames], absolute[name][-1])
    for name in ("next", "right"):
        torch.testing.assert_close(by_offset[name][num_frames - 1 :], absolute[name][0])


@pytest.mark.parametrize("num_frames", [8, 24])
def test_legacy_patterns_equal_the_reference_numbers(num_frames):
    if "AUDIOT_TEST_DATA" not in os.environ:
        pytest.skip("AUDIOT_TEST_DATA is not set")
    reference = np.load(Path(os.environ["AUDIOT_TEST_DATA"]) / "reference" / "reference.npz")
    expected = torch.from_numpy(reference[f"random_synthesizer_legacy_T{num_frames}"])
    torch.testing.assert_close(legacy_patterns(num_frames).float(), expected, rtol=1e-6, atol=1e-7)


def test_legacy_patterns_keep_their_published_defects():
    current, following, previous, left, right, end, start = legacy_patterns(8)
    assert following[7, 0] == previous[0, 7] == 1  # wrapped around
    assert (left[:2] == 0).all()
    assert (right[6:] == 0).all()
    assert right[0, 0] > 0
    assert right[1, 7] > right[1, 3]  # grows away from the frame
    torch.testing.assert_close(start, end.flip(1))
    torch.testing.assert_close(current, torch.eye(8, dtype=torch.float64))
