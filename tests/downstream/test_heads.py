"""Heads against slow loops."""

from __future__ import annotations

import pytest
import torch

from audiot.downstream.heads import FrameClassifier, LayerSelection, UtteranceClassifier

LENGTHS = torch.tensor([7, 4, 1])


def hidden(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(linear, x):
    return linear.weight @ x + linear.bias


def test_frame_scores_of_a_state_are_those_of_its_stacked_frames_in_order():
    head = FrameClassifier(6, 5, stack=3).double()
    states = hidden(3, 7, 6)
    scores = head(states, LENGTHS)
    assert scores.shape == (3, 21, 5)
    for row in range(3):
        for t in range(7):
            whole = affine(head.linear, states[row, t])  # classes of the first frame, of the second, of the third
            for k in range(3):
                torch.testing.assert_close(scores[row, 3 * t + k], whole[5 * k : 5 * k + 5])


def test_frame_scores_use_their_own_state_alone():
    head = FrameClassifier(6, 5, stack=2).double()
    states = hidden(1, 7, 6).requires_grad_()
    head(states, torch.tensor([7]))[0, 8].sum().backward()  # the first frame of state 4
    touched = states.grad[0].abs().sum(1) > 0
    assert touched.tolist() == [False] * 4 + [True] + [False] * 2


@pytest.mark.parametrize("pooling", ["mean", "statistics"])
def test_utterance_scores_pool_an_utterances_own_frames(pooling):
    head = UtteranceClassifier(6, 4, stack=3, pooling=pooling).double()
    states = hidden(3, 7, 6)
    scores = head(states, LENGTHS)
    assert scores.shape == (3, 4)
    for row, length in enumerate(LENGTHS.tolist()):
        own = states[row, :length]
        mean = sum(own) / length
        pooled = mean
        if pooling == "statistics":
            variance = sum((frame - mean) ** 2 for frame in own) / length
            pooled = torch.cat([mean, (variance + 1e-6).sqrt()])
        torch.testing.assert_close(scores[row], affine(head.linear, pooled))


@pytest.mark.parametrize("pooling", ["mean", "statistics"])
def test_pooling_ignores_padding(pooling):
    head = UtteranceClassifier(6, 4, stack=1, pooling=pooling).double()
    states = hidden(3, 7, 6)
    noisy = states.clone()
    noisy[torch.arange(7) >= LENGTHS[:, None]] = 1e3
    torch.testing.assert_close(head(noisy, LENGTHS), head(states, LENGTHS))
    alone = head(states[1:2, :4], LENGTHS[1:2])
    torch.testing.assert_close(head(noisy, LENGTHS)[1:2], alone)


def test_deviation_of_a_single_frame_has_a_finite_gradient():
    head = UtteranceClassifier(6, 4, stack=1, pooling="statistics").double()
    states = hidden(1, 1, 6).requires_grad_()
    head(states, torch.tensor([1])).sum().backward()
    assert states.grad.isfinite().all()


def test_weighted_sum_mixes_the_layers_by_softmax_and_starts_even():
    selection = LayerSelection("weighted_sum", 3).double()
    states = hidden(3, 2, 5, 6)
    torch.testing.assert_close(selection(states), (states[0] + states[1] + states[2]) / 3)
    with torch.no_grad():
        selection.logits.copy_(torch.tensor([0.0, 1.0, -2.0]))
    powers = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64).exp()
    shares = powers / powers.sum()
    torch.testing.assert_close(selection.weights(), shares)
    torch.testing.assert_close(selection(states), sum(share * layer for share, layer in zip(shares, states, strict=True)))


def test_last_takes_the_last_layer_and_learns_nothing():
    selection = LayerSelection("last", 3)
    states = hidden(3, 2, 5, 6)
    assert selection(states).equal(states[2])
    assert selection.weights() is None
    assert not list(selection.parameters())


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match=r"downstream.head.pooling must be mean or statistics, found 'max'"):
        UtteranceClassifier(6, 4, stack=1, pooling="max")
    with pytest.raises(ValueError, match=r"downstream.layers must be last or weighted_sum, found 'first'"):
        LayerSelection("first", 3)
