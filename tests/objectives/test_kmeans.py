"""k-means and what targets are made of, against scikit-learn, SciPy and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from audiot.features import LogMel
from audiot.objectives import kmeans as module
from audiot.objectives.codes import in_context, nearest_in_time, nearest_visible
from audiot.objectives.kmeans import first_centres, kmeans, lloyd, nearest, normalised_mutual_information


def blobs(num_points=400, num_blobs=6, dim=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    middles = 3 * torch.randn(num_blobs, dim, generator=generator, dtype=dtype)
    return middles[torch.arange(num_points) % num_blobs] + torch.randn(num_points, dim, generator=generator, dtype=dtype)


@pytest.mark.parametrize("iterations", [1, 2, 5, 300])
def test_lloyd_has_scikit_learns_centres(iterations):
    points = blobs()
    start = points[:9]
    reference = KMeans(9, init=start.numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(points.numpy())
    np.testing.assert_allclose(lloyd(points, start, iterations).numpy(), reference.cluster_centers_, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_is_that_of_all_distances_whatever_autocast_says(dtype):
    points, centres = blobs(dtype=torch.float32), blobs(30, seed=1, dtype=torch.float32)
    expected = cdist(points, centres).argmin(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert nearest(points, centres).tolist() == expected.tolist()
        assert nearest(points.view(20, 20, 5), centres).tolist() == expected.reshape(20, 20).tolist()


def test_of_equally_near_centres_the_first_is_taken():
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert nearest(torch.tensor([[0.0, 2.0], [1.0, 0.0], [-3.0, 0.0]]), centres).tolist() == [0, 0, 1]


def test_mutual_information_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(7, (500,), generator=generator), torch.randint(4, (500,), generator=generator)
    second = torch.where(torch.rand(500, generator=generator) < 0.6, first % 4, second)
    for one, other in ((first, second), (second, first), (first, first), (first + 3, second), (first * 0, first)):
        expected = normalized_mutual_info_score(one, other)
        assert normalised_mutual_information(one, other) == pytest.approx(expected, abs=1e-12)
    assert normalised_mutual_information(first * 0, first * 0) == 1


def test_chunks_change_nothing(monkeypatch):
    points = blobs()
    whole = kmeans(points, 9, seed=3)
    monkeypatch.setattr(module, "CHUNK", 9 * 7)  # seven points at a time
    torch.testing.assert_close(kmeans(points, 9, seed=3), whole, rtol=1e-12, atol=1e-12)


def test_points_far_from_zero_have_the_clusters_that_double_precision_finds():
    points = torch.randn(5000, 12, generator=torch.Generator().manual_seed(0)) + 40.0  # exact in both
    expected = lloyd(points.double(), first_centres(points.double(), 20, seed=0), 20)
    torch.testing.assert_close(kmeans(points, 20, seed=0).double(), expected, rtol=0, atol=1e-4)


def test_a_centre_without_points_moves_to_the_farthest_point():
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0]], dtype=torch.float64)
    start = torch.tensor([[1.0], [100.0]], dtype=torch.float64)
    # By hand: all four points are nearest to 1, the farthest is 10. The rest has the mean 1.
    assert lloyd(points, start, 1).tolist() == [[1.0], [10.0]]
    both = torch.tensor([[1.0], [100.0], [-100.0]], dtype=torch.float64)  # the next farthest are 0 and 2
    assert sorted(lloyd(points, both, 1).flatten().tolist()) in ([0.0, 1.5, 10.0], [0.5, 2.0, 10.0])
    assert bool(lloyd(torch.zeros(5, 2), torch.zeros(3, 2), 4).isfinite().all())  # more centres than different points


def test_clusters_that_are_there_are_found_and_first_centres_are_points():
    generator = torch.Generator().manual_seed(0)
    middles = 50 * torch.randn(8, 4, generator=generator)
    points = (middles[:, None] + 0.1 * torch.randn(8, 50, 4, generator=generator)).flatten(0, 1)
    first = first_centres(points, 8, seed=0)
    assert all(bool((points == centre).all(1).any()) for centre in first)
    distances = cdist(kmeans(points, 8, seed=0), middles)
    assert sorted(distances.argmin(1)) == list(range(8))
    assert distances.min(1).max() < 0.1


def test_the_seed_decides():
    points = blobs()
    assert kmeans(points, 9, seed=0).equal(kmeans(points, 9, seed=0))
    assert not first_centres(points, 9, seed=0).equal(first_centres(points, 9, seed=1))


def test_fewer_points_than_clusters_are_refused():
    with pytest.raises(ValueError, match=r"objective\.num_clusters=9 needs as many frames to fit on, found 4"):
        kmeans(blobs(4), 9, seed=0)


@pytest.mark.parametrize(
    ("own_stack", "hop", "stack"), [(1, 160, 1), (3, 160, 1), (1, 160, 2), (2, 160, 3), (3, 100, 1), (1, 320, 1)]
)
def test_a_token_gets_the_state_in_whose_middle_it_is(own_stack, hop, stack):
    def middle(number, hop, stack):
        """In samples. A frame has 400."""
        return np.mean([(number * stack + each) * hop + 200 for each in range(stack)])

    found = nearest_in_time(LogMel(n_mels=8, stack=own_stack), LogMel(n_mels=8, hop_length=hop), stack, 40, 45)
    for t in range(40):
        apart = [abs(middle(t, 160, own_stack) - middle(state, hop, stack)) for state in range(45)]
        assert int(found[t]) == int(np.argmin(apart))  # of two, the earlier


def test_the_nearest_visible_frame_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(30, 17, generator=generator) < torch.linspace(0.1, 1, 30)[:, None]
    lengths = torch.randint(1, 18, (30,), generator=generator)
    found = nearest_visible(masked, lengths)
    for row in range(30):
        visible = [t for t in range(int(lengths[row])) if not masked[row, t]]
        for t in range(int(lengths[row])):
            expected = min(visible, key=lambda other, t=t: (abs(other - t), other), default=t)
            assert int(found[row, t]) == expected


@pytest.mark.parametrize("context", [1, 3, 5])
def test_tokens_in_context_are_those_of_a_loop(context):
    tokens = torch.randn(4, 9, 2, generator=torch.Generator().manual_seed(0))
    lengths = [9, 5, 1, 2]
    found = in_context(tokens, torch.tensor(lengths), context)
    assert found.shape == (4, 9, 2 * context)
    for row, length in enumerate(lengths):
        for t in range(length):
            around = [tokens[row, min(max(t + shift, 0), length - 1)] for shift in range(-(context // 2), context // 2 + 1)]
            assert found[row, t].equal(torch.cat(around))
