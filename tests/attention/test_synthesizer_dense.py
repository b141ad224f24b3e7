"""The dense synthesizer against a loop over heads and frames."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audiot.attention.synthesizer_dense import SynthesizerDense


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("bottleneck_dim", [1, 7, 16, 40])  # below, at and beyond the size of a head
def test_rows_equal_the_published_formula(per_head, bottleneck_dim):
    torch.manual_seed(0)
    synthesizer = SynthesizerDense(24, 3, 11, bottleneck_dim=bottleneck_dim, per_head=per_head).double()
    hidden, value = torch.randn(2, 9, 24, dtype=torch.float64), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    w1, b1, w2, b2 = synthesizer.w1, synthesizer.b1, synthesizer.w2, synthesizer.b2
    expected = torch.zeros_like(value)
    for sequence in range(2):
        for head in range(3):
            network = head if per_head else 0
            for frame in range(9):
                x = hidden[sequence, frame] if per_head else hidden[sequence, frame, 8 * head : 8 * head + 8]
                row = w2[network].T @ torch.relu(w1[network].T @ x + b1[network]) + b2[network]
                expected[sequence, head, frame] = row[:9].softmax(0) @ value[sequence, head]
    torch.testing.assert_close(synthesizer(hidden=hidden, value=value), expected)


def test_a_row_depends_on_its_own_frame_only():
    torch.manual_seed(0)
    synthesizer = SynthesizerDense(24, 3, 11)
    hidden = torch.randn(1, 9, 24)
    changed = hidden.clone()
    changed[:, 4] += 1
    difference = (synthesizer.weights(hidden=hidden) - synthesizer.weights(hidden=changed)).abs().amax((0, 1, 3))
    assert difference.nonzero().flatten().tolist() == [4]


def test_shared_network_is_smaller_by_the_number_of_heads():
    assert SynthesizerDense(24, 3, 11).w2.shape == (3, 16, 11)
    assert SynthesizerDense(24, 3, 11, per_head=False).w2.shape == (1, 16, 11)
    assert SynthesizerDense(24, 3, 11, per_head=False).w1.shape == (1, 8, 16)


class Casts(TorchDispatchMode):
    """Notes the sizes of tensors that are copied to another precision."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("per_head", [True, False])
def test_autocast_makes_no_copy_of_the_keys_for_each_sequence(per_head):
    synthesizer = SynthesizerDense(24, 3, 11, per_head=per_head)
    hidden, value = torch.randn(20, 11, 24), torch.randn(20, 3, 11, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        synthesizer(hidden=hidden, value=value)
    assert casts.sizes
    assert max(casts.sizes) <= hidden.numel()  # the keys of all sequences would be three times that


def test_impossible_bottleneck_is_refused():
    with pytest.raises(ValueError, match="bottleneck_dim is 0: set it to 1 or more"):
        SynthesizerDense(24, 3, 11, bottleneck_dim=0)
