"""Quality of codes beside scikit-learn's measures and scipy's entropy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import homogeneity_score, mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from audiot.measures.codes import code_quality, quality


def test_figures_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    phones = draw.integers(0, 7, 900)
    codes = np.where(draw.random(900) < 0.6, 2 * phones + draw.integers(0, 2, 900), draw.integers(0, 16, 900))
    found = quality(phones, codes)
    table = contingency_matrix(phones, codes)
    assert found.pnmi == pytest.approx(mutual_info_score(phones, codes) / entropy(np.bincount(phones)))
    assert found.pnmi == pytest.approx(homogeneity_score(phones, codes))
    assert found.phone_purity == pytest.approx(table.max(0).sum() / 900)
    assert found.cluster_purity == pytest.approx(table.max(1).sum() / 900)
    assert found.perplexity == pytest.approx(np.exp(entropy(np.bincount(codes))))
    assert found.frames == 900


def test_figures_by_hand():
    """Two phones, four codes: each code tells the phone, each phone has two codes."""
    assert quality(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3])) == pytest.approx((1, 1, 0.5, 4, 4))
    assert quality(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0])) == pytest.approx((0, 0.5, 1, 1, 4))
    assert quality(np.array([0, 0]), np.array([0, 1])).pnmi == 1


def test_codes_of_clusters_that_are_phones_tell_them():
    phones = np.random.default_rng(0).integers(0, 5, 400)
    frames = 10 * torch.eye(5)[torch.from_numpy(phones)] + 0.1 * torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    assert code_quality(frames, phones, 5, seed=0).pnmi == pytest.approx(1)
    with pytest.raises(ValueError, match="codes=500 need as many labelled frames, found 400: lower codes"):
        code_quality(frames, phones, 500, seed=0)


@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=200))
def test_figures_of_any_codes_are_those_of_scikit_learn(pairs):
    phones, codes = (np.array(each) for each in zip(*pairs, strict=True))
    found, table = quality(phones, codes), contingency_matrix(phones, codes)
    assert found.pnmi == pytest.approx(homogeneity_score(phones, codes), abs=1e-9)
    assert found.phone_purity == pytest.approx(table.max(0).sum() / len(pairs))
    assert found.cluster_purity == pytest.approx(table.max(1).sum() / len(pairs))
    assert 0 <= found.pnmi <= 1 + 1e-9
    assert 1 - 1e-9 <= found.perplexity <= len(set(codes.tolist())) + 1e-9
