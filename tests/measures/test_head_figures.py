"""Figures of heads against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

from audiot.measures.heads import head_figures, table_figures


def figures(weights, lengths=None, token_s=0.02):
    """Figures of matrices (H, T, T) as the heads of one utterance."""
    found = head_figures(weights[None], torch.tensor(lengths or [weights.shape[-1]]), token_s)
    return {name: values[0].tolist() for name, values in found.items()}


def test_a_head_on_the_diagonal_has_neither_entropy_nor_distance():
    assert figures(torch.eye(5)[None]) == {name: [0.0] for name in ("entropy", "entropy_share", "distance_s", "diagonality")}


def test_a_head_that_spreads_evenly_has_all_the_entropy_and_the_mean_distance():
    found = figures(torch.full((1, 4, 4), 1 / 4))
    # |q − k| over four frames: 4 × 0, 6 × 1, 4 × 2, 2 × 3, so 20 / 16 in the mean.
    assert found["entropy"] == pytest.approx([math.log(4)])
    assert found["entropy_share"] == pytest.approx([1.0])
    assert found["distance_s"] == pytest.approx([0.02 * 20 / 16])
    assert found["diagonality"] == pytest.approx([-20 / 16 / 4])


def test_each_head_and_utterance_has_its_own_figures_and_padding_does_not_count():
    weights = torch.zeros(2, 2, 4, 4)
    weights[0, 0] = torch.eye(4)
    weights[0, 1] = torch.eye(4).flip(0)  # distances 3, 1, 1, 3
    weights[1, :, :2, :2] = torch.tensor([[0.5, 0.5], [0.0, 1.0]])  # two real frames
    found = head_figures(weights, torch.tensor([4, 2]), 1.0)
    assert found["distance_s"].tolist() == [[0.0, 2.0], [0.25, 0.25]]
    assert found["diagonality"].tolist() == [[0.0, -0.5], [-0.125, -0.125]]
    assert found["entropy"][1].tolist() == pytest.approx([math.log(2) / 2] * 2)
    assert found["entropy_share"][1].tolist() == pytest.approx([0.5, 0.5])


def test_one_frame_is_no_entropy_of_nothing():
    assert figures(torch.ones(1, 1, 1))["entropy_share"] == [0.0]


def test_a_table_survives_while_half_of_its_mass_is_where_it_was():
    before = torch.eye(2).expand(3, 2, 2)
    after = torch.stack([torch.eye(2), torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.2, 0.8], [0.5, 0.5]])])
    found = {name: values.tolist() for name, values in table_figures(before, after).items()}
    assert found["moved"] == pytest.approx([0.0, (0.5 + 0.25) / 2, (0.8 + 0.5) / 2])
    assert found["survives"] == [1.0, 1.0, 0.0]
    assert found["entropy_before"] == [0.0, 0.0, 0.0]
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found["entropy_after"][1] == pytest.approx((math.log(2) + quarter) / 2)
