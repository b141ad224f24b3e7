"""What mechanisms compute with kernels is what they compute without; Triton's interpreter runs the kernels here."""

from __future__ import annotations

import pytest
from interpreter import run_interpreted

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

for name, overrides in CASES:
    for num_frames, padded in ((9, False), (70, True)):
        torch.manual_seed(0)
        mechanism = build_mechanism(name, 24, 3, 80, dropout=0.0, **overrides)
        # As projections give them: frames before heads in memory.
        frames = [torch.randn(2, num_frames, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
        valid = torch.arange(num_frames) < torch.tensor([[num_frames], [num_frames // 2]]) if padded else None
        direction = torch.randn(2, 3, num_frames, 8)
        plain, fast = (attend(mechanism, frames, valid, kernels) for kernels in (False, True))
        for one, other in zip(fast, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
"""
CASES = {
    "local": ("local", {"window": 3}),
    "strided": ("sparse_strided", {"stride": 4}),
    "fixed": ("sparse_fixed", {"block_size": 4}),
    "fixed, two summaries": ("sparse_fixed", {"block_size": 5, "num_summary": 2}),
    "routing": ("routing", {"num_clusters": 3, "cluster_size": 7}),
    "hashed": ("lsh_simple", {"search": "chunked", "chunk_size": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_give_what_the_plain_form_gives(case):
    pytest.importorskip("triton")
    run_interpreted(f"CASES = {[CASES[case]]!r}\n" + COMPARISON)
