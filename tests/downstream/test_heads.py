"""Heads against slow loops."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch

from audiot.downstream.heads import FrameClassifier, LayerSelection, RecurrentClassifier, UtteranceClassifier, XVector

LENGTHS = torch.tensor([7, 4, 1])
POOLINGS = ["mean", "statistics", "attentive"]


def hidden(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(linear, x):
    return linear.weight @ x + linear.bias


def chosen(selection, states):
    """Selected or summed states of all layers."""
    return selection(selection.pick(states))


def with_noise(states):
    """The same states with large numbers in the padding."""
    return torch.where((torch.arange(states.shape[1]) >= LENGTHS[:, None])[..., None], 1e3, states)


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


@pytest.mark.parametrize("context", [1, 3, 5])
@pytest.mark.parametrize("hidden_dim", [None, 8])
def test_frame_scores_of_neighbouring_states_through_a_hidden_layer_equal_a_loop(hidden_dim, context):
    head = FrameClassifier(6, 5, stack=2, hidden_dim=hidden_dim, context=context).double()
    states = hidden(3, 7, 6)
    scores = head(with_noise(states), LENGTHS)
    assert scores.shape == (3, 14, 5)
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            around = []
            for neighbour in range(t - context // 2, t + context // 2 + 1):
                around.append(states[row, neighbour] if 0 <= neighbour < length else torch.zeros(6, dtype=torch.float64))
            x = torch.cat(around)
            if hidden_dim:
                x = affine(head.hidden[0], x).clamp(min=0)
            torch.testing.assert_close(scores[row, 2 * t : 2 * t + 2].flatten(), affine(head.linear, x))


@pytest.mark.parametrize("context", [0, 2, -1])
def test_context_of_a_frame_must_be_odd(context):
    with pytest.raises(ValueError, match=f"downstream.head.context must be an odd number of states, found {context}"):
        FrameClassifier(6, 5, stack=1, context=context)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def lstm_by_loop(lstm, states):
    """Bidirectional LSTM of one utterance (T, d), by the equations of torch.nn.LSTM's documentation."""
    for layer in range(lstm.num_layers):
        directions = []
        for suffix, order in (("", 1), ("_reverse", -1)):
            w, u, b, c = (getattr(lstm, f"{kind}_l{layer}{suffix}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            h = cell = torch.zeros(lstm.hidden_size, dtype=states.dtype)
            outputs = []
            for x in list(states)[::order]:
                i, f, g, o = (w @ x + b + u @ h + c).chunk(4)
                cell = sigmoid(f) * cell + sigmoid(i) * g.tanh()
                h = sigmoid(o) * cell.tanh()
                outputs.append(h)
            directions.append(torch.stack(outputs[::order]))
        states = torch.cat(directions, 1)
    return states


@pytest.mark.parametrize("projector_dim", [None, 7])
def test_recurrent_scores_equal_a_loop_over_each_utterance_alone(projector_dim):
    torch.manual_seed(0)
    head = RecurrentClassifier(6, 4, stack=2, hidden_dim=5, num_layers=2, projector_dim=projector_dim).double().eval()
    states = hidden(3, 7, 6)
    scores = head(with_noise(states), LENGTHS)
    assert scores.shape == (3, 14, 4)
    for row, length in enumerate(LENGTHS.tolist()):
        own = states[row, :length]
        own = torch.stack([affine(head.projector, x) for x in own]) if projector_dim else own
        expected = torch.stack([affine(head.linear, x) for x in lstm_by_loop(head.lstm, own)])
        torch.testing.assert_close(scores[row, : 2 * length].flatten(), expected.flatten())
        alone = head(states[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(scores[row : row + 1, : 2 * length], alone)


def pooled_by_loop(own, pooling, pool):
    """Mean, or mean and deviation, of frames (T, d)."""
    weights = torch.full((len(own),), 1 / len(own), dtype=own.dtype)
    if pooling == "attentive":
        first, _, second = pool.score
        powers = torch.stack([affine(second, affine(first, frame).tanh())[0].exp() for frame in own])
        weights = powers / powers.sum()
    mean = sum(weight * frame for weight, frame in zip(weights, own, strict=True))
    if pooling == "mean":
        return mean
    variance = sum(weight * (frame - mean) ** 2 for weight, frame in zip(weights, own, strict=True))
    return torch.cat([mean, (variance + 1e-6).sqrt()])


@pytest.mark.parametrize("hidden_dim", [None, 8])
@pytest.mark.parametrize("projector_dim", [None, 5])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_utterance_scores_pool_an_utterances_own_frames(pooling, projector_dim, hidden_dim):
    torch.manual_seed(0)
    head = UtteranceClassifier(6, 4, stack=3, pooling=pooling, projector_dim=projector_dim, hidden_dim=hidden_dim).double()
    states = hidden(3, 7, 6)
    scores = head(states, LENGTHS)
    assert scores.shape == (3, 4)
    for row, length in enumerate(LENGTHS.tolist()):
        own = states[row, :length]
        own = torch.stack([affine(head.projector, frame) for frame in own]) if projector_dim else own
        pooled = pooled_by_loop(own, pooling, head.pooling)
        if hidden_dim:
            pooled = affine(head.hidden[0], pooled).clamp(min=0)
        torch.testing.assert_close(scores[row], affine(head.linear, pooled))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_ignores_padding(pooling):
    head = UtteranceClassifier(6, 4, stack=1, pooling=pooling).double()
    states = hidden(3, 7, 6)
    noisy = with_noise(states)
    torch.testing.assert_close(head(noisy, LENGTHS), head(states, LENGTHS))
    alone = head(states[1:2, :4], LENGTHS[1:2])
    torch.testing.assert_close(head(noisy, LENGTHS)[1:2], alone)


def test_an_embedding_of_a_time_delay_network_equals_a_loop():
    torch.manual_seed(0)
    contexts = [(5, 1), (3, 2), (3, 3), (1, 1), (1, 1)]
    head = XVector(6, 4, stack=3, projector_dim=7, channels=9).double()
    states = hidden(3, 7, 6)
    embeddings = head(with_noise(states), LENGTHS)
    assert embeddings.shape == (3, 4)
    for row, length in enumerate(LENGTHS.tolist()):
        own = [affine(head.projector, frame) for frame in states[row, :length]]
        for convolution, (kernel, dilation) in zip(head.convolutions, contexts, strict=True):
            layer = []
            for t in range(length):
                total = convolution.bias
                for k in range(kernel):
                    at = t + (k - kernel // 2) * dilation
                    if 0 <= at < length:
                        total = total + convolution.weight[:, :, k] @ own[at]
                layer.append(total.clamp(min=0))
            own = layer
        first, _, second = head.embedding
        pooled = pooled_by_loop(torch.stack(own), "statistics", None)
        torch.testing.assert_close(embeddings[row], affine(second, affine(first, pooled).clamp(min=0)))


def test_a_time_delay_network_has_the_published_widths():
    head = XVector(768, 512, stack=1)
    sizes = [(layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.dilation[0]) for layer in head.convolutions]
    # Snyder et al. 2018, table 1: frames t-2…t+2, {t-2, t, t+2}, {t-3, t, t+3}, {t}, {t}
    assert sizes == [(512, 512, 5, 1), (512, 512, 3, 2), (512, 512, 3, 3), (512, 512, 1, 1), (512, 1500, 1, 1)]
    assert (head.embedding[0].in_features, head.embedding[-1].out_features) == (3000, 512)


EVERY_HEAD = {
    "linear": lambda: FrameClassifier(6, 4, stack=2),
    "context": lambda: FrameClassifier(6, 4, stack=2, hidden_dim=5, context=3),
    "recurrent": lambda: RecurrentClassifier(6, 4, stack=2, hidden_dim=5, projector_dim=7),
    **{kind: partial(UtteranceClassifier, 6, 4, stack=2, pooling=kind, projector_dim=5, hidden_dim=8) for kind in POOLINGS},
    "xvector": lambda: XVector(6, 4, stack=2, projector_dim=7, channels=9),
}


@pytest.mark.parametrize("head", EVERY_HEAD.values(), ids=EVERY_HEAD)
def test_gradients_of_one_frame_are_finite_and_reach_every_parameter(head):
    torch.manual_seed(0)
    made = head().double()
    states = hidden(2, 1, 6).requires_grad_()
    made(states, torch.tensor([1, 1])).square().sum().backward()
    assert states.grad.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in made.parameters())


@pytest.mark.parametrize("head", EVERY_HEAD.values(), ids=EVERY_HEAD)
def test_padding_gets_no_gradient(head):
    torch.manual_seed(0)
    states = hidden(3, 7, 6).requires_grad_()
    outputs = head().double().eval()(states, LENGTHS)
    if outputs.ndim == 3:
        outputs = torch.cat([row[: 2 * length] for row, length in zip(outputs, LENGTHS.tolist(), strict=True)])
    outputs.square().sum().backward()
    padded = torch.arange(7) >= LENGTHS[:, None]
    assert not states.grad[padded].any()
    assert states.grad[~padded].any(1).all()


@pytest.mark.parametrize("head", EVERY_HEAD.values(), ids=EVERY_HEAD)
def test_heads_run_in_bfloat16(head):
    torch.manual_seed(0)
    made, states = head().eval(), hidden(3, 7, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = made(states, LENGTHS)
    torch.testing.assert_close(outputs.float(), made(states, LENGTHS), rtol=0.1, atol=0.05)


def test_weighted_sum_mixes_the_layers_by_softmax_and_starts_even():
    selection = LayerSelection("weighted_sum", 3).double()
    states = hidden(3, 2, 5, 6)
    torch.testing.assert_close(chosen(selection, states), (states[0] + states[1] + states[2]) / 3)
    with torch.no_grad():
        selection.logits.copy_(torch.tensor([0.0, 1.0, -2.0]))
    powers = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64).exp()
    shares = powers / powers.sum()
    torch.testing.assert_close(selection.weights(), shares)
    torch.testing.assert_close(chosen(selection, states), sum(share * layer for share, layer in zip(shares, states, strict=True)))


def test_last_takes_the_last_layer_and_learns_nothing():
    selection = LayerSelection("last", 3)
    states = hidden(3, 2, 5, 6)
    assert chosen(selection, states).equal(states[2])
    assert selection.weights() is None
    assert not list(selection.parameters())


@pytest.mark.parametrize(("layers", "number"), [(0, 0), (2, 2), (-1, 4), (-5, 0), ([3], 3), ([-2], 3)])
def test_a_single_state_is_taken_as_it_is(layers, number):
    selection = LayerSelection(layers, 5)
    states = hidden(5, 2, 3, 6)
    assert selection.pick(states).shape == (1, 2, 3, 6)
    assert chosen(selection, states).equal(states[number])
    assert selection.chosen == [number]
    assert not list(selection.parameters())


def test_several_states_are_mixed_and_only_they_are_kept():
    selection = LayerSelection([-1, 1, 0], 5).double()
    assert selection.chosen == [0, 1, 4]
    with torch.no_grad():
        selection.logits.copy_(torch.tensor([2.0, 0.0, -1.0]))
    states = hidden(5, 2, 3, 6)
    assert selection.pick(states).equal(torch.stack([states[0], states[1], states[4]]))
    powers = [math.exp(2), 1.0, math.exp(-1)]
    expected = (powers[0] * states[0] + powers[1] * states[1] + powers[2] * states[4]) / sum(powers)
    torch.testing.assert_close(chosen(selection, states), expected)


def test_an_upstream_of_one_state_has_a_weighted_sum_too():
    selection = LayerSelection("weighted_sum", 1).double()
    states = hidden(1, 2, 3, 6)
    torch.testing.assert_close(chosen(selection, states), states[0])
    assert selection.weights().tolist() == [1.0]


@pytest.mark.parametrize("layers", [5, -6, [0, 5], ["last"], [1.5], [True], True])
def test_states_that_there_are_not_are_refused(layers):
    with pytest.raises(ValueError, match=r"downstream.layers=.*: the upstream has the hidden states 0 to 4"):
        LayerSelection(layers, 5)


@pytest.mark.parametrize("layers", [[1, 1], [4, -1], [0, 3, -5]])
def test_a_state_named_twice_is_refused(layers):
    with pytest.raises(ValueError, match=rf"downstream.layers={re.escape(str(layers))} names a hidden state twice"):
        LayerSelection(layers, 5)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match=r"downstream.head.pooling must be mean, statistics or attentive, found 'max'"):
        UtteranceClassifier(6, 4, stack=1, pooling="max")
    for layers in ("first", []):
        with pytest.raises(
            ValueError,
            match=rf"downstream.layers must be last, weighted_sum or a list of numbers, found {re.escape(repr(layers))}",
        ):
            LayerSelection(layers, 3)
