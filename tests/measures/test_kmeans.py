"""Mini-batch k-means beside scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from audiot.measures import kmeans as module
from audiot.measures.kmeans import assign, kmeans


def test_clusters_far_apart_are_found():
    points, labels = make_blobs(3000, n_features=8, centers=12, cluster_std=0.3, random_state=0)
    frames = torch.from_numpy(points)
    centres = kmeans(frames, 12, seed=0, batch_size=500)
    assert adjusted_rand_score(labels, assign(frames, centres).numpy()) > 0.99


@pytest.mark.parametrize("sample", [20_000, 400])
def test_points_are_as_near_to_their_centres_as_with_scikit_learn(monkeypatch, sample):
    monkeypatch.setattr(module, "SAMPLE", sample)
    monkeypatch.setattr(module, "ROWS", 700)
    points = np.random.default_rng(0).normal(size=(2000, 5))
    expected = KMeans(20, n_init=3, random_state=0).fit(points).inertia_
    frames = torch.from_numpy(points)
    centres = kmeans(frames, 20, seed=1, batch_size=1000)
    chosen = assign(frames, centres)
    assert chosen.tolist() == torch.cdist(frames.float(), centres).argmin(1).tolist()
    inertia = (frames - centres[chosen]).square().sum().item()
    assert expected * 0.99 < inertia < expected * 1.1


def test_small_batches_move_centres_less_and_less():
    points = np.random.default_rng(0).normal(size=(2000, 5))
    expected = KMeans(20, n_init=3, random_state=0).fit(points).inertia_
    frames = torch.from_numpy(points)
    centres = kmeans(frames, 20, seed=1, iterations=300, batch_size=60)
    assert (frames - centres[assign(frames, centres)]).square().sum().item() < expected * 1.06


def test_the_seed_decides():
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 3)))
    first = kmeans(points, 8, seed=0, batch_size=100)
    assert torch.equal(first, kmeans(points, 8, seed=0, batch_size=100))
    assert not torch.equal(first, kmeans(points, 8, seed=1, batch_size=100))


def test_as_many_clusters_as_points_are_the_points():
    points = torch.arange(6.0)[:, None]
    assert sorted(kmeans(points, 6, seed=0).flatten().tolist()) == pytest.approx([0, 1, 2, 3, 4, 5])
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=f"must be from 1 to that of points, 6, found {wrong}"):
            kmeans(points, wrong, seed=0)
