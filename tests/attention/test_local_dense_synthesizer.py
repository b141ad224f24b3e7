"""The local dense synthesizer against a loop over heads and frames."""

from __future__ import annotations

import pytest
import torch

from audiot.attention.local_dense_synthesizer import CHUNK, LocalDenseSynthesizer

HEADS, HEAD_DIM = 2, 4
DIM = HEADS * HEAD_DIM


def mechanism(context_width, seed=0, **options):
    torch.manual_seed(seed)
    return LocalDenseSynthesizer(DIM, HEADS, 10, context_width=context_width, bottleneck_dim=3, **options).double()


def tensors(num_frames, seed=1):
    torch.manual_seed(seed)
    hidden, value = torch.randn(2, num_frames, DIM), torch.randn(2, HEADS, num_frames, HEAD_DIM)
    return hidden.double(), value.double()


def expected_context(made, hidden, value, valid):
    """One row at a time; zeros where the window has no real frame."""
    side = made.context_width // 2
    rows = []
    for sequence in range(len(hidden)):
        for head in range(HEADS):
            for frame in range(hidden.shape[1]):
                middle = torch.relu(made.w1[head].T @ hidden[sequence, frame] + made.b1[head])
                logits = made.w2[head].T @ middle + made.b2[head]
                window = range(max(0, frame - side), min(hidden.shape[1], frame + side + 1))
                real = [other for other in window if valid[sequence, other]]
                if real:
                    row = logits[[other - frame + side for other in real]].softmax(0)
                    rows.append(row @ value[sequence, head, real])
                else:
                    rows.append(torch.zeros(HEAD_DIM, dtype=torch.float64))
    return torch.stack(rows).view_as(value)


@pytest.mark.parametrize("context_width", [1, 5, 31])
@pytest.mark.parametrize("num_frames", [1, 2, 9, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_rows_equal_the_loop_with_gradients(context_width, num_frames):
    made = mechanism(context_width)
    hidden, value = (tensor.requires_grad_() for tensor in tensors(num_frames))
    everything = torch.ones(2, num_frames, dtype=torch.bool)
    output, expected = made(hidden=hidden, value=value), expected_context(made, hidden, value, everything)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    leaves = [hidden, value, *made.parameters()]
    found = torch.autograd.grad(output, leaves, direction)
    for one, other in zip(found, torch.autograd.grad(expected, leaves, direction), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("context_width", [5, 31])
def test_padded_frames_get_no_weight_wherever_they_are(context_width):
    made = mechanism(context_width)
    hidden, value = tensors(70)
    valid = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.4
    valid[0, 20:60] = False  # windows without a real frame
    output = made(hidden=hidden, value=value, valid=valid)
    torch.testing.assert_close(output, expected_context(made, hidden, value, valid))


def test_frames_beyond_the_window_are_not_seen():
    made = mechanism(7)
    hidden, value = tensors(90)
    for frame in (0, 50, CHUNK - 1, CHUNK, 89):
        changed = value.clone()
        changed[:, :, frame] += 1
        difference = (made(hidden=hidden, value=changed) - made(hidden=hidden, value=value)).abs().amax((0, 1, 3))
        assert difference.nonzero().flatten().tolist() == [other for other in range(90) if abs(other - frame) <= 3]


def test_weights_are_those_of_the_frame_alone():
    made = mechanism(7)
    hidden, _ = tensors(20)
    changed = hidden.clone()
    changed[:, 8] += 1
    difference = (made.weights(hidden=hidden) - made.weights(hidden=changed)).abs().amax((0, 1, 3))
    assert difference.nonzero().flatten().tolist() == [8]


def test_dropout_leaves_the_mean_unbiased():
    made = mechanism(3, dropout=0.4)
    hidden, value = tensors(6)
    with torch.no_grad():
        draws = torch.stack([made(hidden=hidden, value=value) for _ in range(1500)])
        expected = made.eval()(hidden=hidden, value=value)
    assert ((draws.mean(0) - expected).abs() <= 5 * draws.std(0) / len(draws) ** 0.5).all()
    assert draws.std(0).min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_width": 30}, "context_width is 30, but a window around a frame is odd: set 31"),
        ({"context_width": 0}, "context_width is 0: set it to 1 or more"),
        ({"bottleneck_dim": 0}, "bottleneck_dim is 0: set it to 1 or more"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LocalDenseSynthesizer(DIM, HEADS, 10, **options)
