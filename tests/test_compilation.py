"""What is done to the graph of a compiled step: kernels interpreted here, compiled on CUDA devices."""

from __future__ import annotations

import pytest
import torch
from interpreter import run_interpreted

from audiot.model import Encoder

INTERPRETED = """
import torch
from audiot import feed_forward, residual
from audiot.attention import self_attention
from audiot.compilation import SumsInPlace, compiled
from audiot.model import Encoder

feed_forward.in_half_precision = self_attention.in_half_precision = lambda tensor: True  # kernels, here
residual.has_kernel = lambda update, norm: True
torch.randint = lambda *_, **__: torch.full((1,), 5)  # the same dropout in both
sums = []
change = SumsInPlace.__call__
def counted(self, graph):
    change(self, graph)
    targets = [str(node.target) for node in graph.nodes]
    sums.append((targets.count("audiot.add_product.default"), targets.count("aten.add.Tensor")))
SumsInPlace.__call__ = counted
torch._inductor.config.force_disable_caches = True

torch.manual_seed(0)
attention = {"_target_": "audiot.attention.query_key.QueryKey"}
encoder = Encoder(4, 16, 2, 1, 16, 8, attention, {"_target_": "audiot.positions.Rotary"}, dropout=0.3)
features, direction = torch.randn(2, 8, 4), torch.randn(2, 8, 16)
step = lambda: (encoder(features)[-1] * direction).sum()
given = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
wanted = torch.autograd.grad(step(), given)
found = torch.autograd.grad(compiled(step, graphs=False)(), given)
for one, other in zip(found, wanted, strict=True):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
assert sums[-1] == (4, 0), sums  # of the attention and of the feed-forward network of two layers
"""


def test_products_are_added_to_the_residuals_gradient_where_it_lies():
    pytest.importorskip("triton")
    run_interpreted(INTERPRETED)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_encoder_has_the_eager_ones_gradients_on_the_gpu(monkeypatch):
    from audiot.compilation import compiled

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
    for eager, fast in zip(*gradients, strict=True):
        assert (fast - eager).norm() / eager.norm() < 0.03
