"""The controls against what they are by definition."""

from __future__ import annotations

import pytest
import torch

from audiot.attention.controls import PositionWise, Uniform


def values(num_sequences=3, num_frames=7, dtype=torch.float64):
    return torch.randn(num_sequences, 2, num_frames, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


VALID = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def test_position_wise_gives_each_frame_its_own_value():
    value = values()
    mechanism = PositionWise(8, 2, 10)
    assert torch.equal(mechanism(value=value), value)
    padded = mechanism(value=value, valid=VALID).transpose(1, 2)
    assert torch.equal(padded[VALID], value.transpose(1, 2)[VALID])
    assert (padded[~VALID] == 0).all()
    assert torch.equal(mechanism.weights(hidden=torch.randn(3, 7, 8)), torch.eye(7).expand(3, 2, 7, 7))


def test_position_wise_drops_nothing():
    value = values()
    assert torch.equal(PositionWise(8, 2, 10, dropout=0.9).train()(value=value), value)


def test_uniform_gives_every_frame_the_mean_of_the_real_frames():
    value = values()
    mechanism = Uniform(8, 2, 10, dropout=0.3).eval()
    every, some = mechanism(value=value), mechanism(value=value, valid=VALID)
    for sequence in range(3):
        for head in range(2):
            for frame in range(7):
                frames = value[sequence, head]
                torch.testing.assert_close(every[sequence, head, frame], sum(frames) / 7)
                real = [one for one, is_real in zip(frames, VALID[sequence], strict=True) if is_real]
                expected = sum(real) / len(real) if real else torch.zeros(4, dtype=torch.float64)
                torch.testing.assert_close(some[sequence, head, frame], expected)


@pytest.mark.parametrize("valid", [None, VALID[:2]], ids=["all", "padded"])
def test_uniform_dropout_drops_frames_for_all_rows_alike_and_keeps_the_mean(valid):
    torch.manual_seed(0)
    value = values(2)
    mechanism = Uniform(8, 2, 10, dropout=0.5)
    drawn = torch.stack([mechanism(value=value, valid=valid) for _ in range(1000)])
    assert (drawn == drawn[:, :, :, :1]).all()
    assert not torch.equal(drawn[:, :, 0], drawn[:, :, 1])  # heads draw on their own
    spread = drawn.std(0) / 1000**0.5
    assert ((drawn.mean(0) - mechanism.eval()(value=value, valid=valid)).abs() < 6 * spread).all()


def test_uniform_mean_of_a_long_half_precision_sequence_does_not_overflow():
    value = torch.full((1, 2, 40_000, 4), 3.0, dtype=torch.float16)  # the sum is beyond float16
    assert (Uniform(8, 2, 10)(value=value) == 3).all()
