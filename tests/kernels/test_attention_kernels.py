"""What mechanisms compute with kernels is what they compute without; Triton's interpreter runs the kernels here."""

from __future__ import annotations

import pytest
import torch
from interpreter import run_interpreted

from audiot.attention import build, build_mechanism, names
from audiot.positions import Rotary

COMPARISON = """
import torch
from audiot.attention import build_mechanism, grouped, local, sparse

sparse.GROUP = 32

def attend(mechanism, frames, valid, kernels):
    for module in (grouped, local, sparse):
        module.has_kernel = lambda query: kernels
    context = mechanism(query=frames[0], key=frames[1], value=frames[2], valid=valid)
    real = torch.ones(context.shape[0], context.shape[2], dtype=torch.bool) if valid is None else valid
    context = context * real[:, None, :, None]
    return context, *torch.autograd.grad(context, frames, direction)

for case, (name, overrides) in CASES.items():
    for num_frames, padded in LENGTHS:
        torch.manual_seed(0)
        mechanism = build_mechanism(name, 16, 2, 80, dropout=0.0, **overrides)
        # As projections give them: frames before heads in memory.
        frames = [torch.randn(2, num_frames, 2, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
        valid = torch.arange(num_frames) < torch.tensor([[num_frames], [num_frames // 2]]) if padded else None
        direction = torch.randn(2, 2, num_frames, 8)
        plain, fast = (attend(mechanism, frames, valid, kernels) for kernels in (False, True))
        for one, other in zip(fast, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text: f"{case}: {text}")
"""
CASES = {
    "local": ("local", {"window": 3}),
    "strided": ("sparse_strided", {"stride": 4}),
    "fixed": ("sparse_fixed", {"block_size": 4}),
    "fixed, two summaries": ("sparse_fixed", {"block_size": 5, "num_summary": 2}),
    "routing": ("routing", {"num_clusters": 3, "cluster_size": 7}),
    "hashed": ("lsh_simple", {"search": {"name": "chunked", "chunk_size": 8}}),
}


@pytest.mark.parametrize(
    ("cases", "lengths"),
    [
        (("local", "strided", "fixed", "routing", "hashed"), [(70, True)]),
        pytest.param(CASES, [(9, False), (70, True)], marks=pytest.mark.slow),
    ],
)
def test_kernels_give_what_the_plain_form_gives(cases, lengths):
    pytest.importorskip("triton")
    run_interpreted(f"CASES, LENGTHS = { {name: CASES[name] for name in cases}!r}, {lengths!r}\n" + COMPARISON)


MERGE = """
import torch
from audiot.kernels.projection import ProjectAndTurn
from audiot.positions import Rotary

torch.manual_seed(0)
rotary = Rotary(24, 3, 10)
eager = ProjectAndTurn.apply
compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
for frames_first, bias, call in ((True, True, eager), (False, False, eager), (True, True, compiled)):
    hidden, weight = torch.randn(2, 7, 16, requires_grad=True), torch.randn(72, 16, requires_grad=True)
    given = [hidden, weight] + bias * [torch.randn(72, requires_grad=True)]
    shape = (2, 7, 3, 8) if frames_first else (2, 3, 7, 8)
    direction = [torch.randn(shape).transpose(1, 2) if frames_first else torch.randn(shape) for _ in range(3)]

    projected = torch.nn.functional.linear(*given)
    query, key, value = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
    plain = (rotary.rotate(query), rotary.rotate(key), value)
    fast = call(hidden, weight, given[2] if bias else None, rotary.factors(7, torch.float32), 8)
    fast = [part.unflatten(-1, (3, 8)).transpose(1, 2) for part in fast]
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other)
    wanted, found = (torch.autograd.grad(heads, given, direction) for heads in (plain, fast))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
"""


def test_gradients_of_a_joint_projection_are_those_of_its_parts():
    pytest.importorskip("triton")
    run_interpreted(MERGE)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def distance(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@needs_cuda
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["local", "sparse_strided", "sparse_fixed"])
def test_kernels_on_the_gpu_give_what_the_plain_form_gives_in_float32(name, padded):
    torch.manual_seed(0)
    mechanism = build_mechanism(name, 256, 4, 1000, dropout=0.0).cuda()
    frames = [torch.randn(2, 1000, 4, 64, device="cuda").transpose(1, 2).requires_grad_() for _ in range(3)]
    valid = torch.arange(1000, device="cuda") < torch.tensor([[1000], [700]], device="cuda")
    direction = torch.randn(2, 4, 1000, 64, device="cuda") * valid[:, None, :, None]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (frame.to(dtype) for frame in frames)
        context = mechanism(query=query, key=key, value=value, valid=valid if padded else None) * valid[:, None, :, None]
        results.append([context, *torch.autograd.grad(context, frames, direction.to(dtype))])
    for plain, fast in zip(*results, strict=True):
        assert distance(fast, plain) < 0.01


@needs_cuda
def test_a_layer_with_rotary_positions_gives_on_the_gpu_in_bfloat16_what_it_gives_in_float32():
    torch.manual_seed(0)
    layer = build("query_key", 256, 4, 400, Rotary(256, 4, 400)).cuda()
    hidden, direction = (torch.randn(2, 384, 256, device="cuda") for _ in range(2))
    # The gradient of the keys' bias is zero but for rounding.
    parameters = [value for name, value in layer.named_parameters() if name != "key.bias"]

    def outcome(call, half):
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            output = call(hidden)
        return [output, *torch.autograd.grad(output, parameters, direction.to(output.dtype))]

    exact = outcome(layer, half=False)
    fast = outcome(layer, half=True)
    compiled = outcome(torch.compile(layer, dynamic=True, fullgraph=True), half=True)
    layer._turns_here = lambda *_: False
    plain = outcome(layer, half=True)
    for wanted, rounded, *found in zip(exact, plain, fast, compiled, strict=True):
        for one in found:
            assert distance(one, wanted) < 0.005 + 1.2 * distance(rounded, wanted)


@needs_cuda
@pytest.mark.parametrize("name", names())
def test_every_mechanism_computes_on_the_gpu_what_it_computes_on_the_cpu(name):
    torch.manual_seed(0)
    layer = build(name, 64, 4, 200, dropout=0.0).eval()
    hidden = torch.randn(2, 150, 64)
    valid = torch.arange(150) < torch.tensor([[150], [90]])
    expected = layer.double()(hidden.double(), valid)
    output = layer.cuda()(hidden.double().cuda(), valid.cuda())
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-8, atol=1e-8)


@needs_cuda
@pytest.mark.parametrize("name", names())
def test_every_mechanism_trains_on_the_gpu_under_autocast(name):
    torch.manual_seed(0)
    layer = build(name, 64, 4, 200, dropout=0.1).cuda().train()
    hidden = torch.randn(2, 150, 64, device="cuda", requires_grad=True)
    valid = torch.arange(150, device="cuda") < torch.tensor([[150], [90]], device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            output = layer(hidden, valid)
        gradients = torch.autograd.grad(output.float().square().sum(), [hidden, *layer.parameters()], allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
