"""Attention in groups: the plain form against a loop, the kernels (run by Triton's interpreter) against the plain form."""

from __future__ import annotations

import pytest
import torch
from interpreter import run_interpreted

from audiot.attention.grouped import gather, grouped_attention
from audiot.positions import RelativeBias


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_hand(query, key, value, queries, keys, radius=None, bias=None):
    """One pair of frames at a time."""
    num_sequences, num_heads, num_frames, head_dim = query.shape
    queries = queries.expand(num_sequences, num_heads, -1, -1)
    keys = keys.expand(num_sequences, num_heads, -1, -1)
    context = torch.zeros_like(value)
    for b in range(num_sequences):
        for h in range(num_heads):
            results = [[] for _ in range(num_frames)]
            for group_queries, group_keys in zip(queries[b, h].tolist(), keys[b, h].tolist(), strict=True):
                for i in group_queries:
                    seen = [j for j in group_keys if j >= 0 and (radius is None or abs(i - j) <= radius)]
                    if i >= 0:
                        scores = [query[b, h, i] @ key[b, h, j] / head_dim**0.5 for j in seen]
                        if bias is not None:
                            scores = [score + bias[h, j - i] for score, j in zip(scores, seen, strict=True)]
                        weights = torch.stack(scores).softmax(0) if seen else torch.zeros(0, dtype=value.dtype)
                        results[i].append(weights @ value[b, h, seen])
            for i, result in enumerate(results):
                if result:
                    context[b, h, i] = torch.stack(result).mean(0)
    return context


def overlapping(seed=0, num_frames=9, groups=4, places=5):
    """Random lists: frames in several groups or none, empty places, for every sequence and head others."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(2, 3, groups, num_frames, generator=generator).argsort(-1)[..., :places]
    empty = torch.rand(2, 3, groups, places, generator=generator) < 0.2
    return order.masked_fill(empty, -1)


CASES = {
    "overlapping": (overlapping(0), overlapping(1, places=7), {}),
    "window": (
        torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])[None, None],
        torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, -1, -1]])[None, None],
        {"radius": 2, "partition": True},
    ),
    "strided": (
        torch.tensor([[0, 3, 6], [1, 4, 7], [2, 5, 8]])[None, None],
        torch.tensor([[0, 3, 6], [1, 4, 7], [2, 5, -1]])[None, None].expand(2, 1, -1, -1),
        {"partition": True},
    ),
}


def inputs(seed=0, dtype=torch.float64):
    return [randn(2, 3, 9, 4, seed=seed + 10 + part, dtype=dtype).requires_grad_() for part in range(3)]


@pytest.mark.parametrize("case", CASES)
def test_the_plain_form_equals_a_loop_with_gradients(case):
    queries, keys, options = CASES[case]
    frames = inputs()
    expected = by_hand(*frames, queries, keys, options.get("radius"))
    got = grouped_attention(*frames, queries, keys, **options)
    torch.testing.assert_close(got, expected)
    direction = randn(*got.shape)
    for one, other in zip(
        torch.autograd.grad(got, frames, direction), torch.autograd.grad(expected, frames, direction), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_biases_belong_to_pairs_of_frames():
    queries, keys, options = CASES["overlapping"]
    table = RelativeBias(12, 3, 9, max_offset=8).layer_part().double()
    with torch.no_grad():
        table.table.copy_(randn(3, 17))
    bias = {(head, offset): table.table[head, offset + 8] for head in range(3) for offset in range(-8, 9)}
    frames = inputs()
    expected = by_hand(*frames, queries, keys, bias=bias)
    torch.testing.assert_close(grouped_attention(*frames, queries, keys, positions=table, **options), expected)


def test_gather_takes_rows_by_number():
    frames = randn(2, 3, 9, 4)
    index = overlapping()
    for b in range(2):
        for h in range(3):
            assert gather(frames, index)[b, h].equal(frames[b, h][index[b, h].clamp_min(0)])


@pytest.mark.parametrize("partition", [True, False])
def test_dropout_keeps_the_mean(partition):
    queries, keys, _ = CASES["strided"]
    frames = [tensor.detach() for tensor in inputs()]
    torch.manual_seed(0)
    draws = [grouped_attention(*frames, queries, keys, partition=partition, dropout=0.3) for _ in range(2000)]
    whole = grouped_attention(*frames, queries, keys, partition=partition)
    torch.testing.assert_close(torch.stack(draws).mean(0), whole, rtol=0, atol=0.1)
    assert not torch.allclose(draws[0], whole)


KERNELS = """
import torch
from test_grouped import CASES, inputs, randn
from audiot.kernels import grouped as grouped_kernels
from audiot.attention.grouped import grouped_attention

def compare(frames, queries, keys, options, by_key):
    expected = grouped_attention(*frames, queries, keys, **options)
    radius, partition = options.get("radius"), options.get("partition", False)
    got = grouped_kernels.attend(*frames, queries, keys, radius, partition, by_key, 0.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    direction = randn(*got.shape, dtype=torch.float32)
    pairs = zip(torch.autograd.grad(got, frames, direction), torch.autograd.grad(expected, frames, direction), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

for name, (queries, keys, options) in CASES.items():
    frames = inputs(dtype=torch.float32)
    compare(frames, queries, keys, options, None)
    transposed = [frame.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for frame in frames]
    by_key = {"window": [keys, queries], "strided": [queries, keys]}.get(name)
    compare(transposed, queries, keys, options, by_key)

# Fewer keys than queries.
frames = [randn(2, 3, count, 4, seed=part, dtype=torch.float32).requires_grad_() for part, count in enumerate((9, 4, 4))]
halves, all_keys = torch.arange(8).view(1, 1, 2, 4), torch.arange(4).expand(1, 1, 2, 4)
compare(frames, halves, all_keys, {"partition": True}, None)

# Several tiles of queries and keys, and an odd head size.
torch.manual_seed(0)
queries = torch.stack([torch.randperm(150)[:140] for _ in range(2)])[None, None]
keys = torch.stack([torch.randperm(150)[:90] for _ in range(2)])[None, None]
frames = [randn(1, 1, 150, 20, seed=part, dtype=torch.float32).requires_grad_() for part in range(3)]
compare(frames, queries, keys, {"radius": 60}, None)

# Dropped weights are the same ones in the backward pass: the context is linear in the values.
frames = [frame.detach()[:1, :1].requires_grad_() for frame in inputs(dtype=torch.float32)]
queries, keys = (part[:1, :1] for part in CASES["overlapping"][:2])
torch.manual_seed(3)
context = grouped_kernels.attend(*frames, queries, keys, None, False, None, 0.5)
assert not torch.allclose(context, grouped_attention(*frames, queries, keys))
direction = randn(*context.shape, dtype=torch.float32)
def dropped_at(number, step):
    there = [frame.detach() + (step if part == number else 0) for part, frame in enumerate(frames)]
    torch.manual_seed(3)
    return grouped_kernels.attend(*there, queries, keys, None, False, None, 0.5)
for number, gradient in enumerate(torch.autograd.grad(context, frames, direction)):
    step = 1e-2 * randn(*context.shape, seed=9, dtype=torch.float32)
    change = ((dropped_at(number, step) - dropped_at(number, -step)) * direction).sum() / 2
    torch.testing.assert_close((gradient * step).sum(), change, rtol=0.02, atol=1e-4)
"""


def test_the_kernels_equal_the_plain_form():
    pytest.importorskip("triton")
    run_interpreted(KERNELS)
