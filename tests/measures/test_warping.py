"""Distances of frames and their warping, beside plain forms and scipy."""

import numpy as np
import pytest
import torch
from scipy.spatial import distance as scipy_distance
from scipy.stats import entropy

from audiot.measures import warping
from audiot.measures.warping import Distance, size_class, warp


def plain_warp(costs):
    """The mean cost on the cheapest path; of equal ones, that which goes on in both units, or else in the second."""
    best = {}
    for i, j in np.ndindex(costs.shape):
        steps = [best[step] for step in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if step in best]
        total, length = min(steps, key=lambda step: step[0]) if steps else (0.0, 0)
        best[i, j] = total + costs[i, j], length + 1
    total, length = best[costs.shape[0] - 1, costs.shape[1] - 1]
    return total / length


def matrices(draw, count, longest):
    return [draw.integers(0, 4, draw.integers(1, longest, 2)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("cells", [2**17, 30])
def test_many_pairs_at_once_have_the_costs_of_each_alone(monkeypatch, cells):
    monkeypatch.setitem(warping.CELLS, "cpu", cells)
    found = matrices(np.random.default_rng(0), 300, 14)
    rows, columns = (np.array([matrix.shape[side] for matrix in found]) for side in (0, 1))
    starts = np.cumsum([0, *(matrix.size for matrix in found[:-1])])
    costs = torch.from_numpy(np.concatenate([matrix.ravel() for matrix in found]))
    expected = [plain_warp(matrix) for matrix in found]
    assert warp(costs, starts, columns, rows, columns).tolist() == pytest.approx(expected, rel=1e-6)


def test_pairs_share_a_matrix():
    matrix = np.random.default_rng(1).random((9, 20)).astype(np.float32)
    corners, sizes = [(0, 0), (2, 3), (5, 11)], [(4, 7), (7, 17), (1, 1)]
    expected = [plain_warp(matrix[i : i + n, j : j + m]) for (i, j), (n, m) in zip(corners, sizes, strict=True)]
    starts = np.array([20 * i + j for i, j in corners])
    rows, columns = np.array(sizes).T
    found = warp(torch.from_numpy(matrix.ravel()), starts, np.full(3, 20), rows, columns)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_sizes_hold_what_is_in_them():
    counts = np.arange(1, 3000)
    classes = size_class(counts)
    assert (classes >= counts).all()
    assert len(np.unique(classes[:1000])) < 21
    assert (classes[:1023] < 2 * counts[:1023]).all()


def between(name, first, second):
    distance = Distance(name)
    frames = distance.prepared(torch.cat([first, second]))
    return distance.between(frames[: len(first)], frames[len(first) :]).double().numpy()


def symmetric_divergence(p, q):
    """Scipy's, for rows without zeros."""
    return (entropy(p, q) + entropy(q, p)) / 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("angular", lambda p, q: np.arccos(1 - scipy_distance.cosine(p, q)) / np.pi),
        ("cosine", scipy_distance.cosine),
        ("euclidean", scipy_distance.euclidean),
        ("kl", symmetric_divergence),
    ],
)
def test_distances_are_those_of_scipy(name, expected):
    draw = np.random.default_rng(2)
    first, second = draw.dirichlet(np.ones(5), 6) + 0.05, draw.dirichlet(np.ones(5), 4) + 0.05
    first, second = (rows / rows.sum(1, keepdims=True) for rows in (first, second))
    found = between(name, torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx(np.array([[expected(p, q) for q in second] for p in first]), abs=2e-5)


def test_frames_without_a_direction_are_near_each_other():
    frames = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 0, 0]])
    found = between("angular", frames, frames)
    assert found[0, 1] < 1e-3
    assert found[0, 2] == pytest.approx(np.arccos(3**-0.5) / np.pi, abs=1e-5)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="distance must be one of angular, cosine, euclidean, kl, found 'manhattan'"):
        Distance("manhattan")
    with pytest.raises(ValueError, match="distance=kl compares probabilities"):
        Distance("kl").prepared(torch.randn(3, 4))
    with pytest.raises(ValueError, match="not finite"):
        Distance("angular").prepared(torch.tensor([[1.0, torch.nan]]))
