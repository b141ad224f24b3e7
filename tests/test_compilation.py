"""What is done to the graph of a compiled step: by itself, its kernels interpreted, and in place on CUDA devices."""

from __future__ import annotations

import pytest
import torch
from interpreter import run_interpreted

from audiot.model import Encoder

INTERPRETED = """
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from audiot import residual_kernels as kernels
from audiot.compilation import SumsInPlace

torch.manual_seed(0)
grad, residual, update = torch.randn(3, 6, 16)
seed, mean, rstd, weight = torch.tensor([5]), torch.zeros(6), torch.ones(6), torch.randn(16)
first, second = torch.randn(6, 8), torch.randn(8, 16)

def backward(fresh):
    total, grad_update, _, _ = torch.ops.audiot.residual_norm_backward(grad, residual, update, weight, seed, mean, rstd, 0.3)
    inputs = (total, first, second) if fresh else (residual, first, second)
    return torch.addmm(*inputs), grad_update, None if fresh else total

for fresh in (True, False):  # what came from outside is not to be changed
    graph = make_fx(lambda: backward(fresh))()
    wanted = graph()
    SumsInPlace()(graph.graph)
    graph.recompile()
    targets = [str(node.target) for node in graph.graph.nodes]
    assert ("audiot.add_product.default" in targets) is fresh, targets
    assert ("aten.addmm.default" in targets) is not fresh, targets
    for one, other in zip(graph(), wanted, strict=True):
        torch.testing.assert_close(one, other)
"""


def test_products_are_added_to_the_residuals_gradient_where_it_lies():
    pytest.importorskip("triton")
    run_interpreted(INTERPRETED)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_encoder_has_the_eager_ones_gradients_on_the_gpu(monkeypatch):
    from audiot.compilation import SumsInPlace, compiled

    targets, change = [], SumsInPlace.__call__

    def noted(self, graph):
        change(self, graph)
        targets[:] = [str(node.target) for node in graph.nodes]

    monkeypatch.setattr(SumsInPlace, "__call__", noted)
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # the same dropout in both
    torch.manual_seed(0)
    attention, positions = {"_target_": "audiot.attention.query_key.QueryKey"}, {"_target_": "audiot.positions.Rotary"}
    encoder = Encoder(40, 192, 2, 3, 384, 128, attention, positions).cuda()
    features, direction = torch.randn(3, 128, 40, device="cuda"), torch.randn(3, 128, 192, device="cuda")
    given = [parameter for parameter in encoder.parameters() if parameter.requires_grad]

    def step():
        return (encoder(features)[-1] * direction).sum()

    gradients = []
    for call in (step, compiled(step, graphs=False)):
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16):
            loss = call()
        gradients.append(torch.autograd.grad(loss, given))
    assert targets.count("audiot.add_product.default") == 2 * len(encoder.layers)  # of the backward pass, compiled last
    for eager, fast in zip(*gradients, strict=True):
        assert (fast - eager).norm() / eager.norm() < 0.03
