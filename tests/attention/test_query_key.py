"""Query-key attention: short sequences on CPUs, and one projection for queries and keys."""

from __future__ import annotations

import pytest
import torch

from audiot.attention import build
from audiot.attention.query_key import SHORT, QueryKey, SharedQueryKey


def scores_without_the_diagonal(query):
    """Reformer's weights, one frame at a time."""
    weights = torch.zeros(*query.shape[:-1], query.shape[-2], dtype=query.dtype)
    for batch, heads in enumerate(query):
        for head, rows in enumerate(heads):
            for i, q in enumerate(rows):
                others = [j for j in range(len(rows)) if j != i] or [i]
                scores = torch.stack([q @ rows[j] / rows[j].norm() for j in others]) / query.shape[-1] ** 0.5
                weights[batch, head, i, others] = scores.softmax(0)
    return weights


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_frames", [40, SHORT + 1])
def test_training_in_half_precision_on_a_cpu_is_that_in_float32(num_frames, padded):
    torch.manual_seed(0)
    exact = [tensor.bfloat16().float().requires_grad_() for tensor in 2 * torch.randn(3, 2, 3, num_frames, 8)]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    valid = torch.arange(num_frames) < torch.tensor([[num_frames], [num_frames // 2]]) if padded else None
    mechanism, direction = QueryKey(24, 3, 300), torch.randn(2, 3, num_frames, 8)
    wanted = mechanism(query=exact[0], key=exact[1], value=exact[2], valid=valid)
    with torch.autocast("cpu", torch.bfloat16):
        found = mechanism(query=half[0], key=half[1], value=half[2], valid=valid)
    assert found.dtype == torch.bfloat16
    wanted_gradients = torch.autograd.grad(wanted, exact, direction)
    gradients = torch.autograd.grad(found, half, direction.bfloat16())
    for one, other in zip((found, *gradients), (wanted, *wanted_gradients), strict=True):
        assert (one.float() - other).norm() / other.norm() < 0.01


@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_shared_query_key_is_reformers_attention(num_frames):
    torch.manual_seed(0)
    query, value = torch.randn(2, 2, 3, num_frames, 4, dtype=torch.float64)
    mechanism = SharedQueryKey(12, 3, 10).eval()
    expected = scores_without_the_diagonal(query)
    torch.testing.assert_close(mechanism.weights(query=query), expected)
    torch.testing.assert_close(mechanism(query=query, value=value), expected @ value)


def test_a_frame_attends_to_itself_only_where_no_other_is_real():
    torch.manual_seed(0)
    query = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    valid = torch.tensor([[False, True, False, False, False], [True, True, True, False, False]])
    weights = SharedQueryKey(12, 3, 10).weights(query=query, valid=valid)
    assert (weights[0, :, 1, 1] == 1).all()
    assert (weights[1].diagonal(dim1=-2, dim2=-1)[:, :3] == 0).all()
    torch.testing.assert_close(weights[1, :, :3, :3], scores_without_the_diagonal(query[1:, :, :3])[0])


def test_no_key_projection_is_built():
    attention = build("shared_query_key", 12, 3, 10)
    assert not hasattr(attention, "key")


def test_queries_of_zeros_are_finite_in_half_precision():
    query = torch.zeros(1, 3, 5, 4, dtype=torch.float16)
    value = torch.ones(1, 3, 5, 4, dtype=torch.float16)
    assert (SharedQueryKey(12, 3, 10).eval()(query=query, value=value) == 1).all()


def test_the_keys_of_a_shared_query_are_all_but_its_own():
    query = torch.randn(1, 3, 5, 4)
    assert SharedQueryKey(12, 3, 10).chosen_keys(query=query).equal(~torch.eye(5, dtype=torch.bool).expand(1, 3, -1, -1))
