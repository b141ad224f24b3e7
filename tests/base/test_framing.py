"""Counting frames, beside windows that are laid one after the other."""

from __future__ import annotations

import pytest
import torch

from audiot.base.framing import num_frames, samples_in


def laid(num_samples, win_length, hop_length, num_added):
    """Windows that fit, counted one by one."""
    count = 0
    while count * hop_length + win_length <= num_samples + num_added:
        count += 1
    return count


@pytest.mark.parametrize(("win_length", "hop_length", "num_added"), [(5, 2, 0), (5, 2, 5), (1, 1, 0), (3, 7, 4)])
def test_frames_are_the_windows_that_fit(win_length, hop_length, num_added):
    sizes = list(range(25))
    expected = [laid(size, win_length, hop_length, num_added) for size in sizes]
    assert [num_frames(size, win_length, hop_length, num_added) for size in sizes] == expected
    found = num_frames(torch.tensor(sizes), win_length, hop_length, num_added)
    assert found.tolist() == expected
    assert found.dtype == torch.int64


def test_milliseconds_are_rounded_down_to_samples():
    assert [samples_in(25.0, 16000), samples_in(25.0, 11025), samples_in(10.0, 22050)] == [400, 275, 220]
