"""Norms with their residual sums and dropout: by PyTorch, and by kernels that Triton's interpreter runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreter import run_interpreted
from torch import nn

from audiot.layers import has_norm_kernel, norm_dropout, residual_norm

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def norm_of(dim, device="cpu"):
    norm = nn.LayerNorm(dim, eps=1e-12, device=device)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def test_the_plain_form_is_the_norm_of_the_sum():
    torch.manual_seed(0)
    norm = norm_of(24).double()
    residual, update = torch.randn(2, 2, 5, 24, dtype=torch.float64)
    expected = F.layer_norm(residual + update, (24,), norm.weight, norm.bias, 1e-12)
    torch.testing.assert_close(residual_norm(residual, update, norm), expected, rtol=0, atol=0)


def test_the_plain_form_without_a_residual_drops_what_the_norm_gives():
    torch.manual_seed(0)
    norm, states = norm_of(2000).double(), torch.randn(3, 2000, dtype=torch.float64)
    expected = F.layer_norm(states, (2000,), norm.weight, norm.bias, 1e-12)
    torch.testing.assert_close(norm_dropout(states, norm), expected, rtol=0, atol=0)
    found = norm_dropout(states, norm, 0.25)
    kept = found != 0
    torch.testing.assert_close(found[kept], expected[kept] / 0.75)
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)


def test_states_in_half_precision_are_summed_in_float32():
    torch.manual_seed(0)
    norm = norm_of(64)
    residual, update = torch.randn(2, 3, 64).bfloat16()
    exact = F.layer_norm(residual.float() + update.float(), (64,), norm.weight, norm.bias, 1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        found = residual_norm(residual, update, norm)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=0, atol=0)


INTERPRETED = """
import itertools
import torch
import torch.nn.functional as F
from audiot.kernels import residual as kernels

torch.manual_seed(0)
forms = (kernels._Norm.apply, kernels._norm_in_a_graph)  # eager, and as an operator
for (dim, dropout), norm in itertools.product(((24, 0.0), (24, 0.3), (16, 0.5)), forms):
    weight, bias = (torch.randn(dim).requires_grad_() for _ in range(2))
    residual, update = (torch.randn(7, dim).requires_grad_() for _ in range(2))
    direction = torch.randn(7, dim)
    seed = torch.tensor([5])

    given = (update, weight, bias)
    fast = norm(None, *given, seed, 1e-12, dropout)[0]
    kept = (fast != 0).float() / (1 - dropout)
    assert abs((kept == 0).float().mean().item() - dropout) < 0.15
    plain = F.layer_norm(update, (dim,), weight, bias, 1e-12) * kept
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(each, given, direction) for each in (fast, plain))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    given = (residual, update, weight, bias)
    fast = norm(*given, seed, 1e-12, dropout)[0]
    fast_gradients = torch.autograd.grad(fast, given, direction)
    # What was dropped is where the gradient of the update is zero.
    kept = (fast_gradients[1] != 0).float() / (1 - dropout)
    share = (kept == 0).float().mean().item()
    assert abs(share - dropout) < 0.15, share
    plain = F.layer_norm(residual + update * kept, (dim,), weight, bias, 1e-12)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(fast_gradients, torch.autograd.grad(plain, given, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if dropout:
        again = norm(*given, seed, 1e-12, dropout)[0]
        other = norm(*given, seed + 1, 1e-12, dropout)[0]
        assert torch.equal(fast, again) and not torch.equal(fast, other)
"""


def test_kernels_give_what_the_plain_form_gives_forward_and_backward():
    pytest.importorskip("triton")
    run_interpreted(INTERPRETED)


@needs_cuda
@pytest.mark.parametrize("dim", [192, 768])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kernels_on_the_gpu_give_what_the_plain_form_gives_in_float32(dim, dropout):
    torch.manual_seed(0)
    norm = norm_of(dim, "cuda")
    residual, update = (torch.randn(300, dim, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    direction = torch.randn(300, dim, device="cuda").bfloat16()
    given = (residual, update, norm.weight, norm.bias)
    assert has_norm_kernel(update, norm)
    fast = residual_norm(residual, update, norm, dropout)
    gradients = torch.autograd.grad(fast, given, direction)
    kept = (gradients[1] != 0).float() / (1 - dropout) if dropout else 1.0
    plain = F.layer_norm(residual.float() + update.float() * kept, (dim,), norm.weight, norm.bias, 1e-12)
    wanted = torch.autograd.grad(plain, given, direction.float())
    for one, other in zip((fast, *gradients), (plain, *wanted), strict=True):
        assert (one.float() - other.float()).norm() / other.float().norm() < 0.01


@needs_cuda
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kernels_on_the_gpu_without_a_residual_give_what_the_plain_form_gives_in_float32(dropout):
    torch.manual_seed(0)
    norm = norm_of(768, "cuda")
    states, direction = torch.randn(2, 300, 768, device="cuda").bfloat16()
    given = (states.requires_grad_(), norm.weight, norm.bias)
    fast = norm_dropout(states, norm, dropout)
    kept = (fast != 0).float() / (1 - dropout)
    plain = F.layer_norm(states.float(), (768,), norm.weight, norm.bias, 1e-12) * kept
    found, wanted = torch.autograd.grad(fast, given, direction), torch.autograd.grad(plain, given, direction.float())
    for one, other in zip((fast, *found), (plain, *wanted), strict=True):
        assert (one.float() - other.float()).norm() / other.float().norm() < 0.01
