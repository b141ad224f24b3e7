"""Convolutions over frames against a slow loop."""

from __future__ import annotations

import pytest
import torch

from audiot.features import KaldiFbank, LogMel
from audiot.features.base import Subsampling


def loop(module: Subsampling, frames: torch.Tensor) -> torch.Tensor:
    """One utterance's outputs (T, d) of its frames (T·factor, C). What is outside of it is zero."""
    hidden = list(frames)
    for index, convolution in enumerate(module.convolutions):
        outputs = []
        for step in range(len(hidden) // 2):
            total = convolution.bias
            for tap in range(3):
                place = 2 * step + tap - (1 if index == 0 else 0)
                if 0 <= place < len(hidden):
                    total = total + convolution.weight[:, :, tap] @ hidden[place]
            outputs.append(torch.nn.functional.gelu(total))
        hidden = outputs
    rows = []
    for value in hidden:
        centred = value - value.mean()
        rows.append(centred / (centred.square().mean() + 1e-5).sqrt() * module.norm.weight + module.norm.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("factor", [2, 4])
def test_values_and_gradients_are_those_of_a_loop(factor):
    torch.manual_seed(0)
    module = Subsampling(5, 6, factor).double()
    lengths = [4, 1, 3]
    frames = torch.randn(3, 4 * factor, 5, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(4) < torch.tensor(lengths)[:, None]
    actual = module(frames, valid)[valid]
    expected = torch.cat([loop(module, frames[row, : length * factor]) for row, length in enumerate(lengths)])
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    inputs = [frames, *module.parameters()]
    for one, other in zip(
        torch.autograd.grad(actual.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("factor", "before", "behind"), [(2, 1, 0), (4, 1, 2)])
def test_an_output_hears_its_own_frames_and_few_around(factor, before, behind):
    torch.manual_seed(0)
    frames = torch.randn(1, 6 * factor, 3, requires_grad=True)
    Subsampling(3, 8, factor)(frames)[0, 3].sin().sum().backward()
    heard = frames.grad[0].abs().sum(1).nonzero().flatten().tolist()
    assert heard == list(range(3 * factor - before, 4 * factor + behind))


@pytest.mark.parametrize("factor", [2, 4])
def test_fixed_tokens_and_lengths_are_those_of_stacking(factor):
    waveforms = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9000, 5555])
    for kind, options in ((LogMel, {"delta_order": 1}), (KaldiFbank, {})):
        stacked, trained = kind(stack=factor, **options), kind(subsample=factor, **options)
        for one, other in zip(stacked(waveforms, lengths), trained(waveforms, lengths), strict=True):
            assert torch.equal(one, other)
        assert trained.embed_dim == 256
        assert trained.stack == factor
        assert trained.frame_centers(5).tolist() == stacked.frame_centers(5).tolist()
        assert [trained.num_samples(n) for n in range(1, 9)] == [stacked.num_samples(n) for n in range(1, 9)]
        assert torch.equal(stacked.embed(stacked(waveforms)[0]), stacked(waveforms)[0])
