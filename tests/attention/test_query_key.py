"""Query-key attention with one projection for queries and keys."""

from __future__ import annotations

import pytest
import torch

from audiot.attention import build
from audiot.attention.query_key import SharedQueryKey


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
