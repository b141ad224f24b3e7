"""The pass over the graph of a compiled step: alone, with interpreted kernels, and in place on CUDA devices."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from interpreter import run_interpreted
from omegaconf import OmegaConf
from some import some
from torch._dynamo.backends.common import aot_autograd

import audiot.commands.launch  # noqa: F401 (registers the config's resolvers)
from audiot.attention import SelfAttention, names
from audiot.model import Encoder
from audiot.pretraining import MaskedAcousticModel

INTERPRETED = """
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from audiot.kernels import residual as kernels
from audiot.training.compilation import SumsInPlace

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


# Of these Inductor writes code itself: at some sizes it takes Triton minutes to compile.
WRITTEN_BY_INDUCTOR = {"sort", "argsort", "msort", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "associative_scan"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "choices"),
    [*((name, []) for name in names()), *((name, ["attention/search=chunked"]) for name in names() if "lsh" in name)],
)
def test_no_mechanism_has_a_sort_or_a_scan_that_inductor_would_write(name, choices):
    overrides = {"num_bits": 16} if "lsh" in name else {}
    parts = {"embed_dim": 24, "num_heads": 2, "max_frames": 160}
    layer = SelfAttention(24, 2, instantiate({**options(name, *choices), **overrides}, **parts)).train()
    valid = torch.arange(150) < torch.tensor([[150], [90]])
    operations = operations_of(layer, torch.randn(2, 150, 24, requires_grad=True), valid)
    assert len(operations) > 5
    assert not operations & WRITTEN_BY_INDUCTOR


@pytest.mark.parametrize("objective", some(["mockingjay", "tera", "audio_albert"], ["tera"]))
def test_no_objective_has_a_sort_or_a_scan_that_inductor_would_write(objective):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        corruption = OmegaConf.to_container(compose("pretrain", [f"objective={objective}"]).objective)
    features = {"_target_": "audiot.features.LogMel", "n_mels": 20, "stack": 1}
    encoder = {
        "_target_": "audiot.model.Encoder", "embed_dim": 24, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "max_frames": 160,
        "attention": options("uniform"), "positions": {"_target_": "audiot.positions.Sinusoid"},
    }  # fmt: skip
    optimizer, scheduler = {"_target_": "torch.optim.SGD"}, {"_target_": "audiot.training.optimization.constant"}
    module = MaskedAcousticModel(features, encoder, corruption, optimizer, scheduler)
    lengths = torch.tensor([150, 90])
    given = (torch.randn(2, 150, 20), lengths, torch.tensor([1, 2]), torch.arange(150) < lengths[:, None])
    operations = operations_of(lambda *inputs: module.loss(*inputs).value, *given)
    assert "topk" in operations  # which Inductor leaves to PyTorch
    assert not operations & WRITTEN_BY_INDUCTOR


def operations_of(function, *inputs):
    """Names of PyTorch's operations in the graphs, forward and backward, that Inductor would get."""
    operations = set()

    def noted(graph, _):
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        operations.update(str(call).split(".")[1] for call in calls if str(call).count(".") >= 2)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=noted))
    compiled(*inputs).sum().backward()
    return operations


def options(name, *choices):
    """Parameters of a mechanism as its file in conf/attention has them."""
    with initialize_config_module("audiot.conf", version_base="1.3"):
        return {**OmegaConf.to_container(compose("pretrain", [f"attention={name}", *choices]).attention), "dropout": 0.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_encoder_has_the_eager_ones_gradients_on_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # code from an earlier run would pass no graph here
    from audiot.training.compilation import SumsInPlace, compiled

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
