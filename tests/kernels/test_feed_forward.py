"""The feed-forward network: by PyTorch, and with the gradient's kernel that Triton's interpreter runs here."""

from __future__ import annotations

import pytest
import torch
from interpreter import run_interpreted

from audiot.layers import FeedForward

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_it_is_two_linear_layers_with_gelu_in_between():
    torch.manual_seed(0)
    network = FeedForward(6, 10).double()
    frames = torch.randn(2, 3, 6, dtype=torch.float64)
    first, second = network[0], network[2]
    inner = frames @ first.weight.T + first.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(network(frames), inner @ second.weight.T + second.bias)
    assert not network.has_kernel(frames)
    assert list(network.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


INTERPRETED = """
import torch
import torch.nn.functional as F
from audiot.kernels.feed_forward import FeedForwardFunction, gelu_gradients

torch.manual_seed(0)
inner, outer = (4 * torch.randn(9, 1040)).requires_grad_(), torch.randn(9, 1040)  # columns of two programs, one nearly empty
found, active, summed = gelu_gradients(outer, inner.detach())
wanted = torch.autograd.grad(F.gelu(inner), inner, outer)[0]
for one, other in ((found, wanted), (active, F.gelu(inner).detach()), (summed, wanted.sum(0))):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

given = [torch.randn(shape).requires_grad_() for shape in ((7, 24), (40, 24), (40,), (24, 40), (24,))]
direction = torch.randn(7, 24)
plain = F.linear(F.gelu(F.linear(*given[:3])), *given[3:])
wanted = torch.autograd.grad(plain, given, direction)
for call in (FeedForwardFunction.apply, torch.compile(FeedForwardFunction.apply, backend="aot_eager", fullgraph=True)):
    fast = call(*given)
    torch.testing.assert_close(fast, plain)
    for one, other in zip(torch.autograd.grad(fast, given, direction), wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
"""


def test_the_kernel_gives_what_autograd_gives():
    pytest.importorskip("triton")
    run_interpreted(INTERPRETED)


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_on_the_gpu_in_bfloat16_it_gives_what_it_gives_in_float32(compiled):
    torch.manual_seed(0)
    network = FeedForward(256, 1024 + 256).cuda()
    frames, direction = (torch.randn(3, 100, 256, device="cuda").requires_grad_() for _ in range(2))
    given = (frames, *network.parameters())
    plain = network(frames)
    wanted = torch.autograd.grad(plain, given, direction)
    call = torch.compile(network, fullgraph=True) if compiled else network
    with torch.autocast("cuda", torch.bfloat16):
        assert network.has_kernel(frames)
        fast = call(frames)
    found = torch.autograd.grad(fast, given, direction.to(fast.dtype))
    assert fast.dtype == torch.bfloat16
    for one, other in zip((fast, *found), (plain, *wanted), strict=True):
        assert (one.float() - other).norm() / other.norm() < 0.01
